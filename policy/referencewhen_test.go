package policy

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// The reference for conditions: what each of a few expressions means, written in Go, and how CEL joins them. It reads the
// text of a condition by itself.

// A truth is what an expression comes to.
type truth int

const (
	refFalse truth = iota
	refTrue
	refError
)

func truthOf(b bool) truth {
	if b {
		return refTrue
	}
	return refFalse
}

// A refCall is what a condition of one rule can ask for.
type refCall struct {
	r    *Request
	rule *policyv1.Rule
	path string
}

func (c refCall) header(name string) (string, bool) {
	lines := c.r.Headers.Values(name)
	if len(lines) != 1 || strings.ContainsAny(lines[0], ", ") {
		return "", false
	}
	return lines[0], true
}

// token is the JWT-SVID that the rule takes, if it is there.
func (c refCall) token() *Token {
	if t := c.r.Token; t != nil && c.rule.Jwt != nil && (t.ID == c.r.Peer || c.rule.Jwt.Subject == policyv1.SubjectBinding_SUBJECT_BINDING_ANY) {
		for _, a := range t.Audience {
			for _, want := range c.rule.Jwt.Audience {
				if a == want {
					return t
				}
			}
		}
	}
	return nil
}

// refAtoms are the expressions of which conditions are made.
var refAtoms = map[string]func(refCall) truth{
	`peer.trust_domain == "example.org"`: func(c refCall) truth { return truthOf(c.r.Peer.TrustDomain().Name() == "example.org") },
	`peer.id.endsWith("/b")`:             func(c refCall) truth { return truthOf(strings.HasSuffix(c.r.Peer.String(), "/b")) },
	`request.method == "POST"`:           func(c refCall) truth { return truthOf(c.r.Method == "POST") },
	`request.path == "/a"`:               func(c refCall) truth { return truthOf(c.path == "/a") },
	`request.path.contains("!")`:         func(c refCall) truth { return truthOf(strings.Contains(c.path, "!")) },
	`request.headers["x-a"] == "1"`: func(c refCall) truth {
		v, ok := c.header("X-A")
		if !ok {
			return refError
		}
		return truthOf(v == "1")
	},
	`"x-a" in request.headers`: func(c refCall) truth { return truthOf(len(c.r.Headers.Values("X-A")) > 0) },
	`jwt.trust_domain == "example.org" && jwt.claims.n == 1`: func(c refCall) truth {
		t := c.token()
		switch {
		case t == nil:
			return refError
		case t.ID.TrustDomain().Name() != "example.org":
			return refFalse
		}
		n, ok := t.Claims["n"].(json.Number)
		if !ok {
			return refError
		}
		f, err := n.Float64()
		if err != nil || n == "1.00000000000000000001" {
			return refError
		}
		return truthOf(f == 1)
	},
	`user.issuer == "u" && "x" in user.claims.g`: func(c refCall) truth {
		if c.r.User == nil {
			return refError
		}
		if c.r.User.Issuer != "u" {
			return refFalse
		}
		list, ok := c.r.User.Claims["g"].([]any)
		result := refFalse
		if !ok {
			return refError
		}
		for _, item := range list {
			switch item {
			case "x":
				return refTrue
			default:
				if _, text := item.(string); !text {
					result = refError
				}
			}
		}
		return result
	},
}

// refAtomNames are the atoms in a fixed order, so that a seed means the same each time.
var refAtomNames = []string{
	`peer.trust_domain == "example.org"`, `peer.id.endsWith("/b")`, `request.method == "POST"`, `request.path == "/a"`, `request.path.contains("!")`,
	`request.headers["x-a"] == "1"`, `"x-a" in request.headers`, `jwt.trust_domain == "example.org" && jwt.claims.n == 1`, `user.issuer == "u" && "x" in user.claims.g`,
}

// refTruth reads (E && E), (E || E), !E and atoms in brackets, as dice write them.
func refTruth(s string, c refCall) (truth, string) {
	switch {
	case strings.HasPrefix(s, "!"):
		v, rest := refTruth(s[1:], c)
		switch v {
		case refTrue:
			return refFalse, rest
		case refFalse:
			return refTrue, rest
		}
		return v, rest
	case strings.HasPrefix(s, "(("), strings.HasPrefix(s, "(!"):
		a, rest := refTruth(s[1:], c)
		op := rest[1:3]
		b, rest := refTruth(rest[4:], c)
		rest = strings.TrimPrefix(rest, ")")
		decides := refFalse
		if op == "||" {
			decides = refTrue
		}
		switch {
		case a == decides || b == decides:
			return decides, rest
		case a == refError || b == refError:
			return refError, rest
		}
		return a, rest
	}
	for _, atom := range refAtomNames {
		if rest, found := strings.CutPrefix(s, "("+atom+")"); found {
			return refAtoms[atom](c), rest
		}
	}
	panic("the reference cannot read " + s)
}

// refHolds says whether the condition of a rule holds.
func refHolds(rule *policyv1.Rule, r *Request) bool {
	if rule.When == "" {
		return true
	}
	path, _, _ := strings.Cut(r.Path, "?")
	deny := rule.Effect != policyv1.Effect_EFFECT_ALLOW
	v, rest := refTruth(rule.When, refCall{r, rule, path})
	if rest != "" {
		panic("the reference has left " + rest)
	}
	if !deny {
		return v == refTrue
	}
	plain, err := url.PathUnescape(path)
	if err != nil {
		plain = path
	}
	if trimmed := strings.TrimSuffix(plain, "/"); trimmed != "" {
		plain = trimmed
	}
	w, _ := refTruth(rule.When, refCall{r, rule, plain})
	return v != refFalse || w != refFalse
}

// when makes a condition, whose negations are around what needs no issuer.
func (d dice) when(depth int) string {
	if depth == 0 || d.IntN(3) == 0 {
		atom := pick(d, refAtomNames...)
		if d.IntN(5) == 0 && !strings.Contains(atom, "claims") {
			return "!(" + atom + ")"
		}
		return "(" + atom + ")"
	}
	return "(" + d.when(depth-1) + pick(d, " && ", " || ") + d.when(depth-1) + ")"
}

// condition gives a rule a condition.
func (d dice) condition(r *policyv1.Rule) {
	r.When = d.when(2)
	r.Requires = append(r.Requires, featureWhen)
	switch needs := strings.Contains(r.When, "jwt."); {
	case needs && r.Jwt == nil:
		r.Jwt = &policyv1.JWTMatch{Audience: []string{pick(d, "x", "y")}, Subject: pick(d, policyv1.SubjectBinding_SUBJECT_BINDING_PEER, policyv1.SubjectBinding_SUBJECT_BINDING_ANY)}
	case !needs && r.Effect != policyv1.Effect_EFFECT_ALLOW:
		r.Jwt = nil
	}
}

// asks gives a request what conditions ask for.
func (d dice) asks(r *Request) {
	h := make(http.Header)
	for range d.IntN(3) {
		h.Add("X-A", pick(d, "1", "1", "2", "1,2", " 1"))
	}
	r.Headers = h
	if r.Token != nil {
		r.Token.Claims = pick(d, map[string]any{"n": json.Number("1")}, map[string]any{"n": json.Number("1.0")}, map[string]any{"n": json.Number("2")},
			map[string]any{"n": json.Number("1.00000000000000000001")}, map[string]any{"n": "1"}, map[string]any{"n": nil}, map[string]any{})
	}
	if d.IntN(2) == 0 {
		r.User = &User{Issuer: pick(d, "u", "v"), Claims: pick(d, map[string]any{"g": []any{"x"}}, map[string]any{"g": []any{"y", "x"}}, map[string]any{"g": []any{json.Number("1"), "x"}},
			map[string]any{"g": []any{"y", json.Number("1")}}, map[string]any{"g": []any{}}, map[string]any{"g": "x"}, nil)}
	}
}

// FuzzCompileCondition holds that whatever is taken for a condition reads claims of a named issuer only: its answer does not
// change with the claims of others.
func FuzzCompileCondition(f *testing.F) {
	for _, s := range refAtomNames {
		f.Add(s)
	}
	f.Add(`!(jwt.trust_domain == "example.org" && jwt.claims.n == 1)`)
	f.Add(`jwt.claims.a.exists(x, x == "y") && (jwt.trust_domain == "example.org" ? true : false)`)
	f.Add(`[1,2].all(i, i in [1,2]) ? has(user.claims.x) : user.issuer == "u"`)
	f.Add(strings.Repeat("(", 100))
	f.Add(`request.path.matches("^(a+)+$")`)
	f.Fuzz(func(t *testing.T, when string) {
		for _, deny := range []bool{false, true} {
			c, errs := compileCondition(when, deny)
			if (c == nil) != (len(errs) > 0) {
				t.Fatalf("%q: a condition %t, and %d mistakes", when, c != nil, len(errs))
			}
			lines := strings.Split(when, "\n")
			for _, e := range errs {
				if e.line < 1 || e.line > len(lines)+1 || e.column < 1 {
					t.Fatalf("%q: a mistake at %d:%d: %s", when, e.line, e.column, e.text)
				}
			}
			if c == nil {
				continue
			}
			var answers []bool
			for _, n := range []any{json.Number("1"), "1", nil, []any{"y"}, map[string]any{"a": "y"}} {
				r := asked(t, "", "")
				r.Token = &Token{ID: id(t, "spiffe://unnamed.invalid.example/a"), Audience: []string{"s"}, Claims: map[string]any{"n": n, "a": n, "x": n}}
				r.User = &User{Issuer: "unnamed", Claims: map[string]any{"n": n, "g": n, "x": n}}
				if strings.Contains(when, "unnamed") {
					r.Token, r.User = nil, nil
				}
				held, _, err := c.eval(&facts{peer: r.Peer, method: r.Method, path: "/a", headers: headerMap{r.Headers}, token: r.Token, user: r.User})
				answers = append(answers, held && err == nil)
			}
			for _, a := range answers {
				if a != answers[0] {
					t.Fatalf("%q changes its answer with claims of an issuer that it does not name", when)
				}
			}
		}
	})
}
