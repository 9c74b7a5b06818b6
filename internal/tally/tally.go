// Package tally counts and keeps decisions of enforcement points, within bounds that no caller can move: a Tally counts
// what is still to be reported, Kept remembers what was. Services, agents and the CA use it alike. It talks to nobody and
// writes nowhere.
package tally

import (
	"cmp"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// Defaults of Config, for one service.
const (
	DefaultMaxKeys   = 4096
	DefaultMaxSingle = 1024
)

const (
	// sharePerService is which part of all that is counted may be about one service, and sharePerPeer which part of that may
	// tell apart the paths of one of its peers. What exceeds it is counted without its path.
	sharePerService = 4
	sharePerPeer    = 8

	// Denials are reported one by one up to a rate, for all and for each peer: beyond it they are counted.
	singlesPerSecond, singlesBurst         = 50, 500
	peerSinglesPerSecond, peerSinglesBurst = 5, 50
	// maxPeers is how many peers are told apart for that.
	maxPeers = 1024

	shards = 16
)

// Config bounds a Tally. The zero value is good for one service.
type Config struct {
	// MaxKeys is how many different calls are told apart, MaxSingle how many denials are held one by one.
	MaxKeys, MaxSingle int
	// Services is how many services there may be. More than one: none of them may take more than its share.
	Services int
	// OmitPaths keeps no paths but those of gRPC.
	OmitPaths bool
}

// A Tally counts decisions until they are drained. It is safe for concurrent use, and never blocks for longer than it
// takes to count.
type Tally struct {
	config Config
	seed   maphash.Seed
	shards [shards]shard
	urgent chan struct{}

	// mu guards what bounds the Tally. It is taken for what was not counted before only, never under a shard's lock.
	mu       sync.Mutex
	keys     int
	services map[string]*share
	singles  []*policyv1.Observation
	all      bucket
	peers    map[string]*bucket

	dropped atomic.Uint64
}

// share is what is told apart of one service.
type share struct {
	allowed, denied int            // keys
	singles         int            // denials one by one
	paths           map[string]int // keys by peer, so that one peer's paths do not hide another's
}

type shard struct {
	mu      sync.Mutex
	entries map[uint64]*entry
	_       [40]byte // shards do not share a cache line
}

// An entry is what was counted of one kind of call.
type entry struct {
	key         key
	next        *entry // another key with the same hash
	count       uint64
	first, last time.Time
	epoch       string
	revision    int64
}

// A key tells calls apart that are counted together.
type key struct {
	service, peer, method, path string
	point                       string
	rule, shadowRule            policy.Rule
	reason, shadowReason        string
	revocation, rollout         string
	protocol                    policyv1.CallProtocol
	allowed, shadowAllowed      bool
	formerly                    bool
}

// New returns an empty Tally.
func New(c Config) *Tally {
	c.MaxKeys, c.MaxSingle, c.Services = cmp.Or(c.MaxKeys, DefaultMaxKeys), cmp.Or(c.MaxSingle, DefaultMaxSingle), cmp.Or(c.Services, 1)
	t := &Tally{config: c, seed: maphash.MakeSeed(), urgent: make(chan struct{}, 1), services: make(map[string]*share), peers: make(map[string]*bucket)}
	return t
}

// Urgent returns a channel with one slot that is filled when there is something that should not wait: a denial, or so much
// that there will soon be no room.
func (t *Tally) Urgent() <-chan struct{} { return t.urgent }

func (t *Tally) hurry() {
	select {
	case t.urgent <- struct{}{}:
	default:
	}
}

// Observe counts a decision.
func (t *Tally) Observe(j policy.Judgement) {
	k := keyOf(&j)
	if t.config.OmitPaths {
		k.omitPath()
	}
	if (!k.allowed || j.Decision.ShadowDiffers()) && t.observeSingle(j, k) {
		return
	}
	t.count(&k, 1, j.Time, j.Time, j.Decision.Epoch, j.Decision.Revision)
}

// observeSingle has copies of its own, so that what is only counted stays on the stack.
func (t *Tally) observeSingle(j policy.Judgement, k key) bool {
	return t.single(k.peer, j.Time) && t.take(k.service, func() *policyv1.Observation { return k.single(&j) })
}

// Add counts an observation that somebody else has made and Check has found sound. One that is single stays so while there
// is room. o is the Tally's from then on.
func (t *Tally) Add(o *policyv1.Observation) {
	if t.config.OmitPaths {
		OmitPath(o)
	}
	k := keyOfObservation(o)
	first, last := time.Unix(0, o.GetFirst()), time.Unix(0, o.GetLast())
	if o.GetDecisionId() != "" && t.take(o.GetService(), func() *policyv1.Observation { return o }) {
		return
	}
	t.count(&k, o.GetCount(), first, last, o.GetEpoch(), o.GetRevision())
}

// single says whether another decision about a peer is reported on its own, or there were too many lately.
func (t *Tally) single(peer string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.peers[peer]
	if b == nil {
		if len(t.peers) >= maxPeers {
			clear(t.peers) // everybody begins afresh; the rate for all holds
		}
		b = &bucket{}
		t.peers[peer] = b
	}
	return b.take(now, peerSinglesPerSecond, peerSinglesBurst) && t.all.take(now, singlesPerSecond, singlesBurst)
}

// take holds an observation on its own if there is room.
func (t *Tally) take(service string, make func() *policyv1.Observation) bool {
	t.mu.Lock()
	s := t.share(service)
	if s == nil || len(t.singles) >= t.config.MaxSingle || t.config.Services > 1 && s.singles >= max(1, t.config.MaxSingle/sharePerService) {
		t.mu.Unlock()
		return false
	}
	s.singles++
	t.singles = append(t.singles, make())
	t.mu.Unlock()
	t.hurry()
	return true
}

// share is that of a service; nil if there are too many. mu is held.
func (t *Tally) share(service string) *share {
	s := t.services[service]
	if s == nil && len(t.services) < t.config.MaxKeys {
		s = &share{}
		t.services[service] = s
	}
	return s
}

// count adds to what is alike.
func (t *Tally) count(k *key, n uint64, first, last time.Time, epoch string, revision int64) {
	h := t.hash(k)
	if t.shards[h%shards].add(h, k, n, first, last, epoch, revision, false) {
		return
	}
	// Something new.
	if !t.reserve(k) {
		k.path = ""
		h = t.hash(k)
		if t.shards[h%shards].add(h, k, n, first, last, epoch, revision, false) {
			return
		}
		if !t.reserve(k) {
			t.dropped.Add(n)
			t.hurry()
			return
		}
	}
	t.shards[h%shards].add(h, k, n, first, last, epoch, revision, true)
}

// reserve makes room for a key, unless its service or its peer has had its share.
func (t *Tally) reserve(k *key) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.share(k.service)
	if s == nil {
		return false
	}
	most := t.config.MaxKeys
	if t.config.Services > 1 {
		most /= sharePerService
	}
	n := &s.denied
	if k.allowed {
		n = &s.allowed
	}
	if k.path != "" {
		// The last quarter is for what has no path. Denials and allowed calls do not take each other's room.
		if *n >= most/2*3/4 || t.keys >= t.config.MaxKeys*3/4 || s.paths[k.peer] >= max(1, most/sharePerPeer) {
			return false
		}
		if s.paths == nil {
			s.paths = make(map[string]int)
		}
		s.paths[k.peer]++
	} else if *n >= most/2 || t.keys >= t.config.MaxKeys {
		return false
	}
	*n++
	t.keys++
	if t.keys == t.config.MaxKeys/2 {
		t.hurry()
	}
	return true
}

func (t *Tally) hash(k *key) uint64 {
	return maphash.String(t.seed, k.path) ^ 3*maphash.String(t.seed, k.peer) ^ 5*maphash.String(t.seed, k.service) ^ 7*maphash.String(t.seed, k.method)
}

func (s *shard) add(h uint64, k *key, n uint64, first, last time.Time, epoch string, revision int64, insert bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for e := s.entries[h]; e != nil; e = e.next {
		if e.key == *k {
			e.count += n
			if first.Before(e.first) {
				e.first = first
			}
			if last.After(e.last) {
				e.last, e.epoch, e.revision = last, epoch, revision
			}
			return true
		}
	}
	if insert {
		if s.entries == nil {
			s.entries = make(map[uint64]*entry)
		}
		s.entries[h] = &entry{key: *k, next: s.entries[h], count: n, first: first, last: last, epoch: epoch, revision: revision}
	}
	return insert
}

// Drain returns all that was counted since the last time, and how many more decisions there were that found no room.
func (t *Tally) Drain() (observed []*policyv1.Observation, dropped uint64) {
	// What is counted between the two steps below has its room reserved twice or not at all, which does no harm: the bounds
	// are ours to choose.
	t.mu.Lock()
	observed = t.singles
	t.singles, t.keys = nil, 0
	clear(t.services)
	t.mu.Unlock()
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		entries := s.entries
		s.entries = nil
		s.mu.Unlock()
		for _, e := range entries {
			for ; e != nil; e = e.next {
				o := e.key.observation()
				o.Count, o.First, o.Last = e.count, e.first.UnixNano(), e.last.UnixNano()
				o.Epoch, o.Revision = text(e.epoch), e.revision
				observed = append(observed, o)
			}
		}
	}
	return observed, t.dropped.Swap(0)
}

// Dropped counts decisions that somebody else found no room for, so that the next Drain tells of them.
func (t *Tally) Dropped(n uint64) { t.dropped.Add(n) }

// A bucket holds tokens.
type bucket struct {
	tokens float64
	filled time.Time // zero: it is full
}

func (b *bucket) take(now time.Time, rate, burst float64) bool {
	if b.filled.IsZero() {
		b.tokens = burst
	} else {
		b.tokens = min(burst, b.tokens+max(0, now.Sub(b.filled).Seconds())*rate)
	}
	b.filled = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
