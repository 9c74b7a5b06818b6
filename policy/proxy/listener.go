package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// acceptPause is how long a listener waits when the system gives it no connection, at first and at most: no descriptors are
	// left, or no memory.
	acceptPause    = 5 * time.Millisecond
	maxAcceptPause = time.Second

	// refusalsLogged is how often it is said that connections are refused because there are too many.
	refusalsLogged = 10 * time.Second
)

// A listener accepts connections for one entry of the configuration and bounds how many there are.
type listener struct {
	name   string
	log    *slog.Logger
	counts *counts
	l      net.Listener

	// handle serves one connection and closes it. It returns when it is served, or handed on.
	handle func(ctx context.Context, w *wire)
	limits func() Limits

	open    atomic.Int64 // connections
	pending atomic.Int64 // those of them whose peer is not known yet
	told    atomic.Int64 // when a refusal was logged last, Unix nanoseconds
	serving sync.WaitGroup
}

// accept takes connections until the listener is closed. Their contexts derive from ctx.
func (l *listener) accept(ctx context.Context) error {
	pause := acceptPause
	for {
		c, err := l.l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			l.counts.accept.Inc()
			l.log.Warn("cannot accept a connection; trying again", "err", err, "pause", pause)
			timer := time.NewTimer(pause)
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
			}
			pause = min(2*pause, maxAcceptPause)
			continue
		}
		pause = acceptPause
		l.take(ctx, c)
	}
}

// take serves a connection in a goroutine of its own, or refuses it.
func (l *listener) take(ctx context.Context, c net.Conn) {
	w, err := newWire(c)
	if err != nil {
		l.log.Error("a connection cannot be used", "err", err)
		return
	}
	most := int64(l.limits().MaxConnections)
	if l.open.Load() >= most || l.pending.Load() >= max(most/2, 1) {
		w.Reset()
		l.counts.limit.Inc()
		if now, told := time.Now().UnixNano(), l.told.Load(); now-told > int64(refusalsLogged) && l.told.CompareAndSwap(told, now) {
			l.log.Warn("too many connections; new ones are closed", "max_connections", most, "open", l.open.Load(), "without_identity", l.pending.Load())
		}
		return
	}
	l.open.Add(1)
	l.counts.open.Inc()
	w.end.Then(func() {
		l.open.Add(-1)
		l.counts.open.Dec()
	})
	l.serving.Go(func() { l.handle(ctx, w) })
}

// known is called for the time in which a connection's peer is not known yet.
func (l *listener) unknown() (known func()) {
	l.pending.Add(1)
	return sync.OnceFunc(func() { l.pending.Add(-1) })
}

// relays are the connections that a listener passes bytes on for, so that they can be ended.
type relays struct {
	mu  sync.Mutex
	all map[*relay]struct{}
}

func (s *relays) run(r *relay) error {
	s.mu.Lock()
	if s.all == nil {
		s.all = make(map[*relay]struct{})
	}
	s.all[r] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.all, r)
		s.mu.Unlock()
	}()
	return r.run()
}

func (s *relays) abort(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r := range s.all {
		r.abort(cause)
	}
}

// handed is a net.Listener for connections that something else has accepted.
type handed struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newHanded(addr net.Addr) *handed {
	return &handed{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{})}
}

// hand gives a connection to whoever accepts, or closes it.
func (h *handed) hand(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.closed:
		_ = c.Close() // nobody serves it any more
	}
}

// Accept is net.Listener's.
func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close is net.Listener's.
func (h *handed) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

// Addr is net.Listener's.
func (h *handed) Addr() net.Addr { return h.addr }
