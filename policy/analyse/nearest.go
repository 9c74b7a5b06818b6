package analyse

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

const (
	// maxTried is how many changes Nearest tries out.
	maxTried = 16
	// maxShown is how many changes of rules it returns.
	maxShown = 3
	// maxDenies is how many denies in a row it lifts.
	maxDenies = 8
)

// A Remedy is what would let a denied call through.
type Remedy struct {
	// Changes are those of the documents, the least first. Each was tried out: with it, and nothing else, the call is
	// allowed, unless it says what the caller must present besides.
	Changes []Change `json:"changes,omitempty"`
	// Why says why no change of the policies helps, or what else must hold.
	Why string `json:"why,omitempty"`
}

// A Change is the least that must be done about one rule, or a rule of its own, with the denies that stand in its way.
type Change struct {
	Steps []Step `json:"steps"`
	// Present is what the caller must do as well, such as to present a JWT-SVID.
	Present string `json:"present,omitempty"`
	// Also says what else the change allows; empty: nothing.
	Also string `json:"also,omitempty"`

	edits, width int
}

// A Step changes one rule.
type Step struct {
	// Rule is the one that changes. Its Index is -1 for a rule that is added; its Policy is empty for a new document.
	Rule   policy.Rule `json:"rule"`
	Effect string      `json:"effect"`
	// Edits say what to do, such as `add "/web" to from`.
	Edits []string `json:"edits"`
	// Before and After are the rule as YAML. Before is empty for what is added, After for what is removed.
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// Nearest finds the rules that would have allowed a denied call with the least change, and what that change is. It looks at
// every rule of the service.
func Nearest(p *policy.Policies, r *policy.Request) Remedy {
	d := p.Decide(r)
	if why := beyond(d.Outcome); why != "" {
		return Remedy{Why: why}
	}
	n := &nearest{r: r, compiled: p, set: p.Set(), grpc: policy.CallOf(r).GRPC}
	n.td = n.set.GetTrustDomain()
	n.set.Policies = slices.DeleteFunc(n.set.Policies, func(pol *policyv1.Policy) bool { return !serves(pol, r.Service) })
	lifted, outcome, set := n.liftDenies(d.Outcome)
	if outcome.Allowed {
		return Remedy{Changes: []Change{{Steps: lifted, Also: "the denied calls of every other caller and path that these denies named alone"}}}
	}
	if why := beyond(outcome); why != "" {
		return Remedy{Why: why}
	}
	n.set = set
	n.candidates()
	slices.SortStableFunc(n.found, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.change.edits, b.change.edits), cmp.Compare(a.change.width, b.change.width))
	})
	var out Remedy
	for i, c := range n.found {
		if i == maxTried || len(out.Changes) == maxShown {
			break
		}
		if n.allows(c) {
			c.change.Steps = append(slices.Clone(lifted), c.change.Steps...)
			out.Changes = append(out.Changes, c.change)
		}
	}
	if own, ok := n.own(); ok && n.allows(own) {
		own.change.Steps = append(slices.Clone(lifted), own.change.Steps...)
		out.Changes = append(out.Changes, own.change)
	}
	if len(out.Changes) == 0 {
		out.Why = "no change of one rule that was tried lets this call through"
	}
	return out
}

// beyond says why no rule can help, if none can.
func beyond(o policy.Outcome) string {
	switch o.Reason {
	case policy.ReasonDenied, policy.ReasonNoAllow, policy.ReasonNoPolicy, policy.ReasonToken:
		return ""
	case policy.ReasonMethodOverride:
		return "the request has a header that overrides its method; it must be sent without"
	case policy.ReasonPath:
		return "the path is refused whatever the rules say; the caller must write it in its plain form"
	case policy.ReasonUnsupported:
		return fmt.Sprintf("policy %q needs a newer version of this program, or is malformed", o.Rule.Policy)
	case policy.ReasonTooManyPatterns:
		return `too many patterns with "*" in different places fit the call; write fewer of them`
	case policy.ReasonRevoked:
		return "the caller is revoked; no policy lets it in"
	case policy.ReasonForeignService:
		return "the service is not of the trust domain of these policies"
	case policy.ReasonUnknownPolicy, policy.ReasonStalePolicy:
		return "there are no policies to rely on; look at the connection of the agent to its CA"
	}
	if o.Allowed {
		return "the call is allowed"
	}
	return "no policy decides this: " + o.Reason.String()
}

type nearest struct {
	r        *policy.Request
	compiled *policy.Policies // all, whose conditions need not be compiled again
	td       string
	set      *policyv1.PolicySet // of the service, without the denies in the way
	grpc     bool
	found    []candidate
	// denies is the set without its allows, see allows.
	denies *policyv1.PolicySet
}

// A candidate is a change with what it makes of one policy.
type candidate struct {
	change Change
	policy int // in set; -1: a new one
	rule   int // -1: a new one
	spec   *policyv1.Rule
	mode   bool // the policy becomes enforced
	// token is the audience that the caller must present a JWT-SVID for.
	token string
}

func (n *nearest) outcome(set *policyv1.PolicySet, r *policy.Request) policy.Outcome {
	compiled, err := policy.CompileAfter(n.compiled, set)
	if err != nil {
		return policy.Outcome{}
	}
	return compiled.Decide(r).Outcome
}

// liftDenies takes the denies that stand in the way out of the set, one after the other.
func (n *nearest) liftDenies(o policy.Outcome) ([]Step, policy.Outcome, *policyv1.PolicySet) {
	set := n.set
	var steps []Step
	for o.Reason == policy.ReasonDenied && len(steps) < maxDenies {
		set = proto.CloneOf(set)
		i := slices.IndexFunc(set.Policies, func(p *policyv1.Policy) bool { return p.GetName() == o.Rule.Policy })
		if i < 0 || o.Rule.Index < 0 || o.Rule.Index >= len(set.Policies[i].Rules) {
			break
		}
		old := set.Policies[i].Rules[o.Rule.Index]
		step := Step{Rule: o.Rule, Effect: "deny", Before: ruleText(old, n.td)}
		narrowed, edit := n.narrow(old)
		step.Edits, step.After = []string{edit}, ruleText(narrowed, n.td)
		if narrowed == nil {
			// The rule stays in its place and only reports, so that the indexes of the others hold.
			narrowed = proto.CloneOf(old)
			narrowed.Shadow = true
		}
		set.Policies[i].Rules[o.Rule.Index] = narrowed
		steps = append(steps, step)
		o = n.outcome(set, n.r)
	}
	return steps, o, set
}

// narrow returns a deny without this caller or this path, or nil if the whole deny must go.
func (n *nearest) narrow(old *policyv1.Rule) (*policyv1.Rule, string) {
	peer := n.r.Peer.String()
	matching := 0
	for _, s := range old.GetFrom() {
		if p, ok := idPattern(s); ok && p.matchesID(n.r.Peer, true) {
			matching++
		}
	}
	if i := slices.Index(old.GetFrom(), peer); matching == 1 && i >= 0 && len(old.GetFrom()) > 1 {
		rule := proto.CloneOf(old)
		rule.From = slices.Delete(rule.From, i, i+1)
		return rule, fmt.Sprintf("remove %q from its from", relative(peer, n.td))
	}
	if len(old.GetFrom()) == 1 && old.GetFrom()[0] != peer {
		return nil, fmt.Sprintf("remove this deny, or write its from so that %q does not cover %q", relative(old.GetFrom()[0], n.td), relative(peer, n.td))
	}
	return nil, "remove this deny, or narrow it"
}

func (n *nearest) candidates() {
	for i, pol := range n.set.Policies {
		mode := pol.GetMode() == policyv1.Mode_MODE_SHADOW
		if !mode && pol.GetMode() != policyv1.Mode_MODE_ENFORCE {
			continue
		}
		for j, rule := range pol.GetRules() {
			if isDeny(rule) {
				continue
			}
			c, ok := n.edit(rule)
			if !ok {
				continue
			}
			c.policy, c.rule, c.mode = i, j, mode
			edits := c.change.Steps[0].Edits
			if mode {
				edits = append(edits, fmt.Sprintf("set mode of policy %q to enforce", pol.GetName()))
				c.change.width += 1000
			}
			c.change.edits = len(edits)
			if c.token != "" {
				c.change.edits++
			}
			if c.change.edits == 0 {
				continue // what it misses is nothing that an edit gives
			}
			c.change.Steps[0] = Step{Rule: ruleOf(pol, j), Effect: "allow", Edits: edits, Before: ruleText(rule, n.td), After: ruleText(c.spec, n.td)}
			n.found = append(n.found, c)
		}
	}
}

func ruleOf(pol *policyv1.Policy, index int) policy.Rule {
	r := policy.Rule{Policy: pol.GetName(), Index: index, File: pol.GetFile(), Line: pol.GetLine()}
	if index >= 0 && pol.Rules[index].GetLine() != 0 {
		r.Line = pol.Rules[index].GetLine()
	}
	return r
}

// edit makes an allow cover the call.
func (n *nearest) edit(old *policyv1.Rule) (candidate, bool) {
	var edits, also []string
	rule := proto.CloneOf(old)
	c := candidate{spec: rule}
	peer := relative(n.r.Peer.String(), n.td)
	caller := slices.ContainsFunc(old.GetFrom(), func(s string) bool {
		p, ok := idPattern(s)
		return ok && p.matchesID(n.r.Peer, false)
	})
	switch {
	case n.r.Protocol != policy.ProtocolHTTP:
		if !open(old) {
			return c, false
		}
	case len(old.GetGrpc()) > 0:
		method := strings.TrimPrefix(n.r.Path, "/")
		if !n.grpc || strings.Contains(method, "?") {
			return c, false
		}
		if !slices.ContainsFunc(old.GetGrpc(), func(s string) bool { return pathPattern(s).matchesPath(n.r.Path, false) }) {
			rule.Grpc = append(rule.Grpc, method)
			edits = append(edits, fmt.Sprintf("add %q to grpc", method))
			also = append(also, fmt.Sprintf("gRPC %q by every caller of this rule", method))
			c.change.width += n.callers(old)
		}
	case len(old.GetHttp()) > 0:
		item, edit, ok := n.editHTTP(rule)
		if !ok {
			return c, false
		}
		if edit != "" {
			edits = append(edits, edit)
			also = append(also, item+" by every caller of this rule")
			c.change.width += n.callers(old)
		}
	}
	if !caller {
		rule.From = append(rule.From, n.r.Peer.String())
		edits = append([]string{fmt.Sprintf("add %q to from", peer)}, edits...)
		if open(old) {
			also = append(also, fmt.Sprintf("every other call of %q", peer))
			c.change.width += 500
		} else if w := width(old); w > 1 {
			also = append(also, fmt.Sprintf("all else that this rule covers by %q", peer))
			c.change.width += w
		}
	}
	if old.GetShadow() {
		rule.Shadow = false
		edits = append(edits, "remove shadow: true")
	}
	if jwt := old.GetJwt(); jwt != nil && !n.hasToken(jwt) {
		c.token = jwt.GetAudience()[0]
		c.change.Present = fmt.Sprintf("the caller presents a valid JWT-SVID of its own for the audience %q", c.token)
	}
	c.change.Also = strings.Join(also, "; ")
	c.change.Steps = []Step{{Edits: edits}}
	return c, true
}

func (n *nearest) hasToken(m *policyv1.JWTMatch) bool {
	t := n.r.Token
	return t != nil && (t.ID == n.r.Peer || m.GetSubject() == policyv1.SubjectBinding_SUBJECT_BINDING_ANY) &&
		slices.ContainsFunc(m.GetAudience(), func(a string) bool { return slices.Contains(t.Audience, a) })
}

// callers says how many callers a rule has, patterns counting for many.
func (n *nearest) callers(r *policyv1.Rule) int {
	w := 0
	for _, s := range r.GetFrom() {
		if w++; strings.Contains(s, star) {
			w += 100
		}
	}
	return w
}

// width says how many requests a rule covers, patterns counting for several.
func width(r *policyv1.Rule) int {
	w := 0
	count := func(s string) int {
		if strings.Contains(s, star) {
			return 10
		}
		return 1
	}
	for _, m := range r.GetHttp() {
		methods, paths := len(m.GetMethods()), 0
		if methods == 0 {
			methods = 8
		}
		for _, p := range m.GetPaths() {
			paths += count(p)
		}
		if paths == 0 {
			paths = 100
		}
		w += methods * paths
	}
	for _, g := range r.GetGrpc() {
		w += count(g)
	}
	return w
}

// editHTTP makes the http of a rule cover the request with one edit; the edit is empty if it does already.
func (n *nearest) editHTTP(rule *policyv1.Rule) (what, edit string, ok bool) {
	path, _, _ := strings.Cut(n.r.Path, "?")
	if path == "" || path[0] != '/' {
		return "", "", false
	}
	byMethod, byPath := -1, -1
	for i, m := range rule.GetHttp() {
		method := len(m.GetMethods()) == 0 && !n.grpc || slices.Contains(m.GetMethods(), n.r.Method)
		fits := len(m.GetPaths()) == 0 || slices.ContainsFunc(m.GetPaths(), func(s string) bool { return pathPattern(s).matchesPath(path, false) })
		switch {
		case method && fits:
			return "", "", true
		case method && byMethod < 0:
			byMethod = i
		case fits && byPath < 0 && len(m.GetMethods()) > 0:
			byPath = i
		}
	}
	switch {
	case !methodWritable(n.r.Method) && byMethod < 0:
		return "", "", false
	case byPath >= 0 && methodWritable(n.r.Method):
		m := rule.Http[byPath]
		m.Methods = append(m.Methods, n.r.Method)
		on := "any path"
		if len(m.GetPaths()) > 0 {
			on = flow(m.GetPaths(), 5)
		}
		return fmt.Sprintf("%s of %s", n.r.Method, on), fmt.Sprintf("add %q to methods of http item %d", n.r.Method, byPath+1), true
	case !writable(path):
		return "", "", false
	case byMethod >= 0:
		m := rule.Http[byMethod]
		m.Paths = append(m.Paths, path)
		methods := "any method"
		if len(m.GetMethods()) > 0 {
			methods = strings.Join(m.GetMethods(), ", ")
		}
		return fmt.Sprintf("%s of %q", methods, path), fmt.Sprintf("add %q to paths of http item %d", path, byMethod+1), true
	}
	rule.Http = append(rule.Http, &policyv1.HTTPMatch{Methods: []string{n.r.Method}, Paths: []string{path}})
	return fmt.Sprintf("%s of %q", n.r.Method, path), fmt.Sprintf("add {methods: [%s], paths: [%s]} to http", scalar(n.r.Method), scalar(path)), true
}

// methodWritable reports whether a document can name the method.
func methodWritable(s string) bool {
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
	})
}

// writable reports whether a pattern can say exactly this path: no segment of it is read as a wildcard.
func writable(path string) bool { return !strings.Contains(path, star) }

// own is a rule that allows this call and nothing else, in a policy of the service or in a new one.
func (n *nearest) own() (candidate, bool) {
	rule := &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{n.r.Peer.String()}}
	path, _, query := strings.Cut(n.r.Path, "?")
	also := ""
	switch {
	case n.r.Protocol != policy.ProtocolHTTP:
		also = fmt.Sprintf("every other call of %q: of a connection only the caller is known", relative(n.r.Peer.String(), n.td))
	case n.grpc && !query && writable(path):
		rule.Grpc, rule.Requires = []string{strings.TrimPrefix(path, "/")}, []string{"grpc"}
	case strings.HasPrefix(path, "/") && writable(path) && methodWritable(n.r.Method):
		rule.Http, rule.Requires = []*policyv1.HTTPMatch{{Methods: []string{n.r.Method}, Paths: []string{path}}}, []string{"http"}
	case !methodWritable(n.r.Method):
		return candidate{}, false
	case n.r.Path == star:
		rule.Http, rule.Requires = []*policyv1.HTTPMatch{{Methods: []string{n.r.Method}}}, []string{"http"}
		also = fmt.Sprintf("%s of any path", n.r.Method)
	default:
		return candidate{}, false
	}
	c := candidate{policy: -1, rule: -1, spec: rule}
	step := Step{Rule: policy.Rule{Index: -1}, Effect: "allow", After: ruleText(rule, n.td)}
	for i, pol := range n.set.Policies {
		// A policy that speaks of other services as well would allow the call for them, too.
		if pol.GetMode() == policyv1.Mode_MODE_ENFORCE && len(pol.GetServices()) == 1 && pol.GetServices()[0] == n.r.Service.String() {
			c.policy, step.Rule = i, ruleOf(pol, -1)
			step.Edits = []string{fmt.Sprintf("add this rule to allow of policy %q", pol.GetName())}
			break
		}
	}
	if c.policy < 0 {
		name := policyName(n.r.Service.Path(), func(name string) bool {
			return slices.ContainsFunc(n.set.Policies, func(p *policyv1.Policy) bool { return p.GetName() == name })
		})
		step.Edits = []string{"add this document"}
		step.After = fmt.Sprintf("kind: CallPolicy\nname: %s\nservice: %s\nallow:\n%s", scalar(name), scalar(relative(n.r.Service.String(), n.td)), indent(step.After, "  "))
	}
	c.change = Change{Steps: []Step{step}, Also: also, edits: 1}
	return c, true
}

// policyName makes a name for the policy of a service, one that is not taken.
func policyName(servicePath string, taken func(string) bool) string {
	var b strings.Builder
	for _, r := range strings.ToLower(servicePath) {
		if 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || b.Len() > 0 && (r == '.' || r == '_' || r == '-') {
			b.WriteRune(r)
		} else if b.Len() > 0 {
			b.WriteByte('-')
		}
		if b.Len() >= 100 {
			break
		}
	}
	name := strings.Trim(b.String(), "-._")
	if name == "" {
		name = "service"
	}
	for i, base := 2, name; taken(name) && i < 1000; i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return name
}

func indent(text, by string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(by + line)
	}
	return b.String()
}

// allows tries a change out: with the denies for the caller that are left, for no other rule can matter.
func (n *nearest) allows(c candidate) bool {
	if n.denies == nil {
		n.denies = n.deniesLeft()
	}
	set := proto.CloneOf(n.denies)
	pol := &policyv1.Policy{Name: "proposed", Mode: policyv1.Mode_MODE_ENFORCE, Services: []string{n.r.Service.String()}, Rules: []*policyv1.Rule{c.spec}}
	if c.policy >= 0 {
		pol.PeerHints = n.set.Policies[c.policy].PeerHints
	}
	if c.mode { // its denies come into force with it
		for _, rule := range n.set.Policies[c.policy].GetRules() {
			if isDeny(rule) {
				pol.Rules = append(pol.Rules, rule)
			}
		}
	}
	set.Policies = append(set.Policies, pol)
	r := *n.r
	if c.token != "" {
		r.Token = &policy.Token{ID: r.Peer, Audience: []string{c.token}}
	}
	return n.outcome(set, &r).Allowed
}

// deniesLeft is the set with nothing but the enforced denies that could be about the caller.
func (n *nearest) deniesLeft() *policyv1.PolicySet {
	all := n.set
	out := &policyv1.PolicySet{Format: all.Format, TrustDomain: all.TrustDomain, Defaults: all.Defaults, UserIssuers: all.UserIssuers}
	for _, pol := range all.Policies {
		if pol.GetMode() == policyv1.Mode_MODE_SHADOW {
			continue
		}
		kept := &policyv1.Policy{Name: pol.Name, Mode: pol.Mode, Services: pol.Services, PeerHints: pol.PeerHints}
		for _, rule := range pol.GetRules() {
			if isDeny(rule) && !rule.GetShadow() && (len(rule.GetFrom()) == 0 || slices.ContainsFunc(rule.GetFrom(), func(s string) bool {
				p, ok := idPattern(s)
				return !ok || p.matchesID(n.r.Peer, true)
			})) {
				kept.Rules = append(kept.Rules, rule)
			}
		}
		out.Policies = append(out.Policies, kept)
	}
	return out
}
