package svidcache

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// TestPrivilegedIdentitiesAreMarked: whoever speaks for workloads must be able to tell an admin's identity from others,
// also when an entry becomes an admin's while it is watched.
func TestPrivilegedIdentitiesAreMarked(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		admin, below := anEntry("2", "/admin", "unix:uid:1"), anEntry("3", "/below", "unix:uid:1")
		admin.Admin, below.Downstream = true, true
		w.start(anEntry("1", "/web", "unix:uid:1"), admin, below)
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		for _, i := range w.next(updates, 0).Identities {
			if i.Privileged != (i.ID.Path() != "/web") {
				t.Errorf("%s: Privileged is %t", i.ID, i.Privileged)
			}
		}
		svids, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"a"})
		if err != nil || len(svids) != 3 {
			t.Fatalf("FetchJWTSVIDs = %d SVIDs, %v; want 3", len(svids), err)
		}
		for _, s := range svids {
			if s.Privileged != (s.ID.Path() != "/web") {
				t.Errorf("JWT-SVID of %s: Privileged is %t", s.ID, s.Privileged)
			}
		}
		web := anEntry("1", "/web", "unix:uid:1")
		web.Admin = true
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{web}})
		for _, i := range w.next(updates, 0).Identities {
			if !i.Privileged {
				t.Errorf("%s became an admin's, and the update does not say so", i.ID)
			}
		}
	})
}
