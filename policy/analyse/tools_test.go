package analyse

import (
	"encoding/xml"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

func TestWhoCan(t *testing.T) {
	s := set(t, documents)
	known := knownIDs(t, "", "/api", "/web", "/writer", "/ops", "/evil", "/documents")
	for _, tt := range []struct{ call, want string }{
		{"GET /v1/documents/7", "spiffe://example.org/api allow, spiffe://example.org/ops allow, spiffe://partner.example/reports/** allow"},
		{"POST /v1/documents", "spiffe://example.org/ops allow, spiffe://example.org/writer conditional"},
		{"grpc documents.v1.Documents/Get", "spiffe://example.org/archiver allow, spiffe://example.org/ops allow"},
		{"tls", "spiffe://example.org/ops allow"},
		{"GET /v1/../x", ""},
	} {
		got, err := WhoCan(s, known, *call(t, "/x", "/documents", tt.call), false)
		var names []string
		for _, g := range got {
			names = append(names, g.Peer+" "+string(g.Verdict))
		}
		if err != nil || strings.Join(names, ", ") != tt.want {
			t.Errorf("%s: %v, %v; want %s", tt.call, names, err, tt.want)
		}
	}
	// Without a request: whoever might make some call, though none of them may make one of which only the caller is known.
	anyCall, err := WhoCan(s, known, *call(t, "/x", "/documents", "tls"), true)
	var anyone []string
	for _, g := range anyCall {
		anyone = append(anyone, strings.TrimPrefix(g.Peer, "spiffe://")+" "+string(g.Verdict))
	}
	if want := "example.org/api example.org/archiver example.org/ops example.org/writer partner.example/reports/**"; err != nil ||
		strings.ReplaceAll(strings.Join(anyone, " "), " conditional", "") != want {
		t.Errorf("who might call /documents at all: %v, %v", anyone, err)
	}
	got, err := WhomCan(s, known, *call(t, "/api", "/x", "tls"), true)
	if err != nil || len(got) != 1 || got[0].Service != "spiffe://example.org/documents" {
		t.Errorf("whom can /api call: %v %v", got, err)
	}
	if got, _ := WhomCan(s, known, *call(t, "/quarantine/x", "/x", "tls"), true); len(got) != 0 {
		t.Errorf("whom can /quarantine/x call: %v", got)
	}
	big, who := many(10_000)
	if got, err := WhoCan(big, who, *call(t, "/x", "/ns/7/sa/app7", "GET /v1/3/x"), false); err != nil || len(got) != 1 {
		t.Errorf("among 10,000: %v %v", got, err)
	}
}

func TestDiff(t *testing.T) {
	known := knownIDs(t, "", "/api", "/web", "/documents", "/other")
	before := set(t, documents)
	for _, tt := range []struct{ name, old, new, want string }{
		{"a method goes", "methods: [GET]", "methods: [PUT]", "spiffe://example.org/api -> spiffe://example.org/documents GET /v1/documents/*: allow -> deny (documents:5)"},
		{"a caller comes", "- from: [/ops]", "- from: [/ops, /web]", "spiffe://example.org/web -> spiffe://example.org/documents TLS: deny -> allow (documents:14)"},
		{"a condition comes", "    grpc: [documents.v1.Documents/Get]", "    grpc: [documents.v1.Documents/Get]\n    jwt: {audience: [x]}", "gRPC documents.v1.Documents/Get: allow -> conditional"},
		{"a condition changes", "audience: [documents]", "audience: [other]", "POST /v1/documents: conditional -> conditional, on something else"},
		{"a deny goes", "from: [/evil, /mallory]", "from: [/mallory]", ""},
		{"a deny comes", "from: [/evil, /mallory]", "from: [/evil, /mallory, /ops]", "spiffe://example.org/ops -> spiffe://example.org/documents TLS: allow -> deny"},
		{"nothing but lines", "kind: CallPolicy\n", "# moved\n\nkind: CallPolicy\n", ""},
	} {
		after := set(t, strings.Replace(documents, tt.old, tt.new, 1))
		got, complete, err := Diff(before, after, known)
		var texts []string
		for _, d := range got {
			texts = append(texts, d.String())
		}
		all := strings.Join(texts, "\n")
		if err != nil || !complete || tt.want == "" && all != "" || !strings.Contains(all, tt.want) {
			t.Errorf("%s: complete %t, %v\n%s\nwant %s", tt.name, complete, err, all, tt.want)
		}
	}
}

// TestDiffMissesNothing: what Diff calls the same is decided alike, whatever the call.
func TestDiffMissesNothing(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 3))
	known := knownIDs(t, "", "/a", "/b", "/ns/x/a", "/ns/y/a", "/s", "/s/x")
	same, differ := 0, 0
	for range 200 {
		a, b := randomSet(t, rnd), randomSet(t, rnd)
		if rnd.IntN(2) == 0 { // one rule apart
			b = Replaced(a, nil)
			p := b.Policies[rnd.IntN(len(b.Policies))]
			if n := len(p.Rules); n > 0 {
				c := unplaced(p)
				c.Rules = slices.Delete(c.Rules, n-1, n)
				b = Replaced(a, map[string]*policyv1.Policy{p.Name: c})
			}
		}
		found, complete, err := Diff(a, b, known)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) > 0 || !complete {
			differ++
			continue
		}
		same++
		pa, pb := compile(t, a), compile(t, b)
		for range 400 {
			r := randomCall(t, rnd)
			if rnd.IntN(3) == 0 {
				r.Token = &policy.Token{ID: r.Peer, Audience: []string{"aud"}}
			}
			if x, y := pa.Decide(r), pb.Decide(r); x.Allowed != y.Allowed {
				t.Fatalf("no difference, but %+v is %v and %v\n%v\n%v", r, x, y, a, b)
			}
		}
	}
	if same < 10 || differ < 50 {
		t.Errorf("%d alike and %d not", same, differ)
	}
}

func seenCall(from, to, method, path string, protocol policyv1.CallProtocol) *policyv1.Observation {
	return &policyv1.Observation{Peer: "spiffe://example.org" + from, Service: "spiffe://example.org" + to, Method: method, Path: path, Protocol: protocol, Allowed: true, Count: 2, Reason: "allowed"}
}

const (
	overHTTP = policyv1.CallProtocol_CALL_PROTOCOL_HTTP
	overGRPC = policyv1.CallProtocol_CALL_PROTOCOL_GRPC
	overTLS  = policyv1.CallProtocol_CALL_PROTOCOL_TLS
)

func TestReplay(t *testing.T) {
	p, err := NewReplay(set(t, documents))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		o    *policyv1.Observation
		want Verdict
		why  string
	}{
		{"still allowed", seenCall("/api", "/documents", "GET", "/v1/documents/7", overHTTP), VerdictAllow, ""},
		{"denied now", seenCall("/api", "/documents", "GET", "/v2", overHTTP), VerdictDeny, ""},
		{"gRPC", seenCall("/archiver", "/documents", "POST", "/documents.v1.Documents/Get", overGRPC), VerdictAllow, ""},
		{"a connection", seenCall("/ops", "/documents", "", "", overTLS), VerdictAllow, ""},
		{"a token", seenCall("/writer", "/documents", "POST", "/v1/documents", overHTTP), "", "a token, a header or a claim"},
		{"a path that was cut", seenCall("/api", "/documents", "GET", "/v1/documents/"+strings.Repeat("a", 300), overHTTP), "", "its path was cut"},
		{"an unknown protocol", seenCall("/api", "/documents", "GET", "/", 77), "", "its protocol 77"},
		{"no ID", &policyv1.Observation{Peer: "\x1b", Service: "x"}, "", "not a SPIFFE ID"},
		{"revoked", &policyv1.Observation{Peer: "spiffe://example.org/api", Service: "spiffe://example.org/documents", Reason: "revoked", Protocol: overTLS}, "", "not a policy"},
	} {
		if got := p.Decide(tt.o); got.After != tt.want || !strings.Contains(got.Why, tt.why) || (tt.why == "") != (got.Why == "") {
			t.Errorf("%s: %+v", tt.name, got)
		}
	}
}

// TestSuggestion: the suggested policies are sound documents, allow whatever was seen, and nothing that is not shown.
func TestSuggestion(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 4))
	pick := func(of ...string) string { return of[rnd.IntN(len(of))] }
	hostile := []string{"/a/../b", "/a/*", "/**", "/a//b", "/%2e%2e/x", "/x\n- from: [/evil]", "/\x1b[2J", "/a;b", "http://h/x", "*", "/" + strings.Repeat("x", 400)}
	for range 60 {
		s := NewSuggestion(exampleOrg)
		var seen []*policyv1.Observation
		for range 1 + rnd.IntN(120) {
			from, to := pick("/a", "/b", "/ns/x/sa/y"), pick("/s", "/t")
			var o *policyv1.Observation
			switch rnd.IntN(8) {
			case 0:
				o = seenCall(from, to, "POST", pick("/p.S/M", "/p.S/N", "/q.T/M"), overGRPC)
			case 1:
				bad := seenCall("/evil", to, pick("GET", "get\n", "X Y"), hostile[rnd.IntN(len(hostile))], overHTTP)
				s.Add(bad)
				continue
			case 2:
				o = seenCall(from, to, pick("GET", "NO", "POST"), fmt.Sprintf("/files/f%dx", rnd.IntN(80)), overHTTP)
			default:
				o = seenCall(from, to, pick("GET", "PUT", "POST"), pick("/", "/v1/", "/v1/items/17", "/v1/items/9/parts", "/v1/a%20b", "/v1/x:y,z", "/u/123e4567-e89b-12d3-a456-426614174000", "/true", "/v1/~yes"), overHTTP)
			}
			seen = append(seen, o)
			s.Add(o)
		}
		var b strings.Builder
		if err := s.Write(&b, ""); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(b.String(), "evil") || strings.ContainsAny(b.String(), "\x1b") {
			t.Fatalf("a hostile call is in\n%s", b.String())
		}
		if len(seen) == 0 {
			continue
		}
		p := compile(t, set(t, b.String()))
		for _, o := range seen {
			r, why := request(o)
			if why != "" || !p.Decide(r).Allowed {
				t.Fatalf("%v is %v by\n%s", o, p.Decide(r), b.String())
			}
		}
		for range 300 {
			from, to, method := pick("/a", "/b", "/c"), pick("/s", "/t"), pick("GET", "PUT", "POST", "NO", "HEAD")
			path := pick("/", "/v1", "/v1/", "/v1/items/abc", "/v1/items/17", "/files/f1x", "/files/other", "/v1/items/9/parts", "/v2", "/p.S/M")
			r := call(t, from, to, method+" "+path)
			if !p.Decide(r).Allowed {
				continue
			}
			if !slices.ContainsFunc(seen, func(o *policyv1.Observation) bool {
				shown := pathPattern(generalised(o.GetPath())).matchesPath(path, false) || strings.HasPrefix(path, "/files/") && strings.Contains(b.String(), "- /files/** # REVIEW: stands for")
				return o.GetPeer() == r.Peer.String() && o.GetService() == r.Service.String() && o.GetMethod() == method && shown
			}) {
				t.Fatalf("%+v was not seen, and is allowed by\n%s", r, b.String())
			}
		}
	}
}

func TestGraph(t *testing.T) {
	s := set(t, documents)
	known := knownIDs(t, "", "/api", "/web", "/documents", "/ops")
	seen := []*policyv1.Observation{seenCall("/api", "/documents", "GET", "/v1/documents/1", overHTTP), seenCall("/web", "/documents", "GET", "/x", overHTTP),
		seenCall("/w\"><script>\x1b", "/documents", "GET", "/x", overHTTP)}
	g, err := NewGraph(s, known, seen, "")
	if err != nil || !g.Complete {
		t.Fatal(err)
	}
	kinds := map[string]EdgeKind{}
	for _, e := range g.Edges {
		kinds[e.From+" "+e.To] = e.Kind
	}
	if kinds["/api /documents"] != EdgeBoth || kinds["/ops /documents"] != EdgeMay || kinds["/web /documents"] != EdgeDenied || len(kinds) != 6 {
		t.Errorf("%v", kinds)
	}
	svg := g.SVG()
	if svg != g.SVG() || strings.Contains(svg, "<script") || !strings.Contains(svg, "<title id=\"title\">") {
		t.Errorf("%s", svg)
	}
	for d := xml.NewDecoder(strings.NewReader(svg)); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
	}
	if dot := g.DOT(); !strings.Contains(dot, `"/api" -> "/documents" [color=black`) || !strings.Contains(dot, "color=red") {
		t.Errorf("%s", dot)
	}
	if m := g.Mermaid(); !strings.Contains(m, "-.->") || !strings.Contains(m, "stroke:red") {
		t.Errorf("%s", m)
	}
	big, who := many(10_000)
	if g, err = NewGraph(big, who, nil, ""); err != nil || len(g.Edges) > maxEdges || g.Grouped == 0 {
		t.Errorf("%d edges, grouped %d, %v", len(g.Edges), g.Grouped, err)
	}
	circle := &Graph{Edges: []Edge{{From: "/a", To: "/b", Kind: EdgeMay}, {From: "/b", To: "/a", Kind: EdgeMay}, {From: "/a", To: "/a", Kind: EdgeMay}}}
	if !strings.Contains(circle.SVG(), "</svg>") {
		t.Error("no drawing of a circle")
	}
}
