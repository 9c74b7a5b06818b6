package pods

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// TestAtOnce: pods, rules of two origins and registered entries change at once, while nodes follow and operators ask; in the end each node
// holds what one who comes to it all at last would give it.
func TestAtOnce(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	x.Synced("prod", true)
	const nodes, rounds = 4, 300
	agents := make([]spiffeid.ID, nodes)
	for i := range agents {
		agents[i] = node(t, r, "prod", fmt.Sprint("node-", i))
	}
	ids := []func(*Pod) (string, error){nsSA, func(p *Pod) (string, error) { return "/ns/shop/sa/web", nil }, func(p *Pod) (string, error) { return "/app/" + p.Labels["app"], nil }}
	rules := func(kind string) (out []Rule) {
		for i, path := range ids {
			if rand.N(3) > 0 {
				out = append(out, &rule{name: fmt.Sprint(kind, " r", i), path: path, revision: 1, created: time.Unix(int64(100*i), 0)})
			}
		}
		return out
	}
	one := func() *Pod {
		n := rand.N(30)
		p := pod(fmt.Sprint("pod-", n), fmt.Sprint("node-", rand.N(nodes)), []string{"shop", "bank"}[n%2], []string{"web", "db"}[n%3%2])
		p.Labels = map[string]string{"app": []string{"", "a", "b", "../x"}[rand.N(4)]}
		p.Mirror, p.Ended = rand.N(10) == 0, rand.N(10) == 0
		return p
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var asking, changing sync.WaitGroup
	held := make([]map[registry.EntryID]bool, nodes)
	for i, a := range agents {
		asking.Go(func() {
			f := r.Follow(a, 0, false)
			defer f.Close()
			for {
				last := ctx.Err() != nil
				for d := f.Next(false); d != nil; d = f.Next(false) {
					if d.Snapshot {
						held[i] = map[registry.EntryID]bool{}
					}
					for _, e := range d.Entries {
						held[i][e.ID] = true
					}
					for _, id := range d.RemovedEntries {
						delete(held[i], id)
					}
				}
				if last {
					return
				}
				select {
				case <-f.Wake():
				case <-ctx.Done():
				}
			}
		})
	}
	asking.Go(func() {
		for ctx.Err() == nil {
			uid := fmt.Sprint("pod-", rand.N(30))
			if _, err := x.Explain(ctx, "prod", uid); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			x.Counts(OriginIdentities)
			x.Entries("prod", uid)
			x.Refusals("prod", uid)
			x.reportTaken()
			x.Again("prod", []string{uid})
			r.PodEntries(func(*registry.Entry) bool { return true })
			r.Everybody()
		}
	})
	var mu sync.Mutex // of the last states
	last, lastRules := map[string]*Pod{}, map[string][]Rule{}
	for range 3 {
		changing.Go(func() {
			for range rounds {
				mu.Lock() // who tells the same pod twice tells it in order
				p := one()
				if rand.N(4) == 0 {
					delete(last, p.UID)
					x.Update("prod", nil, []string{p.UID})
				} else {
					last[p.UID] = p
					x.Update("prod", []*Pod{p}, nil)
				}
				mu.Unlock()
			}
		})
	}
	changing.Go(func() {
		for i := range rounds / 3 {
			origin := []string{OriginIdentities, "spire:prod"}[i%2]
			lastRules[origin] = rules([]string{"Identity", "ClusterSPIFFEID"}[i%2])
			x.SetRules(origin, lastRules[origin])
		}
	})
	changing.Go(func() {
		for range rounds / 10 {
			got := r.CreateEntries(t.Context(), []*registry.Entry{{SPIFFEID: spiffeid.RequireFromPath(td, "/app/a"), ParentID: agents[0], Selectors: []spiffe.Selector{{Type: "unix", Value: "uid:1"}}}})[0]
			if got.Err != nil {
				t.Error(got.Err)
				return
			}
			if _, _, err := r.DeleteEntry(t.Context(), got.Entry.ID); err != nil {
				t.Error(err)
			}
		}
	})
	changing.Wait()
	if _, err := r.Barrier(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	asking.Wait()

	fresh := newRegistry(t)
	y := New(Config{Registry: fresh})
	for origin, rules := range lastRules {
		y.SetRules(origin, rules)
	}
	y.Update("prod", slices.Collect(maps.Values(last)), nil)
	for i := range agents {
		a := node(t, fresh, "prod", fmt.Sprint("node-", i))
		want := map[registry.EntryID]bool{}
		entries, _ := fresh.Scope(a)
		for _, e := range entries {
			want[e.ID] = true
		}
		if !maps.Equal(held[i], want) {
			t.Errorf("node %d holds %d entries, want %d", i, len(held[i]), len(want))
		}
	}
	if got, want := r.CountPodEntries(""), fresh.CountPodEntries(""); got != want {
		t.Errorf("%d entries of pods, want %d", got, want)
	}
}
