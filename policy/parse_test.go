package policy

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

func parse(doc string) (*policyv1.Policy, error) {
	docs, err := strictyaml.Split([]byte(doc), "p.yaml", 1)
	if err != nil {
		return nil, err
	}
	return ParsePolicy(docs[0], exampleOrg)
}

func TestParsePolicy(t *testing.T) {
	got, err := parse(documents)
	if err == nil {
		var want policyv1.Policy
		if err := prototext.Unmarshal([]byte(`
			name: "documents" services: "spiffe://example.org/documents-service" mode: MODE_ENFORCE file: "p.yaml" line: 1
			rules { effect: EFFECT_ALLOW from: "spiffe://example.org/trusty-service" from: "spiffe://partner.example/reports/**"
				http { methods: "GET" paths: "/v1/documents/**" } requires: "http" line: 6 }
			rules { effect: EFFECT_ALLOW from: "spiffe://example.org/ns/*/sa/archiver" grpc: "documents.v1.Documents/*" requires: "grpc" line: 8 }
			rules { effect: EFFECT_DENY from: "spiffe://example.org/quarantine/**" line: 11 }`), &want); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, &want) {
			t.Errorf("got %v\nwant %v", got, &want)
		}
		return
	}
	t.Error(err)
}

func TestParsePolicyJWT(t *testing.T) {
	got, err := parse(`{kind: CallPolicy, name: x, service: [/s, /t/*], mode: shadow, allow: [{from: [/a], shadow: true, jwt: {audience: [d], subject: any}}, {from: [/a], jwt: {audience: [d]}}]}`)
	if err != nil {
		t.Fatal(err)
	}
	any, peer := got.Rules[0], got.Rules[1]
	if got.Mode != policyv1.Mode_MODE_SHADOW || len(got.Services) != 2 || !any.Shadow || any.Jwt.Subject != policyv1.SubjectBinding_SUBJECT_BINDING_ANY ||
		fmt.Sprint(any.Requires) != "[jwt jwt.subject.any]" || peer.Jwt.Subject != policyv1.SubjectBinding_SUBJECT_BINDING_PEER || fmt.Sprint(peer.Requires) != "[jwt]" {
		t.Errorf("got %v", got)
	}
}

func TestParsePolicyRefuses(t *testing.T) {
	const head = "kind: CallPolicy\nname: x\nservice: /s\nallow:\n  - " // a rule begins at 5:5
	for _, tt := range []struct{ name, doc, want string }{
		{"no from", head + "shadow: true", "5:5: from is missing"},
		{"empty from", head + "from: []", "5:11: from is empty"},
		{"null from", head + "from:", "5:10: from is empty (null)"},
		{"scalar from", head + "from: /a", "5:11: from is the string \"/a\"; it must be a list"},
		{"empty http", head + "{from: [/a], http: []}", "5:24: http is empty"},
		{"null http", head + "{from: [/a], http: }", "http is empty (null)"},
		{"empty item of http", head + "{from: [/a], http: [{}]}", "5:25: an empty item of http"},
		{"empty methods", head + "{from: [/a], http: [{methods: []}]}", "5:35: methods is empty"},
		{"null methods", head + "{from: [/a], http: [{methods: ~}]}", "methods is empty (null)"},
		{"empty paths", head + "{from: [/a], http: [{paths: []}]}", "5:33: paths is empty"},
		{"null paths", head + "{from: [/a], http: [{paths: ~}]}", "paths is empty (null)"},
		{"scalar paths", head + "{from: [/a], http: [{paths: /x}]}", "it must be a list"},
		{"empty grpc", head + "{from: [/a], grpc: []}", "5:24: grpc is empty"},
		{"null grpc", head + "{from: [/a], grpc: ~}", "grpc is empty (null)"},
		{"http and grpc", head + "{from: [/a], http: [{methods: [GET]}], grpc: [a.B/C]}", "http and grpc exclude each other"},
		{"a misspelt field", head + "{form: [/a]}", `5:6: unknown field "form"`},
		{"a duplicate key", head + "{from: [/a], from: [/b]}", `5:18: duplicate key "from"`},
		{"an unknown name in when", head + "from: [/a]\n    when: 'true && tru'", `6:20: when: undeclared reference to 'tru'`},
		{"jwt without audience", head + "{from: [/a], jwt: {subject: any}}", "jwt needs audience"},
		{"an empty audience", head + "{from: [/a], jwt: {audience: []}}", "audience is empty"},
		{"an audience without text", head + "{from: [/a], jwt: {audience: ['']}}", "audience is empty"},
		{"an unknown subject", head + "{from: [/a], jwt: {audience: [x], subject: me}}", `subject is "me"; it must be peer or any`},
		{"jwt in a deny", "kind: CallPolicy\nname: x\nservice: /s\ndeny:\n  - {from: [/a], jwt: {audience: [x]}}", "5:23: jwt in a deny"},

		{"a star in a segment", head + "from: [/a*]", `5:12: "spiffe://example.org/a*": segment "a*" mixes a wildcard with text`},
		{"** in the middle", head + "from: [/a/**/b]", `"**" can only be the last segment`},
		{"three stars", head + "from: [/***]", "mixes a wildcard with text"},
		{"a wildcard trust domain", head + "from: ['spiffe://*/a']", "wildcard in its trust domain"},
		{"a wildcard in the trust domain", head + "from: ['spiffe://*.example/a']", "wildcard in its trust domain"},
		{"no path", head + "from: ['spiffe://example.org']", "has no path"},
		{"a trailing slash", head + "from: [/a/]", ""},
		{"an empty segment", head + "from: [/a//b]", ""},
		{"ID_13 an escape", head + "from: [/%61]", "percent-encoded"},
		{"ID_17 a character", head + "from: [/a~]", "allowed are"},
		{"a dot segment", head + "from: [/a/..]", ""},
		{"another scheme", head + "from: ['https://example.org/a']", "is not a SPIFFE ID"},
		{"an ID without slash", head + "from: [web]", "is not a SPIFFE ID"},
		{"a long ID", head + "from: [/" + strings.Repeat("a", 2048) + "]", "at most 2048"},

		{"a lower-case method", head + "{from: [/a], http: [{methods: [get]}]}", `method "get" can never match: methods are case-sensitive, write "GET"`},
		{"a wildcard method", head + "{from: [/a], http: [{methods: ['*']}]}", "remove methods to cover any"},
		{"a path with a query", head + "{from: [/a], http: [{paths: ['/a?b']}]}", "has a query"},
		{"a path that is *", head + "{from: [/a], http: [{paths: ['*']}]}", "OPTIONS"},
		{"a relative path", head + "{from: [/a], http: [{paths: [a]}]}", "can never match"},
		{"a path with //", head + "{from: [/a], http: [{paths: [/a//b]}]}", "can never match"},
		{"a path with ..", head + "{from: [/a], http: [{paths: [/a/../b]}]}", "can never match"},
		{"a path with an escaped letter", head + "{from: [/a], http: [{paths: ['/%61']}]}", "can never match"},
		{"a path with an escaped slash", head + "{from: [/a], http: [{paths: ['/a%2Fb']}]}", "can never match"},
		{"a path with a bad escape", head + "{from: [/a], http: [{paths: ['/a%2']}]}", "can never match"},
		{"a path with UTF-8", head + "{from: [/a], http: [{paths: [/é]}]}", "can never match"},
		{"a path with ;", head + "{from: [/a], http: [{paths: ['/a;b']}]}", "can never match"},
		{"a path with ** in the middle", head + "{from: [/a], http: [{paths: [/**/a]}]}", "can only be the last segment"},
		{"a path with ** and a slash", head + "{from: [/a], http: [{paths: [/a/**/]}]}", "can only be the last segment"},
		{"a path with a partial wildcard", head + "{from: [/a], http: [{paths: ['/a/*.txt']}]}", "mixes a wildcard with text"},
		{"a gRPC method with a slash before", head + "{from: [/a], grpc: [/a.B/C]}", "without a slash before it"},
		{"a gRPC service alone", head + "{from: [/a], grpc: [a.B]}", "is not of the form"},
		{"a gRPC wildcard service", head + "{from: [/a], grpc: ['*/C']}", "not the full name of a service"},
		{"a gRPC method that is none", head + "{from: [/a], grpc: [a.B/C-D]}", "not the name of a method"},

		{"no kind", "name: x\nservice: /s", "1:1: kind is missing"},
		{"another kind", "kind: Identity\nname: x\nservice: /s", "1:7: kind is \"Identity\""},
		{"no name", "kind: CallPolicy\nservice: /s", "name is missing"},
		{"a bad name", "kind: CallPolicy\nname: A b\nservice: /s", `2:7: name is "A b"`},
		{"no service", "kind: CallPolicy\nname: x", "service is missing"},
		{"no service in the list", "kind: CallPolicy\nname: x\nservice: []", "service is missing"},
		{"a foreign service", "kind: CallPolicy\nname: x\nservice: spiffe://b.example/s", "3:10: service \"spiffe://b.example/s\" is not in the trust domain example.org"},
		{"signet's own services", "kind: CallPolicy\nname: x\nservice: /spire/server", "do not govern the CA"},
		{"a service twice", "kind: CallPolicy\nname: x\nservice: [/s, spiffe://example.org/s]", "listed twice"},
		{"an unknown mode", "kind: CallPolicy\nname: x\nservice: /s\nmode: audit", `4:7: mode is "audit"; it must be enforce or shadow`},
		{"a null mode", "kind: CallPolicy\nname: x\nservice: /s\nmode:", "mode is empty (null)"},
	} {
		_, err := parse(tt.doc)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v\nwant %s", tt.name, err, tt.want)
		}
	}
}

func TestParsePolicyReportsANullOnceAndWhereItIs(t *testing.T) {
	for rule, want := range map[string]string{
		"- {from: [/a], http: [~]}":            "p.yaml:5:25: http[0] is empty (null)",
		"- ":                                   "p.yaml:5:4: allow[0] is empty (null)",
		"- from:":                              "p.yaml:5:10: from is empty (null)",
		"- {from: [/a], http: [{methods: ~}]}": "p.yaml:5:35: methods is empty (null)",
		"- {from: [/a], jwt: ~}":               "p.yaml:5:23: jwt is empty (null)",
		"- {from: [/a], when: ~}":              "p.yaml:5:24: when is empty (null)",
		"- {from: [/a], http: [{paths: [/a//b]}]}":    `p.yaml:5:34: path "/a//b" can never match: such a path is refused, because it has an empty segment`,
		"- {from: [/a], http: [{paths: ['/a%2Fb']}]}": `p.yaml:5:34: path "/a%2Fb" can never match: such a path is refused, because it escapes a letter`,
	} {
		_, err := parse("kind: CallPolicy\nname: x\nservice: /s\nallow:\n  " + rule)
		if got := fmt.Sprint(err); !strings.HasPrefix(got, want) || strings.Contains(got, "\n") {
			t.Errorf("%s: got\n%s\nwant %s", rule, got, want)
		}
	}
}

func TestParsePolicyReportsAllMistakes(t *testing.T) {
	_, err := parse("kind: CallPolicy\nservice: /a*\nmode: off\nallow:\n  - from: /x\n    when: a\n  - http: [{methods: [get]}]\n")
	want := []string{"p.yaml:1:1: name is missing", "p.yaml:2:10: ", "p.yaml:3:7: mode is", "p.yaml:5:11: from is the string", "p.yaml:6:11: when: undeclared reference", "p.yaml:7:5: from is missing", "p.yaml:7:23: method"}
	lines := strings.Split(fmt.Sprint(err), "\n")
	if len(lines) != len(want) {
		t.Fatalf("got %d mistakes, want %d:\n%v", len(lines), len(want), err)
	}
	for i, line := range lines {
		if !strings.HasPrefix(line, want[i]) {
			t.Errorf("mistake %d is %q, want %q...", i, line, want[i])
		}
	}
}

func TestParseDefaults(t *testing.T) {
	for doc, want := range map[string]policyv1.DefaultsMode{
		"{kind: PolicyDefaults, mode: deny}":                  policyv1.DefaultsMode_DEFAULTS_MODE_DENY,
		"{kind: PolicyDefaults, name: default, mode: shadow}": policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW,
		"{kind: PolicyDefaults}":                              0,
		"{kind: PolicyDefaults, mode: allow}":                 0,
		"{kind: PolicyDefaults, name: other, mode: deny}":     0,
		"{kind: CallPolicy, mode: deny}":                      0,
		"{kind: PolicyDefaults, mode: deny, service: /s}":     0,
	} {
		docs, err := strictyaml.Split([]byte(doc), "p.yaml", 1)
		if err != nil {
			t.Fatal(err)
		}
		mode, name, err := ParseDefaults(docs[0])
		if want == 0 && err == nil || want != 0 && (err != nil || mode != want || name != DefaultsName) {
			t.Errorf("%s: %v, %q, %v", doc, mode, name, err)
		}
	}
}

func TestCheck(t *testing.T) {
	docs, err := strictyaml.Split([]byte(documents+"---\n"+documents+"---\n{kind: Identity, name: whatever}\n---\n{kind: CallPolicy, name: y, service: spire}\n"), "p.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Check(docs, exampleOrg)
	for _, want := range []string{`p.yaml:17:7: a second CallPolicy named "documents"; the first is at p.yaml:1`, `p.yaml:28:7: a second PolicyDefaults named "default"`, `p.yaml:33:38: "spire" is not a SPIFFE ID`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
}

func TestRunTests(t *testing.T) {
	const table = `kind: PolicyTest
name: documents
trustDomain: example.org
policies: [p.yaml]
cases:
  - name: read
    from: /trusty-service
    to: /documents-service
    http: GET /v1/documents/7
    want: allow
    rule: documents:6
  - {from: /trusty-service, to: /documents-service, http: GET /v1/documents/7, want: deny}
  - {from: /ns/a/sa/archiver, to: /documents-service, grpc: documents.v1.Documents/Get, want: allow, rule: documents}
  - {from: /ns/a/sa/archiver, to: /documents-service, grpc: documents.v1.Documents/Get, want: allow, rule: "documents:11"}
  - {from: "spiffe://example.org/quarantine", to: /documents-service, tls: true, want: deny, rule: "documents:11"}
  - {from: /trusty-service, to: /documents-service, http: POST /v1/x, contentType: application/json, methodOverride: true, jwt: {audience: [a], subject: /b}, want: deny}
`
	docs, err := strictyaml.Split([]byte(table), "t.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	tests, err := ParseTests(docs[0])
	if err != nil {
		t.Fatal(err)
	}
	if tests.Name != "documents" || tests.TrustDomain != exampleOrg || fmt.Sprint(tests.Policies) != "[p.yaml]" {
		t.Errorf("read %+v", tests)
	}
	if r := tests.Cases[5].Request; !r.HasMethodOverride || r.Token.ID.Path() != "/b" || r.ContentTypes[0] != "application/json" {
		t.Errorf("read %+v", r)
	}
	results := RunTests(compile(t, set(t, documents)), tests)
	want := []string{"", `t.yaml:12: "case 2" is allowed, want denied: p.yaml:6: documents allows it`, "", `t.yaml:14: "case 4" is allowed, but not by rule documents:11: p.yaml:8: documents allows it`, "", ""}
	for i, r := range results {
		if r.Message != want[i] || r.Passed != (want[i] == "") {
			t.Errorf("case %d: %t %q, want %q", i, r.Passed, r.Message, want[i])
		}
	}
}

// TestRunTestsWithConditions holds that a table can say what conditions ask for.
func TestRunTestsWithConditions(t *testing.T) {
	const documents = `kind: CallPolicy
name: p
service: /s
allow:
  - from: [/a]
    http: [{methods: [GET]}]
    when: request.headers["x-tenant"] == "blue" && peer.hint == "internal"
  - from: [/a]
    http: [{methods: [PUT]}]
    when: user.issuer == "https://login.example" && user.claims.level >= 9007199254740993
  - from: [/a]
    http: [{methods: [POST]}]
    jwt: {audience: [s]}
    when: jwt.trust_domain == "example.org" && "w" in jwt.claims.scope.split(" ")
`
	const table = `kind: PolicyTest
trustDomain: example.org
cases:
  - {from: /a, to: /s, http: GET /, headers: {X-Tenant: blue}, hint: internal, want: allow, rule: "p:5"}
  - {from: /a, to: /s, http: GET /, headers: {x-tenant: blue}, want: deny}
  - {from: /a, to: /s, http: GET /, headers: {x-tenant: [blue, red]}, hint: internal, want: deny}
  - {from: /a, to: /s, http: GET /, headers: {x-tenant: red}, hint: internal, want: deny}
  - {from: /a, to: /s, http: PUT /, user: {issuer: "https://login.example", claims: '{"level": 9007199254740993}'}, want: allow}
  - {from: /a, to: /s, http: PUT /, user: {issuer: "https://login.example", claims: '{"level": 9007199254740992}'}, want: deny}
  - {from: /a, to: /s, http: PUT /, user: {issuer: "https://other.example", claims: '{"level": 9007199254740993}'}, want: deny}
  - {from: /a, to: /s, http: PUT /, want: deny}
  - {from: /a, to: /s, http: POST /, jwt: {audience: [s], claims: '{"scope": "r w"}'}, want: allow, rule: "p:11"}
  - {from: /a, to: /s, http: POST /, jwt: {audience: [s]}, want: deny}
  - {from: /a, to: /s, http: POST /, jwt: {audience: [s], subject: /b, claims: '{"scope": "r w"}'}, want: deny}
`
	docs, err := strictyaml.Split([]byte(table), "t.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	tests, err := ParseTests(docs[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(tests.Cases) != 11 {
		t.Errorf("read %d cases", len(tests.Cases))
	}
	for _, r := range RunTests(compile(t, set(t, documents)), tests) {
		if !r.Passed {
			t.Errorf("%s\n%s", r.Message, r.Explanation)
		}
	}
}

func TestParseTestsRefuses(t *testing.T) {
	const head = "kind: PolicyTest\ntrustDomain: example.org\ncases:\n  - " // a case begins at 4:5
	for _, tt := range []struct{ doc, want string }{
		{"kind: PolicyTest\ncases: [{from: /a, to: /b, tls: true, want: deny}]", "trustDomain is missing"},
		{"kind: PolicyTest\ntrustDomain: example.org", "cases is missing"},
		{head + "{to: /b, tls: true, want: deny}", "4:5: from is missing"},
		{head + "{from: /a, tls: true, want: deny}", "4:5: to is missing"},
		{head + "{from: /a, to: /b, tls: true}", "4:5: want is missing"},
		{head + "{from: /a, to: /b, tls: true, want: maybe}", `want is "maybe"`},
		{head + "{from: /a, to: /b, want: deny}", "exactly one of http, grpc and tls"},
		{head + "{from: /a, to: /b, tls: true, http: GET /, want: deny}", "exactly one of http, grpc and tls"},
		{head + "{from: /a, to: /b, tls: false, want: deny}", "tls is false"},
		{head + "{from: /a, to: /b, http: /x, want: deny}", `http is "/x"`},
		{head + "{from: /a, to: /b, grpc: a.B/*, want: deny}", `grpc is "a.B/*"`},
		{head + "{from: /a/*, to: /b, tls: true, want: deny}", "from: "},
		{head + "{from: /a, to: /b, tls: true, want: deny, rule: 'x:y'}", `rule is "x:y"`},
		{head + "{from: /a, to: /b, tls: true, want: deny, contentType: x}", "contentType goes with http only"},
		{head + "{from: /a, to: /b, http: GET /, want: deny, jwt: {subject: /a}}", "jwt needs audience"},
		{head + "{from: /a, to: /b, header: x, want: deny}", `unknown field "header"`},
		{head + "{from: /a, to: /b, tls: true, headers: {x: y}, want: deny}", `headers and user go with http and grpc only`},
		{head + "{from: /a, to: /b, http: GET /, headers: x, want: deny}", `4:46: headers`},
		{head + "{from: /a, to: /b, http: GET /, user: {claims: '{}'}, want: deny}", `user needs issuer`},
		{head + "{from: /a, to: /b, http: GET /, user: {issuer: u, claims: '[]'}, want: deny}", `4:63: claims are "[]"`},
		{head + "{from: /a, to: /b, http: GET /, jwt: {audience: [a], claims: '{} {}'}, want: deny}", `something behind their JSON object`},
	} {
		docs, err := strictyaml.Split([]byte(tt.doc), "t.yaml", 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseTests(docs[0]); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s\n got %v\nwant %s", tt.doc, err, tt.want)
		}
	}
}

// FuzzParsePolicy holds that what is parsed compiles without a rule that could not be judged.
func FuzzParsePolicy(f *testing.F) {
	f.Add(documents)
	f.Add("{kind: CallPolicy, name: x, service: [/s, /**], allow: [{from: [/a/*/b], http: [{methods: [GET], paths: ['/a%20', '/*/']}], jwt: {audience: [d]}}], deny: [{from: [/**], grpc: [a.B/*]}]}")
	f.Fuzz(func(t *testing.T, doc string) {
		docs, err := strictyaml.Split([]byte(doc), "p.yaml", 1)
		if err != nil {
			return
		}
		for _, d := range docs {
			pol, err := ParsePolicy(d, exampleOrg)
			if err != nil {
				continue
			}
			p, err := Compile(&policyv1.PolicySet{Format: Format, TrustDomain: "example.org", Policies: []*policyv1.Policy{pol}})
			if err != nil {
				t.Fatalf("a parsed policy does not compile: %v\n%s", err, doc)
			}
			for i := range pol.Rules {
				if r := newRule(p.set.Policies[0], i, 0, conditionsAfter(nil)); r.broken != "" {
					t.Fatalf("a parsed rule cannot be judged: %s\n%s", r.broken, doc)
				}
			}
		}
	})
}
