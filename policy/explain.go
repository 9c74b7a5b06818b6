package policy

import (
	"fmt"
	"slices"
	"strings"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// maxConsidered is how many rules an Explanation lists.
const maxConsidered = 20

// An Explanation is a decision with the rules that were considered. It is for operators, never for callers.
type Explanation struct {
	Decision Decision `json:"decision"`
	Service  string   `json:"service"`
	Peer     string   `json:"peer"`
	// Call is the request in words, such as HTTP "GET" "/v1/documents".
	Call string `json:"call"`
	// PathFault is why the path is refused whatever the rules say, if it is.
	PathFault string `json:"path_fault,omitempty"`
	// Defaults is the mode of PolicyDefaults, if no enforced policy names the service.
	Defaults string `json:"defaults,omitempty"`
	// Considered are the rules of the policies that name the service: those that match first, then those that are nearest
	// to matching; at most 20.
	Considered []Considered `json:"considered,omitempty"`
	// Omitted is how many more rules there are.
	Omitted int `json:"omitted,omitempty"`
}

// A Considered rule is one that could have decided.
type Considered struct {
	Rule    Rule   `json:"rule"`
	Effect  string `json:"effect"`
	Shadow  bool   `json:"shadow,omitempty"`
	Matches bool   `json:"matches"`
	// Why is the first thing that does not fit, or what makes the rule match if that is not plain.
	Why string `json:"why,omitempty"`
	// near grows with how much of the rule fits.
	near int
}

// Explain decides a call as Decide does and says why. It walks over all rules of the service.
func (p *Policies) Explain(r *Request) Explanation {
	e := Explanation{Decision: p.Decide(r), Service: r.Service.String(), Peer: r.Peer.String(), Call: describe(r)}
	if p == nil {
		return e
	}
	s := newScan(r)
	if s.http && !s.asterisk && s.fault != pathSound {
		e.PathFault = s.fault.String()
	}
	s.hints = p.hints
	named, compiled := false, conditionsAfter(p)
	for _, pol := range p.set.GetPolicies() {
		if !slices.ContainsFunc(pol.GetServices(), func(pattern string) bool { return ServiceMatches(pattern, r.Service) }) {
			continue
		}
		hints := peerHints(pol)
		named = named || pol.GetMode() != policyv1.Mode_MODE_SHADOW
		if m := pol.GetMode(); m != policyv1.Mode_MODE_SHADOW && m != policyv1.Mode_MODE_ENFORCE {
			why := fmt.Sprintf("its mode %d is not known to this program, so it denies every call", m)
			e.Considered = append(e.Considered, Considered{Rule: outcomeOf(false, 0, &rule{policy: pol, index: -1}).Rule, Effect: "deny", Matches: true, Why: why})
		}
		for i := range pol.GetRules() {
			r := newRule(pol, i, 0, compiled)
			r.hints = hints
			e.Considered = append(e.Considered, s.consider(r))
		}
	}
	if !named {
		e.Defaults = "deny"
		if p.defaults == policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW {
			e.Defaults = "shadow"
		}
	}
	slices.SortStableFunc(e.Considered, func(a, b Considered) int { return rank(b) - rank(a) })
	if n := len(e.Considered) - maxConsidered; n > 0 {
		e.Considered, e.Omitted = e.Considered[:maxConsidered], n
	}
	return e
}

func rank(c Considered) int {
	if c.Matches {
		return 100
	}
	return c.near
}

func describe(r *Request) string {
	if r.Protocol != ProtocolHTTP {
		return "TLS connection"
	}
	s := newScan(r)
	if s.grpc {
		return fmt.Sprintf("gRPC %q", shorten(r.Path))
	}
	return fmt.Sprintf("HTTP %q %q", shorten(r.Method), shorten(r.Path))
}

// consider judges one rule on its own, in the order in which a reader would.
func (s *scan) consider(r *rule) Considered {
	c := Considered{Rule: outcomeOf(false, 0, r).Rule, Effect: "allow", Shadow: r.shadow == 1}
	if r.deny {
		c.Effect = "deny"
	}
	if r.broken != "" {
		c.Matches = r.deny
		c.Why = r.broken + "; as an allow it never matches"
		if r.deny {
			c.Why = r.broken + "; as a deny it matches every caller"
		}
		return c
	}
	if !slices.ContainsFunc(r.spec.GetFrom(), func(f string) bool {
		pattern, err := parseIDPattern(f)
		return err == nil && pattern.matches(s.r.Peer, r.deny)
	}) {
		c.Why = fmt.Sprintf("the caller %s is not among %s", s.r.Peer, list(r.spec.GetFrom()))
		return c
	}
	c.near, c.Why = s.considerCall(r)
	c.Matches = c.Why == ""
	switch {
	case !c.Matches || !r.deny:
	case !s.http && (len(r.spec.GetHttp())+len(r.spec.GetGrpc()) > 0 || r.condition != nil):
		c.Why = "of a connection only the caller is known, and this deny is for some of its requests"
	case r.condition != nil && s.fault == pathSound:
		c.Why = s.conditionTrouble(r)
	}
	return c
}

// considerCall says how near a rule whose callers fit comes to the call, and what does not fit.
func (s *scan) considerCall(r *rule) (near int, why string) {
	conditional := len(r.spec.GetHttp())+len(r.spec.GetGrpc()) > 0
	switch {
	case !s.http && r.deny:
		return 6, ""
	case !s.http && r.condition != nil:
		return 1, "its condition is about requests, and of a connection only the caller is known"
	case !s.http && conditional:
		return 1, "it is for requests, and of a connection only the caller is known"
	}
	near = 4
	if conditional {
		near, why = 1, ""
		for _, it := range r.spec.GetHttp() {
			if n, w := s.considerHTTP(r, it); n > near || why == "" {
				near, why = n, w
			}
			if why == "" {
				break
			}
		}
		if len(r.spec.GetGrpc()) > 0 {
			near, why = s.considerGRPC(r)
		}
	}
	switch {
	case why != "":
	case !r.deny && !s.tokenFits(r.spec.GetJwt()):
		return 4, s.tokenMisfit(r.spec.GetJwt())
	case !s.holds(r):
		return 5, s.conditionMisfit(r)
	}
	return near, why
}

func (s *scan) considerHTTP(r *rule, m *policyv1.HTTPMatch) (near int, why string) {
	it := item{rule: r, methods: m.GetMethods()}
	switch {
	case r.deny && !s.denies(&it), !r.deny && !s.allows(&it):
		if s.grpcLike && len(it.methods) == 0 {
			return 2, "the call is gRPC by its content type, which an http allow covers only if it lists POST"
		}
		return 2, fmt.Sprintf("the method %q is not among %s", shorten(s.r.Method), list(m.GetMethods()))
	case len(m.GetPaths()) == 0:
		return 4, ""
	}
	for _, path := range m.GetPaths() {
		if pattern, err := parsePathPattern(path); err == nil && s.pathFits(pattern, r.deny) {
			return 4, ""
		}
	}
	return 3, fmt.Sprintf("the path %q is not among %s", shorten(s.path), list(m.GetPaths()))
}

func (s *scan) considerGRPC(r *rule) (near int, why string) {
	it := item{rule: r, grpc: true}
	switch {
	case r.deny && !s.denies(&it):
		return 1, fmt.Sprintf("the method is %q, and gRPC is POST", shorten(s.r.Method))
	case !r.deny && !s.allows(&it):
		return 1, "the call is not gRPC: a POST without a query whose only content type is application/grpc or application/grpc+..."
	}
	for _, method := range r.spec.GetGrpc() {
		pattern, err := parseGRPCMethod(method)
		if err == nil && r.deny && pattern.segments[1] == anySegment {
			pattern = pathPattern{segments: pattern.segments[:1], rest: true}
		}
		if err == nil && s.pathFits(pattern, r.deny) {
			return 4, ""
		}
	}
	return 3, fmt.Sprintf("the gRPC method %q is not among %s", shorten(strings.TrimPrefix(s.path, "/")), list(r.spec.GetGrpc()))
}

// pathFits is the slow form of what the tries of paths do.
func (s *scan) pathFits(p pathPattern, wide bool) bool {
	if s.asterisk || s.fault != pathSound {
		return false
	}
	path := s.path
	if wide {
		p, path = p.widened(), s.judged
	}
	var segments []string
	if path != "" {
		segments = strings.Split(path[1:], "/")
	}
	switch least := len(p.segments); {
	case !p.rest && len(segments) != least, len(segments) < least, p.rest && !wide && (len(segments) == least || segments[least] == ""):
		return false
	}
	for i, segment := range p.segments {
		have := segments[i]
		if wide {
			have = string(unescape(nil, have))
		}
		if segment == anySegment && have == "" || segment != anySegment && segment != have {
			return false
		}
	}
	return true
}

func (s *scan) tokenMisfit(m *policyv1.JWTMatch) string {
	switch {
	case !s.http:
		return "it asks for a JWT-SVID, and a connection carries none"
	case s.r.Token == nil:
		return fmt.Sprintf("it asks for a JWT-SVID with an audience among %s, and there is none that is valid", list(m.GetAudience()))
	case m.GetSubject() != policyv1.SubjectBinding_SUBJECT_BINDING_ANY && s.r.Token.ID != s.r.Peer:
		return fmt.Sprintf("the JWT-SVID is of %s, not of the caller", s.r.Token.ID)
	default:
		return fmt.Sprintf("the JWT-SVID is for %s, not for %s", list(s.r.Token.Audience), list(m.GetAudience()))
	}
}

// list prints a few strings of a rule.
func list(items []string) string {
	const limit = 5
	var b strings.Builder
	for i, s := range items[:min(len(items), limit)] {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%q", shorten(s))
	}
	if n := len(items) - limit; n > 0 {
		fmt.Fprintf(&b, " and %d more", n)
	}
	return b.String()
}

// String is the explanation for a terminal, in several lines. Foreign text in it is quoted.
func (e Explanation) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", verdict(e.Decision.Allowed), e.because(e.Decision.Outcome))
	fmt.Fprintf(&b, "  from      %s\n  to        %s\n  call      %s\n", e.Peer, e.Service, e.Call)
	fmt.Fprintf(&b, "  revision  %d\n", e.Decision.Revision)
	if sh := e.Decision.Shadow; sh.Reason != ReasonNone {
		fmt.Fprintf(&b, "  shadow    would be %s: %s\n", verdict(sh.Allowed), e.because(sh))
	}
	if len(e.Considered) > 0 {
		b.WriteString("considered:\n")
	}
	for _, c := range e.Considered {
		shadow, matches := "", "matches"
		if c.Shadow {
			shadow = " (shadow)"
		}
		switch {
		case c.Matches && c.Why != "":
			matches = "matches: " + c.Why
		case !c.Matches:
			matches = c.Why
		}
		fmt.Fprintf(&b, "  %s %s%s: %s\n", place(c.Rule), c.Effect, shadow, matches)
	}
	if e.Omitted > 0 {
		fmt.Fprintf(&b, "  and %d more rules\n", e.Omitted)
	}
	return b.String()
}

func verdict(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}

func place(r Rule) string {
	if r.File == "" {
		return fmt.Sprintf("%s, line %d:", r.Policy, r.Line)
	}
	return fmt.Sprintf("%s:%d: %s:", printable(r.File), r.Line, r.Policy)
}

// printable is a name as it is, unless a terminal could misread it.
func printable(s string) string {
	if q := fmt.Sprintf("%q", s); q[1:len(q)-1] != s {
		return q
	}
	return s
}

func (e Explanation) because(o Outcome) string {
	at := fmt.Sprintf("policy %q", o.Rule.Policy)
	if o.Rule.Line != 0 {
		at = strings.TrimSuffix(place(o.Rule), ":")
	}
	switch o.Reason {
	case ReasonAllowed:
		return at + " allows it"
	case ReasonDenied:
		return at + " denies it"
	case ReasonDefaultShadow:
		return "no enforced policy names the service, and PolicyDefaults is shadow"
	case ReasonNoAllow:
		return "no rule allows it"
	case ReasonNoPolicy:
		return "no enforced policy names the service"
	case ReasonToken:
		return at + " would allow it with a fitting JWT-SVID"
	case ReasonCondition:
		return at + " would allow it if its condition held"
	case ReasonTooManyConditions:
		return "too many rules with a condition fit the call; write fewer of them, or say more in from, http and grpc"
	case ReasonPath:
		return "the path is refused whatever the rules say: " + e.PathFault
	case ReasonMethodOverride:
		return "a header overrides the method, and " + at + " denies by method"
	case ReasonUnsupported:
		return at + " cannot be judged by this program, so it denies"
	case ReasonUnknownPolicy:
		return "no policies have arrived yet"
	case ReasonStalePolicy:
		return "the policies are too old to be relied on"
	case ReasonForeignService:
		return "the service is not a workload of the policies' trust domain"
	case ReasonInvalidPeer:
		return "the caller has no SPIFFE ID with a path"
	case ReasonInvalidSVID:
		return "the caller's X509-SVID is missing, malformed or expired"
	case ReasonRevoked:
		return "the caller's SVID is revoked"
	case ReasonTooManyLinks:
		return "there are so many connections that no further one can be watched"
	case ReasonTooManyPatterns:
		return `too many patterns with "*" in different places fit the call; write fewer of them`
	}
	return o.Reason.String()
}
