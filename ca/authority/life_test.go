package authority

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// feed shows the Set every commit of its store until the test ends, as the CA does.
func feed(t testing.TB, s *Set) {
	t.Helper()
	revision, err := s.config.Store.Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.config.Store.Watch(t.Context(), revision)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			b, err := w.Next(ctx)
			if err != nil {
				return
			}
			if err := s.Observe(b); err != nil && !errors.Is(err, ErrStopped) {
				t.Error(err)
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done; w.Close() })
}

// living opens a Set that follows its store.
func living(t testing.TB, change ...func(*Config)) *Set {
	t.Helper()
	s := openSet(t, change...)
	feed(t, s)
	return s
}

func stateNames(s *Set, kind Kind) string {
	var out []string
	for _, a := range s.Authorities(kind) {
		out = append(out, string(a.State))
	}
	return strings.Join(out, " ")
}

// must fails the test unless the step was made.
func must(t testing.TB) func(Step, error) Step {
	return func(st Step, err error) Step {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
}

func TestLifeOfAnAuthority(t *testing.T) {
	for _, kind := range []Kind{KindX509, KindJWT} {
		t.Run(string(kind), func(t *testing.T) {
			now := newClock(testNow)
			s := living(t, func(c *Config) { c.Now = now.now })
			first := s.Authorities(kind)[0]
			check := func(want string) {
				t.Helper()
				if got := stateNames(s, kind); got != want {
					t.Fatalf("states %q, want %q", got, want)
				}
			}
			prepared := must(t)(s.Prepare(t.Context(), kind))
			check("active prepared")
			if !prepared.Changed || prepared.State != StatePrepared || !prepared.PreparedAt.Equal(testNow.Truncate(time.Second)) {
				t.Errorf("prepared %+v", prepared)
			}
			if again := must(t)(s.Prepare(t.Context(), kind)); again.Changed || again.ID != prepared.ID {
				t.Errorf("preparing twice made %s and %s", prepared.ID, again.ID)
			}
			now.set(testNow.Add(time.Hour))
			active := must(t)(s.Activate(t.Context(), kind, prepared.ID))
			check("old active")
			if active.ID != prepared.ID || !active.Changed || !active.ActivatedAt.Equal(testNow.Add(time.Hour).Truncate(time.Second)) {
				t.Errorf("activated %+v", active)
			}
			longest := s.LongestTTL(kind)
			if old := s.Authorities(kind)[0]; !old.SignedUntil.Equal(old.DeactivatedAt.Add(longest + signedSlack)) {
				t.Errorf("what the old one signed is good until %v, deactivated %v", old.SignedUntil, old.DeactivatedAt)
			}
			if again := must(t)(s.Activate(t.Context(), kind, prepared.ID)); again.Changed {
				t.Error("activating the active one changed something")
			}
			must(t)(s.Taint(t.Context(), kind, first.ID))
			check("tainted active")
			if again := must(t)(s.Taint(t.Context(), kind, first.ID)); again.Changed {
				t.Error("tainting the tainted one changed something")
			}
			must(t)(s.Revoke(t.Context(), kind, first.ID))
			check("revoked active")
			if again := must(t)(s.Revoke(t.Context(), kind, first.ID)); again.Changed {
				t.Error("revoking the revoked one changed something")
			}
			if err := s.Health(); err != nil {
				t.Error(err)
			}
			// A revoked key is of use to a thief only.
			for key, item := range records(t, s.config.Store) {
				if strings.HasSuffix(key, "/"+first.ID) && strings.Contains(string(item.Value), `"sealed"`) {
					t.Error("the sealed key of a revoked authority is still in the store")
				}
			}
			// Another replica, or the next start, sees the same.
			again, err := Open(t.Context(), s.config)
			if err != nil {
				t.Fatal(err)
			}
			if got := stateNames(again, kind); got != "revoked active" {
				t.Errorf("after a restart: %q", got)
			}
		})
	}
}

// TestStepsOutOfOrder: only prepared authorities are activated, only old ones tainted, only tainted ones revoked.
func TestStepsOutOfOrder(t *testing.T) {
	for _, kind := range []Kind{KindX509, KindJWT} {
		s := living(t)
		first := s.Authorities(kind)[0].ID
		if _, err := s.Activate(t.Context(), kind, ""); !errors.Is(err, ErrUnknownAuthority) {
			t.Errorf("%s: activating with nothing prepared: %v", kind, err)
		}
		prepared := must(t)(s.Prepare(t.Context(), kind)).ID
		wrong := func(what string, _ Step, err error) {
			t.Helper()
			if state := (*StateError)(nil); !errors.As(err, &state) {
				t.Errorf("%s: %s: %v, want a StateError", kind, what, err)
			}
		}
		call := func(what string, f func(context.Context, Kind, string) (Step, error), id string) {
			t.Helper()
			st, err := f(t.Context(), kind, id)
			wrong(what, st, err)
		}
		call("taint the active one", s.Taint, first)
		call("revoke the active one", s.Revoke, first)
		call("retire the active one", s.Retire, first)
		call("taint the prepared one", s.Taint, prepared)
		call("revoke the prepared one", s.Revoke, prepared)
		call("retire the prepared one", s.Retire, prepared)
		must(t)(s.Activate(t.Context(), kind, prepared))
		call("revoke an old one", s.Revoke, first)
		call("activate an old one", s.Activate, first)
		call("retire what is still good", s.Retire, first)
		for _, f := range []func(context.Context, Kind, string) (Step, error){s.Activate, s.Taint, s.Revoke, s.Retire} {
			if _, err := f(t.Context(), kind, "nobody"); !errors.Is(err, ErrUnknownAuthority) {
				t.Errorf("%s: unknown id: %v", kind, err)
			}
		}
		if _, err := s.Prepare(t.Context(), "wit"); err == nil {
			t.Error("an authority of an unknown kind was prepared")
		}
	}
}

// TestOldAuthorityRetiresOnlyWhenNothingOfItIsValid: FED-05, JWT-32.
func TestOldAuthorityRetiresOnlyWhenNothingOfItIsValid(t *testing.T) {
	now := newClock(testNow)
	s := living(t, func(c *Config) { c.Now = now.now })
	first := s.Authorities(KindX509)[0].ID
	must(t)(s.Activate(t.Context(), KindX509, must(t)(s.Prepare(t.Context(), KindX509)).ID))
	end := s.Authorities(KindX509)[0].SignedUntil
	now.set(end.Add(-time.Second))
	if _, err := s.Retire(t.Context(), KindX509, first); err == nil {
		t.Error("it was retired while an SVID of it can be valid")
	}
	now.set(end)
	must(t)(s.Retire(t.Context(), KindX509, first))
	if got := stateNames(s, KindX509); got != "revoked active" {
		t.Error(got)
	}
}

// TestActivationNeverSignsBeforeItsTime: a clock that was ahead when an authority was prepared and is right again leaves
// one that is not valid yet.
func TestActivationNeverSignsBeforeItsTime(t *testing.T) {
	for _, kind := range []Kind{KindX509, KindJWT} {
		now := newClock(testNow.Add(48 * time.Hour))
		s := living(t, func(c *Config) { c.Now = now.now })
		now.set(testNow.Add(96 * time.Hour))
		prepared := must(t)(s.Prepare(t.Context(), kind))
		now.set(testNow.Add(49 * time.Hour))
		if _, err := s.Activate(t.Context(), kind, prepared.ID); !errors.Is(err, ErrNotYet) {
			t.Errorf("%s: activated before its begin: %v", kind, err)
		}
		now.set(testNow) // before the begin of the active one
		if err := s.Health(); !errors.Is(err, ErrExpired) {
			t.Errorf("%s: signs with an authority of the future: %v", kind, err)
		}
	}
}

// TestStoppedSetKeepsNobodyWaiting: whoever waits for a change when the records go bad is told, not kept for ever.
func TestStoppedSetKeepsNobodyWaiting(t *testing.T) {
	s := openSet(t) // follows nothing, so that it never has what is waited for
	done := make(chan error, 1)
	go func() {
		_, err := s.Prepare(context.Background(), KindX509)
		done <- err
	}()
	for { // until the change is written
		items, err := s.list(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(items) == 4 {
			break
		}
	}
	s.stop(errors.New("tampered with"))
	if err := <-done; !errors.Is(err, ErrStopped) {
		t.Errorf("Prepare = %v, want ErrStopped", err)
	}
}

// TestTwoOperatorsAtOnce: of changes at the same moment one wins, and the others are told.
func TestTwoOperatorsAtOnce(t *testing.T) {
	a := living(t)
	b, err := Open(t.Context(), a.config) // another replica on the same store
	if err != nil {
		t.Fatal(err)
	}
	feed(t, b)
	for round := range 8 {
		steps := []struct {
			name string
			do   func(s *Set) (Step, error)
		}{
			{"prepare", func(s *Set) (Step, error) { return s.Prepare(t.Context(), KindX509) }},
			{"activate", func(s *Set) (Step, error) { return s.Activate(t.Context(), KindX509, "") }},
		}
		for _, step := range steps {
			var wg sync.WaitGroup
			results := make([]error, 4)
			changed := make([]bool, 4)
			for i, s := range []*Set{a, b, a, b} {
				wg.Go(func() {
					var st Step
					st, results[i] = step.do(s)
					changed[i] = st.Changed
				})
			}
			wg.Wait()
			winners := 0
			for i, err := range results {
				switch {
				case err == nil && changed[i]:
					winners++
				case err == nil, errors.Is(err, ErrConflict), errors.Is(err, ErrUnknownAuthority): // told that it came too late
				default:
					t.Errorf("round %d: %s: %v", round, step.name, err)
				}
			}
			if winners != 1 {
				t.Fatalf("round %d: %d operators did %s at once and all were told that they did it", round, winners, step.name)
			}
		}
		if err := b.WaitFor(t.Context(), a.current.Load().revision); err != nil {
			t.Fatal(err)
		}
		if err := a.WaitFor(t.Context(), b.current.Load().revision); err != nil {
			t.Fatal(err)
		}
		as, bs := a.Authorities(KindX509), b.Authorities(KindX509)
		if !slices.EqualFunc(as, bs, func(x, y Authority) bool { return x.ID == y.ID && x.State == y.State }) || len(as) != round+2 {
			t.Fatalf("round %d: the replicas have %d and %d authorities", round, len(as), len(bs))
		}
		last := as[len(as)-2]
		must(t)(a.Taint(t.Context(), KindX509, last.ID))
		must(t)(a.Revoke(t.Context(), KindX509, last.ID))
	}
}

// TestStolenActiveAuthority: in one commit another one takes over and the stolen one is gone.
func TestStolenActiveAuthority(t *testing.T) {
	for _, kind := range []Kind{KindX509, KindJWT} {
		for _, to := range []State{StateTainted, StateRevoked} {
			for _, preparedBefore := range []bool{false, true} {
				s := living(t)
				if preparedBefore {
					must(t)(s.Prepare(t.Context(), kind))
				}
				first := s.Authorities(kind)[0].ID
				before, err := s.config.Store.Barrier(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				st := must(t)(s.Stolen(t.Context(), kind, first, to))
				if st.ID != first || st.State != to || !st.Changed {
					t.Errorf("%s: %+v", kind, st)
				}
				if got := stateNames(s, kind); got != string(to)+" active" {
					t.Errorf("%s, prepared before %t: %q", kind, preparedBefore, got)
				}
				if err := s.Health(); err != nil {
					t.Errorf("%s: nothing is issued after it: %v", kind, err)
				}
				if after, err := s.config.Store.Barrier(t.Context()); err != nil || after != before+1 {
					t.Errorf("%s: %d commits, want 1 (%v)", kind, after-before, err)
				}
				if again := must(t)(s.Stolen(t.Context(), kind, first, to)); again.Changed {
					t.Errorf("%s: a second time changed something", kind)
				}
			}
		}
	}
	s := living(t)
	prepared := must(t)(s.Prepare(t.Context(), KindX509)).ID
	must(t)(s.Stolen(t.Context(), KindX509, prepared, StateRevoked))
	if got := stateNames(s, KindX509); got != "active revoked" {
		t.Errorf("a stolen prepared one: %q", got)
	}
	if _, err := s.Stolen(t.Context(), KindX509, "nobody", StateRevoked); !errors.Is(err, ErrUnknownAuthority) {
		t.Errorf("unknown id: %v", err)
	}
	if _, err := s.Stolen(t.Context(), KindX509, prepared, StateActive); err == nil {
		t.Error("a stolen one may not become active")
	}
}

// TestRevokedRecordsAreSwept: many rotations neither fill the store nor the bundle.
func TestRevokedRecordsAreSwept(t *testing.T) {
	s := living(t)
	for range keptRevoked + 16 {
		was := s.Authorities(KindJWT)
		must(t)(s.Activate(t.Context(), KindJWT, must(t)(s.Prepare(t.Context(), KindJWT)).ID))
		must(t)(s.Taint(t.Context(), KindJWT, was[len(was)-1].ID))
		must(t)(s.Revoke(t.Context(), KindJWT, was[len(was)-1].ID))
	}
	if n := len(s.Authorities(KindJWT)); n > keptRevoked+2 {
		t.Errorf("%d records after %d rotations", n, keptRevoked+16)
	}
	if n := len(s.Bundle().JWT); n != 1 {
		t.Errorf("%d keys in the bundle", n)
	}
}

func TestBundleHasABound(t *testing.T) {
	s := living(t)
	for range maxPublished - 1 {
		must(t)(s.Activate(t.Context(), KindX509, must(t)(s.Prepare(t.Context(), KindX509)).ID))
	}
	if _, err := s.Prepare(t.Context(), KindX509); !errors.Is(err, ErrTooMany) {
		t.Errorf("one too many: %v", err)
	}
	if _, err := s.Prepare(t.Context(), KindJWT); err != nil {
		t.Errorf("the other kind: %v", err)
	}
}

// TestIntroductionLeadsBack: who holds only the authority from before a rotation, or from before two, verifies what the CA
// presents.
func TestIntroductionLeadsBack(t *testing.T) {
	s := living(t)
	var before []*x509.Certificate
	for range 3 {
		before = append(before, s.Bundle().X509[len(s.Bundle().X509)-1].Certificate)
		must(t)(s.Activate(t.Context(), KindX509, must(t)(s.Prepare(t.Context(), KindX509)).ID))
	}
	p, err := s.CheckX509(X509Request{ID: mustID(t, "/spire/server"), PublicKey: newPublicKey(t), Reserved: true})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := s.SignX509(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(root *x509.Certificate) error {
		var chain []*x509.Certificate
		for _, der := range append([][]byte{svid.Chain[0]}, s.Introduction()...) {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			chain = append(chain, c)
		}
		_, _, err := spiffe.VerifyX509SVID(chain, x509bundle.FromX509Authorities(testTD, []*x509.Certificate{root}), spiffe.X509Options{Now: testNow})
		return err
	}
	for i, root := range before {
		if err := verify(root); err != nil {
			t.Errorf("with the root of %d rotations ago: %v", len(before)-i, err)
		}
	}
	if err := verify(openSet(t).Bundle().X509[0].Certificate); err == nil {
		t.Error("a stranger's root verifies it")
	}
	must(t)(s.Stolen(t.Context(), KindX509, hexID(before[2]), StateRevoked))
	if err := verify(before[0]); err == nil {
		t.Error("a revoked authority still leads to those before it")
	}
	if err := verify(before[2]); err != nil {
		t.Errorf("a node that was away during the revocation cannot come back: %v", err)
	}
	for _, der := range s.Introduction() {
		if slices.Equal(der, before[2].Raw) {
			t.Error("a revoked authority is presented")
		}
	}
}

func hexID(c *x509.Certificate) string {
	return hex.EncodeToString(c.SubjectKeyId)
}

// TestStepIsRefusedWhenStopped: a Set that does not trust its store any more changes nothing in it.
func TestStepIsRefusedWhenStopped(t *testing.T) {
	s := living(t)
	item, err := s.config.Store.Get(t.Context(), keyJWTPrefix+s.Authorities(KindJWT)[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.config.Store.Commit(t.Context(), nil, []store.Write{{Key: item.Key, Delete: true}}); err != nil {
		t.Fatal(err)
	}
	for s.stopped.Load() == nil {
		select {
		case <-t.Context().Done():
			t.Fatal("it never stopped")
		case <-time.After(time.Millisecond):
		}
	}
	if _, err := s.Prepare(t.Context(), KindX509); !errors.Is(err, ErrStopped) {
		t.Errorf("Prepare: %v", err)
	}
}
