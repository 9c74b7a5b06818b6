package svidcache

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
)

var errStopped = fmt.Errorf("%w: the agent is shutting down", workloadapi.ErrUnavailable)

// policyFormat is the PolicySet format that the cache makes.
const policyFormat = 1

// A watcher is one caller's subscription, or a caller that waits for its registration.
type watcher struct {
	pid        int32
	uid, gid   uint32
	selectors  map[spiffe.Selector]struct{}
	holdsSVID  bool // entries are issued and kept for it
	wit        bool // WIT-SVIDs too
	allBundles bool // it sees the bundles of all trust domains

	// Guarded by Cache.mu.
	wake    chan struct{} // one slot: for awaitEntry to look again; nil before
	entries []*entry      // what it matches now, the default first
	open    bool          // out is to hold what it sees
	queued  bool          // it is in Cache.queue

	// out has one slot, for the newest update. mu, which comes before Cache.mu, guards what is put there and what follows.
	out       chan workloadapi.Update
	mu        sync.Mutex
	closed    bool
	sent      *shown // what the last update showed
	before    *shown // what the one before it showed, in case that it is withdrawn
	unsettled time.Time
	settle    *time.Timer // while unsettled
}

var _ workloadapi.Source = (*Cache)(nil)

// Watch sends the caller's identities, bundles and policies at once and again, in full, after each change that the
// caller can see. The first update waits for a registration in flight and for the SVIDs that are being issued. It is
// workloadapi.Source's.
func (c *Cache) Watch(ctx context.Context, caller workloadapi.Caller) (<-chan workloadapi.Update, error) {
	return c.follow(ctx, newWatcher(caller, true))
}

// follow sends w's updates.
func (c *Cache) follow(ctx context.Context, w *watcher) (<-chan workloadapi.Update, error) {
	c.subscribe(w)
	if err := c.awaitEntry(ctx, w); err != nil && !errors.Is(err, workloadapi.ErrNoIdentity) {
		c.unsubscribe(w)
		return nil, err
	}
	return c.open(ctx, w)
}

// open begins to put updates into w's slot, until ctx ends. Whoever changes what w may see kicks it.
func (c *Cache) open(ctx context.Context, w *watcher) (<-chan workloadapi.Update, error) {
	if !c.enter() {
		c.unsubscribe(w)
		return nil, errStopped
	}
	c.mu.Lock()
	w.open = true
	c.mu.Unlock()
	c.refresh(w)
	context.AfterFunc(ctx, func() {
		defer c.tasks.Done()
		w.mu.Lock()
		defer w.mu.Unlock()
		c.unsubscribe(w)
		w.settled()
		w.closed = true
		close(w.out)
	})
	return w.out, nil
}

// kick has w looked at again. It is called with mu held.
func (c *Cache) kick(w *watcher) {
	kick(w.wake)
	if !w.open || w.queued {
		return
	}
	w.queued = true
	c.queue = append(c.queue, w)
	if !c.refreshing {
		c.refreshing = true
		c.tasks.Go(c.refreshAll) // Run has not returned: an open watcher is a task too
	}
}

// refreshAll looks at the watchers in the queue until it is empty: one goroutine for all of them, so that those that
// have nothing to hear of cost none.
func (c *Cache) refreshAll() {
	for {
		c.mu.Lock()
		queue := c.queue
		c.queue = nil
		for _, w := range queue {
			w.queued = false
		}
		if len(queue) == 0 {
			c.refreshing = false
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
		for _, w := range queue {
			c.refresh(w)
		}
	}
}

func newWatcher(caller workloadapi.Caller, holdsSVID bool) *watcher {
	w := &watcher{
		pid: caller.PID, uid: caller.UID, gid: caller.GID, selectors: make(map[spiffe.Selector]struct{}, len(caller.Selectors)), holdsSVID: holdsSVID,
		out: make(chan workloadapi.Update, 1),
	}
	for _, s := range caller.Selectors {
		w.selectors[s] = struct{}{}
	}
	return w
}

func (c *Cache) subscribe(w *watcher) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watchers[w] = struct{}{}
	c.byChan[w.out] = w
	for s := range w.selectors {
		if c.bySel[s] == nil {
			c.bySel[s] = make(map[*watcher]struct{})
		}
		c.bySel[s][w] = struct{}{}
	}
	c.rematch(w, c.state.Load(), c.config.Now())
}

func (c *Cache) unsubscribe(w *watcher) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w.open = false
	delete(c.watchers, w)
	delete(c.byChan, w.out)
	for s := range w.selectors {
		delete(c.bySel[s], w)
		if len(c.bySel[s]) == 0 {
			delete(c.bySel, s)
		}
	}
	for _, e := range w.entries {
		c.letGo(e.id, w)
	}
	w.entries = nil
	c.handed.leave(w)
	c.handOn()
	if c.refill {
		c.retimeTo(time.Now().Add(lookMin))
	}
}

// rematch finds what w matches now. It is called with mu held.
func (c *Cache) rematch(w *watcher, s *state, now time.Time) {
	old := w.entries
	w.entries = s.match(w.selectors, now)
	if !w.holdsSVID {
		return
	}
	for _, e := range w.entries {
		c.watch(e, w, now)
		if w.wit {
			c.watchWIT(e, w)
		}
	}
	for _, e := range old {
		if !slices.ContainsFunc(w.entries, func(have *entry) bool { return have.id == e.id }) {
			c.letGo(e.id, w)
		}
	}
}

// letGo ends w's need of what is issued for an entry. It is called with mu held.
func (c *Cache) letGo(id string, w *watcher) {
	if w.holdsSVID {
		c.unwatch(id, w)
	}
	if w.wit {
		c.unwatchWIT(id, w)
	}
}

// watchersMatching adds to found those whose selectors cover e's. It is called with mu held.
func (c *Cache) watchersMatching(e *entry, found map[*watcher]struct{}) {
	var candidates map[*watcher]struct{}
	for i, s := range e.selectors {
		if with := c.bySel[s]; i == 0 || len(with) < len(candidates) {
			candidates = with
		}
	}
	for w := range candidates {
		if e.matches(w.selectors) {
			found[w] = struct{}{}
		}
	}
}

// awaitEntry returns nil when w matches an entry. If it does not, and its entry may be on its way, it waits: first for
// everything that was committed at the CA before the call, so that a registration that was acknowledged is never missed,
// then a little longer for one that is just being made. [Workload API §5.2.1: PermissionDenied only if there is none]
func (c *Cache) awaitEntry(ctx context.Context, w *watcher) error {
	matched := func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(w.entries) > 0
	}
	select {
	case <-c.synced:
	default:
		if err := c.awaitState(ctx); err != nil {
			return err
		}
	}
	if matched() {
		return nil
	}
	syncCtx, cancel := context.WithTimeout(ctx, syncWait)
	err := c.config.CA.Sync(syncCtx)
	cancel()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		c.config.Log.Debug("a caller matches no registration entry, and the CA could not be asked for newer ones", "uid", w.uid, "err", err)
	}
	if matched() {
		return nil
	}
	if c.hold(w.uid) {
		defer c.release(w.uid)
		timer := time.NewTimer(c.config.RegistrationWait)
		defer timer.Stop()
		wake := c.waking(w)
		for {
			select {
			case <-wake:
				if matched() {
					return nil
				}
				continue
			case <-timer.C:
			case <-ctx.Done():
				return ctx.Err()
			}
			break
		}
	}
	if matched() {
		return nil
	}
	c.refuse(w)
	return workloadapi.ErrNoIdentity
}

// waking returns the slot that w is woken by, which is full at first.
func (c *Cache) waking(w *watcher) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	w.wake = make(chan struct{}, 1)
	kick(w.wake)
	return w.wake
}

// awaitState holds the first callers after a start until the agent has heard from its CA.
func (c *Cache) awaitState(ctx context.Context) error {
	timer := time.NewTimer(c.config.RegistrationWait)
	defer timer.Stop()
	select {
	case <-c.synced:
		return nil
	case <-timer.C:
		c.stats.notReady.Add(1)
		return workloadapi.ErrNotReady
	case <-ctx.Done():
		return ctx.Err()
	}
}

// hold says whether one more call may be held.
func (c *Cache) hold(uid uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.config.RegistrationWait <= 0 || c.held >= maxHeld || c.heldUID[uid] >= maxHeldPerUID {
		return false
	}
	c.held++
	c.heldUID[uid]++
	return true
}

func (c *Cache) release(uid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held--
	if c.heldUID[uid]--; c.heldUID[uid] == 0 {
		delete(c.heldUID, uid)
	}
}

// refresh makes w's slot hold what w sees now, unless it has been told already, or something is on its way that belongs to
// it. An update that nobody has taken yet and that is no longer true does not stay.
func (c *Cache) refresh(w *watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	now, complete, lost := c.show(w)
	if now.same(w.sent) {
		w.settled()
		return
	}
	select {
	case <-w.out: // as if it had never been there
		w.sent = w.before
		if now, complete, lost = c.show(w); now.same(w.sent) {
			w.before = nil
			w.settled()
			return
		}
	default:
	}
	w.before = nil
	if !complete && !lost && !c.waitedEnough(w) {
		return
	}
	w.settled()
	c.offered(w, now)
	w.before, w.sent = w.sent, now
	w.out <- now.update(c.config.TrustDomain) // there is room: nobody else puts anything there
	c.taken(w, now)
}

// waitedEnough says whether w has waited long enough for SVIDs on their way; it starts the wait if it has not begun. It is
// called with w.mu held.
func (c *Cache) waitedEnough(w *watcher) bool {
	if w.unsettled.IsZero() {
		w.unsettled = time.Now()
		w.settle = time.AfterFunc(settleWait, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.kick(w)
		})
	}
	return time.Since(w.unsettled) >= settleWait
}

// settled ends the wait. It is called with mu held.
func (w *watcher) settled() {
	w.unsettled = time.Time{}
	if w.settle != nil {
		w.settle.Stop()
		w.settle = nil
	}
}

// A shown is what an update shows, as parts that never change.
type shown struct {
	identities []shownIdentity
	bundles    map[spiffeid.TrustDomain]*bundle // own and federated
	ownTD      spiffeid.TrustDomain
	policies   *policyv1.PolicySet
	noPolicies bool      // the CA has none to tell
	offline    time.Time // since when; zero: not
	revoked    *revocations
	crls       [][]byte
	entitled   bool
	pending    bool // an identity is left out, because its SVID is on its way
}

type shownIdentity struct {
	entry *entry
	svid  *svid
	wit   *workloadapi.WITSVID
}

// show collects what w may see now. complete says that nothing is on its way that belongs to it; lost that the
// caller has an entry less, which it must hear of at once.
func (c *Cache) show(w *watcher) (now *shown, complete, lost bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state.Load()
	wall := c.config.Now()
	complete = true
	n := &shown{bundles: make(map[spiffeid.TrustDomain]*bundle, 1), ownTD: c.config.TrustDomain, offline: c.told, revoked: s.revoked, crls: s.crls.der}
	if own := s.bundles[n.ownTD]; own != nil {
		n.bundles[n.ownTD] = own
	}
	if w.allBundles {
		maps.Copy(n.bundles, s.bundles)
	}
	var policies []*policyv1.Policy
	for _, e := range w.entries {
		policies = append(policies, s.policies.of(e.spiffeID, c.config.ServiceMatches)...)
		if s.revokedID(e.spiffeID) {
			lost = true // nothing is on its way
			continue
		}
		n.entitled = true
		r := c.records[e.id]
		if r == nil {
			continue
		}
		if r.settling(wall) && c.source.Load() == nil {
			complete = false
		}
		if !r.serves(wall) {
			n.pending = true
			continue
		}
		identity := shownIdentity{entry: e, svid: r.svid}
		if w.wit {
			t := c.wits[e.id]
			if t == nil || !t.serves(s.bundles[n.ownTD], wall) {
				complete = complete && t != nil && t.failures > 0
				n.pending = true
				continue
			}
			identity.wit = t.svid.shown
		}
		n.identities = append(n.identities, identity)
		for _, td := range e.federatesWith {
			if b := s.bundles[td]; b != nil {
				n.bundles[td] = b
			}
		}
	}
	n.policies = s.policies.set(c.config.TrustDomain, policies, w.sent)
	n.noPolicies = s.revision != 0 && !s.policies.synced
	if w.sent != nil {
		for _, before := range w.sent.identities {
			if !slices.ContainsFunc(w.entries, func(e *entry) bool { return e.id == before.entry.id }) {
				lost = true
			}
		}
	}
	return n, complete, lost
}

// set returns the set of the given policies; the one that was sent before if it is the same, so that its revision names
// the change that made it.
func (p *policies) set(td spiffeid.TrustDomain, found []*policyv1.Policy, sent *shown) *policyv1.PolicySet {
	if !p.synced {
		return nil
	}
	slices.SortFunc(found, func(a, b *policyv1.Policy) int {
		switch {
		case a.GetName() < b.GetName():
			return -1
		case a.GetName() > b.GetName():
			return 1
		}
		return 0
	})
	found = slices.CompactFunc(found, func(a, b *policyv1.Policy) bool { return a.GetName() == b.GetName() })
	var issuers []*policyv1.UserIssuer
	if len(found) > 0 { // nobody else can have a condition
		issuers = p.issuers
	}
	if sent != nil && sent.policies != nil {
		old := sent.policies
		if old.GetEpoch() == p.epoch && old.GetDefaults() == p.defaults && samePolicies(old.GetPolicies(), found) && sameIssuers(old.GetUserIssuers(), issuers) {
			return old
		}
	}
	return &policyv1.PolicySet{
		Format: policyFormat, TrustDomain: td.Name(), Epoch: p.epoch, Revision: p.revision, Defaults: p.defaults, Policies: found, UserIssuers: issuers,
	}
}

// same says whether a caller sees no difference between n and what was sent (WAPI-07).
func (n *shown) same(sent *shown) bool {
	if sent == nil || n.entitled != sent.entitled || n.pending != sent.pending || n.policies != sent.policies || n.revoked != sent.revoked || !sameCRLs(n.crls, sent.crls) || n.noPolicies != sent.noPolicies || !n.offline.Equal(sent.offline) || len(n.bundles) != len(sent.bundles) {
		return false
	}
	for td, b := range n.bundles {
		if old := sent.bundles[td]; old == nil || old.digest != b.digest {
			return false
		}
	}
	return slices.EqualFunc(n.identities, sent.identities, func(a, b shownIdentity) bool {
		return a.svid == b.svid && a.wit == b.wit && a.entry.id == b.entry.id && a.entry.hint == b.entry.hint && a.entry.privileged == b.entry.privileged && slices.Equal(a.entry.federatesWith, b.entry.federatesWith)
	})
}

func (n *shown) update(own spiffeid.TrustDomain) workloadapi.Update {
	u := workloadapi.Update{
		Identities:  make([]workloadapi.Identity, 0, len(n.identities)),
		TrustDomain: own,
		X509Bundles: make(map[spiffeid.TrustDomain][]byte, len(n.bundles)),
		JWTBundles:  make(map[spiffeid.TrustDomain]map[string]crypto.PublicKey, len(n.bundles)),
		WITBundles:  make(map[spiffeid.TrustDomain]map[string]crypto.PublicKey, len(n.bundles)),
		Policies:    n.policies,
		NoPolicies:  n.noPolicies,
		Revocations: n.revoked.compiled,
		Offline:     n.offline,
		Entitled:    n.entitled,
		Pending:     n.pending,
	}
	for _, i := range n.identities {
		u.Identities = append(u.Identities, workloadapi.Identity{
			ID: i.svid.id, EntryID: i.entry.id, Hint: i.entry.hint, Chain: i.svid.chain, Key: i.svid.key,
			NotAfter: i.svid.notAfter, FederatesWith: i.entry.federatesWith, Privileged: i.entry.privileged, WIT: i.wit,
		})
	}
	for td, b := range n.bundles {
		u.X509Bundles[td] = b.x509DER
		u.JWTBundles[td] = b.jwt
		u.WITBundles[td] = b.wit
	}
	if len(n.crls) > 0 {
		u.CRLs = map[spiffeid.TrustDomain][][]byte{own: n.crls}
	}
	if b := n.bundles[own]; b != nil {
		u.BundleRevision = b.revision
	}
	return u
}
