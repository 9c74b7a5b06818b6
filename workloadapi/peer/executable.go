package peer

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Executables looks at the file that a process runs. The kernel shows it to those who may trace the process, a right that
// goes much further; so the agent may give it to a process of its own that does nothing else. Nothing here says that the
// process still lives: callers check that before and after. Methods may be called concurrently.
type Executables interface {
	// Stat says which file it is.
	Stat(pid int32, uid uint32) (Executable, error)

	// Path is where the process has it in its own mount namespace, and what is found under the same path here; there is zero
	// if nothing is. A file that was deleted has " (deleted)" behind its path.
	Path(pid int32, uid uint32) (path string, there Executable, err error)

	// Open opens it for reading, and Pin without the right to read (O_PATH).
	Open(pid int32, uid uint32) (*os.File, error)
	Pin(pid int32, uid uint32) (*os.File, error)
}

// An Executable is a file that is run, and its number of names.
type Executable struct {
	File
	Links uint64
}

// Proc reads /proc. It is the Executables of a process that may do so itself.
type Proc struct{}

func link(pid int32) string { return "/proc/" + strconv.Itoa(int(pid)) + "/exe" }

func statExecutable(path string) (Executable, error) {
	var st unix.Stat_t
	if err := ignoringEINTR(func() error { return unix.Stat(path, &st) }); err != nil {
		return Executable{}, err
	}
	return Executable{File: FileOf(&st), Links: uint64(st.Nlink)}, nil
}

// Stat says which file it is.
func (Proc) Stat(pid int32, _ uint32) (Executable, error) { return statExecutable(link(pid)) }

// Path is where it is.
func (Proc) Path(pid int32, _ uint32) (string, Executable, error) {
	path, err := os.Readlink(link(pid))
	if err != nil {
		return "", Executable{}, err
	}
	there, err := statExecutable(path)
	if err != nil {
		there = Executable{}
	}
	return path, there, nil
}

// Open opens it.
func (Proc) Open(pid int32, _ uint32) (*os.File, error) { return os.Open(link(pid)) }

// Pin opens it without the right to read.
func (Proc) Pin(pid int32, _ uint32) (*os.File, error) {
	fd, err := unix.Open(link(pid), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: link(pid), Err: err}
	}
	return os.NewFile(uintptr(fd), link(pid)), nil
}

// Executables is how the process's executable is looked at.
func (p *Process) Executables() Executables { return p.table.executables }
