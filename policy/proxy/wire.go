package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/policy/internal/live"
)

// bufferSize is how much is read, and written, at once: two whole TLS records.
const bufferSize = 32 << 10

// buffers are those of the connections that have something to pass on at this moment. An idle connection holds none.
var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// corks hold encrypted records until they are written together. They are a little larger than what was encrypted.
var corks = sync.Pool{New: func() any { b := make([]byte, 0, bufferSize+1024); return &b }}

// errWait says that nothing can be read now. crypto/tls takes a temporary error as one after which reading goes on.
var errWait net.Error = waitError{}

type waitError struct{}

func (waitError) Error() string   { return "nothing to read yet" }
func (waitError) Timeout() bool   { return true }
func (waitError) Temporary() bool { return true }

// A wire is a TCP or Unix connection on its way through the proxy. As a net.Conn it goes below crypto/tls and net/http. Once
// it is polled, Read never blocks, and waiting is separate, so that who waits needs no buffer.
type wire struct {
	net.Conn // a *net.TCPConn or *net.UnixConn
	raw      syscall.RawConn

	// Of the one goroutine that reads.
	polled bool
	held   *[]byte // what fill read into; nil if nothing is left of it
	rest   []byte  // the part of held that is not yet taken

	mu     sync.Mutex // held while writing, so that records of two goroutines keep their order
	corked *[]byte    // what is written goes there first; nil: to the kernel at once

	close  sync.Once
	closed error
	end    live.End // comes when the connection is closed
}

// newWire takes over a connection.
func newWire(c net.Conn) (*wire, error) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%T is no connection of the kernel's", c), c.Close())
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return &wire{Conn: c, raw: raw}, nil
}

// Read is net.Conn's.
func (w *wire) Read(p []byte) (int, error) {
	if !w.polled {
		return w.Conn.Read(p)
	}
	if w.held == nil {
		return 0, errWait
	}
	n := copy(p, w.rest)
	w.taken(n)
	return n, nil
}

// taken notes that n bytes of rest were used.
func (w *wire) taken(n int) {
	if w.rest = w.rest[n:]; len(w.rest) == 0 {
		w.release()
	}
}

// release gives back the buffer, with whatever is in it.
func (w *wire) release() {
	if w.held != nil {
		buffers.Put(w.held)
		w.held, w.rest = nil, nil
	}
}

// fill waits until there is something to read and reads it. io.EOF means that the peer has closed its direction.
func (w *wire) fill() error {
	var n int
	var err error
	waited := w.raw.Read(func(fd uintptr) bool {
		b := buffers.Get().(*[]byte)
		for {
			n, err = unix.Read(int(fd), *b)
			if err != unix.EINTR {
				break
			}
		}
		if n > 0 {
			w.held, w.rest = b, (*b)[:n]
			return true
		}
		buffers.Put(b)
		return err != unix.EAGAIN
	})
	switch {
	case waited != nil:
		return waited
	case err != nil:
		return &net.OpError{Op: "read", Net: w.LocalAddr().Network(), Source: w.LocalAddr(), Addr: w.RemoteAddr(), Err: err}
	case n == 0:
		return io.EOF
	}
	return nil
}

// Write is net.Conn's.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.corked == nil {
		return w.Conn.Write(p)
	}
	*w.corked = append(*w.corked, p...)
	return len(p), nil
}

// together calls write, and writes what that writes in one go.
func (w *wire) together(write func() error) error {
	w.mu.Lock()
	w.corked = corks.Get().(*[]byte)
	w.mu.Unlock()
	err := write()
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.corked
	w.corked = nil
	if err == nil {
		_, err = w.Conn.Write(*b)
	}
	*b = (*b)[:0]
	corks.Put(b)
	return err
}

// CloseWrite ends the direction to the peer.
func (w *wire) CloseWrite() error {
	if c, ok := w.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close is net.Conn's. It may be called more than once.
func (w *wire) Close() error {
	w.close.Do(func() {
		w.closed = w.Conn.Close()
		w.end.Come()
	})
	return w.closed
}

// Reset closes the connection so that the peer hears of an error rather than of an end: whatever it has received may not be all.
func (w *wire) Reset() {
	if c, ok := w.Conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0) // a connection that is gone needs no reset
	}
	_ = w.Close()
}

const (
	// A peer that does not answer for keepAliveIdle and keepAliveProbes times keepAliveEvery is gone, and so is one that
	// does not take what was sent to it for userTimeout.
	keepAliveIdle   = 30 * time.Second
	keepAliveEvery  = 15 * time.Second
	keepAliveProbes = 4
	userTimeout     = 2 * time.Minute
)

var keepAlive = net.KeepAliveConfig{Enable: true, Idle: keepAliveIdle, Interval: keepAliveEvery, Count: keepAliveProbes}

// unacknowledged bounds how long the kernel tries to send to a peer that has vanished.
func unacknowledged(_, _ string, c syscall.RawConn) error {
	var err error
	if control := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond))
	}); control != nil {
		return control
	}
	if errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // a Unix socket
	}
	return err
}
