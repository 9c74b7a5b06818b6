package proxy

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// apply puts policies into force and tells the proxy of them, as a source would.
func (r *running) apply(t testing.TB, w *world, p *policy.Policies) {
	t.Helper()
	w.p.Store(p)
	r.id.tell()
}

// compiled are policies with revocations of IDs.
func compiled(t testing.TB, w *world, documents string, revoked ...string) *policy.Policies {
	t.Helper()
	w.apply(t, documents)
	var list []*policyv1.Revocation
	for _, id := range revoked {
		list = append(list, &policyv1.Revocation{Name: "stolen", Target: &policyv1.Revocation_SpiffeId{SpiffeId: id}})
	}
	return w.Policies().WithRevocations(policy.CompileRevocations(&policyv1.RevocationSet{Revision: 1, Revocations: list}, w.ca.TrustDomain))
}

// TestLiveConnections: a connection that was let in ends as soon as its peer is revoked, no rule allows it any more, or its SVID expires.
func TestLiveConnections(t *testing.T) {
	held := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		_, _ = c.Write([]byte("x"))
		_, _ = io.Copy(io.Discard, c)
	})
	for name, tt := range map[string]struct {
		ttl  time.Duration
		then func(*testing.T, *world, *running)
	}{
		"revoked": {time.Hour, func(t *testing.T, w *world, p *running) {
			p.apply(t, w, compiled(t, w, allowCaller, "spiffe://example.org/caller"))
		}},
		"denied": {time.Hour, func(t *testing.T, w *world, p *running) {
			p.apply(t, w, compiled(t, w, strings.Replace(allowCaller, "/caller", "/other", 1)))
		}},
		"expired": {1500 * time.Millisecond, func(*testing.T, *world, *running) {}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, allowCaller)
			p := w.start(t, inboundConfig("tcp", held.Addr().String()))
			config := w.caller(t, "/caller")
			config.GetClientCertificate = clientCertificate(w.ca.SVID(t, "/caller", tt.ttl))
			conn := dialTLS(t, p.in(), config)
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			tt.then(t, w, p)
			if _, err := io.ReadAll(conn); err == nil {
				t.Error("the connection came to an orderly end")
			}
			if n := p.connections(t, "withdrawn"); n != 1 {
				t.Errorf("%v withdrawn connections counted", n)
			}
		})
	}
}

// TestLiveHTTP: the same for connections whose requests are decided one by one, WebSockets and bodies under way included.
func TestLiveHTTP(t *testing.T) {
	w := newWorld(t, httpPolicy)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		_, _ = c.Read(make([]byte, 4096))
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nx") // and more, until it ends
		_, _ = io.Copy(io.Discard, c)
	})
	p := w.start(t, inboundConfig("http", backend.Addr().String()))
	for _, h2 := range []bool{false, true} {
		w.apply(t, httpPolicy)
		resp, err := w.client(t, "/caller", h2).Get("https://" + p.in() + "/docs/a")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		p.apply(t, w, compiled(t, w, httpPolicy, "spiffe://example.org/caller"))
		if _, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("h2 %v: the answer came to an orderly end", h2)
		}
		resp.Body.Close()
	}
}

// TestLiveRequest: an answer under way ends when its own request would be denied, although others of its connection would not be. A
// WebSocket is such an answer.
func TestLiveRequest(t *testing.T) {
	w := newWorld(t, httpPolicy)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		switch {
		case err != nil:
			return
		case r.Header.Get("Upgrade") != "":
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nx")
		default:
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nx") // and more, until it ends
		}
		_, _ = io.Copy(io.Discard, c)
	})
	p := w.start(t, inboundConfig("http", backend.Addr().String()))
	narrower := strings.Replace(httpPolicy, "/docs/", "/other/", 1)
	if narrower == httpPolicy {
		t.Fatal("the policy has no rule for /docs")
	}
	for _, h2 := range []bool{false, true} {
		w.apply(t, httpPolicy)
		resp, err := w.client(t, "/caller", h2).Get("https://" + p.in() + "/docs/a")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		p.apply(t, w, compiled(t, w, narrower))
		if _, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("h2 %v: the answer came to an orderly end", h2)
		}
		resp.Body.Close()
	}

	w.apply(t, httpPolicy)
	conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
	if _, err := io.WriteString(conn, "GET /docs/ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", resp, err)
	}
	if _, err := r.ReadByte(); err != nil {
		t.Fatal(err)
	}
	p.apply(t, w, compiled(t, w, narrower))
	var late net.Error
	if _, err := io.ReadAll(r); errors.As(err, &late) && late.Timeout() {
		t.Error("the WebSocket goes on")
	}
}

// TestLiveServer: a client's connection ends when the server is revoked.
func TestLiveServer(t *testing.T) {
	w := newWorld(t, allowCaller)
	server := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) { echo(tls.Server(c, w.server(t, "/ledger"))) })
	p := w.start(t, Config{Outbound: []Outbound{{Name: "out", Listen: "127.0.0.1:0", Address: server.Addr().String(), Servers: []string{"spiffe://example.org/ledger"}}},
		DrainTimeout: 100 * time.Millisecond})
	conn := dialPlain(t, "tcp", p.out())
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	p.apply(t, w, compiled(t, w, allowCaller, "spiffe://example.org/ledger"))
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("the connection came to an orderly end")
	}
	again := dialPlain(t, "tcp", p.out())
	if _, err := io.ReadAll(again); err == nil {
		t.Error("a revoked server was talked to")
	}
}
