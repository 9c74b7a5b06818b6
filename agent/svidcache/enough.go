package svidcache

import (
	"slices"

	"github.com/signet-id/signet/spiffe"
)

// Enough tells whether one method of attestation need not find out more about a caller: an entry matches by what it has found, and none
// that may match, whatever other methods find, has a selector that is still to come, of which later tells, the same of each
// selector at all times. So who is answered by these selectors gets neither less nor anything else than by all of them, as
// long as no other entry comes. It is asked while a container starts.
func (c *Cache) Enough(have []spiffe.Selector, later func(spiffe.Selector) bool) bool {
	if len(have) == 0 {
		return false
	}
	s, method, now := c.state.Load(), have[0].Type, c.config.Now()
	known := make(map[spiffe.Selector]struct{}, len(have))
	for _, h := range have {
		known[h] = struct{}{}
	}
	for _, e := range c.undecided(s, method, later) {
		never := slices.ContainsFunc(e.selectors, func(sel spiffe.Selector) bool {
			_, ok := known[sel]
			return !ok && sel.Type == method && !later(sel)
		})
		if !never && !e.expired(now) {
			return false
		}
	}
	return len(s.match(known, now)) > 0
}

// An undecided list has those of some entries that ask one method for what is known late.
type undecided struct {
	of      *table[string, *entry]
	method  string
	entries []*entry
}

// undecided looks through all entries once after each change of them.
func (c *Cache) undecided(s *state, method string, later func(spiffe.Selector) bool) []*entry {
	if u := c.late.Load(); u != nil && u.of == s.entries && u.method == method {
		return u.entries
	}
	u := &undecided{of: s.entries, method: method}
	s.entries.all(func(_ string, e *entry) bool {
		for _, sel := range e.selectors {
			if sel.Type == method && later(sel) {
				u.entries = append(u.entries, e)
				break
			}
		}
		return true
	})
	c.late.Store(u)
	return u.entries
}
