package registry

import (
	"slices"
	"strings"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// PolicySet returns all policies in compiled form, in order of name. It must not be changed.
func (r *Registry) PolicySet(epoch string) *policyv1.PolicySet {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.policySet(epoch, r.ix.policies)
}

// policySet is PolicySet for some of the policies. mu is held.
func (r *Registry) policySet(epoch string, policies map[string]*Policy) *policyv1.PolicySet {
	set := &policyv1.PolicySet{Format: policy.Format, TrustDomain: r.c.TrustDomain.Name(), Epoch: epoch, Revision: int64(r.ix.revision), Defaults: policyv1.DefaultsMode_DEFAULTS_MODE_DENY}
	if r.ix.defaults != nil {
		set.Defaults = r.ix.defaults.Mode
	}
	for _, p := range policies {
		set.Policies = append(set.Policies, r.ix.hintsOf(p).withHints(p.Compiled))
	}
	for _, i := range r.ix.issuers.sorted() {
		set.UserIssuers = append(set.UserIssuers, i.Compiled)
	}
	slices.SortFunc(set.Policies, func(a, b *policyv1.Policy) int { return strings.Compare(a.Name, b.Name) })
	return set
}
