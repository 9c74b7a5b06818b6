package analyse

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
)

func knownIDs(t testing.TB, foreign string, ids ...string) *Known {
	t.Helper()
	var list []spiffeid.ID
	for _, s := range ids {
		list = append(list, id(t, s))
	}
	var tds []spiffeid.TrustDomain
	if foreign != "" {
		tds = append(tds, spiffeid.RequireTrustDomainFromString(foreign))
	}
	return NewKnown(exampleOrg, slices.Values(list), tds)
}

func lint(t testing.TB, docs string, known *Known) []string {
	t.Helper()
	list, err := strictyaml.Split([]byte(docs), "p.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	l := Lint{Set: set(t, docs), Documents: map[string]*strictyaml.Document{}, Known: known, Ungoverned: true}
	for i := range list {
		name, _, _, _ := list[i].Field("name")
		l.Documents[name] = &list[i]
	}
	found, _ := l.Findings()
	var out []string
	for _, f := range found {
		out = append(out, f.Check+" "+f.String())
	}
	return out
}

func TestLint(t *testing.T) {
	known := knownIDs(t, "partner.example", "/documents", "/web", "/ns/a/sa/web", "/orphan")
	const head = "kind: CallPolicy\nname: p\nservice: [/documents, /web, /ns/**, /orphan]\n"
	for _, tt := range []struct{ name, docs, want string }{
		{"a caller that nobody is", head + "allow:\n  - from: [/web, /wbe]\n", `unknown_caller p.yaml:5:18: no Identity and no entry issues "/wbe", so nobody can call by it`},
		{"a pattern for nobody", head + "allow:\n  - from: [/ns/*/job/*]\n", `unknown_caller p.yaml:5:12: no Identity and no entry issues "/ns/*/job/*"`},
		{"a deny of nobody", head + "allow:\n  - from: [/web]\ndeny:\n  - from: [/gone]\n", `unknown_caller p.yaml:7:12: note: no Identity and no entry issues "/gone" today`},
		{"a service that nobody is", "kind: CallPolicy\nname: p\nservice: /docs\nallow:\n  - from: [/web]\n", `unknown_service p.yaml:3:10: no Identity and no entry issues "/docs", which this policy is for`},
		{"a stranger", head + "allow:\n  - from: [\"spiffe://elsewhere.example/x\"]\n", `not_federated p.yaml:5:12: there is no bundle of the trust domain "elsewhere.example"`},
		{"everybody", head + "allow:\n  - from: [/**]\n", `broad_callers p.yaml:5:12: "/**" is every workload of the trust domain`},
		{"every partner", head + "allow:\n  - from: [\"spiffe://partner.example/**\"]\n", `broad_callers p.yaml:5:12: "spiffe://partner.example/**" is every workload of another trust domain`},
		{"a wildcard first", head + "allow:\n  - from: [/*/a/sa/web]\n", `broad_callers p.yaml:5:12: "/*/a/sa/web" has a wildcard in its first segment`},
		{"every service", "kind: CallPolicy\nname: p\nservice: /**\nallow:\n  - from: [/web]\n", `broad_service p.yaml:3:10: service "/**" is any workload`},
		{"any protocol beside HTTP", head + "allow:\n  - from: [/web]\n  - from: [/ns/a/sa/web]\n    http: [{methods: [GET]}]\n", `any_protocol p.yaml:5:11: this allow covers every request`},
		{"any request", head + "allow:\n  - from: [/web]\n    http: [{paths: [/**]}]\n", `broad_requests p.yaml:6:21: "/**" with any method is every request`},
		{"a caller twice", head + "allow:\n  - from: [/web, /web]\n", `repeated p.yaml:5:18: "/web" stands twice`},
		{"under a deny", head + "allow:\n  - from: [/ns/a/sa/web]\n    http: [{methods: [GET]}]\ndeny:\n  - from: [/ns/**]\n", `shadowed p.yaml:5:5: this allow has no effect: deny p:8 covers all of it`},
		{"twice", head + "allow:\n  - from: [/web]\n    http: [{methods: [GET]}]\n  - from: [/web]\n    http: [{methods: [GET]}]\n", `duplicate p.yaml:7:5: this rule is the same as p:5`},
		{"covered", head + "allow:\n  - from: [/ns/a/sa/web]\n    http: [{methods: [GET], paths: [/a/b]}]\n  - from: [/ns/*/sa/*]\n    http: [{methods: [GET, PUT], paths: [/a/**]}]\n", `subsumed p.yaml:5:5: this rule adds nothing: p:7 covers all of it`},
		{"covered by another policy", head + "allow:\n  - from: [/web]\n    grpc: [p.S/M]\n---\nkind: CallPolicy\nname: q\nservice: /**\nallow:\n  - from: [/web]\n    grpc: [p.S/*]\n", `subsumed p.yaml:5:5: this rule adds nothing: q:12 covers all of it`},
		{"no policy", "kind: CallPolicy\nname: p\nservice: /documents\nallow:\n  - from: [/web]\n", `no_policy note: no enforced CallPolicy names "/ns/a/sa/web", "/orphan", "/web"; if these are services, nobody may call them`},
	} {
		got := lint(t, tt.docs, known)
		if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, tt.want) }) {
			t.Errorf("%s: %q\nwant %q", tt.name, got, tt.want)
		}
	}
	const sound = head + "allow:\n  - from: [/web, \"spiffe://partner.example/reports/*\"]\n    http: [{methods: [GET], paths: [/a/**]}]\n  - from: [/ns/a/sa/web]\n    grpc: [p.S/M]\ndeny:\n  - from: [/ns/a/**]\n    http: [{methods: [DELETE]}]\n"
	if got := lint(t, sound, known); len(got) > 0 {
		t.Errorf("of a policy that is well: %q", got)
	}
}

// TestLintOverlapsAreTrue removes each rule that is said to be superfluous: no decision may change by that.
func TestLintOverlapsAreTrue(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	checked := map[string]int{}
	for range 600 {
		s := randomSet(t, rnd)
		l := Lint{Set: s}
		found, _ := l.Findings()
		for _, f := range found {
			if f.Check != "shadowed" && f.Check != "duplicate" && f.Check != "subsumed" {
				continue
			}
			checked[f.Check]++
			without := proto.CloneOf(s)
			for _, pol := range without.Policies {
				if pol.Name == f.Policy {
					pol.Rules = slices.DeleteFunc(pol.Rules, func(r *policyv1.Rule) bool { return int(r.Line) == f.Line })
				}
			}
			a, b := compile(t, s), compile(t, without)
			for range 200 {
				r := randomCall(t, rnd)
				if rnd.IntN(4) == 0 {
					r.Token = &policy.Token{ID: r.Peer, Audience: []string{"aud"}}
				}
				r.HasMethodOverride = rnd.IntN(4) == 0
				if rnd.IntN(5) == 0 {
					r.ContentTypes = []string{"application/grpc;x"}
				}
				if a.Decide(r).Allowed != b.Decide(r).Allowed {
					t.Fatalf("%s, but %+v is %v with and %v without it in %v", f, r, a.Decide(r), b.Decide(r), s)
				}
			}
		}
	}
	if checked["shadowed"] < 20 || checked["subsumed"] < 20 {
		t.Errorf("only %v were checked", checked)
	}
}

func TestCovers(t *testing.T) {
	for _, tt := range []struct {
		p, q string
		wide bool
		want bool
	}{
		{"/a/**", "/a/b", false, true},
		{"/a/**", "/a", false, false},
		{"/a/**", "/a", true, true},
		{"/a/**", "/a/", false, false},
		{"/a/**", "/a/", true, true},
		{"/a/**", "/a/b/", false, true},
		{"/a/**", "/a/**", false, true},
		{"/a/*", "/a/**", false, false},
		{"/a/**", "/a/*/c", false, true},
		{"/a/*", "/a/", false, false},
		{"/a/*/**", "/a/**", false, false},
		{"/a%20b", "/a%20b", true, true},
		{"/*", "/%2A", true, true},
		{"/x", "/*", true, false},
	} {
		if got := pathPattern(tt.p).covers(pathPattern(tt.q), tt.wide); got != tt.want {
			t.Errorf("%q covers %q (wide %t) = %t", tt.p, tt.q, tt.wide, got)
		}
	}
	for _, tt := range []struct {
		p, id string
		wide  bool
		want  bool
	}{
		{"spiffe://example.org/**", "/spire/agent/x", false, false},
		{"spiffe://example.org/**", "/spire/agent/x", true, true},
		{"spiffe://example.org/spire/**", "/spire/agent/x", false, true},
		{"spiffe://partner.example/**", "/x", false, false},
	} {
		p, _ := idPattern(tt.p)
		if got := p.matchesID(id(t, tt.id), tt.wide); got != tt.want {
			t.Errorf("%q matches %q (wide %t) = %t", tt.p, tt.id, tt.wide, got)
		}
		k := knownIDs(t, "", tt.id)
		if got := k.any(p, tt.wide); got != tt.want {
			t.Errorf("%q finds %q (wide %t) = %t", tt.p, tt.id, tt.wide, got)
		}
	}
}

// many makes a set of n policies of ten rules each, about n services among as many callers.
func many(n int) (*policyv1.PolicySet, *Known) {
	s := &policyv1.PolicySet{Format: policy.Format, TrustDomain: "example.org", Defaults: policyv1.DefaultsMode_DEFAULTS_MODE_DENY}
	var ids []spiffeid.ID
	for i := range n {
		ids = append(ids, spiffeid.RequireFromPathf(exampleOrg, "/ns/%d/sa/app%d", i%100, i))
		pol := &policyv1.Policy{Name: fmt.Sprintf("p%d", i), Mode: policyv1.Mode_MODE_ENFORCE, Services: []string{ids[i].String()}, Line: 1}
		for j := range 10 {
			c := (i*7 + j*13) % n
			pol.Rules = append(pol.Rules, &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{fmt.Sprintf("spiffe://example.org/ns/%d/sa/app%d", c%100, c)},
				Http: []*policyv1.HTTPMatch{{Methods: []string{"GET"}, Paths: []string{fmt.Sprintf("/v1/%d/*", j)}}}, Requires: []string{"http"}, Line: uint32(j + 2)})
		}
		s.Policies = append(s.Policies, pol)
	}
	return s, NewKnown(exampleOrg, slices.Values(ids), nil)
}

func TestLintOfManyRules(t *testing.T) {
	s, known := many(10_000)
	l := Lint{Set: s, Known: known, Ungoverned: true}
	if found, omitted := l.Findings(); len(found) > 0 || omitted > 0 {
		t.Errorf("%v", found[0])
	}
	// One service with 100,000 rules of one caller, all alike: the work is bounded, and the answer says so.
	bad := &policyv1.Policy{Name: "bad", Mode: policyv1.Mode_MODE_ENFORCE, Services: []string{"spiffe://example.org/x"}}
	for i := range 100_000 {
		bad.Rules = append(bad.Rules, &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/web"}, Line: uint32(i),
			Http: []*policyv1.HTTPMatch{{Methods: []string{"GET"}, Paths: []string{fmt.Sprintf("/%d", i)}}}, Requires: []string{"http"}})
	}
	l = Lint{Set: &policyv1.PolicySet{Format: 1, TrustDomain: "example.org", Policies: []*policyv1.Policy{bad}}}
	found, omitted := l.Findings()
	if len(found)+omitted == 0 || found[len(found)-1].Check != "not_compared" {
		t.Errorf("%d findings, the last %v", len(found), found)
	}
}

func TestLintEscapes(t *testing.T) {
	s := set(t, "kind: CallPolicy\nname: p\nservice: /a\nallow:\n  - from: [/**]\n")
	s.Policies[0].File = "x\x1b[2J\ny"
	found, _ := (&Lint{Set: s, Known: knownIDs(t, "")}).Findings()
	for _, f := range found {
		if strings.ContainsAny(f.String(), "\x1b\n") {
			t.Errorf("%q", f.String())
		}
	}
	if len(found) == 0 {
		t.Error("nothing found")
	}
}
