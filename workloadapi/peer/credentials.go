package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	grpcpeer "google.golang.org/grpc/peer"
)

// Info is the gRPC AuthInfo of a connection that these credentials took.
type Info struct {
	credentials.CommonAuthInfo

	// UID is the effective user id of who connected.
	UID uint32

	// Process is who connected; nil if Err is not.
	Process *Process

	// Err says why the caller is not to be answered. The connection is kept, so that the answer to its first call can
	// say why. It is ErrForeignPIDNamespace.
	Err error
}

// AuthType is what gRPC calls this.
func (Info) AuthType() string { return "peer-pidfd" }

// FromContext returns who sent a call to a server with a table's credentials, or Info.Err.
func FromContext(ctx context.Context) (*Process, error) {
	info, err := InfoFromContext(ctx)
	if err != nil {
		return nil, err
	}
	return info.Process, info.Err
}

// InfoFromContext returns the Info of the connection that a call came over.
func InfoFromContext(ctx context.Context) (Info, error) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return Info{}, errors.New("the call came over no connection")
	}
	info, ok := p.AuthInfo.(Info)
	if !ok {
		return Info{}, fmt.Errorf("the call came over a connection of type %T, not over the agent's Unix socket", p.AuthInfo)
	}
	return info, nil
}

// Credentials returns transport credentials for a gRPC server on a Unix socket. They ask for nothing and encrypt nothing:
// the kernel says who is there. [Workload Endpoint §3, §4]
func (t *Table) Credentials() credentials.TransportCredentials { return transport{t} }

type transport struct{ table *Table }

func (c transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: Info{}.AuthType()}
}

func (c transport) Clone() credentials.TransportCredentials { return c }

func (c transport) OverrideServerName(string) error {
	return errors.New("a server name means nothing on a Unix socket")
}

func (c transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for the server side alone: clients use none")
}

// ServerHandshake asks the kernel who opened the connection. It blocks on nothing.
func (c transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	wrapped, info, err := c.table.identify(raw)
	if err != nil {
		c.table.log.LogAttrs(context.Background(), slog.LevelDebug, "connection refused", slog.Any("err", err))
		return nil, nil, err
	}
	return wrapped, info, nil
}

func (t *Table) identify(raw net.Conn) (net.Conn, Info, error) {
	unixConn, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, Info{}, fmt.Errorf("connection is a %T, not one of a Unix socket", raw)
	}
	cred, fd, err := t.peerOf(unixConn)
	if err != nil && !errors.Is(err, ErrForeignPIDNamespace) {
		return nil, Info{}, err
	}
	info := Info{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, UID: cred.Uid, Err: err}
	if err := t.admit(cred.Uid); err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, Info{}, err
	}
	c := &conn{UnixConn: unixConn, table: t, pid: cred.Pid, uid: cred.Uid}
	if info.Err == nil {
		p, err := t.acquire(cred.Pid, fd, c)
		if err != nil {
			t.dismiss(cred.Uid)
			return nil, Info{}, err
		}
		info.Process = &Process{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid, pin: p, table: t}
	}
	return c, info, nil
}

// peerOf returns the peer's credentials and, unless there is an error, an open pidfd. Both were fixed by the kernel when
// the peer called connect.
func (t *Table) peerOf(c *net.UnixConn) (cred unix.Ucred, pidfd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return unix.Ucred{}, -1, err
	}
	pidfd = -1
	ctlErr := raw.Control(func(s uintptr) {
		var u *unix.Ucred
		if u, err = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			err = fmt.Errorf("asking for the peer's credentials: %w", err)
			return
		}
		cred = *u
		if cred.Pid == 0 {
			err = ErrForeignPIDNamespace
			return
		}
		pidfd, err = t.peerPIDFD(int(s), cred.Pid)
	})
	return cred, pidfd, errors.Join(ctlErr, err)
}

func (t *Table) peerPIDFD(socket int, pid int32) (int, error) {
	if t.noPeerPIDFD {
		return t.pidfdByStartTime(pid)
	}
	return askPIDFD(socket, pid)
}

// askPIDFD asks the kernel for a pidfd of the process that connected the socket, whose id was pid.
func askPIDFD(socket int, pid int32) (int, error) {
	fd, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch {
	case err == nil:
		return fd, nil
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODATA):
		return -1, fmt.Errorf("process %d: %w", pid, ErrGone)
	default:
		return -1, fmt.Errorf("asking for the peer's pidfd: %w", err)
	}
}

// hasPeerPIDFD says whether this kernel has SO_PEERPIDFD, which came with Linux 6.5.
var hasPeerPIDFD = sync.OnceValue(func() bool {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
})

// pidfdByStartTime is for kernels before 6.5. It makes sure that the pidfd means the process that has pid now, at the
// moment of accept. That the process which connected ended in the microseconds before, and its id was given away, cannot
// be seen there.
func (t *Table) pidfdByStartTime(pid int32) (int, error) {
	before, err := readSnapshot(pid, 0, t.executables)
	if err != nil {
		return -1, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	fd, err := pidfdOpen(pid)
	if err != nil {
		return -1, err
	}
	after, err := readSnapshot(pid, 0, t.executables)
	if err == nil && after.StartTime == before.StartTime {
		if err = pollAlive(fd); err == nil {
			return fd, nil
		}
	}
	unix.Close(fd)
	return -1, fmt.Errorf("process %d: %w", pid, ErrGone)
}

// A conn gives up its process when it is closed.
type conn struct {
	*net.UnixConn
	table *Table
	pin   *pin // set by Table.acquire; nil for a caller that is only told why it is refused
	pid   int32
	uid   uint32
	once  sync.Once
}

// peerPIDFD asks for a pidfd of the process that connected. As long as the connection is open the kernel remembers which it
// was, even if another has its id by now.
func (c *conn) peerPIDFD() (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	ctlErr := raw.Control(func(s uintptr) { fd, err = askPIDFD(int(s), c.pid) })
	if ctlErr != nil {
		return -1, ctlErr
	}
	return fd, err
}

// ReadOnReady reads into a buffer of the pool, which it takes when there is something to read. It is what gRPC asks of a
// connection that is to cost no buffer while nothing comes.
func (c *conn) ReadOnReady(size int, pool mem.BufferPool) (buf *[]byte, n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		buf = pool.Get(size)
		readErr = ignoringEINTR(func() (err error) {
			n, err = syscall.Read(int(fd), *buf) // by syscall, as net does, whose view of it the race detector has
			return err
		})
		if readErr == syscall.EAGAIN {
			pool.Put(buf) // what wakes up may find nothing
			buf = nil
			return false
		}
		return true
	})
	if err = errors.Join(err, readErr); err == nil && n > 0 {
		return buf, n, nil
	}
	if buf != nil {
		pool.Put(buf)
	}
	if err == nil {
		err = io.EOF
	}
	return nil, 0, err
}

// Close closes the connection. It may be called more than once.
func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		if c.pin != nil {
			c.table.release(c.pin, c) // first: whoever asks for the process must not come upon a closed connection
		}
		err = c.UnixConn.Close()
		c.table.dismiss(c.uid)
	})
	return err
}
