package rotation

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
)

// ill is a store that takes nothing while it is ill, and counts who tries.
type ill struct {
	store.Store
	ill   atomic.Bool
	tries atomic.Int64
}

func (s *ill) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	if s.ill.Load() {
		s.tries.Add(1)
		return 0, errors.New("the store is ill")
	}
	return s.Store.Commit(ctx, checks, writes)
}

// TestScheduleBacksOff: a step that fails for hours is tried less and less often, though not much later than it can succeed.
func TestScheduleBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		db, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		st := &ill{Store: db}
		seal, err := keys.CreateSealKey(filepath.Join(dir, "seal.key"))
		if err != nil {
			t.Fatal(err)
		}
		td := spiffeid.RequireTrustDomainFromString("example.org")
		set, err := authority.Open(t.Context(), authority.Config{TrustDomain: td, Store: st, Seal: seal, X509Lifetime: 30 * 24 * time.Hour, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		audit, err := auditlog.Open(auditlog.Config{Dir: filepath.Join(dir, "audit"), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer audit.Close()
		r := New(Config{TrustDomain: td, Set: set, Audit: audit, Automatic: true, Federated: func() bool { return false }, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
		time.Sleep(25 * 24 * time.Hour)
		st.ill.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.follow(ctx) }()
		time.Sleep(time.Hour)
		if n := st.tries.Load(); n < 50 || n > 150 {
			t.Errorf("%d attempts in an hour, want about one a minute", n)
		}
		before := st.tries.Load()
		for range 3600 { // whatever happens meanwhile
			r.BundleChanged()
			time.Sleep(time.Second)
		}
		if n := st.tries.Load() - before; n > 150 {
			t.Errorf("%d attempts in an hour of changes, want about one a minute", n)
		}
		st.ill.Store(false)
		time.Sleep(retryMax + 10*time.Second)
		cancel()
		<-done
		generations := map[uint64]bool{}
		if err := reread(t, set, db); err != nil {
			t.Fatal(err)
		}
		for _, a := range set.Authorities(authority.KindX509) {
			generations[a.Generation] = true
		}
		if !generations[2] {
			t.Error("no authority was prepared once the store was well")
		}
	})
}

// reread shows the Set all that is in the store.
func reread(t *testing.T, set *authority.Set, st store.Store) error {
	t.Helper()
	var items []store.Item
	if _, err := st.List(t.Context(), "authority/", 0, func(i store.Item) error { items = append(items, i); return nil }); err != nil {
		return err
	}
	return set.Load(items)
}
