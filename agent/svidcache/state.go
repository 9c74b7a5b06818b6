package svidcache

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/spiffe"
)

// A state is what the CA has told, at one revision. It never changes; Apply puts another in its place.
type state struct {
	epoch    string
	revision int64
	position *nodev1.Position // of the node's cluster, the newest that was sent
	entries  *table[string, *entry]
	index    *table[spiffe.Selector, []*entry]
	bundles  map[spiffeid.TrustDomain]*bundle
	policies *policies
	revoked  *revocations
	crls     *crls
}

func newState() *state {
	return &state{
		entries:  newTable[string, *entry](),
		index:    newTable[spiffe.Selector, []*entry](),
		policies: &policies{},
		revoked:  &revocations{},
		crls:     &crls{},
	}
}

// A change is what differs between two states.
type change struct {
	entries  []string // ids of entries that came, went or have another revision
	own      bool     // the own bundle
	foreign  bool     // any other bundle
	policies bool
	revoked  bool
	crls     bool
}

// next returns the state after m, and what is different. Entries and authorities that are broken are left out and told
// of; a message that cannot be applied as a whole is an error.
func (s *state) next(td spiffeid.TrustDomain, m *nodev1.FollowResponse) (*state, change, []error, error) {
	base := s
	if m.GetSnapshot() {
		base = newState()
	}
	n := &state{epoch: m.GetEpoch(), revision: m.GetTo(), position: s.position}
	if m.Position != nil {
		n.position = m.Position
	}
	var skipped []error

	touched := n.takeEntries(td, base, m, &skipped)
	if err := n.takeBundles(td, base, m, &skipped); err != nil {
		return nil, change{}, nil, err
	}
	own := n.bundles[td]
	if own == nil || len(own.x509) == 0 {
		return nil, change{}, nil, fmt.Errorf("there is no usable X.509 authority of the own trust domain %q in it", td.Name())
	}
	n.policies = base.policies.next(m)
	n.revoked = base.revoked.next(td, m, s.revoked)
	n.crls = base.crls.next(m, own, s.crls, &skipped)

	c := change{entries: touched, policies: n.policies != s.policies && !n.policies.equal(s.policies), revoked: n.revoked != s.revoked, crls: !sameCRLs(n.crls.der, s.crls.der)}
	if m.GetSnapshot() {
		c.entries = differing(s.entries, n.entries)
		if !c.policies && n.epoch == s.epoch {
			n.policies = s.policies
		}
	}
	c.own = !sameBundle(s.bundles[td], own)
	c.foreign = len(s.bundles) != len(n.bundles)
	for foreign, b := range n.bundles {
		if foreign != td && !sameBundle(s.bundles[foreign], b) {
			c.foreign = true
		}
	}
	return n, c, skipped, nil
}

func (n *state) takeEntries(td spiffeid.TrustDomain, base *state, m *nodev1.FollowResponse, skipped *[]error) (touched []string) {
	if len(m.GetEntries()) == 0 && len(m.GetRemovedEntryIds()) == 0 {
		n.entries, n.index = base.entries, base.index
		return nil
	}
	entries := base.entries.edit()
	index := indexEdit{lists: base.index.edit(), owned: make(map[spiffe.Selector]struct{})}
	remove := func(id string) {
		if old, ok := entries.get(id); ok {
			entries.remove(id)
			index.remove(old)
		}
		touched = append(touched, id)
	}
	for _, id := range m.GetRemovedEntryIds() {
		remove(id)
	}
	for _, em := range m.GetEntries() {
		remove(em.GetId())
		e, err := readEntry(td, em)
		if err != nil {
			*skipped = append(*skipped, fmt.Errorf("registration entry %q: %w", em.GetId(), err))
			continue
		}
		entries.set(e.id, e)
		index.add(e)
	}
	n.entries, n.index = entries.done(), index.lists.done()
	slices.Sort(touched)
	return slices.Compact(touched)
}

func (n *state) takeBundles(own spiffeid.TrustDomain, base *state, m *nodev1.FollowResponse, skipped *[]error) error {
	if len(m.GetBundles()) == 0 && len(m.GetRemovedBundles()) == 0 {
		n.bundles = base.bundles
		return nil
	}
	n.bundles = make(map[spiffeid.TrustDomain]*bundle, len(base.bundles)+1)
	for td, b := range base.bundles {
		n.bundles[td] = b
	}
	for _, name := range m.GetRemovedBundles() {
		td, err := spiffe.ParseTrustDomain(name)
		if err != nil {
			return fmt.Errorf("removed bundle: %w", err)
		}
		delete(n.bundles, td)
	}
	for _, bm := range m.GetBundles() {
		b, bad, err := readBundle(bm)
		if errors.Is(err, errTooBig) && bm.GetTrustDomain() != own.Name() {
			// The old one stays. What a foreign trust domain publishes must not keep this node from everything else.
			*skipped = append(*skipped, err)
			continue
		}
		if err != nil {
			return err
		}
		*skipped = append(*skipped, bad...)
		n.bundles[b.trustDomain] = b
	}
	return nil
}

// sameBundle says whether callers and the issuing of SVIDs see no difference.
func sameBundle(a, b *bundle) bool {
	return a != nil && b != nil && a.digest == b.digest && slices.Equal(a.ids, b.ids) && sameKeys(a.signers, b.signers) && sameKeys(a.tainted, b.tainted) && sameKeys(a.jwtKnown, b.jwtKnown) && sameKeys(a.witKnown, b.witKnown)
}

func sameKeys(a, b map[string]struct{}) bool {
	if len(a) != len(b) {
		return false
	}
	for k := range a {
		if _, ok := b[k]; !ok {
			return false
		}
	}
	return true
}

// differing returns the ids of entries that are not the same in both tables.
func differing(a, b *table[string, *entry]) (ids []string) {
	a.all(func(id string, old *entry) bool {
		if e, ok := b.get(id); !ok || !e.same(old) {
			ids = append(ids, id)
		}
		return true
	})
	b.all(func(id string, _ *entry) bool {
		if _, ok := a.get(id); !ok {
			ids = append(ids, id)
		}
		return true
	})
	return ids
}

// policies are the call policies that concern this agent's entries. They never change.
type policies struct {
	synced   bool // the CA has told them
	epoch    string
	revision int64 // of the message that brought them
	defaults policyv1.DefaultsMode
	byName   map[string]*policyv1.Policy
	sorted   []*policyv1.Policy
	issuers  []*policyv1.UserIssuer // by name

	// ofID remembers which policies cover an ID; only IDs of entries are asked for, which bounds it.
	ofID sync.Map // spiffeid.ID → []*policyv1.Policy
}

// next returns p itself if m changes nothing. A snapshot without defaults is of a CA that has no policies: nothing is known
// then, which is not the same as that there are none.
func (p *policies) next(m *nodev1.FollowResponse) *policies {
	if !p.synced && m.PolicyDefaults == nil {
		return p
	}
	if p.synced && p.epoch == m.GetEpoch() && len(m.GetPolicies()) == 0 && len(m.GetRemovedPolicies()) == 0 && m.PolicyDefaults == nil &&
		len(m.GetUserIssuers()) == 0 && len(m.GetRemovedUserIssuers()) == 0 {
		return p
	}
	n := &policies{issuers: userIssuers(p.issuers, m), synced: true, epoch: m.GetEpoch(), revision: m.GetTo(), defaults: p.defaults, byName: make(map[string]*policyv1.Policy, len(p.byName)+1)}
	for name, policy := range p.byName {
		n.byName[name] = policy
	}
	for _, name := range m.GetRemovedPolicies() {
		delete(n.byName, name)
	}
	for _, policy := range m.GetPolicies() {
		n.byName[policy.GetName()] = policy
	}
	if m.PolicyDefaults != nil {
		n.defaults = m.GetPolicyDefaults()
	}
	for _, policy := range n.byName {
		n.sorted = append(n.sorted, policy)
	}
	slices.SortFunc(n.sorted, func(a, b *policyv1.Policy) int {
		if a.GetName() < b.GetName() {
			return -1
		}
		return 1
	})
	return n
}

func (p *policies) equal(o *policies) bool {
	return p.synced == o.synced && p.epoch == o.epoch && p.defaults == o.defaults && samePolicies(p.sorted, o.sorted) && sameIssuers(p.issuers, o.issuers)
}

// samePolicies compares the whole: hints and roll-outs change without a new revision, and after an older backup of the CA's
// store was put back, revisions are given once more.
func samePolicies(a, b []*policyv1.Policy) bool {
	return slices.EqualFunc(a, b, func(x, y *policyv1.Policy) bool {
		return x == y || proto.Equal(x, y)
	})
}

// of returns the policies whose service is id, by name, and those whose service it was before they were rolled out.
func (p *policies) of(id spiffeid.ID, matches func(pattern string, id spiffeid.ID) bool) []*policyv1.Policy {
	if known, ok := p.ofID.Load(id); ok {
		return known.([]*policyv1.Policy)
	}
	var found []*policyv1.Policy
	for _, policy := range p.sorted {
		covers := func(pattern string) bool { return matches(pattern, id) }
		if slices.ContainsFunc(policy.GetServices(), covers) || slices.ContainsFunc(policy.GetRollout().GetFormer().GetServices(), covers) {
			found = append(found, policy)
		}
	}
	p.ofID.Store(id, found)
	return found
}
