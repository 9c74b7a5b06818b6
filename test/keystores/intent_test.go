//go:build cgo

package keystores_test

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/test/keystores"
)

// A fullStore refuses the commits that write an authority, once it is told to.
type fullStore struct {
	store.Store
	mu   sync.Mutex
	full bool
}

func (s *fullStore) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	s.mu.Lock()
	full := s.full
	s.mu.Unlock()
	for _, w := range writes {
		if full && strings.HasPrefix(w.Key, "authority/") {
			return 0, store.ErrDiskFull
		}
	}
	return s.Store.Commit(ctx, checks, writes)
}

func (s *fullStore) fill(full bool) {
	s.mu.Lock()
	s.full = full
	s.mu.Unlock()
}

// replica opens the authorities of a store that others may have open as well.
func replica(t *testing.T, st store.Store, dir, uri string, now func() time.Time) *authority.Set {
	t.Helper()
	seal, err := keys.LoadOrCreateSealKey(filepath.Join(dir, "seal.key"))
	if err != nil {
		t.Fatal(err)
	}
	place, err := keys.ParsePlace(uri)
	if err != nil {
		t.Fatal(err)
	}
	quiet, choice := slog.New(slog.DiscardHandler), keys.Choice{Place: place, Algorithm: keys.ECP256}
	ring := keys.NewRing(keys.RingConfig{TrustDomain: td, X509: choice, JWT: choice, Limits: keys.Limits{Timeout: 5 * time.Second}, Log: quiet})
	t.Cleanup(ring.Close)
	set, err := authority.Open(t.Context(), authority.Config{TrustDomain: td, Store: st, Seal: seal, Keys: ring, Now: now, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	from, err := st.Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	watcher, err := st.Watch(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			batch, err := watcher.Next(context.Background())
			if err != nil {
				return // closed
			}
			if err := set.Observe(batch); err != nil {
				t.Error(err)
			}
		}
	}()
	t.Cleanup(func() { watcher.Close(); <-done })
	return set
}

func newStore(t *testing.T, dir string) *fullStore {
	t.Helper()
	b, err := bolt.Open(bolt.Config{Dir: filepath.Join(dir, "store"), Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return &fullStore{Store: b}
}

// TestTwoReplicasPrepareAtOnce lets two replicas, with two operators at each, prepare an authority at the same moment. One
// authority and one key pair come of it, and the losers are told.
func TestTwoReplicasPrepareAtOnce(t *testing.T) {
	token, dir := keystores.SoftHSM(t), t.TempDir()
	st := newStore(t, dir)
	replicas := []*authority.Set{replica(t, st, dir, token.URI, nil), replica(t, st, dir, token.URI, nil)}
	for round := 1; round <= 5; round++ {
		before := token.Objects(t)
		var wg sync.WaitGroup
		ids := make(chan string, 4)
		for i := range 4 {
			wg.Go(func() {
				step, err := replicas[i%2].Prepare(t.Context(), keys.UseX509)
				switch {
				case err == nil:
					ids <- step.ID
				case !errors.Is(err, authority.ErrKeyBeingMade) && !errors.Is(err, authority.ErrConflict):
					t.Errorf("Prepare = %v, want ErrKeyBeingMade or ErrConflict", err)
				}
			})
		}
		wg.Wait()
		close(ids)
		id := <-ids
		for other := range ids {
			if other != id {
				t.Errorf("round %d: authorities %s and %s were both prepared", round, id, other)
			}
		}
		if id == "" {
			t.Errorf("round %d: nobody won", round)
		}
		if n := token.Objects(t) - before; n != 2 {
			t.Errorf("round %d: %d new objects in the token, want the 2 of one key pair", round, n)
		}
		if _, err := replicas[0].Activate(t.Context(), keys.UseX509, id); err != nil {
			t.Fatal(err)
		}
	}
}

// reserveStore is a store on a full disk: only what uses its reserve is written.
type reserveStore struct{ store.Store }

func (s reserveStore) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	if !store.UsesReserve(ctx) {
		return 0, store.ErrDiskFull
	}
	return s.Store.Commit(ctx, checks, writes)
}

// TestRotationOnAFullDisk: the reserve that carries existing identities on carries the rotation of their authorities, too,
// wherever keys are.
func TestRotationOnAFullDisk(t *testing.T) {
	token, dir := keystores.SoftHSM(t), t.TempDir()
	st := newStore(t, dir)
	replica(t, st, dir, token.URI, nil) // makes the first ones
	set := replica(t, reserveStore{st}, dir, token.URI, nil)
	for _, use := range []keys.Use{keys.UseX509, keys.UseJWT} {
		step, err := set.Prepare(t.Context(), use)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := set.Activate(t.Context(), use, step.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// TestIntentOfAnotherReplica: while one replica is at work on a key the other leaves it alone, and takes it over when the
// first has not been heard of for long.
func TestIntentOfAnotherReplica(t *testing.T) {
	token, dir := keystores.SoftHSM(t), t.TempDir()
	st := newStore(t, dir)
	first := replica(t, st, dir, token.URI, nil)
	st.fill(true)
	if _, err := first.Prepare(t.Context(), keys.UseJWT); !errors.Is(err, store.ErrDiskFull) {
		t.Fatalf("Prepare on a full disk = %v", err)
	}
	st.fill(false)
	second := replica(t, st, dir, token.URI, nil)
	if _, err := second.Prepare(t.Context(), keys.UseJWT); !errors.Is(err, authority.ErrKeyBeingMade) {
		t.Errorf("Prepare at the other replica = %v, want ErrKeyBeingMade", err)
	}
	before := token.Objects(t)
	late := replica(t, st, dir, token.URI, func() time.Time { return time.Now().Add(10 * time.Minute) })
	if _, err := late.Prepare(t.Context(), keys.UseJWT); err != nil {
		t.Errorf("Prepare when the other replica has been silent for long = %v", err)
	}
	if n := token.Objects(t); n != before {
		t.Errorf("%d objects, want the %d that were there: the key that was made is to be used", n, before)
	}
}

// TestIntentForAnotherKeyStore: a key that was made where keys are not made any more is deleted, at once or when its key
// store is back.
func TestIntentForAnotherKeyStore(t *testing.T) {
	for name, away := range map[string]bool{"which is there": false, "which is away": true} {
		t.Run(name, func(t *testing.T) {
			token, dir := keystores.SoftHSM(t), t.TempDir()
			st := newStore(t, dir)
			first := replica(t, st, dir, token.URI, nil)
			before := token.Objects(t)
			st.fill(true)
			if _, err := first.Prepare(t.Context(), keys.UseJWT); !errors.Is(err, store.ErrDiskFull) {
				t.Fatalf("Prepare on a full disk = %v", err)
			}
			st.fill(false)
			if n := token.Objects(t) - before; n != 2 {
				t.Fatalf("%d new objects, want 2", n)
			}
			later := func() time.Time { return time.Now().Add(10 * time.Minute) }
			orphans := func() (n int) {
				if _, err := st.List(t.Context(), "keys/orphan/", 0, func(store.Item) error { n++; return nil }); err != nil {
					t.Fatal(err)
				}
				return n
			}
			elsewhere := keystores.SWTPM(t).URI
			if away {
				lost := token.Hide(t)
				second := replica(t, st, dir, elsewhere, later)
				if _, err := second.Prepare(t.Context(), keys.UseJWT); err != nil {
					t.Fatalf("Prepare elsewhere while the token is away = %v", err)
				}
				if n := orphans(); n != 1 {
					t.Errorf("%d keys are remembered, want 1", n)
				}
				lost()
			}
			third := replica(t, st, dir, elsewhere, later)
			if _, err := third.Prepare(t.Context(), keys.UseJWT); err != nil {
				t.Fatal(err)
			}
			if n := token.Objects(t) - before; n != 0 {
				t.Errorf("away %t: %d objects are left in the token", away, n)
			}
			if n := orphans(); n != 0 {
				t.Errorf("away %t: %d keys are still remembered", away, n)
			}
		})
	}
}
