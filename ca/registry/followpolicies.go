package registry

import (
	"fmt"
	"hash/fnv"
	"slices"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// A concerning policy is one that an agent receives, with those of its services that concern it.
type concerning struct {
	policy   *Policy
	services []string
	// rollout is set if policy is a new version that the agent is among the first to have; former is what it replaces, nil if
	// that does not concern the agent or there is none.
	rollout *Rollout
	former  *concerning
}

// policies says what of the policies that concern the agent came, changed or went.
func (f *Follower) policies(ix *index, h *held, d *Delta) {
	concern := f.concern(ix, h)
	for name, c := range concern {
		if h.hold(itemKey{'p', name}, itemVersion{c.policy.Revision, c.sum(ix)}, d.To) {
			d.Policies = append(d.Policies, c.wire(ix))
		}
	}
	for k := range h.items {
		if k.kind == 'p' && concern[k.name] == nil && h.drop(k, d.To) {
			d.RemovedPolicies = append(d.RemovedPolicies, k.name)
		}
	}
	f.userIssuers(ix, h, d, len(concern) > 0)
	mode := policyv1.DefaultsMode_DEFAULTS_MODE_DENY
	if ix.defaults != nil {
		mode = ix.defaults.Mode
	}
	if h.defaults != mode || d.Snapshot {
		h.defaults, h.defSentAt = mode, d.To
		d.Defaults = &mode
	}
}

// concern returns what the agent is to have, by name.
func (f *Follower) concern(ix *index, h *held) map[string]*concerning {
	out := map[string]*concerning{}
	add := func(name string, p *Policy) {
		if services := servicesOf(p, h.ids); services != nil {
			out[name] = &concerning{policy: p, services: services}
		}
	}
	for id := range h.ids {
		service := id.String()
		for name, p := range ix.services.exact[service] {
			if out[name] == nil {
				add(name, p)
			}
		}
		for name, p := range ix.services.wildOver(service) {
			if out[name] == nil {
				add(name, p)
			}
		}
	}
	sides := map[string]bool{}
	for _, o := range ix.rollouts.running() {
		in := o.Includes(f.agent)
		for _, p := range o.Policies {
			services, former := servicesOf(p.Policy, h.ids), out[p.Name]
			if services == nil && former == nil {
				continue
			}
			if sides[o.Name] = in; in {
				out[p.Name] = &concerning{policy: p.Policy, services: services, rollout: o, former: former}
			}
		}
	}
	f.sides.Store(&sides)
	return out
}

// sum changes whenever c must be sent again although its policy has not changed.
func (c *concerning) sum(ix *index) uint64 {
	sum := fnv.New64a()
	for _, s := range c.services {
		sum.Write([]byte(s))
		sum.Write([]byte{0})
	}
	if len(c.policy.hinted) > 0 {
		fmt.Fprintf(sum, "hints\x00%x", ix.hintsOf(c.policy).sum)
	}
	if c.rollout != nil {
		fmt.Fprintf(sum, "rollout\x00%s\x00", c.rollout.Name)
		if c.former != nil {
			fmt.Fprintf(sum, "%d\x00%x", c.former.policy.Revision, c.former.sum(ix))
		}
	}
	return sum.Sum64()
}

// wire is what is sent. What it shares with the index is not changed by anybody.
func (c *concerning) wire(ix *index) *policyv1.Policy {
	p := ix.hintsOf(c.policy).withHints(c.policy.Compiled)
	out := &policyv1.Policy{Name: p.Name, Revision: p.Revision, Services: c.services, Mode: p.Mode, Rules: p.Rules, File: p.File, Line: p.Line, PeerHints: p.PeerHints}
	if c.rollout == nil {
		return out
	}
	out.Rollout = &policyv1.Rollout{Name: c.rollout.Name}
	if c.former != nil {
		out.Rollout.Former = c.former.wire(ix)
	}
	if c.services == nil { // the agent's services are taken out: it is told that, and nothing of what holds for others
		out.Rules, out.PeerHints = nil, nil
	}
	return out
}

// userIssuers go to every agent that has a policy.
func (f *Follower) userIssuers(ix *index, h *held, d *Delta, any bool) {
	if any {
		for name, i := range ix.issuers.byName {
			if h.hold(itemKey{'u', name}, itemVersion{rev: max(i.Revision, i.KeysRevision)}, d.To) {
				d.UserIssuers = append(d.UserIssuers, i.Compiled)
			}
		}
	}
	for k := range h.items {
		if k.kind == 'u' && (!any || ix.issuers.byName[k.name] == nil) && h.drop(k, d.To) {
			d.RemovedUserIssuers = append(d.RemovedUserIssuers, k.name)
		}
	}
	slices.Sort(d.RemovedUserIssuers)
}
