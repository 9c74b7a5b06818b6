package svidcache

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/signet-id/signet/spiffe"
)

// TestPastIsBounded: what is remembered of entries, callers and failures has an end, and the latest stays.
func TestPastIsBounded(t *testing.T) {
	var p past
	now := time.Now()
	old, next := newState(), newState()
	edit := old.entries.edit()
	var ids []string
	for i := range 2 * maxRemoved {
		id := fmt.Sprintf("e%05d", i)
		ids = append(ids, id)
		edit.set(id, &entry{id: id, selectors: []spiffe.Selector{{Type: "unix", Value: "uid:1"}}})
		p.issued(id, errors.New("refused"), now)
	}
	old.entries = edit.done()
	p.removed(old, next, ids, now)
	if len(p.entries) != maxRemoved || p.entries[maxRemoved-1].entry.id != ids[len(ids)-1] {
		t.Errorf("%d entries are remembered, the last %v", len(p.entries), p.entries[len(p.entries)-1].entry.id)
	}
	if len(p.failed) != maxFailed || p.failed[maxFailed-1].entryID != ids[len(ids)-1] {
		t.Errorf("%d failures are remembered", len(p.failed))
	}
	// An entry that comes back, and one that is issued, are forgotten.
	last := ids[len(ids)-1]
	back := newState()
	e, _ := old.entries.get(last)
	edit = back.entries.edit()
	edit.set(last, e)
	back.entries = edit.done()
	p.removed(next, back, []string{last}, now)
	p.issued(last, nil, now)
	if n := len(p.entries); n != maxRemoved-1 || len(p.failed) != maxFailed-1 {
		t.Errorf("after one came back: %d entries, %d failures", n, len(p.failed))
	}
	for i := range 3 * maxRefused {
		c := &Cache{}
		c.past = p
		c.config.Now = time.Now
		c.refuse(&watcher{pid: int32(i), uid: 1, selectors: map[spiffe.Selector]struct{}{{Type: "unix", Value: "uid:1"}: {}}})
		p.refused = c.past.refused
	}
	if len(p.refused) != maxRefused || p.refused[maxRefused-1].PID != 3*maxRefused-1 {
		t.Errorf("%d callers are remembered", len(p.refused))
	}
}
