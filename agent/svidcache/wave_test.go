package svidcache

import (
	"encoding/hex"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// TestWaveIsBoundedOrderedAndComplete: what a tainted authority signed is renewed over the time that the CA names, evenly,
// the oldest first, until nothing of it is left; and what is held all the while is served.
func TestWaveIsBoundedOrderedAndComplete(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const n = 60
		const wave = 60 * time.Second
		w := newWorld(t, nil)
		w.ca.ttl = 24 * time.Hour
		var order []string
		w.ca.fail = func(entry string) error { order = append(order, entry); return nil } // called under ca.mu
		for i := range n {                                                                // one a second, so that each has its age
			e := anEntry(fmt.Sprintf("%03d", i), fmt.Sprintf("/w%d", i), "unix:uid:1")
			if i == 0 {
				w.start(e)
			} else {
				w.change(&nodev1.FollowResponse{Entries: w.stamp([]*nodev1.Entry{e})})
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		first, second := w.ca.active, newAuthority(t, "a2")
		w.ca.mu.Lock()
		aged := slices.Clone(order)
		order = nil
		w.ca.active = second
		w.ca.mu.Unlock()
		tainted := w.ca.bundle(w.cache.state.Load().revision+1, []string{"k1"}, first, second)
		tainted.X509Authorities[0].State = nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
		tainted.ReissueSeconds = int64(wave / time.Second)
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{tainted}})
		renewed := func() int { return w.ca.count(func(*testCA) int { return len(order) }) }
		worst := 0
		for s := range 2 * int(wave/time.Second) {
			before := renewed()
			time.Sleep(time.Second)
			synctest.Wait()
			worst = max(worst, renewed()-before)
			if s == int(wave/time.Second)/2 {
				if got := renewed(); got < n/4 || got > 3*n/4 {
					t.Errorf("%d of %d are renewed half way through the wave", got, n)
				}
			}
		}
		if got := renewed(); got != n {
			t.Errorf("%d of %d were renewed", got, n)
		}
		if worst > 4 { // one a second, gathered by looks half a second apart
			t.Errorf("%d renewals within a second of an even wave of one a second", worst)
		}
		// The oldest first: within the jitter of one turn, and of a batch whose order is nobody's business.
		for i, id := range order {
			if at := slices.Index(aged, id); at < i-4 || at > i+4 {
				t.Errorf("%s, the %dth oldest, was the %dth to be renewed", id, at, i)
			}
		}
		if got, want := w.ca.lastInUse(), []string{hex.EncodeToString(second.cert.SubjectKeyId)}; !slices.Equal(got, want) {
			t.Errorf("after the wave it uses %v, want %v", got, want)
		}
	})
}

// TestWaveOfAnAuthorityThatIsGone: nothing is left to wait for when the authority has left the bundle.
func TestWaveOfAnAuthorityThatIsGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		synctest.Wait()
		first, second := w.ca.active, newAuthority(t, "a2")
		w.ca.mu.Lock()
		w.ca.active = second
		w.ca.mu.Unlock()
		tainted := w.ca.bundle(2, []string{"k1"}, first, second)
		tainted.X509Authorities[0].State = nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
		tainted.ReissueSeconds = 1 << 40 // bounded
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{tainted}})
		if n := w.ca.count(issuedOf("1")); n > 2 {
			t.Errorf("%d SVIDs", n)
		}
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(3, []string{"k1"}, second)}})
		synctest.Wait()
		if n := w.ca.count(issuedOf("1")); n != 2 {
			t.Errorf("%d SVIDs were issued after the revocation, want 2", n)
		}
	})
}

func TestWaveMoments(t *testing.T) {
	for _, length := range []time.Duration{0, time.Nanosecond, time.Second, time.Hour} {
		for _, n := range []int{1, 7, 1000} {
			last := time.Duration(-1)
			for i := range n {
				at := waveMoment(length, i, n)
				if at < last || at > min(length, maxWave) {
					t.Errorf("%v, %d of %d: %v after %v", length, i, n, at, last)
				}
				last = at
			}
		}
	}
}
