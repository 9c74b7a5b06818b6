package httpauthz_test

import (
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/testca"
)

const login = "https://login.example"

const conditional = `
kind: CallPolicy
name: docs
service: /docs
allow:
  - from: [/web]
    http: [{methods: [GET], paths: [/tenants/*]}]
    when: request.headers["x-tenant"] == "blue" && request.path == "/tenants/blue"
  - from: [/web]
    http: [{methods: [PUT]}]
    when: user.issuer == "https://login.example" && "editors" in user.claims.groups
  - from: [/web]
    http: [{methods: [POST]}]
    jwt: {audience: [docs]}
    when: jwt.trust_domain == "example.org" && jwt.claims.level >= 3
deny:
  - from: [/web]
    when: '"x-debug" in request.headers'
`

// TestMiddlewareEvaluatesConditions sends requests with headers, JWT-SVIDs and user tokens over real connections.
func TestMiddlewareEvaluatesConditions(t *testing.T) {
	idp, stranger := testca.New(t, "idp.example"), testca.New(t, "idp.example")
	set := testca.Policies(t, conditional).Set()
	set.UserIssuers = []*policyv1.UserIssuer{idp.UserIssuer(t, login)}
	p, err := policy.Compile(set)
	if err != nil {
		t.Fatal(err)
	}
	f := start(t, p, nil)
	web := f.client(t, "/web")
	user, jwt := idp.UserToken(t, login, "readers", "editors"), f.ca.TokenWith(t, "/web", "docs", map[string]any{"level": 3})
	const size = "\r\nContent-Length: 0"
	for _, tt := range []struct {
		request string
		allowed bool
	}{
		{"GET /tenants/blue HTTP/1.1\r\nX-Tenant: blue", true},
		{"GET /tenants/blue?x=1 HTTP/1.1\r\nx-TENANT: blue", true},
		{"GET /tenants/red HTTP/1.1\r\nX-Tenant: blue", false},
		{"GET /tenants/blue HTTP/1.1\r\nX-Tenant: red", false},
		{"GET /tenants/blue HTTP/1.1", false},
		{"GET /tenants/blue HTTP/1.1\r\nX-Tenant: blue\r\nX-Tenant: blue", false},
		{"GET /tenants/blue HTTP/1.1\r\nX-Tenant: red\r\nX-Tenant: blue", false},
		{"GET /tenants/blue HTTP/1.1\r\nX-Tenant: blue, red", false},
		{"GET /tenants/blue HTTP/1.1\r\nX-Tenant: blue\r\nX-Debug:", false},
		{"GET /tenants/blue HTTP/1.1\r\nX-Tenant: blue\r\nX-Debug: 1\r\nX-Debug: 2", false},

		{"PUT /a HTTP/1.1\r\nX-User-Token: " + user + size, true},
		{"PUT /a HTTP/1.1\r\nX-User-Token: Bearer " + user + size, true},
		{"PUT /a HTTP/1.1" + size, false},
		{"PUT /a HTTP/1.1\r\nAuthorization: Bearer " + user + size, false},
		{"PUT /a HTTP/1.1\r\nX-User-Token: " + user + "\r\nX-User-Token: " + user + size, false},
		{"PUT /a HTTP/1.1\r\nX-User-Token: " + idp.UserToken(t, login, "readers") + size, false},
		{"PUT /a HTTP/1.1\r\nX-User-Token: " + idp.UserToken(t, login+"/", "editors") + size, false},
		{"PUT /a HTTP/1.1\r\nX-User-Token: " + stranger.UserToken(t, login, "editors") + size, false},

		{"POST /a HTTP/1.1\r\nAuthorization: Bearer " + jwt + size, true},
		{"POST /a HTTP/1.1\r\nAuthorization: Bearer " + f.ca.TokenWith(t, "/web", "docs", map[string]any{"level": "3"}) + size, false},
		{"POST /a HTTP/1.1\r\nAuthorization: Bearer " + f.ca.TokenWith(t, "/web", "docs", map[string]any{"level": 2.999}) + size, false},
		{"POST /a HTTP/1.1\r\nAuthorization: Bearer " + f.ca.TokenWith(t, "/other", "docs", map[string]any{"level": 3}) + size, false},
		{"POST /a HTTP/1.1\r\nAuthorization: Bearer " + f.ca.TokenWith(t, "/web", "others", map[string]any{"level": 3}) + size, false},
		{"POST /a HTTP/1.1\r\nAuthorization: Bearer " + idp.TokenWith(t, "/web", "docs", map[string]any{"level": 3}) + size, false},
	} {
		response, body, err := f.raw(web, tt.request+"\r\nHost: docs\r\nConnection: close\r\n\r\n")
		if err != nil {
			t.Errorf("%q: %v", tt.request, err)
			continue
		}
		if allowed := response.StatusCode == 200; allowed != tt.allowed || !allowed && !strings.Contains(body, `"denied"`) {
			t.Errorf("%q: status %d, %s; want allowed %t\n%s", tt.request, response.StatusCode, body, tt.allowed, f.log.text())
		}
	}
	for _, secret := range []string{user, jwt} {
		for _, part := range strings.Split(secret, ".")[1:] {
			if strings.Contains(f.log.text(), part) {
				t.Errorf("the log holds a token:\n%s", f.log.text())
			}
		}
	}
}

// TestConditionsOverHTTP2 holds that a header in HTTP/2 is judged as one in HTTP/1.1.
func TestConditionsOverHTTP2(t *testing.T) {
	f := start(t, testca.Policies(t, conditional), nil)
	transport := &http.Transport{TLSClientConfig: f.client(t, "/web"), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
	for _, tt := range []struct {
		values []string
		want   int
	}{
		{[]string{"blue"}, 200},
		{nil, 403},
		{[]string{"blue", "blue"}, 403},
		{[]string{"red"}, 403},
		{[]string{"blue,blue"}, 403},
	} {
		request, err := http.NewRequest("GET", "https://"+f.addr+"/tenants/blue", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header["X-Tenant"] = tt.values
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if response.StatusCode != tt.want || response.ProtoMajor != 2 {
			t.Errorf("X-Tenant %q: status %d over %s, want %d", tt.values, response.StatusCode, response.Proto, tt.want)
		}
	}
}

// TestConditionsAtTheHandshake holds that a rule with a condition admits a peer to the handshake, where a deny with one
// turns nobody away, and that alone neither allows a connection.
func TestConditionsAtTheHandshake(t *testing.T) {
	f := start(t, testca.Policies(t, conditional), nil)
	conn, err := tls.Dial("tcp", f.addr, f.client(t, "/web"))
	if err != nil {
		t.Fatalf("a peer with conditional rules only: %v", err)
	}
	conn.Close()
	p := testca.Policies(t, conditional)
	if d := p.Decide(&policy.Request{Service: f.server.ID, Peer: f.ca.SVID(t, "/web", time.Hour).ID}); d.Allowed || d.Reason != policy.ReasonDenied {
		t.Errorf("a connection of which only the caller is known: %+v", d)
	}
}
