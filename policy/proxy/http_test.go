package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/policy/httpauthz"
)

const httpPolicy = `kind: CallPolicy
name: p
service: /service
mode: enforce
allow:
- from: [/caller]
  http: [{methods: [GET, POST, PUT], paths: [/docs/**]}]
- from: [/caller]
  grpc: [test.Service/*]
- from: [/caller]
  http: [{methods: [OPTIONS]}]
- from: [/tokens]
  http: [{methods: [GET], paths: [/docs/**]}]
  jwt: {audience: [docs]}
`

// A seen request is what reached a backend, byte for byte.
type seen struct {
	mu       sync.Mutex
	requests []string
}

func (s *seen) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// rawBackend is an HTTP/1.1 server that does not interpret what it gets: it notes the bytes of each head, and of bodies with a length.
func rawBackend(t testing.TB) (address string, s *seen) {
	t.Helper()
	s = &seen{}
	l := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			var head strings.Builder
			for !strings.HasSuffix(head.String(), "\r\n\r\n") {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				head.WriteString(line)
			}
			s.mu.Lock()
			s.requests = append(s.requests, head.String())
			s.mu.Unlock()
			request, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader(head.String()), r)))
			if err == nil && request.Method != http.MethodConnect {
				_, _ = io.Copy(io.Discard, request.Body)
			}
			if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil {
				return
			}
		}
	})
	return l.Addr().String(), s
}

// client is an HTTP client that calls as a path.
func (w *world) client(t testing.TB, path string, h2 bool) *http.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!h2)
	protocols.SetHTTP2(h2)
	transport := &http.Transport{TLSClientConfig: w.caller(t, path), Protocols: protocols}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

func get(t testing.TB, client *http.Client, method, url string, change func(*http.Request)) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(context.Background(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(r)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// TestHTTPDecisions: each request is decided, and a denial names its decision.
func TestHTTPDecisions(t *testing.T) {
	w := newWorld(t, httpPolicy)
	address, s := rawBackend(t)
	p := w.start(t, inboundConfig("http", address))
	for _, h2 := range []bool{false, true} {
		client := w.client(t, "/caller", h2)
		for _, tt := range []struct {
			method, path string
			status       int
			reason       string
		}{
			{"GET", "/docs/a", 200, ""},
			{"POST", "/docs/a?x=1", 200, ""},
			{"DELETE", "/docs/a", 403, "denied"},
			{"GET", "/other", 403, "denied"},
			{"GET", "/docs/a%2Fb", 403, "path_refused"},
			{"GET", "/docs/../other", 403, "path_refused"},
			{"GET", "/docs//a", 403, "path_refused"},
			{"GET", "/docs/a;b", 403, "path_refused"},
		} {
			before := len(s.all())
			resp, body := get(t, client, tt.method, "https://"+p.in()+tt.path, nil)
			if resp.StatusCode != tt.status {
				t.Errorf("h2 %v: %s %s: status %d, want %d", h2, tt.method, tt.path, resp.StatusCode, tt.status)
			}
			if tt.status != 403 {
				continue
			}
			var answer struct {
				DecisionID string `json:"decision_id"`
				Reason     string `json:"reason"`
			}
			if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.Reason != tt.reason || answer.DecisionID == "" || resp.Header.Get(httpauthz.DecisionHeader) != answer.DecisionID {
				t.Errorf("h2 %v: %s %s: %q, %v, header %q", h2, tt.method, tt.path, body, err, resp.Header.Get(httpauthz.DecisionHeader))
			}
			if after := s.all(); len(after) != before {
				t.Errorf("h2 %v: %s %s reached the backend: %q", h2, tt.method, tt.path, after[before:])
			}
		}
	}
}

// TestHTTPToken: a rule with jwt takes the caller's JWT-SVID from the request.
func TestHTTPToken(t *testing.T) {
	w := newWorld(t, httpPolicy)
	address, _ := rawBackend(t)
	p := w.start(t, inboundConfig("http", address))
	client := w.client(t, "/tokens", true)
	if resp, _ := get(t, client, "GET", "https://"+p.in()+"/docs/a", nil); resp.StatusCode != 403 {
		t.Errorf("without a token: %d", resp.StatusCode)
	}
	resp, _ := get(t, client, "GET", "https://"+p.in()+"/docs/a", func(r *http.Request) {
		r.Header.Set("Authorization", "Bearer "+w.ca.Token(t, "/tokens", "docs"))
	})
	if resp.StatusCode != 200 {
		t.Errorf("with a token: %d", resp.StatusCode)
	}
}

// TestHTTPWhatTheBackendSees: the target byte for byte, and of the headers those that were judged and the proxy's own.
func TestHTTPWhatTheBackendSees(t *testing.T) {
	w := newWorld(t, httpPolicy)
	address, s := rawBackend(t)
	c := inboundConfig("http", address)
	c.Inbound[0].HTTP.PeerIDHeader = "X-Caller"
	p := w.start(t, c)
	targets := []string{"/docs/a", "/docs/a/", "/docs/a?", "/docs/a?b=c&d;e=%zz&&", "/docs/%20%C3%A4", "/docs/a+b:c@d!$&'()*,=~", "/docs/%c3%a4?q=/../x", "/docs/a?x=http://h/p?y"}
	for _, target := range targets {
		conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: docs.internal\r\nX-Caller: spiffe://example.org/root\r\nSignet-Peer-Id: spiffe://example.org/root\r\nX-Forwarded-For: 1.2.3.4\r\n"+
			"Forwarded: for=1.2.3.4\r\nX-Forwarded-Client-Cert: x\r\nProxy-Authorization: x\r\nKeep-Alive: x\r\nTE: gzip\r\nX-Kept: 1\r\nx-kept: 2\r\nConnection: close\r\n\r\n", target)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s: %v, %v", target, resp, err)
		}
		resp.Body.Close()
		all := s.all()
		head := all[len(all)-1]
		if first, _, _ := strings.Cut(head, "\r\n"); first != "GET "+target+" HTTP/1.1" {
			t.Errorf("the backend saw %q of %q", first, target)
		}
		for _, want := range []string{"\r\nHost: docs.internal\r\n", "\r\nX-Caller: spiffe://example.org/caller\r\n", "\r\nX-Kept: 1\r\nX-Kept: 2\r\n", "\r\nX-Forwarded-For: 127.0.0.1\r\n", "\r\nX-Forwarded-Proto: https\r\n"} {
			if !strings.Contains(head, want) {
				t.Errorf("%q is missing in %q", want, head)
			}
		}
		for _, no := range []string{"root", "1.2.3.4", "Client-Cert", "Proxy-", "Keep-Alive", "gzip", "User-Agent", "Accept-Encoding"} {
			if strings.Contains(head, no) {
				t.Errorf("%q is in %q", no, head)
			}
		}
	}
	// HTTP/2 has its target in a pseudo-header.
	client := w.client(t, "/caller", true)
	if resp, _ := get(t, client, "GET", "https://"+p.in()+"/docs/%c3%a4?q=/../x", nil); resp.StatusCode != 200 {
		t.Errorf("HTTP/2: %d", resp.StatusCode)
	}
	all := s.all()
	if !strings.HasPrefix(all[len(all)-1], "GET /docs/%c3%a4?q=/../x HTTP/1.1\r\n") {
		t.Errorf("the backend saw %q", all[len(all)-1])
	}
	if conn := dialTLS(t, p.in(), w.caller(t, "/caller")); conn != nil {
		fmt.Fprint(conn, "OPTIONS * HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("OPTIONS *: %v, %v", resp, err)
		}
		resp.Body.Close()
		if all := s.all(); !strings.HasPrefix(all[len(all)-1], "OPTIONS * HTTP/1.1\r\n") {
			t.Errorf("the backend saw %q", all[len(all)-1])
		}
	}
}

// TestHTTPSmuggling sends raw bytes that programs along the way could understand in different ways. Whatever the proxy makes of them,
// the backend gets at most the requests that were judged, and never the hidden one.
func TestHTTPSmuggling(t *testing.T) {
	w := newWorld(t, httpPolicy)
	const hidden = "GET /secret HTTP/1.1\r\nHost: h\r\n\r\n"
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(hidden), hidden)
	for name, tt := range map[string]struct {
		raw    string
		passes int // requests that the backend may get
		status int // of the first answer; 0: the connection ends
	}{
		"length and chunked":          {"POST /docs/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden, 1, -1},
		"chunked and length":          {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + chunked, 1, -1},
		"two lengths":                 {"POST /docs/a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 33\r\n\r\n" + hidden, 0, 400},
		"a length with a sign":        {"POST /docs/a HTTP/1.1\r\nHost: h\r\nContent-Length: +33\r\n\r\n" + hidden, 0, 400},
		"a length in a list":          {"POST /docs/a HTTP/1.1\r\nHost: h\r\nContent-Length: 33, 33\r\n\r\n" + hidden, 0, 400},
		"chunked twice":               {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked, 0, -1},
		"chunked behind identity":     {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity, chunked\r\n\r\n" + chunked, 0, -1},
		"xchunked":                    {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n" + chunked, 0, 501},
		"a space before the colon":    {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding : chunked\r\n\r\n" + chunked, 0, 400},
		"a folded line":               {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\r\n chunked\r\n\r\n" + chunked, 1, -1},
		"a bare CR":                   {"POST /docs/a HTTP/1.1\r\nHost: h\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n" + chunked, 0, 400},
		"a bare LF in a chunk":        {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5;\n\r\nabcde\r\n0\r\n\r\n", 1, -1},
		"a NUL":                       {"GET /docs/a HTTP/1.1\r\nHost: h\r\nX: a\x00b\r\n\r\n", 0, 400},
		"two hosts":                   {"GET /docs/a HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n", 0, 400},
		"no host":                     {"GET /docs/a HTTP/1.1\r\n\r\n", 0, 400},
		"a host with a path":          {"GET /docs/a HTTP/1.1\r\nHost: h/secret\r\n\r\n", 0, 400},
		"a host with a space":         {"GET /docs/a HTTP/1.1\r\nHost: h secret\r\n\r\n", 0, 400},
		"absolute form":               {"GET http://h/docs/a HTTP/1.1\r\nHost: h\r\n\r\n", 0, 403},
		"absolute form, another host": {"GET https://i/docs/a HTTP/1.1\r\nHost: h\r\n\r\n", 0, 403},
		"authority form":              {"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n" + hidden, 0, 403},
		"connect to a path":           {"CONNECT /docs/a HTTP/1.1\r\nHost: h\r\n\r\n" + hidden, 0, 403},
		"a space in the target":       {"GET /docs/a /secret HTTP/1.1\r\nHost: h\r\n\r\n", 0, 400},
		"a tab before the version":    {"GET /docs/a\tHTTP/1.1\r\nHost: h\r\n\r\n", 0, 400},
		"HTTP/0.9":                    {"GET /docs/a\r\n\r\n", 0, 400},
		"HTTP/1.1 in lower case":      {"GET /docs/a http/1.1\r\nHost: h\r\n\r\n", 0, 400},
		"h2c upgrade":                 {"GET /docs/a HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n", 0, 400},
		"h2c upgrade, settings only":  {"GET /docs/a HTTP/1.1\r\nHost: h\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n", 0, 400},
		"HTTP/2 by prior knowledge":   {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0, 400},
		"two upgrades":                {"GET /docs/a HTTP/1.1\r\nHost: h\r\nUpgrade: websocket, h2c\r\nConnection: Upgrade\r\n\r\n", 0, 400},
		"an upgrade with a body":      {"GET /docs/a HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 33\r\n\r\n" + hidden, 0, 400},
		"upgrade to TLS":              {"OPTIONS * HTTP/1.1\r\nHost: h\r\nUpgrade: TLS/1.0\r\nConnection: Upgrade\r\n\r\n", 0, 400},
		"a header made hop-by-hop":    {"GET /docs/a HTTP/1.1\r\nHost: h\r\nX-Tenant: a\r\nConnection: close, X-Tenant\r\n\r\n", 0, 400},
		"authorization hop-by-hop":    {"GET /docs/a HTTP/1.1\r\nHost: h\r\nConnection: Authorization\r\n\r\n", 0, 400},
		"an underscore":               {"GET /docs/a HTTP/1.1\r\nHost: h\r\nSignet_Peer_Id: spiffe://example.org/root\r\n\r\n", 0, 400},
		"another expectation":         {"GET /docs/a HTTP/1.1\r\nHost: h\r\nExpect: 200-maybe\r\nConnection: close\r\n\r\n", 0, 417},
		"headers without an end":      {"GET /docs/a HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("a", 80<<10) + "\r\n\r\n", 0, 431},
		"too many headers":            {"GET /docs/a HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: a\r\n", 20<<10) + "\r\n", 0, 431},
		"a trailer":                   {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: X-Tenant\r\n\r\n0\r\nX-Tenant: root\r\n\r\n", 0, 400},
		"a trailer out of nowhere":    {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Tenant: root\r\n\r\n", 1, 200},
		"a chunk without an end":      {"POST /docs/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc", 1, -1},
	} {
		t.Run(name, func(t *testing.T) {
			address, s := rawBackend(t)
			p := w.start(t, inboundConfig("http", address))
			conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
			if _, err := io.WriteString(conn, tt.raw); err != nil {
				t.Fatal(err)
			}
			if tt.status <= 0 {
				_ = conn.CloseWrite() // or the proxy would wait for what is missing
			}
			r := bufio.NewReader(conn)
			resp, err := http.ReadResponse(r, nil)
			_ = conn.CloseWrite() // what comes behind the answer is to end
			switch {
			case tt.status > 0 && (err != nil || resp.StatusCode != tt.status):
				t.Errorf("%v, %v; want status %d", resp, err, tt.status)
			case tt.status == 0 && err == nil:
				t.Errorf("status %d; want none", resp.StatusCode)
			}
			_, _ = io.Copy(io.Discard, r)
			if err := p.stop(); err != nil {
				t.Error(err)
			}
			all := s.all() // and no more, since the proxy has ended
			if len(all) > tt.passes {
				t.Errorf("the backend got %d requests: %q", len(all), all)
			}
			for _, head := range all {
				if strings.Contains(head, "secret") || strings.Contains(head, "Tenant") || !strings.HasPrefix(head, "POST /docs/a HTTP/1.1\r\n") {
					t.Errorf("the backend got %q", head)
				}
				if strings.Contains(head, "Content-Length") && strings.Contains(head, "Transfer-Encoding") {
					t.Errorf("the backend got two framings: %q", head)
				}
			}
		})
	}
}

// TestHTTPWebSocket: the request for it is judged, and then bytes go both ways.
func TestHTTPWebSocket(t *testing.T) {
	w := newWorld(t, httpPolicy)
	backend := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		r := bufio.NewReader(c)
		request, err := http.ReadRequest(r)
		if err != nil || request.Header.Get("Upgrade") != "websocket" {
			t.Errorf("%v, %v", request, err)
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		_, _ = io.Copy(c, r)
	})
	p := w.start(t, inboundConfig("http", backend.Addr().String()))
	upgrade := func(path string) (*tls.Conn, *bufio.Reader, *http.Response) {
		conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n", path)
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		return conn, r, resp
	}
	if _, _, resp := upgrade("/secret"); resp.StatusCode != 403 {
		t.Errorf("status %d", resp.StatusCode)
	}
	conn, r, resp := upgrade("/docs/socket")
	if resp.StatusCode != 101 {
		t.Fatalf("status %d", resp.StatusCode)
	}
	for range 3 {
		if _, err := conn.Write([]byte("ping\n")); err != nil {
			t.Fatal(err)
		}
		if line, err := r.ReadString('\n'); err != nil || line != "ping\n" {
			t.Fatalf("%q, %v", line, err)
		}
	}
}

// TestHTTPExpect: a denied request's body is not asked for, an allowed one's is, when the backend asks.
func TestHTTPExpect(t *testing.T) {
	w := newWorld(t, httpPolicy)
	address, _ := rawBackend(t)
	p := w.start(t, inboundConfig("http", address))
	for path, want := range map[string]int{"/docs/a": 100, "/secret": 403} {
		conn := dialTLS(t, p.in(), w.caller(t, "/caller"))
		fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", path)
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != want {
			t.Fatalf("%s: %v, %v", path, resp, err)
		}
		if want == 100 {
			fmt.Fprint(conn, "abcde")
			if resp, err = http.ReadResponse(r, nil); err != nil || resp.StatusCode != 200 {
				t.Fatalf("%s: %v, %v", path, resp, err)
			}
		}
	}
}

// TestHTTPBackendFaults: a backend that refuses, hangs or breaks off gives an error of its own, and never an empty success.
func TestHTTPBackendFaults(t *testing.T) {
	w := newWorld(t, httpPolicy)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	silent := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	breaks := listen(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
		}
	})
	for _, tt := range []struct {
		name, backend string
		status        int
	}{{"refuses", closed.Addr().String(), 502}, {"hangs", silent.Addr().String(), 504}, {"breaks off", breaks.Addr().String(), 200}} {
		c := inboundConfig("http", tt.backend)
		c.Inbound[0].HTTP.ResponseTimeout = 50 * time.Millisecond
		p := w.start(t, c)
		for _, h2 := range []bool{false, true} {
			resp, err := w.client(t, "/caller", h2).Get("https://" + p.in() + "/docs/a")
			if err != nil {
				if tt.status != 200 { // what was begun may be broken off before anything of it was sent
					t.Error(err)
				}
				continue
			}
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != tt.status || (err == nil) != (tt.status != 200) {
				t.Errorf("a backend that %s, h2 %v: status %d, %v", tt.name, h2, resp.StatusCode, err)
			}
		}
	}
}
