package svidcache

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/workloadapi"
)

func (w *world) jwt(uid uint32, audience ...string) string {
	w.t.Helper()
	svids, err := w.cache.FetchJWTSVIDs(w.ctx, caller(uid, "unix:uid:1"), spiffeid.ID{}, audience)
	if err != nil || len(svids) != 1 {
		w.t.Fatalf("FetchJWTSVIDs(%q) = %d SVIDs, %v", audience, len(svids), err)
	}
	return svids[0].Token
}

func jwtCount(ca *testCA) int { return ca.jwts }

func TestJWTCacheKeepsWhatIsTheSame(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		first := w.jwt(1, "x", "y")
		if again := w.jwt(1, "x", "y"); again != first {
			t.Error("the second fetch did not come from the cache")
		}
		for what, other := range map[string]string{"another order": w.jwt(1, "y", "x"), "another uid": w.jwt(2, "x", "y"), "joined audiences": w.jwt(1, "x 1:y")} {
			if other == first {
				t.Errorf("%s: got the same token", what)
			}
		}
	})
}

func TestJWTRefreshedBehindAfterHalfLife(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		first := w.jwt(1, "x")
		time.Sleep(2 * time.Minute)
		if w.jwt(1, "x") != first {
			t.Error("before half life the token is another")
		}
		time.Sleep(time.Minute)
		w.ca.mu.Lock()
		w.ca.gate = make(chan struct{})
		gate := w.ca.gate
		w.ca.mu.Unlock()
		if w.jwt(1, "x") != first {
			t.Error("after half life the valid token is not served at once")
		}
		close(gate)
		synctest.Wait()
		second := w.jwt(1, "x")
		if second == first {
			t.Error("the token was not refreshed behind")
		}
		if n := w.ca.count(jwtCount); n != 2 {
			t.Errorf("%d tokens were issued, want 2", n)
		}
		time.Sleep(10 * time.Minute)
		if third := w.jwt(1, "x"); third == second {
			t.Error("an expired token was served")
		}
	})
}

func TestJWTValidOneSurvivesAnAbsentCA(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		first := w.jwt(1, "x")
		w.ca.mu.Lock()
		w.ca.failJWT = errors.New("away")
		w.ca.mu.Unlock()
		time.Sleep(4 * time.Minute)
		if w.jwt(1, "x") != first {
			t.Error("a valid token was not served while the CA is away")
		}
		_, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"new"})
		if !errors.Is(err, workloadapi.ErrUnavailable) {
			t.Errorf("a miss while the CA is away: %v, want ErrUnavailable", err)
		}
	})
}

func TestJWTDroppedOnEntryChangeAndTaint(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		first := w.jwt(1, "x")
		changed := anEntry("1", "/a", "unix:uid:1")
		changed.Revision = 5
		w.change(&nodev1.FollowResponse{Entries: []*nodev1.Entry{changed}})
		second := w.jwt(1, "x")
		if second == first {
			t.Error("the token outlived the change of its entry")
		}
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(3, []string{"k1!", "k2"}, w.ca.active)}})
		w.ca.mu.Lock()
		w.ca.kid = "k2"
		w.ca.mu.Unlock()
		third := w.jwt(1, "x")
		if third == second {
			t.Error("the token outlived the taint of its key")
		}
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{w.ca.bundle(4, []string{"k3"}, w.ca.active)}})
		if w.jwt(1, "x") == third {
			t.Error("the token outlived its key in the bundle")
		}
		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"1"}})
		if _, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"}); !errors.Is(err, workloadapi.ErrNoIdentity) {
			t.Errorf("after the entry's removal: %v, want ErrNoIdentity", err)
		}
		if n := w.cache.Stats().JWTSVIDs; n != 0 {
			t.Errorf("%d tokens are kept after the entry's removal", n)
		}
	})
}

func TestJWTWithJTIIsNeverCached(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		e := anEntry("1", "/a", "unix:uid:1")
		e.JwtIncludeJti = true
		w.start(e)
		if first := w.jwt(1, "x"); w.jwt(1, "x") == first {
			t.Error("a token with a jti was handed out twice")
		}
		if n := w.cache.Stats().JWTSVIDs; n != 0 {
			t.Errorf("%d tokens with a jti are kept", n)
		}
	})
}

func TestJWTMissesAreCoalescedAndLimited(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		w.ca.gate = make(chan struct{})
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() { w.jwt(1, "x") })
		}
		synctest.Wait()
		close(w.ca.gate)
		group.Wait()
		if n := w.ca.count(jwtCount); n != 1 {
			t.Errorf("50 callers at once made %d requests, want 1", n)
		}

		var refused, granted atomic.Int64
		began := time.Now()
		for i := range missBurst * 3 {
			group.Go(func() {
				_, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{fmt.Sprint(i)})
				switch {
				case err == nil:
					granted.Add(1)
				case errors.Is(err, workloadapi.ErrTooMany) && !errors.Is(err, workloadapi.ErrUnavailable):
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		w.jwt(2, "x") // another uid waits for nothing
		if waited := time.Since(began); waited != 0 {
			t.Errorf("another uid waited %s", waited)
		}
		group.Wait()
		if most := int64(missBurst + missesPerSecond*2); refused.Load() == 0 || granted.Load() > most || granted.Load() < missBurst {
			t.Errorf("of a flood %d requests were granted and %d refused; want %d to %d granted", granted.Load(), refused.Load(), missBurst, most)
		}
		if waited := time.Since(began); waited > maxMissWait {
			t.Errorf("a caller waited %s, at most %s is allowed", waited, maxMissWait)
		}
		w.jwt(2, "x") // another uid is not affected
		if n := w.cache.Stats().JWTSVIDs; n > maxTokensPerCaller+1 {
			t.Errorf("%d tokens are kept for two callers, at most %d for one", n, maxTokensPerCaller)
		}
	})
}

// manyEntries gives uid 1 n identities.
func manyEntries(n int) []*nodev1.Entry {
	entries := make([]*nodev1.Entry, n)
	for i := range entries {
		entries[i] = anEntry(fmt.Sprint(i), fmt.Sprintf("/n%d", i), "unix:uid:1")
	}
	return entries
}

func TestJWTCallerOfManyIdentitiesWaitsForItsTurn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(manyEntries(60)...)
		began := time.Now()
		const audiences = 30
		for i := range audiences {
			svids, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{fmt.Sprint(i)})
			if err != nil || len(svids) != 60 {
				t.Fatalf("audience %d: %d SVIDs, %v", i, len(svids), err)
			}
			for n, svid := range svids {
				if svid.Token == "" || svid.ID.IsZero() {
					t.Fatalf("audience %d: SVID %d is %v", i, n, svid.ID)
				}
			}
		}
		if waited, least := time.Since(began), time.Duration(60*audiences-missBurst)*time.Second/missesPerSecond; waited < least {
			t.Errorf("%d tokens took %s, which is faster than the %s of the limit", 60*audiences, waited, least)
		}
		// A caller with less time than its turn needs hears of its own deadline.
		for range missBurst {
			w.cache.jwts.caller(1).limit.Allow()
		}
		ctx, cancel := context.WithTimeout(w.ctx, 100*time.Millisecond)
		defer cancel()
		if _, err := w.cache.FetchJWTSVIDs(ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"hurried"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a caller in a hurry: %v, want its own deadline", err)
		}
	})
}

func TestJWTEqualErrorsAreToldOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(manyEntries(60)...)
		w.ca.failJWT = errors.New("gone fishing")
		_, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"})
		if !errors.Is(err, workloadapi.ErrUnavailable) || strings.Count(err.Error(), "gone fishing") != 1 {
			t.Errorf("60 equal errors are told as %q", err)
		}
		var errs []error
		for i := range 3 * maxJoined {
			errs = append(errs, fmt.Errorf("error %d", i))
		}
		if got := joinDistinct(errs).Error(); strings.Count(got, "error ") != maxJoined || !strings.Contains(got, "8 further") {
			t.Errorf("%d different errors are told as %q", len(errs), got)
		}
	})
}

func TestJWTSilentCADoesNotLetOneUserTakeAllPlaces(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(manyEntries(1)...)
		gate := make(chan struct{})
		w.ca.gate = gate
		ctx, cancel := context.WithCancel(w.ctx)
		var group sync.WaitGroup
		var refused atomic.Int64
		for i := range maxCallsPerUID + 50 {
			group.Go(func() {
				_, err := w.cache.FetchJWTSVIDs(ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{fmt.Sprint(i)})
				if errors.Is(err, workloadapi.ErrTooMany) {
					refused.Add(1)
				}
			})
		}
		time.Sleep(maxMissWait + time.Second)
		if n := refused.Load(); n != 50 {
			t.Errorf("%d requests beyond the %d of one uid were refused, want 50", n, maxCallsPerUID)
		}
		second := make(chan string, 1)
		go func() { second <- w.jwt(2, "x") }()
		synctest.Wait()
		close(gate)
		if <-second == "" {
			t.Error("another uid got nothing")
		}
		cancel()
		group.Wait()
		synctest.Wait()
		if n := len(w.cache.jwts.slots); n != 0 {
			t.Errorf("%d places are still taken", n)
		}
	})
}

func TestJWTTotalIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		now := time.Now()
		w.cache.jwts.mu.Lock()
		for uid := range uint32(2 * maxTokens / maxTokensPerCaller) {
			for i := range maxTokensPerCaller {
				w.cache.jwts.put(uid, &token{key: fmt.Sprint(i), entryID: "1", revision: 1, keyID: "k1", issued: now, end: now.Add(time.Hour)})
			}
		}
		w.cache.jwts.mu.Unlock()
		if n := w.cache.Stats().JWTSVIDs; n > maxTokens {
			t.Errorf("%d tokens are kept, at most %d may be", n, maxTokens)
		}
	})
}

func TestJWTCallerThatGoesDoesNotEndTheRequest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		gate := make(chan struct{})
		w.ca.gate = gate
		ctx, cancel := context.WithCancel(w.ctx)
		first := make(chan error, 1)
		go func() {
			_, err := w.cache.FetchJWTSVIDs(ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"})
			first <- err
		}()
		synctest.Wait()
		second := make(chan string, 1)
		go func() { second <- w.jwt(1, "x") }()
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the caller that went got %v", err)
		}
		close(gate)
		if <-second == "" {
			t.Error("the caller that stayed got nothing")
		}
	})
}

func TestWAPI_44_RequestedIDMustBeTheCallers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"), anEntry("3", "/c", "unix:uid:3"))
		fetch := func(path string) ([]workloadapi.JWTSVID, error) {
			return w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.RequireFromString("spiffe://example.org"+path), []string{"x"})
		}
		if svids, err := fetch("/b"); err != nil || len(svids) != 1 || svids[0].ID.Path() != "/b" {
			t.Errorf("own ID: %d SVIDs, %v", len(svids), err)
		}
		for _, path := range []string{"/c", "/nowhere"} {
			if _, err := fetch(path); !errors.Is(err, workloadapi.ErrNoIdentity) {
				t.Errorf("%s: %v, want ErrNoIdentity", path, err)
			}
		}
		all, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"})
		if err != nil || len(all) != 2 {
			t.Errorf("WAPI-43: %d SVIDs, %v; want both", len(all), err)
		}
	})
}

func FuzzKeyIDOf(f *testing.F) {
	f.Add("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIn0.e30.c2ln")
	f.Add("..")
	f.Fuzz(func(t *testing.T, s string) {
		if id := keyIDOf(s); len(id) > maxTokenHeaderBytes {
			t.Errorf("a key id of %d bytes came from a header of at most %d", len(id), maxTokenHeaderBytes)
		}
	})
}
