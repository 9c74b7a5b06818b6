package policy

import (
	"slices"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// former is what would hold if one roll-out had not begun.
type former struct {
	rollout  string
	policies *Policies
}

// formerOf prepares, for each roll-out that some policy of set belongs to, the policies as they would be without it.
func formerOf(set *policyv1.PolicySet, c conditions) ([]former, error) {
	var out []former
	for _, pol := range set.GetPolicies() {
		name := pol.GetRollout().GetName()
		if pol.GetRollout() == nil || slices.ContainsFunc(out, func(f former) bool { return f.rollout == name }) {
			continue
		}
		before := &policyv1.PolicySet{Format: set.GetFormat(), TrustDomain: set.GetTrustDomain(), Epoch: set.GetEpoch(), Revision: set.GetRevision(),
			Defaults: set.GetDefaults(), UserIssuers: set.GetUserIssuers()}
		for _, p := range set.GetPolicies() {
			switch r := p.GetRollout(); {
			case r == nil || r.GetName() != name:
				p = withoutRollout(p)
			case r.GetFormer() == nil:
				continue
			default:
				p = withoutRollout(r.GetFormer())
			}
			before.Policies = append(before.Policies, p)
		}
		policies, err := compileWith(c, before)
		if err != nil {
			return nil, err
		}
		out = append(out, former{name, policies})
	}
	return out, nil
}

// withoutRollout returns p, or what shares all but the roll-out with p.
func withoutRollout(p *policyv1.Policy) *policyv1.Policy {
	if p.GetRollout() == nil {
		return p
	}
	return &policyv1.Policy{Name: p.GetName(), Revision: p.GetRevision(), Services: p.GetServices(), Mode: p.GetMode(), Rules: p.GetRules(),
		File: p.GetFile(), Line: p.GetLine(), PeerHints: p.GetPeerHints()}
}

// compare says in a denial which roll-out is to blame for it.
func (p *Policies) compare(d *Decision, r *Request, might bool) {
	if p == nil || d.Allowed || len(p.former) == 0 {
		return
	}
	switch d.Reason {
	case ReasonStalePolicy, ReasonForeignService, ReasonInvalidPeer, ReasonRevoked:
		return // no policy was asked
	}
	for i := range p.former {
		s := newScan(r)
		s.might = might
		if p.former[i].policies.decide(&s).Allowed {
			d.FormerlyAllowed, d.Rollout = true, p.former[i].rollout
			return
		}
	}
}
