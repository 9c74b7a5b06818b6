package svidfiles

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Signal tells a process by a signal that there are new files. Exactly one of PIDFile and PID is set.
type Signal struct {
	Signal  unix.Signal
	PIDFile string // its first line is the process id; read each time, since the program may have been started anew
	PID     int

	// Executable, if not empty, is the path of the program that the process must be running.
	Executable string

	fd int // of the process that PID named when Pin was called
}

// ParseSignal reads a signal that programs take for "read your files again".
func ParseSignal(name string) (unix.Signal, error) {
	switch s := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG")); s {
	case unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGTERM:
		return s, nil
	default:
		return 0, fmt.Errorf("signal %q is not HUP, USR1, USR2 or TERM", name)
	}
}

// Pin holds on to the process that PID names now, so that it cannot be mistaken for a later one with the same number.
func (s *Signal) Pin() error {
	if s.PID == 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(s.PID, 0)
	if err != nil {
		return fmt.Errorf("process %d: %w", s.PID, err)
	}
	s.fd = fd
	return nil
}

// Close lets go of what Pin holds.
func (s *Signal) Close() error {
	if s.fd == 0 {
		return nil
	}
	return unix.Close(s.fd)
}

func (s *Signal) String() string {
	if s.PID != 0 {
		return fmt.Sprintf("signal %v to process %d", s.Signal, s.PID)
	}
	return fmt.Sprintf("signal %v to the process of %s", s.Signal, s.PIDFile)
}

// Tell sends the signal, if the process is the right one. The process is held on to before it is looked at, so that what is
// looked at is what gets the signal.
func (s *Signal) Tell(context.Context, string) error {
	pid, fd := s.PID, s.fd
	var written time.Time
	if s.PIDFile != "" {
		f, err := readPIDFile(s.PIDFile)
		if err != nil {
			return err
		}
		pid, written = f.pid, f.written
		if fd, err = unix.PidfdOpen(pid, 0); err != nil {
			return fmt.Errorf("process %d of %s: %w", pid, s.PIDFile, err)
		}
		defer unix.Close(fd)
		if err := f.mayName(); err != nil {
			return err
		}
	}
	if s.Executable != "" {
		program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			return fmt.Errorf("looking at process %d: %w", pid, err)
		}
		if strings.TrimSuffix(program, " (deleted)") != s.Executable {
			return fmt.Errorf("process %d runs %s, not %s: it gets no signal", pid, program, s.Executable)
		}
	} else if s.PIDFile != "" {
		started, err := startOf(pid)
		if err != nil {
			return fmt.Errorf("looking at process %d: %w", pid, err)
		}
		const slack = 2 * time.Second // of clocks, and of ticks
		if started.After(written.Add(slack)) {
			return fmt.Errorf("process %d was started after %s was written, so it is another one than meant: it gets no signal", pid, s.PIDFile)
		}
	}
	if err := unix.PidfdSendSignal(fd, s.Signal, nil, 0); err != nil {
		return fmt.Errorf("signal %v to process %d: %w", s.Signal, pid, err)
	}
	return nil
}

// A pidFile is what a pid file says, and who can have made it say so.
type pidFile struct {
	path    string
	pid     int
	written time.Time
	owner   uint32 // of the file, or of the link to it if that is neither root's nor ours
}

// readPIDFile reads a process id. Some programs write more lines below it.
func readPIDFile(path string) (*pidFile, error) {
	const most = 4096
	file := &pidFile{path: path}
	linked := false
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ELOOP) {
		var link unix.Stat_t
		if err := unix.Lstat(path, &link); err != nil {
			return nil, fmt.Errorf("pid file %s: %w", path, err)
		}
		file.owner, linked = link.Uid, !trusted(link.Uid)
		f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("pid file: %w", err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("pid file %s: %w", path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("pid file %s is no file", path)
	case st.Mode&0o022 != 0:
		return nil, fmt.Errorf("pid file %s is writable by others than its owner (mode %04o), who could name any process there: chmod go-w %s", path, st.Mode&0o7777, path)
	case !linked:
		file.owner = st.Uid
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fmt.Errorf("pid file: %w", err)
	}
	if len(data) > most {
		return nil, fmt.Errorf("pid file %s is longer than %d bytes", path, most)
	}
	first, _, _ := bytes.Cut(data, []byte("\n"))
	n, err := strconv.ParseInt(strings.TrimSpace(string(first)), 10, 32)
	if err != nil || n <= 1 {
		return nil, fmt.Errorf("pid file %s holds no process id", path)
	}
	file.pid, file.written = int(n), time.Unix(st.Mtim.Unix())
	return file, nil
}

// trusted says whether a user may have us signal any process: root, and who we are.
func trusted(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// mayName refuses a process that the owner of the file may not send signals to himself. Otherwise whoever owns the file would
// have root send them, as PostgreSQL's user owns its own.
func (f *pidFile) mayName() error {
	if trusted(f.owner) {
		return nil
	}
	real, saved, err := usersOf(f.pid)
	if err != nil {
		return fmt.Errorf("looking at process %d: %w", f.pid, err)
	}
	if f.owner != real && f.owner != saved {
		return fmt.Errorf("pid file %s is of uid %d, and process %d that it names is not (uid %d): it gets no signal", f.path, f.owner, f.pid, real)
	}
	return nil
}

// usersOf are the real and the saved user of a process, of which one must be who sends it a signal. [kill(2)]
func usersOf(pid int) (real, saved uint32, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(data)) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			var effective, fs uint32
			if _, err := fmt.Sscan(ids, &real, &effective, &saved, &fs); err != nil {
				return 0, 0, fmt.Errorf("its line Uid: %w", err)
			}
			return real, saved, nil
		}
	}
	return 0, 0, errors.New("its status has no line Uid")
}

// startOf is when a process was started, by the clock of now.
func startOf(pid int) (time.Time, error) {
	const field, hertz = 22, 100 // of proc(5): starttime, in ticks of USER_HZ since boot
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return time.Time{}, err
	}
	end := bytes.LastIndexByte(data, ')') // the name before it may hold anything
	if end < 0 {
		return time.Time{}, errors.New("its stat is no line of the kernel's")
	}
	fields := strings.Fields(string(data[end+1:]))
	if len(fields) < field-2 {
		return time.Time{}, errors.New("its stat is too short")
	}
	ticks, err := strconv.ParseInt(fields[field-3], 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return time.Time{}, err
	}
	return time.Now().Add(time.Duration(ticks)*(time.Second/hertz) - time.Duration(up.Nano())), nil
}
