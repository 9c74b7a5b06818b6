// Package svidcache holds what this node's workloads may have: registration entries, bundles and call policies as the
// CA last told them, and for each entry in use an X509-SVID with its key, renewed in time. It matches callers with
// entries and tells each of them what changed. The agent feeds it through Apply; it satisfies workloadapi.Source. It
// never talks to the network itself: what it wants signed it asks of a CA value.
package svidcache

import (
	"container/list"
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
)

// A CA signs what the cache needs. Its methods are called concurrently.
type CA interface {
	// IssueX509 asks for one X509-SVID for each request. Answers are positional.
	IssueX509(ctx context.Context, requests []X509Request) []X509Answer

	// NewJWTSVID asks for a JWT-SVID for exactly these audiences, in this order.
	NewJWTSVID(ctx context.Context, entryID string, audience []string) (JWTAnswer, error)

	// Sync returns nil once everything that was committed at the CA before the call has been applied to the cache.
	Sync(ctx context.Context) error

	// HandedOn is told, in order, each new set of authorities that all open streams have. It must not block.
	HandedOn(authorities []string)

	// InUse is told, in order, each new set of X.509 authorities of which the cache holds SVIDs. It must not block.
	InUse(authorities []string)
}

// An X509Request asks for an X509-SVID of an entry.
type X509Request struct {
	EntryID string
	// PublicKey is PKIX DER.
	PublicKey []byte

	key *key
	id  spiffeid.ID
}

// An X509Answer is what became of an X509Request.
type X509Answer struct {
	Err error
	// Chain is leaf first, each DER, without the root.
	Chain [][]byte
	// EntryRevision is that of the entry the SVID was built from; 0: not known.
	EntryRevision int64
}

// A JWTAnswer is a JWT-SVID as issued.
type JWTAnswer struct {
	Token               string
	IssuedAt, ExpiresAt time.Time
}

// A Keeper is told what an agent that is started again while the CA is away can use: see Restore. Its methods must not
// block; they are called in order.
type Keeper interface {
	// Applied is told each message that Apply has taken over. The message is not changed afterwards.
	Applied(*nodev1.FollowResponse)

	// Hold is told the X509-SVID that is held for an entry from now on: concatenated DER, leaf first, and the key as
	// PKCS#8 DER; used says that somebody has asked for it. Drop is told that none is held any more.
	Hold(entryID string, entryRevision int64, used bool, chain, key []byte)
	Drop(entryID string)
}

const (
	// DefaultMaxPrefetch is how many X509-SVIDs are held for entries that no process asks for.
	DefaultMaxPrefetch = 1000
	// DefaultRegistrationWait is how long a caller without an identity is held, in case its entry is just being made.
	DefaultRegistrationWait = time.Second

	// maxBatch is the most SVIDs that are asked for at once.
	maxBatch = 500
	// tick is the longest time for which the wall clock is not looked at.
	tick = 30 * time.Second
	// syncWait bounds the wait for the CA's newest state before a caller is told that it has no identity.
	syncWait = 5 * time.Second
	// settleWait bounds the wait for SVIDs that are being issued before a caller gets what there is.
	settleWait = 5 * time.Second
	// maxHeld and maxHeldPerUID bound the calls that are held for registrations in flight.
	maxHeld       = 4096
	maxHeldPerUID = 64
	// offlineQuiet is how long a loss of contact lasts before watchers are told, so that a CA that is restarted disturbs
	// nobody. The time that they are told is that of the loss.
	offlineQuiet = 5 * time.Second
	// clockJump is a difference between the wall clock and the machine's steady clock that is no drift.
	clockJump = 5 * time.Second
)

// Config says how a Cache works.
type Config struct {
	// TrustDomain is the agent's own.
	TrustDomain spiffeid.TrustDomain

	// CA signs.
	CA CA

	// WIT signs WIT-SVIDs. Nil: there are none.
	WIT WITIssuer

	// MaxPrefetch is how many X509-SVIDs are held ready for entries that no process asks for; 0 means
	// DefaultMaxPrefetch, less than 0 none.
	MaxPrefetch int

	// RegistrationWait is how long a caller without an identity is held; 0 means DefaultRegistrationWait, less than 0
	// not at all.
	RegistrationWait time.Duration

	// ServiceMatches says whether a policy's service pattern covers an ID: policy.ServiceMatches.
	ServiceMatches func(pattern string, id spiffeid.ID) bool

	// Keeper is told what a restart can use. May be nil.
	Keeper Keeper

	// OnBundle is told the X.509 authorities of the own trust domain when they change. It is called by Apply. May be nil.
	OnBundle func(Authorities)

	// Log receives what operators want to know. Nil means slog.Default.
	Log *slog.Logger

	// Now is the wall clock. Nil means time.Now.
	Now func() time.Time
}

// A Cache is safe for concurrent use.
type Cache struct {
	config Config
	state  atomic.Pointer[state]     // written under mu only
	late   atomic.Pointer[undecided] // see Enough
	synced chan struct{}             // closed by the first Apply

	ctx    context.Context // of the tasks that outlive a call; ends with Run
	cancel context.CancelFunc
	tasks  sync.WaitGroup // watchers and JWT-SVID requests; started through start

	closing sync.Mutex
	closed  bool // no new tasks; guarded by closing

	lanes   [2]chan struct{} // one slot each: look at due
	witLane chan struct{}    // one slot: look at wits
	retime  chan struct{}    // one slot: the next tick may be earlier
	jwts    jwtCache
	stats   counters
	wall    func() time.Time       // Config.Now; config.Now never stands before floor
	floor   atomic.Pointer[floor]  // nil: there is none
	source  atomic.Pointer[Source] // nil: what is held is the CA's own word

	// mu makes a new state and its consequences for records and watchers one step. It is held for microseconds, never
	// over a call to the CA.
	mu         sync.Mutex
	records    map[string]*record    // by entry id: those that watchers need, and the idle ones
	wits       map[string]*witRecord // by entry id: those that streams show
	idle       *list.List            // records without watchers: those used last, and then the newest entries
	spare      map[string]*svid      // restored, by entry id, for entries that have no record
	spareTil   time.Time             // on the steady clock, when spare is given up; zero: not yet
	due        [2]map[*record]struct{}
	nextTick   time.Time // on the steady clock
	refill     bool      // idle has room that entries without a record may take
	watchers   map[*watcher]struct{}
	queue      []*watcher // those to be looked at again, by the one goroutine that is there while refreshing
	refreshing bool
	byChan     map[<-chan workloadapi.Update]*watcher
	bySel      map[spiffe.Selector]map[*watcher]struct{}
	held       int
	heldUID    map[uint32]int
	handed     handedOn
	inUse      map[string]int // X.509 authority id → SVIDs of it
	toldUse    *[]string      // what the CA was told last; nil: nothing

	// offline is since when there has been no contact to the CA, zero while there is; told is what watchers are told of
	// it, from tellAt on.
	offline, told time.Time
	tellAt        time.Time // on the steady clock

	past past
}

// New returns an empty Cache. Run makes it work.
func New(c Config) (*Cache, error) {
	switch {
	case c.TrustDomain.IsZero():
		return nil, errors.New("the trust domain is empty")
	case c.CA == nil:
		return nil, errors.New("svidcache needs a CA")
	case c.ServiceMatches == nil:
		return nil, errors.New("svidcache needs ServiceMatches")
	}
	if c.MaxPrefetch == 0 {
		c.MaxPrefetch = DefaultMaxPrefetch
	}
	c.MaxPrefetch = max(c.MaxPrefetch, 0)
	if c.RegistrationWait == 0 {
		c.RegistrationWait = DefaultRegistrationWait
	}
	c.RegistrationWait = max(c.RegistrationWait, 0)
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	cache := &Cache{
		config:   c,
		wall:     c.Now,
		spare:    make(map[string]*svid),
		synced:   make(chan struct{}),
		retime:   make(chan struct{}, 1),
		witLane:  make(chan struct{}, 1),
		wits:     make(map[string]*witRecord),
		records:  make(map[string]*record),
		idle:     list.New(),
		watchers: make(map[*watcher]struct{}),
		byChan:   make(map[<-chan workloadapi.Update]*watcher),
		bySel:    make(map[spiffe.Selector]map[*watcher]struct{}),
		heldUID:  make(map[uint32]int),
		inUse:    make(map[string]int),
	}
	cache.config.Now = cache.now
	for i := range cache.lanes {
		cache.lanes[i] = make(chan struct{}, 1)
		cache.due[i] = make(map[*record]struct{})
	}
	cache.state.Store(newState())
	cache.ctx, cache.cancel = context.WithCancel(context.Background())
	cache.jwts.init()
	cache.handed = handedOn{streams: make(map[*watcher]*handedStream), count: make(map[string]int)}
	return cache, nil
}

// Run issues and renews until ctx ends, and returns when everything that it and the cache's other methods started has
// ended; the contexts given to Watch must have ended for that too.
func (c *Cache) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, c.cancel)
	defer stop()
	var group sync.WaitGroup
	for lane := range c.lanes {
		group.Go(func() { c.issueLoop(c.ctx, lane) })
	}
	group.Go(func() { c.clockLoop(c.ctx) })
	if c.config.WIT != nil {
		group.Go(func() { c.witLoop(c.ctx) })
	}
	group.Wait()
	c.closing.Lock()
	c.closed = true
	c.closing.Unlock()
	c.tasks.Wait()
	return nil
}

// enter counts a task that Run waits for, which ends with tasks.Done. It is false when Run has ended.
func (c *Cache) enter() bool {
	c.closing.Lock()
	defer c.closing.Unlock()
	if c.closed {
		return false
	}
	c.tasks.Add(1)
	return true
}

// start runs task in a goroutine that Run waits for. It is false when Run has ended.
func (c *Cache) start(task func()) bool {
	c.closing.Lock()
	defer c.closing.Unlock()
	if c.closed {
		return false
	}
	c.tasks.Go(task)
	return true
}

// Held says what the cache holds: the epoch and the revision that Apply was last told.
func (c *Cache) Held() (epoch string, revision int64) {
	s := c.state.Load()
	return s.epoch, s.revision
}

// Position is the newest one of the node's cluster that was applied, nil if there was none.
func (c *Cache) Position() *nodev1.Position { return c.state.Load().position }

// Ready is closed when the CA's state was applied for the first time.
func (c *Cache) Ready() <-chan struct{} { return c.synced }

// Apply takes over a whole message of Follow: differences to what is held, or a complete snapshot. It is called by one
// goroutine at a time. After an error nothing has changed.
func (c *Cache) Apply(m *nodev1.FollowResponse) error {
	if m.GetSnapshot() && !m.GetComplete() {
		return errors.New("a snapshot is applied only when it is complete")
	}
	old := c.state.Load()
	m = old.withKept(c.config.TrustDomain, c.config.ServiceMatches, m)
	next, change, skipped, err := old.next(c.config.TrustDomain, m)
	if err != nil {
		return err
	}
	for _, err := range skipped {
		c.config.Log.Error("the CA sent something unusable, which is left out", "revision", m.GetTo(), "err", err)
	}

	if m.GetSnapshot() && m.GetEpoch() == old.epoch && m.GetTo() < old.revision {
		missing := old.revoked.missing(next.revoked)
		c.config.Log.Error("the CA's history went back: an older backup of its store was put back; what was changed since then is undone, and what was revoked since then is not revoked any more",
			"revision", m.GetTo(), "held", old.revision, "not_revoked_any_more", len(missing), "names", missing[:min(len(missing), 20)])
	}
	if c.config.Keeper != nil {
		c.config.Keeper.Applied(m)
	}
	c.takeOver(next, change)
	// What was restored the agent may not have been told of.
	if (change.own || c.source.Load() != nil) && c.config.OnBundle != nil {
		own := next.bundles[c.config.TrustDomain]
		c.config.OnBundle(Authorities{X509: own.x509, Tainted: own.tainted, Reissue: own.reissue})
	}
	return nil
}

// takeOver makes next the state.
func (c *Cache) takeOver(next *state, change change) {
	c.mu.Lock()
	old := c.state.Swap(next)
	if change.revoked {
		c.takeRevocations(next, c.config.Now())
	}
	c.takeChange(next, change, old.revision > 0 && next.epoch != old.epoch)
	c.past.removed(old, next, change.entries, c.config.Now())
	c.mu.Unlock()

	select {
	case <-c.synced:
	default:
		close(c.synced)
	}
	if len(change.entries) > 0 || change.own || change.revoked {
		c.jwts.sweep(next, c.config.TrustDomain, c.config.Now())
	}
}

// takeChange brings records and watchers up to the new state, which may be of another epoch than the one before. It is
// called with mu held.
func (c *Cache) takeChange(s *state, change change, epoch bool) {
	now := c.config.Now()
	affected := make(map[*watcher]struct{})
	for _, id := range change.entries {
		if r := c.records[id]; r != nil {
			for w := range r.watchers {
				affected[w] = struct{}{}
			}
		}
		if e, ok := s.entries.get(id); ok {
			c.watchersMatching(e, affected)
		}
	}
	if epoch {
		c.dropSpares()
	}
	var fresh []*entry
	for _, id := range change.entries {
		e, ok := s.entries.get(id)
		r := c.records[id]
		switch {
		case ok && r != nil:
			r.entry = e
			if epoch && r.svid != nil && !r.foreign {
				r.foreign = true
				c.keep(r)
			}
			r.failures, r.retryAt = 0, time.Time{} // what the CA refused before it may grant now
			c.check(r, now)
		case ok:
			fresh = append(fresh, e)
		case r != nil:
			c.drop(r)
			c.refill = c.config.MaxPrefetch > 0
		default:
			c.dropSpare(id)
		}
	}
	c.prefetchAll(fresh, now)
	for w := range affected {
		c.rematch(w, s, now)
		c.kick(w)
	}
	if change.own {
		c.planWave(s.bundles[c.config.TrustDomain])
		for _, r := range c.records {
			c.check(r, now)
		}
		c.handOn()
		kick(c.witLane)
	}
	c.tellUse()
	if change.own || change.foreign || change.policies || change.crls {
		for w := range c.watchers {
			c.kick(w)
		}
	}
	if c.refill {
		c.retimeTo(time.Now().Add(lookMin))
	}
}

// Offline tells the cache that the contact to the CA is lost, now. InSync ends that.
func (c *Cache) Offline() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.offline.IsZero() {
		return
	}
	c.offline = c.wall()
	c.tellAt = time.Now().Add(offlineQuiet)
	c.retimeTo(c.tellAt)
}

// tellOffline tells watchers of the loss of contact when its time has come, or of its end. It is called with mu held.
func (c *Cache) tellOffline() {
	if c.told.Equal(c.offline) {
		return
	}
	if left := time.Until(c.tellAt); !c.offline.IsZero() && left > 0 {
		c.retimeTo(c.tellAt)
		return
	}
	c.told = c.offline
	for w := range c.watchers {
		c.kick(w)
	}
}

// InSync tells the cache that the CA is there (again): what it failed to get is asked for at once.
func (c *Cache) InSync() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.confirm()
	c.offline = time.Time{}
	c.tellOffline()
	for _, r := range c.records {
		r.failures, r.retryAt = 0, time.Time{}
		c.check(r, c.config.Now())
	}
	for _, r := range c.wits {
		r.failures, r.retryAt = 0, time.Time{}
	}
	kick(c.witLane)
}

// counters are Stats in the making.
type counters struct {
	issued, issueErrors               atomic.Int64
	jwtIssued, jwtHits, jwtErrors     atomic.Int64
	noIdentity, notReady, rateLimited atomic.Int64
}

// Stats describe a Cache at one moment; counters run since it was made.
type Stats struct {
	// Entries, X509SVIDs, JWTSVIDs and Watchers are what is held now.
	Entries, X509SVIDs, JWTSVIDs, Watchers int
	// OfflineSince is since when there has been no contact to the CA, zero while there is.
	OfflineSince time.Time
	// TimeLeft is the validity left of each X509-SVID held.
	TimeLeft []time.Duration
	// Issued and IssueErrors count X509-SVIDs; JWTIssued, JWTHits and JWTErrors count JWT-SVIDs: asked of the CA, taken
	// from the cache, and refused by the CA.
	Issued, IssueErrors, JWTIssued, JWTHits, JWTErrors int64
	// NoIdentity, NotReady and RateLimited count refused callers.
	NoIdentity, NotReady, RateLimited int64
}

// Stats returns the present numbers.
func (c *Cache) Stats() Stats {
	now := c.config.Now()
	s := Stats{
		Entries:  c.state.Load().entries.len(),
		JWTSVIDs: c.jwts.len(),
		Issued:   c.stats.issued.Load(), IssueErrors: c.stats.issueErrors.Load(),
		JWTIssued: c.stats.jwtIssued.Load(), JWTHits: c.stats.jwtHits.Load(), JWTErrors: c.stats.jwtErrors.Load(),
		NoIdentity: c.stats.noIdentity.Load(), NotReady: c.stats.notReady.Load(), RateLimited: c.stats.rateLimited.Load(),
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Watchers, s.OfflineSince = len(c.watchers), c.offline
	for _, r := range c.records {
		if r.svid != nil {
			s.X509SVIDs++
			s.TimeLeft = append(s.TimeLeft, r.svid.notAfter.Sub(now))
		}
	}
	return s
}
