package policy

import (
	"errors"
	"fmt"
	"slices"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/spiffe"
)

// ErrFormat means that a PolicySet is of a newer format than this reader knows. The reader keeps what it has.
var ErrFormat = errors.New("the policies are of a newer format than this program reads; upgrade it")

// Policies decide calls. They are immutable and safe for concurrent use; a nil *Policies denies every call.
type Policies struct {
	set      *policyv1.PolicySet
	td       string
	home     ref.Val // td, as conditions compare it
	defaults policyv1.DefaultsMode
	stale    bool
	exact    map[string]*group // by the full ID of a service
	patterns *trie[group]      // by patterns with wildcards; nil if there are none

	revocations *Revocations
	former      []former               // by roll-out
	issuers     map[string]*userIssuer // by iss
	conditions  compiledConditions     // of all rules, former ones too
	hints       map[spiffeid.ID]string // in place of those of the set, for trying out; see WithPeerHint
}

// Compile prepares a set for decisions. It copies set.
//
// A rule that requires an unknown feature, has an unknown effect or is malformed is not an error: as an allow it never
// matches, as a deny it matches every caller. A malformed service, a foreign one or a missing trust domain are errors,
// since then it is unknown whom the set is about. The error is ErrFormat if the set is newer than Format.
func Compile(set *policyv1.PolicySet) (*Policies, error) { return CompileAfter(nil, set) }

// CompileAfter is Compile for a set that comes after old, such as the next revision of it. What the conditions of old were
// compiled to is used again where set has the same: of all that compiling does, they cost most. The result holds the conditions
// of set and no others, and nothing else of old.
func CompileAfter(old *Policies, set *policyv1.PolicySet) (*Policies, error) {
	return compileWith(conditionsAfter(old), set)
}

func compileWith(c conditions, set *policyv1.PolicySet) (*Policies, error) {
	switch {
	case set == nil:
		return nil, errors.New("compiling policies: there is no policy set")
	case set.GetFormat() > Format:
		return nil, fmt.Errorf("%w (format %d, known is %d)", ErrFormat, set.GetFormat(), Format)
	case set.GetFormat() == 0:
		return nil, errors.New("compiling policies: the set does not say its format")
	}
	td, err := spiffe.ParseTrustDomain(set.GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("compiling policies: %w", err)
	}
	set = proto.CloneOf(set)
	p := &Policies{set: set, td: td.Name(), home: types.String(td.Name()), defaults: set.GetDefaults(), exact: make(map[string]*group)}
	p.issuers = userIssuers(set.GetUserIssuers())
	order := 0
	for _, pol := range set.GetPolicies() {
		groups, err := p.groups(pol)
		if err != nil {
			return nil, fmt.Errorf("compiling policy %q: %w", pol.GetName(), err)
		}
		known := pol.GetMode() == policyv1.Mode_MODE_ENFORCE || pol.GetMode() == policyv1.Mode_MODE_SHADOW
		for _, g := range groups {
			g.shadowed = g.shadowed || pol.GetMode() == policyv1.Mode_MODE_SHADOW
			g.enforced = g.enforced || pol.GetMode() == policyv1.Mode_MODE_ENFORCE
			if !known && g.unknown == nil {
				g.unknown = &rule{order: order, policy: pol, index: -1}
			}
		}
		hints := peerHints(pol)
		for i := range pol.GetRules() {
			order++
			r := newRule(pol, i, order, c)
			r.hints = hints
			for _, g := range groups {
				g.add(r)
			}
		}
	}
	if p.former, err = formerOf(set, c); err != nil {
		return nil, err
	}
	p.conditions = c.now
	return p, nil
}

// groups returns what the services of pol share with other policies of the same services.
func (p *Policies) groups(pol *policyv1.Policy) ([]*group, error) {
	var groups []*group
	for _, s := range pol.GetServices() {
		pattern, err := parseIDPattern(s)
		if err != nil {
			return nil, fmt.Errorf("service: %w", err)
		}
		if pattern.trustDomain != p.td {
			return nil, fmt.Errorf("service %q is not in the trust domain %s", s, p.td)
		}
		var g *group
		if pattern.literal() {
			if g = p.exact[s]; g == nil {
				g = new(group)
				p.exact[s] = g
			}
		} else {
			if p.patterns == nil {
				p.patterns = new(trie[group])
			}
			g = p.patterns.at(pattern.segments, pattern.rest)
		}
		if !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	return groups, nil
}

// Stale returns the same policies as they hold once they are too old to be relied on: every call is denied, for
// ReasonStalePolicy.
func (p *Policies) Stale() *Policies {
	if p == nil {
		return nil
	}
	old := *p
	old.stale = true
	return &old
}

// Revision returns the epoch and the revision that name the set in decisions and in the audit. They are zero for a nil *Policies.
func (p *Policies) Revision() (epoch string, revision int64) {
	if p == nil {
		return "", 0
	}
	return p.set.GetEpoch(), p.set.GetRevision()
}

// TrustDomain is that of the services that the policies can be about. It is zero for a nil *Policies.
func (p *Policies) TrustDomain() spiffeid.TrustDomain {
	if p == nil {
		return spiffeid.TrustDomain{}
	}
	td, _ := spiffeid.TrustDomainFromString(p.td) // Compile has taken it
	return td
}

// Set returns a copy of what was compiled, or nil.
func (p *Policies) Set() *policyv1.PolicySet {
	if p == nil {
		return nil
	}
	return proto.CloneOf(p.set)
}

// A rule is one compiled rule of one policy.
type rule struct {
	order  int // over the whole set: the lowest of several matching rules is the one that is named
	policy *policyv1.Policy
	index  int // in policy; -1 for the policy as a whole
	spec   *policyv1.Rule
	deny   bool
	shadow int    // 1 if it only reports, else 0: an index
	broken string // why it cannot be judged; empty for most

	condition *condition        // nil: none
	hints     map[string]string // those of the callers, by SPIFFE ID, that its policy knows
}

func newRule(pol *policyv1.Policy, index, order int, c conditions) *rule {
	spec := pol.GetRules()[index]
	r := &rule{order: order, policy: pol, index: index, spec: spec, deny: spec.GetEffect() != policyv1.Effect_EFFECT_ALLOW}
	if spec.GetShadow() || pol.GetMode() == policyv1.Mode_MODE_SHADOW {
		r.shadow = 1
	}
	if r.broken = defect(spec); r.broken != "" {
		return r
	}
	if spec.GetWhen() != "" {
		var errs []*conditionError
		if r.condition, errs = c.of(spec.GetWhen(), r.deny); len(errs) > 0 {
			r.broken = errs[0].Error()
			return r
		}
	} else if slices.Contains(spec.GetRequires(), featureWhen) {
		r.broken = "it requires a condition and has none"
		return r
	}
	r.broken = r.condition.defect(spec)
	return r
}

// defect says why a rule cannot be judged.
func defect(r *policyv1.Rule) string {
	for _, f := range r.GetRequires() {
		if !knownFeature(f) {
			return fmt.Sprintf("it requires the capability %q, which this program does not have", shorten(f))
		}
	}
	switch r.GetEffect() {
	case policyv1.Effect_EFFECT_ALLOW, policyv1.Effect_EFFECT_DENY:
	default:
		return fmt.Sprintf("its effect %d is not known", r.GetEffect())
	}
	switch {
	case len(r.GetFrom()) == 0:
		return "it names no callers"
	case len(r.GetHttp()) > 0 && len(r.GetGrpc()) > 0:
		return "it has both http and grpc"
	}
	for _, s := range r.GetFrom() {
		if _, err := parseIDPattern(s); err != nil {
			return "from: " + err.Error()
		}
	}
	for _, m := range r.GetHttp() {
		if len(m.GetMethods()) == 0 && len(m.GetPaths()) == 0 {
			return "it has an empty item of http"
		}
		for _, s := range m.GetPaths() {
			if _, err := parsePathPattern(s); err != nil {
				return err.Error()
			}
		}
	}
	for _, s := range r.GetGrpc() {
		if _, err := parseGRPCMethod(s); err != nil {
			return err.Error()
		}
	}
	if jwt := r.GetJwt(); jwt != nil {
		switch {
		case len(jwt.GetAudience()) == 0:
			return "jwt has no audience"
		case jwt.GetSubject() != policyv1.SubjectBinding_SUBJECT_BINDING_PEER && jwt.GetSubject() != policyv1.SubjectBinding_SUBJECT_BINDING_ANY:
			return fmt.Sprintf("its subject binding %d is not known", jwt.GetSubject())
		}
	}
	return ""
}

// A group is what all policies of one service, or of one pattern of services, say.
type group struct {
	enforced, shadowed bool                      // some policy is enforced; some policy or rule only reports
	unknown            *rule                     // a policy whose mode is not known
	broken             [2]*rule                  // denies that match every caller: [0] enforced, [1] shadow
	allow, deny        map[string]*trie[callers] // by trust domain
	jwt, user          bool                      // some rule asks for a token, or for that of a user
	shared             map[string]*callers       // see maxCopies; by effect and callers
}

// maxCopies is how much longer than what was written the rules may become by being kept with each of their callers, where
// they are found fastest. A rule of many callers and many paths would become as long as the product: it is kept once, with
// all others for exactly these callers.
const maxCopies = 4

// callers is what holds for the callers of one pattern. Index 0 is what is enforced, 1 what only reports.
type callers struct {
	rules   [2][]*rule       // all of them
	open    [2][]*rule       // any protocol, whatever the call is
	asking  [2][]*rule       // any protocol, if a condition holds
	items   [2][]item        // HTTP on any path
	paths   [2]*trie[[]item] // HTTP or gRPC on some paths
	methods [2]*rule         // the first one that lists methods
	// audiences and issuers of users are those that some rule asks for, each once.
	audiences, issuers []string
	asked              map[string]bool
	shared             []*callers // what holds for these callers and others
}

// An item is one way in which a rule matches an HTTP request whose path fits.
type item struct {
	rule    *rule
	methods []string // none: any
	grpc    bool
}

func (g *group) add(r *rule) {
	g.shadowed = g.shadowed || r.shadow == 1
	g.jwt = g.jwt || r.spec.GetJwt() != nil
	g.user = g.user || r.condition != nil && r.condition.user
	if r.broken != "" {
		if r.deny && g.broken[r.shadow] == nil {
			g.broken[r.shadow] = r
		}
		return
	}
	index := &g.allow
	if r.deny {
		index = &g.deny
	}
	if *index == nil {
		*index = make(map[string]*trie[callers])
	}
	add := func(c *callers) { c.add(r) }
	if from, length := len(r.spec.GetFrom()), r.length(); from*length > maxCopies*(from+length) {
		key := fmt.Sprintf("%t %q", r.deny, r.spec.GetFrom())
		shared, found := g.shared[key]
		if !found {
			if g.shared == nil {
				g.shared = make(map[string]*callers)
			}
			shared = new(callers)
			g.shared[key] = shared
		}
		if shared.add(r); found {
			return
		}
		add = func(c *callers) {
			if n := len(c.shared); n == 0 || c.shared[n-1] != shared { // unless from names the pattern twice
				c.shared = append(c.shared, shared)
			}
		}
	}
	for _, s := range r.spec.GetFrom() {
		pattern, _ := parseIDPattern(s) // checked by defect
		t := (*index)[pattern.trustDomain]
		if t == nil {
			t = new(trie[callers])
			(*index)[pattern.trustDomain] = t
		}
		add(t.at(pattern.segments, pattern.rest))
	}
}

// length is how much there is to keep of the rule with each of its callers.
func (r *rule) length() int {
	n := 1 + len(r.spec.GetGrpc()) + len(r.spec.GetJwt().GetAudience())
	if r.condition != nil {
		n += len(r.condition.issuers)
	}
	for _, m := range r.spec.GetHttp() {
		n += max(1, len(m.GetPaths()))
	}
	return n
}

func (c *callers) add(r *rule) {
	s := r.shadow
	if n := len(c.rules[s]); n > 0 && c.rules[s][n-1] == r {
		return // from names the pattern twice
	}
	c.rules[s] = append(c.rules[s], r)
	c.audiences = c.ask(c.audiences, "audience ", r.spec.GetJwt().GetAudience())
	if r.condition != nil {
		c.issuers = c.ask(c.issuers, "issuer ", r.condition.issuers)
		if r.deny && r.condition.method {
			c.listsMethods(r)
		}
	}
	switch open := len(r.spec.GetHttp()) == 0 && len(r.spec.GetGrpc()) == 0; {
	case open && r.condition != nil:
		c.asking[s] = append(c.asking[s], r)
		return
	case open:
		c.open[s] = append(c.open[s], r)
		return
	}
	for _, m := range r.spec.GetHttp() {
		it := item{rule: r, methods: m.GetMethods()}
		if len(it.methods) > 0 {
			c.listsMethods(r)
		}
		if len(m.GetPaths()) == 0 {
			c.items[s] = append(c.items[s], it)
		}
		for _, path := range m.GetPaths() {
			pattern, _ := parsePathPattern(path)
			c.addPath(pattern, it)
		}
	}
	for _, method := range r.spec.GetGrpc() {
		pattern, _ := parseGRPCMethod(method)
		if r.deny && pattern.segments[1] == anySegment {
			pattern = pathPattern{segments: pattern.segments[:1], rest: true}
		}
		c.listsMethods(r) // gRPC is POST
		c.addPath(pattern, item{rule: r, grpc: true})
	}
}

// ask adds what is new among names to list.
func (c *callers) ask(list []string, kind string, names []string) []string {
	for _, name := range names {
		if key := kind + name; !c.asked[key] {
			if c.asked == nil {
				c.asked = make(map[string]bool)
			}
			c.asked[key] = true
			list = append(list, name)
		}
	}
	return list
}

func (c *callers) listsMethods(r *rule) {
	if c.methods[r.shadow] == nil {
		c.methods[r.shadow] = r
	}
}

func (c *callers) addPath(pattern pathPattern, it item) {
	if it.rule.deny {
		pattern = pattern.widened()
	}
	t := &c.paths[it.rule.shadow]
	if *t == nil {
		*t = new(trie[[]item])
	}
	place := (*t).at(pattern.segments, pattern.rest)
	*place = append(*place, it)
}
