package tally

import (
	"cmp"
	"slices"
	"sync"
	"time"
	"unique"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// KeptConfig bounds what is Kept. All fields but Track are needed.
type KeptConfig struct {
	// MaxRecords is how many observations are kept. One with long texts counts as several.
	MaxRecords int
	// Keep is for how long.
	Keep time.Duration
	// Bucket is the length of the spans of time in which counts are added up.
	Bucket time.Duration
	Now    func() time.Time
	// Track is for who calls Changed.
	Track bool
}

// Kept remembers observations: denials one by one, by their decision ids, and the counts of everything else. Where there
// are too many, the services with the most records lose their oldest, so that no service can push out what is known of
// another. It is safe for concurrent use. The observations that it holds are never changed.
type Kept struct {
	config KeptConfig

	mu       sync.RWMutex
	total    int // of weights
	byID     map[string][]*policyv1.Observation
	services map[string]*records
	fresh    []*policyv1.Observation // single ones since Changed
	changed  map[countKey]bool       // counts since Changed
}

// records are those of one service, with the sums of their weights.
type records struct {
	single, counted int
	singles         []*policyv1.Observation // in the order in which they came
	counts          map[countKey]*policyv1.Observation
	spans           map[int64]*span
}

// weight is how many records an observation counts for.
func weight(o *policyv1.Observation) int {
	const usual = 512 // bytes
	r, shadow := o.GetRule(), o.GetShadowRule()
	return 1 + (len(o.GetPeer())+len(o.GetMethod())+len(o.GetPath())+len(o.GetReason())+len(o.GetShadowReason())+len(o.GetEpoch())+len(o.GetPoint())+
		len(o.GetToken())+len(o.GetRollout())+len(o.GetRevocation())+len(r.GetPolicy())+len(r.GetFile())+len(shadow.GetPolicy())+len(shadow.GetFile()))/usual
}

// A countKey tells apart what is added up.
type countKey struct {
	key
	agent string
	span  int64
}

// A span is what is told apart in one span of time.
type span struct {
	allowed, denied int
	paths           map[string]int // by peer
}

// sharePerSpan is which part of all records may be the counts of one service in one span.
const sharePerSpan = 64

// NewKept returns an empty Kept.
func NewKept(c KeptConfig) *Kept {
	return &Kept{config: c, byID: make(map[string][]*policyv1.Observation), services: make(map[string]*records), changed: make(map[countKey]bool)}
}

// Add keeps an observation that Check has found sound, and returns what is kept of it: itself, the sum with what was kept
// before, or nil if it was known already or found no room. o is no longer the caller's.
func (k *Kept) Add(o *policyv1.Observation) *policyv1.Observation {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.put(o, add)
}

// Restore keeps an observation that Add returned in an earlier run. A count takes the place of a smaller one.
func (k *Kept) Restore(o *policyv1.Observation) {
	if o.GetLast() < k.config.Now().Add(-k.config.Keep).UnixNano() {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.put(o, larger)
}

func (k *Kept) put(o *policyv1.Observation, merge func(old, o *policyv1.Observation) *policyv1.Observation) *policyv1.Observation {
	intern(o)
	s := k.services[o.GetService()]
	if s == nil {
		s = &records{counts: make(map[countKey]*policyv1.Observation), spans: make(map[int64]*span)}
		k.services[o.GetService()] = s
	}
	if id := o.GetDecisionId(); id != "" {
		// Callers are told the ids of denials, and may be faster with a report about a service of their own than who denied.
		if slices.ContainsFunc(k.byID[id], func(known *policyv1.Observation) bool {
			return known.GetService() == o.GetService() && known.GetAgentId() == o.GetAgentId()
		}) {
			return nil
		}
		k.byID[id] = append(slices.Clip(k.byID[id]), o)
		s.singles = append(s.singles, o)
		s.single += weight(o)
		if k.config.Track && len(k.fresh) < k.config.MaxRecords {
			k.fresh = append(k.fresh, o)
		}
		k.grow(weight(o))
		return o
	}
	for fold := range 3 {
		switch fold {
		case 1:
			o.Path = ""
		case 2:
			o.AgentId = ""
		}
		ck := countKey{keyOfObservation(o), o.GetAgentId(), o.GetLast() / int64(k.config.Bucket)}
		old := s.counts[ck]
		switch {
		case old != nil:
			o = merge(old, o)
		case !s.room(&ck, max(8, k.config.MaxRecords/sharePerSpan), fold):
			continue
		}
		s.counts[ck] = o
		if k.config.Track {
			k.changed[ck] = true
		}
		more := weight(o)
		if old != nil {
			more -= weight(old)
		}
		s.counted += more
		k.grow(more)
		return o
	}
	return nil
}

// Changed returns the single observations, and if counts is set the counts, that are new or have changed since the last call.
func (k *Kept) Changed(counts bool) []*policyv1.Observation {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := k.fresh
	k.fresh = nil
	if !counts {
		return out
	}
	for ck := range k.changed {
		if s := k.services[ck.service]; s != nil && s.counts[ck] != nil {
			out = append(out, s.counts[ck])
		}
	}
	clear(k.changed)
	return out
}

// room says whether there is room for another key, and takes it. most is for each of allowed calls and denials; the less of
// a call is told, the more of it there is.
func (s *records) room(ck *countKey, most, fold int) bool {
	sp := s.spans[ck.span]
	if sp == nil {
		sp = &span{paths: make(map[string]int)}
		s.spans[ck.span] = sp
	}
	n := &sp.denied
	if ck.allowed {
		n = &sp.allowed
	}
	switch fold {
	case 0:
		if *n >= most/2 || ck.path != "" && sp.paths[ck.peer] >= max(1, most/sharePerPeer) {
			return false
		}
		if ck.path != "" {
			sp.paths[ck.peer]++
		}
	case 1:
		if *n >= most*3/4 {
			return false
		}
	default:
		if *n >= most {
			return false
		}
	}
	*n++
	return true
}

// add is the sum of two observations that are counted together.
func add(old, o *policyv1.Observation) *policyv1.Observation {
	sum := copyOf(old)
	sum.Count = min(old.GetCount()+o.GetCount(), maxCount)
	sum.First = min(old.GetFirst(), o.GetFirst())
	if o.GetLast() >= old.GetLast() {
		sum.Last, sum.Epoch, sum.Revision = o.GetLast(), o.GetEpoch(), o.GetRevision()
	}
	return sum
}

// larger is the later of two states of one count.
func larger(old, o *policyv1.Observation) *policyv1.Observation {
	if o.GetCount() >= old.GetCount() {
		return o
	}
	return old
}

// grow counts a record, and makes room for many if there are too many.
func (k *Kept) grow(n int) {
	if k.total += n; k.total <= k.config.MaxRecords {
		return
	}
	most := k.level(k.config.MaxRecords - k.config.MaxRecords/16)
	for name, s := range k.services {
		if s.weight() > most {
			k.trim(s, most)
		}
		k.tidy(name, s)
	}
	for name, s := range k.services { // more services than records: some are forgotten
		if k.total <= k.config.MaxRecords {
			return
		}
		k.trim(s, 0)
		k.tidy(name, s)
	}
}

// level is the room for each service at which all of them together have room.
func (k *Kept) level(room int) int {
	weights := make([]int, 0, len(k.services))
	for _, s := range k.services {
		weights = append(weights, s.weight())
	}
	slices.Sort(weights)
	for i, n := range weights {
		left := len(weights) - i
		if n*left > room {
			return max(room/left, 1)
		}
		room -= n
	}
	return k.config.MaxRecords
}

func (s *records) weight() int { return s.single + s.counted }

// trim takes the oldest records of a service until they weigh no more than most. Neither denials nor counts push out the
// other, as long as they have no more than half.
func (k *Kept) trim(s *records, most int) {
	forSingle := min(s.single, max(most/2, most-s.counted))
	n := 0
	for ; n < len(s.singles) && s.single > forSingle; n++ {
		k.forgetSingle(s, s.singles[n])
	}
	s.singles = slices.Delete(s.singles, 0, n)
	if s.single+s.counted <= most {
		return
	}
	oldest := make([]countKey, 0, len(s.counts))
	for ck := range s.counts {
		oldest = append(oldest, ck)
	}
	slices.SortFunc(oldest, func(a, b countKey) int { return cmp.Compare(s.counts[a].GetLast(), s.counts[b].GetLast()) })
	for _, ck := range oldest {
		if s.single+s.counted <= most {
			return
		}
		k.forgetCount(s, ck)
	}
}

// forgetSingle leaves it to the caller to take o out of s.singles.
func (k *Kept) forgetSingle(s *records, o *policyv1.Observation) {
	id := o.GetDecisionId()
	left := slices.DeleteFunc(slices.Clone(k.byID[id]), func(known *policyv1.Observation) bool { return known == o })
	if k.byID[id] = left; len(left) == 0 {
		delete(k.byID, id)
	}
	s.single -= weight(o)
	k.total -= weight(o)
}

func (k *Kept) forgetCount(s *records, ck countKey) {
	n := weight(s.counts[ck])
	delete(s.counts, ck)
	delete(k.changed, ck)
	s.counted -= n
	k.total -= n
}

// tidy forgets a service without records, and spans that are over.
func (k *Kept) tidy(name string, s *records) {
	if s.weight() == 0 {
		delete(k.services, name)
		return
	}
	if len(s.spans) < 4 {
		return
	}
	used := make(map[int64]bool)
	for ck := range s.counts {
		used[ck.span] = true
	}
	for n := range s.spans {
		if !used[n] {
			delete(s.spans, n)
		}
	}
}

// Sweep forgets what is too old.
func (k *Kept) Sweep() {
	oldest := k.config.Now().Add(-k.config.Keep).UnixNano()
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, s := range k.services {
		s.singles = slices.DeleteFunc(s.singles, func(o *policyv1.Observation) bool {
			if o.GetLast() >= oldest {
				return false
			}
			k.forgetSingle(s, o)
			return true
		})
		for ck, o := range s.counts {
			if o.GetLast() < oldest {
				k.forgetCount(s, ck)
			}
		}
		k.tidy(name, s)
	}
}

// Get returns a single decision, or nil.
func (k *Kept) Get(decisionID string) *policyv1.Observation {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if all := k.byID[decisionID]; len(all) > 0 {
		return all[0]
	}
	return nil
}

// Reports returns all reports of a single decision, in the order in which they came. More than one is the sign of a lie: by
// another agent, or about another service. Which of them is true nobody can tell here.
func (k *Kept) Reports(decisionID string) []*policyv1.Observation {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.byID[decisionID]
}

// Len is how many records there are, as MaxRecords counts them.
func (k *Kept) Len() int {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.total
}

// A Filter says which observations are listed. Its zero value is for all.
type Filter struct {
	// Service and Peer are full SPIFFE IDs; empty: any.
	Service, Peer string
	// Since and Until bound the time of the last occurrence, Until not included; zero: no bound.
	Since, Until time.Time
	// Wanted tells further what is listed; nil: all. It must not call back.
	Wanted func(*policyv1.Observation) bool
	// Limit is how many are listed at most, the latest; 0: all.
	Limit int
}

func (f *Filter) wants(o *policyv1.Observation) bool {
	return (f.Peer == "" || o.GetPeer() == f.Peer) && (f.Since.IsZero() || o.GetLast() >= f.Since.UnixNano()) &&
		(f.Until.IsZero() || o.GetLast() < f.Until.UnixNano()) && (f.Wanted == nil || f.Wanted(o))
}

// List returns observations in the order of their last occurrence. They must not be changed.
func (k *Kept) List(f Filter) []*policyv1.Observation {
	var out []*policyv1.Observation
	collect := func(s *records) {
		for _, o := range s.singles {
			if f.wants(o) {
				out = append(out, o)
			}
		}
		for _, o := range s.counts {
			if f.wants(o) {
				out = append(out, o)
			}
		}
	}
	k.mu.RLock()
	if f.Service == "" {
		for _, s := range k.services {
			collect(s)
		}
	} else if s := k.services[f.Service]; s != nil {
		collect(s)
	}
	k.mu.RUnlock()
	slices.SortStableFunc(out, func(a, b *policyv1.Observation) int { return cmp.Compare(a.GetLast(), b.GetLast()) })
	if n := len(out) - f.Limit; f.Limit > 0 && n > 0 {
		out = out[n:]
	}
	return out
}

// intern lets records share their strings, of which most are the same.
func intern(o *policyv1.Observation) {
	share := func(s *string) {
		if *s != "" {
			*s = unique.Make(*s).Value()
		}
	}
	for _, s := range [...]*string{&o.Service, &o.Peer, &o.Method, &o.Reason, &o.ShadowReason, &o.Epoch, &o.Point, &o.Rollout, &o.Revocation, &o.AgentId} {
		share(s)
	}
	for _, r := range [...]*policyv1.RuleRef{o.GetRule(), o.GetShadowRule()} {
		if r != nil {
			share(&r.Policy)
			share(&r.File)
		}
	}
}

// copyOf is a copy that shares what is never changed.
func copyOf(o *policyv1.Observation) *policyv1.Observation {
	return &policyv1.Observation{
		DecisionId: o.GetDecisionId(), First: o.GetFirst(), Last: o.GetLast(), Count: o.GetCount(), Service: o.GetService(), Peer: o.GetPeer(),
		Protocol: o.GetProtocol(), Method: o.GetMethod(), Path: o.GetPath(), Allowed: o.GetAllowed(), Reason: o.GetReason(), Rule: o.GetRule(),
		ShadowAllowed: o.GetShadowAllowed(), ShadowReason: o.GetShadowReason(), ShadowRule: o.GetShadowRule(), Epoch: o.GetEpoch(), Revision: o.GetRevision(),
		Point: o.GetPoint(), FormerlyAllowed: o.GetFormerlyAllowed(), Rollout: o.GetRollout(), Revocation: o.GetRevocation(), AgentId: o.GetAgentId(),
		Token: o.GetToken(),
	}
}
