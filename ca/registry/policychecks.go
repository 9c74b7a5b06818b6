package registry

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy/analyse"
)

// policyChecks keeps who there is from one plan to the next.
type policyChecks struct {
	mu    sync.Mutex // guards the rest
	known *analyse.Known
	of    whoever
}

// whoever names one state of who there is.
type whoever struct {
	ix  *index
	who int
}

// A policyView is what the policies of a plan are checked on: what the index held when the plan was made. Unless the plan
// changes PolicyDefaults, the set has only the policies of services of which those of the plan speak: no others matter, and a
// plan must not cost more with every policy that there is.
type policyView struct {
	td     spiffeid.TrustDomain
	of     whoever
	set    *policyv1.PolicySet
	cached *analyse.Known // nil: it is made of ids and foreign
	// templates are patterns of what templated Identities stand for; unseen: which pods there are is not known.
	templates []string
	unseen    bool
	ids       []spiffeid.ID
	foreign   []spiffeid.TrustDomain
	checks    *policyChecks
	seen      func() map[spiffeid.ID][]spiffeid.ID
}

// policyView returns nil if the plan changes no policies. mu is held.
func (r *Registry) policyView(p *Plan) *policyView {
	if !slices.ContainsFunc(p.writes, func(w store.Write) bool { return w.Key == defaultsKey || strings.HasPrefix(w.Key, policyPrefix) }) {
		return nil
	}
	v := &policyView{td: r.c.TrustDomain, of: whoever{r.ix, r.ix.who}, checks: &r.checks, seen: r.c.Callers}
	if slices.ContainsFunc(p.writes, func(w store.Write) bool { return w.Key == defaultsKey }) {
		v.set = r.policySet("", r.ix.policies)
	} else {
		v.set = r.policySet("", r.ix.services.nearAll(func(yield func(*policyv1.Policy) bool) {
			for name, pol := range p.policies {
				if old := r.ix.policies[name]; old != nil && !yield(old.Compiled) || !yield(pol) {
					return
				}
			}
		}))
	}
	v.templates, v.unseen = r.ix.templatePatterns(r.c.TrustDomain), len(r.ix.unknownClusters()) > 0
	r.checks.mu.Lock()
	defer r.checks.mu.Unlock()
	if r.checks.known != nil && r.checks.of == v.of {
		v.cached = r.checks.known
	} else {
		v.ids = make([]spiffeid.ID, 0, len(r.ix.byID)+len(r.ix.derived.byID))
		v.ids = slices.AppendSeq(v.ids, r.ix.registered())
		v.foreign = slices.Collect(maps.Keys(r.ix.bundles))
		v.foreign = slices.AppendSeq(v.foreign, maps.Keys(r.ix.federations))
	}
	return v
}

func (v *policyView) known() *analyse.Known {
	if v.cached != nil {
		return v.cached
	}
	known := analyse.NewKnown(v.td, slices.Values(v.ids), v.foreign)
	v.checks.mu.Lock()
	defer v.checks.mu.Unlock()
	if v.checks.known == nil || v.checks.of.ix != v.of.ix || v.checks.of.who < v.of.who {
		v.checks.known, v.checks.of = known, v.of
	}
	return known
}

// checkPolicies fills in what the static checks find and who is locked out. What can never have an effect is an error.
func (p *Plan) checkPolicies(v *policyView, all []*resource) error {
	if v == nil {
		return nil
	}
	changes, changed := make(map[string]*policyv1.Policy), make(map[string]bool)
	defaults := false
	for _, w := range p.writes {
		if name, ok := strings.CutPrefix(w.Key, policyPrefix); ok {
			changes[name], changed[name] = nil, true
		}
		defaults = defaults || w.Key == defaultsKey
	}
	docs := make(map[string]*strictyaml.Document)
	mode := v.set.GetDefaults()
	if defaults {
		mode = policyv1.DefaultsMode_DEFAULTS_MODE_DENY // if it is deleted
	}
	var fresh []spiffeid.ID
	for _, x := range all {
		switch {
		case x.compiled != nil && changed[x.name]:
			changes[x.name], docs[x.name] = x.compiled, x.source
		case x.kind == KindPolicyDefaults && defaults:
			mode = x.mode
		case x.entry != nil && x.entry.Template == nil:
			fresh = append(fresh, x.entry.SPIFFEID)
		}
	}
	known := v.known().WithTemplates(append(v.templates, p.templatePatterns(v.td)...), v.unseen)
	after := analyse.Replaced(v.set, changes)
	after.Defaults = mode
	lint := analyse.Lint{Set: after, Only: changed, Documents: docs, Known: known.With(slices.Values(fresh))}
	p.Findings, p.FindingsOmitted = lint.Findings()
	var errs []error
	for _, f := range p.Findings {
		if f.Severity == analyse.SeverityError {
			errs = append(errs, errors.New(strings.Replace(f.String(), "error: ", "", 1)))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	change := analyse.Replacement{Before: v.set, After: after, Changed: changed, Known: known}
	if v.seen != nil {
		change.Seen = v.seen()
	}
	var complete bool
	var err error
	p.Lockouts, complete, err = change.Lockouts()
	p.LockoutsUnsure = !complete
	return err
}
