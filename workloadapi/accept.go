package workloadapi

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// An acceptor is the socket as the gRPC server sees it. It can be told to take no more connections, which stay in the
// socket's queue for whoever serves it next: a gRPC server that stops drops those that it has just taken.
type acceptor struct {
	*net.UnixListener
	idle   chan struct{} // closed when the server asks for a connection after pause
	closed chan struct{}

	idleOnce, closeOnce sync.Once

	mu      sync.Mutex
	paused  bool
	greeted *sync.Cond // a connection that was taken has come to its handshake, or has been closed
	fresh   int        // connections that have not
}

func newAcceptor(l *net.UnixListener) *acceptor {
	a := &acceptor{UnixListener: l, idle: make(chan struct{}), closed: make(chan struct{})}
	a.greeted = sync.NewCond(&a.mu)
	return a
}

// Accept takes a connection. After pause it waits for Close.
func (a *acceptor) Accept() (net.Conn, error) {
	c, err := a.AcceptUnix()
	a.mu.Lock()
	paused := a.paused
	if err == nil {
		a.fresh++
	}
	a.mu.Unlock()
	if err == nil {
		return &accepted{UnixConn: c, from: a}, nil
	}
	if paused && errors.Is(err, os.ErrDeadlineExceeded) {
		a.idleOnce.Do(func() { close(a.idle) })
		<-a.closed
		return nil, net.ErrClosed
	}
	return nil, err
}

// Close ends a wait in Accept.
func (a *acceptor) Close() error {
	a.closeOnce.Do(func() { close(a.closed) })
	return a.UnixListener.Close()
}

// pause takes no more connections, and returns when those that were taken are in the server's hands.
func (a *acceptor) pause() {
	a.mu.Lock()
	a.paused = true
	a.mu.Unlock()
	if a.SetDeadline(time.Unix(1, 0)) != nil {
		return // it is closed
	}
	select {
	case <-a.idle:
	case <-a.closed:
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.fresh > 0 { // the server comes to each of them at once
		a.greeted.Wait()
	}
}

// An accepted connection has not come to its handshake yet.
type accepted struct {
	*net.UnixConn
	from *acceptor
	once sync.Once
}

func (c *accepted) greet() *net.UnixConn {
	c.once.Do(func() {
		c.from.mu.Lock()
		defer c.from.mu.Unlock()
		c.from.fresh--
		c.from.greeted.Broadcast()
	})
	return c.UnixConn
}

// Close closes the connection.
func (c *accepted) Close() error { return c.greet().Close() }
