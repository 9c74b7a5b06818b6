package svidcache

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/workloadapi"
)

// A keeper keeps in memory what a cache says.
type keeper struct {
	mu      sync.Mutex
	state   *nodev1.FollowResponse // the last snapshot
	svids   map[string]KeptSVID
	dropped []string
}

func (k *keeper) Applied(m *nodev1.FollowResponse) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if m.GetSnapshot() {
		k.state = proto.Clone(m).(*nodev1.FollowResponse)
	}
}

func (k *keeper) Hold(entryID string, revision int64, used bool, chain, key []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.svids[entryID] = KeptSVID{EntryID: entryID, EntryRevision: revision, Used: used, Chain: chain, Key: key}
}

func (k *keeper) Drop(entryID string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.svids, entryID)
	k.dropped = append(k.dropped, entryID)
}

func (k *keeper) has(entryID string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, ok := k.svids[entryID]
	return ok
}

// kept is what a restart finds now.
func (k *keeper) kept(now time.Time) Kept {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := Kept{State: k.state, Contact: now, Seen: now, MaxOffline: 24 * time.Hour}
	for _, s := range k.svids {
		out.SVIDs = append(out.SVIDs, s)
	}
	return out
}

// restarted is a world whose cache took over what a run before left, with its CA away. change edits that.
func restarted(t *testing.T, config func(*Config), change func(*Kept), entries ...*nodev1.Entry) (*world, *keeper) {
	t.Helper()
	k := &keeper{svids: make(map[string]KeptSVID)}
	first := newWorld(t, func(c *Config) { c.Keeper = k })
	first.start(entries...)
	synctest.Wait()
	again := newWorld(t, func(c *Config) {
		c.Keeper = k
		if config != nil {
			config(c)
		}
	})
	again.ca.active, again.ca.jwtKey, again.revision = first.ca.active, first.ca.jwtKey, first.revision
	again.stamp(entries)
	again.ca.syncErr = workloadapi.ErrUnavailable
	kept := k.kept(time.Now())
	if change != nil {
		change(&kept)
	}
	if err := again.cache.Restore(kept); err != nil {
		t.Fatal(err)
	}
	again.checkInvariants()
	return again, k
}

// back is the contact with the CA: the present entries as a snapshot, and the confirmation.
func (w *world) back(entries ...*nodev1.Entry) {
	w.t.Helper()
	w.ca.mu.Lock()
	w.ca.syncErr = nil
	w.ca.mu.Unlock()
	w.start(entries...)
	w.cache.InSync()
	synctest.Wait()
}

func issuances(ca *testCA) int { return len(ca.batches) }

func TestRestoreServesAtOnceAndAsksForNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		web := anEntry("1", "/web", "unix:uid:1")
		w, _ := restarted(t, nil, nil, web)
		select {
		case <-w.cache.Ready():
		default:
			t.Error("the cache is not ready after Restore")
		}
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		u := w.next(updates, 0)
		if ids(u) != "/web" || u.Offline.IsZero() || len(u.X509Bundles) != 1 || len(u.JWTBundles[td]) != 1 || u.Policies == nil {
			t.Fatalf("update %+v", u)
		}
		if w.cache.Restored() == nil {
			t.Error("the cache does not say that it was restored")
		}
		if _, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), u.Identities[0].ID, []string{"a"}); err == nil {
			t.Error("a JWT-SVID came from nowhere")
		}
		time.Sleep(40 * time.Minute) // past half of its life
		if n := w.ca.count(issuances); n != 0 {
			t.Errorf("%d issuances were asked for by what was restored", n)
		}
		if n := w.ca.count(func(ca *testCA) int { return ca.jwts }); n != 0 {
			t.Errorf("%d JWT-SVIDs were asked for by what was restored", n)
		}
		w.back(web)
		for {
			u = w.next(updates, time.Second)
			if u.Offline.IsZero() && u.Identities[0].NotAfter.After(time.Now().Add(50*time.Minute)) {
				break // renewed
			}
		}
		if w.cache.Restored() != nil {
			t.Error("the cache still says that it was restored")
		}
	})
}

func TestDeletedDuringTheOutageIsGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		one, two := anEntry("1", "/one", "unix:uid:1"), anEntry("2", "/two", "unix:uid:1")
		w, k := restarted(t, nil, nil, one, two)
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if u := w.next(updates, 0); ids(u) != "/one /two" {
			t.Fatalf("restored: %s", ids(u))
		}
		w.ca.mu.Lock()
		delete(w.ca.entries, "2")
		w.ca.mu.Unlock()
		w.start(one)
		if u := w.next(updates, 0); ids(u) != "/one" {
			t.Errorf("when the CA's state came: %s", ids(u))
		}
		w.cache.InSync()
		synctest.Wait()
		if w.ca.issued["2"] != 0 || k.has("2") {
			t.Errorf("%d SVIDs of a deleted entry were issued; kept: %t", w.ca.issued["2"], k.has("2"))
		}
	})
}

// Restored SVIDs are there for who comes back, whatever is kept ready, and are given up a while after the CA is back.
func TestRestoredBeyondTheBudget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		one, two := anEntry("1", "/one", "unix:uid:1"), anEntry("2", "/two", "unix:uid:2")
		w, k := restarted(t, func(c *Config) { c.MaxPrefetch = -1 }, nil, one, two)
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		if u := w.next(updates, 0); ids(u) != "/one" {
			t.Errorf("restored: %s", ids(u))
		}
		w.back(one, two)
		time.Sleep(spareWait - time.Second)
		if !k.has("2") {
			t.Error("what nobody had come back for yet was given up at once")
		}
		time.Sleep(2 * tick)
		if k.has("2") || !k.has("1") {
			t.Errorf("kept after a while: one %t, two %t; want the one in use", k.has("1"), k.has("2"))
		}
		stop()
	})
}

func TestRestoredEnds(t *testing.T) {
	web := func() *nodev1.Entry { return anEntry("1", "/web", "unix:uid:1") }
	for _, tt := range []struct {
		name   string
		clock  time.Duration // how far the clock stands from the truth when the agent starts again
		change func(*Kept)
		lives  time.Duration // how long the SVID, of an hour, is served
	}{
		{"with its validity", 0, nil, time.Hour},
		{"with max_offline", 0, func(k *Kept) { k.MaxOffline = 20 * time.Minute }, 20 * time.Minute},
		{"after the life it had left, though the clock was set back a day", -24 * time.Hour, nil, time.Hour},
		{"after max_offline, though the clock was set back a day", -24 * time.Hour, func(k *Kept) { k.MaxOffline = 20 * time.Minute }, 20 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				truth := time.Now()
				w, _ := restarted(t, func(c *Config) { c.Now = func() time.Time { return time.Now().Add(tt.clock) } }, tt.change, web())
				fetch := func() workloadapi.Update {
					updates, stop := w.watch(caller(1, "unix:uid:1"))
					defer stop()
					return w.next(updates, settleWait)
				}
				time.Sleep(time.Until(truth.Add(tt.lives - time.Minute)))
				u := fetch()
				if ids(u) != "/web" {
					t.Errorf("a minute before its end it is not served")
				}
				// What workloads are told is a time of the machine's clock, which the policies' end is counted by.
				if since := time.Now().Add(tt.clock).Sub(u.Offline); (since - time.Since(truth)).Abs() > time.Minute {
					t.Errorf("workloads are told that the CA has been away for %s, and it was %s", since, time.Since(truth))
				}
				time.Sleep(time.Until(truth.Add(tt.lives + time.Minute)))
				if u := fetch(); ids(u) != "" || !u.Entitled {
					t.Errorf("a minute after its end: %q", ids(u))
				}
			})
		})
	}
}

// max_offline bounds what a file says. When the CA has said it, an SVID lives its life.
func TestConfirmedSVIDsLast(t *testing.T) {
	bubble(t, func(t *testing.T) {
		web := anEntry("1", "/web", "unix:uid:1")
		w, _ := restarted(t, nil, func(k *Kept) { k.MaxOffline = 5 * time.Minute }, web)
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		w.back(web)
		w.cache.Offline()
		time.Sleep(20 * time.Minute)
		again, stopAgain := w.watch(caller(1, "unix:uid:1"))
		defer stopAgain()
		if u := w.next(again, 0); ids(u) != "/web" {
			t.Errorf("20 minutes later: %q", ids(u))
		}
	})
}

func TestRestoreLeavesOutWhatIsUnusable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		entries := []*nodev1.Entry{anEntry("1", "/good", "unix:uid:1"), anEntry("2", "/swapped", "unix:uid:2"), anEntry("3", "/broken", "unix:uid:3")}
		w, k := restarted(t, nil, func(kept *Kept) {
			byID := func(id string) *KeptSVID {
				return &kept.SVIDs[slices.IndexFunc(kept.SVIDs, func(s KeptSVID) bool { return s.EntryID == id })]
			}
			byID("2").Key = byID("1").Key
			byID("3").Chain = byID("3").Chain[:40]
			kept.SVIDs = append(kept.SVIDs, KeptSVID{EntryID: "4", Chain: byID("1").Chain, Key: byID("1").Key})
		}, entries...)
		for uid, want := range map[uint32]string{1: "/good", 2: "", 3: ""} {
			updates, stop := w.watch(caller(uid, entries[uid-1].Selectors...))
			if u := w.next(updates, settleWait); ids(u) != want {
				t.Errorf("uid %d: %q, want %q", uid, ids(u), want)
			}
			stop()
		}
		if k.has("2") || k.has("3") || !k.has("1") {
			t.Error("what is unusable is still kept, or what is not is not")
		}
		w.back(entries...)
		if w.ca.issued["2"] != 1 || w.ca.issued["3"] != 1 || w.ca.issued["1"] != 0 {
			t.Errorf("issued when the CA was back: %v", w.ca.issued)
		}
	})
	c, err := New(Config{TrustDomain: td, CA: newTestCA(t), ServiceMatches: func(string, spiffeid.ID) bool { return false }})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Restore(Kept{State: &nodev1.FollowResponse{Snapshot: true, Complete: true}}); err == nil || !strings.Contains(err.Error(), "authority") {
		t.Errorf("a state without an authority: %v", err)
	}
	select {
	case <-c.Ready():
		t.Error("ready after a refused Restore")
	default:
	}
}
