package registry

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
)

// itemKey names a thing that an agent can hold.
type itemKey struct {
	kind byte // 'e' entry, 'p' policy, 'b' bundle, 'u' issuer of user tokens
	name string
}

// itemVersion changes whenever the thing must be sent again.
type itemVersion struct {
	rev  store.Revision
	part uint64 // policies: which of its services concern the agent, and what goes with it
}

// A Delta is what changed for one agent between two revisions.
type Delta struct {
	From, To        store.Revision
	Snapshot        bool
	Entries         []*Entry
	RemovedEntries  []EntryID
	Policies        []*policyv1.Policy // with only those services that concern the agent
	RemovedPolicies []string
	Defaults        *policyv1.DefaultsMode // nil: unchanged
	OwnBundle       bool                   // the own trust domain's bundle must be sent
	Bundles         []*Bundle
	RemovedBundles  []spiffeid.TrustDomain
	// UnknownPrefixes, in a snapshot, begin the IDs of entries of which it is not known what there is.
	UnknownPrefixes []string
	// Position is how far the cluster of the agent's node was followed; nil: nothing is said of it.
	Position *Claim
	// Every agent gets all revocations.
	Revocations        []*policyv1.Revocation
	RemovedRevocations []string
	CRLs               []*CRL
	RemovedCRLs        []string
	// UserIssuers go to every agent that gets a policy.
	UserIssuers        []*policyv1.UserIssuer
	RemovedUserIssuers []string
}

func (d *Delta) empty() bool {
	return !d.Snapshot && len(d.Entries)+len(d.RemovedEntries)+len(d.Policies)+len(d.RemovedPolicies)+len(d.Bundles)+len(d.RemovedBundles) == 0 &&
		len(d.Revocations)+len(d.RemovedRevocations)+len(d.CRLs)+len(d.RemovedCRLs)+len(d.UserIssuers)+len(d.RemovedUserIssuers) == 0 && d.Defaults == nil && !d.OwnBundle
}

// Bounds of what is remembered for agents, connected or not.
const (
	maxRemovalsKept = 4096
	maxDirty        = 4096
	keepDetached    = 10 * time.Minute
)

// held is what an agent was last sent, and enough history to continue from a revision that it acknowledged earlier.
type held struct {
	at, since store.Revision // last sent; history reaches back to since
	items     map[itemKey]heldItem
	ids       map[spiffeid.ID]int // SPIFFE IDs of the entries it holds, with their number
	feds      map[spiffeid.TrustDomain]int
	entries   map[EntryID]*Entry
	removed   []removal
	unknown   bool // the snapshot said that it does not know all
	defaults  policyv1.DefaultsMode
	defSentAt store.Revision
	ownSentAt store.Revision
	revokedAt store.Revision // up to which revocations were sent
	detached  time.Time      // zero while followed
}

type heldItem struct {
	version itemVersion
	sentAt  store.Revision
}

type removal struct {
	key    itemKey
	sentAt store.Revision
}

// followers knows which agents follow this replica and what changed for them. Its lock is taken inside Registry.mu
// or alone, never the other way round.
type followers struct {
	mu      sync.Mutex
	active  map[*Follower]struct{}
	byRoot  map[spiffeid.ID]map[*Follower]struct{}
	byAgent map[spiffeid.ID]map[*Follower]struct{}
	kept    map[spiffeid.ID]*held
	// behind are those whose agents were told more of a cluster, by another replica, than is known here.
	behind        map[*Follower]string
	behindChanged map[string]chan struct{} // by cluster; one slot: there is one more
}

func (f *followers) init() {
	f.behind, f.behindChanged = map[*Follower]string{}, map[string]chan struct{}{}
	f.active = map[*Follower]struct{}{}
	f.byRoot = map[spiffeid.ID]map[*Follower]struct{}{}
	f.byAgent = map[spiffeid.ID]map[*Follower]struct{}{}
	f.kept = map[spiffeid.ID]*held{}
}

// A Follower tells one stream of one agent what changes for it. It belongs to one goroutine, except Wake.
type Follower struct {
	r     *Registry
	agent spiffeid.ID
	held  *held
	wake  chan struct{} // one slot: look again
	claim Position      // what the agent says that it was told of its cluster
	// sides names the roll-outs whose policies concern the agent, with whether it has the new versions.
	sides atomic.Pointer[map[string]bool]

	// guarded by followers.mu
	roots   map[spiffeid.ID]bool
	dirty   map[EntryID]struct{}
	full    bool // dirty does not say everything: compare the whole scope
	policy  bool
	bundles bool
	own     bool
	node    bool
	revoked bool
	known   bool // the pods of a cluster are known now
}

// Follow begins to follow for an agent that holds revision rev of epoch; rev 0, or a revision that the history does
// not reach, begins with a snapshot. Close must be called. Only one follower of an agent continues its history: a
// second one begins with a snapshot.
func (r *Registry) Follow(agent spiffeid.ID, rev store.Revision, sameEpoch bool) *Follower {
	return r.FollowOn(agent, rev, sameEpoch, Claim{})
}

// FollowOn is Follow for an agent that was told of its node's cluster as claim says, maybe by another replica.
func (r *Registry) FollowOn(agent spiffeid.ID, rev store.Revision, sameEpoch bool, claim Claim) *Follower {
	f := &Follower{r: r, agent: agent, wake: make(chan struct{}, 1), full: true, own: true, policy: true, bundles: true, revoked: true}
	fs := &r.follow
	r.mu.RLock()
	roots := r.ix.roots(r.c.TrustDomain, agent, r.c.Now())
	fs.mu.Lock()
	defer fs.mu.Unlock()
	on, onPodNode := podNode(r.ix.nodes[agent])
	if _, watched := r.ix.derived.clusters[on.cluster]; onPodNode && watched && claim.Cluster == on.cluster && r.ix.derived.followed[on.cluster].behind(claim.Position) {
		f.claim = claim.Position
		fs.behind[f] = on.cluster
		notify(fs.behindOf(on.cluster))
	}
	r.mu.RUnlock()
	now := r.c.Now()
	for id, h := range fs.kept {
		if !h.detached.IsZero() && now.Sub(h.detached).Abs() > keepDetached {
			delete(fs.kept, id)
		}
	}
	if onPodNode {
		// What a node's pods are is not said by a revision, so that nothing says what it was sent by another replica.
		delete(fs.kept, agent)
	}
	if h := fs.kept[agent]; h != nil && !r.c.Replicated && sameEpoch && rev > 0 && !h.detached.IsZero() && h.since <= rev && rev <= h.at {
		h.detached = time.Time{}
		h.rewind(rev)
		f.held = h
		delete(fs.kept, agent)
	}
	fs.active[f] = struct{}{}
	put(fs.byAgent, agent, f, struct{}{})
	f.setRoots(roots)
	f.wake <- struct{}{}
	return f
}

// rewind makes h say what the agent held at rev: everything sent later counts as not sent.
func (h *held) rewind(rev store.Revision) {
	for k, it := range h.items {
		if it.sentAt > rev {
			it.version = itemVersion{rev: -1}
			h.items[k] = it
		}
	}
	for _, rm := range h.removed {
		if _, back := h.items[rm.key]; rm.sentAt > rev && !back {
			h.items[rm.key] = heldItem{version: itemVersion{rev: -1}, sentAt: rm.sentAt}
		}
	}
	if h.defSentAt > rev {
		h.defaults = -1
	}
	h.revokedAt = min(h.revokedAt, rev)
	h.at = rev
}

// setRoots registers f under its roots. followers.mu is held.
func (f *Follower) setRoots(roots map[spiffeid.ID]bool) {
	fs := &f.r.follow
	for id := range f.roots {
		drop(fs.byRoot, id, f)
	}
	f.roots = roots
	for id := range roots {
		put(fs.byRoot, id, f, struct{}{})
	}
}

// Close ends following. What the agent holds is remembered for a while, so that it can continue.
func (f *Follower) Close() {
	fs := &f.r.follow
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f.setRoots(nil)
	delete(fs.active, f)
	delete(fs.behind, f)
	drop(fs.byAgent, f.agent, f)
	if f.held != nil {
		f.held.detached = f.r.c.Now()
		fs.kept[f.agent] = f.held
	}
}

// Wake is signalled when something may have changed for the agent, or for the node itself.
func (f *Follower) Wake() <-chan struct{} { return f.wake }

func (f *Follower) signal() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// Followers counts the streams that are followed now.
func (r *Registry) Followers() int {
	r.follow.mu.Lock()
	defer r.follow.mu.Unlock()
	return len(r.follow.active)
}

// OwnBundleChanged tells every follower that the trust domain's own bundle is another one.
func (r *Registry) OwnBundleChanged() {
	r.follow.mu.Lock()
	defer r.follow.mu.Unlock()
	for f := range r.follow.active {
		f.own = true
		f.signal()
	}
}

// markKnown tells all that the pods of a cluster are known now.
func (fs *followers) markKnown() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for f := range fs.active {
		f.known = true
		f.signal()
	}
}

func (fs *followers) markAll() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for f := range fs.active {
		f.full, f.policy, f.bundles, f.node, f.revoked = true, true, true, true, true
		f.signal()
	}
}

// mark tells the followers what a batch changed. Registry.mu is held.
func (fs *followers) mark(ix *index, ch *changes) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, id := range ch.nodes {
		for f := range fs.byAgent[id] {
			f.node = true
			f.signal()
		}
	}
	for _, id := range ch.podNodes {
		for f := range fs.byRoot[id] {
			f.node = true
			f.signal()
		}
	}
	if ch.roots {
		for f := range fs.active {
			f.full = true
			f.signal()
		}
	}
	parents := map[spiffeid.ID]bool{}
	if len(ch.entries) > 1 {
		for _, c := range ch.entries {
			if c.old != nil {
				parents[c.old.ParentID] = true
			}
		}
	}
	for _, c := range ch.entries {
		for _, e := range []*Entry{c.old, c.new} {
			if e == nil {
				continue
			}
			// An entry that others descend from moves them all, also those that left in the same batch.
			moves := e.Pod == nil && (len(ix.byParent[e.SPIFFEID]) > 0 || parents[e.SPIFFEID])
			for up := range ix.ascend(e, time.Time{}) {
				for f := range fs.byRoot[up] {
					if f.full = f.full || moves || len(f.dirty) >= maxDirty; !f.full {
						if f.dirty == nil {
							f.dirty = map[EntryID]struct{}{}
						}
						f.dirty[e.ID] = struct{}{}
					}
					f.signal()
				}
			}
		}
	}
	if len(ch.policies) > 0 || ch.defaults || ch.policySide {
		for f := range fs.active {
			f.policy = true
			f.signal()
		}
	}
	if ch.revocations || ch.crls {
		for f := range fs.active {
			f.revoked = true
			f.signal()
		}
	}
	if len(ch.bundles) > 0 {
		for f := range fs.active {
			f.bundles = true
			f.signal()
		}
	}
}

// take returns and forgets what was marked.
func (f *Follower) take() (m struct {
	dirty                                     map[EntryID]struct{}
	full, policy, bundles, own, node, revoked bool
	known, behind                             bool
}) {
	fs := &f.r.follow
	fs.mu.Lock()
	defer fs.mu.Unlock()
	m.dirty, m.full, m.policy, m.bundles, m.own, m.node, m.revoked = f.dirty, f.full, f.policy, f.bundles, f.own, f.node, f.revoked
	m.known, f.known = f.known, false
	_, m.behind = fs.behind[f]
	f.dirty, f.full, f.policy, f.bundles, f.own, f.node, f.revoked = nil, false, false, false, false, false, false
	return m
}

// Next returns what changed since the last call, and nil if nothing did. It does not block. With force it returns an
// empty Delta that moves the revision on instead of nil.
func (f *Follower) Next(force bool) *Delta {
	m := f.take()
	now := f.r.c.Now()
	f.r.mu.RLock()
	defer f.r.mu.RUnlock()
	ix := f.r.ix
	d := &Delta{To: ix.revision}
	h := f.held
	if h != nil && h.revokedAt < ix.revocations.since {
		h = nil // more was revoked since than is remembered as changes
	}
	if m.known && h != nil && h.unknown {
		h = nil // now what the agent has kept for want of knowledge can be told from what there is
	}
	if h == nil {
		h = &held{since: ix.revision, items: map[itemKey]heldItem{}, ids: map[spiffeid.ID]int{},
			feds: map[spiffeid.TrustDomain]int{}, entries: map[EntryID]*Entry{}, defaults: -1}
		f.held, d.Snapshot, m.full, m.own, m.revoked = h, true, true, true, true
		d.UnknownPrefixes = ix.unknownOf(f.agent)
		if on, ok := podNode(ix.nodes[f.agent]); ok && m.behind && len(d.UnknownPrefixes) == 0 {
			d.UnknownPrefixes = []string{PodEntryPrefix(on.cluster)}
		}
		h.unknown = len(d.UnknownPrefixes) > 0
	}
	d.From = h.at
	if d.Snapshot {
		d.From = 0
	}
	if m.node && !m.full {
		// A node whose selectors changed has other roots; renewals of its SVID change none.
		if !equalRoots(f.roots, ix.roots(f.r.c.TrustDomain, f.agent, now)) {
			m.full = true
		}
	}
	before := len(h.ids) + len(h.feds)
	changedIDs := m.full
	if m.full {
		f.rescope(ix, h, d, now, m.behind)
	} else {
		for id := range m.dirty {
			e := ix.entry(id)
			if e != nil && e.Pod != nil && m.behind {
				continue
			}
			if e != nil && !e.alias() && !e.Expired(now) && f.inScope(ix, e, now) && (e.Pod == nil || ix.takenBy(e) == nil) {
				f.holdEntry(h, d, e)
			} else {
				f.dropEntry(h, d, id)
			}
		}
		changedIDs = len(d.Entries)+len(d.RemovedEntries) > 0 || before != len(h.ids)+len(h.feds)
	}
	if changedIDs || m.policy {
		f.policies(ix, h, d)
	}
	if changedIDs || m.bundles {
		f.foreignBundles(ix, h, d)
	}
	if d.Snapshot {
		d.Revocations = ix.revocations.all()
	} else if m.revoked {
		d.Revocations, d.RemovedRevocations = ix.revocations.after(h.revokedAt)
	}
	if m.revoked {
		f.crls(ix, h, d)
	}
	if m.own {
		d.OwnBundle = true
		h.ownSentAt = d.To
	}
	if d.empty() && !force {
		return nil
	}
	h.at, h.revokedAt = d.To, d.To
	if n := len(h.removed) - maxRemovalsKept; n > 0 {
		h.since = h.removed[n-1].sentAt
		h.removed = slices.Clone(h.removed[n:])
	}
	slices.SortFunc(d.Entries, func(a, b *Entry) int { return a.CreatedAt.Compare(b.CreatedAt) })
	if d.Snapshot && !h.unknown || len(d.Entries)+len(d.RemovedEntries) > 0 && !m.behind {
		if on, ok := podNode(ix.nodes[f.agent]); ok && ix.derived.clusters[on.cluster] && len(ix.derived.told[on.cluster]) > 0 {
			d.Position = &Claim{on.cluster, ix.derived.told[on.cluster]}
		}
	}
	return d
}

// rescope works out anew what the agent may serve, and says what of it came or went. behind: of pods nothing is said, since the agent was told more than is
// known here. What it has of them it keeps, and one that is gone does not come back to it.
func (f *Follower) rescope(ix *index, h *held, d *Delta, now time.Time, behind bool) {
	roots := ix.roots(f.r.c.TrustDomain, f.agent, now)
	f.r.follow.mu.Lock()
	f.setRoots(roots)
	f.r.follow.mu.Unlock()
	scope := map[EntryID]*Entry{}
	ix.descend(roots, now, func(e *Entry) {
		if e.Pod == nil || !behind {
			scope[e.ID] = e
		}
	})
	for id := range h.entries {
		if scope[id] == nil {
			f.dropEntry(h, d, id)
		}
	}
	for k := range h.items { // rewound removals
		if k.kind == 'e' && scope[EntryID(k.name)] == nil {
			f.dropEntry(h, d, EntryID(k.name))
		}
	}
	for _, e := range scope {
		f.holdEntry(h, d, e)
	}
}

func equalRoots(a, b map[spiffeid.ID]bool) bool {
	if len(a) != len(b) {
		return false
	}
	for id := range a {
		if !b[id] {
			return false
		}
	}
	return true
}

func (f *Follower) inScope(ix *index, e *Entry, now time.Time) bool {
	for up := range ix.ascend(e, now) {
		if f.roots[up] {
			return true
		}
	}
	return false
}

func (f *Follower) holdEntry(h *held, d *Delta, e *Entry) {
	if old := h.entries[e.ID]; old != nil {
		h.count(old, -1)
	}
	h.entries[e.ID] = e
	h.count(e, +1)
	if h.hold(itemKey{'e', string(e.ID)}, itemVersion{rev: e.Revision}, d.To) {
		d.Entries = append(d.Entries, e)
	}
}

func (f *Follower) dropEntry(h *held, d *Delta, id EntryID) {
	if old := h.entries[id]; old != nil {
		h.count(old, -1)
		delete(h.entries, id)
	}
	if h.drop(itemKey{'e', string(id)}, d.To) {
		d.RemovedEntries = append(d.RemovedEntries, id)
	}
}

func (h *held) count(e *Entry, n int) {
	if h.ids[e.SPIFFEID] += n; h.ids[e.SPIFFEID] == 0 {
		delete(h.ids, e.SPIFFEID)
	}
	for _, td := range e.FederatesWith {
		if h.feds[td] += n; h.feds[td] == 0 {
			delete(h.feds, td)
		}
	}
}

// hold notes that the agent is sent this version; false if it has it.
func (h *held) hold(k itemKey, v itemVersion, at store.Revision) bool {
	if have, ok := h.items[k]; ok && have.version == v {
		return false
	}
	h.items[k] = heldItem{v, at}
	return true
}

func (h *held) drop(k itemKey, at store.Revision) bool {
	if _, ok := h.items[k]; !ok {
		return false
	}
	delete(h.items, k)
	h.removed = append(h.removed, removal{k, at})
	return true
}

func (f *Follower) foreignBundles(ix *index, h *held, d *Delta) {
	for td := range h.feds {
		if b := ix.bundles[td]; b != nil && h.hold(itemKey{'b', td.Name()}, itemVersion{rev: b.Revision}, d.To) {
			d.Bundles = append(d.Bundles, b)
		}
	}
	for k := range h.items {
		if k.kind != 'b' {
			continue
		}
		td, err := spiffeid.TrustDomainFromString(k.name)
		if err != nil || h.feds[td] == 0 || ix.bundles[td] == nil {
			if h.drop(k, d.To) {
				d.RemovedBundles = append(d.RemovedBundles, td)
			}
		}
	}
}

// Held returns how many entries the agent holds by what it was sent.
func (f *Follower) Held() int {
	if f.held == nil {
		return 0
	}
	return len(f.held.entries)
}

// AwaitBarrier makes the index hold everything that was committed before the call; the next Next shows it.
func (f *Follower) AwaitBarrier(ctx context.Context) error {
	_, err := f.r.Barrier(ctx)
	return err
}

// Restart forgets what the agent was sent: the next Delta is a snapshot.
func (f *Follower) Restart() { f.held = nil }
