package policy

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// The reference is the meaning of policies written down a second time, slowly: regular expressions over whole strings,
// loops over all rules. It shares no code with the package.

func refID(pattern string, wide bool) *regexp.Regexp {
	e := regexp.QuoteMeta(pattern)
	if cut, found := strings.CutSuffix(e, `/\*\*`); found {
		e = cut + `/.+`
		if wide {
			e = cut + `(/.+)?`
		}
	}
	return regexp.MustCompile(`^` + strings.ReplaceAll(e, `\*`, `[^/]+`) + `$`)
}

func refIDMatches(pattern string, id spiffeid.ID, wide bool) bool {
	if !refID(pattern, wide).MatchString(id.String()) {
		return false
	}
	underSpire := id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/")
	wildFirst := strings.HasPrefix(strings.TrimPrefix(pattern, "spiffe://"+id.TrustDomain().Name()), "/*")
	return wide || !underSpire || !wildFirst
}

func refPath(pattern string) *regexp.Regexp {
	e := regexp.QuoteMeta(pattern)
	if cut, found := strings.CutSuffix(e, `/\*\*`); found {
		e = cut + `/[^/]+(/.*)?`
	}
	return regexp.MustCompile(`^(?s:` + strings.ReplaceAll(e, `\*`, `[^/]+`) + `)$`)
}

// refPathMatches compares for a deny what is left after decoding and without trailing slashes.
func refPathMatches(pattern, path string, wide bool) bool {
	if !wide {
		return refPath(pattern).MatchString(path)
	}
	decode := func(s string) string {
		d, err := url.PathUnescape(s)
		if err != nil {
			panic(err)
		}
		return strings.TrimSuffix(d, "/")
	}
	const asterisk = "\x01" // one that is no wildcard
	pattern = regexp.MustCompile(`%2[aA]`).ReplaceAllString(pattern, asterisk)
	path = strings.ReplaceAll(decode(path), "*", asterisk)
	if base, tree := strings.CutSuffix(pattern, "/**"); tree && refPath(decode(base)).MatchString(path) {
		return true
	}
	return refPath(decode(pattern)).MatchString(path)
}

var (
	refEscape   = regexp.MustCompile(`%(?:[^0-9A-Fa-f]|.[^0-9A-Fa-f]|.?$)|%(?:[01].|7[fF])|%(?:3[0-9]|4[1-9a-fA-F]|5[0-9aA]|6[1-9a-fA-F]|7[0-9aA])|%(?i:2d|2e|5f|7e|2f|5c|3b|25|23|3f)`)
	refGRPC     = regexp.MustCompile(`^application/grpc(\+[A-Za-z0-9!#$&^_.+-]+)?$`)
	refGRPCLike = regexp.MustCompile(`^application/grpc(;|$|\+.*[^A-Za-z0-9!#$&^_.+-]|\+[A-Za-z0-9!#$&^_.+-]+$)`)
	refBytes    = regexp.MustCompile(`^/[!-~]*$`)
)

func refPathRefused(path string) bool {
	if len(path) > 8192 || !refBytes.MatchString(path) || strings.ContainsAny(path, `\;#`) || strings.Contains(path, "//") || refEscape.MatchString(path) {
		return true
	}
	return slices.ContainsFunc(strings.Split(path, "/"), func(s string) bool { return s == "." || s == ".." })
}

type refAnswer struct{ allowed, shadow, reported bool }

func refDecide(set *policyv1.PolicySet, r *Request) refAnswer {
	if r.Peer.Path() == "" || r.Service.Path() == "" || r.Service.TrustDomain().Name() != set.TrustDomain {
		return refAnswer{}
	}
	var real, all []*policyv1.Rule
	named, anyShadow, unknownMode := false, false, false
	for _, p := range set.Policies {
		if !slices.ContainsFunc(p.Services, func(s string) bool { return refIDMatches(s, r.Service, false) }) {
			continue
		}
		switch p.Mode {
		case policyv1.Mode_MODE_ENFORCE:
			named = true
		case policyv1.Mode_MODE_SHADOW:
			anyShadow = true
		default:
			unknownMode = true
		}
		for _, rule := range p.Rules {
			all = append(all, rule)
			if p.Mode != policyv1.Mode_MODE_SHADOW && !rule.Shadow {
				real = append(real, rule)
			} else {
				anyShadow = true
			}
		}
	}
	path, _, _ := strings.Cut(r.Path, "?")
	asterisk := r.Method == "OPTIONS" && r.Path == "*"
	refused := r.Protocol == ProtocolHTTP && !asterisk && refPathRefused(path)
	judge := func(rules []*policyv1.Rule) bool {
		return !unknownMode && !refused && refRules(rules, r)
	}
	var a refAnswer
	if named || unknownMode {
		a.allowed = judge(real)
	} else {
		a.allowed = set.Defaults == policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW
		a.reported = a.allowed
	}
	if anyShadow {
		a.reported, a.shadow = true, judge(all)
	}
	return a
}

func refRules(rules []*policyv1.Rule, r *Request) bool {
	allowed := false
	for _, rule := range rules {
		broken := slices.ContainsFunc(rule.Requires, func(f string) bool { return !slices.Contains(Features(), f) })
		deny := rule.Effect != policyv1.Effect_EFFECT_ALLOW
		switch {
		case broken && deny:
			return false
		case broken:
		case deny && refDenies(rule, r):
			return false
		case !deny && refAllows(rule, r):
			allowed = true
		}
	}
	return allowed
}

func refDenies(rule *policyv1.Rule, r *Request) bool {
	if !slices.ContainsFunc(rule.From, func(s string) bool { return refIDMatches(s, r.Peer, true) }) {
		return false
	}
	if r.Protocol != ProtocolHTTP {
		return true
	}
	// A header that overrides the method is refused where the rule is about methods.
	if r.HasMethodOverride && strings.Contains(rule.When, "request.method") {
		return true
	}
	for _, m := range rule.Http {
		if r.HasMethodOverride && len(m.Methods) > 0 {
			return true
		}
	}
	if r.HasMethodOverride && len(rule.Grpc) > 0 {
		return true
	}
	if !refHolds(rule, r) {
		return false
	}
	if len(rule.Http) == 0 && len(rule.Grpc) == 0 {
		return true
	}
	path, _, _ := strings.Cut(r.Path, "?")
	for _, m := range rule.Http {
		pathFits := len(m.Paths) == 0 || path != "*" && slices.ContainsFunc(m.Paths, func(p string) bool { return refPathMatches(p, path, true) })
		if (len(m.Methods) == 0 || slices.Contains(m.Methods, r.Method)) && pathFits {
			return true
		}
	}
	for _, m := range rule.Grpc {
		m = "/" + m
		if path != "*" && r.Method == "POST" && refPathMatches(strings.Replace(m, "/*", "/**", 1), path, true) {
			return true
		}
	}
	return false
}

func refAllows(rule *policyv1.Rule, r *Request) bool {
	if !slices.ContainsFunc(rule.From, func(s string) bool { return refIDMatches(s, r.Peer, false) }) {
		return false
	}
	if r.Protocol != ProtocolHTTP {
		return len(rule.Http) == 0 && len(rule.Grpc) == 0 && rule.Jwt == nil && rule.When == ""
	}
	if rule.Jwt != nil {
		if r.Token == nil || rule.Jwt.Subject == policyv1.SubjectBinding_SUBJECT_BINDING_PEER && r.Token.ID != r.Peer {
			return false
		}
		if !slices.ContainsFunc(rule.Jwt.Audience, func(a string) bool { return slices.Contains(r.Token.Audience, a) }) {
			return false
		}
	}
	if !refHolds(rule, r) {
		return false
	}
	if len(rule.Http) == 0 && len(rule.Grpc) == 0 {
		return true
	}
	path, _, query := strings.Cut(r.Path, "?")
	grpc := r.Method == "POST" && len(r.ContentTypes) == 1 && refGRPC.MatchString(r.ContentTypes[0])
	like := grpc || r.Method == "POST" && slices.ContainsFunc(r.ContentTypes, refGRPCLike.MatchString)
	for _, m := range rule.Http {
		methodFits := slices.Contains(m.Methods, r.Method) || len(m.Methods) == 0 && !like
		pathFits := len(m.Paths) == 0 || path != "*" && slices.ContainsFunc(m.Paths, func(p string) bool { return refPathMatches(p, path, false) })
		if methodFits && pathFits {
			return true
		}
	}
	return grpc && !query && slices.ContainsFunc(rule.Grpc, func(m string) bool { return refPathMatches("/"+m, path, false) })
}

// A dice makes random policies and requests from small alphabets, so that they often meet.
type dice struct{ *rand.Rand }

func pick[T any](d dice, items ...T) T { return items[d.IntN(len(items))] }

func some[T any](d dice, most int, one func() T) []T {
	var out []T
	for range 1 + d.IntN(most) {
		out = append(out, one())
	}
	return out
}

func (d dice) idPattern(td string, wild bool) string {
	s := "spiffe://" + td
	for range 1 + d.IntN(3) {
		if wild && d.IntN(4) == 0 {
			s += "/*"
			continue
		}
		s += "/" + pick(d, "a", "b", "spire", "a.b")
	}
	if wild && d.IntN(4) == 0 {
		s += "/**"
	} else if wild && d.IntN(12) == 0 {
		s = "spiffe://" + td + "/**"
	}
	return s
}

func (d dice) pathPattern(wild bool) string {
	s := ""
	for range d.IntN(4) {
		if wild && d.IntN(4) == 0 {
			s += "/*"
			continue
		}
		s += "/" + pick(d, "a", "b", "c.S", "%C3%A9", "%c3%a9", "!", "%21", "%2A")
	}
	switch {
	case wild && d.IntN(4) == 0:
		return s + "/**"
	case s == "" || d.IntN(4) == 0:
		return s + "/"
	}
	return s
}

func (d dice) rule() *policyv1.Rule {
	r := &policyv1.Rule{Effect: pick(d, policyv1.Effect_EFFECT_ALLOW, policyv1.Effect_EFFECT_ALLOW, policyv1.Effect_EFFECT_DENY), Shadow: d.IntN(6) == 0}
	callers, paths := 3, 2
	if d.IntN(8) == 0 {
		callers, paths = 20, 20 // kept apart from the rules of few callers
	}
	r.From = some(d, callers, func() string { return d.idPattern(pick(d, "example.org", "example.org", "b.example"), true) })
	switch d.IntN(4) {
	case 0:
		r.Http = some(d, 2, func() *policyv1.HTTPMatch {
			m := &policyv1.HTTPMatch{}
			if d.IntN(2) == 0 {
				m.Methods = some(d, 2, func() string { return pick(d, "GET", "POST", "OPTIONS") })
			}
			if m.Methods == nil || d.IntN(2) == 0 {
				m.Paths = some(d, paths, func() string { return d.pathPattern(true) })
			}
			return m
		})
	case 1:
		r.Grpc = some(d, 2, func() string { return pick(d, "c.S/a", "c.S/*", "a/b", "a/*") })
	}
	if d.IntN(6) == 0 && r.Effect == policyv1.Effect_EFFECT_ALLOW {
		r.Jwt = &policyv1.JWTMatch{Audience: some(d, 2, func() string { return pick(d, "x", "y") }), Subject: pick(d, policyv1.SubjectBinding_SUBJECT_BINDING_PEER, policyv1.SubjectBinding_SUBJECT_BINDING_ANY)}
	}
	if d.IntN(8) == 0 {
		d.condition(r)
	}
	if d.IntN(40) == 0 {
		r.Requires = []string{"http", "new"}
	}
	if d.IntN(60) == 0 {
		r.Effect = pick(d, policyv1.Effect(0), policyv1.Effect(9))
		r.Requires = []string{"new"} // so that the reference, which does not look at effects, agrees
	}
	return r
}

func (d dice) set() *policyv1.PolicySet {
	s := &policyv1.PolicySet{Format: Format, TrustDomain: "example.org", Defaults: policyv1.DefaultsMode(d.IntN(4))}
	for i := range d.IntN(4) {
		p := &policyv1.Policy{Name: fmt.Sprint("p", i), Mode: pick(d, policyv1.Mode_MODE_ENFORCE, policyv1.Mode_MODE_ENFORCE, policyv1.Mode_MODE_ENFORCE, policyv1.Mode_MODE_SHADOW)}
		if d.IntN(30) == 0 {
			p.Mode = policyv1.Mode(9)
		}
		p.Services = some(d, 2, func() string { return d.idPattern("example.org", d.IntN(2) == 0) })
		for range d.IntN(5) {
			p.Rules = append(p.Rules, d.rule())
		}
		s.Policies = append(s.Policies, p)
	}
	return s
}

func (d dice) request(path string) *Request {
	r := &Request{
		Service: spiffeid.RequireFromString(d.idPattern("example.org", false)),
		Peer:    spiffeid.RequireFromString(d.idPattern(pick(d, "example.org", "example.org", "b.example"), false)),
	}
	if d.IntN(5) == 0 {
		return r
	}
	r.Protocol = ProtocolHTTP
	r.Method = pick(d, "GET", "POST", "POST", "OPTIONS", "get")
	r.Path = path
	if d.IntN(2) == 0 {
		r.ContentTypes = some(d, 2, func() string {
			return pick(d, "application/grpc", "application/grpc+proto", "application/grpc-web", "application/json", "application/grpc;x",
				"application/grpc+a, b", "application/grpc+")
		})
	}
	r.HasMethodOverride = d.IntN(10) == 0
	if d.IntN(2) == 0 {
		r.Token = &Token{ID: pick(d, r.Peer, spiffeid.RequireFromString("spiffe://example.org/a")), Audience: []string{pick(d, "x", "y", "z")}}
	}
	d.asks(r)
	return r
}

func (d dice) target() string {
	s := d.pathPattern(false)
	switch d.IntN(12) {
	case 0:
		s = strings.Replace(s, "a", pick(d, "%61", "..", "a//", "a;b", "%2F", "%zz", "#", "\\"), 1)
	case 1:
		s += "?" + pick(d, "q", "/../")
	case 2:
		return "*"
	}
	return s
}

// agree holds that Decide and the reference give one answer, and that what Explain says fits it.
func agree(t *testing.T, set *policyv1.PolicySet, r *Request) {
	t.Helper()
	p, err := Compile(set)
	if err != nil {
		t.Fatal(err)
	}
	d, want := p.Decide(r), refDecide(set, r)
	got := refAnswer{d.Allowed, d.Shadow.Allowed, d.Shadow.Reason != ReasonNone}
	if got != want {
		t.Fatalf("Decide: %+v, the reference: %+v\nrequest %+v\nset %v\n%s", got, want, r, set, p.Explain(r))
	}
	e := p.Explain(r)
	for _, c := range e.Considered {
		if c.Rule == d.Rule && (c.Matches != (d.Reason == ReasonAllowed || d.Reason == ReasonDenied || d.Reason == ReasonUnsupported)) {
			t.Fatalf("Explain says that the deciding rule matches: %t\n%s", c.Matches, e)
		}
		if c.Matches && c.Effect == "deny" && !c.Shadow && d.Allowed && d.Reason != ReasonDefaultShadow {
			t.Fatalf("Explain says that a deny matches an allowed call\n%s\nset %v", e, set)
		}
	}
	if r.Protocol == ProtocolTLS {
		if d.Allowed && !p.MightAllow(r.Service, r.Peer).Allowed {
			t.Fatalf("an allowed connection is not among those that might be allowed\n%s", e)
		}
	} else if d.Allowed && !p.MightAllow(r.Service, r.Peer).Allowed {
		t.Fatalf("an allowed request could not have connected\n%s", e)
	}
}

func TestDecideAgreesWithReference(t *testing.T) {
	for seed := range uint64(20_000) {
		d := dice{rand.New(rand.NewPCG(seed, 1))}
		set := d.set()
		for range 4 {
			agree(t, set, d.request(d.target()))
		}
		if t.Failed() {
			t.Logf("seed %d", seed)
			return
		}
	}
}

func FuzzDecideAgreesWithReference(f *testing.F) {
	f.Add(uint64(1), "/a/b")
	f.Add(uint64(2), "/%c3%a9/")
	f.Add(uint64(3), "/a/%2e%2e/b;c")
	f.Fuzz(func(t *testing.T, seed uint64, target string) {
		d := dice{rand.New(rand.NewPCG(seed, 2))}
		agree(t, d.set(), d.request(target))
	})
}
