package etcd_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/etcd"
	"github.com/signet-id/signet/test/etcdtest"
)

// nextFails reads the watch until it ends.
func nextFails(t testing.TB, w store.Watcher) error {
	t.Helper()
	ctx := within(t)
	for {
		if _, err := w.Next(ctx); err != nil {
			return err
		}
	}
}

// TestRestored: a state that goes back stops every store that knows better, and when they are opened again the first of them gives
// the history a new name, of which the others hear.
func TestRestored(t *testing.T) {
	for name, flags := range map[string][]string{
		"plain":              nil,
		"revisions go on":    {"--bump-revision", "1000000", "--mark-compacted"},
		"as another cluster": {"--initial-cluster-token", "restored"},
	} {
		t.Run(name, func(t *testing.T) {
			c := etcdtest.Start(t, etcdtest.Config{})
			prefix := prefixOf(t.TempDir())
			of := func(dir string) etcd.Config {
				cfg := config(c, dir).WithHeartbeat(200 * time.Millisecond)
				cfg.Prefix = prefix
				return cfg
			}
			dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
			a, b := opened(t, of(dirs[0])), opened(t, of(dirs[1]))
			absent := opened(t, of(dirs[2])) // saw the state of the snapshot only
			defer a.Close()
			defer b.Close()
			before := a.Epoch()
			if b.Epoch() != before {
				t.Fatalf("two replicas have the epochs %s and %s", before, b.Epoch())
			}
			must(t, a, set("kept", "1"))
			snapshot := c.Snapshot(t)
			if err := absent.Close(); err != nil {
				t.Fatal(err)
			}
			last := must(t, a, set("revoked", "yes"))
			wa, wb := watch(t, a, last), watch(t, b, last)
			if _, err := b.Get(t.Context(), "revoked"); err != nil {
				t.Fatal(err)
			}
			c.Restore(t, snapshot, flags...)

			for _, w := range []store.Watcher{wa, wb} {
				if err := nextFails(t, w); !errors.Is(err, etcd.ErrHistory) {
					t.Errorf("Next after the restore = %v, want ErrHistory", err)
				}
			}
			if _, err := a.Commit(t.Context(), nil, []store.Write{set("x", "1")}); !errors.Is(err, etcd.ErrHistory) {
				t.Errorf("Commit after the restore = %v, want ErrHistory", err)
			}
			if err := a.Health(); !errors.Is(err, etcd.ErrHistory) {
				t.Errorf("Health = %v, want ErrHistory", err)
			}
			if err := errors.Join(a.Close(), b.Close()); err != nil {
				t.Fatal(err)
			}
			// The one that knows nothing better comes first, and later learns the new name.
			absent = opened(t, of(dirs[2]))
			defer absent.Close()
			wc := watch(t, absent, must(t, absent, set("meanwhile", "1")))
			var logged bytes.Buffer
			cfg := of(dirs[0])
			cfg.Log = slog.New(slog.NewTextHandler(&logged, nil))
			a = closed(t, cfg)
			if a.Epoch() == before || !strings.Contains(logged.String(), "etcd was restored") {
				t.Errorf("the epoch is still %s after the restore:\n%s", a.Epoch(), logged.String())
			}
			if err := nextFails(t, wc); !errors.Is(err, etcd.ErrHistory) {
				t.Errorf("Next of the replica that did not know = %v, want ErrHistory", err)
			}
			b = closed(t, of(dirs[1]))
			if b.Epoch() != a.Epoch() {
				t.Errorf("two epochs, %s and %s, after the restore", a.Epoch(), b.Epoch())
			}
			rev := must(t, a, set("x", "1"))
			if it, err := b.Get(t.Context(), "x"); err != nil || it.Modified != rev {
				t.Errorf("Get at the other replica = %v, %v", it, err)
			}
			if _, err := b.Get(t.Context(), "revoked"); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("what was lost is back: %v", err)
			}
		})
	}
}

// TestRestoredWhileAway: nobody ran when etcd was restored, and it has made more revisions since than were seen.
func TestRestoredWhileAway(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	dir := t.TempDir()
	s := opened(t, config(c, dir))
	before := s.Epoch()
	must(t, s, set("a", "1"))
	snapshot := c.Snapshot(t)
	must(t, s, set("b", "1"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c.Restore(t, snapshot)
	other := config(c, t.TempDir())
	other.Prefix = prefixOf(dir)
	o := opened(t, other) // a replica on a new disk, which knows nothing
	for range 5 {
		must(t, o, set("c", "1"))
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	s = closed(t, config(c, dir))
	if s.Epoch() == before {
		t.Error("the epoch is the same, although a commit that was seen is not in the history")
	}
}

func TestReplacedEtcdIsRefused(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	dir := t.TempDir()
	s := opened(t, config(c, dir))
	must(t, s, set("a", "1"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c.Ctl(t, "del", "--prefix", prefixOf(dir))
	if s, err := etcd.Open(t.Context(), config(c, dir)); !errors.Is(err, etcd.ErrHistory) || !strings.Contains(err.Error(), "etcd.json") {
		t.Errorf("Open on an etcd that is empty = %v, %v; want ErrHistory and the way out", s, err)
	}
}

// TestRemovedUnderARunningStore: somebody removes what the history hangs on.
func TestRemovedUnderARunningStore(t *testing.T) {
	for _, key := range []string{"mark", "epoch"} {
		t.Run(key, func(t *testing.T) {
			c := etcdtest.Start(t, etcdtest.Config{})
			dir := t.TempDir()
			s := closed(t, config(c, dir))
			w := watch(t, s, must(t, s, set("a", "1")))
			c.Ctl(t, "del", prefixOf(dir)+key)
			if err := nextFails(t, w); !errors.Is(err, etcd.ErrHistory) {
				t.Errorf("Next = %v, want ErrHistory", err)
			}
			if _, err := s.Commit(t.Context(), nil, []store.Write{set("a", "2")}); !errors.Is(err, etcd.ErrHistory) {
				t.Errorf("Commit = %v, want ErrHistory", err)
			}
		})
	}
}

func TestEndpointsOfTwoClusters(t *testing.T) {
	one, two := etcdtest.Start(t, etcdtest.Config{Flags: []string{"--initial-cluster-token", "one"}}), etcdtest.Start(t, etcdtest.Config{Flags: []string{"--initial-cluster-token", "two"}})
	cfg := config(one, t.TempDir())
	cfg.Endpoints = append(one.Endpoints(), two.Endpoints()...)
	s, err := etcd.Open(t.Context(), cfg)
	if err == nil {
		defer s.Close()
		for range 50 {
			if _, err = s.Get(t.Context(), "a"); errors.Is(err, etcd.ErrHistory) {
				break
			}
		}
	}
	if !errors.Is(err, etcd.ErrHistory) || !strings.Contains(err.Error(), "do all endpoints lead to one cluster?") {
		t.Errorf("two clusters: %v, want ErrHistory and why", err)
	}
}

// TestForeignWriter: what somebody else writes below the prefix never passes for ours, and no event of it is lost.
func TestForeignWriter(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	t.Run("removes", func(t *testing.T) {
		dir := t.TempDir()
		s := closed(t, config(c, dir).WithHeartbeat(100*time.Millisecond))
		w := watch(t, s, must(t, s, set("a", "1"), set("b", "1")))
		c.Ctl(t, "del", s.ItemPrefix()+"a")
		b, err := w.Next(within(t))
		if err != nil || len(b.Events) != 1 || b.Events[0].Key != "a" || !b.Events[0].Deleted {
			t.Errorf("the watch has %v, %v; want the removal", b, err)
		}
		if s.Foreign() != 1 {
			t.Errorf("%d foreign revisions were noticed, want 1", s.Foreign())
		}
		rev := must(t, s, set("b", "2"))
		if b, err := w.Next(within(t)); err != nil || b.Revision != rev {
			t.Errorf("the watch has %v, %v; want revision %d", b, err, rev)
		}
	})
	for name, value := range map[string]string{"text": "hello", "a record of another key": etcd.Seal("k/other", []byte("1")), "nothing": ""} {
		t.Run(name, func(t *testing.T) {
			s := closed(t, config(c, t.TempDir()))
			w := watch(t, s, must(t, s, set("a", "1")))
			c.Ctl(t, "put", s.ItemPrefix()+"a", "--", value)
			if err := nextFails(t, w); !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), `"k/a"`) {
				t.Errorf("Next = %v, want ErrCorrupt and the key", err)
			}
			if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrCorrupt) {
				t.Errorf("Get = %v, want ErrCorrupt", err)
			}
			if _, err := s.List(t.Context(), "", 0, func(store.Item) error { return nil }); !errors.Is(err, store.ErrCorrupt) {
				t.Errorf("List = %v, want ErrCorrupt", err)
			}
		})
	}
}

// TestOthersInEtcd: revisions of somebody else's keys are skipped, and none of ours waits for them.
func TestOthersInEtcd(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	s := closed(t, config(c, t.TempDir()))
	rev := must(t, s, set("a", "1"))
	w := watch(t, s, rev)
	c.Ctl(t, "put", "/registry/pods/x", "1")
	if b, err := s.Barrier(t.Context()); err != nil || b != rev {
		t.Errorf("Barrier = %d, %v; want %d, which our watch will show", b, err, rev)
	}
	next := must(t, s, set("a", "2"))
	if next != rev+2 {
		t.Errorf("revision %d after %d and one of somebody else", next, rev)
	}
	if b, err := w.Next(within(t)); err != nil || b.Revision != next {
		t.Errorf("the watch has %v, %v; want revision %d", b, err, next)
	}
}

// TestCompactionIsShared: of two replicas one at a time removes what was history already when one last did.
func TestCompactionIsShared(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	dir := t.TempDir()
	a, b := closed(t, config(c, dir)), closed(t, config(c, dir))
	turn := func(s *etcd.Store, seen int64) (int64, store.Revision) {
		t.Helper()
		now, upTo, err := s.CompactionTurn(t.Context(), seen)
		if err != nil {
			t.Fatal(err)
		}
		return now, upTo
	}
	first := must(t, a, set("x", "1"))
	seenA, upTo := turn(a, 0)
	if upTo != 0 {
		t.Errorf("the first turn compacts to %d, want not at all", upTo)
	}
	seenB, upTo := turn(b, 0)
	if upTo != 0 {
		t.Errorf("a turn right after another's compacts to %d", upTo)
	}
	must(t, a, set("x", "2"))
	seenA2, upTo := turn(a, seenA)
	if upTo != first {
		t.Errorf("a's second turn compacts to %d, want %d", upTo, first)
	}
	if _, upTo = turn(b, seenB); upTo != 0 {
		t.Errorf("b compacts to %d although a just did", upTo)
	}
	if _, upTo = turn(a, seenA2); upTo != 0 {
		t.Errorf("compacts to %d although nothing was committed since", upTo)
	}
	if err := a.Compact(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if err := b.Compact(t.Context(), first); err != nil {
		t.Errorf("compacting what is compacted = %v, want nil", err)
	}
}

// TestRemovalsThatMayBeNothing: a commit of removals makes a revision exactly if it removes something, whatever others do.
func TestRemovalsThatMayBeNothing(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	s := closed(t, config(c, t.TempDir()))
	rev := must(t, s, set("a", "1"))
	var conflict *store.ConflictError
	if _, err := s.Commit(t.Context(), []store.Check{{Key: "a"}}, []store.Write{del("a")}); !errors.As(err, &conflict) || conflict.Key != "a" {
		t.Errorf("removing a key that must not exist = %v, want a conflict", err)
	}
	if got, err := s.Commit(t.Context(), []store.Check{{Key: "b"}}, []store.Write{del("b"), del("c")}); err != nil || got != rev {
		t.Errorf("removing nothing = %d, %v; want %d", got, err, rev)
	}
	if _, err := s.Commit(t.Context(), []store.Check{{Key: "a", Modified: rev + 1}}, []store.Write{del("b")}); !errors.As(err, &conflict) || conflict.Key != "a" {
		t.Errorf("removing nothing with a check that fails = %v, want a conflict", err)
	}
	var most []store.Check
	for i := range store.MaxChecks {
		most = append(most, store.Check{Key: fmt.Sprintf("none/%d", i)})
	}
	var removals []store.Write
	for i := range store.MaxWrites {
		removals = append(removals, del(fmt.Sprintf("gone/%d", i)))
	}
	if got, err := s.Commit(t.Context(), most, removals); err != nil || got != rev {
		t.Errorf("most checks and removals of nothing = %d, %v; want %d", got, err, rev)
	}
	start, err := s.Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w := watch(t, s, start)
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := map[store.Revision]bool{}
	for range 4 {
		wg.Go(func() {
			for i := range 30 {
				rev, err := s.Commit(t.Context(), nil, []store.Write{del("x"), del("y")})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				made[rev] = true
				mu.Unlock()
				if i%3 == 0 {
					if _, err := s.Commit(t.Context(), nil, []store.Write{set("x", "1")}); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	must(t, s, set("end", "1"))
	for {
		b, err := w.Next(within(t))
		if err != nil {
			t.Fatal(err)
		}
		if b.Events[0].Key == "end" {
			break
		}
		if b.Events[0].Deleted && !made[b.Revision] {
			t.Errorf("a removal at %d that no Commit returned", b.Revision)
		}
	}
}
