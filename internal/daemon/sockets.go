package daemon

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// firstSocket is the descriptor of the first socket that is passed in.
const firstSocket = 3

// maxSockets bounds how many are taken.
const maxSockets = 64

// Sockets takes the sockets that the service manager passed in, by their names (LISTEN_FDS and LISTEN_FDNAMES), and takes
// them out of the environment. The caller closes them. Where a name comes twice, such as for a socket that a unit listens on and
// that was kept over a restart as well, the first counts and the others are closed.
func Sockets() (map[string]*os.File, error) {
	count, names, pid := os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES"), os.Getenv("LISTEN_PID")
	for _, name := range []string{"LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	return take(count, names, pid, firstSocket)
}

func take(count, names, pid string, first int) (map[string]*os.File, error) {
	if count == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // none, or for another process
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxSockets {
		return nil, fmt.Errorf("LISTEN_FDS is %q: not a number from 0 to %d", count, maxSockets)
	}
	var named []string
	if names != "" {
		named = strings.Split(names, ":")
	}
	if names != "" && len(named) != n {
		return nil, fmt.Errorf("LISTEN_FDNAMES has %d names for %d sockets", len(named), n)
	}
	sockets := map[string]*os.File{}
	var errs []error
	for i := range n {
		fd := first + i
		unix.CloseOnExec(fd)
		name := "unknown"
		if named != nil {
			name = named[i]
		}
		listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("descriptor %d, passed in as %q, is no socket: %w", fd, name, err))
		case listening == 0:
			errs = append(errs, fmt.Errorf("socket %q that was passed in does not listen", name))
		case sockets[name] != nil:
			errs = append(errs, unix.Close(fd))
		default:
			sockets[name] = os.NewFile(uintptr(fd), name)
		}
	}
	if err := errors.Join(errs...); err != nil {
		for _, s := range sockets {
			s.Close()
		}
		return nil, err
	}
	return sockets, nil
}
