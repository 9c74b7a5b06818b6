package peer

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Errors that say why a process is not answered. They may be wrapped.
var (
	// ErrGone says that the process which opened the connection has ended, whoever holds the connection now.
	ErrGone = errors.New("the process that opened this connection has exited: connect anew")

	// ErrForeignPIDNamespace says that the caller has no process id here.
	ErrForeignPIDNamespace = errors.New("the caller is in a PID namespace that the agent cannot see (its process id is 0): " +
		"run the agent in the host's PID namespace, such as hostPID: true")

	// ErrUserChanged says that the process is not the user and group any more that it connected as.
	ErrUserChanged = errors.New("the process has become another user or group than it connected as: connect anew")
)

// A Process is the process that opened a connection, pinned until the connection is closed. Its methods may be called
// concurrently, also after the connection has been closed: they then return ErrGone.
type Process struct {
	// PID is the process id in the agent's PID namespace. Never 0.
	PID int32

	// UID and GID are the effective ids when the process connected (SO_PEERCRED).
	UID, GID uint32

	pin   *pin
	table *Table
}

// ID is a number that no other process has had since this table was made, even if it had the same process id. Several
// connections of one process have the same.
func (p *Process) ID() uint64 { return p.pin.id }

// Alive returns nil while the process lives and ErrGone once it has ended or is no longer pinned. A zombie has ended.
func (p *Process) Alive() error { return p.pin.alive() }

// Done is closed when the process has ended or is no longer pinned.
func (p *Process) Done() <-chan struct{} { return p.pin.gone }

// Close gives up a Process that Table.Open returned. It is not for those of connections.
func (p *Process) Close() { p.table.release(p.pin, nil) }

// A Snapshot is what a process can change about itself without becoming another process.
type Snapshot struct {
	// StartTime is in clock ticks after boot.
	StartTime uint64

	// RealUID, EffectiveUID and SavedUID are the user ids, and the same for the group.
	RealUID, EffectiveUID, SavedUID uint32
	RealGID, EffectiveGID, SavedGID uint32

	// Groups are the supplementary group ids in rising order.
	Groups []uint32

	// Executable is what the process runs. It is zero if the agent may not see it; then ExecutableErr says why.
	Executable    File
	ExecutableErr error
}

// A File is the identity of a file's content on this machine.
type File struct {
	Device, Inode uint64
	Size          int64

	// Modified and Changed are mtime and ctime in nanoseconds since 1970.
	Modified, Changed int64
}

// Equal says whether nothing differs.
func (s Snapshot) Equal(o Snapshot) bool {
	return s.StartTime == o.StartTime &&
		s.RealUID == o.RealUID && s.EffectiveUID == o.EffectiveUID && s.SavedUID == o.SavedUID &&
		s.RealGID == o.RealGID && s.EffectiveGID == o.EffectiveGID && s.SavedGID == o.SavedGID &&
		slices.Equal(s.Groups, o.Groups) &&
		s.Executable == o.Executable && (s.ExecutableErr == nil) == (o.ExecutableErr == nil)
}

// Snapshot reads the process's state between two checks that it lives.
//
// Errors: ErrGone; ErrUserChanged if it is another user or group than it connected as, since a connection opened by one must
// not serve another; and those of reading /proc.
func (p *Process) Snapshot() (Snapshot, error) {
	s, err := p.pin.looks.share(p.read)
	if err != nil {
		return Snapshot{}, err
	}
	if !p.mayBe(s) {
		return Snapshot{}, fmt.Errorf("process %d connected as uid %d, gid %d and is uid %d, gid %d now: %w", p.PID, p.UID, p.GID, s.EffectiveUID, s.EffectiveGID, ErrUserChanged)
	}
	return s, nil
}

func (p *Process) read() (Snapshot, error) {
	if err := p.Alive(); err != nil {
		return Snapshot{}, err
	}
	start := p.pin.start.Load()
	s, err := readSnapshot(p.PID, start, p.table.executables)
	// Only now is it known that what was read is about this process: while it lives, nobody else has its process id.
	if gone := p.Alive(); gone != nil {
		return Snapshot{}, gone
	}
	if err != nil {
		return Snapshot{}, err
	}
	if start == 0 {
		p.pin.start.Store(s.StartTime)
	}
	return s, nil
}

// mayBe says whether the process could become by its own right what it is now. Root can become anybody, and as long as it
// keeps root as its real or saved user it is still the one that connected. Whoever else has become another user or group
// has executed a program with set-user-ID or set-group-ID, and the connection may be in the hands of one who has not.
func (p *Process) mayBe(s Snapshot) bool {
	if p.UID == 0 {
		return s.RealUID == 0 || s.EffectiveUID == 0 || s.SavedUID == 0
	}
	return p.UID == s.EffectiveUID && p.GID == s.EffectiveGID
}

// maxKeptBuffer is the largest buffer that is kept: some process has tens of thousands of groups, the next has not.
const maxKeptBuffer = 64 << 10

// buffers are for what is read from /proc.
var buffers = sync.Pool{New: func() any { b := make([]byte, 4<<10); return &b }}

// readSnapshot reads the state of the process that has the id. Its start time is read unless it is known, since a process
// keeps it for life.
func readSnapshot(pid int32, start uint64, executables Executables) (Snapshot, error) {
	dir := "/proc/" + strconv.Itoa(int(pid))
	buf := buffers.Get().(*[]byte)
	defer func() {
		if len(*buf) <= maxKeptBuffer {
			buffers.Put(buf)
		}
	}()
	s := Snapshot{StartTime: start}
	if start == 0 {
		stat, err := readLimited(dir+"/stat", buf, maxStatBytes)
		if err == nil {
			s.StartTime, err = parseStartTime(stat)
		}
		if err != nil {
			return Snapshot{}, procError(pid, err)
		}
	}
	status, err := readLimited(dir+"/status", buf, maxStatusBytes)
	if err == nil {
		err = parseStatus(status, &s)
	}
	if err != nil {
		return Snapshot{}, procError(pid, err)
	}
	if exe, err := executables.Stat(pid, s.RealUID); err != nil {
		s.ExecutableErr = fmt.Errorf("reading %s/exe: %w", dir, err)
	} else {
		s.Executable = exe.File
	}
	return s, nil
}

// FileOf returns the content identity in what stat said.
func FileOf(st *unix.Stat_t) File {
	return File{Device: st.Dev, Inode: st.Ino, Size: st.Size, Modified: st.Mtim.Nano(), Changed: st.Ctim.Nano()}
}

func procError(pid int32, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading /proc/%d: %w (is /proc mounted, without hidepid for this user?)", pid, err)
	}
	return fmt.Errorf("reading /proc/%d: %w", pid, err)
}

// readLimited reads a file of /proc, whose size is not known before, into buf, which it makes larger if need be. It opens the
// file without the runtime's poller, which costs more than the reading.
func readLimited(path string, buf *[]byte, limit int) ([]byte, error) {
	var fd int
	err := ignoringEINTR(func() (err error) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	n := 0
	for {
		if n == len(*buf) {
			if n >= limit {
				return nil, fmt.Errorf("%s is longer than %d bytes", path, limit)
			}
			*buf = append(*buf, make([]byte, len(*buf))...)
		}
		var m int
		err := ignoringEINTR(func() (err error) {
			m, err = unix.Read(fd, (*buf)[n:])
			return err
		})
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if m == 0 {
			return (*buf)[:n], nil
		}
		n += m
	}
}

// ignoringEINTR repeats a call that a signal interrupted; the Go runtime sends itself signals all the time.
func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != syscall.EINTR {
			return err
		}
	}
}
