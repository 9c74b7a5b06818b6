package svidcache

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/workloadapi"
)

func TestUpdateIsComplete(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/web", "unix:uid:1", "unix:user:web"))
		updates, stop := w.watch(caller(1, "unix:user:web", "unix:uid:1", "unix:gid:1"))
		defer stop()
		u := w.next(updates, 0)
		if ids(u) != "/web" || !u.Entitled || u.TrustDomain != td {
			t.Fatalf("update has %q, entitled %t", ids(u), u.Entitled)
		}
		i := u.Identities[0]
		leaf, err := x509.ParseCertificate(i.Chain)
		if err != nil {
			t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(i.Key)
		if err != nil {
			t.Fatal(err)
		}
		if !key.(*ecdsa.PrivateKey).PublicKey.Equal(leaf.PublicKey) {
			t.Error("the key is not the leaf's")
		}
		if leaf.URIs[0].String() != i.ID.String() || !i.NotAfter.Equal(leaf.NotAfter) || i.EntryID != "1" {
			t.Errorf("identity %+v does not agree with its leaf", i.ID)
		}
		if string(u.X509Bundles[td]) != string(w.ca.active.cert.Raw) || u.JWTBundles[td]["k1"] == nil || u.BundleRevision != 1 {
			t.Errorf("bundles are wrong: %d bytes, %d keys, revision %d", len(u.X509Bundles[td]), len(u.JWTBundles[td]), u.BundleRevision)
		}
		if u.Policies == nil || u.Policies.GetTrustDomain() != "example.org" || u.Policies.GetEpoch() != "e1" {
			t.Errorf("policies are %v", u.Policies)
		}
	})
}

func TestMatchingNeedsAllSelectors(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/both", "unix:uid:1", "unix:user:web"), anEntry("2", "/one", "unix:uid:1"), anEntry("3", "/other", "unix:uid:2"))
		for sel, want := range map[string]string{"unix:uid:1": "/one", "unix:uid:2": "/other"} {
			updates, stop := w.watch(caller(1, sel))
			if got := ids(w.next(updates, 0)); got != want {
				t.Errorf("a caller with %s has %q, want %q", sel, got, want)
			}
			stop()
		}
	})
}

func TestWAPI_05_EachUpdateHoldsAll(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("2", "/b", "unix:uid:1")}})
		if got := ids(w.next(updates, 0)); got != "/a /b" {
			t.Errorf("after the second entry the update has %q", got)
		}
		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"1"}})
		if got := ids(w.next(updates, 0)); got != "/b" {
			t.Errorf("after the first entry was removed the update has %q", got)
		}
		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"2"}})
		if u := w.next(updates, 0); len(u.Identities) != 0 || u.Entitled {
			t.Errorf("after the last entry was removed the update has %q, entitled %t", ids(u), u.Entitled)
		}
	})
}

func TestWAPI_07_NoUpdateWithoutAVisibleChange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("2", "/b", "unix:uid:2")}})
		w.change(&nodev1.FollowResponse{Policies: []*policyv1.Policy{{Name: "p", Revision: 3, Services: []string{"spiffe://example.org/b"}}}})
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(9, []string{"k1"}, w.ca.active)}})
		foreign := w.ca.bundle(4, []string{"f1"}, w.ca.active)
		foreign.TrustDomain = "partner.example"
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{foreign}})
		w.silent(updates, time.Minute)

		w.change(&nodev1.FollowResponse{Policies: []*policyv1.Policy{{Name: "q", Revision: 5, Services: []string{"spiffe://example.org/a"}}}})
		u := w.next(updates, 0)
		if n := len(u.Policies.GetPolicies()); n != 1 || u.Policies.GetPolicies()[0].GetName() != "q" || u.Policies.GetRevision() != w.revision {
			t.Errorf("the caller has %d policies, revision %d", n, u.Policies.GetRevision())
		}
		w.silent(updates, time.Minute)
	})
}

func TestWAPI_21_DefaultIdentityIsTheOldestAlsoAfterRestarts(t *testing.T) {
	for run := range 10 {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, nil)
			young, old, twin := anEntry("b", "/young", "unix:uid:1"), anEntry("z", "/old", "unix:uid:1"), anEntry("a", "/twin", "unix:uid:1")
			young.CreatedAt, old.CreatedAt, twin.CreatedAt = 3000, 1000, 3000
			w.start(young, old, twin)
			updates, stop := w.watch(caller(1, "unix:uid:1"))
			defer stop()
			if got := ids(w.next(updates, 0)); got != "/old /twin /young" {
				t.Errorf("run %d: order is %q", run, got)
			}
		})
	}
}

func TestWAPI_19_OldestEntryKeepsTheHint(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		young, old, other := anEntry("a", "/young", "unix:uid:1"), anEntry("b", "/old", "unix:uid:1"), anEntry("c", "/other", "unix:uid:1")
		young.CreatedAt, old.CreatedAt, other.CreatedAt = 3000, 1000, 2000
		young.Hint, old.Hint = "internal", "internal"
		w.start(young, old, other)
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if got := ids(w.next(updates, 0)); got != "/old /other" {
			t.Errorf("X.509: %q, want only the oldest entry with the hint", got)
		}
		svids, err := w.cache.FetchJWTSVIDs(t.Context(), caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"})
		if err != nil || len(svids) != 2 || svids[0].ID.Path() != "/old" || svids[0].Hint != "internal" {
			t.Errorf("JWT: %d SVIDs, %v", len(svids), err)
		}
	})
}

func TestWAPI_36_OnlyBundlesOfFederatedDomains(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		with, without := anEntry("1", "/with", "unix:uid:1"), anEntry("2", "/without", "unix:uid:2")
		with.FederatesWith = []string{"partner.example", "unknown.example"}
		w.start(with, without)
		foreign := w.ca.bundle(4, []string{"f1"}, newAuthority(t, ""))
		foreign.TrustDomain = "partner.example"
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{foreign}})
		partner := spiffeid.RequireTrustDomainFromString("partner.example")
		for sel, want := range map[string]int{"unix:uid:1": 2, "unix:uid:2": 1} {
			updates, stop := w.watch(caller(1, sel))
			u := w.next(updates, 0)
			if len(u.X509Bundles) != want || len(u.JWTBundles) != want || (u.X509Bundles[partner] != nil) != (want == 2) {
				t.Errorf("a caller with %s has %d bundles, want %d", sel, len(u.X509Bundles), want)
			}
			stop()
		}
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		w.change(&nodev1.FollowResponse{RemovedBundles: []string{"partner.example"}})
		if u := w.next(updates, 0); len(u.X509Bundles) != 1 {
			t.Errorf("after the end of the federation the caller has %d bundles", len(u.X509Bundles))
		}
	})
}

func TestRegistrationInFlight(t *testing.T) {
	t.Run("acknowledged before the call, on its way to the agent", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.RegistrationWait = -1 })
			w.start()
			w.ca.onSync = func() { w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("1", "/a", "unix:uid:1")}}) }
			updates, stop := w.watch(caller(1, "unix:uid:1"))
			defer stop()
			if got := ids(w.next(updates, 0)); got != "/a" {
				t.Errorf("the caller has %q", got)
			}
		})
	})
	t.Run("made while the call is held", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, nil)
			w.start()
			go func() {
				time.Sleep(900 * time.Millisecond)
				w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("1", "/a", "unix:uid:1")}})
			}()
			began := time.Now()
			updates, stop := w.watch(caller(1, "unix:uid:1"))
			defer stop()
			if got := ids(w.next(updates, 0)); got != "/a" || time.Since(began) != 900*time.Millisecond {
				t.Errorf("the caller has %q after %s", got, time.Since(began))
			}
			if n := w.ca.count(func(ca *testCA) int { return ca.syncs }); n != 1 {
				t.Errorf("%d syncs, want 1", n)
			}
		})
	})
	t.Run("never made", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, nil)
			w.start()
			began := time.Now()
			updates, stop := w.watch(caller(1, "unix:uid:1"))
			defer stop()
			if u := w.next(updates, 0); u.Entitled || len(u.Identities) != 0 || time.Since(began) != time.Second {
				t.Errorf("entitled %t, %d identities after %s", u.Entitled, len(u.Identities), time.Since(began))
			}
			_, err := w.cache.FetchJWTSVIDs(t.Context(), caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"})
			if !errors.Is(err, workloadapi.ErrNoIdentity) {
				t.Errorf("FetchJWTSVIDs: %v, want ErrNoIdentity", err)
			}
		})
	})
	t.Run("the CA is away", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, nil)
			w.start()
			w.ca.syncErr = errors.New("away")
			began := time.Now()
			if _, err := w.cache.FetchJWTSVIDs(t.Context(), caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"}); !errors.Is(err, workloadapi.ErrNoIdentity) || time.Since(began) != time.Second {
				t.Errorf("%v after %s, want ErrNoIdentity after the wait", err, time.Since(began))
			}
		})
	})
	t.Run("held calls are bounded per uid", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, nil)
			w.start()
			waits := make(chan time.Duration, maxHeldPerUID+10)
			for range cap(waits) {
				go func() {
					began := time.Now()
					_, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"})
					if !errors.Is(err, workloadapi.ErrNoIdentity) {
						t.Errorf("%v, want ErrNoIdentity", err)
					}
					waits <- time.Since(began)
				}()
			}
			held := 0
			for range cap(waits) {
				if <-waits == time.Second {
					held++
				}
			}
			if held != maxHeldPerUID {
				t.Errorf("%d calls were held, want %d", held, maxHeldPerUID)
			}
		})
	})
}

func TestNotReadyOnlyBeforeTheFirstState(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		if _, err := w.cache.Watch(t.Context(), caller(1, "unix:uid:1")); !errors.Is(err, workloadapi.ErrNotReady) {
			t.Errorf("Watch before the first state: %v, want ErrNotReady", err)
		}
		go func() {
			time.Sleep(100 * time.Millisecond)
			w.start(anEntry("1", "/a", "unix:uid:1"))
		}()
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if got := ids(w.next(updates, 0)); got != "/a" {
			t.Errorf("a caller that waited for the first state has %q", got)
		}
	})
}

func TestFirstUpdateWaitsForAllSVIDs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		refused := errors.New("not now")
		w.ca.fail = func(id string) error {
			if id == "2" {
				return refused
			}
			return nil
		}
		w.start(anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if got := ids(w.next(updates, 0)); got != "/a" {
			t.Errorf("while one SVID is refused the caller has %q, want the other", got)
		}
		w.ca.mu.Lock()
		w.ca.fail = nil
		w.ca.mu.Unlock()
		if got := ids(w.next(updates, 2*time.Second)); got != "/a /b" {
			t.Errorf("after a retry the caller has %q", got)
		}
	})
}

func TestEntryChangeGivesOneUpdate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		first := w.next(updates, 0)
		changed := anEntry("1", "/renamed", "unix:uid:1")
		changed.Revision, changed.Hint = 7, "h"
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{changed}})
		u := w.next(updates, 0)
		if ids(u) != "/renamed" || u.Identities[0].Hint != "h" || string(u.Identities[0].Chain) == string(first.Identities[0].Chain) {
			t.Errorf("after the change the caller has %q with hint %q", ids(u), u.Identities[0].Hint)
		}
		if string(u.Identities[0].Key) == string(first.Identities[0].Key) {
			t.Error("the new SVID has the old key")
		}
		w.silent(updates, time.Minute)
	})
}

func TestSlowReaderGetsTheLastState(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("0", "/0", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		for i := 1; i <= 20; i++ {
			w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry(fmt.Sprint(i+100), fmt.Sprintf("/%d", i), "unix:uid:1")}})
			synctest.Wait()
		}
		if n := len(w.next(updates, 0).Identities); n != 21 {
			t.Errorf("a slow reader got %d identities, want the last state's 21", n)
		}
		w.silent(updates, time.Minute)
	})
}

func TestEntryPastItsEndIsGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		e := anEntry("1", "/a", "unix:uid:1")
		e.ExpiresAt = time.Now().Add(10 * time.Minute).Unix()
		w.start(e)
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		began := time.Now()
		if u := w.next(updates, time.Hour); u.Entitled || time.Since(began) > 10*time.Minute+tick {
			t.Errorf("entitled %t after %s", u.Entitled, time.Since(began))
		}
	})
}

func TestWatchClosesItsChannelWithItsContext(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		ctx, cancel := context.WithCancel(t.Context())
		updates, err := w.cache.Watch(ctx, caller(1, "unix:uid:1"))
		if err != nil {
			t.Fatal(err)
		}
		w.next(updates, 0)
		cancel()
		if _, ok := <-updates; ok {
			t.Error("an update came after the context's end")
		}
		if s := w.cache.Stats(); s.Watchers != 0 {
			t.Errorf("%d watchers are left", s.Watchers)
		}
		w.cache.mu.Lock()
		defer w.cache.mu.Unlock()
		if len(w.cache.bySel)+len(w.cache.byChan)+len(w.cache.handed.streams) != 0 {
			t.Error("the subscription left something behind")
		}
	})
}

func TestOfflineIsToldAfterAWhileWithTheTimeOfTheLoss(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if u := w.next(updates, time.Second); !u.Offline.IsZero() {
			t.Errorf("with contact the update says offline since %s", u.Offline)
		}
		w.cache.Offline()
		time.Sleep(offlineQuiet / 2)
		w.cache.InSync()
		w.silent(updates, 2*offlineQuiet) // a CA that was restarted

		lost := w.cache.config.Now()
		w.cache.Offline()
		time.Sleep(time.Second)
		w.cache.Offline() // the loss that counts is the first
		u := w.next(updates, 2*offlineQuiet)
		if !u.Offline.Equal(lost) {
			t.Errorf("offline since %s, want %s", u.Offline, lost)
		}
		if waited := w.cache.config.Now().Sub(lost); waited < offlineQuiet {
			t.Errorf("it was told after %s already", waited)
		}
		late, stopLate := w.watch(caller(1, "unix:uid:1"))
		defer stopLate()
		if u := w.next(late, time.Second); !u.Offline.Equal(lost) {
			t.Errorf("a later caller is told offline since %s, want %s", u.Offline, lost)
		}
		w.cache.InSync()
		for _, c := range []<-chan workloadapi.Update{updates, late} {
			if u := w.next(c, time.Millisecond); !u.Offline.IsZero() {
				t.Errorf("after the CA is back the update says offline since %s", u.Offline)
			}
		}
	})
}

// TestUntakenUpdateDoesNotOutliveItsTruth: what lies ready and is not true any more is withdrawn, also while an SVID is on its
// way, and a loss that it told of is told all the same.
func TestUntakenUpdateDoesNotOutliveItsTruth(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		hanging := make(chan struct{})
		letGo := sync.OnceFunc(func() { close(hanging) })
		defer letGo()
		w.ca.fail = func(id string) error {
			if id == "3" {
				<-hanging
			}
			return nil
		}
		w.start(anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if got := ids(w.next(updates, 0)); got != "/a /b" {
			t.Fatalf("the caller has %q", got)
		}
		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"2"}})
		synctest.Wait() // that /b is lost lies ready
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("3", "/c", "unix:uid:1")}})
		synctest.Wait() // that of 3 is on its way
		u := w.next(updates, 0)
		if ids(u) != "/a" || !u.Pending {
			t.Errorf("the caller has %q, pending %t; want /a, and that another is on its way", ids(u), u.Pending)
		}
		letGo()
		if got := ids(w.next(updates, 0)); got != "/a /c" {
			t.Errorf("at last the caller has %q", got)
		}
		w.silent(updates, time.Minute)
	})
}

// TestIncompleteStateWithdrawsTheOneBefore: an update that nobody took is not left there when more than it tells of is on its way.
func TestIncompleteStateWithdrawsTheOneBefore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		hanging := make(chan struct{})
		letGo := sync.OnceFunc(func() { close(hanging) })
		defer letGo()
		w.ca.fail = func(id string) error {
			if id == "3" {
				<-hanging
			}
			return nil
		}
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("2", "/b", "unix:uid:1")}})
		synctest.Wait() // /a /b lies ready
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("3", "/c", "unix:uid:1")}})
		synctest.Wait()
		began := time.Now()
		if got := ids(w.next(updates, settleWait+time.Second)); got != "/a /b" || time.Since(began) < settleWait-time.Millisecond {
			t.Errorf("after %s the caller has %q", time.Since(began), got)
		}
		letGo()
		if got := ids(w.next(updates, 0)); got != "/a /b /c" {
			t.Errorf("at last the caller has %q", got)
		}
	})
}
