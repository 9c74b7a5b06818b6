package policy

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// hostile is a set of one policy for the services, with one allow for every caller for each of the items.
func hostile(services []string, items ...*policyv1.HTTPMatch) *policyv1.PolicySet {
	p := &policyv1.Policy{Name: "p", Services: services, Mode: policyv1.Mode_MODE_ENFORCE}
	for _, it := range items {
		p.Rules = append(p.Rules, &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/**"}, Http: []*policyv1.HTTPMatch{it}})
	}
	return &policyv1.PolicySet{Format: Format, TrustDomain: "example.org", Policies: []*policyv1.Policy{p}}
}

// placements are patterns of depth segments, one for each way to put a wildcard in the place of some.
func placements(prefix string, depth int) []string {
	var patterns []string
	for mask := range 1 << depth {
		s := prefix
		for i := range depth {
			if mask>>i&1 == 1 {
				s += "/*"
			} else {
				s += "/a"
			}
		}
		patterns = append(patterns, s)
	}
	return patterns
}

func TestDecideAllocatesNothingForHostilePatterns(t *testing.T) {
	const depth = 4
	deep := strings.Repeat("/a", depth)
	set := hostile(placements("spiffe://example.org", depth), &policyv1.HTTPMatch{Methods: []string{"GET"}, Paths: placements("", depth)})
	set.Policies[0].Rules[0].From = placements("spiffe://example.org", depth)
	deny := &policyv1.Rule{Effect: policyv1.Effect_EFFECT_DENY, From: placements("spiffe://example.org", depth), Http: []*policyv1.HTTPMatch{{Methods: []string{"PUT"}, Paths: placements("", depth)}}}
	set.Policies[0].Rules = append(set.Policies[0].Rules, deny)
	p := compile(t, set)
	for method, want := range map[string]bool{"GET": true, "PUT": false, "POST": false} {
		r := &Request{Service: id(t, deep), Peer: id(t, deep), Protocol: ProtocolHTTP, Method: method, Path: deep}
		if got := p.Decide(r).Allowed; got != want {
			t.Errorf("%s: allowed %t, want %t", method, got, want)
		}
		if n := testing.AllocsPerRun(10, func() { p.Decide(r) }); n != 0 {
			t.Errorf("%s: Decide allocates %v times", method, n)
		}
	}
}

// Each kind of pattern multiplies the search: without a bound, the 768 patterns of this set take seconds for one call.
func TestDecideDeniesWhatIsTooLongToLookAt(t *testing.T) {
	const depth = 8
	deep := strings.Repeat("/a", depth)
	for name, services := range map[string][]string{"enforced": placements("spiffe://example.org", depth), "by pattern of callers": {"spiffe://example.org" + deep}} {
		set := hostile(services, &policyv1.HTTPMatch{Methods: []string{"GET"}, Paths: placements("", depth)})
		set.Defaults = policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW
		set.Policies[0].Rules[0].From = placements("spiffe://example.org", depth)
		p := compile(t, set)
		r := &Request{Service: id(t, deep), Peer: id(t, deep), Protocol: ProtocolHTTP, Method: "GET", Path: deep}
		if d := p.Decide(r); d.Allowed || d.Reason != ReasonTooManyPatterns || d.Reason.String() != "too_many_patterns" {
			t.Errorf("%s: %+v", name, d.Outcome)
		}
		s := newScan(r)
		if p.decide(&s); s.steps > maxSteps+1 {
			t.Errorf("%s: %d steps", name, s.steps)
		}
		if e := p.Explain(r).String(); !strings.Contains(e, "write fewer") {
			t.Errorf("%s: explained as\n%s", name, e)
		}
		r.Path = "/b" // what does not fit is cheap
		if d := p.Decide(r); d.Allowed {
			t.Errorf("%s: GET /b is allowed", name)
		}
	}
}

func TestLongPatternsTakeLittleMemory(t *testing.T) {
	const size = 1 << 20 // as long as a document can be
	m := &policyv1.HTTPMatch{Methods: []string{"GET"}}
	for n := 0; n < size; n += len(m.Paths[len(m.Paths)-1]) {
		m.Paths = append(m.Paths, fmt.Sprintf("/%d%s", len(m.Paths), strings.Repeat("/b", 4_000)))
	}
	set := hostile([]string{"spiffe://example.org/s"}, m)
	before := heap()
	p := compile(t, set)
	if grown := heap() - before; grown > 64*size {
		t.Errorf("%d MiB are held for %d MiB of patterns", grown>>20, size>>20)
	}
	runtime.KeepAlive(p)
}

// The list of callers and the list of paths must not be multiplied, nor what several rules say of the same callers.
func TestRulesOfManyCallersAndPathsTakeLittleMemory(t *testing.T) {
	const n, rules = 1_000, 4
	var items []*policyv1.HTTPMatch
	for i := range rules {
		m := &policyv1.HTTPMatch{Methods: []string{"GET"}}
		for j := range n {
			m.Paths = append(m.Paths, fmt.Sprintf("/%d/%d", i, j))
		}
		items = append(items, m)
	}
	set := hostile([]string{"spiffe://example.org/s"}, items...)
	for _, r := range set.Policies[0].Rules {
		r.From = nil
		for i := range n {
			r.From = append(r.From, fmt.Sprintf("spiffe://example.org/c/%d", i))
		}
	}
	set.Policies[0].Rules[3].Effect = policyv1.Effect_EFFECT_DENY
	before := heap()
	p := compile(t, set)
	if grown := heap() - before; grown > 8<<20 {
		t.Errorf("%d MiB are held for %d rules of %d callers and %d paths", grown>>20, rules, n, n)
	}
	for what, want := range map[string]bool{"/0/0": true, "/2/999": true, "/3/5": false, "/4/0": false} {
		if got := p.Decide(call(t, "/c/7", "/s", "GET "+what)).Allowed; got != want {
			t.Errorf("GET %s: allowed %t, want %t", what, got, want)
		}
	}
	if p.Decide(call(t, "/c/1000", "/s", "GET /0/0")).Allowed || p.Decide(call(t, "/c/7", "/s", "tls")).Allowed {
		t.Error("a caller that is not listed, or a connection, is allowed")
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// An enforcement point asks for the audiences at every request, before it knows whether there is a token.
func TestAudiencesDoNotGrowWithRules(t *testing.T) {
	var items []*policyv1.HTTPMatch
	for i := range 10_000 {
		items = append(items, &policyv1.HTTPMatch{Paths: []string{fmt.Sprintf("/%d", i)}})
	}
	set := hostile([]string{"spiffe://example.org/s"}, items...)
	for i, r := range set.Policies[0].Rules {
		r.Jwt = &policyv1.JWTMatch{Audience: []string{"y", []string{"x", "z"}[i%2]}, Subject: policyv1.SubjectBinding_SUBJECT_BINDING_PEER}
	}
	p := compile(t, set)
	service, peer := id(t, "/s"), id(t, "/a")
	got := p.Audiences(service, peer)
	if n := testing.AllocsPerRun(10, func() { p.Audiences(service, peer) }); n > 4 || fmt.Sprint(got) != "[x y z]" {
		t.Errorf("audiences %q with %v allocations", got, n)
	}
}

func TestAnEscapedAsteriskIsNoWildcard(t *testing.T) {
	set := hostile([]string{"spiffe://example.org/s"}, &policyv1.HTTPMatch{Methods: []string{"GET"}})
	set.Policies[0].Rules = append(set.Policies[0].Rules, &policyv1.Rule{
		Effect: policyv1.Effect_EFFECT_DENY, From: []string{"spiffe://example.org/**"}, Http: []*policyv1.HTTPMatch{{Paths: []string{"/f/%2A", "/g/*", "/h/%2A%2A"}}},
	})
	p := compile(t, set)
	for path, want := range map[string]bool{"/f/x": true, "/f/%2A": false, "/f/%2a": false, "/f/*": false, "/g/x": false, "/g/*": false, "/h/x/y": true, "/h/**": false} {
		if got := p.Decide(call(t, "/a", "/s", "GET "+path)).Allowed; got != want {
			t.Errorf("GET %s: allowed %t, want %t", path, got, want)
		}
	}
}

func TestAListOfContentTypesIsNeitherGRPCNorHTTPForAnAllow(t *testing.T) {
	p := compile(t, hostile([]string{"spiffe://example.org/s"}, &policyv1.HTTPMatch{Paths: []string{"/p.S/**"}}, &policyv1.HTTPMatch{Methods: []string{"POST"}, Paths: []string{"/named/**"}}))
	set := p.Set()
	set.Policies[0].Rules = []*policyv1.Rule{{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/**"}, Grpc: []string{"p.S/M"}}}
	asGRPC := compile(t, set)
	for _, tt := range []struct {
		types                 string // of several lines, with "|" between them
		byHTTP, named, byGRPC bool
	}{
		{"application/grpc", false, true, true},
		{"application/grpc+proto", false, true, true},
		{"application/grpc+proto, application/json", false, true, false},
		{"application/grpc+proto;x", false, true, false},
		{"application/json|application/grpc+proto,x", false, true, false},
		{"application/json", true, true, false},
	} {
		decide := func(p *Policies, path string) bool {
			r := call(t, "/a", "/s", "POST "+path)
			r.ContentTypes = strings.Split(tt.types, "|")
			return p.Decide(r).Allowed
		}
		if got := decide(p, "/p.S/M"); got != tt.byHTTP {
			t.Errorf("%q by http for any method: allowed %t, want %t", tt.types, got, tt.byHTTP)
		}
		if got := decide(p, "/named/x"); got != tt.named {
			t.Errorf("%q by http for POST: allowed %t, want %t", tt.types, got, tt.named)
		}
		if got := decide(asGRPC, "/p.S/M"); got != tt.byGRPC {
			t.Errorf("%q by grpc: allowed %t, want %t", tt.types, got, tt.byGRPC)
		}
	}
}
