package analyse

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

const (
	// maxRivals is how many other rules one rule is compared with.
	maxRivals = 256
	// maxComparisons bounds the work of all comparisons of one Lint.
	maxComparisons = 2 << 20
)

// A rival is a rule with which others are compared.
type rival struct {
	policy *policyv1.Policy
	index  int
	order  int
}

func (v rival) rule() *policyv1.Rule { return v.policy.Rules[v.index] }

func (v rival) String() string {
	return fmt.Sprintf("%s:%d", v.policy.GetName(), v.rule().GetLine())
}

// A finder finds the patterns that cover another one.
type finder[T any] struct {
	below map[string]*finder[T]
	here  []T
	rest  []T // of patterns that end here with "**"
}

func (f *finder[T]) add(p pattern, v T) {
	for _, segment := range append([]string{p.td}, p.segments...) {
		next := f.below[segment]
		if next == nil {
			if f.below == nil {
				f.below = make(map[string]*finder[T])
			}
			next = new(finder[T])
			f.below[segment] = next
		}
		f = next
	}
	if p.rest {
		f.rest = append(f.rest, v)
	} else {
		f.here = append(f.here, v)
	}
}

// covering calls yield with what was added for patterns that may cover p, a superset of those that do, until it returns false.
func (f *finder[T]) covering(p pattern, yield func(T) bool) bool {
	root := f.below[p.td]
	return root == nil || root.cover(p, 0, yield)
}

func (f *finder[T]) cover(p pattern, at int, yield func(T) bool) bool {
	for _, v := range f.rest {
		if !yield(v) {
			return false
		}
	}
	if at == len(p.segments) {
		if p.rest {
			return true
		}
		for _, v := range f.here {
			if !yield(v) {
				return false
			}
		}
		return true
	}
	if next := f.below[star]; next != nil && !next.cover(p, at+1, yield) {
		return false
	}
	if segment := p.segments[at]; segment != star {
		if next := f.below[segment]; next != nil {
			return next.cover(p, at+1, yield)
		}
	}
	return true
}

// overlaps says which rules another one makes superfluous: a deny that covers an allow, or a rule of the same effect that
// covers it. Rules are compared where the services of one policy are among those of the other.
func (c *linter) overlaps() {
	byService := make(map[string]*finder[rival]) // by the text of a service pattern
	services := new(finder[string])
	near := c.nearby()
	bases := make([]int, len(c.Set.GetPolicies())) // where the rules of each policy begin among all
	order := 0
	for n, pol := range c.Set.GetPolicies() {
		bases[n] = order
		order += len(pol.GetRules())
		if pol.GetMode() != policyv1.Mode_MODE_ENFORCE || !near(pol) {
			continue
		}
		for _, s := range pol.GetServices() {
			p, ok := idPattern(s)
			if !ok {
				continue
			}
			f := byService[s]
			if f == nil {
				f = new(finder[rival])
				byService[s] = f
				services.add(p, s)
			}
			for i, r := range pol.GetRules() {
				if r.GetShadow() || isDeny(r) && conditional(r) {
					continue
				}
				for _, from := range r.GetFrom() {
					if p, ok := idPattern(from); ok {
						f.add(p, rival{pol, i, bases[n] + i})
					}
				}
			}
		}
	}
	budget := maxComparisons
	for n, pol := range c.Set.GetPolicies() {
		if pol.GetMode() != policyv1.Mode_MODE_ENFORCE {
			continue
		}
		for i, r := range pol.GetRules() {
			if c.Only != nil && !c.Only[pol.GetName()] || r.GetShadow() || len(r.GetFrom()) == 0 || len(pol.GetServices()) == 0 {
				continue
			}
			if budget <= 0 {
				c.found = append(c.found, Finding{Severity: SeverityNote, Check: "not_compared", Policy: pol.GetName(), File: pol.GetFile(), Line: int(pol.GetLine()),
					Message: "there are so many rules that not all were compared with one another; those from here on were not"})
				return
			}
			c.overlap(rival{pol, i, bases[n] + i}, byService, services, &budget)
		}
	}
}

// nearby tells which policies may speak of a service of those that are checked.
func (c *linter) nearby() func(*policyv1.Policy) bool {
	if c.Only == nil {
		return func(*policyv1.Policy) bool { return true }
	}
	var checked []pattern
	for _, pol := range c.Set.GetPolicies() {
		if c.Only[pol.GetName()] {
			for _, s := range pol.GetServices() {
				if p, ok := idPattern(s); ok {
					checked = append(checked, p)
				}
			}
		}
	}
	return func(pol *policyv1.Policy) bool {
		return slices.ContainsFunc(pol.GetServices(), func(s string) bool {
			p, ok := idPattern(s)
			return ok && slices.ContainsFunc(checked, p.meets)
		})
	}
}

// overlap compares one rule with those that cover its first caller.
func (c *linter) overlap(v rival, byService map[string]*finder[rival], services *finder[string], budget *int) {
	service, ok := idPattern(v.policy.Services[0])
	from, ok2 := idPattern(v.rule().GetFrom()[0])
	if !ok || !ok2 {
		return
	}
	met := 0
	var denied, allowed *rival
	services.covering(service, func(s string) bool {
		return byService[s].covering(from, func(o rival) bool {
			*budget--
			if o.policy == v.policy && o.index == v.index {
				return true
			}
			if met++; met > maxRivals || *budget <= 0 {
				return false
			}
			switch {
			case isDeny(o.rule()) && !isDeny(v.rule()):
				if denied == nil && c.swallows(o, v, budget) {
					denied = &o
				}
			case isDeny(o.rule()) == isDeny(v.rule()):
				// Of two that are the same, the later one is superfluous.
				if allowed == nil && c.swallows(o, v, budget) && (o.order < v.order || !c.swallows(v, o, budget)) {
					allowed = &o
				}
			}
			return denied == nil
		})
	})
	if denied == nil && allowed == nil {
		return
	}
	steps := ruleSteps(v.policy, v.index)
	switch {
	case denied != nil:
		c.say(SeverityWarning, "shadowed", v.policy, steps, "this allow has no effect: deny %s covers all of it", *denied)
	case allowed != nil && sameRule(allowed.rule(), v.rule()):
		c.say(SeverityWarning, "duplicate", v.policy, steps, "this rule is the same as %s", *allowed)
	case allowed != nil:
		c.say(SeverityWarning, "subsumed", v.policy, steps, "this rule adds nothing: %s covers all of it", *allowed)
	}
}

func sameRule(a, b *policyv1.Rule) bool {
	a, b = proto.CloneOf(a), proto.CloneOf(b)
	a.Line, b.Line, a.WhenLine, b.WhenLine, a.WhenColumn, b.WhenColumn = 0, 0, 0, 0, 0, 0
	return proto.Equal(a, b)
}

// swallows reports whether all that b says, a says or denies as well.
func (c *linter) swallows(a, b rival, budget *int) bool {
	if a.policy != b.policy && !allCovered(b.policy.GetServices(), a.policy.GetServices(), false, idPattern, budget) {
		return false
	}
	ra, rb := a.rule(), b.rule()
	if conditional(ra) && (!proto.Equal(ra.GetJwt(), rb.GetJwt()) || ra.GetWhen() != rb.GetWhen()) {
		return false
	}
	if isDeny(ra) && isDeny(rb) && listsMethods(rb) && !listsMethods(ra) {
		return false // only a deny that lists methods refuses requests that override theirs
	}
	return allCovered(rb.GetFrom(), ra.GetFrom(), isDeny(ra), idPattern, budget) && requestsCovered(ra, rb, budget)
}

func listsMethods(r *policyv1.Rule) bool {
	return len(r.GetGrpc()) > 0 || slices.ContainsFunc(r.GetHttp(), func(m *policyv1.HTTPMatch) bool { return len(m.GetMethods()) > 0 })
}

// allCovered reports whether each pattern of inner is covered by one of outer.
func allCovered(inner, outer []string, wide bool, parse func(string) (pattern, bool), budget *int) bool {
	for _, s := range inner {
		if slices.Contains(outer, s) {
			*budget -= len(outer) / 16
			continue
		}
		p, ok := parse(s)
		if !ok {
			return false
		}
		*budget -= len(outer)
		if *budget <= 0 || !slices.ContainsFunc(outer, func(o string) bool {
			q, ok := parse(o)
			return ok && q.covers(p, wide)
		}) {
			return false
		}
	}
	return true
}

// requestsCovered reports whether a is about all requests that the allow or deny b is about.
func requestsCovered(a, b *policyv1.Rule, budget *int) bool {
	if open(a) {
		return true
	}
	if open(b) {
		return false
	}
	deny := isDeny(a)
	if len(a.GetGrpc()) > 0 {
		if len(b.GetGrpc()) == 0 {
			return false
		}
		return allCovered(b.GetGrpc(), a.GetGrpc(), deny, grpcPattern, budget)
	}
	items := b.GetHttp()
	if len(b.GetGrpc()) > 0 {
		if isDeny(b) {
			return false // it is wider than its methods say
		}
		m := &policyv1.HTTPMatch{Methods: []string{"POST"}}
		for _, g := range b.GetGrpc() {
			m.Paths = append(m.Paths, "/"+g)
		}
		items = []*policyv1.HTTPMatch{m}
	}
	for _, item := range items {
		if !slices.ContainsFunc(a.GetHttp(), func(m *policyv1.HTTPMatch) bool { return itemCovered(m, item, deny, budget) }) {
			return false
		}
	}
	return true
}

func itemCovered(a, b *policyv1.HTTPMatch, deny bool, budget *int) bool {
	switch {
	case len(a.GetMethods()) == 0 && !deny && slices.Contains(b.GetMethods(), "POST"):
		return false // of what could be taken for gRPC, an allow covers only what it names POST for
	case len(a.GetMethods()) == 0:
	case len(b.GetMethods()) == 0:
		return false
	case slices.ContainsFunc(b.GetMethods(), func(s string) bool { return !slices.Contains(a.GetMethods(), s) }):
		return false
	}
	if len(a.GetPaths()) == 0 {
		return true
	}
	return len(b.GetPaths()) > 0 && allCovered(b.GetPaths(), a.GetPaths(), deny, func(s string) (pattern, bool) { return pathPattern(s), true }, budget)
}

func grpcPattern(s string) (pattern, bool) {
	return pathPattern("/" + strings.TrimPrefix(s, "/")), true
}
