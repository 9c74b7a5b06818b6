package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// short is a bound that a test waits for.
const short = 200 * time.Millisecond

// TestSlowloris: who begins something and goes no further is cut off, at each step, and others are served meanwhile.
func TestSlowloris(t *testing.T) {
	w := newWorld(t, httpPolicy)
	address, _ := rawBackend(t)
	c := inboundConfig("http", address)
	c.Inbound[0].Limits = Limits{HandshakeTimeout: short, HeaderTimeout: short, IdleTimeout: short}
	p := w.start(t, c)
	hello := clientHello(t)
	for name, begin := range map[string]func() net.Conn{
		"nothing at all":     func() net.Conn { return dialPlain(t, "tcp", p.in()) },
		"half a ClientHello": func() net.Conn { return write(t, dialPlain(t, "tcp", p.in()), hello[:len(hello)/2]) },
		"a ClientHello alone": func() net.Conn {
			return write(t, dialPlain(t, "tcp", p.in()), hello)
		},
		"no request": func() net.Conn {
			conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
			if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			return conn
		},
		"half a request line": func() net.Conn { return write(t, dialTLS(t, p.in(), w.caller(t, "/caller")), []byte("GET /do")) },
		"half of the headers": func() net.Conn {
			return write(t, dialTLS(t, p.in(), w.caller(t, "/caller")), []byte("GET /docs/a HTTP/1.1\r\nHost: h\r\nX: "))
		},
		"half a body": func() net.Conn {
			return write(t, dialTLS(t, p.in(), w.caller(t, "/caller")), []byte("POST /docs/a HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nabc"))
		},
		"half a chunk": func() net.Conn {
			return write(t, dialTLS(t, p.in(), w.caller(t, "/caller")), []byte("POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc"))
		},
		"half an HTTP/2 preface": func() net.Conn {
			config := w.caller(t, "/caller")
			config.NextProtos = []string{"h2"}
			return write(t, dialTLS(t, p.in(), config), []byte("PRI * HTTP"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			var slow []net.Conn
			for range 20 {
				slow = append(slow, begin())
			}
			if resp, _ := get(t, w.client(t, "/caller", true), "GET", "https://"+p.in()+"/docs/a", nil); resp.StatusCode != 200 {
				t.Errorf("meanwhile: %d", resp.StatusCode)
			}
			for _, conn := range slow {
				if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal("a connection that does not move was not ended")
				}
			}
		})
	}
}

// clientHello is how a TLS connection begins.
func clientHello(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	here, there := net.Pipe()
	go func() {
		_ = tls.Client(here, &tls.Config{InsecureSkipVerify: true}).Handshake()
		here.Close()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(there, head); err != nil {
		t.Fatal(err)
	}
	b.Write(head)
	if _, err := io.CopyN(&b, there, int64(head[3])<<8|int64(head[4])); err != nil {
		t.Fatal(err)
	}
	there.Close()
	return b.Bytes()
}

func write(t testing.TB, c net.Conn, b []byte) net.Conn {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestIdle: a relayed connection on which nothing moves ends, one that is half closed sooner.
func TestIdle(t *testing.T) {
	w := newWorld(t, allowCaller)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		_, _ = io.Copy(io.Discard, c)
		_, _ = c.Read(make([]byte, 1)) // it never closes its own direction
		<-t.Context().Done()
	})
	for name, tt := range map[string]struct {
		limits Limits
		half   bool
	}{"idle": {Limits{IdleTimeout: short}, false}, "half closed": {Limits{IdleTimeout: time.Hour, HalfClosedTimeout: short}, true}} {
		t.Run(name, func(t *testing.T) {
			c := inboundConfig("tcp", backend.Addr().String())
			c.Inbound[0].Limits = tt.limits
			p := w.start(t, c)
			conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
			write(t, conn, []byte("x"))
			if tt.half {
				if err := conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%v; want a reset", err)
			}
			eventually(t, "it is counted", func() bool { return p.metric(t, "signet_proxy_connections_ended_total", "how", "idle") == 1 })
		})
	}
}

// TestMaxConnections: what is above the limit is closed at once; what is below goes on.
func TestMaxConnections(t *testing.T) {
	w := newWorld(t, allowCaller)
	backend := listen(t, "tcp", "127.0.0.1:0", echo)
	c := inboundConfig("tcp", backend.Addr().String())
	c.Inbound[0].Limits.MaxConnections = 4
	p := w.start(t, c)
	works := func(conn net.Conn) error {
		if _, err := conn.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, make([]byte, 1))
		return err
	}
	var open []*tls.Conn
	for range 4 {
		conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
		if err := works(conn); err != nil {
			t.Fatal(err)
		}
		open = append(open, conn)
	}
	if conn, err := tls.Dial("tcp", p.in(), w.caller(t, "/caller")); err == nil {
		t.Error("a fifth connection was taken")
		conn.Close()
	}
	if n := p.connections(t, "limit"); n != 1 {
		t.Errorf("%v refusals counted", n)
	}
	for _, conn := range open {
		if err := works(conn); err != nil {
			t.Error(err)
		}
	}
	open[0].Close()
	eventually(t, "there is room again", func() bool { return p.inbound[0].open.Load() == 3 })
	if err := works(dialTLS(t, p.in(), w.caller(t, "/caller"))); err != nil {
		t.Error(err)
	}
	for _, conn := range open {
		conn.Close()
	}
	eventually(t, "they are gone", func() bool { return p.inbound[0].open.Load() <= 1 })
	// Those that have not shown who they are may be half of all.
	var unknown []net.Conn
	for range 2 {
		unknown = append(unknown, dialPlain(t, "tcp", p.in()))
	}
	eventually(t, "they are taken", func() bool { return p.inbound[0].pending.Load() == 2 })
	if conn, err := tls.Dial("tcp", p.in(), w.caller(t, "/caller")); err == nil {
		t.Error("a connection was taken although two have not shown who they are")
		conn.Close()
	}
	for _, conn := range unknown {
		conn.Close()
	}
}

// TestSlowBackend: a backend that does not read holds up the caller, the proxy keeps next to nothing, and nothing is lost.
func TestSlowBackend(t *testing.T) {
	w := newWorld(t, allowCaller)
	read, got := make(chan struct{}), make(chan int64, 1)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		_ = c.(*net.TCPConn).SetReadBuffer(64 << 10)
		<-read
		n, _ := io.Copy(io.Discard, c)
		got <- n
	})
	p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
	conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
	const all = 128 << 20
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	sent := make(chan error, 1)
	go func() {
		chunk := make([]byte, 1<<20)
		for range all / len(chunk) {
			if _, err := conn.Write(chunk); err != nil {
				sent <- err
				return
			}
		}
		sent <- conn.CloseWrite()
	}()
	// It is held up once no byte has moved for a while.
	last := int64(-1)
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	eventually(t, "the caller is held up", func() bool {
		<-look.C
		now := p.inbound[0].relays.passedOn()
		stood := now == last && now > 0
		last = now
		return stood
	})
	if last > all/4 {
		t.Errorf("%d MiB went out to a backend that does not read", last>>20)
	}
	if grown := int64(heap()) - int64(before); grown > 8<<20 {
		t.Errorf("the proxy and its caller hold %d KiB more", grown>>10)
	}
	close(read)
	if n := <-got; n != all {
		t.Errorf("the backend got %d bytes of %d", n, all)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// passedOn is how many bytes the open connections have passed on from the callers.
func (s *relays) passedOn() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var n int64
	for r := range s.all {
		n += r.aToB.Load()
	}
	return n
}

// TestCallerVanishes: a caller that resets its connection in the middle takes the backend's along.
func TestCallerVanishes(t *testing.T) {
	w := newWorld(t, allowCaller)
	ended := make(chan error, 1)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		b := make([]byte, 32<<10)
		for {
			if _, err := c.Write(b); err != nil {
				ended <- err
				return
			}
		}
	})
	p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
	raw := dialPlain(t, "tcp", p.in()).(*net.TCPConn)
	conn := tls.Client(raw, w.caller(t, "/caller"))
	if _, err := io.ReadFull(conn, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := raw.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	raw.Close()
	if err := <-ended; err == nil {
		t.Error("the backend wrote on")
	}
	eventually(t, "nothing is left of it", func() bool { return p.inbound[0].open.Load() == 0 })
}

// TestRotation: a new SVID is shown to new callers, and open connections go on.
func TestRotation(t *testing.T) {
	w := newWorld(t, allowCaller)
	backend := listen(t, "tcp", "127.0.0.1:0", echo)
	p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
	conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
	for i := range 5 {
		next := w.ca.SVID(t, "/service", time.Hour)
		w.give(next)
		write(t, conn, []byte("x"))
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatalf("after %d rotations: %v", i+1, err)
		}
		fresh := dialTLS(t, p.in(), w.caller(t, "/caller"))
		if err := fresh.Handshake(); err != nil {
			t.Fatal(err)
		}
		if shown := fresh.ConnectionState().PeerCertificates[0]; !shown.Equal(next.Certificates[0]) {
			t.Errorf("after %d rotations an old SVID is shown", i+1)
		}
	}
}

// TestStalledRequests: a backend that hangs in the middle of its answer, and a caller that does not read it, end by the idle bound.
func TestStalledRequests(t *testing.T) {
	w := newWorld(t, httpPolicy)
	hangs := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
		}
		_, _ = io.Copy(io.Discard, c)
	})
	gone := make(chan struct{})
	floods := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			for b := make([]byte, 64<<10); err == nil; {
				_, err = c.Write(b)
			}
		}
		gone <- struct{}{}
	})
	for _, h2 := range []bool{false, true} {
		c := inboundConfig("http", hangs.Addr().String())
		c.Inbound[0].Limits.IdleTimeout = short
		p := w.start(t, c)
		resp, err := w.client(t, "/caller", h2).Get("https://" + p.in() + "/docs/a")
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			t.Errorf("h2 %v: half an answer looked like a whole one", h2)
		}
		c = inboundConfig("http", floods.Addr().String())
		c.Inbound[0].Limits.IdleTimeout = short
		p = w.start(t, c)
		resp, err = w.client(t, "/caller", h2).Get("https://" + p.in() + "/docs/a")
		if err != nil {
			t.Fatal(err)
		}
		<-gone // since nobody reads
		resp.Body.Close()
	}
}

// TestReloadInPlace: connections go on with what they began with, new ones take the new configuration, and what cannot change is named.
func TestReloadInPlace(t *testing.T) {
	w := newWorld(t, allowCaller)
	says := func(what string) string {
		return listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
			_, _ = io.WriteString(c, what)
			_, _ = io.Copy(io.Discard, c)
		}).Addr().String()
	}
	c := inboundConfig("tcp", says("one"))
	p := w.start(t, c)
	first := dialTLS(t, p.in(), w.caller(t, "/caller"))
	hears := func(conn net.Conn, want string) {
		t.Helper()
		b := make([]byte, len(want))
		if _, err := io.ReadFull(conn, b); err != nil || string(b) != want {
			t.Errorf("%q, %v; want %q", b, err, want)
		}
	}
	hears(first, "one")
	next := inboundConfig("tcp", says("two"))
	next.Sandbox = p.config.Sandbox
	next.Inbound[0].Service = "spiffe://example.org/other"
	next.Inbound[0].Limits.MaxConnections = 7
	next.Logging.Level = "debug"
	fields, err := p.Reload(next)
	if err != nil || strings.Join(fields, " ") != "inbound.in.service" {
		t.Errorf("%q, %v", fields, err)
	}
	hears(dialTLS(t, p.in(), w.caller(t, "/caller")), "two")
	write(t, first, []byte("still"))
	if got := p.inbound[0].limits().MaxConnections; got != 7 {
		t.Errorf("max_connections %d", got)
	}
	bad := next
	bad.Inbound = []Inbound{{Name: "in"}}
	if _, err := p.Reload(bad); err == nil {
		t.Error("a configuration that cannot work was taken")
	}
	hears(dialTLS(t, p.in(), w.caller(t, "/caller")), "two")
}

// TestProxyProtocol: the backend learns the caller's address and ID before the first byte.
func TestProxyProtocol(t *testing.T) {
	w := newWorld(t, allowCaller)
	got := make(chan []byte, 1)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		head := make([]byte, 16)
		if _, err := io.ReadFull(c, head); err != nil {
			t.Error(err)
			return
		}
		rest := make([]byte, int(head[14])<<8|int(head[15]))
		_, _ = io.ReadFull(c, rest)
		got <- append(head, rest...)
		echo(c)
	})
	c := inboundConfig("tcp", backend.Addr().String())
	c.Inbound[0].SendProxyProtocol = true
	p := w.start(t, c)
	conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
	write(t, conn, []byte("x"))
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	local, remote := conn.LocalAddr().(*net.TCPAddr), conn.RemoteAddr().(*net.TCPAddr)
	const id = "spiffe://example.org/caller"
	want := fmt.Sprintf("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00%c\x7f\x00\x00\x01\x7f\x00\x00\x01%c%c%c%c\x02\x00%c%s", 12+3+len(id), local.Port>>8, local.Port&0xff, remote.Port>>8, remote.Port&0xff, len(id), id)
	if b := <-got; string(b) != latin1(want) {
		t.Errorf("%q, want %q", b, latin1(want))
	}
}

// latin1 has one byte for each rune.
func latin1(s string) string {
	var b []byte
	for _, r := range s {
		b = append(b, byte(r))
	}
	return string(b)
}

// TestOutboundHTTP: a client's HTTP requests go to a server over mutual TLS, HTTP/2 where both can, and an h2c upgrade is not asked
// for there.
func TestOutboundHTTP(t *testing.T) {
	w := newWorld(t, allowCaller)
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "%s %s %s %q", r.Proto, r.Method, r.RequestURI, r.Header["Upgrade"])
	}), TLSConfig: tlsconfig.MTLSServerConfig(w.ca.SVID(t, "/ledger", time.Hour), w.ca.X509(), tlsconfig.AuthorizeAny())}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() { server.Close(); <-served })
	p := w.start(t, Config{Outbound: []Outbound{{Name: "out", Listen: "127.0.0.1:0", Protocol: "http", Address: l.Addr().String(), Servers: []string{"spiffe://example.org/ledger"}}},
		DrainTimeout: 100 * time.Millisecond})
	conn := dialPlain(t, "tcp", p.out())
	for range 2 {
		fmt.Fprint(conn, "GET /a%20b?c HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		if string(body) != "HTTP/2.0 GET /a%20b?c []" {
			t.Errorf("%q", body)
		}
	}
	fmt.Fprint(conn, "GET http://elsewhere/ HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != 400 {
		t.Errorf("%v, %v", resp, err)
	}
}
