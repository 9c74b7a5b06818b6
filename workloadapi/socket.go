package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxSocketPath is what sockaddr_un holds beside the final zero byte.
const maxSocketPath = 107

// A socket is a listening Unix socket that is ours alone while its lock file is held.
type socket struct {
	path     string
	listener *net.UnixListener
	lock     *os.File // nil for a socket of a service manager, in a directory where only it may write
	dev, ino uint64

	// kept is set when somebody else holds the socket too, such as the service manager or the agent that comes after this
	// one: it is not removed then.
	kept atomic.Bool
}

// listen makes the socket: any local process may connect to it, as far as mode says, and none but us and root may put
// another in its place (WEP-34).
func listen(path string, mode os.FileMode, log *slog.Logger) (_ *socket, err error) {
	if path == "" {
		return nil, errors.New("the socket path is empty: name one, such as /run/signet/agent/agent.sock")
	}
	if strings.Contains(path, "://") {
		return nil, fmt.Errorf("socket path %q is a URI: give the path of a Unix socket alone (there is no TCP endpoint: nothing would say who calls)", path)
	}
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("socket path %q: %w", path, err)
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("socket path %q is %d bytes long, and Unix sockets allow %d: choose a shorter one", path, len(path), maxSocketPath)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the directory of socket %s: %w", path, err)
	}
	if err := checkDirectory(dir, log); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	s := &socket{path: path}
	if s.lock, err = lockFor(path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.lock.Close()
		}
	}()
	if err := checkFree(path); err != nil {
		return nil, err
	}
	if err := s.bind(dir, mode); err != nil {
		return nil, err
	}
	return s, nil
}

// adopt takes a socket that listens at path already, and which somebody else made: the service manager, or the agent
// before this one, whose lock comes along. It returns nil if nothing is at path any more.
func adopt(path string, listening, lock *os.File, log *slog.Logger) (_ *socket, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return nil, fmt.Errorf("socket path %q: %w", path, err)
	}
	if err := checkDirectory(filepath.Dir(path), log); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := net.FileListener(listening)
	if err != nil {
		return nil, fmt.Errorf("socket %s: what was passed in for it does not listen: %w", path, err)
	}
	s := &socket{path: path}
	var ok bool
	if s.listener, ok = l.(*net.UnixListener); !ok || l.Addr().Network() != "unix" {
		return nil, errors.Join(fmt.Errorf("socket %s: what was passed in for it listens on %s %s, not on a Unix stream socket", path, l.Addr().Network(), l.Addr()), l.Close())
	}
	s.listener.SetUnlinkOnClose(false)
	s.kept.Store(true)
	switch here, err := s.leadsHere(); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, l.Close()
	case err != nil:
		return nil, errors.Join(err, l.Close())
	case here:
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return nil, errors.Join(err, l.Close())
		}
		s.dev, s.ino = st.Dev, st.Ino
	default:
		return nil, errors.Join(fmt.Errorf("socket %s: the socket that was passed in is another one (bound to %q); the unit's ListenStream must be socket_path", path, l.Addr()), l.Close())
	}
	if lock != nil {
		fd, err := unix.FcntlInt(lock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock of socket %s: %w", path, err), l.Close())
		}
		s.lock = os.NewFile(uintptr(fd), lock.Name())
		return s, nil
	}
	if s.lock, err = lockFor(path); errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		return s, nil // nobody but the manager can put another socket there
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return s, nil
}

// leadsHere says whether who connects to the path comes out at this listener: the kernel queues a connection before
// connect returns.
func (s *socket) leadsHere() (bool, error) {
	st, err := os.Lstat(s.path)
	if err != nil {
		return false, err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return false, fmt.Errorf("%s is no socket (%v): move it away, or choose another socket path", s.path, st.Mode().Type())
	}
	raw, err := s.listener.SyscallConn()
	if err != nil {
		return false, err
	}
	conn, err := net.Dial("unix", s.path)
	if errors.Is(err, unix.EAGAIN) {
		return true, nil // its queue is full, so there are callers
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer conn.Close()
	var n int
	var pollErr error
	err = raw.Control(func(fd uintptr) {
		n, pollErr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	return n > 0, errors.Join(err, pollErr)
}

// checkDirectory refuses a place where others could put their own socket under our name: clients would take it for the
// agent's. Where only the directory's owner or group could, it is the operator's choice, and said.
func checkDirectory(dir string, log *slog.Logger) error {
	for d := dir; ; d = filepath.Dir(d) {
		var st unix.Stat_t
		if err := unix.Stat(d, &st); err != nil {
			return fmt.Errorf("directory %s: %w", d, err)
		}
		replaceable := st.Mode&unix.S_ISVTX == 0
		if replaceable && st.Mode&0o002 != 0 {
			return fmt.Errorf("directory %s is writable by everybody (mode %04o), who could put another socket there: chmod o-w %s", d, st.Mode&0o7777, d)
		}
		if d == dir {
			if (replaceable && st.Mode&0o020 != 0) || (st.Uid != 0 && st.Uid != uint32(os.Geteuid())) {
				log.LogAttrs(context.Background(), slog.LevelWarn, "others may replace the socket in this directory",
					slog.String("directory", d), slog.String("mode", fmt.Sprintf("%04o", st.Mode&0o7777)), slog.Uint64("owner", uint64(st.Uid)), slog.Uint64("group", uint64(st.Gid)))
			}
			if st.Mode&0o001 == 0 {
				log.LogAttrs(context.Background(), slog.LevelWarn, "not every local process can reach the socket in this directory",
					slog.String("directory", d), slog.String("mode", fmt.Sprintf("%04o", st.Mode&0o7777)))
			}
		}
		if d == filepath.Dir(d) {
			return nil
		}
	}
}

// lockFor takes the lock beside the socket, which says that the socket has an owner even before it exists. The kernel
// drops it when the owner ends, however that comes about.
func lockFor(path string) (*os.File, error) {
	name := path + ".lock"
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("socket %s: its directory %s must be writable for uid %d: %w", path, filepath.Dir(path), os.Geteuid(), err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, inUse(path)
		}
		return nil, fmt.Errorf("locking %s: %w", name, err)
	}
	return f, nil
}

func inUse(path string) error {
	return fmt.Errorf("socket %s is in use by another process: stop it, or choose another socket path", path)
}

// checkFree says whether the path may be taken: nothing is there, or a socket that nobody listens on any more.
func checkFree(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is no socket (%v): move it away, or choose another socket path", path, st.Mode().Type())
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
		return inUse(path)
	}
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, unix.EAGAIN) {
		return inUse(path) // its backlog is full
	}
	return fmt.Errorf("finding out whether socket %s is in use: %w", path, err)
}

// bind makes the socket in a directory that only we can enter, and moves it to its place when its mode is right. The
// path goes through a descriptor, so that it is short enough however long dir is.
func (s *socket) bind(dir string, mode os.FileMode) error {
	private, err := os.MkdirTemp(dir, ".signet-")
	if err != nil {
		return fmt.Errorf("socket %s: its directory %s must be writable for uid %d: %w", s.path, dir, os.Geteuid(), err)
	}
	defer os.RemoveAll(private)
	d, err := os.Open(private)
	if err != nil {
		return err
	}
	defer d.Close()

	made := filepath.Join(private, "s")
	s.listener, err = net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: "/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/s"})
	if err != nil {
		return fmt.Errorf("listening on socket %s: %w", s.path, err)
	}
	s.listener.SetUnlinkOnClose(false)
	var st unix.Stat_t
	err = os.Chmod(made, mode)
	if err == nil {
		err = unix.Lstat(made, &st)
	}
	if err == nil {
		err = os.Rename(made, s.path)
	}
	if err != nil {
		s.listener.Close()
		return fmt.Errorf("putting socket %s in its place: %w", s.path, err)
	}
	s.dev, s.ino = st.Dev, st.Ino
	return nil
}

// inPlace says whether the socket is at its path. Where that cannot be told, it is.
func (s *socket) inPlace() bool {
	var st unix.Stat_t
	err := unix.Lstat(s.path, &st)
	return err == nil && st.Dev == s.dev && st.Ino == s.ino || err != nil && !errors.Is(err, fs.ErrNotExist)
}

// close stops listening and removes the socket, if it is still ours.
func (s *socket) close() error {
	err := s.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil // gRPC closed it
	}
	var st unix.Stat_t
	if !s.kept.Load() && unix.Lstat(s.path, &st) == nil && st.Dev == s.dev && st.Ino == s.ino {
		err = errors.Join(err, os.Remove(s.path))
	}
	if s.lock == nil {
		return err
	}
	return errors.Join(err, s.lock.Close())
}
