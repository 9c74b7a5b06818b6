package svidcache

import (
	"testing"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// TestTDB_19_RemovedAuthorityLeavesStreams takes an authority out of the bundle: open streams are told the bundle without
// it, and an SVID that it signed is replaced.
func TestTDB_19_RemovedAuthorityLeavesStreams(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		old := w.next(updates, 0)
		second := newAuthority(t, "a2")
		w.ca.mu.Lock()
		w.ca.active = second
		w.ca.mu.Unlock()
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(2, []string{"k2"}, second)}})
		u := w.next(updates, 0)
		if string(u.X509Bundles[td]) != string(second.cert.Raw) {
			t.Errorf("the bundle has %d bytes, want the second authority alone", len(u.X509Bundles[td]))
		}
		for len(u.Identities) == 0 || string(u.Identities[0].Chain) == string(old.Identities[0].Chain) {
			u = w.next(updates, 0)
		}
	})
}
