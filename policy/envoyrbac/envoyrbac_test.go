package envoyrbac

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/test/envoycheck"
)

var service = spiffeid.RequireFromString("spiffe://example.org/s")

func read(t testing.TB, documents string) *policyv1.PolicySet {
	t.Helper()
	docs, err := strictyaml.Split([]byte(documents), "p.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	set, err := policy.Check(docs, service.TrustDomain())
	if err != nil {
		t.Fatal(err)
	}
	set.Epoch, set.Revision = "e", 7
	return set
}

// compare decides a call both ways. A call that the policies deny never passes; one that they allow passes if the rules
// say that they are exact.
func compare(t testing.TB, set *policyv1.PolicySet, r *policy.Request) {
	t.Helper()
	rules, err := For(set, r.Service, r.Protocol)
	if err != nil {
		t.Fatal(err)
	}
	if err := rules.Deny.ValidateAll(); err != nil {
		t.Fatalf("Envoy would refuse it: %v", err)
	}
	if err := rules.Allow.ValidateAll(); err != nil {
		t.Fatalf("Envoy would refuse it: %v", err)
	}
	p, err := policy.Compile(set)
	if err != nil {
		t.Fatal(err)
	}
	d := p.Decide(r)
	e := &envoycheck.RBAC{T: t, URIs: []string{r.Peer.String()}, DNS: []string{"web.internal"}, Subject: "CN=web"}
	if r.Protocol == policy.ProtocolHTTP {
		e.Headers = map[string][]string{":method": {r.Method}, ":path": {r.Path}}
		if r.ContentTypes != nil {
			e.Headers["content-type"] = r.ContentTypes
		}
		if r.HasMethodOverride {
			e.Headers["x-http-method-override"] = []string{"DELETE"}
		}
	}
	describe := func() string {
		return fmt.Sprintf("%s %q %q of %s, override %t, by\n%v\nis decided %+v; notes %q", r.Method, r.Path, r.ContentTypes, r.Peer, r.HasMethodOverride, set, d, rules.Notes)
	}
	for _, e.LenientExpressions = range []bool{false, true} {
		passes := e.Passes(rules.Deny) && e.Passes(rules.Allow)
		if passes && !d.Allowed {
			t.Fatalf("RBAC allows what is denied: %s", describe())
		}
		if !passes && d.Allowed && len(rules.Notes) == 0 && utf8.ValidString(r.Path) && !strings.Contains(r.Path, "#") {
			t.Fatalf("RBAC denies what is allowed, and does not say so: %s", describe())
		}
	}
}

// The words of which random policies and calls are made: the sharp ones of each kind.
var (
	idPatterns = []string{"spiffe://example.org/a", "spiffe://example.org/a/**", "spiffe://example.org/*", "spiffe://example.org/**", "spiffe://example.org/*/b",
		"spiffe://example.org/a/*/c", "spiffe://partner.example/**", "spiffe://example.org/spire/agent/x", "spiffe://example.org/*/**", "spiffe://partner.example/a"}
	peers = []string{"spiffe://example.org/a", "spiffe://example.org/a/b", "spiffe://example.org/a/b/c", "spiffe://example.org/b", "spiffe://example.org/spire/agent/x",
		"spiffe://example.org/spire", "spiffe://partner.example/a", "spiffe://partner.example/spire/server", "spiffe://example.org/a.b", "spiffe://example.org/...",
		"spiffe://example.orgx/a", "spiffe://other.example/a"}
	paths   = []string{"/", "/x", "/x/", "/x/**", "/x/*", "/*", "/**", "/x/*/y", "/caf%C3%A9", "/a%20b/**", "/a+b", "/(x)|y", "/p.S/M", "/x.y", "/items/", "/*/", "/~u/*"}
	targets = []string{"/", "/x", "/x/", "/x/y", "/x/y/", "/x/z/y", "/x/z/y/", "/caf%c3%A9", "/caf%C3%A9", "/a%20b", "/a%20b/c", "/a+b", "/a%2Bb", "/a%2bb/", "/(x)|y", "/%28x%29%7cy",
		"/p.S/M", "/p.S/M/", "/p.S/N", "/pxS/M", "/x.y", "/xzy", "/items", "/items/", "/~u/x", "*", "", "x", "//", "/x//y", "/./x", "/x/..", "/x/../y", "/x/...", "/..x", "/x;y", "/x%2fy", "/x%2Ey",
		"/x%", "/x%4", "/x%zz", "/x%41", "/x\\y", "/x y", "/x\xff", "/x#y", "/x?q", "/x?q=//../;\\", "/p.S/M?q", "http://h/x", "/\u00e9", "/x%7F", "/x%00", "/x%80", "/x%ff/y", "/a?\xff"}
	methods      = []string{"GET", "POST", "DELETE", "OPTIONS", "get"}
	contentTypes = []string{"", "application/grpc", "application/grpc+proto", "application/grpc+", "application/grpc;x", "application/grpc+proto;x", "application/json",
		"application/grpc-web", "application/grpc+a b", "application/grpc;\xff", "application/grpc+\xff", "Application/grpc"}
	grpcMethods = []string{"p.S/M", "p.S/*", "q.S/N"}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func some[T any](r *rand.Rand, most int, from []T) (out []T) {
	for range 1 + r.IntN(most) {
		out = append(out, pick(r, from))
	}
	return out
}

func randomSet(r *rand.Rand) *policyv1.PolicySet {
	set := &policyv1.PolicySet{Format: policy.Format, TrustDomain: "example.org", Epoch: "e", Revision: 1}
	if r.IntN(8) == 0 {
		set.Defaults = policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW
	}
	for i := range 1 + r.IntN(2) {
		p := &policyv1.Policy{Name: fmt.Sprintf("p%d", i), Mode: policyv1.Mode_MODE_ENFORCE,
			Services: []string{pick(r, []string{"spiffe://example.org/s", "spiffe://example.org/s", "spiffe://example.org/*", "spiffe://example.org/other"})}}
		switch r.IntN(20) {
		case 0:
			p.Mode = policyv1.Mode_MODE_SHADOW
		case 1:
			p.Mode = 99
		}
		for range 1 + r.IntN(3) {
			rule := &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: some(r, 2, idPatterns)}
			if r.IntN(3) == 0 {
				rule.Effect = policyv1.Effect_EFFECT_DENY
			}
			switch r.IntN(4) {
			case 0:
				rule.Grpc = some(r, 2, grpcMethods)
			case 1, 2:
				for range 1 + r.IntN(2) {
					m := &policyv1.HTTPMatch{}
					if r.IntN(2) == 0 {
						m.Methods = some(r, 2, methods[:4])
					}
					if len(m.Methods) == 0 || r.IntN(2) == 0 {
						m.Paths = some(r, 2, paths)
					}
					rule.Http = append(rule.Http, m)
				}
			}
			switch r.IntN(24) {
			case 0:
				rule.Shadow = true
			case 1:
				rule.Jwt = &policyv1.JWTMatch{Audience: []string{"x"}}
			case 2:
				rule.Requires = []string{"of-the-future"}
			case 3:
				rule.Effect = 77
			}
			p.Rules = append(p.Rules, rule)
		}
		set.Policies = append(set.Policies, p)
	}
	return set
}

func randomCall(r *rand.Rand) *policy.Request {
	c := &policy.Request{Service: service, Peer: spiffeid.RequireFromString(pick(r, peers))}
	if r.IntN(5) == 0 {
		return c
	}
	c.Protocol, c.Method, c.Path, c.HasMethodOverride = policy.ProtocolHTTP, pick(r, methods), pick(r, targets), r.IntN(8) == 0
	if r.IntN(6) == 0 {
		c.Path += pick(r, []string{"/", "?q", "%41", "/..", "\x01", "//", "/" + strings.Repeat("x", 8192), "?" + strings.Repeat("x", 8192)})
	}
	if ct := pick(r, contentTypes); ct != "" {
		c.ContentTypes = []string{ct}
	}
	return c
}

// FuzzNeverAllowsMore makes random policies and calls.
func FuzzNeverAllowsMore(f *testing.F) {
	for i := range uint64(200) {
		f.Add(i, uint64(7))
	}
	f.Fuzz(func(t *testing.T, a, b uint64) {
		r := rand.New(rand.NewPCG(a, b))
		set := randomSet(r)
		for range 20 {
			compare(t, set, randomCall(r))
		}
	})
}

// FuzzPaths: any path against rules that allow everything but some of it.
func FuzzPaths(f *testing.F) {
	set := read(f, "{kind: CallPolicy, name: p, service: /s, allow: [{from: [/**]}], deny: [{from: [/a], http: [{paths: [/admin/**, \"/caf%C3%A9\", /*/x]}]}]}")
	for _, s := range append(targets, paths...) {
		f.Add("GET", s)
	}
	f.Fuzz(func(t *testing.T, method, path string) {
		compare(t, set, &policy.Request{Service: service, Peer: spiffeid.RequireFromString("spiffe://example.org/a"), Protocol: policy.ProtocolHTTP, Method: method, Path: path})
	})
}

// TestForeignNames: names that an authority of another trust domain can put into a certificate grant nothing.
func TestForeignNames(t *testing.T) {
	set := read(t, "{kind: CallPolicy, name: p, service: /s, allow: [{from: [/a, /ns/**, \"spiffe://partner.example/b\"]}]}")
	for _, protocol := range []policy.Protocol{policy.ProtocolTLS, policy.ProtocolHTTP} {
		rules, err := For(set, service, protocol)
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name string
			e    envoycheck.RBAC
			want bool
		}{
			{"an allowed peer", envoycheck.RBAC{URIs: []string{"spiffe://example.org/a"}}, true},
			{"a partner's", envoycheck.RBAC{URIs: []string{"spiffe://partner.example/b"}}, true},
			{"ours as a DNS name", envoycheck.RBAC{URIs: []string{"spiffe://partner.example/c"}, DNS: []string{"spiffe://example.org/a"}}, false},
			{"ours as the second URI", envoycheck.RBAC{URIs: []string{"spiffe://partner.example/c", "spiffe://example.org/ns/x"}}, false},
			{"ours as the subject", envoycheck.RBAC{URIs: []string{"spiffe://partner.example/c"}, Subject: "spiffe://example.org/a"}, false},
			{"no URI", envoycheck.RBAC{DNS: []string{"spiffe://example.org/a"}}, false},
			{"no name", envoycheck.RBAC{}, false},
			{"a trust domain alone", envoycheck.RBAC{URIs: []string{"spiffe://example.org"}}, false},
			{"an empty segment", envoycheck.RBAC{URIs: []string{"spiffe://example.org/ns//x"}}, false},
			{"a dot segment", envoycheck.RBAC{URIs: []string{"spiffe://example.org/ns/.."}}, false},
		} {
			tt.e.T = t
			if protocol == policy.ProtocolHTTP {
				tt.e.Headers = map[string][]string{":method": {"GET"}, ":path": {"/"}}
			}
			if got := tt.e.Passes(rules.Deny) && tt.e.Passes(rules.Allow); got != tt.want {
				t.Errorf("%s: passes %t, want %t", tt.name, got, tt.want)
			}
		}
	}
}

// TestNotes: what cannot be said is told, and nothing is where all can be said.
func TestNotes(t *testing.T) {
	for _, tt := range []struct{ name, policy, note string }{
		{"exact", "allow: [{from: [/a], http: [{methods: [GET], paths: [/x/**]}]}], deny: [{from: [/b/**]}]", ""},
		{"a token", "allow: [{from: [/a], jwt: {audience: [s]}}]", "left out"},
		{"a condition", "allow: [{from: [/a], when: 'request.method == \"GET\"'}]", "left out"},
		{"a condition of a deny", "allow: [{from: [/a]}], deny: [{from: [/a], when: 'request.method == \"GET\"'}]", "denies without it"},
		{"shadow", "mode: shadow, allow: [{from: [/a]}]", "only reports"},
		{"a shadow rule", "allow: [{from: [/a], shadow: true}, {from: [/b]}]", "only reports"},
		{"a large expression", "allow: [{from: [/a]}], deny: [{from: [/*], http: [{paths: [/*/" + strings.Repeat("x", 200) + "]}]}]", "re2.max_program_size"},
	} {
		set := read(t, "{kind: CallPolicy, name: p, service: /s, "+tt.policy+"}")
		rules, err := For(set, service, policy.ProtocolHTTP)
		if err != nil {
			t.Fatal(err)
		}
		if notes := strings.Join(rules.Notes, "\n"); tt.note == "" && notes != "" || !strings.Contains(notes, tt.note) {
			t.Errorf("%s: notes %q, want %q", tt.name, notes, tt.note)
		}
	}
	if _, err := For(read(t, "{kind: CallPolicy, name: p, service: /s, allow: [{from: [/a]}]}"), spiffeid.RequireFromString("spiffe://partner.example/s"), policy.ProtocolTLS); err == nil {
		t.Error("a foreign service is taken")
	}
}
