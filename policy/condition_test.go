package policy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// claims reads claims as a validator of tokens does, numbers as json.Number.
func claims(t testing.TB, text string) map[string]any {
	t.Helper()
	var c map[string]any
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&c); err != nil {
		t.Fatalf("claims %s: %v", text, err)
	}
	return c
}

// asked is a call of /a to /s with a JWT-SVID of /a, a user, a hint and headers.
func asked(t testing.TB, jwt, user string, headers ...string) *Request {
	t.Helper()
	r := call(t, "/a", "/s", "GET /v1/items?q=1")
	h := make(http.Header)
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		h.Add(name, value)
	}
	r.Headers = h
	if jwt != "" {
		r.Token = &Token{ID: r.Peer, Audience: []string{"s"}, Claims: claims(t, jwt)}
	}
	if user != "" {
		r.User = &User{Issuer: "https://login.example", Claims: claims(t, user)}
	}
	return r
}

// ruleWhen is one rule for /a with a condition; it has a jwt if the condition reads one.
func ruleWhen(effect policyv1.Effect, when string) *policyv1.Rule {
	r := &policyv1.Rule{Effect: effect, From: []string{"spiffe://example.org/a"}, When: when, Requires: []string{"when"}}
	if strings.Contains(when, "jwt.") {
		r.Jwt = &policyv1.JWTMatch{Audience: []string{"s"}, Subject: policyv1.SubjectBinding_SUBJECT_BINDING_PEER}
	}
	return r
}

func setOf(rules ...*policyv1.Rule) *policyv1.PolicySet {
	return &policyv1.PolicySet{Format: Format, TrustDomain: "example.org", Policies: []*policyv1.Policy{{
		Name: "p", Services: []string{"spiffe://example.org/s"}, Mode: policyv1.Mode_MODE_ENFORCE, Rules: rules,
		PeerHints: []*policyv1.PeerHint{{SpiffeId: "spiffe://example.org/a", Hint: "internal"}},
	}}}
}

var openAllow = &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/a"}}

const fixed = `jwt.trust_domain == "example.org" && `
const fixedUser = `user.issuer == "https://login.example" && `

// TestConditions holds that a condition is what it says in an allow and in a deny; an error is false in the one and true
// in the other.
func TestConditions(t *testing.T) {
	const yes, no, fails = "yes", "no", "error"
	for _, tt := range []struct {
		when, jwt, user string
		headers         []string
		want            string
	}{
		{when: `peer.id == "spiffe://example.org/a"`, want: yes},
		{when: `peer.id == "spiffe://example.org/b"`, want: no},
		{when: `peer.trust_domain == "example.org" && peer.svid_kind == "x509-svid"`, want: yes},
		{when: `peer.hint == "internal"`, want: yes},
		{when: `peer.hint != "internal"`, want: no},
		{when: `request.method == "GET" && request.path == "/v1/items"`, want: yes},
		{when: `request.path.startsWith("/v1/") && request.path.endsWith("items") && request.path.contains("/it")`, want: yes},
		{when: `request.path.matches("^/v[0-9]+/items$")`, want: yes},
		{when: `request.path.matches("^/v[0-9]+$")`, want: no},
		{when: `size(request.path) == 9`, want: yes},
		{when: `peer.id == "spiffe://" + peer.trust_domain + "/a"`, want: yes},
		{when: `true ? false : true`, want: no},

		// headers
		{when: `request.headers["x-tenant"] == "blue"`, headers: []string{"X-Tenant: blue"}, want: yes},
		{when: `request.headers["x-tenant"] == "blue"`, headers: []string{"X-Tenant: red"}, want: no},
		{when: `request.headers["x-tenant"] == "blue"`, want: fails},
		{when: `request.headers["x-tenant"] != "blue"`, want: fails},
		{when: `request.headers["x-tenant"] == "blue"`, headers: []string{"X-Tenant: blue", "X-Tenant: blue"}, want: fails},
		{when: `request.headers["x-tenant"] == "blue"`, headers: []string{"X-Tenant: blue", "X-Tenant: red"}, want: fails},
		{when: `request.headers["x-tenant"] == "blue"`, headers: []string{"X-Tenant: blue,red"}, want: fails},
		{when: `request.headers["x-tenant"] == "blue"`, headers: []string{"X-Tenant:  blue"}, want: fails},
		{when: `request.headers["x-tenant"] == "blue"`, headers: []string{"X-Tenant: " + strings.Repeat("b", 9000)}, want: fails},
		{when: `"x-tenant" in request.headers`, want: no},
		{when: `!("x-tenant" in request.headers)`, want: yes},
		{when: `"x-tenant" in request.headers`, headers: []string{"X-Tenant: a, b", "X-Tenant: c"}, want: yes},
		{when: `"x-a" in request.headers || request.headers["x-b"] == "1"`, headers: []string{"X-A: 1"}, want: yes},

		// JWT-SVIDs
		{when: fixed + `"documents.archive" in jwt.claims.scope.split(" ")`, jwt: `{"scope":"a documents.archive"}`, want: yes},
		{when: fixed + `"documents.archive" in jwt.claims.scope.split(" ")`, jwt: `{"scope":"documents.archive2"}`, want: no},
		{when: fixed + `"documents.archive" in jwt.claims.scope.split(" ")`, jwt: `{"scope":["documents.archive"]}`, want: fails},
		{when: fixed + `"documents.archive" in jwt.claims.scope.split(" ")`, jwt: `{}`, want: fails},
		{when: fixed + `jwt.claims.a == "x"`, want: fails}, // no token
		{when: `jwt.id == peer.id`, jwt: `{}`, want: yes},
		{when: `jwt.trust_domain == "other.example" && jwt.claims.a == "x"`, jwt: `{"a":"x"}`, want: no},
		{when: `(jwt.trust_domain == "other.example" && jwt.claims.a == "x") || (jwt.trust_domain == "example.org" && jwt.claims.b == "y")`, jwt: `{"a":"z","b":"y"}`, want: yes},
		{when: fixed + `jwt.claims.a == "x"`, jwt: `{"a":5}`, want: fails}, // mistyped
		{when: fixed + `jwt.claims.a != "x"`, jwt: `{"a":5}`, want: fails}, // and not unequal either
		{when: fixed + `jwt.claims.a == true`, jwt: `{"a":"true"}`, want: fails},
		{when: fixed + `jwt.claims.a`, jwt: `{"a":true}`, want: yes},
		{when: fixed + `jwt.claims.a`, jwt: `{"a":"true"}`, want: fails},
		{when: fixed + `jwt.claims.a == "x"`, jwt: `{"a":null}`, want: fails},
		{when: fixed + `jwt.claims.a.b == "x"`, jwt: `{"a":{"b":"x"}}`, want: yes},
		{when: fixed + `jwt.claims["https://example.org/a"] == "x"`, jwt: `{"https://example.org/a":"x"}`, want: yes},
		{when: fixed + `has(jwt.claims.a)`, jwt: `{"a":null}`, want: yes},
		{when: fixed + `has(jwt.claims.a)`, jwt: `{}`, want: no},
		{when: fixed + `has(jwt.claims.a.b)`, jwt: `{"a":"b"}`, want: fails},
		{when: fixed + `"a" in jwt.claims`, jwt: `{"a":1}`, want: yes},
		{when: fixed + `"b" in jwt.claims`, jwt: `{"a":1}`, want: no},
		{when: fixed + `"x" in jwt.claims.roles`, jwt: `{"roles":["y","x"]}`, want: yes},
		{when: fixed + `"x" in jwt.claims.roles`, jwt: `{"roles":["y"]}`, want: no},
		{when: fixed + `"x" in jwt.claims.roles`, jwt: `{"roles":[]}`, want: no},
		{when: fixed + `"x" in jwt.claims.roles`, jwt: `{"roles":"x"}`, want: fails},
		{when: fixed + `"x" in jwt.claims.roles`, jwt: `{"roles":[1]}`, want: fails},
		{when: fixed + `"x" in jwt.claims.roles`, jwt: `{"roles":[1,"x"]}`, want: yes},
		{when: fixed + `"x" in jwt.claims.roles`, jwt: `{"roles":[["x"]]}`, want: fails},
		{when: fixed + `jwt.claims.roles == ["x"]`, jwt: `{"roles":["x"]}`, want: fails},
		{when: fixed + `jwt.claims.role in ["x", "y"]`, jwt: `{"role":"y"}`, want: yes},
		{when: fixed + `jwt.claims.role in ["x", "y"]`, jwt: `{"role":7}`, want: fails},
		{when: fixed + `jwt.claims.roles.exists(r, r.startsWith("adm"))`, jwt: `{"roles":["x","admin"]}`, want: yes},
		{when: fixed + `jwt.claims.roles.exists(r, r.startsWith("adm"))`, jwt: `{"roles":["x"]}`, want: no},
		{when: fixed + `jwt.claims.roles.exists(r, r.startsWith("adm"))`, jwt: `{"roles":[1]}`, want: fails},
		{when: fixed + `jwt.claims.roles.all(r, r in ["x", "y"])`, jwt: `{"roles":["x","y"]}`, want: yes},
		{when: fixed + `jwt.claims.roles.exists_one(r, r == "x")`, jwt: `{"roles":["x","x"]}`, want: no},
		{when: fixed + `jwt.claims.roles[0] == "x"`, jwt: `{"roles":["x"]}`, want: yes},
		{when: fixed + `jwt.claims.roles[1] == "x"`, jwt: `{"roles":["x"]}`, want: fails},
		{when: fixed + `jwt.claims.mail.lowerAscii() == "a@b"`, jwt: `{"mail":"A@B"}`, want: yes},
		{when: fixed + `jwt.claims.mail.split("")[0] == "a"`, jwt: `{"mail":"a"}`, want: fails},

		// numbers
		{when: fixed + `jwt.claims.n == 5`, jwt: `{"n":5}`, want: yes},
		{when: fixed + `jwt.claims.n == 5`, jwt: `{"n":5.0}`, want: yes},
		{when: fixed + `jwt.claims.n == 5`, jwt: `{"n":50e-1}`, want: yes},
		{when: fixed + `jwt.claims.n == 5.0`, jwt: `{"n":5}`, want: yes},
		{when: fixed + `jwt.claims.n >= 5`, jwt: `{"n":5.5}`, want: yes},
		{when: fixed + `jwt.claims.n > 5`, jwt: `{"n":"6"}`, want: fails},
		{when: fixed + `jwt.claims.n == 5`, jwt: `{"n":"5"}`, want: fails},
		{when: fixed + `jwt.claims.n == 9007199254740993`, jwt: `{"n":9007199254740993}`, want: yes},
		{when: fixed + `jwt.claims.n == 9007199254740993`, jwt: `{"n":9007199254740992}`, want: no},
		{when: fixed + `jwt.claims.n == 9007199254740993`, jwt: `{"n":9007199254740992.0}`, want: no},
		{when: fixed + `jwt.claims.n == jwt.claims.m`, jwt: `{"n":9007199254740993, "m":9007199254740992.0}`, want: no},
		{when: fixed + `jwt.claims.n == 18446744073709551615u`, jwt: `{"n":18446744073709551615}`, want: yes},
		{when: fixed + `jwt.claims.n == 18446744073709551615u`, jwt: `{"n":18446744073709551614}`, want: no},
		{when: fixed + `jwt.claims.n > 5`, jwt: `{"n":18446744073709551616}`, want: fails},
		{when: fixed + `jwt.claims.n > 5`, jwt: `{"n":1e19}`, want: yes},
		{when: fixed + `jwt.claims.n < 5`, jwt: `{"n":-9223372036854775808}`, want: yes},
		{when: fixed + `jwt.claims.n < 5`, jwt: `{"n":-9223372036854775809}`, want: fails},
		{when: fixed + `jwt.claims.n > 5`, jwt: `{"n":1e400}`, want: fails},
		{when: fixed + `jwt.claims.n > 5`, jwt: `{"n":1e999999999999}`, want: fails},
		{when: fixed + `jwt.claims.n == 0`, jwt: `{"n":-0.0}`, want: yes},
		{when: fixed + `jwt.claims.n < 1`, jwt: `{"n":1e-400}`, want: fails},
		{when: fixed + `jwt.claims.n == 0.1`, jwt: `{"n":0.1}`, want: yes},
		{when: fixed + `jwt.claims.n == 0.1`, jwt: `{"n":0.1000000000000000055}`, want: fails},
		{when: fixed + `jwt.claims.n == 0.1`, jwt: `{"n":` + "0." + strings.Repeat("1", 70) + `}`, want: fails},

		// users
		{when: fixedUser + `"editors" in user.claims.groups`, user: `{"groups":["editors"]}`, want: yes},
		{when: fixedUser + `"editors" in user.claims.groups`, user: `{"groups":["readers"]}`, want: no},
		{when: fixedUser + `"editors" in user.claims.groups`, want: fails},
		{when: `user.issuer == "https://other.example" && user.claims.a == "x"`, user: `{"a":"x"}`, want: no},

		// && and || look past an error to what decides without it
		{when: `peer.trust_domain == "example.org" || request.headers["x"] == "1"`, want: yes},
		{when: `request.headers["x"] == "1" || peer.trust_domain == "example.org"`, want: yes},
		{when: `request.headers["x"] == "1" && peer.trust_domain == "b.example"`, want: no},
	} {
		r := asked(t, tt.jwt, tt.user, tt.headers...)
		allow := compile(t, setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, tt.when)))
		deny := compile(t, setOf(openAllow, ruleWhen(policyv1.Effect_EFFECT_DENY, tt.when)))
		a, d := allow.Decide(r), deny.Decide(r)
		if b := allow.exactRule(t).broken; b != "" {
			t.Errorf("%s: does not compile: %s", tt.when, b)
			continue
		}
		got := "no"
		switch {
		case a.Allowed && d.Allowed:
			got = "an allow that holds and a deny that does not"
		case a.Allowed:
			got = yes
		case !d.Allowed:
			got = fails
		}
		if got != tt.want {
			t.Errorf("%s\n  with jwt %s user %s headers %.80q is %s, want %s\n%s\n%s", tt.when, tt.jwt, tt.user, tt.headers, got, tt.want, allow.Explain(r), deny.Explain(r))
		}
		if e := fmt.Sprint(allow.Explain(r), deny.Explain(r)); strings.Contains(e, "secret") {
			t.Errorf("an explanation holds a claim:\n%s", e)
		}
	}
}

// exactRule is the one rule of a policy for /s.
func (p *Policies) exactRule(t testing.TB) *rule {
	t.Helper()
	return newRule(p.set.Policies[0], 0, 0, conditionsAfter(nil))
}

// TestConditionsMakeNoNewValues holds that a decision by a claim, the service's trust domain, a usual method and the kind of
// SVID allocates nothing, and that other trust domains and methods are still told apart.
func TestConditionsMakeNoNewValues(t *testing.T) {
	const when = fixed + `jwt.claims.level >= 3 && peer.trust_domain == "example.org" && peer.svid_kind == "x509-svid" && request.method == "GET"`
	p := compile(t, setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, when)))
	r := asked(t, `{"level":5}`, "")
	if d := p.Decide(r); !d.Allowed {
		t.Fatalf("denied: %s", p.Explain(r))
	}
	least := 1e9 // what is borrowed may be gone: after a collection, and now and then under the race detector
	for range 100 {
		least = min(least, testing.AllocsPerRun(1, func() { p.Decide(r) }))
	}
	if least != 0 {
		t.Errorf("%v allocations", least)
	}
	for name, change := range map[string]func(*Request){
		"method": func(r *Request) { r.Method = "BREW" },
		"lower":  func(r *Request) { r.Method = "get" },
		"kind":   func(r *Request) { r.PeerSVID = SVIDWIT },
		"none":   func(r *Request) { r.PeerSVID = 9 },
	} {
		other := *r
		change(&other)
		if p.Decide(&other).Allowed {
			t.Errorf("another %s is allowed", name)
		}
	}
	foreign := ruleWhen(policyv1.Effect_EFFECT_ALLOW, `peer.trust_domain == "example.org"`)
	foreign.From = []string{"spiffe://other.example/a"}
	other := call(t, "/a", "/s", "GET /")
	other.Peer = spiffeid.RequireFromString("spiffe://other.example/a")
	if compile(t, setOf(foreign)).Decide(other).Allowed {
		t.Error("a peer of another trust domain has that of the service")
	}
}
