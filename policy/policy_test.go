package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

var exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")

// set reads documents that must be sound.
func set(t testing.TB, docs string) *policyv1.PolicySet {
	t.Helper()
	list, err := strictyaml.Split([]byte(docs), "p.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Check(list, exampleOrg)
	if err != nil {
		t.Fatal(err)
	}
	s.Epoch, s.Revision = "e", 7
	return s
}

func compile(t testing.TB, s *policyv1.PolicySet) *Policies {
	t.Helper()
	p, err := Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// id makes a relative ID full.
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
func call(t testing.TB, from, to, what string) *Request {
	t.Helper()
	r := &Request{Peer: id(t, from), Service: id(t, to)}
	words := strings.Fields(what)
	switch {
	case what == "tls":
	case words[0] == "grpc":
		r.Protocol, r.Method, r.Path, r.ContentTypes = ProtocolHTTP, "POST", "/"+words[1], []string{"application/grpc"}
	default:
		r.Protocol, r.Method, r.Path, r.ContentTypes = ProtocolHTTP, words[0], words[1], words[2:]
	}
	return r
}

// The document of the design.
const documents = `kind: CallPolicy
name: documents
service: /documents-service
mode: enforce
allow:
  - from: [/trusty-service, "spiffe://partner.example/reports/**"]
    http: [{methods: [GET], paths: [/v1/documents/**]}]
  - from: [/ns/*/sa/archiver]
    grpc: [documents.v1.Documents/*]
deny:
  - from: [/quarantine/**]
---
kind: PolicyDefaults
mode: deny
`

func TestDecide(t *testing.T) {
	const (
		tree = `{kind: CallPolicy, name: tree, service: /s, allow: [{from: [/a], http: [{paths: [/tree/**, /items/, /one/*, /x/*/z, /]}]}]}`
		deny = `{kind: CallPolicy, name: deny, service: /s, allow: [{from: [/**]}], deny: [{from: [/a/**, /b], http: [{methods: [DELETE], paths: [/tree/**, "/caf%C3%A9/", /one/*]}, {methods: [PURGE]}]}, {from: [/g], grpc: [p.S/*, q.S/M]}]}`
		wide = `{kind: CallPolicy, name: wide, service: /s, allow: [{from: [/**, "spiffe://b.example/*/x"]}]}`
	)
	for _, tt := range []struct {
		name           string
		docs           string
		from, to, call string
		want           Reason
		line           uint32
	}{
		{"an allow", documents, "/trusty-service", "/documents-service", "GET /v1/documents/7", ReasonAllowed, 6},
		{"an allow for a partner", documents, "spiffe://partner.example/reports/a/b", "/documents-service", "GET /v1/documents/7?q=1", ReasonAllowed, 6},
		{"ID_20 IDs are case-sensitive", documents, "/Trusty-service", "/documents-service", "GET /v1/documents/7", ReasonNoAllow, 0},
		{"no other method", documents, "/trusty-service", "/documents-service", "POST /v1/documents/7", ReasonNoAllow, 0},
		{"HEAD is not implied by GET", documents, "/trusty-service", "/documents-service", "HEAD /v1/documents/7", ReasonNoAllow, 0},
		{"methods are case-sensitive", documents, "/trusty-service", "/documents-service", "get /v1/documents/7", ReasonNoAllow, 0},
		{"paths are case-sensitive", documents, "/trusty-service", "/documents-service", "GET /V1/documents/7", ReasonNoAllow, 0},
		{"no connection for a rule with http", documents, "/trusty-service", "/documents-service", "tls", ReasonNoAllow, 0},
		{"gRPC", documents, "/ns/prod/sa/archiver", "/documents-service", "grpc documents.v1.Documents/Get", ReasonAllowed, 8},
		{"gRPC, another service", documents, "/ns/prod/sa/archiver", "/documents-service", "grpc documents.v1.DocumentsX/Get", ReasonNoAllow, 0},
		{"ID_22 a star is one whole segment", documents, "/ns/prod/x/sa/archiver", "/documents-service", "grpc documents.v1.Documents/Get", ReasonNoAllow, 0},
		{"another service", documents, "/trusty-service", "/other", "GET /v1/documents/7", ReasonNoPolicy, 0},
		{"a foreign service", documents, "/trusty-service", "spiffe://partner.example/documents-service", "GET /v1/documents/7", ReasonForeignService, 0},
		{"a peer without a path", documents, "spiffe://example.org", "/documents-service", "tls", ReasonInvalidPeer, 0},
		{"deny covers the tree", documents, "/quarantine/x", "/documents-service", "tls", ReasonDenied, 11},
		{"deny covers the root of the tree", documents, "/quarantine", "/documents-service", "GET /", ReasonDenied, 11},

		{"** in an allow", tree, "/a", "/s", "GET /tree/a", ReasonAllowed, 1},
		{"** covers a trailing slash behind a segment", tree, "/a", "/s", "GET /tree/a/", ReasonAllowed, 1},
		{"** does not cover the root", tree, "/a", "/s", "GET /tree", ReasonNoAllow, 0},
		{"** does not cover the root with a slash", tree, "/a", "/s", "GET /tree/", ReasonNoAllow, 0},
		{"a trailing slash is literal", tree, "/a", "/s", "GET /items/", ReasonAllowed, 1},
		{"without it no match", tree, "/a", "/s", "GET /items", ReasonNoAllow, 0},
		{"nor with more behind it", tree, "/a", "/s", "GET /items/x", ReasonNoAllow, 0},
		{"* is one segment", tree, "/a", "/s", "GET /one/x", ReasonAllowed, 1},
		{"* is not empty", tree, "/a", "/s", "GET /one/", ReasonNoAllow, 0},
		{"* has no trailing slash", tree, "/a", "/s", "GET /one/x/", ReasonNoAllow, 0},
		{"* in the middle", tree, "/a", "/s", "GET /x/y/z", ReasonAllowed, 1},
		{"the root", tree, "/a", "/s", "GET /", ReasonAllowed, 1},
		{"OPTIONS * needs a rule without paths", tree, "/a", "/s", "OPTIONS *", ReasonNoAllow, 0},
		{"* is for OPTIONS", wide, "/a", "/s", "GET *", ReasonPath, 0},
		{"OPTIONS *", wide, "/a", "/s", "OPTIONS *", ReasonAllowed, 1},

		{"a deny by method and path", deny, "/b", "/s", "DELETE /tree/x", ReasonDenied, 1},
		{"a deny covers the root of its tree", deny, "/b", "/s", "DELETE /tree", ReasonDenied, 1},
		{"with a slash as well", deny, "/b", "/s", "DELETE /tree/", ReasonDenied, 1},
		{"a deny compares decoded", deny, "/b", "/s", "DELETE /caf%c3%a9", ReasonDenied, 1},
		{"a deny ignores a trailing slash", deny, "/b", "/s", "DELETE /one/x/", ReasonDenied, 1},
		{"another method passes", deny, "/b", "/s", "GET /tree/x", ReasonAllowed, 1},
		{"another caller passes", deny, "/c", "/s", "DELETE /tree/x", ReasonAllowed, 1},
		{"an item without paths", deny, "/a/x", "/s", "PURGE /any", ReasonDenied, 1},
		{"an item without paths and OPTIONS-like target", deny, "/a", "/s", "PURGE /", ReasonDenied, 1},
		{"a connection under any deny", deny, "/b", "/s", "tls", ReasonDenied, 1},
		{"a connection otherwise", deny, "/c", "/s", "tls", ReasonAllowed, 1},
		{"a gRPC deny judges every POST", deny, "/g", "/s", "POST /p.S/M application/json", ReasonDenied, 1},
		{"also without a content type", deny, "/g", "/s", "POST /q.S/M", ReasonDenied, 1},
		{"also with a slash behind", deny, "/g", "/s", "POST /q.S/M/", ReasonDenied, 1},
		{"no other method of the service", deny, "/g", "/s", "POST /q.S/N", ReasonAllowed, 1},
		{"no GET", deny, "/g", "/s", "GET /q.S/M", ReasonAllowed, 1},

		{"no wildcard covers /spire", wide, "/spire/agent/x", "/s", "tls", ReasonNoAllow, 0},
		{"of any trust domain", wide, "spiffe://b.example/spire/x", "/s", "tls", ReasonNoAllow, 0},
		{"a foreign pattern", wide, "spiffe://b.example/a/x", "/s", "tls", ReasonAllowed, 1},
		{"of its own trust domain only", wide, "spiffe://c.example/a/x", "/s", "tls", ReasonNoAllow, 0},
		{"a literal /spire is covered", `{kind: CallPolicy, name: x, service: /s, allow: [{from: [/spire/*]}]}`, "/spire/a", "/s", "tls", ReasonAllowed, 1},
		{"a deny covers /spire", `{kind: CallPolicy, name: x, service: /s, allow: [{from: [/spire/a]}], deny: [{from: [/**]}]}`, "/spire/a", "/s", "tls", ReasonDenied, 1},

		{"service patterns", `{kind: CallPolicy, name: x, service: [/ns/*/api, /t/**], allow: [{from: [/a]}]}`, "/a", "/ns/b/api", "tls", ReasonAllowed, 1},
		{"service trees", `{kind: CallPolicy, name: x, service: [/ns/*/api, /t/**], allow: [{from: [/a]}]}`, "/a", "/t/x/y", "tls", ReasonAllowed, 1},
		{"service patterns are read narrow", `{kind: CallPolicy, name: x, service: [/ns/*/api, /t/**], allow: [{from: [/a]}]}`, "/a", "/t", "tls", ReasonNoPolicy, 0},
		{"no service pattern covers /spire", `{kind: CallPolicy, name: x, service: /**, allow: [{from: [/a]}]}`, "/a", "/spire/server", "tls", ReasonNoPolicy, 0},
		{"policies of a service are united", "{kind: CallPolicy, name: x, service: /s, allow: [{from: [/a]}]}\n---\n{kind: CallPolicy, name: y, service: /**, deny: [{from: [/a]}]}", "/a", "/s", "tls", ReasonDenied, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, r := compile(t, set(t, tt.docs)), call(t, tt.from, tt.to, tt.call)
			d := p.Decide(r)
			if d.Reason != tt.want || d.Rule.Line != tt.line || d.Allowed != (tt.want == ReasonAllowed) || d.Revision != 7 {
				t.Errorf("%s → %s %s: %+v; want %v by line %d\n%s", tt.from, tt.to, tt.call, d, tt.want, tt.line, p.Explain(r))
			}
		})
	}
}

func TestDecideGRPCByContentType(t *testing.T) {
	p := compile(t, set(t, `
kind: CallPolicy
name: x
service: /s
allow:
  - from: [/g]
    grpc: [p.S/M]
  - from: [/any]
    http: [{paths: [/p.S/M]}]
  - from: [/post]
    http: [{methods: [POST], paths: [/p.S/M]}]
`))
	for _, tt := range []struct {
		method, path string
		contentTypes []string
		grpc, any    bool // whether an allow with grpc, with http for any method covers it
	}{
		{"POST", "/p.S/M", []string{"application/grpc"}, true, false},
		{"POST", "/p.S/M", []string{"application/grpc+proto"}, true, false},
		{"POST", "/p.S/M", []string{"application/grpc+"}, false, true},
		{"POST", "/p.S/M", []string{"application/grpc;charset=utf-8"}, false, false},
		{"POST", "/p.S/M", []string{"application/grpc-web"}, false, true},
		{"POST", "/p.S/M", []string{"Application/grpc"}, false, true},
		{"POST", "/p.S/M", []string{"application/json"}, false, true},
		{"POST", "/p.S/M", []string{"application/grpc", "application/grpc"}, false, false},
		{"POST", "/p.S/M", nil, false, true},
		{"GET", "/p.S/M", []string{"application/grpc"}, false, true},
		{"POST", "/p.S/M?x", []string{"application/grpc"}, false, false},
		{"POST", "p.S/M", []string{"application/grpc"}, false, false},
		{"POST", "/p.S/M/", []string{"application/grpc"}, false, false},
		{"POST", "/p.S/m", []string{"application/grpc"}, false, false},
	} {
		for from, want := range map[string]bool{"/g": tt.grpc, "/any": tt.any, "/post": tt.method == "POST" && (tt.grpc || tt.any || strings.HasPrefix(tt.path, "/p.S/M") && !strings.HasSuffix(tt.path, "/"))} {
			r := &Request{Service: id(t, "/s"), Peer: id(t, from), Protocol: ProtocolHTTP, Method: tt.method, Path: tt.path, ContentTypes: tt.contentTypes}
			if d := p.Decide(r); d.Allowed != want {
				t.Errorf("%s %s %q from %s: allowed %t, want %t\n%s", tt.method, tt.path, tt.contentTypes, from, d.Allowed, want, p.Explain(r))
			}
		}
	}
}

func TestDecideRefusesPathsWhateverTheRulesSay(t *testing.T) {
	p := compile(t, set(t, `{kind: CallPolicy, name: x, service: /s, allow: [{from: [/a]}]}`))
	refused := []string{
		"", "a", "*", "*?x", "http://h/a", "h:443", "//a", "/a//b", "/a//", "/.", "/..", "/a/./b", "/a/../b", "/a/..", "/./", "?a",
		"/a;b", "/a\\b", "/a b", "/a\x00", "/a\x1f", "/a\x7f", "/caf\xc3\xa9", "/a#b", "/a\n", "/%", "/%4", "/%zz", "/a%2",
		"/" + strings.Repeat("a", maxPath),
	}
	for c := range 256 {
		escape := fmt.Sprintf("/x%%%02x", c)
		plain := c < 0x20 || c == 0x7f || c < 0x80 && strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/\\;%#?", rune(c))
		if plain {
			refused = append(refused, escape, strings.ToUpper(escape))
		} else if d := p.Decide(call(t, "/a", "/s", "GET "+escape)); !d.Allowed {
			t.Errorf("path %q: %v, want it judged by the rules", escape, d.Reason)
		}
	}
	for _, path := range refused {
		r := &Request{Service: id(t, "/s"), Peer: id(t, "/a"), Protocol: ProtocolHTTP, Method: "GET", Path: path}
		if d := p.Decide(r); d.Allowed || d.Reason != ReasonPath {
			t.Errorf("path %q: allowed %t, %v; want it refused", path, d.Allowed, d.Reason)
		}
	}
	for _, path := range []string{"/", "/a/", "/...", "/.a", "/a..", "/a?//../%00;\\", "/~a!$&'()*+,=:@", "/" + strings.Repeat("a", maxPath-1) + "?" + strings.Repeat("q", maxPath)} {
		r := &Request{Service: id(t, "/s"), Peer: id(t, "/a"), Protocol: ProtocolHTTP, Method: "GET", Path: path}
		if d := p.Decide(r); !d.Allowed {
			t.Errorf("path %.80q: %v, want it judged by the rules", path, d.Reason)
		}
	}
}

func TestDecideMethodOverride(t *testing.T) {
	p := compile(t, set(t, `
kind: CallPolicy
name: x
service: /s
allow: [{from: [/**]}]
deny:
  - {from: [/m], http: [{methods: [DELETE], paths: [/x]}]}
  - {from: [/p], http: [{paths: [/x]}]}
  - {from: [/g], grpc: [p.S/M]}
  - {from: [/s], shadow: true, http: [{methods: [DELETE]}]}
`))
	for from, want := range map[string]Reason{"/m": ReasonMethodOverride, "/p": ReasonAllowed, "/g": ReasonMethodOverride, "/s": ReasonAllowed, "/other": ReasonAllowed} {
		r := call(t, from, "/s", "POST /y")
		r.HasMethodOverride = true
		d := p.Decide(r)
		if d.Reason != want {
			t.Errorf("override from %s: %v, want %v", from, d.Reason, want)
		}
		if from == "/s" && (d.Shadow.Reason != ReasonMethodOverride || !d.ShadowDiffers()) {
			t.Errorf("override under a shadow deny: %+v", d.Shadow)
		}
	}
	for _, h := range []string{"X-Http-Method-Override", "x-http-method", "X-METHOD-OVERRIDE"} {
		if !IsMethodOverride(h) {
			t.Errorf("IsMethodOverride(%q) is false", h)
		}
	}
	if IsMethodOverride("X-Method") {
		t.Error("IsMethodOverride(X-Method) is true")
	}
}

func TestDecideToken(t *testing.T) {
	p := compile(t, set(t, `
kind: CallPolicy
name: x
service: /s
allow:
  - {from: [/peer], jwt: {audience: [docs, other]}}
  - {from: [/any], jwt: {audience: [docs], subject: any}, http: [{methods: [GET]}]}
`))
	a, b := id(t, "/peer"), id(t, "/any")
	for _, tt := range []struct {
		name  string
		peer  spiffeid.ID
		token *Token
		want  Reason
	}{
		{"the peer's own", a, &Token{ID: a, Audience: []string{"x", "docs"}}, ReasonAllowed},
		{"another audience", a, &Token{ID: a, Audience: []string{"x"}}, ReasonToken},
		{"another subject", a, &Token{ID: b, Audience: []string{"docs"}}, ReasonToken},
		{"none", a, nil, ReasonToken},
		{"any subject", b, &Token{ID: a, Audience: []string{"docs"}}, ReasonAllowed},
		{"no subject", b, &Token{ID: spiffeid.ID{}, Audience: []string{"docs"}}, ReasonToken},
	} {
		r := &Request{Service: id(t, "/s"), Peer: tt.peer, Protocol: ProtocolHTTP, Method: "GET", Path: "/", Token: tt.token}
		if d := p.Decide(r); d.Reason != tt.want {
			t.Errorf("%s: %v, want %v\n%s", tt.name, d.Reason, tt.want, p.Explain(r))
		}
		if r.Protocol = ProtocolTLS; p.Decide(r).Allowed {
			t.Errorf("%s: a connection is allowed", tt.name)
		}
	}
	if got := fmt.Sprint(p.Audiences(id(t, "/s"), a), p.Audiences(id(t, "/s"), b), p.Audiences(id(t, "/s"), id(t, "/c")), p.Audiences(id(t, "/t"), a)); got != "[docs other] [docs] [] []" {
		t.Errorf("audiences: %s", got)
	}
}

func TestDecideShadowAndDefaults(t *testing.T) {
	const (
		enforce      = "{kind: CallPolicy, name: e, service: /s, allow: [{from: [/a]}]}\n---\n"
		shadowRules  = "{kind: CallPolicy, name: r, service: /s, allow: [{from: [/b], shadow: true}], deny: [{from: [/a], shadow: true}]}\n---\n"
		shadowPolicy = "{kind: CallPolicy, name: p, mode: shadow, service: /s, allow: [{from: [/b]}], deny: [{from: [/a]}]}\n---\n"
		denyAll      = "{kind: PolicyDefaults, mode: deny}\n"
		shadowAll    = "{kind: PolicyDefaults, mode: shadow}\n"
	)
	for _, tt := range []struct {
		name, docs, from, path string
		want, shadow           Reason
	}{
		{"nothing", denyAll, "/a", "/", ReasonNoPolicy, ReasonNone},
		{"no defaults", "", "/a", "/", ReasonNoPolicy, ReasonNone},
		{"defaults in shadow", shadowAll, "/a", "/", ReasonDefaultShadow, ReasonNoPolicy},
		{"defaults in shadow let bad paths through and report", shadowAll, "/a", "/../", ReasonDefaultShadow, ReasonPath},
		{"defaults never loosen a policy", enforce + shadowAll, "/b", "/", ReasonNoAllow, ReasonNone},
		{"nor its path refusals", enforce + shadowAll, "/a", "/../", ReasonPath, ReasonNone},
		{"a shadow deny takes nothing", enforce + shadowRules + denyAll, "/a", "/", ReasonAllowed, ReasonDenied},
		{"a shadow allow grants nothing", enforce + shadowRules + denyAll, "/b", "/", ReasonNoAllow, ReasonAllowed},
		{"an enforced policy of shadow rules is a policy", shadowRules + shadowAll, "/b", "/", ReasonNoAllow, ReasonAllowed},
		{"shadow policy beside an enforced one", enforce + shadowPolicy, "/a", "/", ReasonAllowed, ReasonDenied},
		{"only shadow policies, defaults deny", shadowPolicy + denyAll, "/b", "/", ReasonNoPolicy, ReasonAllowed},
		{"only shadow policies, defaults in shadow", shadowPolicy + shadowAll, "/a", "/", ReasonDefaultShadow, ReasonDenied},
		{"only shadow policies, defaults in shadow, allowed", shadowPolicy + shadowAll, "/b", "/", ReasonDefaultShadow, ReasonAllowed},
		{"only shadow policies, defaults in shadow, bad path", shadowPolicy + shadowAll, "/b", "//", ReasonDefaultShadow, ReasonPath},
	} {
		p, r := compile(t, set(t, tt.docs)), call(t, tt.from, "/s", "GET "+tt.path)
		if d := p.Decide(r); d.Reason != tt.want || d.Shadow.Reason != tt.shadow {
			t.Errorf("%s: %v, shadow %v; want %v, shadow %v\n%s", tt.name, d.Reason, d.Shadow.Reason, tt.want, tt.shadow, p.Explain(r))
		}
	}
	shadow := compile(t, set(t, shadowAll))
	if d := shadow.Stale().Decide(call(t, "/a", "/s", "tls")); d.Allowed || d.Reason != ReasonStalePolicy {
		t.Errorf("stale policies: %+v", d)
	}
	if d := (*Policies)(nil).Decide(call(t, "/a", "/s", "tls")); d.Allowed || d.Reason != ReasonUnknownPolicy {
		t.Errorf("no policies: %+v", d)
	}
	if d := shadow.Decide(call(t, "spiffe://example.org", "/s", "tls")); d.Allowed {
		t.Errorf("defaults in shadow let an invalid peer through: %+v", d)
	}
}

func TestDecideFailsClosedOnWhatItDoesNotKnow(t *testing.T) {
	base := set(t, `{kind: CallPolicy, name: x, service: /s, allow: [{from: [/a]}, {from: [/b], jwt: {audience: [x]}}], deny: [{from: [/z]}]}`)
	const allow, token, deny = 0, 1, 2
	for _, tt := range []struct {
		name   string
		change func(*policyv1.PolicySet)
		a, c   Reason // for /a, which is allowed; for /c, which no rule names
	}{
		{"nothing", func(*policyv1.PolicySet) {}, ReasonAllowed, ReasonNoAllow},
		{"an allow requires more", func(s *policyv1.PolicySet) { s.Policies[0].Rules[allow].Requires = []string{"http", "conditions"} }, ReasonNoAllow, ReasonNoAllow},
		{"a deny requires more", func(s *policyv1.PolicySet) { s.Policies[0].Rules[deny].Requires = []string{"conditions"} }, ReasonUnsupported, ReasonUnsupported},
		{"a shadow deny requires more", func(s *policyv1.PolicySet) {
			s.Policies[0].Rules[deny].Requires, s.Policies[0].Rules[deny].Shadow = []string{"conditions"}, true
		}, ReasonAllowed, ReasonNoAllow},
		{"effect unspecified", func(s *policyv1.PolicySet) { s.Policies[0].Rules[allow].Effect = 0 }, ReasonUnsupported, ReasonUnsupported},
		{"effect unknown", func(s *policyv1.PolicySet) { s.Policies[0].Rules[allow].Effect = 99 }, ReasonUnsupported, ReasonUnsupported},
		{"mode unspecified", func(s *policyv1.PolicySet) { s.Policies[0].Mode = 0 }, ReasonUnsupported, ReasonUnsupported},
		{"mode unknown", func(s *policyv1.PolicySet) { s.Policies[0].Mode = 99 }, ReasonUnsupported, ReasonUnsupported},
		{"mode unknown, defaults in shadow", func(s *policyv1.PolicySet) { s.Policies[0].Mode, s.Defaults = 99, 2 }, ReasonUnsupported, ReasonUnsupported},
		{"defaults unknown", func(s *policyv1.PolicySet) { s.Policies, s.Defaults = nil, 99 }, ReasonNoPolicy, ReasonNoPolicy},
		{"defaults unspecified", func(s *policyv1.PolicySet) { s.Policies, s.Defaults = nil, 0 }, ReasonNoPolicy, ReasonNoPolicy},
		{"from empty in an allow", func(s *policyv1.PolicySet) { s.Policies[0].Rules[allow].From = nil }, ReasonNoAllow, ReasonNoAllow},
		{"from empty in a deny", func(s *policyv1.PolicySet) { s.Policies[0].Rules[deny].From = nil }, ReasonUnsupported, ReasonUnsupported},
		{"from malformed in a deny", func(s *policyv1.PolicySet) { s.Policies[0].Rules[deny].From = []string{"/z"} }, ReasonUnsupported, ReasonUnsupported},
		{"http item empty in a deny", func(s *policyv1.PolicySet) { s.Policies[0].Rules[deny].Http = []*policyv1.HTTPMatch{{}} }, ReasonUnsupported, ReasonUnsupported},
		{"path malformed in an allow", func(s *policyv1.PolicySet) {
			s.Policies[0].Rules[allow].Http = []*policyv1.HTTPMatch{{Paths: []string{"/"}}, {Paths: []string{"/../"}}}
		}, ReasonNoAllow, ReasonNoAllow},
		{"http and grpc in a deny", func(s *policyv1.PolicySet) {
			s.Policies[0].Rules[deny].Http, s.Policies[0].Rules[deny].Grpc = []*policyv1.HTTPMatch{{Methods: []string{"GET"}}}, []string{"a.B/*"}
		}, ReasonUnsupported, ReasonUnsupported},
		{"subject unknown", func(s *policyv1.PolicySet) { s.Policies[0].Rules[token].Jwt.Subject = 99 }, ReasonAllowed, ReasonNoAllow},
		{"a deny with a token covers the caller without one", func(s *policyv1.PolicySet) {
			s.Policies[0].Rules[deny].From = []string{"spiffe://example.org/a"}
			s.Policies[0].Rules[deny].Jwt = &policyv1.JWTMatch{Audience: []string{"x"}, Subject: 1}
		}, ReasonDenied, ReasonNoAllow},
	} {
		s := proto.CloneOf(base)
		tt.change(s)
		p := compile(t, s)
		for from, want := range map[string]Reason{"/a": tt.a, "/c": tt.c} {
			if d := p.Decide(call(t, from, "/s", "GET /")); d.Reason != want {
				t.Errorf("%s: from %s: %v, want %v\n%s", tt.name, from, d.Reason, want, p.Explain(call(t, from, "/s", "GET /")))
			}
		}
		r := call(t, "/b", "/s", "GET /")
		r.Token = &Token{ID: r.Peer, Audience: []string{"x"}}
		if d := p.Decide(r); tt.name == "subject unknown" && d.Allowed {
			t.Errorf("%s: allowed", tt.name)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	good := set(t, documents)
	for name, change := range map[string]func(*policyv1.PolicySet){
		"a newer format":      func(s *policyv1.PolicySet) { s.Format = Format + 1 },
		"no format":           func(s *policyv1.PolicySet) { s.Format = 0 },
		"no trust domain":     func(s *policyv1.PolicySet) { s.TrustDomain = "" },
		"a malformed service": func(s *policyv1.PolicySet) { s.Policies[0].Services = []string{"spiffe://example.org/a*"} },
		"a foreign service":   func(s *policyv1.PolicySet) { s.Policies[0].Services = []string{"spiffe://b.example/a"} },
	} {
		s := proto.CloneOf(good)
		change(s)
		if p, err := Compile(s); err == nil || p != nil {
			t.Errorf("%s: compiled", name)
		} else if errors.Is(err, ErrFormat) != (name == "a newer format") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Compile(nil); err == nil {
		t.Error("nil compiled")
	}
}

func TestCompileCopiesItsSet(t *testing.T) {
	s := set(t, documents)
	p := compile(t, s)
	s.Policies[0].Rules[0].From[0] = "spiffe://example.org/evil"
	if d := p.Decide(call(t, "/trusty-service", "/documents-service", "GET /v1/documents/7")); !d.Allowed {
		t.Errorf("a change of the set changed the decision: %+v", d)
	}
	p.Set().Policies[0].Name = "evil"
	if p.Set().Policies[0].Name != "documents" {
		t.Error("a change of what Set returned changed the policies")
	}
}

func TestMightAllow(t *testing.T) {
	p := compile(t, set(t, `
kind: CallPolicy
name: x
service: /s
allow:
  - {from: [/h], http: [{methods: [GET]}]}
  - {from: [/j], jwt: {audience: [x]}}
  - {from: [/d, /q], grpc: [p.S/*]}
  - {from: [/w], shadow: true}
deny:
  - {from: [/d], http: [{methods: [DELETE]}]}
  - {from: [/q]}
`))
	for from, want := range map[string]bool{"/h": true, "/j": true, "/d": true, "/q": false, "/w": false, "/none": false} {
		if d := p.MightAllow(id(t, "/s"), id(t, from)); d.Allowed != want {
			t.Errorf("MightAllow(%s) = %+v, want %t", from, d, want)
		}
		if d := p.Decide(call(t, from, "/s", "tls")); d.Allowed {
			t.Errorf("a connection from %s is allowed: %+v", from, d)
		}
	}
	if (*Policies)(nil).MightAllow(id(t, "/s"), id(t, "/h")).Allowed {
		t.Error("no policies: might allow")
	}
}

func TestID_22_ServiceMatches(t *testing.T) {
	for _, tt := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://example.org/a", "/a", true},
		{"spiffe://example.org/a", "/A", false},
		{"spiffe://example.org/ns/prod/*", "/ns/production/x", false},
		{"spiffe://example.org/ns/prod/*", "/ns/prod/x", true},
		{"spiffe://example.org/ns/prod/*", "/ns/prod/x/y", false},
		{"spiffe://example.org/ns/prod/**", "/ns/prod/x/y", true},
		{"spiffe://example.org/ns/prod/**", "/ns/prod", false},
		{"spiffe://example.org/**", "/spire/server", false},
		{"spiffe://example.org/*/server", "/spire/server", false},
		{"spiffe://example.org/spire/*", "/spire/server", true},
		{"spiffe://example.org/**", "spiffe://example.org", false},
		{"spiffe://b.example/a", "/a", false},
		{"/a", "/a", false},
		{"spiffe://*/a", "/a", false},
	} {
		if got := ServiceMatches(tt.pattern, id(t, tt.id)); got != tt.want {
			t.Errorf("ServiceMatches(%q, %s) = %t, want %t", tt.pattern, tt.id, got, tt.want)
		}
	}
}

func TestDecideDoesNotAllocate(t *testing.T) {
	p := compile(t, set(t, documents+"---\n{kind: CallPolicy, name: w, service: /**, mode: shadow, allow: [{from: [/**], jwt: {audience: [x]}}], deny: [{from: [/q], http: [{paths: [\"/%C3%A9\"]}]}]}"))
	for _, r := range []*Request{
		call(t, "/trusty-service", "/documents-service", "GET /v1/documents/7"),
		call(t, "/q", "/documents-service", "GET /%c3%a9"),
		call(t, "/ns/a/sa/archiver", "/documents-service", "grpc documents.v1.Documents/Get"),
		call(t, "/x", "/documents-service", "tls"),
	} {
		if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n != 0 {
			t.Errorf("Decide(%+v) allocates %v times", r, n)
		}
	}
}
