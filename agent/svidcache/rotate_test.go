package svidcache

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
)

func issuedOf(id string) func(*testCA) int { return func(ca *testCA) int { return ca.issued[id] } }

func TestRotationAtHalfLife(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		last := w.next(updates, 0)
		for range 5 {
			began := time.Now()
			u := w.next(updates, time.Hour)
			if after := time.Since(began); after < 26*time.Minute || after > 34*time.Minute {
				t.Errorf("renewed after %s of 1 h, want half of it", after)
			}
			if string(u.Identities[0].Key) == string(last.Identities[0].Key) {
				t.Error("the renewed SVID has the old key")
			}
			last = u
		}
	})
}

func TestIdleAgentAsksNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.MaxPrefetch = -1 })
		w.start(anEntry("1", "/a", "unix:uid:1"))
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if n := w.ca.count(func(ca *testCA) int { return len(ca.batches) + ca.syncs + ca.jwts }); n != 0 {
			t.Errorf("an idle agent asked its CA %d times", n)
		}
	})
}

func TestExpiredSVIDsAreNeverServed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		first := w.next(updates, 0)
		w.ca.mu.Lock()
		w.ca.fail = func(string) error { return errors.New("away") }
		w.ca.mu.Unlock()
		u := w.next(updates, 2*time.Hour)
		if len(u.Identities) != 0 || !u.Entitled {
			t.Errorf("after the SVID's end the caller has %q, entitled %t", ids(u), u.Entitled)
		}
		if now := time.Now(); now.Before(first.Identities[0].NotAfter) || now.Sub(first.Identities[0].NotAfter) > tick {
			t.Errorf("the caller heard of it at %s, the SVID ended at %s", now, first.Identities[0].NotAfter)
		}
		again, stopAgain := w.watch(caller(1, "unix:uid:1"))
		defer stopAgain()
		if u := w.next(again, settleWait); len(u.Identities) != 0 || !u.Entitled {
			t.Errorf("a new caller has %q", ids(u))
		}
		w.ca.mu.Lock()
		w.ca.fail = nil
		w.ca.mu.Unlock()
		if got := ids(w.next(updates, 2*retryMax)); got != "/a" {
			t.Errorf("when the CA is back the caller has %q", got)
		}
	})
}

func TestFailuresAreRetriedWithACap(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		var mu sync.Mutex
		var at []time.Time
		w.ca.fail = func(string) error {
			mu.Lock()
			defer mu.Unlock()
			at = append(at, time.Now())
			return errors.New("away")
		}
		w.start(anEntry("1", "/a", "unix:uid:1"))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		mu.Lock()
		n := len(at)
		for i := 1; i < n; i++ {
			if gap := at[i].Sub(at[i-1]); gap > retryMax*3/2+time.Second {
				t.Errorf("%s between two attempts", gap)
			}
		}
		mu.Unlock()
		if n < 13 || n > 60 {
			t.Errorf("%d attempts in ten minutes", n)
		}
		w.ca.mu.Lock()
		w.ca.fail = nil
		w.ca.mu.Unlock()
		w.cache.InSync()
		synctest.Wait()
		if got := w.ca.count(issuedOf("1")); got != 1 {
			t.Errorf("after the CA came back %d SVIDs were issued at once, want 1", got)
		}
	})
}

func TestTaintedAuthorityReissues(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		old := w.next(updates, 0)
		first, second := w.ca.active, newAuthority(t, "a2")
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(2, []string{"k1"}, first, second)}})
		if u := w.next(updates, 0); string(u.Identities[0].Chain) != string(old.Identities[0].Chain) || len(u.X509Bundles[td]) != len(first.cert.Raw)+len(second.cert.Raw) {
			t.Error("a prepared authority is not simply added to the bundle")
		}
		w.ca.mu.Lock()
		w.ca.active = second
		w.ca.mu.Unlock()
		tainted := w.ca.bundle(3, []string{"k1"}, first, second)
		tainted.X509Authorities[0].State = nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{tainted}})
		if u := w.next(updates, 0); string(u.Identities[0].Chain) == string(old.Identities[0].Chain) {
			t.Error("the SVID of a tainted authority was not issued anew")
		}
		if n := w.ca.count(issuedOf("1")); n != 2 {
			t.Errorf("%d SVIDs were issued, want 2", n)
		}
	})
}

func TestStillTaintedIsNotAskedForWithoutEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		synctest.Wait()
		tainted := w.ca.bundle(2, []string{"k1"}, w.ca.active)
		tainted.X509Authorities[0].State = nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{tainted}})
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := w.ca.count(issuedOf("1")); n < 3 || n > 40 {
			t.Errorf("%d SVIDs of a tainted authority were asked for in an hour", n)
		}
	})
}

func TestClockJumpsRecover(t *testing.T) {
	for _, jump := range []time.Duration{time.Hour, -time.Hour} {
		t.Run(jump.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, nil)
				w.start(anEntry("1", "/a", "unix:uid:1"))
				updates, stop := w.watch(caller(1, "unix:uid:1"))
				defer stop()
				w.next(updates, 0)
				time.Sleep(time.Minute)

				// The clocks of agent and CA jump together: the SVID is over, or not valid yet, and is issued anew.
				w.jump(jump)
				w.ca.mu.Lock()
				w.ca.skew = jump
				w.ca.mu.Unlock()
				u := w.next(updates, 2*tick)
				for len(u.Identities) == 0 {
					u = w.next(updates, 2*tick)
				}
				now := time.Now().Add(jump)
				if na := u.Identities[0].NotAfter; na.Sub(now) < 50*time.Minute || na.Sub(now) > time.Hour {
					t.Errorf("after the jump the SVID ends %s from now", na.Sub(now))
				}

				// And back.
				time.Sleep(time.Minute)
				w.jump(-jump)
				w.ca.mu.Lock()
				w.ca.skew = 0
				w.ca.mu.Unlock()
				for {
					u = w.next(updates, 2*tick)
					if len(u.Identities) > 0 {
						if left := time.Until(u.Identities[0].NotAfter); left > 50*time.Minute && left <= time.Hour {
							break
						}
					}
				}
			})
		})
	}
}

func TestAgentsClockAloneIsWrong(t *testing.T) {
	for _, jump := range []time.Duration{2 * time.Hour, -2 * time.Hour} {
		t.Run(jump.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, nil)
				w.start(anEntry("1", "/a", "unix:uid:1"))
				updates, stop := w.watch(caller(1, "unix:uid:1"))
				w.next(updates, 0)
				stop()
				w.jump(jump)
				time.Sleep(6 * time.Hour)
				synctest.Wait()
				if n := w.ca.count(issuedOf("1")); n > 100 {
					t.Errorf("with a wrong clock %d SVIDs were asked for in six hours", n)
				}
				w.jump(-jump)
				time.Sleep(2 * tick)
				synctest.Wait()
				updates, stop = w.watch(caller(1, "unix:uid:1"))
				defer stop()
				if got := ids(w.next(updates, 0)); got != "/a" {
					t.Errorf("after the clock was set right the caller has %q", got)
				}
			})
		})
	}
}

func TestPrefetchBudgetAndLRU(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.MaxPrefetch = 3 })
		var entries []*nodev1.Entry
		for i := range 10 {
			entries = append(entries, anEntry(fmt.Sprint(i), fmt.Sprintf("/%d", i), fmt.Sprintf("unix:uid:%d", i)))
		}
		entries[0].DisableX509Prefetch = true
		w.start(entries...)
		synctest.Wait()
		if n := w.cache.Stats().X509SVIDs; n != 3 {
			t.Errorf("%d SVIDs are kept ready, want 3", n)
		}
		// The last three that were asked for stay.
		for _, i := range []int{1, 2, 3, 4, 5} {
			updates, stop := w.watch(caller(1, fmt.Sprintf("unix:uid:%d", i)))
			if got := ids(w.next(updates, 0)); got != fmt.Sprintf("/%d", i) {
				t.Errorf("caller %d has %q", i, got)
			}
			stop()
			w.checkInvariants()
		}
		w.cache.mu.Lock()
		var kept []string
		for id := range w.cache.records {
			kept = append(kept, id)
		}
		w.cache.mu.Unlock()
		slices.Sort(kept)
		if !slices.Equal(kept, []string{"3", "4", "5"}) {
			t.Errorf("kept are %q, want the last three used", kept)
		}
		// Room that becomes free is used.
		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"3", "4"}})
		time.Sleep(time.Second)
		synctest.Wait()
		if n := w.cache.Stats().X509SVIDs; n != 3 {
			t.Errorf("%d SVIDs are kept ready after removals, want 3", n)
		}
		if n := w.ca.count(issuedOf("0")); n != 0 {
			t.Error("an SVID was prefetched that must not be")
		}
		w.checkInvariants()
	})
}

func TestSnapshotReplacesEverything(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		keep := anEntry("2", "/b", "unix:uid:1")
		keep.Revision = 1
		w.start(keep, anEntry("3", "/c", "unix:uid:1"))
		got := ids(w.next(updates, 0))
		if got == "/b" { // that one is gone is told at once, without waiting for the new one
			got = ids(w.next(updates, 0))
		}
		if got != "/b /c" {
			t.Errorf("after the snapshot the caller has %q", got)
		}
		if n := w.ca.count(issuedOf("2")); n != 1 {
			t.Errorf("an entry that did not change was issued %d times", n)
		}
	})
}

func TestApplyRefusesWhatCannotBeWhole(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		for name, m := range map[string]*nodev1.FollowResponse{
			"a snapshot's part":         {Epoch: "e", To: 1, Snapshot: true, Bundles: []*nodev1.Bundle{w.ca.bundle(1, nil, w.ca.active)}},
			"a snapshot without bundle": {Epoch: "e", To: 1, Snapshot: true, Complete: true},
			"a bundle of no domain":     {Epoch: "e", To: 1, Snapshot: true, Complete: true, Bundles: []*nodev1.Bundle{{TrustDomain: "Bad/"}}},
		} {
			if err := w.cache.Apply(m); err == nil {
				t.Errorf("%s was applied", name)
			}
		}
		if _, revision := w.cache.Held(); revision != 0 {
			t.Errorf("the cache holds revision %d after refusals", revision)
		}
	})
}

func TestBrokenEntriesAreLeftOut(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		foreign, none, bad := anEntry("1", "/x", "unix:uid:1"), anEntry("2", "/y"), anEntry("3", "/z", "nocolon")
		foreign.SpiffeId = "spiffe://other.example/x"
		w.start(foreign, none, bad, anEntry("4", "/good", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if got := ids(w.next(updates, 0)); got != "/good" {
			t.Errorf("the caller has %q", got)
		}
	})
}

// What a federated trust domain publishes must not keep this node from the rest of the CA's state.
func TestBrokenForeignBundleIsLeftOut(t *testing.T) {
	dsaKey, err := base64.StdEncoding.DecodeString("MIIBtjCCASsGByqGSM44BAEwggEeAoGBAIg326VhfNKnHuhXALBSO5WFQujSsI4JhPGP19yoJ/HnnuDaLeOKN0kDv2FDis2pWCgoG2KWTcUCULVosWxXP8FG28pwhcxVt/p1XBguhJnOpaSp94kwxtEcYHDLR6hb/KJj2x6zGAX3C1WOLIiQLueKNJSbZqlW520rAfPg7zhrAhUAnPqnbs4Dybc8Ih8hc+Qhe56jSHUCgYBxog8bMGEb3bfITS+uIFh9KmdSQIhRMmAHfZQPm/ciPIawMd5IRQ8B+nkyCqJGYAn7B+vM5/LMAJvKRNCFRCmzfxu4xWEiI7N+A8IqRIvi2KCA8sbauuvs6x5hrIjhmCSHNMf4C7jF5oJJaIKhGHCF3r/KmFiCDvrnJKrfEg66IgOBhAACgYAkHUx3RpERNMhQF1FYj67u8dYE9Ov5l2Zb+kSHft93k4mY1f8WIr9PXMhr/cNQN2xincErWpFEY+OPpmUAcj3O1z0TYjChRQ0dUe2fVRVxIJRjmxvGxNKrFIcmlvW3UU8aQk6DLSgJBVH+NkFcAiZC/t0BZQXy3oyn7J2HFYvHLA==")
	if err != nil {
		t.Fatal(err)
	}
	if key, err := x509.ParsePKIXPublicKey(dsaKey); err != nil {
		t.Fatalf("the test's DSA key: %T, %v", key, err)
	}
	for name, spoil := range map[string]func(b *nodev1.Bundle){
		"a DSA key": func(b *nodev1.Bundle) {
			b.JwtAuthorities = append(b.JwtAuthorities, &nodev1.JWTAuthority{KeyId: "dsa", PublicKey: dsaKey})
		},
		"too many authorities": func(b *nodev1.Bundle) {
			b.JwtAuthorities = make([]*nodev1.JWTAuthority, maxBundleAuthorities+1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, nil)
				e := anEntry("1", "/a", "unix:uid:1")
				e.FederatesWith = []string{"partner.example"}
				w.start(e)
				partner := w.ca.bundle(2, []string{"p1"}, w.ca.active)
				partner.TrustDomain = "partner.example"
				spoil(partner)
				w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{partner}, Entries: []*nodev1.Entry{anEntry("2", "/b", "unix:uid:1")}})
				updates, stop := w.watch(caller(1, "unix:uid:1"))
				defer stop()
				if got := ids(w.next(updates, 0)); got != "/a /b" {
					t.Errorf("the caller has %q", got)
				}
			})
		})
	}
}

func TestHandedOnIsWhatAllOpenStreamsHave(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		want := func(what string, ids ...string) {
			t.Helper()
			synctest.Wait()
			if got := w.ca.lastHandedOn(); !slices.Equal(got, ids) {
				t.Errorf("%s: handed on are %q, want %q", what, got, ids)
			}
		}
		w.start(anEntry("1", "/a", "unix:uid:1"))
		want("without streams", "a1", "k1")
		one, stopOne := w.watch(caller(1, "unix:uid:1"))
		two, stopTwo := w.watch(caller(1, "unix:uid:1"))
		defer stopTwo()
		w.cache.HandedOn(one, w.next(one, 0).BundleRevision)
		w.next(two, 0) // taken by the endpoint, not yet written
		want("after the first updates", "a1", "k1")

		second := newAuthority(t, "a2")
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(2, []string{"k1"}, w.ca.active, second)}})
		u1, u2 := w.next(one, 0), w.next(two, 0)
		want("pushed and not written", "a1", "k1")
		w.cache.HandedOn(two, u2.BundleRevision)
		want("written to one of two", "a1", "k1")
		w.cache.HandedOn(one, 1) // an old acknowledgement says nothing
		want("an old acknowledgement", "a1", "k1")
		w.cache.HandedOn(one, u1.BundleRevision)
		want("written to both", "a1", "a2", "k1")

		third := newAuthority(t, "a3")
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(3, []string{"k1"}, second, third)}})
		w.next(one, 0)
		u2 = w.next(two, 0)
		w.cache.HandedOn(two, u2.BundleRevision)
		want("a laggard", "a2", "k1")
		stopOne()
		want("the laggard is gone", "a2", "a3", "k1")
	})
}

func TestMatchIsFastWithTenThousandEntries(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.MaxPrefetch = -1 })
		var entries []*nodev1.Entry
		for i := range 10000 {
			entries = append(entries, anEntry(fmt.Sprint(i), fmt.Sprintf("/%d", i), "unix:uid:0", fmt.Sprintf("unix:path:/bin/%d", i)))
		}
		w.start(entries...)
		s := w.cache.state.Load()
		uid0, _ := s.index.get(spiffe.Selector{Type: "unix", Value: "uid:0"})
		if len(uid0) > 2 {
			t.Errorf("a caller with uid 0 is compared with %d entries", len(uid0))
		}
		updates, stop := w.watch(caller(0, "unix:uid:0", "unix:path:/bin/77"))
		defer stop()
		if got := ids(w.next(updates, 0)); got != "/77" {
			t.Errorf("the caller has %q", got)
		}
	})
}
