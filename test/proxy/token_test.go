package proxy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/test/signettest"
)

// TestTokens: with jwt_audience, requests arrive with a JWT-SVID of the proxy's that a server takes, in place of whatever the client
// claimed; many requests have one token; and requests go on while the agent is away.
func TestTokens(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	s.Apply(identities(t) + policies)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	addr := workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI()))
	x509, err := workloadapi.NewX509Source(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer x509.Close()
	jwt, err := workloadapi.NewJWTSource(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer jwt.Close()

	var last atomic.Pointer[string]
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lines := r.Header["Authorization"]
		if len(lines) != 1 {
			http.Error(w, fmt.Sprintf("%d lines of Authorization", len(lines)), http.StatusUnauthorized)
			return
		}
		token, _ := strings.CutPrefix(lines[0], "Bearer ")
		svid, err := jwtsvid.ParseAndValidate(token, jwt, []string{"ledger"})
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		last.Store(&token)
		fmt.Fprint(w, svid.ID)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, TLSConfig: tlsconfig.MTLSServerConfig(x509, x509, tlsconfig.AuthorizeID(s.ID("/service")))}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	defer func() {
		server.Close()
		<-served
	}()

	p := start(t, s, fmt.Sprintf(`outbound:
- name: out
  listen: 127.0.0.1:0
  protocol: http
  address: %s
  servers: ["%s"]
  jwt_audience: ledger
metrics: {listen: "127.0.0.1:0"}
drain_timeout: 5s
sandbox: {landlock: auto, seccomp: require}
`, l.Addr(), s.ID("/caller")))
	p.waitReady()
	c := &http.Client{Timeout: patience}
	defer c.CloseIdleConnections()
	request := func() string {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+p.address("out")+"/x", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer of-the-client")
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body := make([]byte, 4096)
		n, _ := resp.Body.Read(body)
		if resp.StatusCode != http.StatusOK || string(body[:n]) != s.ID("/service").String() {
			t.Fatalf("status %d, %q", resp.StatusCode, body[:n])
		}
		return *last.Load()
	}
	first := request()
	if request() != first {
		t.Error("each request has a token of its own")
	}
	if err := s.StopAgent(); err != nil {
		t.Fatal(err)
	}
	if request() != first {
		t.Error("without the agent there is another token")
	}
}
