package svidcache

import (
	"slices"
	"testing"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// TestWatchBundlesHasAll: who speaks for any workload of the node sees each bundle that some entry federates with, and
// counts as a stream to which a new authority must have been written.
func TestWatchBundlesHasAll(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, err := w.cache.WatchBundles(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		u := w.next(updates, 0)
		if len(u.X509Bundles) != 1 || len(u.Identities) != 0 || u.Entitled {
			t.Fatalf("the first update has %d bundles, %d identities, entitled %t; want our own bundle alone", len(u.X509Bundles), len(u.Identities), u.Entitled)
		}
		foreign := w.ca.bundle(4, []string{"f1"}, newAuthority(t, ""))
		foreign.TrustDomain = "partner.example"
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{foreign}})
		if u = w.next(updates, 0); len(u.X509Bundles) != 2 || len(u.JWTBundles) != 2 {
			t.Errorf("the update has %d and %d bundles, want our own and the partner's", len(u.X509Bundles), len(u.JWTBundles))
		}
		second := newAuthority(t, "a2")
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(5, []string{"k1"}, w.ca.active, second)}})
		told := func() []string {
			w.cache.mu.Lock()
			defer w.cache.mu.Unlock()
			return w.cache.handed.told
		}
		u = w.next(updates, 0)
		if slices.Contains(told(), "a2") {
			t.Errorf("handed on is %q before the stream was written", told())
		}
		w.cache.HandedOn(updates, u.BundleRevision)
		if !slices.Contains(told(), "a2") {
			t.Errorf("handed on is %q after the stream was written; want a2 too", told())
		}
		w.change(&nodev1.FollowResponse{RemovedBundles: []string{"partner.example"}})
		if u = w.next(updates, 0); len(u.X509Bundles) != 1 {
			t.Errorf("%d bundles after one left, want 1", len(u.X509Bundles))
		}
	})
}
