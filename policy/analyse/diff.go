package analyse

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

const (
	// maxDifferences is how many differences Diff returns.
	maxDifferences = 1000
	// maxDecisions bounds the work of one Diff.
	maxDecisions = 4 << 20
)

// A Difference is a call that is decided otherwise.
type Difference struct {
	// Peer is a SPIFFE ID or a pattern of callers that are not known one by one, and Peers how many callers the same holds for.
	Peer    string      `json:"from"`
	Peers   int         `json:"callers"`
	Service string      `json:"to"`
	Route   string      `json:"call"`
	Before  Verdict     `json:"before"`
	After   Verdict     `json:"after"`
	Rule    policy.Rule `json:"rule,omitzero"`
	Reason  string      `json:"reason"`
}

func (d Difference) String() string {
	more := ""
	if d.Peers > 1 {
		more = fmt.Sprintf(" (and %d more callers)", d.Peers-1)
	}
	change := fmt.Sprintf("%s -> %s", d.Before, d.After)
	if d.Before == d.After {
		change = "conditional -> conditional, on something else"
	}
	by := d.Reason
	if d.Rule.Policy != "" {
		by = fmt.Sprintf("%s:%d", d.Rule.Policy, d.Rule.Line)
	}
	return fmt.Sprintf("%s%s -> %s %s: %s (%s)", d.Peer, more, d.Service, printable(d.Route), change, by)
}

// Diff returns the calls that two sets of one trust domain decide otherwise, over all known callers and services, those that
// rules name, and all requests that some rule tells apart. Complete is false if there was so much that it is a sample.
func Diff(before, after *policyv1.PolicySet, known *Known) (found []Difference, complete bool, err error) {
	d := &diff{known: known, left: maxDecisions, complete: true}
	for _, s := range d.services(before, after) {
		a := only(before, func(p *policyv1.Policy) bool { return serves(p, s.id) })
		b := only(after, func(p *policyv1.Policy) bool { return serves(p, s.id) })
		if sameDecisions(a, b) {
			continue
		}
		if err := d.service(s, a, b); err != nil {
			return nil, false, err
		}
		if d.left <= 0 || len(d.found) >= maxDifferences {
			return d.found, false, nil
		}
	}
	return d.found, d.complete, nil
}

type diff struct {
	known    *Known
	found    []Difference
	left     int
	complete bool
}

type named struct {
	name string
	id   spiffeid.ID
}

// services returns those that some policy on either side names, or all if the defaults differ.
func (d *diff) services(sets ...*policyv1.PolicySet) []named {
	out := map[string]spiffeid.ID{}
	if sets[0].GetDefaults() != sets[1].GetDefaults() {
		for id := range d.known.All() {
			out[id.String()] = id
		}
	}
	changed := map[string]bool{}
	byName := map[string]*policyv1.Policy{}
	for _, p := range sets[0].GetPolicies() {
		byName[p.GetName()] = p
		changed[p.GetName()] = true
	}
	for _, p := range sets[1].GetPolicies() {
		changed[p.GetName()] = byName[p.GetName()] == nil || !samePolicy(byName[p.GetName()], p)
	}
	for _, s := range sets {
		for _, p := range s.GetPolicies() {
			if !changed[p.GetName()] {
				continue
			}
			for _, service := range p.GetServices() {
				q, ok := idPattern(service)
				if !ok {
					continue
				}
				if id, ok := q.example(); ok {
					out[service] = id
				}
				for id := range d.known.matching(q, false) {
					out[id.String()] = id
				}
			}
		}
	}
	var list []named
	for _, name := range slices.Sorted(maps.Keys(out)) {
		list = append(list, named{name, out[name]})
	}
	return list
}

func samePolicy(a, b *policyv1.Policy) bool { return proto.Equal(unplaced(a), unplaced(b)) }

// unplaced is a policy without where it was written.
func unplaced(p *policyv1.Policy) *policyv1.Policy {
	p = proto.CloneOf(p)
	p.File, p.Line, p.Revision, p.Rollout, p.PeerHints = "", 0, 0, nil, nil
	for _, r := range p.Rules {
		r.Line, r.WhenLine, r.WhenColumn = 0, 0, 0
	}
	return p
}

func sameDecisions(a, b *policyv1.PolicySet) bool {
	return a.GetDefaults() == b.GetDefaults() && slices.EqualFunc(a.GetPolicies(), b.GetPolicies(), samePolicy)
}

func (d *diff) service(s named, a, b *policyv1.PolicySet) error {
	conditions := conditionsOf(a, b)
	d.complete = d.complete && len(conditions) <= maxConditions
	ja, err := newJudge(a, conditions)
	if err != nil {
		return err
	}
	jb, err := newJudge(b, conditions)
	if err != nil {
		return err
	}
	calls, complete := routes(a, b)
	d.complete = d.complete && complete
	for _, c := range d.callers(a, b) {
		for _, route := range calls {
			if d.left -= 2 * len(ja.views); d.left <= 0 || len(d.found) >= maxDifferences {
				return nil
			}
			r := route.request
			r.Service, r.Peer = s.id, c.id
			va, answersA, oa := ja.judge(&r)
			vb, answersB, ob := jb.judge(&r)
			if answersA == answersB {
				continue
			}
			o := ob // the rule that says so now, or did before
			if o.Rule.Policy == "" && oa.Rule.Policy != "" && vb == VerdictDeny {
				o.Rule = oa.Rule
			}
			d.found = append(d.found, Difference{Peer: c.name, Peers: c.count, Service: s.name, Route: route.name, Before: va, After: vb, Rule: o.Rule, Reason: ob.Reason.String()})
		}
	}
	return nil
}

type callerClass struct {
	named
	count int
}

// callers groups all callers by the patterns of the rules that match them: no rule tells those of one group apart.
func (d *diff) callers(sets ...*policyv1.PolicySet) []callerClass {
	matching := map[spiffeid.ID][]int{}
	names := map[spiffeid.ID]string{}
	n := 0
	seen := map[string]bool{}
	var patterns []pattern
	for _, s := range sets {
		for _, p := range s.GetPolicies() {
			for _, r := range p.GetRules() {
				for _, from := range r.GetFrom() {
					if q, ok := idPattern(from); ok && !seen[from] {
						seen[from] = true
						patterns = append(patterns, q)
						if id, ok := q.example(); ok {
							matching[id], names[id] = nil, from
						}
					}
				}
			}
		}
	}
	for _, q := range patterns {
		for id := range d.known.matching(q, true) {
			if _, found := matching[id]; !found {
				matching[id] = nil
			}
			names[id] = id.String()
			if d.left--; d.left <= 0 {
				break
			}
		}
	}
	for _, q := range patterns {
		n++
		for id := range matching {
			if d.left -= 1; q.matchesID(id, true) {
				mark := 2 * n
				if q.matchesID(id, false) {
					mark++
				}
				matching[id] = append(matching[id], mark)
			}
		}
	}
	nobody := spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString(d.known.td), "/"+anyone)
	if _, found := matching[nobody]; !found {
		matching[nobody], names[nobody] = nil, scheme+d.known.td+"/* (callers that no rule names)"
	}
	classes := map[string]*callerClass{}
	for id, marks := range matching {
		key := fmt.Sprint(marks)
		c := classes[key]
		if c == nil {
			c = &callerClass{named: named{names[id], id}}
			classes[key] = c
		}
		c.count++
		// A caller that is known is shown rather than a pattern.
		if wild := strings.Contains(c.name, star); wild && !strings.Contains(names[id], star) || names[id] < c.name && strings.Contains(names[id], star) == wild {
			c.named = named{names[id], id}
		}
	}
	var out []callerClass
	for _, c := range classes {
		out = append(out, *c)
	}
	slices.SortFunc(out, func(a, b callerClass) int { return strings.Compare(a.name, b.name) })
	return out
}
