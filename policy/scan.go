package policy

import (
	"slices"
	"strings"

	"cel.dev/cel-go/common/types/ref"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// maxSteps bounds the search for one call. Patterns that put "*" in k different places for services, m for callers and n
// for paths can make k*m*n steps; those that people write make some tens.
const maxSteps = 1 << 16

// A scan gathers the rules that match one request. Index 0 of its arrays is what is enforced, 1 what only reports.
type scan struct {
	r         *Request
	might     bool // ask for what could be allowed; nothing but the IDs is known
	tokens    bool // ask for the audiences and issuers of tokens only
	http      bool
	path      string // without the query
	judged    string // path as denies read it: without a trailing slash
	query     bool
	asterisk  bool // OPTIONS *
	grpc      bool
	grpcLike  bool // or could be taken for it
	fault     pathFault
	deny      [2]*rule
	allow     [2]*rule
	override  [2]*rule // a deny that lists methods, of a request that overrides its own
	tokenless [2]*rule // an allow that matches but for its token
	unmet     [2]*rule // an allow that matches but for its condition
	unknown   *rule    // a policy whose mode is not known
	named     bool     // some policy is enforced
	shadowed  bool     // some policy or rule only reports
	steps     int      // nodes of tries that were looked at; more than maxSteps: not all of them
	// What the rules for the peer ask for, if tokens is set; unsorted.
	audiences, issuers []string
	conditions         bool // what took too many steps were conditions
	hints              map[spiffeid.ID]string
	home               ref.Val // see Policies
}

func newScan(r *Request) scan {
	s := scan{r: r, http: r.Protocol == ProtocolHTTP}
	if !s.http {
		return s
	}
	s.path, _, s.query = strings.Cut(r.Path, "?")
	if s.asterisk = r.Path == star && r.Method == "OPTIONS"; s.asterisk {
		return s
	}
	s.fault = checkPath(s.path)
	s.judged = strings.TrimSuffix(s.path, "/")
	s.grpc = r.Method == "POST" && len(r.ContentTypes) == 1 && isGRPC(r.ContentTypes[0])
	s.grpcLike = r.Method == "POST" && slices.ContainsFunc(r.ContentTypes, func(line string) bool { return isGRPC(line) || isGRPCAndMore(line) })
	return s
}

// isGRPC reports whether a content type is that of gRPC, exactly as gRPC's own clients write it.
func isGRPC(contentType string) bool {
	suffix, found := strings.CutPrefix(contentType, "application/grpc")
	return found && (suffix == "" || len(suffix) > 1 && suffix[0] == '+' && !strings.ContainsFunc(suffix, notInSubtype))
}

// isGRPCAndMore reports whether a line begins as the content type of gRPC and goes on as gRPC's own clients never write
// it: with parameters, or as a list that a proxy made of two lines (application/grpc+proto, text/plain). What reads the
// beginning only takes it for gRPC.
func isGRPCAndMore(line string) bool {
	return strings.HasPrefix(line, "application/grpc;") || strings.HasPrefix(line, "application/grpc+") && strings.ContainsFunc(line[len("application/grpc"):], notInSubtype)
}

// notInSubtype reports whether r cannot be part of the name of a content type. [RFC 6838 §4.2]
func notInSubtype(r rune) bool {
	return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("!#$&-^_.+", r))
}

func (s *scan) group(g *group) {
	if g == nil {
		return
	}
	td, path := s.r.Peer.TrustDomain().Name(), s.r.Peer.Path()
	if s.tokens && !g.jwt && !g.user {
		return
	}
	if t := g.allow[td]; t != nil {
		s.allowers(t, path, true)
	}
	if s.tokens {
		if t := g.deny[td]; t != nil {
			s.deniers(t, path)
		}
		return
	}
	s.named, s.shadowed = s.named || g.enforced, s.shadowed || g.shadowed
	s.unknown = earlier(s.unknown, g.unknown)
	for i, r := range g.broken {
		s.denied(i, r)
	}
	if t := g.deny[td]; t != nil {
		s.deniers(t, path)
	}
}

// tooFar counts a step and reports whether it is one too many. The call is denied then.
func (s *scan) tooFar() bool {
	if s.steps <= maxSteps {
		s.steps++
	}
	return s.steps > maxSteps
}

// deniers finds the denies for a caller, read wide: "**" may also stand for nothing.
func (s *scan) deniers(t *trie[callers], path string) {
	if s.tooFar() {
		return
	}
	s.denyBy(t.rest)
	if path == "" {
		s.denyBy(t.here)
		return
	}
	segment, rest := cut(path)
	if t.star != nil {
		s.deniers(t.star, rest)
	}
	if child := t.next(segment); child != nil {
		s.deniers(child, rest)
	}
}

// allowers finds the allows for a caller, read narrow.
func (s *scan) allowers(t *trie[callers], path string, first bool) {
	if s.tooFar() {
		return
	}
	if path == "" {
		s.allowBy(t.here)
		return
	}
	segment, rest := cut(path)
	if !first || segment != reserved {
		s.allowBy(t.rest)
		if t.star != nil {
			s.allowers(t.star, rest, false)
		}
	}
	if child := t.next(segment); child != nil {
		s.allowers(child, rest, false)
	}
}

func (s *scan) denyBy(c *callers) {
	if c == nil || s.tooFar() {
		return
	}
	for _, shared := range c.shared {
		s.denyBy(shared)
	}
	if s.tokens {
		s.asks(c)
		return
	}
	for i := range c.rules {
		if !s.http && !s.might {
			s.denied(i, firstOf(c.rules[i]))
			continue
		}
		s.denied(i, firstOf(c.open[i]))
		if s.might {
			continue
		}
		for _, r := range c.asking[i] {
			if s.holds(r) {
				s.denied(i, r)
				break
			}
		}
		if s.r.HasMethodOverride {
			s.override[i] = earlier(s.override[i], c.methods[i])
		}
		for j := range c.items[i] {
			if it := &c.items[i][j]; s.denies(it) && s.holds(it.rule) {
				s.denied(i, it.rule)
				break
			}
		}
		if c.paths[i] != nil && !s.asterisk && s.fault == pathSound {
			s.denyPath(i, c.paths[i], s.judged)
		}
	}
}

func (s *scan) denyPath(i int, t *trie[[]item], path string) {
	if s.tooFar() {
		return
	}
	s.denyItems(i, t.rest)
	if path == "" {
		s.denyItems(i, t.here)
		return
	}
	segment, rest := cut(path)
	if t.star != nil {
		s.denyPath(i, t.star, rest)
	}
	var child *trie[[]item]
	if strings.IndexByte(segment, '%') >= 0 {
		child = t.decoded(segment)
	} else {
		child = t.next(segment)
	}
	if child != nil {
		s.denyPath(i, child, rest)
	}
}

func (s *scan) denyItems(i int, items *[]item) {
	if items == nil {
		return
	}
	for j := range *items {
		if it := &(*items)[j]; s.denies(it) && s.holds(it.rule) {
			s.denied(i, it.rule)
			return // the rest are later rules
		}
	}
}

// denies reports whether an item of a deny covers the request, whose path fits. Content types do not matter.
func (s *scan) denies(it *item) bool {
	if it.grpc {
		return s.r.Method == "POST"
	}
	return len(it.methods) == 0 || slices.Contains(it.methods, s.r.Method)
}

func (s *scan) denied(i int, r *rule) { s.deny[i] = earlier(s.deny[i], r) }

func (s *scan) allowBy(c *callers) {
	if c == nil || s.tooFar() {
		return
	}
	for _, shared := range c.shared {
		s.allowBy(shared)
	}
	if s.tokens {
		s.asks(c)
		return
	}
	for i := range c.rules {
		if s.might {
			s.allow[i] = earlier(s.allow[i], firstOf(c.rules[i]))
			continue
		}
		s.allowRules(i, c.open[i])
		s.allowRules(i, c.asking[i])
		if !s.http {
			continue
		}
		s.allowItems(i, c.items[i])
		if c.paths[i] != nil && !s.asterisk && s.fault == pathSound {
			s.allowPath(i, c.paths[i], s.path)
		}
	}
}

func (s *scan) allowRules(i int, rules []*rule) {
	for _, r := range rules {
		if s.allowed(i, r) {
			return
		}
	}
}

func (s *scan) allowPath(i int, t *trie[[]item], path string) {
	if s.tooFar() {
		return
	}
	if path == "" {
		if t.here != nil {
			s.allowItems(i, *t.here)
		}
		return
	}
	segment, rest := cut(path)
	if segment != "" {
		if t.rest != nil {
			s.allowItems(i, *t.rest)
		}
		if t.star != nil {
			s.allowPath(i, t.star, rest)
		}
	}
	if child := t.next(segment); child != nil {
		s.allowPath(i, child, rest)
	}
}

func (s *scan) allowItems(i int, items []item) {
	for j := range items {
		if it := &items[j]; s.allows(it) && s.allowed(i, it.rule) {
			return // the rest are later rules
		}
	}
}

// allows reports whether an item of an allow covers the request, whose path fits. A gRPC call, or what could be taken for
// one, is a POST that must be named as one: an item for any method is about HTTP.
func (s *scan) allows(it *item) bool {
	switch {
	case it.grpc:
		return s.grpc && !s.query
	case s.grpcLike:
		return slices.Contains(it.methods, "POST")
	default:
		return len(it.methods) == 0 || slices.Contains(it.methods, s.r.Method)
	}
}

func (s *scan) asks(c *callers) {
	s.audiences = append(s.audiences, c.audiences...)
	s.issuers = append(s.issuers, c.issuers...)
}

// allowed notes a matching allow, if the token that it asks for is there and its condition holds.
func (s *scan) allowed(i int, r *rule) bool {
	if !s.tokenFits(r.spec.GetJwt()) {
		s.tokenless[i] = earlier(s.tokenless[i], r)
		return false
	}
	if !s.holds(r) {
		s.unmet[i] = earlier(s.unmet[i], r)
		return false
	}
	s.allow[i] = earlier(s.allow[i], r)
	return true
}

// tokenFits reports whether the request's token is what a rule asks for. A connection never carries one.
func (s *scan) tokenFits(m *policyv1.JWTMatch) bool {
	switch {
	case m == nil:
		return true
	case !s.http || s.r.Token == nil || s.r.Token.ID.Path() == "":
		return false
	case m.GetSubject() != policyv1.SubjectBinding_SUBJECT_BINDING_ANY && s.r.Token.ID != s.r.Peer:
		return false
	}
	for _, a := range m.GetAudience() {
		if slices.Contains(s.r.Token.Audience, a) {
			return true
		}
	}
	return false
}

func firstOf(rules []*rule) *rule {
	if len(rules) == 0 {
		return nil
	}
	return rules[0]
}

// earlier returns the one that stands before the other, so that the rule that is named does not depend on the search.
func earlier(a, b *rule) *rule {
	if a == nil || b != nil && b.order < a.order {
		return b
	}
	return a
}

// outcome decides by the enforced rules (last is 0), or as if all were (last is 1). named says whether a policy names the
// service.
func (s *scan) outcome(last int, named bool) Outcome {
	deny, allow, override, tokenless, unmet := s.deny[0], s.allow[0], s.override[0], s.tokenless[0], s.unmet[0]
	if last == 1 {
		deny, allow = earlier(deny, s.deny[1]), earlier(allow, s.allow[1])
		override, tokenless, unmet = earlier(override, s.override[1]), earlier(tokenless, s.tokenless[1]), earlier(unmet, s.unmet[1])
	}
	switch {
	case s.steps > maxSteps && s.conditions:
		return Outcome{Reason: ReasonTooManyConditions}
	case s.steps > maxSteps:
		return Outcome{Reason: ReasonTooManyPatterns}
	case s.unknown != nil:
		return outcomeOf(false, ReasonUnsupported, s.unknown)
	case s.http && !s.asterisk && s.fault != pathSound:
		return Outcome{Reason: ReasonPath}
	case !named:
		return Outcome{Reason: ReasonNoPolicy}
	case deny != nil && deny.broken != "":
		return outcomeOf(false, ReasonUnsupported, deny)
	case deny != nil:
		return outcomeOf(false, ReasonDenied, deny)
	case override != nil:
		return outcomeOf(false, ReasonMethodOverride, override)
	case allow != nil:
		return outcomeOf(true, ReasonAllowed, allow)
	case unmet != nil:
		return outcomeOf(false, ReasonCondition, unmet)
	case tokenless != nil:
		return outcomeOf(false, ReasonToken, tokenless)
	default:
		return Outcome{Reason: ReasonNoAllow}
	}
}
