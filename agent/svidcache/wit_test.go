package svidcache

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/workloadapi"
)

// A testWITs signs WIT-SVIDs for the entries of a testCA. Its fields are set before use or under mu.
type testWITs struct {
	t   testing.TB
	ca  *testCA
	key *authority

	mu      sync.Mutex
	kid     string
	ttl     time.Duration
	fail    error
	as      string // another SPIFFE ID than the entry's
	batches []int
}

func newTestWITs(t testing.TB) *testWITs {
	return &testWITs{t: t, key: newAuthority(t, "wit"), kid: "w1", ttl: time.Hour}
}

func (w *testWITs) IssueWIT(_ context.Context, requests []WITRequest) []WITAnswer {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.batches = append(w.batches, len(requests))
	answers := make([]WITAnswer, len(requests))
	for i, r := range requests {
		if answers[i].Err = w.fail; w.fail == nil {
			answers[i].Token, answers[i].Err = w.sign(r)
		}
	}
	return answers
}

func (w *testWITs) sign(r WITRequest) (string, error) {
	w.ca.mu.Lock()
	e := w.ca.entries[r.EntryID]
	w.ca.mu.Unlock()
	if e == nil {
		return "", errors.New("entry not found")
	}
	key, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: w.key.key, KeyID: w.kid}}, (&jose.SignerOptions{}).WithType("wit+jwt"))
	if err != nil {
		return "", err
	}
	sub := e.GetSpiffeId()
	if w.as != "" {
		sub = w.as
	}
	return jwt.Signed(signer).Claims(map[string]any{
		"sub": sub, "exp": time.Now().Add(w.ttl).Unix(), "nbf": time.Now().Add(-10 * time.Second).Unix(),
		"cnf": map[string]any{"jwk": jose.JSONWebKey{Key: key, Algorithm: r.Algorithm}},
	}).Serialize()
}

func (w *testWITs) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *testWITs) calls() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.batches)
}

// authorities is the own bundle with WIT authorities of these key ids; "!" at the end: tainted.
func (w *testWITs) bundle(revision int64, kids ...string) *nodev1.Bundle {
	b := w.ca.bundle(revision, []string{"k1"}, w.ca.active)
	public, err := x509.MarshalPKIXPublicKey(w.key.key.Public())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, id := range kids {
		name, tainted := strings.CutSuffix(id, "!")
		state := nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE
		if tainted {
			state = nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
		}
		b.WitAuthorities = append(b.WitAuthorities, &nodev1.JWTAuthority{KeyId: name, PublicKey: public, State: state})
	}
	return b
}

func newWITWorld(t testing.TB, entries ...*nodev1.Entry) (*world, *testWITs) {
	t.Helper()
	wits := newTestWITs(t)
	w := newWorld(t, func(c *Config) { c.WIT = wits })
	wits.ca = w.ca
	w.start(entries...)
	w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{wits.bundle(w.revision+1, "w1")}})
	return w, wits
}

func (w *world) watchWIT(c workloadapi.Caller) (updates <-chan workloadapi.Update, stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	updates, err := w.cache.WatchWIT(ctx, c)
	if err != nil {
		w.t.Fatalf("WatchWIT: %v", err)
	}
	return updates, func() {
		cancel()
		for range updates { // drained until closed
		}
	}
}

func privateOf(t testing.TB, wit *workloadapi.WITSVID) *ecdsa.PrivateKey {
	t.Helper()
	var jwk jose.JSONWebKey
	if err := json.Unmarshal([]byte(wit.Key), &jwk); err != nil {
		t.Fatal(err)
	}
	key, ok := jwk.Key.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("the key is a %T", jwk.Key)
	}
	return key
}

// TestWAPI_78_WIT_23_WIT_24_KeysOfWITs: two identities of one caller have keys of their own, two processes of one identity
// the same, and each renewal, well before the end, brings another.
func TestWAPI_78_WIT_23_WIT_24_KeysOfWITs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, wits := newWITWorld(t, anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		updates, stop := w.watchWIT(caller(1, "unix:uid:1"))
		defer stop()
		first := w.next(updates, 0)
		if ids(first) != "/a /b" {
			t.Fatalf("the caller has %q", ids(first))
		}
		a, b := first.Identities[0].WIT, first.Identities[1].WIT
		if privateOf(t, a).Equal(privateOf(t, b)) {
			t.Error("two identities share a key")
		}
		other, stopOther := w.watchWIT(caller(1, "unix:uid:1"))
		if again := w.next(other, 0); again.Identities[0].WIT.Token != a.Token || again.Identities[0].WIT.Key != a.Key {
			t.Error("two processes of one identity have different WIT-SVIDs")
		}
		stopOther()
		if n := wits.calls(); n != 1 {
			t.Errorf("the CA was asked %d times for what is there", n)
		}
		seen := map[string]bool{a.Key: true}
		for began := time.Now(); time.Since(began) < 3*time.Hour; {
			u := w.next(updates, 40*time.Minute)
			for _, i := range u.Identities {
				if i.ID.Path() == "/a" && !seen[i.WIT.Key] {
					seen[i.WIT.Key] = true
				}
			}
		}
		if len(seen) < 4 {
			t.Errorf("in three hours of an hour each there were %d keys", len(seen))
		}
	})
}

func TestWITsAreOnlyThereForThoseWhoAsk(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, wits := newWITWorld(t, anEntry("1", "/a", "unix:uid:1"))
		plain, stopPlain := w.watch(caller(1, "unix:uid:1"))
		defer stopPlain()
		if u := w.next(plain, 0); u.Identities[0].WIT != nil || wits.calls() != 0 {
			t.Error("a WIT-SVID was made for a stream that shows none")
		}
		updates, stop := w.watchWIT(caller(1, "unix:uid:1"))
		w.next(updates, 0)
		stop()
		w.cache.mu.Lock()
		defer w.cache.mu.Unlock()
		if len(w.cache.wits) != 0 {
			t.Errorf("%d WIT-SVIDs are kept with nobody to show them to", len(w.cache.wits))
		}
	})
}

func TestWITsFollowTheirEntryAndTheirAuthority(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, wits := newWITWorld(t, anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watchWIT(caller(1, "unix:uid:1"))
		defer stop()
		old := w.next(updates, 0).Identities[0].WIT

		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{anEntry("1", "/moved", "unix:uid:1")}})
		u := w.next(updates, time.Second)
		if ids(u) != "/moved" || u.Identities[0].WIT.Key == old.Key {
			t.Fatalf("after the entry's ID has changed: %q", ids(u))
		}
		old = u.Identities[0].WIT

		wits.set(func() { wits.kid = "w2" })
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{wits.bundle(w.revision+1, "w1!", "w2")}})
		for u = w.next(updates, time.Second); u.Identities[0].WIT.Token == old.Token; u = w.next(updates, time.Second) {
		}
		if len(u.WITBundles[td]) != 2 {
			t.Errorf("the bundle has %d WIT authorities, want the tainted one too", len(u.WITBundles[td]))
		}

		// The CA is away when the authority goes: what it signed is shown to nobody any more.
		wits.set(func() { wits.fail = errors.New("the CA is away") })
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{wits.bundle(w.revision+1, "w3")}})
		for u = w.next(updates, settleWait+time.Second); len(u.Identities) > 0; u = w.next(updates, settleWait+time.Second) {
		}
		if !u.Entitled || !u.Pending {
			t.Errorf("an update without its WIT-SVID says entitled %t, pending %t", u.Entitled, u.Pending)
		}
		wits.set(func() { wits.fail, wits.kid = nil, "w3" })
		if u = w.next(updates, time.Minute); ids(u) != "/moved" {
			t.Errorf("after the CA came back: %q", ids(u))
		}

		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"1"}})
		if u = w.next(updates, 0); len(u.Identities) != 0 || u.Entitled {
			t.Errorf("after the entry is gone: %q", ids(u))
		}
	})
}

// TestWITsOfAHostileCA: what is not the entry's, or is signed by nobody we know, is never shown.
func TestWITsOfAHostileCA(t *testing.T) {
	for name, change := range map[string]func(*testWITs){
		"another ID":           func(w *testWITs) { w.as = "spiffe://example.org/admin" },
		"another trust domain": func(w *testWITs) { w.as = "spiffe://other.example/a" },
		"an unknown authority": func(w *testWITs) { w.kid = "nobody" },
		"another key":          func(w *testWITs) { w.key = newAuthority(w.t, "false") },
		"it has expired":       func(w *testWITs) { w.ttl = -time.Second },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w, wits := newWITWorld(t, anEntry("1", "/a", "unix:uid:1"))
				wits.set(func() { change(wits) })
				updates, stop := w.watchWIT(caller(1, "unix:uid:1"))
				defer stop()
				for began := time.Now(); time.Since(began) < 10*time.Minute; {
					timer := time.NewTimer(time.Minute)
					select {
					case u := <-updates:
						if len(u.Identities) > 0 {
							t.Fatalf("it was shown: %v", u.Identities[0].ID)
						}
					case <-timer.C:
					}
				}
				if n := wits.calls(); n < 5 || n > 60 {
					t.Errorf("in ten minutes the CA was asked %d times", n)
				}
			})
		})
	}
}

func TestManyWITsGoInBatches(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var entries []*nodev1.Entry
		for i := range maxBatch + 10 {
			entries = append(entries, anEntry(fmt.Sprint(i), fmt.Sprintf("/w/%d", i), "unix:uid:1"))
		}
		w, wits := newWITWorld(t, entries...)
		updates, stop := w.watchWIT(caller(1, "unix:uid:1"))
		defer stop()
		u := w.next(updates, settleWait)
		for len(u.Identities) < len(entries) {
			u = w.next(updates, settleWait)
		}
		wits.mu.Lock()
		defer wits.mu.Unlock()
		if len(wits.batches) != 2 || wits.batches[0] != maxBatch {
			t.Errorf("they were asked for in batches of %v", wits.batches)
		}
	})
}
