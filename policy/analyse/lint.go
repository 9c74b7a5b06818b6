package analyse

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

// A Severity says how bad a Finding is.
type Severity string

const (
	// SeverityError: what is written can never have an effect. Such documents are not applied.
	SeverityError Severity = "error"
	// SeverityWarning: what is written hardly means what was meant.
	SeverityWarning Severity = "warning"
	// SeverityNote: good to know.
	SeverityNote Severity = "note"
)

// A Finding is something about a policy that its author should look at.
type Finding struct {
	Severity Severity `json:"severity"`
	// Check is the stable name of the check, such as unknown_caller.
	Check  string `json:"check"`
	Policy string `json:"policy,omitempty"`
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	// Column is 0 where the document is not at hand.
	Column  int    `json:"column,omitempty"`
	Message string `json:"message"`
}

func (f Finding) String() string {
	at := f.Policy + ": "
	switch {
	case f.File != "" && f.Column != 0:
		at = fmt.Sprintf("%s:%d:%d: ", printable(f.File), f.Line, f.Column)
	case f.File != "":
		at = fmt.Sprintf("%s:%d: ", printable(f.File), f.Line)
	case f.Policy == "":
		at = ""
	}
	if f.Severity == SeverityWarning {
		return at + f.Message
	}
	return at + string(f.Severity) + ": " + f.Message
}

// maxFindings is how many findings Lint returns. What is over it is counted.
const maxFindings = 200

// Lint is what static checks are made on.
type Lint struct {
	// Set holds all policies that there are, those to check among them.
	Set *policyv1.PolicySet
	// Only, if not nil, names the policies to check; the others are what they are compared with.
	Only map[string]bool
	// Documents are those of the policies, by name, as far as they are at hand: for columns.
	Documents map[string]*strictyaml.Document
	// Known is who there is. Nil: it is not known, and nothing is said about it.
	Known *Known
	// Ungoverned asks for the IDs that no policy names, too.
	Ungoverned bool
}

// Findings checks policies that package policy has accepted. It returns those of most weight first, then in their order, and
// how many there are over the 200 that it returns.
func (l *Lint) Findings() (found []Finding, omitted int) {
	c := &linter{Lint: l, td: l.Set.GetTrustDomain()}
	for _, pol := range l.Set.GetPolicies() {
		if l.Only != nil && !l.Only[pol.GetName()] {
			continue
		}
		c.policy(pol)
	}
	c.overlaps()
	if l.Ungoverned && l.Known != nil {
		c.ungoverned()
	}
	weight := map[Severity]int{SeverityError: 0, SeverityWarning: 1, SeverityNote: 2}
	slices.SortStableFunc(c.found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(weight[a.Severity], weight[b.Severity]), cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if n := len(c.found) - maxFindings; n > 0 {
		return c.found[:maxFindings], n + c.over
	}
	return c.found, c.over
}

type linter struct {
	*Lint
	td    string
	found []Finding
	over  int
}

func (c *linter) say(severity Severity, check string, pol *policyv1.Policy, steps []any, format string, args ...any) {
	if len(c.found) >= 20*maxFindings { // of a set with a fault in every rule, as many as anybody reads
		c.over++
		return
	}
	f := Finding{Severity: severity, Check: check, Policy: pol.GetName(), File: pol.GetFile(), Line: int(pol.GetLine()), Message: fmt.Sprintf(format, args...)}
	if line, column := where(c.Documents[pol.GetName()], steps...); line != 0 {
		f.Line, f.Column = line, column
	} else if len(steps) > 1 {
		if index := c.ruleIndex(pol, steps); index >= 0 && pol.Rules[index].GetLine() != 0 {
			f.Line = int(pol.Rules[index].GetLine())
		}
	}
	c.found = append(c.found, f)
}

// ruleIndex undoes ruleSteps.
func (c *linter) ruleIndex(pol *policyv1.Policy, steps []any) int {
	at, ok := steps[1].(int)
	if !ok {
		return -1
	}
	for i, r := range pol.GetRules() {
		if isDeny(r) == (steps[0] == "deny") {
			if at == 0 {
				return i
			}
			at--
		}
	}
	return -1
}

func (c *linter) policy(pol *policyv1.Policy) {
	allows := 0
	requests := false
	for _, r := range pol.GetRules() {
		if !isDeny(r) {
			allows++
		}
		requests = requests || !open(r) && !isDeny(r)
	}
	for i, s := range pol.GetServices() {
		p, ok := idPattern(s)
		if !ok {
			continue
		}
		steps := []any{"service", i}
		switch {
		case allows > 0 && p.wildFirst():
			c.say(SeverityWarning, "broad_service", pol, steps, "service %q is any workload of the trust domain, also one that has nothing to do with these callers; name the services", relative(s, c.td))
		case c.Known == nil || c.Known.any(p, false):
		case c.Known.may(p, false):
			c.noPod(pol, steps, s)
		default:
			c.say(SeverityWarning, "unknown_service", pol, steps, "no Identity and no entry issues %q, which this policy is for", relative(s, c.td))
		}
	}
	written := map[string]int{}
	for i, r := range pol.GetRules() {
		section := "allow"
		if isDeny(r) {
			section = "deny"
		}
		c.rule(pol, i, []any{section, written[section]}, requests)
		written[section]++
	}
}

// noPod says that no pod has an ID that one could have.
func (c *linter) noPod(pol *policyv1.Policy, steps []any, s string) {
	if !c.Known.unseen {
		c.say(SeverityNote, "no_pod", pol, steps, "no pod has %q now, as a templated Identity would give it", relative(s, c.td))
	}
}

// rule checks one rule. Steps lead to it in its document.
func (c *linter) rule(pol *policyv1.Policy, index int, steps []any, requests bool) {
	r := pol.Rules[index]
	at := func(more ...any) []any { return append(slices.Clone(steps), more...) }
	deny := isDeny(r)
	seen := map[string]bool{}
	for i, s := range r.GetFrom() {
		here := at("from", i)
		p, ok := idPattern(s)
		switch {
		case !ok:
			continue
		case seen[s]:
			c.say(SeverityWarning, "repeated", pol, here, "%q stands twice in this from", relative(s, c.td))
			continue
		}
		seen[s] = true
		foreign := p.td != c.td
		switch {
		case deny:
		case p.wildFirst() && p.rest && foreign:
			c.say(SeverityWarning, "broad_callers", pol, here, "%q is every workload of another trust domain, those that it will have tomorrow included; name its services", s)
		case p.wildFirst() && p.rest:
			c.say(SeverityWarning, "broad_callers", pol, here, "%q is every workload of the trust domain; name the callers", relative(s, c.td))
		case p.wildFirst():
			c.say(SeverityWarning, "broad_callers", pol, here, "%q has a wildcard in its first segment, so it covers callers of every kind; write the first segment out", relative(s, c.td))
		}
		switch {
		case c.Known == nil:
		case foreign && !c.Known.foreign[p.td] && !deny:
			c.say(SeverityWarning, "not_federated", pol, here, "there is no bundle of the trust domain %q, so nobody of it can call; 'signet federation create' or 'signet bundle set' brings it", p.td)
		case foreign:
		case c.Known.any(p, deny):
		case c.Known.may(p, deny):
			c.noPod(pol, here, s)
		case deny:
			c.say(SeverityNote, "unknown_caller", pol, here, "no Identity and no entry issues %q today", relative(s, c.td))
		default:
			c.say(SeverityWarning, "unknown_caller", pol, here, "no Identity and no entry issues %q, so nobody can call by it", relative(s, c.td))
		}
	}
	if deny {
		return
	}
	if open(r) && requests {
		c.say(SeverityWarning, "any_protocol", pol, at("from"), "this allow covers every request in any protocol, while others of this policy name requests; add http or grpc")
	}
	for i, m := range r.GetHttp() {
		for j, s := range m.GetPaths() {
			if p := pathPattern(s); p.rest && len(p.segments) == 0 && len(m.GetMethods()) == 0 {
				c.say(SeverityWarning, "broad_requests", pol, at("http", i, "paths", j), "%q with any method is every request; name methods or paths", s)
			}
		}
	}
}

// ungoverned says which IDs no policy names.
func (c *linter) ungoverned() {
	governed := make(map[spiffeid.ID]bool)
	for _, pol := range c.Set.GetPolicies() {
		if pol.GetMode() == policyv1.Mode_MODE_SHADOW {
			continue
		}
		for _, s := range pol.GetServices() {
			p, ok := idPattern(s)
			if !ok || len(governed) == c.Known.Count() {
				continue
			}
			for id := range c.Known.matching(p, false) {
				governed[id] = true
			}
		}
	}
	var free []string
	for id := range c.Known.All() {
		if !governed[id] {
			free = append(free, id.Path())
		}
	}
	if len(free) == 0 {
		return
	}
	slices.Sort(free)
	what := "nobody may call them"
	if c.Set.GetDefaults() == policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW {
		what = "anybody may call them, for PolicyDefaults is shadow"
	}
	c.found = append(c.found, Finding{Severity: SeverityNote, Check: "no_policy",
		Message: fmt.Sprintf("no enforced CallPolicy names %s; if these are services, %s", few(free), what)})
}

// few writes the first of many names.
func few(names []string) string {
	const limit = 5
	var b strings.Builder
	for i, s := range names {
		if i == limit {
			fmt.Fprintf(&b, " and %d more", len(names)-limit)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%q", s)
	}
	return b.String()
}
