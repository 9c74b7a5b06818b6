package analyse

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

const (
	// maxLockouts is how many services Lockouts names.
	maxLockouts = 100
	// maxAsked bounds the decisions of one look for lock-outs. What is over it is not looked at, and said.
	maxAsked = 2 << 20
	// maxNamed is how many callers a Lockout names.
	maxNamed = 10
)

// A Lockout is a service that nobody can call any more who can now.
type Lockout struct {
	// Service is its SPIFFE ID, and Services how many there are for which the same holds, itself included.
	Service  string `json:"service"`
	Services int    `json:"services"`
	// Callers are some of those who are locked out, in order, and Count is how many they are. A pattern stands for
	// callers of another trust domain.
	Callers []string `json:"callers"`
	Count   int      `json:"count"`
	// Seen says that the callers are those whose calls were seen, not those that the policies allow.
	Seen bool `json:"seen,omitempty"`
}

func (l Lockout) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s can be called by nobody any more", l.Service)
	if l.Services > 1 {
		fmt.Fprintf(&b, ", nor can %d more of its kind", l.Services-1)
	}
	who := "that may call it now"
	if l.Seen {
		who = "that did call it"
	}
	plural := "s"
	if l.Count == 1 {
		plural = ""
	}
	fmt.Fprintf(&b, ": it locks out %d caller%s %s: %s", l.Count, plural, who, strings.Join(l.Callers, ", "))
	if n := l.Count - len(l.Callers); n > 0 {
		fmt.Fprintf(&b, " and %d more", n)
	}
	return b.String()
}

// A Replacement is what a change of policies does.
type Replacement struct {
	// Before and After are all policies.
	Before, After *policyv1.PolicySet
	// Changed names the policies that differ, as far as they exist before or after.
	Changed map[string]bool
	// Known is who there is; other services than these have no callers.
	Known *Known
	// Seen are, of services whose calls were seen lately, the callers that were allowed.
	Seen map[spiffeid.ID][]spiffeid.ID
}

// Lockouts returns the services that lose all their callers: those that were seen, or those that may call it. Complete is
// false if there is so much to look at that not all of it was.
func (r *Replacement) Lockouts() (found []Lockout, complete bool, err error) {
	if r.onlyAllows() {
		return nil, true, nil
	}
	l := &lockouts{Replacement: r, left: maxAsked, named: map[spiffeid.ID]string{}}
	if err := l.prepare(); err != nil {
		return nil, false, err
	}
	classes := l.classes()
	keys := slices.Sorted(maps.Keys(classes))
	for _, key := range keys {
		if out, found1 := l.judge(classes[key]); found1 {
			if len(found) == maxLockouts {
				return found, false, nil
			}
			found = append(found, out)
		}
	}
	slices.SortFunc(found, func(a, b Lockout) int { return strings.Compare(a.Service, b.Service) })
	return found, l.left > 0, nil
}

// onlyAllows reports whether all that changes is that new policies come which deny nobody, and nobody was let through for want
// of a policy: nothing is taken away then, and a service with very many policies need not be compiled to see it.
func (r *Replacement) onlyAllows() bool {
	if r.Before.GetDefaults() != policyv1.DefaultsMode_DEFAULTS_MODE_DENY || r.After.GetDefaults() != policyv1.DefaultsMode_DEFAULTS_MODE_DENY {
		return false
	}
	changed := func(pol *policyv1.Policy) bool { return r.Changed[pol.GetName()] }
	if slices.ContainsFunc(r.Before.GetPolicies(), changed) {
		return false
	}
	return !slices.ContainsFunc(r.After.GetPolicies(), func(pol *policyv1.Policy) bool {
		return changed(pol) && slices.ContainsFunc(pol.GetRules(), func(rule *policyv1.Rule) bool { return rule.GetEffect() != policyv1.Effect_EFFECT_ALLOW })
	})
}

type lockouts struct {
	*Replacement
	before, after *policy.Policies
	old, fresh    []*policyv1.Policy // those that can matter, enforced ones only
	defaults      bool               // PolicyDefaults changes
	index         [2]*finder[int]
	left          int
	named         map[spiffeid.ID]string // what stands for services that are not known one by one
}

// prepare compiles those policies that speak of a service of one that changed.
func (l *lockouts) prepare() error {
	l.defaults = l.Before.GetDefaults() != l.After.GetDefaults()
	var services []pattern
	for _, set := range []*policyv1.PolicySet{l.Before, l.After} {
		for _, pol := range set.GetPolicies() {
			if l.Changed[pol.GetName()] {
				for _, s := range pol.GetServices() {
					if p, ok := idPattern(s); ok {
						services = append(services, p)
					}
				}
			}
		}
	}
	var err error
	if l.old, l.before, l.index[0], err = l.part(l.Before, services); err != nil {
		return err
	}
	l.fresh, l.after, l.index[1], err = l.part(l.After, services)
	return err
}

// part compiles the policies of a set that can matter. Of those that speak of none of the services only that they name
// theirs is kept.
func (l *lockouts) part(set *policyv1.PolicySet, services []pattern) ([]*policyv1.Policy, *policy.Policies, *finder[int], error) {
	out := &policyv1.PolicySet{Format: set.GetFormat(), TrustDomain: set.GetTrustDomain(), Defaults: set.GetDefaults(), UserIssuers: set.GetUserIssuers()}
	index := new(finder[int])
	for _, pol := range set.GetPolicies() {
		if pol.GetMode() == policyv1.Mode_MODE_SHADOW {
			continue
		}
		touches := l.Changed[pol.GetName()] || slices.ContainsFunc(pol.GetServices(), func(s string) bool {
			p, ok := idPattern(s)
			return !ok || slices.ContainsFunc(services, func(q pattern) bool { return p.meets(q) })
		})
		switch {
		case touches:
		case l.defaults:
			pol = &policyv1.Policy{Name: pol.Name, Mode: pol.Mode, Services: pol.Services}
		default:
			continue
		}
		for _, s := range pol.GetServices() {
			if p, ok := idPattern(s); ok {
				index.add(p, len(out.Policies))
			}
		}
		out.Policies = append(out.Policies, pol)
	}
	compiled, err := policy.Compile(out)
	return out.Policies, compiled, index, err
}

// meets reports whether there may be an ID that both patterns match.
func (p pattern) meets(q pattern) bool {
	if p.td != q.td {
		return false
	}
	for i := range min(len(p.segments), len(q.segments)) {
		if a, b := p.segments[i], q.segments[i]; a != b && a != star && b != star {
			return false
		}
	}
	switch {
	case len(p.segments) < len(q.segments):
		return p.rest
	case len(q.segments) < len(p.segments):
		return q.rest
	}
	return true
}

// A class is services of which the same policies speak.
type class struct {
	first    spiffeid.ID
	services []spiffeid.ID
	old      []int
	fresh    []int
}

// classes groups the services that the change can be about.
func (l *lockouts) classes() map[string]*class {
	classes := make(map[string]*class)
	seen := make(map[spiffeid.ID]bool)
	add := func(id spiffeid.ID) {
		if seen[id] || l.left <= 0 {
			return
		}
		seen[id] = true
		l.left--
		old, fresh := l.naming(0, l.old, id), l.naming(1, l.fresh, id)
		key := fmt.Sprint(old, fresh)
		if len(l.Seen[id]) > 0 {
			key = id.String() // who was seen is of each its own
		}
		c := classes[key]
		if c == nil {
			c = &class{first: id, old: old, fresh: fresh}
			classes[key] = c
		}
		c.services = append(c.services, id)
		if id.String() < c.first.String() {
			c.first = id
		}
	}
	if l.defaults {
		for id := range l.Known.All() {
			if id.Path() != "/"+reserved && !strings.HasPrefix(id.Path(), "/"+reserved+"/") {
				add(id)
			}
		}
		return classes
	}
	for _, list := range [][]*policyv1.Policy{l.old, l.fresh} {
		for _, pol := range list {
			if !l.Changed[pol.GetName()] {
				continue
			}
			for _, s := range pol.GetServices() {
				p, ok := idPattern(s)
				if !ok {
					continue
				}
				for id := range l.Known.matching(p, false) {
					add(id)
				}
				if id, ok := l.Known.unseenExample(p); ok {
					l.named[id] = s
					add(id)
				}
			}
		}
	}
	return classes
}

// naming returns which policies name a service.
func (l *lockouts) naming(side int, list []*policyv1.Policy, id spiffeid.ID) []int {
	var out []int
	l.index[side].covering(pattern{td: id.TrustDomain().Name(), segments: strings.Split(id.Path()[1:], "/")}, func(n int) bool {
		if serves(list[n], id) {
			out = append(out, n)
		}
		return true
	})
	slices.Sort(out)
	return slices.Compact(out)
}

// judge tells whether all callers of a class of services are locked out.
func (l *lockouts) judge(c *class) (Lockout, bool) {
	if slices.Equal(c.old, c.fresh) && !l.defaults && len(c.old) == 0 {
		return Lockout{}, false
	}
	out := Lockout{Service: cmp.Or(l.named[c.first], c.first.String()), Services: len(c.services)}
	if l.all(c, func(yield func(spiffeid.ID, string) bool) {
		for _, id := range l.Seen[c.first] {
			if !yield(id, id.String()) {
				return
			}
		}
	}, &out) {
		out.Seen = true
		return out, true
	}
	return out, l.all(c, l.callers(c), &out)
}

// all reports whether there are callers who might call, and none of them might after.
func (l *lockouts) all(c *class, callers func(func(spiffeid.ID, string) bool), out *Lockout) bool {
	out.Count, out.Callers = 0, nil
	names := make(map[string]bool)
	survivor := false
	callers(func(id spiffeid.ID, name string) bool {
		if id == c.first || names[name] {
			return true
		}
		if l.left -= 2; l.left <= 0 {
			survivor = true // not known, and said to be so
			return false
		}
		if !l.before.MightAllow(c.first, id).Allowed {
			return true
		}
		if l.after.MightAllow(c.first, id).Allowed {
			survivor = true
			return false
		}
		names[name] = true
		return true
	})
	if survivor || len(names) == 0 {
		return false
	}
	out.Count = len(names)
	sorted := slices.Sorted(maps.Keys(names))
	out.Callers = slices.Clone(sorted[:min(len(sorted), maxNamed)])
	return true
}

// callers goes through those who may call a class of services: the IDs that rules name, the known ones that they match, and
// one example for each pattern of another trust domain.
func (l *lockouts) callers(c *class) func(func(spiffeid.ID, string) bool) {
	return func(yield func(spiffeid.ID, string) bool) {
		if len(c.old) == 0 && l.Before.GetDefaults() == policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW {
			for id := range l.Known.All() {
				if !yield(id, id.String()) {
					return
				}
			}
			return
		}
		for _, n := range c.old {
			for _, r := range l.old[n].GetRules() {
				if isDeny(r) || r.GetShadow() {
					continue
				}
				for _, s := range r.GetFrom() {
					p, ok := idPattern(s)
					if !ok {
						continue
					}
					if p.td == l.Known.td && !p.literal() {
						for id := range l.Known.matching(p, false) {
							if !yield(id, id.String()) {
								return
							}
						}
						if id, ok := l.Known.unseenExample(p); ok && !yield(id, s) {
							return
						}
						continue
					}
					if id, ok := p.example(); ok && !yield(id, s) {
						return
					}
				}
			}
		}
	}
}

// example is an ID that the pattern matches.
func (p pattern) example() (spiffeid.ID, bool) {
	segments := slices.Clone(p.segments)
	for i, s := range segments {
		if s == star {
			segments[i] = anyone
		}
	}
	if p.rest {
		segments = append(segments, anyone)
	}
	id, err := spiffeid.FromString(scheme + p.td + "/" + strings.Join(segments, "/"))
	return id, err == nil
}

// anyone is a segment that no pattern writes out, or if one does, that one means as well as any.
const anyone = "any-0c9d1f"

// Replaced returns a set in which policies were put or, where the value is nil, taken out.
func Replaced(set *policyv1.PolicySet, changes map[string]*policyv1.Policy) *policyv1.PolicySet {
	out := &policyv1.PolicySet{Format: set.GetFormat(), TrustDomain: set.GetTrustDomain(), Epoch: set.GetEpoch(), Revision: set.GetRevision(),
		Defaults: set.GetDefaults(), UserIssuers: set.GetUserIssuers()}
	for _, pol := range set.GetPolicies() {
		if _, found := changes[pol.GetName()]; !found {
			out.Policies = append(out.Policies, pol)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(changes)) {
		if pol := changes[name]; pol != nil {
			out.Policies = append(out.Policies, pol)
		}
	}
	return out
}
