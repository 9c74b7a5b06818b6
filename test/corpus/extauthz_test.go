package corpus

import (
	"context"
	"crypto/x509"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/envoyrbac"
	"github.com/signet-id/signet/test/envoycheck"
)

// envoy is ext_authz on the agent's socket, asked as an Envoy asks for calls that came to it, with its headers raw and
// joined, and by its filter for connections. This process is every service, so each check says which it is about.
func (f *fleet) envoy(t *testing.T) []point {
	conn, err := grpc.NewClient("unix:"+f.AgentSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client := authv3.NewAuthorizationClient(conn)
	ask := func(t *testing.T, c *policy.TestCase, raw bool) answer {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		call := envoycheck.Call{Peer: f.leaf(t, c), Local: f.local(t, c), TCP: isTLS(c), Method: c.Request.Method, Path: c.Request.Path, Authority: "service", RawHeaders: raw}
		for _, line := range f.fields(t, c) {
			call.Header = append(call.Header, envoycheck.Field{Name: line.name, Value: line.value})
		}
		resp, err := client.Check(ctx, call.Request())
		if err != nil {
			return answer{what: err.Error()}
		}
		reply := call.Answer(resp, nil)
		return answer{allowed: reply.Passed, what: reply.Body}
	}
	return []point{
		{rbacPoint, f.saidByRBAC(t), f.rbac},
		{"ext_authz for HTTP", isHTTP, func(t *testing.T, c *policy.TestCase) answer { return ask(t, c, true) }},
		{"ext_authz for HTTP with joined headers", isHTTP, func(t *testing.T, c *policy.TestCase) answer { return ask(t, c, false) }},
		{"ext_authz for TCP", isTLS, func(t *testing.T, c *policy.TestCase) answer { return ask(t, c, false) }},
	}
}

// leaf is the certificate of the caller.
func (f *fleet) leaf(t *testing.T, c *policy.TestCase) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(f.cert(t, c.Request.Peer).Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// local is the certificate of the service.
func (f *fleet) local(t *testing.T, c *policy.TestCase) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(f.cert(t, c.Request.Service).Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// rules are those of Envoy's RBAC filters for the service of a case.
func (f *fleet) rules(t *testing.T, c *policy.TestCase) *envoyrbac.Rules {
	t.Helper()
	rules, err := envoyrbac.For(f.policies.Policies().Set(), c.Request.Service, c.Request.Protocol)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// saidByRBAC takes what these filters can say, and all that is denied: they never allow more.
func (f *fleet) saidByRBAC(t *testing.T) func(*policy.TestCase) bool {
	return func(c *policy.TestCase) bool {
		return !c.Allow || c.Request.Service.TrustDomain() == f.TrustDomain() && len(f.rules(t, c).Notes) == 0
	}
}

// rbac is what an Envoy with these filters does, by its documentation.
func (f *fleet) rbac(t *testing.T, c *policy.TestCase) answer {
	e := &envoycheck.RBAC{T: t, URIs: []string{c.Request.Peer.String()}}
	if isHTTP(c) {
		e.Headers = map[string][]string{":method": {c.Request.Method}, ":path": {c.Request.Path}}
		for _, line := range f.fields(t, c) {
			name := strings.ToLower(line.name)
			e.Headers[name] = append(e.Headers[name], line.value)
		}
	}
	rules := f.rules(t, c)
	return answer{allowed: e.Passes(rules.Deny) && e.Passes(rules.Allow), what: strings.Join(rules.Notes, "; ")}
}
