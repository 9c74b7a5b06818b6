package inject

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// This file holds what keeps one stranger from having the webhook for himself: whoever is not answered is not looked at, and
// his API server then starts pods without a proxy, where it was told to.

const (
	// connectionsPerAddress and reviewsPerAddress bound what one address has of maxConnections and maxReviews. An API server
	// asks over few connections.
	connectionsPerAddress = 64
	reviewsPerAddress     = 4
)

// addressOf is what counts as one address: of IPv6, a network of 64 bits, all of which one host may have.
func addressOf(text string) netip.Addr {
	host, err := netip.ParseAddrPort(text)
	if err != nil {
		return netip.Addr{}
	}
	a := host.Addr().Unmap().WithZone("")
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// fairListener closes connections at once of which their address has too many.
type fairListener struct {
	net.Listener
	mu   sync.Mutex
	open map[netip.Addr]int
}

func newFairListener(l net.Listener) *fairListener {
	return &fairListener{Listener: l, open: map[netip.Addr]int{}}
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		a := addressOf(c.RemoteAddr().String())
		l.mu.Lock()
		n := l.open[a]
		if n < connectionsPerAddress {
			l.open[a] = n + 1
		}
		l.mu.Unlock()
		if n < connectionsPerAddress {
			return &fairConn{Conn: c, closed: sync.OnceFunc(func() { l.leave(a) })}, nil
		}
		_ = c.Close() // nobody has written to it
	}
}

func (l *fairListener) leave(a netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[a]--; l.open[a] == 0 {
		delete(l.open, a)
	}
}

type fairConn struct {
	net.Conn
	closed func()
}

func (c *fairConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

// turns hands out the slots for reviews: each address waits for its own first.
type turns struct {
	all chan struct{}

	mu        sync.Mutex
	byAddress map[netip.Addr]*turn
}

type turn struct {
	slots chan struct{}
	users int
}

func newTurns() *turns {
	return &turns{all: make(chan struct{}, maxReviews), byAddress: map[netip.Addr]*turn{}}
}

// take waits for a slot; false: ctx ended before. done gives it back.
func (t *turns) take(ctx context.Context, remote string) (done func(), ok bool) {
	a := addressOf(remote)
	t.mu.Lock()
	own := t.byAddress[a]
	if own == nil {
		own = &turn{slots: make(chan struct{}, reviewsPerAddress)}
		t.byAddress[a] = own
	}
	own.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if own.users--; own.users == 0 {
			delete(t.byAddress, a)
		}
	}
	select {
	case own.slots <- struct{}{}:
	case <-ctx.Done():
		leave()
		return nil, false
	}
	select {
	case t.all <- struct{}{}:
	case <-ctx.Done():
		<-own.slots
		leave()
		return nil, false
	}
	return func() {
		<-t.all
		<-own.slots
		leave()
	}, true
}
