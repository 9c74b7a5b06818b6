package proxy

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestTCPInbound: bytes of an allowed caller reach the backend and come back, over TCP and over a Unix socket.
func TestTCPInbound(t *testing.T) {
	w := newWorld(t, allowCaller)
	unixBackend := listen(t, "unix", socketPath(t), echo)
	for name, backend := range map[string]string{
		"tcp":  listen(t, "tcp", "127.0.0.1:0", echo).Addr().String(),
		"unix": "unix://" + unixBackend.Addr().String(),
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(name+" "+tls.VersionName(version), func(t *testing.T) {
				p := w.start(t, inboundConfig("tcp", backend))
				config := w.caller(t, "/caller")
				config.MinVersion, config.MaxVersion = version, version
				conn := dialTLS(t, p.in(), config)
				sent := make([]byte, 5<<20+17)
				rand.New(rand.NewSource(1)).Read(sent)
				go func() {
					_, _ = conn.Write(sent)
					_ = conn.CloseWrite()
				}()
				got, err := io.ReadAll(conn)
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d bytes came back of %d, %v", len(got), len(sent), err)
				}
			})
		}
	}
}

// TestTCPDenied: who is not allowed gets an alert, and the backend hears nothing of it.
func TestTCPDenied(t *testing.T) {
	for name, tt := range map[string]struct {
		policies string
		as       string
	}{
		"nobody's caller":   {allowCaller, "/other"},
		"a deny":            {allowCaller + "deny:\n- from: [/caller]\n", "/caller"},
		"a rule with http":  {strings.Replace(allowCaller, "[/caller]", "[/caller]\n  http: [{methods: [GET]}]", 1), "/caller"},
		"a deny with http":  {allowCaller + "deny:\n- from: [/caller]\n  http: [{methods: [DELETE]}]\n", "/caller"},
		"another service's": {strings.Replace(allowCaller, "/service", "/other", 1), "/caller"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, tt.policies)
			backend := listen(t, "tcp", "127.0.0.1:0", func(net.Conn) { t.Error("the backend got a connection") })
			p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
			conn := dialTLS(t, p.in(), w.caller(t, tt.as))
			if n, err := conn.Read(make([]byte, 1)); err == nil || n > 0 {
				t.Errorf("read %d bytes, %v", n, err)
			}
			eventually(t, "the denial is counted", func() bool { return p.connections(t, "denied") == 1 })
		})
	}
}

// TestTCPNobody: without policies, without an SVID, and with a caller of another trust domain, nothing passes.
func TestTCPNobody(t *testing.T) {
	w := newWorld(t, allowCaller)
	backend := listen(t, "tcp", "127.0.0.1:0", func(net.Conn) { t.Error("the backend got a connection") })
	p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
	refused := func(what string, config *tls.Config) {
		t.Helper()
		conn, err := tls.Dial("tcp", p.in(), config)
		if err != nil {
			return
		}
		defer conn.Close()
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s was let in", what)
		}
	}
	refused("a foreign caller", newWorld(t, allowCaller).caller(t, "/caller"))
	refused("a caller without an SVID", &tls.Config{InsecureSkipVerify: true})
	w.p.Store(nil)
	refused("a caller before the policies are there", w.caller(t, "/caller"))
	w.apply(t, allowCaller)
	held := w.id.x509.Swap(nil)
	refused("a caller before the proxy has an SVID", w.caller(t, "/caller"))
	eventually(t, "the want of an SVID is counted", func() bool { return p.connections(t, "no_identity") == 1 })
	if why := p.notReady(); !strings.Contains(why, "has not given an identity") {
		t.Errorf("not ready: %q", why)
	}
	w.id.x509.Store(held)
	if why := p.notReady(); why != "" {
		t.Errorf("not ready: %q", why)
	}
}

// TestHalfClose: each side may say that it sends no more and go on reading.
func TestHalfClose(t *testing.T) {
	w := newWorld(t, allowCaller)
	t.Run("the caller first", func(t *testing.T) {
		backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
			all, err := io.ReadAll(c) // ends with the caller's close_notify
			if err != nil {
				t.Errorf("the backend read %v", err)
			}
			_, _ = c.Write([]byte("got " + string(all)))
		})
		p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
		conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
		if _, err := conn.Write([]byte("all of it")); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != "got all of it" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("the backend first", func(t *testing.T) {
		got := make(chan string, 1)
		backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
			_, _ = c.Write([]byte("welcome"))
			_ = c.(*net.TCPConn).CloseWrite()
			all, err := io.ReadAll(c)
			if err != nil {
				t.Errorf("the backend read %v", err)
			}
			got <- string(all)
		})
		p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
		conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
		if all, err := io.ReadAll(conn); err != nil || string(all) != "welcome" { // ends with a close_notify
			t.Errorf("%q, %v", all, err)
		}
		if _, err := conn.Write([]byte("still here")); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if g := <-got; g != "still here" {
			t.Errorf("the backend got %q", g)
		}
	})
}

// TestTruncated: a TLS connection that is cut off does not look like a whole one to the backend.
func TestTruncated(t *testing.T) {
	w := newWorld(t, allowCaller)
	ended := make(chan error, 1)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		_, err := io.ReadAll(c)
		ended <- err
	})
	p := w.start(t, inboundConfig("tcp", backend.Addr().String()))
	raw := dialPlain(t, "tcp", p.in())
	conn := tls.Client(raw, w.caller(t, "/caller"))
	if _, err := conn.Write([]byte("delete from t where a = 1")); err != nil {
		t.Fatal(err)
	}
	raw.Close() // a FIN, and no close_notify
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the backend read to %v; want a reset", err)
	}
}

// TestBackendGone: a caller whose backend cannot be reached, or goes away, hears of an error and not of an end.
func TestBackendGone(t *testing.T) {
	w := newWorld(t, allowCaller)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	p := w.start(t, inboundConfig("tcp", l.Addr().String()))
	if _, err := io.ReadAll(dialTLS(t, p.in(), w.caller(t, "/caller"))); err == nil {
		t.Error("a backend that refuses looked like an empty answer")
	}
	eventually(t, "it is counted", func() bool { return p.connections(t, "backend") == 1 })

	resets := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		_, _ = c.Write([]byte("half of"))
		_, _ = c.Read(make([]byte, 1))
		_ = c.(*net.TCPConn).SetLinger(0)
	})
	p = w.start(t, inboundConfig("tcp", resets.Addr().String()))
	conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
	if _, err := io.ReadFull(conn, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("a backend's reset looked like an end")
	}
}

// TestOutbound: a client without TLS reaches a server that is expected, and no other.
func TestOutbound(t *testing.T) {
	w := newWorld(t, allowCaller)
	server := func(path string) string {
		l := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) { echo(tls.Server(c, w.server(t, path))) })
		return l.Addr().String()
	}
	config := func(address, listenOn string) Config {
		return Config{Outbound: []Outbound{{Name: "out", Listen: listenOn, Address: address, Servers: []string{"spiffe://example.org/ledger"}}}, DrainTimeout: 100 * time.Millisecond}
	}
	t.Run("expected", func(t *testing.T) {
		path := socketPath(t)
		w.start(t, config(server("/ledger"), "unix://"+path))
		conn := dialPlain(t, "unix", path).(*net.UnixConn)
		if _, err := conn.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("unexpected", func(t *testing.T) {
		p := w.start(t, config(server("/imposter"), "127.0.0.1:0"))
		conn, err := net.Dial("tcp", p.out())
		if err == nil {
			defer conn.Close()
			_, err = io.ReadAll(conn)
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v; want a reset", err)
		}
		if n := p.connections(t, "denied"); n != 1 {
			t.Errorf("%v refusals counted", n)
		}
	})
}
