package httpauthz_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/internal/testca"
)

const documents = `
kind: CallPolicy
name: docs
service: /docs
allow:
  - from: [/web]
    http: [{methods: [GET, POST], paths: [/v1/**, /items/]}]
  - from: [/tokens]
    jwt: {audience: [docs]}
deny:
  - from: [/web]
    http: [{paths: [/v1/admin/**]}, {methods: [DELETE]}]
  - from: [/banned]
`

// A fixture is an HTTPS server of /docs, whose handler notes what reaches it.
type fixture struct {
	ca     *testca.CA
	server *x509svid.SVID
	addr   string
	log    *syncBuffer

	mu        sync.Mutex
	now       time.Time // zero: the real one
	reached   []string
	judgement []policy.Judgement
}

type syncBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *syncBuffer) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.String()
}

func (f *fixture) Now() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now.IsZero() {
		return time.Now()
	}
	return f.now
}

// start serves with the policies; conf may replace the TLS configuration.
func start(t *testing.T, p *policy.Policies, conf func(*fixture, *httpauthz.Authorizer) *tls.Config) *fixture {
	t.Helper()
	f := &fixture{ca: testca.New(t, "example.org"), log: &syncBuffer{}}
	f.server = f.ca.SVID(t, "/docs", time.Hour)
	a, err := httpauthz.New(httpauthz.Config{
		Policies: testca.Fixed{P: p}, Service: f.server.ID, JWTBundles: f.ca.JWT(t), Now: f.Now,
		Log: slog.New(slog.NewTextHandler(f.log, nil)),
		OnDecision: func(j policy.Judgement) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.judgement = append(f.judgement, j)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	c := a.TLSConfig(f.server, f.ca.X509())
	if conf != nil {
		c = conf(f, a)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", c)
	if err != nil {
		t.Fatal(err)
	}
	f.addr = l.Addr().String()
	server := a.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, ok := httpauthz.PeerID(r.Context())
		f.mu.Lock()
		defer f.mu.Unlock()
		f.reached = append(f.reached, r.Method+" "+r.RequestURI)
		fmt.Fprint(w, id, ok)
	}), f.server, f.ca.X509())
	server.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	return f
}

func (f *fixture) client(t *testing.T, path string) *tls.Config {
	return tlsconfig.MTLSClientConfig(f.ca.SVID(t, path, time.Hour), f.ca.X509(), tlsconfig.AuthorizeID(f.server.ID))
}

// raw sends one HTTP/1.1 request as bytes.
func (f *fixture) raw(c *tls.Config, request string) (*http.Response, string, error) {
	conn, err := tls.Dial("tcp", f.addr, c)
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	return exchange(conn, request)
}

func exchange(conn net.Conn, request string) (*http.Response, string, error) {
	if _, err := io.WriteString(conn, request); err != nil {
		return nil, "", err
	}
	method, _, _ := strings.Cut(request, " ")
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response, string(body), err
}

func TestMiddlewareDecidesRawRequests(t *testing.T) {
	f := start(t, testca.Policies(t, documents), nil)
	web := f.client(t, "/web")
	for _, tt := range []struct {
		request string
		reason  string // empty: let through
	}{
		{"GET /v1/a HTTP/1.1", ""},
		{"GET /v1/a?x=/../ HTTP/1.1", ""},
		{"POST /v1/a HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 0", ""},
		{"GET /items/ HTTP/1.1", ""},
		{"GET /items HTTP/1.1", "denied"},
		{"PUT /v1/a HTTP/1.1", "denied"},
		{"HEAD /v1/a HTTP/1.1", "denied"},
		{"GET /v1/admin HTTP/1.1", "denied"},
		{"GET /v1/admin/ HTTP/1.1", "denied"},
		{"GET /v1/admin/x HTTP/1.1", "denied"},
		{"GET /v1/%61dmin HTTP/1.1", "path_refused"},
		{"GET /v1/x/../admin HTTP/1.1", "path_refused"},
		{"GET /v1/x%2f..%2fadmin HTTP/1.1", "path_refused"},
		{"GET /v1//admin HTTP/1.1", "path_refused"},
		{"GET /v1/admin;x HTTP/1.1", "path_refused"},
		{"GET https://docs/v1/a HTTP/1.1", "path_refused"},
		{"OPTIONS * HTTP/1.1", "denied"},
		{"CONNECT docs:443 HTTP/1.1", "path_refused"},
		{"GET /v1/a HTTP/1.1\r\nX-HTTP-Method-Override: DELETE", "method_override_refused"},
		{"GET /v1/a HTTP/1.1\r\nx-http-method: DELETE", "method_override_refused"},
		{"POST /v1/a HTTP/1.1\r\nX-Method-Override:\r\nContent-Length: 0", "method_override_refused"},
	} {
		f.mu.Lock()
		f.reached, f.judgement = nil, nil
		f.mu.Unlock()
		response, body, err := f.raw(web, tt.request+"\r\nHost: docs\r\nConnection: close\r\n\r\n")
		if err != nil {
			t.Errorf("%q: %v", tt.request, err)
			continue
		}
		f.mu.Lock()
		if tt.reason == "" {
			if response.StatusCode != 200 || body != "spiffe://example.org/web true" || len(f.reached) != 1 {
				t.Errorf("%q: status %d, body %q, reached %q", tt.request, response.StatusCode, body, f.reached)
			}
		} else {
			checkRefusal(t, tt.request, response, body, tt.reason, f.judgement)
			if len(f.reached) != 0 {
				t.Errorf("%q: reached the handler", tt.request)
			}
		}
		f.mu.Unlock()
	}
}

func checkRefusal(t *testing.T, request string, response *http.Response, body, reason string, judged []policy.Judgement) {
	t.Helper()
	id := response.Header.Get(httpauthz.DecisionHeader)
	if len(judged) != 1 || judged[0].ID != id || len(id) != 26 || judged[0].Decision.Allowed {
		t.Errorf("%q: decision %q, reported %+v", request, id, judged)
	}
	if response.StatusCode != http.StatusForbidden {
		t.Errorf("%q: status %d, want 403", request, response.StatusCode)
	}
	if strings.HasPrefix(request, "HEAD") {
		return
	}
	var got map[string]string
	if err := json.Unmarshal([]byte(body), &got); err != nil || len(got) != 2 || got["decision_id"] != id || got["reason"] != reason {
		t.Errorf("%q: body %q, want reason %q (%v)", request, body, reason, err)
	}
}

func TestMiddlewareLogsTheStory(t *testing.T) {
	f := start(t, testca.Policies(t, documents), nil)
	response, body, err := f.raw(f.client(t, "/web"), "GET /v1/admin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if err != nil {
		t.Fatal(err)
	}
	log := f.log.text()
	for _, want := range []string{"call denied", "decision_id=" + response.Header.Get(httpauthz.DecisionHeader), "spiffe_id=spiffe://example.org/web", "decision.policy=docs", "decision.line=11", "decision.revision=7", "path=/v1/admin"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if strings.Contains(body, "docs") || strings.Contains(body, "p.yaml") {
		t.Errorf("the body tells the caller about rules: %s", body)
	}
}

func TestPrefilterRefusesInTheHandshake(t *testing.T) {
	f := start(t, testca.Policies(t, documents), nil)
	stranger := testca.New(t, "example.org") // the same name, another key
	for name, c := range map[string]*tls.Config{
		"a peer that every request of is denied": f.client(t, "/banned"),
		"a peer that no rule allows":             f.client(t, "/nobody"),
		"an SVID of another authority":           tlsconfig.MTLSClientConfig(stranger.SVID(t, "/web", time.Hour), f.ca.X509(), tlsconfig.AuthorizeAny()),
		"no SVID":                                tlsconfig.TLSClientConfig(f.ca.X509(), tlsconfig.AuthorizeAny()),
	} {
		if response, body, err := f.raw(c, "GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n"); err == nil {
			t.Errorf("%s: status %d %s", name, response.StatusCode, body)
		}
	}
	if len(f.reached) != 0 {
		t.Errorf("reached %q", f.reached)
	}
}

func TestMiddlewareRefusesPeersThatThePrefilterHasNotSeen(t *testing.T) {
	// A server that forgot to verify: any certificate gets in.
	f := start(t, testca.Policies(t, documents), func(f *fixture, _ *httpauthz.Authorizer) *tls.Config {
		c := tlsconfig.TLSServerConfig(f.server)
		c.ClientAuth = tls.RequireAnyClientCert
		return c
	})
	stranger := testca.New(t, "example.org")
	c := tlsconfig.MTLSClientConfig(stranger.SVID(t, "/web", time.Hour), f.ca.X509(), tlsconfig.AuthorizeAny())
	response, body, err := f.raw(c, "GET /v1/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if err != nil || response.StatusCode != http.StatusForbidden || !strings.Contains(body, `"svid_refused"`) {
		t.Errorf("an unverified peer: %v %q %v", response, body, err)
	}
}

func TestMiddlewareRefusesResumedSessions(t *testing.T) {
	f := start(t, testca.Policies(t, documents), func(f *fixture, a *httpauthz.Authorizer) *tls.Config {
		return tlsconfig.MTLSServerConfig(f.server, f.ca.X509(), a.Prefilter()) // with session tickets
	})
	c := f.client(t, "/web")
	c.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	const request = "GET /v1/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
	if response, body, err := f.raw(c, request); err != nil || response.StatusCode != 200 {
		t.Fatalf("the first session: %v %q %v", response, body, err)
	}
	if response, body, err := f.raw(c, request); err != nil || response.StatusCode != http.StatusForbidden || !strings.Contains(body, `"svid_refused"`) {
		t.Errorf("a resumed session, whose SVID nobody verified: %v %q %v", response, body, err)
	}
}

func TestMiddlewareRefusesAnAuthorityThatLooksLikeAPath(t *testing.T) {
	f := start(t, testca.Policies(t, `{kind: CallPolicy, name: docs, service: /docs, allow: [{from: [/web], http: [{paths: [/v1/**]}]}]}`), nil)
	c := f.client(t, "/web")
	c.NextProtos = []string{"h2"}
	conn, err := tls.Dial("tcp", f.addr, c)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// No client of Go's would send such a thing.
	request := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, "") + frame(1, 5, 1, field(":method", "CONNECT")+field(":authority", "/v1/a"))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	for header := make([]byte, 9); header[3] != 1; { // until the headers of the response
		if _, err := io.ReadFull(conn, header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(header[0])<<16|int64(header[1])<<8|int64(header[2])); err != nil {
			t.Fatal(err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if last := f.judgement[len(f.judgement)-1]; len(f.reached) != 0 || last.Decision.Reason != policy.ReasonPath {
		t.Errorf("reached %q, decided %+v", f.reached, last.Decision)
	}
}

// frame is a frame of HTTP/2. [RFC 9113 §4.1]
func frame(kind, flags, stream byte, payload string) string {
	return string([]byte{0, byte(len(payload) >> 8), byte(len(payload)), kind, flags, 0, 0, 0, stream}) + payload
}

// field is a header field as a literal without indexing. [RFC 7541 §6.2.2]
func field(name, value string) string {
	return string([]byte{0, byte(len(name))}) + name + string([]byte{byte(len(value))}) + value
}

func TestMiddlewareRefusesAnSVIDThatExpiredOnTheConnection(t *testing.T) {
	f := start(t, testca.Policies(t, documents), nil)
	conn, err := tls.Dial("tcp", f.addr, f.client(t, "/web"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const request = "GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n"
	if response, body, err := exchange(conn, request); err != nil || response.StatusCode != 200 {
		t.Fatalf("before: %v %q %v", response, body, err)
	}
	f.mu.Lock()
	f.now = time.Now().Add(2 * time.Hour)
	f.mu.Unlock()
	if response, body, err := exchange(conn, request); err != nil || response.StatusCode != http.StatusForbidden || !strings.Contains(body, `"svid_refused"`) {
		t.Errorf("after its end: %v %q %v", response, body, err)
	}
}

func TestMiddlewareValidatesTokensThatRulesAskFor(t *testing.T) {
	f := start(t, testca.Policies(t, documents), nil)
	stranger := testca.New(t, "example.org")
	c := f.client(t, "/tokens")
	for _, tt := range []struct {
		name, headers string
		status        int
	}{
		{"its own token", "Authorization: Bearer " + f.ca.Token(t, "/tokens", "docs"), 200},
		{"the scheme in lower case", "Authorization: bearer " + f.ca.Token(t, "/tokens", "docs"), 200},
		{"none", "X-Y: z", 403},
		{"another audience", "Authorization: Bearer " + f.ca.Token(t, "/tokens", "other"), 403},
		{"another's token", "Authorization: Bearer " + f.ca.Token(t, "/web", "docs"), 403},
		{"another key", "Authorization: Bearer " + stranger.Token(t, "/tokens", "docs"), 403},
		{"two headers", "Authorization: Bearer " + f.ca.Token(t, "/tokens", "docs") + "\r\nAuthorization: Bearer x", 403},
		{"Basic", "Authorization: Basic " + f.ca.Token(t, "/tokens", "docs"), 403},
	} {
		response, body, err := f.raw(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"+tt.headers+"\r\n\r\n")
		if err != nil || response.StatusCode != tt.status {
			t.Errorf("%s: %v %q %v, want status %d\n%s", tt.name, response, body, err, tt.status, f.log.text())
		}
	}
	if strings.Contains(f.log.text(), "eyJ") {
		t.Error("a token is in the log")
	}
}

func TestMiddlewareDeniesWithoutPolicies(t *testing.T) {
	f := start(t, nil, nil)
	if response, _, err := f.raw(f.client(t, "/web"), "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err == nil {
		t.Errorf("without policies: %d", response.StatusCode)
	}
}

func TestMiddlewareOverHTTP2(t *testing.T) {
	f := start(t, testca.Policies(t, documents), nil)
	transport := &http.Transport{TLSClientConfig: f.client(t, "/web"), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	for path, status := range map[string]int{"/v1/a": 200, "/v1/admin/x": 403, "/v1/%2e%2e": 403} {
		request, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+f.addr+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != status || response.ProtoMajor != 2 {
			t.Errorf("%s: status %d over %s, want %d", path, response.StatusCode, response.Proto, status)
		}
	}
}

func TestNewNamesTheWrongField(t *testing.T) {
	if _, err := httpauthz.New(httpauthz.Config{}); err == nil || !strings.Contains(err.Error(), "Policies") {
		t.Errorf("no policies: %v", err)
	}
	if _, err := httpauthz.New(httpauthz.Config{Policies: testca.Fixed{}}); err == nil || !strings.Contains(err.Error(), "Service") {
		t.Errorf("no service: %v", err)
	}
}
