package svidcache

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// ready are the ids of entries for which an SVID is held.
func (w *world) ready() string {
	synctest.Wait()
	w.cache.mu.Lock()
	defer w.cache.mu.Unlock()
	var out []string
	for id, r := range w.cache.records {
		if r.svid != nil {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// A budget that is too small goes to what was used last, and then to the newest entries.
func TestPrefetchOrder(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.MaxPrefetch = 3 })
		at := func(id string, created int64) *nodev1.Entry {
			e := anEntry(id, "/"+id, "unix:path:/"+id)
			e.CreatedAt = created
			return e
		}
		w.start(at("a", 1), at("b", 2), at("c", 3), at("d", 4), at("e", 5))
		if got := w.ready(); got != "c d e" {
			t.Errorf("of five entries %s are ready, want the newest three", got)
		}
		updates, stop := w.watch(caller(1, "unix:path:/a"))
		w.next(updates, settleWait)
		if got := w.ready(); got != "a c d e" {
			t.Errorf("with a in use: %s", got)
		}
		stop()
		if got := w.ready(); got != "a d e" {
			t.Errorf("after a was used: %s, want it in place of the oldest that never was", got)
		}
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{at("f", 6), at("old", 0)}})
		if got := w.ready(); got != "a e f" {
			t.Errorf("with a new entry: %s, want it in place of the oldest that never was used", got)
		}
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{at("g", 7), at("h", 8), at("i", 9), at("j", 10)}})
		if got := w.ready(); got != "a i j" {
			t.Errorf("with four more: %s, want the newest, and what was used", got)
		}
		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"a", "j"}})
		time.Sleep(2 * lookMin)
		if got := w.ready(); got != "g h i" {
			t.Errorf("after two were deleted: %s, want the newest of the rest", got)
		}
		w.checkInvariants()
	})
}
