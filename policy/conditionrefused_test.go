package policy

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// TestConditionsRefused holds what a condition cannot be, in an allow or in a deny, and that a reader that is sent one
// never grants anything by it.
func TestConditionsRefused(t *testing.T) {
	nest := func(n int, open, inner, end string) string {
		return strings.Repeat(open, n) + inner + strings.Repeat(end, n)
	}
	for _, tt := range []struct {
		name, when, want string
		allowOnly        bool
	}{
		{name: "empty", when: " ", want: "1:1: the condition is empty"},
		{name: "no expression", when: "&&", want: "1:1: "},
		{name: "two lines, a mistake in the second", when: "true &&\n  nothing", want: "2:3: undeclared reference to 'nothing'"},
		{name: "not a truth value", when: `peer.id`, want: "1:1: the condition is a string"},
		{name: "perhaps not a truth value", when: fixed + `true ? jwt.claims.a : jwt.claims.b`, want: "jwt.claims is read without"},
		{name: "ill-typed", when: `peer.id == 5`, want: "1:9: found no matching overload"},
		{name: "ill-typed argument", when: `peer.id.startsWith(5)`, want: "found no matching overload"},
		{name: "an unknown field of peer", when: `peer.ip == "1"`, want: "undeclared reference to 'peer.ip'"},
		{name: "peer as a whole", when: `peer == peer`, want: "undeclared reference to 'peer'"},
		{name: "a function that CEL has", when: `int("5") == 5`, want: "undeclared reference to 'int'"},
		{name: "time", when: `timestamp("2020-01-01T00:00:00Z") < timestamp("2021-01-01T00:00:00Z")`, want: "undeclared reference to 'timestamp'"},
		{name: "map", when: `["a"].map(x, x) == ["a"]`, want: "undeclared reference"},
		{name: "filter", when: `size(["a"].filter(x, true)) == 1`, want: "undeclared reference"},
		{name: "a map", when: `{"a": "b"}["a"] == "b"`, want: "1:1: maps and messages cannot be made"},
		{name: "a message", when: `google.protobuf.Empty{} == google.protobuf.Empty{}`, want: "maps and messages cannot be made"},
		{name: "a type", when: `string == string`, want: `"string" cannot be used here`},
		{name: "null", when: fixed + `jwt.claims.a == null`, want: "null is not compared"},
		{name: "a double that is not exact", when: fixed + `jwt.claims.a == 9007199254740993.0`, want: "exact only below 2^53"},
		{name: "an int that is none", when: fixed + `jwt.claims.a == 9223372036854775808`, want: "1:"},

		// whose claims
		{name: "claims of anybody", when: `jwt.claims.a == "x"`, want: "1:4: jwt.claims is read without saying whose"},
		{name: "or", when: `jwt.trust_domain == "example.org" || jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "one side of or", when: `(jwt.trust_domain == "example.org" || true) && jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "not", when: `!(jwt.trust_domain == "example.org") && jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "unequal", when: `jwt.trust_domain != "example.org" && jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "not, around both", when: `!(jwt.trust_domain == "example.org" && jwt.claims.a == "x")`, want: "jwt.claims is read without", allowOnly: true},
		{name: "the condition of ?:", when: `jwt.trust_domain == "example.org" ? jwt.claims.a == "x" : false`, want: "jwt.claims is read without"},
		{name: "within the condition of ?:", when: `(jwt.trust_domain == "example.org" && jwt.claims.a == "x") ? false : true`, want: "jwt.claims is read without"},
		{name: "?: as a conjunct", when: `(true ? true : jwt.trust_domain == "example.org") && jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "in a list", when: `jwt.trust_domain in ["example.org"] && jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "by something that is no text", when: `jwt.trust_domain == peer.trust_domain && jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "equality as an argument", when: `(jwt.trust_domain == "example.org") == true && jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "both as an argument", when: `(jwt.trust_domain == "example.org" && jwt.claims.a == "x") == false`, want: "jwt.claims is read without"},
		{name: "within a loop", when: `["x"].exists(i, jwt.trust_domain == "example.org" && jwt.claims.a == i)`, want: "jwt.claims is read without"},
		{name: "the list of a loop", when: `jwt.claims.roles.exists(r, jwt.trust_domain == "example.org" && r == "x")`, want: "jwt.claims is read without"},
		{name: "has", when: `has(jwt.claims.a)`, want: "jwt.claims is read without"},
		{name: "in", when: `"a" in jwt.claims`, want: "jwt.claims is read without"},
		{name: "through a list", when: `[jwt.claims].exists(c, c.a == "x") && peer.id == "x"`, want: "jwt.claims is read without"},
		{name: "from the root", when: `.jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "a loop over something called jwt", when: `["example.org"].exists(jwt, jwt == "example.org")`, want: `"jwt" is the name of something`},
		{name: "a loop over something called user", when: `[1].all(user, user == 1)`, want: `"user" is the name of something`},
		{name: "a trust domain that is none", when: `jwt.trust_domain == "Example.org" && jwt.claims.a == "x"`, want: "jwt.trust_domain can never be this"},
		{name: "the user's trust domain for the caller's claims", when: fixedUser + `jwt.claims.a == "x"`, want: "jwt.claims is read without"},
		{name: "users of anybody", when: `user.claims.a == "x"`, want: "user.claims is read without"},
		{name: "users by a caller's trust domain", when: fixed + `user.claims.a == "x"`, want: "user.claims is read without"},
		{name: "issuers that begin alike", when: `user.issuer.startsWith("https://login") && user.claims.a == "x"`, want: "user.issuer can only be compared"},
		{name: "an issuer that is not", when: `user.issuer != "https://evil.example" && user.claims.a == "x"`, want: "user.issuer can only be compared"},
		{name: "an issuer from a header", when: `user.issuer == request.headers["x-iss"]`, want: "user.issuer can only be compared"},

		// headers
		{name: "a header in upper case", when: `request.headers["X-Tenant"] == "a"`, want: "write its name in lower case"},
		{name: "a header that is computed", when: `request.headers["x-" + peer.id] == "a"`, want: "the name of a header must be written out"},
		{name: "a header as a field", when: `request.headers.tenant == "a"`, want: `write request.headers["tenant"]`},
		{name: "has of a header", when: `has(request.headers.tenant)`, want: `write request.headers["tenant"]`},
		{name: "all headers", when: `request.headers.exists(h, h == "x")`, want: "request.headers can only be asked for one header"},
		{name: "how many headers", when: `size(request.headers) == 0`, want: "request.headers can only be asked for one header"},
		{name: "headers in a list", when: `[request.headers].exists(h, h["x"] == "a")`, want: "request.headers can only be asked for one header"},
		{name: "a token", when: `request.headers["authorization"] == "Bearer x"`, want: "it holds secrets"},
		{name: "a cookie", when: `"cookie" in request.headers`, want: "it holds secrets"},
		{name: "host", when: `request.headers["host"] == "x"`, want: "not every enforcement point sees it"},
		{name: "binary metadata", when: `request.headers["x-bin"] == "x"`, want: "its value is binary"},
		{name: "gRPC's own", when: `request.headers["grpc-timeout"] == "1S"`, want: "it is of the gRPC protocol"},
		{name: "an underscore", when: `request.headers["x_tenant"] == "x"`, want: "cannot tell _ from -"},
		{name: "a pseudo-header", when: `request.headers[":authority"] == "x"`, want: `has the character ":"`},
		{name: "an override", when: `request.headers["x-http-method-override"] == "GET"`, want: "never believed"},

		// patterns
		{name: "a pattern that is computed", when: `peer.id.matches("^" + request.path + "$")`, want: "must be written out"},
		{name: "a pattern of a claim", when: fixed + `peer.id.matches(jwt.claims.a)`, want: "must be written out"},
		{name: "a pattern that finds", when: `peer.id.matches("web")`, want: "begin it with ^ and end it with $"},
		{name: "a pattern whose alternatives find", when: `peer.id.matches("^a|b$")`, want: "begin it with ^ and end it with $"},
		{name: "a pattern that begins at any line", when: `peer.id.matches("(?m)^a$")`, want: "begin it with ^ and end it with $"},
		{name: "a pattern that is none", when: `peer.id.matches("^($")`, want: "1:"},
		{name: "a pattern that grows", when: `peer.id.matches("^((a{100}){100}){10}$")`, want: "1:"},
		{name: "a big pattern", when: `peer.id.matches("^(a|b|c){0,400}$")`, want: "egex"},

		// size and cost
		{name: "too long", when: `peer.id == "` + strings.Repeat("a", maxConditionBytes) + `"`, want: "1:1: the condition has"},
		{name: "deep brackets", when: nest(2000, "(", "true", ")"), want: "1:25: brackets within brackets"},
		{name: "deep lists", when: "1 in " + nest(1000, "[", "1", "]"), want: "brackets within brackets"},
		{name: "many nots", when: strings.Repeat("!", 3000) + "true", want: ""},
		{name: "many minuses", when: strings.Repeat("-", 3001) + "1 == 1", want: "1:"},
		{name: "deep selections", when: fixed + "jwt.claims" + strings.Repeat(".a", 1500) + " == 1", want: "1:"},
		{name: "deep ?:", when: strings.Repeat("true?", 600) + "true" + strings.Repeat(":false", 600), want: "1:"},
		{name: "a long chain", when: "true" + strings.Repeat("&&true", 600), want: "1:"},
		{name: "a wide list", when: "1 in [" + strings.Repeat("1,", 1000) + "1]", want: "1:"},
		{name: "three loops", when: fixed + `jwt.claims.a.exists(x, jwt.claims.a.exists(y, jwt.claims.a.exists(z, x == y && y == z)))`, want: "1:"},
		{name: "two loops over literals within one over claims", when: fixed + `jwt.claims.a.all(x, jwt.claims.b.all(y, x.contains(y) && y.contains(x) && jwt.claims.c in [x, y]))`, want: "could cost"},
		{name: "texts that grow", when: `(` + strings.Repeat(`request.path + `, 300) + `"").contains("x")`, want: "1:"},
		{name: "unclosed text", when: `peer.id == "`, want: "1:12: "},
		{name: "control characters", when: "peer.id == 'a\x00'", want: ""},
		{name: "not UTF-8", when: "peer.id == '\xff'", want: ""},
	} {
		for _, deny := range []bool{false, true} {
			_, errs := compileCondition(tt.when, deny)
			if tt.want == "" {
				continue // only that nothing breaks
			}
			got := ""
			for _, e := range errs {
				got += fmt.Sprintf("%d:%d: %s\n", e.line, e.column, e.text)
			}
			if (!deny || !tt.allowOnly) != strings.Contains(got, tt.want) {
				t.Errorf("%s: deny %t: %.200s\n  is refused for\n%s  want %q", tt.name, deny, tt.when, got, tt.want)
			}
			if len(errs) > maxIssues {
				t.Errorf("%s: %d mistakes", tt.name, len(errs))
			}
		}
		if tt.want == "" || tt.allowOnly {
			continue
		}
		r := asked(t, `{"a":"x"}`, `{"a":"x"}`)
		if tt.name == "empty" {
			continue // on the wire a rule without when has no condition
		}
		if d := compile(t, setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, tt.when))).Decide(r); d.Allowed {
			t.Errorf("%s: allowed by a condition that cannot be read", tt.name)
		}
		if d := compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, tt.when))).Decide(r); d.Allowed || d.Reason != ReasonUnsupported {
			t.Errorf("%s: a deny with it: %+v", tt.name, d)
		}
	}
}

// TestConditionsBesideTheRest holds what a rule needs beside its condition, and where the mistake is.
func TestConditionsBesideTheRest(t *testing.T) {
	const head = "kind: CallPolicy\nname: x\nservice: /s\n"
	for _, tt := range []struct{ doc, want string }{
		{"allow:\n  - from: [/a]\n    when: jwt.id == peer.id", `6:11: its condition reads jwt`},
		{"deny:\n  - from: [/a]\n    when: jwt.id != peer.id", `6:11: its condition reads jwt`},
		{"allow:\n  - from: [/a]\n    when: request.grpc_method == 'a.B/C'", `6:11: its condition reads request.grpc_method`},
		{"deny:\n  - from: [/a]\n    jwt: {audience: [s]}\n    when: peer.id == 'a'", `6:10: jwt in a deny`},
		// where a mistake in an expression stands
		{"allow:\n  - from: [/a]\n    when: |\n      peer.id == 'a' &&\n        nothing", `8:9: when: undeclared reference to 'nothing'`},
		{"allow:\n  - from: [/a]\n    when: |-\n\n      peer.id == 'a' &&\n\n      nothing", `10:7: when: undeclared reference to 'nothing'`},
		{"allow:\n  - from: [/a]\n    when: >\n      peer.id == 'a'\n      && nothing", `8:10: when: undeclared reference to 'nothing'`},
		{"allow:\n  - from: [/a]\n    when: peer.id == 'a'\n      && nothing", `7:10: when: undeclared reference to 'nothing'`},
		{"allow:\n  - from: [/a]\n    when: \"peer.id == \\\"a\\\" &&\n      nothing\"", `7:7: when: undeclared reference to 'nothing'`},
		{"allow:\n  - from: [/a]\n    when: 'peer.id == ''a'' && nothing'", `6:32: when: undeclared reference to 'nothing'`},
		{"allow:\n  - {from: [/a], when: \"nothing\"}", `5:25: when: undeclared reference to 'nothing'`},
		{"allow:\n  - from: [/a]\n    when: peer.id == 'é' && nothing", `6:29: when: undeclared reference to 'nothing'`},
		{"allow:\n  - from: [/a]\n    when: peer.id ==", `6:`},
	} {
		_, err := parse(head + tt.doc)
		if got := fmt.Sprint(err); !strings.HasPrefix(got, "p.yaml:"+tt.want) {
			t.Errorf("%s:\ngot  %s\nwant %s", tt.doc, got, tt.want)
		}
	}
	got, err := parse(head + "allow:\n  - from: [/a]\n    grpc: [a.B/*]\n    jwt: {audience: [s]}\n    when: request.grpc_method == 'a.B/C' && jwt.id == peer.id && peer.hint == 'x'\n  - from: [/a]\n    when: user.issuer == 'x'")
	if err != nil {
		t.Fatal(err)
	}
	if r := got.Rules[0]; fmt.Sprint(r.Requires) != "[grpc jwt when when.hint]" || r.WhenLine != 8 || r.WhenColumn != 11 || fmt.Sprint(got.Rules[1].Requires) != "[when when.user]" {
		t.Errorf("got %v", got)
	}
}

// TestCostIsLimitedWhenEvaluated holds that claims of a size that nobody estimated end an evaluation instead of holding up
// the decision.
func TestCostIsLimitedWhenEvaluated(t *testing.T) {
	many := `"` + strings.Repeat(`x","`, 4000) + `x"`
	r := asked(t, `{"a":[`+many+`],"b":[`+many+`]}`, "")
	for _, when := range []string{
		fixed + `jwt.claims.a.exists(x, x == "y" || "z" in jwt.claims.b)`,
		fixed + `jwt.claims.a.exists(x, jwt.claims.b.exists(y, x != y))`,
		fixed + `jwt.claims.a.all(x, jwt.claims.b.exists_one(y, x != y) == false)`,
	} {
		c, errs := compileCondition(when, false)
		if len(errs) > 0 {
			t.Fatalf("%s: %v", when, errs[0])
		}
		f := &facts{token: r.Token, peer: r.Peer}
		if held, _, err := c.eval(f); held || err == nil || !strings.Contains(err.Error(), "cost limit") {
			t.Errorf("%s: %t, %v", when, held, err)
		}
		if compile(t, setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, when))).Decide(r).Allowed {
			t.Errorf("%s: allowed", when)
		}
		if compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, when))).Decide(r).Allowed {
			t.Errorf("%s: not denied", when)
		}
	}
}

// TestConditionsOfACallAreCounted holds that a call that fits endless conditional rules is denied, with what it would find
// by itself or not.
func TestConditionsOfACallAreCounted(t *testing.T) {
	for _, effect := range []policyv1.Effect{policyv1.Effect_EFFECT_ALLOW, policyv1.Effect_EFFECT_DENY} {
		rules := []*policyv1.Rule{}
		for i := range 3000 {
			rules = append(rules, ruleWhen(effect, fmt.Sprintf(`request.path == "/%d"`, i)))
		}
		p := compile(t, setOf(append(rules, openAllow)...))
		if d := p.Decide(asked(t, "", "")); d.Allowed || d.Reason != ReasonTooManyConditions {
			t.Errorf("%v: %+v", effect, d)
		}
		r := call(t, "/b", "/s", "GET /")
		if d := p.Decide(r); d.Reason != ReasonNoAllow {
			t.Errorf("another caller: %+v", d)
		}
	}
}

// TestDenyReadsPathsWide holds that a condition of a deny covers the spellings that denies cover, and one of an allow only
// what it says.
func TestDenyReadsPathsWide(t *testing.T) {
	const when = `request.path == "/admin!"`
	allow, deny := compile(t, setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, when))), compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, when)))
	not := compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, `!(request.path == "/a/")`)))
	for _, tt := range []struct {
		path          string
		allowed, left bool
	}{
		{"/admin!", true, false},
		{"/admin%21", false, false},
		{"/admin!/", false, false},
		{"/admin!?x", true, false},
		{"/Admin!", false, true},
		{"/admin!x", false, true},
	} {
		r := call(t, "/a", "/s", "GET "+tt.path)
		if a, d := allow.Decide(r), deny.Decide(r); a.Allowed != tt.allowed || d.Allowed != tt.left {
			t.Errorf("%s: the allow %t, want %t; beside the deny %t, want %t", tt.path, a.Allowed, tt.allowed, d.Allowed, tt.left)
		}
	}
	if not.Decide(call(t, "/a", "/s", "GET /a/")).Allowed {
		t.Error("a deny that is true for another spelling of the path does not hold")
	}
}

// TestConditionsAtTLS holds that of a connection a rule with a condition allows nothing and a deny with one refuses, that
// its peer may come in, and that methods that a condition reads count for overrides.
func TestConditionsAtTLS(t *testing.T) {
	allow := compile(t, setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, `true`)))
	deny := compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, `false`)))
	tls := call(t, "/a", "/s", "tls")
	if d := allow.Decide(tls); d.Allowed || d.Reason != ReasonCondition {
		t.Errorf("an allow with a condition: %+v", d)
	}
	if d := deny.Decide(tls); d.Allowed || d.Reason != ReasonDenied {
		t.Errorf("a deny with a condition: %+v", d)
	}
	if !allow.MightAllow(tls.Service, tls.Peer).Allowed || !deny.MightAllow(tls.Service, tls.Peer).Allowed {
		t.Error("a peer that a condition might let in is turned away, or one that a condition might not refuse")
	}
	r := call(t, "/a", "/s", "GET /")
	r.HasMethodOverride = true
	if d := deny.Decide(r); !d.Allowed {
		t.Errorf("an override where no deny is about methods: %+v", d)
	}
	if d := compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, `request.method == "DELETE"`))).Decide(r); d.Reason != ReasonMethodOverride {
		t.Errorf("an override where a deny is about methods: %+v", d)
	}
}

// TestDenyByToken holds that a deny that reads a JWT-SVID holds without one, and asks the enforcement point for it.
func TestDenyByToken(t *testing.T) {
	p := compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, fixed+`jwt.claims.banned == true`)))
	if got := p.Audiences(id(t, "/s"), id(t, "/a")); len(got) != 1 || got[0] != "s" {
		t.Errorf("Audiences is %q", got)
	}
	for _, tt := range []struct {
		jwt     string
		allowed bool
	}{{`{"banned":false}`, true}, {`{"banned":true}`, false}, {`{"banned":"false"}`, false}, {`{}`, false}, {"", false}} {
		if d := p.Decide(asked(t, tt.jwt, "")); d.Allowed != tt.allowed {
			t.Errorf("%s: %+v", tt.jwt, d)
		}
	}
	r := asked(t, `{"banned":false}`, "")
	r.Token.ID = id(t, "/b")
	if p.Decide(r).Allowed {
		t.Error("the JWT-SVID of another caller is looked at")
	}
	r = asked(t, `{"banned":false}`, "")
	r.Token.Audience = []string{"other"}
	if p.Decide(r).Allowed {
		t.Error("a JWT-SVID for another audience is looked at")
	}
}

// TestReadersOfAnotherVersion holds that a rule that says it has a condition and comes without one grants nothing.
func TestReadersOfAnotherVersion(t *testing.T) {
	lost := ruleWhen(policyv1.Effect_EFFECT_ALLOW, "true")
	lost.When = ""
	if d := compile(t, setOf(lost)).Decide(asked(t, "", "")); d.Allowed {
		t.Errorf("an allow that lost its condition: %+v", d)
	}
	lost.Effect = policyv1.Effect_EFFECT_DENY
	if d := compile(t, setOf(openAllow, lost)).Decide(asked(t, "", "")); d.Allowed {
		t.Errorf("a deny that lost its condition: %+v", d)
	}
	newer := ruleWhen(policyv1.Effect_EFFECT_ALLOW, `peer.age(5)`)
	if d := compile(t, setOf(newer)).Decide(asked(t, "", "")); d.Allowed {
		t.Errorf("a function that is not known: %+v", d)
	}
}

// TestHints holds that a hint is known of the callers that the policy names, and unclear if it names two.
func TestHints(t *testing.T) {
	set := setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, `peer.hint == "internal"`), &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/b"}, When: `peer.hint == "internal"`})
	p := compile(t, set)
	a, b := asked(t, "", ""), call(t, "/b", "/s", "GET /")
	if !p.Decide(a).Allowed || p.Decide(b).Allowed || !p.WithPeerHint(b.Peer, "internal").Decide(b).Allowed || p.WithPeerHint(a.Peer, "x").Decide(a).Allowed {
		t.Error("hints are not those of the policy, or cannot be tried out")
	}
	set.Policies[0].PeerHints = append(set.Policies[0].PeerHints, &policyv1.PeerHint{SpiffeId: a.Peer.String(), Hint: "other"})
	if compile(t, set).Decide(a).Allowed {
		t.Error("a caller with two hints has one of them")
	}
}

// TestExplainNamesTheTerm holds that an explanation says which part of a condition is not true, and holds no value of the
// call.
func TestExplainNamesTheTerm(t *testing.T) {
	const when = fixed + `jwt.claims.level >= 3 && request.headers["x-tenant"] == "blue"`
	p := compile(t, setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, when)))
	for _, tt := range []struct {
		jwt    string
		header string
		want   string
	}{
		{`{"level":2}`, "blue", `jwt.claims.level >= 3 is false`},
		{`{"level":"hidden"}`, "blue", `jwt.claims.level >= 3: no such overload`},
		{`{}`, "blue", `jwt.claims.level >= 3: no such key: level`},
		{`{"level":3}`, "hidden", `request.headers["x-tenant"] == "blue" is false`},
		{`{"level":3}`, "hidden,hidden", `the header x-tenant has a comma`},
	} {
		r := asked(t, tt.jwt, "")
		r.Headers = http.Header{"X-Tenant": {tt.header}}
		e := p.Explain(r).String()
		if !strings.Contains(e, tt.want) || strings.Contains(e, "hidden") || !strings.Contains(e, "would allow it if its condition held") {
			t.Errorf("%s, %s:\n%s\nwant %s", tt.jwt, tt.header, e, tt.want)
		}
	}
	deny := compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, when)))
	if e := deny.Explain(asked(t, `{}`, "")).String(); !strings.Contains(e, "its condition meets an error, which counts as true in a deny: jwt.claims.level >= 3") {
		t.Error(e)
	}
}
