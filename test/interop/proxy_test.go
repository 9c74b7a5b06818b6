package interop

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// A proxy is an address that leads to one server or another, as a name in DNS or a balancer does. It passes bytes on and counts them.
type proxy struct {
	addr     string
	up, down atomic.Int64 // bytes to the server, and from it
	made     atomic.Int64 // connections

	mu    sync.Mutex
	to    string
	conns map[net.Conn]struct{}
	wg    sync.WaitGroup
}

func startProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	p := &proxy{addr: l.Addr().String(), to: to, conns: map[net.Conn]struct{}{}}
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.lead("127.0.0.1:1")
		p.wg.Wait()
	})
	return p
}

func (p *proxy) serve(c net.Conn) {
	defer c.Close()
	p.mu.Lock()
	to := p.to
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, c)
		p.mu.Unlock()
	}()
	s, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer s.Close()
	p.made.Add(1)
	var both sync.WaitGroup
	pass := func(dst, src net.Conn, count *atomic.Int64) {
		defer dst.Close()
		_, _ = io.Copy(counting{dst, count}, src) // the end of either side is the end of both
	}
	both.Go(func() { pass(s, c, &p.up) })
	both.Go(func() { pass(c, s, &p.down) })
	both.Wait()
}

type counting struct {
	io.Writer
	n *atomic.Int64
}

func (c counting) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// lead makes the address lead somewhere else, and cuts what is connected.
func (p *proxy) lead(to string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.to = to
	for c := range p.conns {
		c.Close()
	}
}
