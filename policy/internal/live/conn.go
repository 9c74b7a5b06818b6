package live

import (
	"errors"
	"net"
	"sync"
	"syscall"
)

// An End is the end of a connection, which others wait for.
type End struct {
	mu    sync.Mutex
	come  bool
	after []func()
}

// Then has f called when the end comes; at once if it has come.
func (e *End) Then(f func()) {
	e.mu.Lock()
	if !e.come {
		e.after = append(e.after, f)
		e.mu.Unlock()
		return
	}
	e.mu.Unlock()
	f()
}

// Come says that the end has come. It may be called more than once.
func (e *End) Come() {
	e.mu.Lock()
	after := e.after
	e.come, e.after = true, nil
	e.mu.Unlock()
	for _, f := range after {
		f()
	}
}

// A Conn is a connection that tells of its end.
type Conn struct {
	net.Conn
	End End
}

// Close closes the connection and tells of it.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	c.End.Come()
	return err
}

// NetConn returns the connection below.
func (c *Conn) NetConn() net.Conn { return c.Conn }

// SyscallConn is that of the connection below.
func (c *Conn) SyscallConn() (syscall.RawConn, error) {
	below, ok := c.Conn.(syscall.Conn)
	if !ok {
		return nil, errors.New("the connection is not one of the operating system")
	}
	return below.SyscallConn()
}

// Closed says whether a connection was closed on this side. It is false where that cannot be told.
func Closed(c net.Conn) bool {
	below, ok := c.(syscall.Conn)
	if wrapped, is := c.(interface{ NetConn() net.Conn }); is && !ok {
		return Closed(wrapped.NetConn())
	}
	if !ok {
		return false
	}
	raw, err := below.SyscallConn()
	if err != nil {
		return errors.Is(err, syscall.EINVAL) || errors.Is(err, net.ErrClosed)
	}
	return errors.Is(raw.Control(func(uintptr) {}), net.ErrClosed)
}

// Listener returns a listener whose connections tell of their end.
func Listener(l net.Listener) net.Listener { return listener{l} }

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &Conn{Conn: c}, nil
}
