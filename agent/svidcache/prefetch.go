package svidcache

import (
	"slices"
	"time"
)

// What is kept ready for entries that no process asks for has a budget, MaxPrefetch. Those that were used last come first: a
// process that ran here will run here again. Then come the newest entries: an entry that was made a while ago and never
// used here belongs to another node's processes, mostly, and one that was just made to a process that is about to start.

// newRecord makes the record of an entry that has none. It is called with mu held.
func (c *Cache) newRecord(e *entry) *record {
	r := &record{entry: e, watchers: make(map[*watcher]struct{})}
	if s := c.spare[e.id]; s != nil {
		delete(c.spare, e.id)
		r.svid, r.used = s, s.used
	}
	r.judge(c.state.Load())
	c.records[e.id] = r
	c.count(r)
	return r
}

// prefetch keeps an SVID of e ready if there is room, or one of an older entry that nobody has ever used gives way. It is
// called with mu held.
func (c *Cache) prefetch(e *entry, now time.Time) {
	if e.noPrefetch || e.expired(now) || c.records[e.id] != nil || c.config.MaxPrefetch == 0 {
		return
	}
	if c.idle.Len() >= c.config.MaxPrefetch {
		last := c.idle.Back().Value.(*record)
		if last.used || byAge(last.entry, e) >= 0 {
			return
		}
		c.drop(last)
	}
	r := c.newRecord(e)
	before := c.idle.Back()
	for before != nil {
		if b := before.Value.(*record); b.used || byAge(b.entry, e) >= 0 {
			break
		}
		before = before.Prev()
	}
	if before == nil {
		r.idle = c.idle.PushFront(r)
	} else {
		r.idle = c.idle.InsertAfter(r, before)
	}
	c.check(r, now)
}

// prefetchAll keeps ready what fits of entries, the newest first. It is called with mu held.
func (c *Cache) prefetchAll(entries []*entry, now time.Time) {
	if c.config.MaxPrefetch == 0 || len(entries) == 0 {
		return
	}
	slices.SortFunc(entries, func(a, b *entry) int { return byAge(b, a) })
	for _, e := range entries {
		c.prefetch(e, now)
	}
}

// refillIdle gives the room in the budget to entries without a record. It is called with mu held.
func (c *Cache) refillIdle(s *state, now time.Time) {
	if c.idle.Len() >= c.config.MaxPrefetch {
		return
	}
	var without []*entry
	s.entries.all(func(_ string, e *entry) bool {
		if c.records[e.id] == nil && !e.noPrefetch && !e.expired(now) {
			without = append(without, e)
		}
		return true
	})
	c.prefetchAll(without, now)
}
