package svidcache

import "github.com/signet-id/signet/spiffe"

// Enough tells whether one method of attestation need not find out more about a caller: an entry may match by what it has found, and none
// that may match has a selector that is still to come, of which later tells. What other methods find is left open. So who is answered
// by these selectors gets neither less nor anything else than by all of them, as long as no other entry comes. Entries of the node
// are looked through one by one; it is asked while a container starts.
func (c *Cache) Enough(have []spiffe.Selector, later func(spiffe.Selector) bool) bool {
	if len(have) == 0 {
		return false
	}
	method, now := have[0].Type, c.config.Now()
	known := make(map[spiffe.Selector]struct{}, len(have))
	for _, s := range have {
		known[s] = struct{}{}
	}
	some, waits := false, false
	c.state.Load().entries.all(func(_ string, e *entry) bool {
		if e.expired(now) {
			return true
		}
		by, open := false, false
		for _, s := range e.selectors {
			if s.Type != method {
				continue
			}
			if _, ok := known[s]; ok {
				by = true
			} else if later(s) {
				open = true
			} else {
				return true
			}
		}
		some, waits = some || by, waits || open
		return !waits
	})
	return some && !waits
}
