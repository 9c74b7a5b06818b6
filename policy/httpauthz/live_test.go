package httpauthz_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/internal/testca"
)

const liveDocuments = `
kind: CallPolicy
name: docs
service: /docs
allow:
  - from: [/web]
    http: [{methods: [GET], paths: [/stream, /upgrade, /short]}]
`

const withoutStreams = `{kind: CallPolicy, name: docs, service: /docs, allow: [{from: [/web], http: [{methods: [GET], paths: [/short]}]}]}`

// A liveServer answers /stream until its caller is gone, /upgrade with a connection that it echoes on, and /short at once.
type liveServer struct {
	ca      *testca.CA
	svid    *x509svid.SVID
	source  *testca.Changing
	addr    string
	ended   chan error // of handlers, with the cause of their context
	denials chan policy.Judgement
}

func startLive(t *testing.T, protect bool) *liveServer {
	t.Helper()
	s := &liveServer{ca: testca.New(t, "example.org"), source: &testca.Changing{}, ended: make(chan error, 8), denials: make(chan policy.Judgement, 8)}
	s.svid = s.ca.SVID(t, "/docs", time.Hour)
	s.source.Set(testca.Policies(t, liveDocuments))
	a, err := httpauthz.New(httpauthz.Config{Policies: s.source, Service: s.svid.ID, Log: slog.New(slog.DiscardHandler), OnDecision: func(j policy.Judgement) {
		if !j.Decision.Allowed {
			s.denials <- j
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/short", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "short") })
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begin\n")
		w.(http.Flusher).Flush()
		r.Header.Del("Accept-Encoding") // a handler may: the request is judged by what came
		<-r.Context().Done()
		s.ended <- context.Cause(r.Context())
	})
	mux.HandleFunc("/upgrade", func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		rw.Flush()
		go func() { // the handler returns, as many do
			defer conn.Close()
			_, err := io.Copy(conn, rw)
			s.ended <- err
		}()
	})
	server := &http.Server{Handler: mux, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	if protect {
		a.Protect(server, s.svid, s.ca.X509())
	} else {
		server.Handler, server.TLSConfig = a.Middleware(mux), a.TLSConfig(s.svid, s.ca.X509())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	done := make(chan struct{})
	go func() { defer close(done); server.ServeTLS(l, "", "") }()
	t.Cleanup(func() { server.Close(); <-done })
	return s
}

func (s *liveServer) client(t *testing.T, http2 bool) *http.Client {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(s.ca.SVID(t, "/web", time.Hour), s.ca.X509(), tlsconfig.AuthorizeID(s.svid.ID)), ForceAttemptHTTP2: http2}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

func (s *liveServer) get(t *testing.T, c *http.Client, path string) *http.Response {
	t.Helper()
	r, err := c.Get("https://" + s.addr + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Body.Close() })
	if r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", path, r.Status)
	}
	return r
}

// A response that would be denied by now is cut off, and does not look complete; the peer's other requests go on.
func TestResponsesEndWhenTheyWouldBeDenied(t *testing.T) {
	for _, protect := range []bool{true, false} {
		for _, http2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("protect %t, http2 %t", protect, http2), func(t *testing.T) {
				s := startLive(t, protect)
				c := s.client(t, http2)
				r := s.get(t, c, "/stream")
				if (r.ProtoMajor == 2) != http2 {
					t.Fatalf("the protocol is %s", r.Proto)
				}
				s.source.Set(testca.Policies(t, withoutStreams))
				if j := <-s.denials; j.Decision.Reason != policy.ReasonNoAllow || j.Call.Path != "/stream" {
					t.Errorf("judgement %+v", j)
				}
				<-s.ended
				if body, err := io.ReadAll(r.Body); err == nil {
					t.Errorf("the response %q looks complete", body)
				}
				if body, err := io.ReadAll(s.get(t, c, "/short").Body); err != nil || string(body) != "short" {
					t.Errorf("another request of the peer: %q, %v", body, err)
				}
				s.source.Set(testca.Policies(t, liveDocuments))
				r = s.get(t, c, "/stream")
				s.source.Revoke("/web")
				if _, err := io.ReadAll(r.Body); err == nil {
					t.Error("the response to a revoked peer looks complete")
				}
				<-s.ended
				if _, err := c.Get("https://" + s.addr + "/short"); err == nil {
					t.Error("a revoked peer connects")
				}
			})
		}
	}
}

// An upgraded connection is judged as the request that began it, also after its handler has returned.
func TestUpgradedConnectionsEndWhenTheyWouldBeDenied(t *testing.T) {
	s := startLive(t, true)
	conn, err := tls.Dial("tcp", s.addr, tlsconfig.MTLSClientConfig(s.ca.SVID(t, "/web", time.Hour), s.ca.X509(), tlsconfig.AuthorizeID(s.svid.ID)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	fmt.Fprintf(conn, "GET /upgrade HTTP/1.1\r\nHost: docs\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	in := bufio.NewReader(conn)
	r, err := http.ReadResponse(in, nil)
	if err != nil || r.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", r, err)
	}
	fmt.Fprintf(conn, "hello\n")
	if line, err := in.ReadString('\n'); err != nil || line != "hello\n" {
		t.Fatalf("%q, %v", line, err)
	}
	s.source.Set(testca.Policies(t, withoutStreams))
	if j := <-s.denials; j.Call.Path != "/upgrade" {
		t.Errorf("judgement %+v", j)
	}
	if _, err := in.ReadByte(); err == nil {
		t.Error("the connection is open")
	}
	<-s.ended
}

func TestIdleConnectionsOfRevokedPeersAreClosed(t *testing.T) {
	for _, protect := range []bool{true, false} {
		s := startLive(t, protect)
		conn, err := tls.Dial("tcp", s.addr, tlsconfig.MTLSClientConfig(s.ca.SVID(t, "/web", time.Hour), s.ca.X509(), tlsconfig.AuthorizeID(s.svid.ID)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		fmt.Fprintf(conn, "GET /short HTTP/1.1\r\nHost: docs\r\n\r\n")
		in := bufio.NewReader(conn)
		r, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Fatal(err)
		}
		s.source.Revoke("/web")
		_, err = in.ReadByte()
		if timeout := net.Error(nil); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("protect %t: the connection is open: %v", protect, err)
		}
	}
}
