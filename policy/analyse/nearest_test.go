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
	"github.com/signet-id/signet/spiffe"
)

var exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")

func parse(docs string) (*policyv1.PolicySet, error) {
	list, err := strictyaml.Split([]byte(docs), "p.yaml", 1)
	if err != nil {
		return nil, err
	}
	return policy.Check(list, exampleOrg)
}

func set(t testing.TB, docs string) *policyv1.PolicySet {
	t.Helper()
	s, err := parse(docs)
	if err != nil {
		t.Fatalf("%v in\n%s", err, docs)
	}
	return s
}

func compile(t testing.TB, s *policyv1.PolicySet) *policy.Policies {
	t.Helper()
	p, err := policy.Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func id(t testing.TB, s string) spiffeid.ID {
	t.Helper()
	if strings.HasPrefix(s, "/") {
		s = "spiffe://example.org" + s
	}
	out, err := spiffe.ParseID(s)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// call is a request in one line: "tls", "grpc pkg.Service/Method" or "METHOD target [content-type...]".
func call(t testing.TB, from, to, what string) *policy.Request {
	t.Helper()
	r := &policy.Request{Peer: id(t, from), Service: id(t, to)}
	switch words := strings.Fields(what); words[0] {
	case "tls":
	case "grpc":
		r.Protocol, r.Method, r.Path, r.ContentTypes = policy.ProtocolHTTP, "POST", "/"+words[1], []string{"application/grpc"}
	default:
		r.Protocol, r.Method, r.Path, r.ContentTypes = policy.ProtocolHTTP, words[0], words[1], words[2:]
	}
	return r
}

const documents = `kind: CallPolicy
name: documents
service: /documents
allow:
  - from: [/api, "spiffe://partner.example/reports/**"]
    http:
      - methods: [GET]
        paths: [/v1/documents/**]
  - from: [/archiver]
    grpc: [documents.v1.Documents/Get]
  - from: [/writer]
    http: [{methods: [POST], paths: [/v1/documents]}]
    jwt: {audience: [documents]}
  - from: [/ops]
deny:
  - from: [/quarantine/**]
  - from: [/evil, /mallory]
`

func TestNearest(t *testing.T) {
	p := compile(t, set(t, documents))
	for _, tt := range []struct{ name, from, to, call, want string }{
		{"a caller", "/web", "/documents", "GET /v1/documents/7", "p.yaml:5: documents allow: add \"/web\" to from\n" +
			"    - - from: [/api, \"spiffe://partner.example/reports/**\"]\n    + - from: [/api, \"spiffe://partner.example/reports/**\", /web]\n" +
			"        http:\n"},
		{"or a rule of its own", "/web", "/documents", "GET /v1/documents/7", "or:\n  p.yaml:1: documents allow: add this rule to allow of policy \"documents\"\n    + - from: [/web]\n    +   http:\n    +     - methods: [GET]\n    +       paths: [/v1/documents/7]\n"},
		{"a method", "/api", "/documents", "PUT /v1/documents/7", `add "PUT" to methods of http item 1`},
		{"a path", "/api", "/documents", "GET /v2/x", `add "/v2/x" to paths of http item 1`},
		{"both", "/api", "/documents", "PUT /v2/x", `add {methods: [PUT], paths: [/v2/x]} to http`},
		{"a gRPC method", "/archiver", "/documents", "grpc documents.v1.Documents/Put", `add "documents.v1.Documents/Put" to grpc`},
		{"a token", "/writer", "/documents", "POST /v1/documents", "and the caller presents a valid JWT-SVID of its own for the audience \"documents\""},
		{"a connection", "/web", "/documents", "tls", `p.yaml:14: documents allow: add "/web" to from`},
		{"a deny, and a caller", "/evil", "/documents", "GET /v1/documents/7", "p.yaml:17: documents deny: remove \"/evil\" from its from\n    - - from: [/evil, /mallory]\n    + - from: [/mallory]\n  p.yaml:5:"},
		{"a deny by pattern", "/quarantine/x", "/documents", "tls", `remove this deny, or write its from so that "/quarantine/**" does not cover "/quarantine/x"`},
		{"no policy", "/web", "/other/service", "grpc a.B/C", "add this document\n    + kind: CallPolicy\n    + name: other-service\n    + service: /other/service\n    + allow:\n    +   - from: [/web]\n    +     grpc: [a.B/C]\n"},
		{"a path trick", "/api", "/documents", "GET /v1/documents/../x", "smallest change: none: the path is refused whatever the rules say"},
		{"another trust domain", "/api", "spiffe://partner.example/x", "tls", "none: the service is not of the trust domain"},
		{"allowed", "/ops", "/documents", "tls", "none: the call is allowed"},
	} {
		if got := Nearest(p, call(t, tt.from, tt.to, tt.call)).String(); !strings.Contains(got, tt.want) {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, got, tt.want)
		}
	}
	if got := Nearest(nil, call(t, "/a", "/b", "tls")); got.Why == "" || len(got.Changes) > 0 {
		t.Errorf("nil policies: %+v", got)
	}
}

// randomSet makes policies of few names, so that rules meet.
func randomSet(t testing.TB, rnd *rand.Rand) *policyv1.PolicySet {
	pick := func(of ...string) string { return of[rnd.IntN(len(of))] }
	some := func(of ...string) string {
		out := []string{pick(of...)}
		for rnd.IntN(2) == 0 {
			if s := pick(of...); !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
		return "[" + strings.Join(out, ", ") + "]"
	}
	rule := func(deny bool) string {
		s := fmt.Sprintf("  - from: %s\n", some("/a", "/b", "/ns/x/a", "/ns/*/a", "/ns/**", "/**", "/spire/x", "spiffe://partner.example/*"))
		switch rnd.IntN(4) {
		case 0:
		case 1:
			s += fmt.Sprintf("    grpc: %s\n", some("p.S/M", "p.S/*", "p.S/N"))
		default:
			s += fmt.Sprintf("    http: [{methods: %s, paths: %s}]\n", some("GET", "POST", "PUT"), some("/v1", "/v1/*", "/v1/**", "/v1/x/", `"/v1/a%20b"`, "/p.S/M"))
		}
		if rnd.IntN(6) == 0 && !deny {
			s += "    jwt: {audience: [aud]}\n"
		}
		if rnd.IntN(8) == 0 {
			s += "    shadow: true\n"
		}
		return s
	}
	var docs []string
	for i := range 1 + rnd.IntN(3) {
		d := fmt.Sprintf("kind: CallPolicy\nname: p%d\nservice: %s\nmode: %s\n", i, some("/s", "/s/*", "/**"), pick("enforce", "enforce", "enforce", "shadow"))
		if n := rnd.IntN(4); n > 0 {
			d += "allow:\n"
			for range n {
				d += rule(false)
			}
		}
		if n := rnd.IntN(3); n > 0 {
			d += "deny:\n"
			for range n {
				d += rule(true)
			}
		}
		docs = append(docs, d)
	}
	return set(t, strings.Join(docs, "---\n"))
}

func randomCall(t testing.TB, rnd *rand.Rand) *policy.Request {
	pick := func(of ...string) string { return of[rnd.IntN(len(of))] }
	from := pick("/a", "/b", "/c", "/ns/x/a", "/ns/y/a", "/ns/y/b/c", "/ns", "/spire/x", "spiffe://partner.example/a")
	to := pick("/s", "/s/x", "/other")
	switch rnd.IntN(4) {
	case 0:
		return call(t, from, to, "tls")
	case 1:
		return call(t, from, to, "grpc "+pick("p.S/M", "p.S/N", "p.T/M"))
	}
	return call(t, from, to, pick("GET", "POST", "PUT", "HEAD")+" "+pick("/v1", "/v1/", "/v1/y", "/v1/x/", "/v1/x/y", "/v1/a%20b", "/p.S/M", "/v1/*", "/v2?q"))
}

// TestNearestIsReadyToUse writes each change into the documents, as an operator would, and asks again.
func TestNearestIsReadyToUse(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	changes := 0
	for range 1200 {
		s := randomSet(t, rnd)
		p := compile(t, s)
		r := randomCall(t, rnd)
		m := Nearest(p, r)
		if p.Decide(r).Allowed != (m.Why == "the call is allowed") || m.Why == "" && len(m.Changes) == 0 {
			t.Fatalf("%+v of an allowed=%t call", m, p.Decide(r).Allowed)
		}
		for _, c := range m.Changes {
			changes++
			after := applied(t, s, c)
			asked := *r
			if c.Present != "" {
				asked.Token = &policy.Token{ID: r.Peer, Audience: []string{"aud"}}
			}
			if d := compile(t, after).Decide(&asked); !d.Allowed {
				t.Fatalf("still %v after\n%s\nof %+v\nin %v", d, m, r, s)
			}
		}
	}
	if changes < 400 {
		t.Errorf("only %d changes were tried", changes)
	}
}

func applied(t *testing.T, s *policyv1.PolicySet, c Change) *policyv1.PolicySet {
	t.Helper()
	s = proto.CloneOf(s)
	type removal struct{ policy, rule int }
	var gone []removal
	for _, step := range c.Steps {
		if step.Rule.Policy == "" {
			s.Policies = append(s.Policies, set(t, step.After).Policies...)
			continue
		}
		i := slices.IndexFunc(s.Policies, func(p *policyv1.Policy) bool { return p.Name == step.Rule.Policy })
		pol := s.Policies[i]
		if step.After == "" {
			gone = append(gone, removal{i, step.Rule.Index})
			continue
		}
		section := map[string]string{"allow": "allow", "deny": "deny"}[step.Effect]
		rule := set(t, "kind: CallPolicy\nname: x\nservice: /x\n"+section+":\n"+indent(step.After, "  ")).Policies[0].Rules[0]
		if step.Rule.Index < 0 {
			pol.Rules = append(pol.Rules, rule)
		} else {
			pol.Rules[step.Rule.Index] = rule
		}
		if slices.ContainsFunc(step.Edits, func(e string) bool { return strings.HasPrefix(e, "set mode") }) {
			pol.Mode = policyv1.Mode_MODE_ENFORCE
		}
	}
	slices.SortFunc(gone, func(a, b removal) int { return b.rule - a.rule })
	for _, g := range gone {
		s.Policies[g.policy].Rules = slices.Delete(s.Policies[g.policy].Rules, g.rule, g.rule+1)
	}
	return s
}

func TestNearestNeverMovesTheCursor(t *testing.T) {
	s := set(t, documents)
	s.Policies[0].File = "a\x1b[2J\nb"
	r := call(t, "/api", "/documents", "tls")
	r.Protocol, r.Method, r.Path = policy.ProtocolHTTP, "GET\x1b[1A\n", "/v1/documents/7"
	if got := Nearest(compile(t, s), r).String(); strings.ContainsAny(got, "\x1b\x07\r") {
		t.Errorf("control bytes in %q", got)
	}
}

func TestNearestAmongManyRules(t *testing.T) {
	s := set(t, documents)
	for i := range 100_000 {
		s.Policies[0].Rules = append(s.Policies[0].Rules, &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{fmt.Sprintf("spiffe://example.org/w/%d", i)},
			Http: []*policyv1.HTTPMatch{{Methods: []string{"GET"}, Paths: []string{fmt.Sprintf("/r/%d/**", i)}}}, Requires: []string{"http"}})
	}
	got := Nearest(compile(t, s), call(t, "/w/77777", "/documents", "PUT /r/77777/x"))
	if len(got.Changes) == 0 || !strings.Contains(got.Changes[0].Steps[0].Edits[0], `add "PUT" to methods`) {
		t.Errorf("%s", got)
	}
}
