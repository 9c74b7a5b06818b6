package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/etcd"
	"github.com/signet-id/signet/test/etcdtest"
)

func set(key, value string) store.Write { return store.Write{Key: key, Value: []byte(value)} }
func del(key string) store.Write        { return store.Write{Key: key, Delete: true} }

func must(t testing.TB, s store.Store, writes ...store.Write) store.Revision {
	t.Helper()
	rev, err := s.Commit(t.Context(), nil, writes)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

// within is a bound for what happens in its own time, generous since the machine may be busy.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// commits tries until one succeeds.
func commits(t testing.TB, s store.Store, writes ...store.Write) store.Revision {
	t.Helper()
	ctx := within(t)
	for {
		rev, err := s.Commit(ctx, nil, writes)
		if err == nil {
			return rev
		}
		if !errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("Commit = %v", err)
		}
	}
}

// sees reads the watch until key has the value.
func sees(t testing.TB, w store.Watcher, key, value string) {
	t.Helper()
	ctx := within(t)
	for {
		b, err := w.Next(ctx)
		if err != nil {
			t.Fatalf("Next = %v, while waiting for %s=%s", err, key, value)
		}
		for _, e := range b.Events {
			if e.Key == key && string(e.Value) == value {
				return
			}
		}
	}
}

func watch(t testing.TB, s store.Store, from store.Revision) store.Watcher {
	t.Helper()
	w, err := s.Watch(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

func TestMembersLost(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	cfg := config(c, t.TempDir()).WithHeartbeat(200 * time.Millisecond)
	cfg.Timeout = time.Second
	s := closed(t, cfg)
	w := watch(t, s, must(t, s, set("a", "start")))

	c.Members[0].Kill()
	commits(t, s, set("a", "one down"))
	sees(t, w, "a", "one down")

	c.Members[1].Kill()
	if _, err := s.Commit(t.Context(), nil, []store.Write{set("a", "no quorum")}); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Commit without a quorum = %v, want ErrUnavailable", err)
	}
	if _, err := s.Barrier(t.Context()); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Barrier without a quorum = %v, want ErrUnavailable", err)
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Get without a quorum = %v, want ErrUnavailable: the key may have another value by now", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.Commit(ctx, nil, []store.Write{set("a", "late")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Commit with an own deadline = %v, want DeadlineExceeded", err)
	}
	c.Members[2].Kill()
	s.AskMembers(t.Context())
	if err := s.Health(); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Health with all members down = %v, want ErrUnavailable", err)
	}

	for _, m := range c.Members {
		m.Start(t)
	}
	commits(t, s, set("a", "back"))
	sees(t, w, "a", "back")
	for ctx := within(t); s.Health() != nil; {
		if ctx.Err() != nil {
			t.Fatalf("Health = %v although all members are back", s.Health())
		}
		s.AskMembers(ctx)
	}
}

// TestMemberThatHangs stops each member in turn: neither the watch nor the commits of a client may hang with it.
func TestMemberThatHangs(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	cfg := config(c, t.TempDir()).WithHeartbeat(200 * time.Millisecond)
	cfg.Timeout = time.Second
	s, other := closed(t, cfg), closed(t, config(c, t.TempDir()))
	other.Close() // only so that two clients were there
	w := watch(t, s, must(t, s, set("a", "start")))
	for i, m := range c.Members {
		m.Pause()
		value := fmt.Sprintf("%d hangs", i)
		commits(t, s, set("a", value))
		sees(t, w, "a", value)
		m.Resume()
		m.WaitHealthy(t)
		for ctx := within(t); ; {
			s.AskMembers(ctx)
			if len(s.Down()) == 0 {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("still down: %v", s.Down())
			}
		}
	}
}

// TestAmbiguousCommit: what was not answered may take effect when the member wakes up, once, and a check of the caller's keeps it
// from undoing what was committed meanwhile.
func TestAmbiguousCommit(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	s := closed(t, config(c, t.TempDir()))
	first := must(t, s, set("a", "1"))
	c.Members[0].Pause()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Commit(ctx, []store.Check{{Key: "a", Modified: first}}, []store.Write{set("a", "2")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Commit at a member that hangs = %v", err)
	}
	c.Members[0].Resume()
	it, err := s.Get(within(t), "a")
	if err != nil {
		t.Fatal(err)
	}
	rev, err := s.Commit(t.Context(), []store.Check{{Key: "a", Modified: it.Modified}}, []store.Write{set("a", "3")})
	var conflict *store.ConflictError
	if errors.As(err, &conflict) { // it took effect between the two
		if it, err = s.Get(t.Context(), "a"); err != nil || string(it.Value) != "2" {
			t.Fatalf("Get = %q, %v, want 2", it.Value, err)
		}
		rev, err = s.Commit(t.Context(), []store.Check{{Key: "a", Modified: it.Modified}}, []store.Write{set("a", "3")})
	}
	if err != nil {
		t.Fatal(err)
	}
	if it, err := s.Get(t.Context(), "a"); err != nil || string(it.Value) != "3" || it.Modified != rev {
		t.Errorf("Get = %v, %v; want 3 of %d", it, err, rev)
	}
}

// TestCrashesUnderLoad kills and stops members at random moments under writers and followers of three clients: nothing that was
// acknowledged is lost or made twice, and no follower misses or sees in part what was committed.
func TestCrashesUnderLoad(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	dir := t.TempDir()
	cfg := config(c, dir).WithHeartbeat(200 * time.Millisecond)
	cfg.Timeout = 2 * time.Second
	var stores []*etcd.Store
	for range 3 {
		cfg.Dir = t.TempDir()
		stores = append(stores, closed(t, cfg))
	}
	start, err := stores[0].Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var writers, followers sync.WaitGroup
	var mu sync.Mutex
	acked := map[store.Revision]string{}
	for i, s := range stores {
		for j := range 3 {
			writers.Go(func() {
				key := fmt.Sprintf("n/%d/%d", i, j)
				var at store.Revision
				for n := 1; ; n++ {
					select {
					case <-done:
						return
					default:
					}
					value := fmt.Sprint(n)
					rev, err := s.Commit(t.Context(), []store.Check{{Key: key, Modified: at}}, []store.Write{set(key, value), set(key+"/copy", value), set("last", key+" "+value)})
					var conflict *store.ConflictError
					switch {
					case err == nil:
						at = rev
						mu.Lock()
						if before, twice := acked[rev]; twice {
							t.Errorf("revision %d was given to %s and to %s", rev, before, key)
						}
						acked[rev] = key + " " + value
						mu.Unlock()
					case errors.Is(err, store.ErrUnavailable), errors.As(err, &conflict):
						// It may have taken effect; and if it did since, this shows as a conflict.
						it, err := s.Get(t.Context(), key)
						for errors.Is(err, store.ErrUnavailable) {
							it, err = s.Get(t.Context(), key)
						}
						if err != nil && !errors.Is(err, store.ErrNotFound) {
							t.Errorf("Get = %v", err)
							return
						}
						at = it.Modified
						_, _ = fmt.Sscan(string(it.Value), &n)
						if len(it.Value) == 0 {
							n = 0
						}
					default:
						t.Errorf("Commit = %v", err)
						return
					}
				}
			})
		}
	}
	models := make([]map[string]store.Item, len(stores))
	seen := make([]map[store.Revision]string, len(stores))
	for i, s := range stores {
		w := watch(t, s, start)
		models[i], seen[i] = map[string]store.Item{}, map[store.Revision]string{}
		followers.Go(func() {
			at := start
			for {
				b, err := w.Next(t.Context())
				if err != nil {
					t.Errorf("Next = %v", err)
					return
				}
				if b.Revision <= at {
					t.Errorf("revision %d after %d", b.Revision, at)
				}
				at = b.Revision
				for _, e := range b.Events {
					if e.Key == "end" {
						return
					}
					models[i][e.Key] = e.Item
				}
				if len(b.Events) != 3 {
					t.Errorf("a batch of %d events at %d, each commit has 3", len(b.Events), at)
					continue
				}
				seen[i][at] = string(b.Events[2].Value)
			}
		})
	}
	for range 6 {
		m := c.Members[rnd.IntN(3)]
		pause(t, time.Duration(rnd.IntN(400))*time.Millisecond)
		if rnd.IntN(2) == 0 {
			m.Kill()
			pause(t, time.Duration(rnd.IntN(400))*time.Millisecond)
			m.Start(t)
		} else {
			m.Pause()
			pause(t, time.Duration(rnd.IntN(1500))*time.Millisecond)
			m.Resume()
		}
		m.WaitHealthy(t)
	}
	close(done)
	writers.Wait()
	commits(t, stores[0], set("end", "1"))
	followers.Wait()
	t.Logf("%d commits acknowledged", len(acked))
	if len(acked) < 50 {
		t.Errorf("only %d commits were acknowledged: the test did not test", len(acked))
	}
	for i := range stores {
		for rev, what := range acked {
			if seen[i][rev] != what {
				t.Errorf("follower %d saw %q at %d, acknowledged was %q", i, seen[i][rev], rev, what)
			}
		}
		if _, err := stores[i].List(t.Context(), "n/", 0, func(it store.Item) error {
			if m := models[i][it.Key]; string(m.Value) != string(it.Value) || m.Modified != it.Modified || m.Created != it.Created {
				t.Errorf("follower %d has %s=%s of %d, the store %s of %d", i, it.Key, m.Value, m.Modified, it.Value, it.Modified)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

// pause lets time go by under load; nothing waits for it.
func pause(t testing.TB, d time.Duration) {
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// TestQuota fills etcd: ordinary commits end before etcd refuses everything, renewals go on, and both come back with room.
func TestQuota(t *testing.T) {
	const quota = 24 << 20
	c := etcdtest.Start(t, etcdtest.Config{Quota: quota})
	s := closed(t, config(c, t.TempDir()))
	s.LookAtRoom(t.Context())
	for i := range 100 {
		must(t, s, set(fmt.Sprintf("agent/%d", i), "0"))
	}
	fill := func(ctx context.Context, name string) (n int) {
		for ; ; n++ {
			_, err := s.Commit(ctx, nil, []store.Write{set(fmt.Sprintf("%s/%d", name, n), strings.Repeat("x", 100_000))})
			if errors.Is(err, store.ErrDiskFull) {
				if _, err := s.Get(t.Context(), fmt.Sprintf("%s/%d", name, n)); !errors.Is(err, store.ErrNotFound) {
					t.Errorf("Get of what did not fit = %v, want ErrNotFound", err)
				}
				return n
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	// The store guesses high between two looks at etcd: it is full when it still is after looking.
	ordinary := 0
	for round := 0; ; round++ {
		n := fill(t.Context(), fmt.Sprintf("fill/%d", round))
		if ordinary += n; n == 0 {
			break
		}
		pause(t, 300*time.Millisecond) // etcd tells its size as of its last write, at most a tenth of a second ago
		s.LookAtRoom(t.Context())
		s.LookAtRoom(t.Context())
	}
	if ordinary < 100 {
		t.Errorf("only %d items of 100 kB in a quota of %d bytes", ordinary, quota)
	}
	if err := s.Health(); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("Health = %v, want ErrDiskFull", err)
	}
	for i := range 1000 {
		if _, err := s.Commit(store.WithReserve(t.Context()), nil, []store.Write{set(fmt.Sprintf("agent/%d", i%100), strings.Repeat("r", 300))}); err != nil {
			t.Fatalf("renewal %d with the quota used up: %v", i, err)
		}
	}
	if _, err := s.Commit(t.Context(), nil, []store.Write{set("new", "1")}); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("an ordinary commit = %v, want ErrDiskFull", err)
	}
	if n := fill(store.WithReserve(t.Context()), "grow"); n == 0 {
		t.Error("the reserve had no room")
	}
	if _, err := s.Commit(store.WithReserve(t.Context()), nil, []store.Write{set("agent/1", "last")}); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("a renewal after the reserve is spent = %v, want ErrDiskFull", err)
	}
	// What the documentation has operators do.
	c.Ctl(t, "del", "--prefix", prefixOfItems(s)+"fill/")
	c.Ctl(t, "del", "--prefix", prefixOfItems(s)+"grow/")
	c.Ctl(t, "compact", "--physical", fmt.Sprint(c.Revision(t)))
	c.Ctl(t, "defrag")
	c.Ctl(t, "alarm", "disarm")
	for ctx := within(t); ; {
		s.LookAtRoom(ctx)
		if s.Health() == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("Health = %v although there is room", s.Health())
		}
	}
	must(t, s, set("new", strings.Repeat("x", 100_000)))
}

func prefixOfItems(s *etcd.Store) string { return s.ItemPrefix() }
