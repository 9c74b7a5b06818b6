package analyse

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// A Grant says what one caller may do about one call.
type Grant struct {
	// Peer and Service are SPIFFE IDs; a peer with a wildcard is a pattern of a rule for callers that are not known one by one.
	Peer    string      `json:"from"`
	Service string      `json:"to"`
	Verdict Verdict     `json:"verdict"`
	Rule    policy.Rule `json:"rule,omitzero"`
	Reason  string      `json:"reason"`
}

// WhoCan returns who may make a call, of which Peer is ignored: the known callers, those that rules write out, and patterns of
// rules for callers of other trust domains. They are in order.
func WhoCan(set *policyv1.PolicySet, known *Known, call policy.Request, any bool) ([]Grant, error) {
	part := only(set, func(p *policyv1.Policy) bool { return serves(p, call.Service) })
	j, err := newJudge(part, conditionsOf(part))
	if err != nil {
		return nil, err
	}
	var out []Grant
	ask := func(id spiffeid.ID, name string) {
		r := call
		r.Peer = id
		if any {
			if d := j.might(call.Service, id); d.Allowed {
				out = append(out, Grant{name, call.Service.String(), VerdictConditional, d.Rule, d.Reason.String()})
			}
			return
		}
		if v, _, o := j.judge(&r); v != VerdictDeny {
			out = append(out, Grant{name, call.Service.String(), v, o.Rule, o.Reason.String()})
		}
	}
	for id := range known.All() {
		ask(id, id.String())
	}
	for name, id := range unknownCallers(part, known) {
		ask(id, name)
	}
	slices.SortFunc(out, func(a, b Grant) int { return strings.Compare(a.Peer, b.Peer) })
	return out, nil
}

// WhomCan returns which services a caller may call. Without Protocol and path the question is whether it might make any call.
func WhomCan(set *policyv1.PolicySet, known *Known, call policy.Request, any bool) ([]Grant, error) {
	j, err := newJudge(set, conditionsOf(set))
	if err != nil {
		return nil, err
	}
	var out []Grant
	ask := func(id spiffeid.ID, name string) {
		r := call
		r.Service = id
		if any {
			if d := j.might(id, r.Peer); d.Allowed {
				out = append(out, Grant{r.Peer.String(), name, VerdictConditional, d.Rule, d.Reason.String()})
			}
			return
		}
		if v, _, o := j.judge(&r); v != VerdictDeny {
			out = append(out, Grant{r.Peer.String(), name, v, o.Rule, o.Reason.String()})
		}
	}
	for id := range known.All() {
		ask(id, id.String())
	}
	seen := map[string]bool{}
	for _, p := range set.GetPolicies() {
		for _, s := range p.GetServices() {
			q, ok := idPattern(s)
			if id, example := q.example(); ok && example && !seen[s] && !known.Has(id) {
				seen[s] = true
				ask(id, s)
			}
		}
	}
	slices.SortFunc(out, func(a, b Grant) int { return strings.Compare(a.Service, b.Service) })
	return out, nil
}

// might decides whether a caller may make any call at all, in some view.
func (j *judge) might(service, peer spiffeid.ID) policy.Decision {
	d := j.views[len(j.views)-1].MightAllow(service, peer)
	if !d.Allowed {
		d = j.views[min(1, len(j.views)-1)].MightAllow(service, peer)
	}
	return d
}

// only is a set with some of its policies.
func only(set *policyv1.PolicySet, keep func(*policyv1.Policy) bool) *policyv1.PolicySet {
	out := Replaced(set, nil)
	out.Policies = slices.DeleteFunc(out.Policies, func(p *policyv1.Policy) bool { return !keep(p) })
	return out
}

// unknownCallers are the callers that rules name and that are not known: by name, with an ID for it.
func unknownCallers(set *policyv1.PolicySet, known *Known) map[string]spiffeid.ID {
	out := make(map[string]spiffeid.ID)
	for _, p := range set.GetPolicies() {
		for _, r := range p.GetRules() {
			for _, s := range r.GetFrom() {
				q, ok := idPattern(s)
				if !ok || q.td == known.td && !q.literal() && (!known.may(q, false) || known.any(q, false)) {
					continue
				}
				if id, ok := q.example(); ok && !known.Has(id) {
					out[s] = id
				}
			}
		}
	}
	return out
}
