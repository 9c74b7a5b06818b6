package svidcache

import (
	"maps"
	"slices"
	"time"

	"github.com/signet-id/signet/spiffe"
)

const (
	// maxRemoved and maxRefused bound what is remembered for operators who ask why.
	maxRemoved = 256
	maxRefused = 256
	maxFailed  = 256
)

// A past is what was and is no more, for explanations. Guarded by Cache.mu.
type past struct {
	entries []removedEntry // the oldest first
	refused []Refused      // the oldest first; one for each process id
	failed  []failedIssue  // the oldest first; one for each entry id
}

type removedEntry struct {
	entry *entry
	at    time.Time
}

// A failedIssue is why an entry got no X509-SVID when it was asked for last. It outlives the record of an entry that nobody
// waits for any more.
type failedIssue struct {
	entryID string
	err     error
	at      time.Time
}

// issued remembers how asking for an entry's SVID went: err is nil if it went well.
func (p *past) issued(id string, err error, now time.Time) {
	if err == nil && len(p.failed) == 0 {
		return
	}
	p.failed = slices.DeleteFunc(p.failed, func(f failedIssue) bool { return f.entryID == id })
	if err != nil {
		p.failed = append(p.failed, failedIssue{id, err, now})
		p.failed = slices.Delete(p.failed, 0, max(0, len(p.failed)-maxFailed))
	}
}

// A Refused is a caller that got nothing, as it was then.
type Refused struct {
	PID       int32
	UID, GID  uint32
	Selectors []spiffe.Selector
	At        time.Time
}

// removed remembers the entries that a change took away, and forgets those that it brought back.
func (p *past) removed(old, next *state, changed []string, now time.Time) {
	for _, id := range changed {
		if _, ok := next.entries.get(id); ok {
			p.entries = slices.DeleteFunc(p.entries, func(r removedEntry) bool { return r.entry.id == id })
			continue
		}
		if e, ok := old.entries.get(id); ok {
			p.entries = append(p.entries, removedEntry{entry: e, at: now})
		}
	}
	p.entries = slices.Delete(p.entries, 0, max(0, len(p.entries)-maxRemoved))
}

// refuse counts a caller that has no identity, and remembers it.
func (c *Cache) refuse(w *watcher) {
	c.stats.noIdentity.Add(1)
	r := Refused{PID: w.pid, UID: w.uid, GID: w.gid, Selectors: slices.Collect(maps.Keys(w.selectors)), At: c.config.Now()}
	slices.SortFunc(r.Selectors, func(a, b spiffe.Selector) int { return compareSelectors(a, b) })
	c.mu.Lock()
	defer c.mu.Unlock()
	p := &c.past
	p.refused = slices.DeleteFunc(p.refused, func(old Refused) bool { return old.PID == r.PID })
	p.refused = append(p.refused, r)
	p.refused = slices.Delete(p.refused, 0, max(0, len(p.refused)-maxRefused))
}

// Refused returns the callers that got nothing lately, the latest first; of each process id the last one.
func (c *Cache) Refused() []Refused {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.Clone(c.past.refused)
	slices.Reverse(all)
	return all
}
