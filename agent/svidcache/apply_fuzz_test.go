package svidcache

import (
	"context"
	"log/slog"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
)

// FuzzApply feeds whatever decodes as a message of the CA: either nothing changes, or the cache agrees with itself and no
// entry is held that could match everybody.
func FuzzApply(f *testing.F) {
	ca := newTestCA(f)
	seed := &nodev1.FollowResponse{
		Epoch: "e", To: 1, Snapshot: true, Complete: true, Bundles: []*nodev1.Bundle{ca.bundle(1, []string{"k1"}, ca.active)},
		Entries: []*nodev1.Entry{anEntry("1", "/a", "unix:uid:1", "unix:gid:1"), anEntry("2", "/b", "unix:uid:1")},
	}
	raw, err := proto.Marshal(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var m nodev1.FollowResponse
		if proto.Unmarshal(raw, &m) != nil {
			return
		}
		cache, err := New(Config{
			TrustDomain: td, CA: ca, ServiceMatches: func(string, spiffeid.ID) bool { return false }, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		w := &world{t: t, ca: ca, cache: cache, ctx: context.Background()}
		for _, m := range []*nodev1.FollowResponse{seed, &m} {
			before := cache.state.Load()
			if err := cache.Apply(m); err != nil {
				if cache.state.Load() != before {
					t.Error("a refused message changed the state")
				}
				continue
			}
			w.checkInvariants()
			cache.state.Load().entries.all(func(id string, e *entry) bool {
				if len(e.selectors) == 0 || id == "" || !e.spiffeID.MemberOf(td) || e.spiffeID.Path() == "" {
					t.Errorf("entry %q for %q with %d selectors is held", id, e.spiffeID, len(e.selectors))
				}
				return true
			})
		}
	})
}

func BenchmarkMatch10k(b *testing.B) {
	s := newState()
	edit := s.entries.edit()
	index := indexEdit{lists: s.index.edit(), owned: make(map[spiffe.Selector]struct{})}
	for i := range 10000 {
		e, err := readEntry(td, anEntry(strconv.Itoa(i), "/"+strconv.Itoa(i), "unix:uid:0", "unix:path:/bin/"+strconv.Itoa(i)))
		if err != nil {
			b.Fatal(err)
		}
		edit.set(e.id, e)
		index.add(e)
	}
	s.entries, s.index = edit.done(), index.lists.done()
	w := newWatcher(caller(0, "unix:uid:0", "unix:gid:0", "unix:user:root", "unix:path:/bin/77"), false)
	b.ReportAllocs()
	for b.Loop() {
		if len(s.match(w.selectors, time.Now())) != 1 {
			b.Fatal("no match")
		}
	}
}
