package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/signet-id/signet/ca/store"
)

func watch(t testing.TB, s store.Store, from store.Revision) store.Watcher {
	t.Helper()
	w, err := s.Watch(t.Context(), from)
	if err != nil {
		t.Fatalf("Watch(%d) = %v", from, err)
	}
	t.Cleanup(w.Close)
	return w
}

func next(t testing.TB, w store.Watcher) store.Batch {
	t.Helper()
	b, err := w.Next(t.Context())
	if err != nil {
		t.Fatalf("Next = %v", err)
	}
	return b
}

// counters has many writers raise one number by compare and commit.
func (su Suite) counters(t *testing.T) {
	s := su.open(t)
	const workers, each = 8, 25
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for done := 0; done < each; {
				it, err := s.Get(t.Context(), "n")
				if err != nil && !errors.Is(err, store.ErrNotFound) {
					t.Error(err)
					return
				}
				n, _ := strconv.Atoi(string(it.Value))
				_, err = s.Commit(t.Context(), []store.Check{{Key: "n", Modified: it.Modified}}, []store.Write{set("n", strconv.Itoa(n+1))})
				var conflict *store.ConflictError
				switch {
				case err == nil:
					done++
				case !errors.As(err, &conflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if it, err := s.Get(t.Context(), "n"); err != nil || string(it.Value) != strconv.Itoa(workers*each) {
		t.Errorf("the counter is at %q, %v; want %d", it.Value, err, workers*each)
	}
}

// writers makes n goroutines commit pairs of equal values under pair/i/, each rounds times, and returns what waits for them.
func writers(t *testing.T, s store.Store, n, rounds int, acked func(store.Revision)) (wait func()) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for r := range rounds {
				v := strconv.Itoa(r)
				writes := []store.Write{set(fmt.Sprintf("pair/%d/a", i), v), set(fmt.Sprintf("pair/%d/b", i), v)}
				switch r % 5 {
				case 3:
					writes = append(writes, set(fmt.Sprintf("extra/%d", i), v))
				case 4:
					writes = append(writes, del(fmt.Sprintf("extra/%d", i)))
				}
				rev, err := s.Commit(t.Context(), nil, writes)
				if err != nil {
					t.Errorf("Commit = %v", err)
					return
				}
				acked(rev)
			}
		})
	}
	return wg.Wait
}

// paired reports the pairs of which one half is from another commit.
func paired(items []store.Item) error {
	halves := map[string]store.Item{}
	for _, it := range items {
		base, ok := strings.CutSuffix(it.Key, "/a")
		if ok {
			halves[base] = it
			continue
		}
		base, ok = strings.CutSuffix(it.Key, "/b")
		if !ok {
			continue
		}
		a, ok := halves[base]
		if !ok || string(a.Value) != string(it.Value) || a.Modified != it.Modified {
			return fmt.Errorf("half of a commit: %s/a is %q of %d, %s is %q of %d", base, a.Value, a.Modified, it.Key, it.Value, it.Modified)
		}
		delete(halves, base)
	}
	for base := range halves {
		return fmt.Errorf("half of a commit: %s/b is missing", base)
	}
	return nil
}

func (su Suite) listIsOneRevision(t *testing.T) {
	s := su.open(t)
	var newest atomic.Int64
	raise := func(rev store.Revision) {
		for old := newest.Load(); int64(rev) > old && !newest.CompareAndSwap(old, int64(rev)); old = newest.Load() {
		}
	}
	wait := writers(t, s, 4, 60, raise)
	done := make(chan struct{})
	go func() { wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		before := store.Revision(newest.Load())
		items, rev := all(t, s, "", 0)
		if rev < before {
			t.Fatalf("List is at revision %d after %d was acknowledged", rev, before)
		}
		if err := paired(items); err != nil {
			t.Fatal(err)
		}
		for _, it := range items {
			if it.Modified > rev {
				t.Fatalf("List at revision %d has key %q of %d", rev, it.Key, it.Modified)
			}
		}
	}
}

// watchHasNoGaps lets readers follow from different beginnings and compares what they have pieced together.
func (su Suite) watchHasNoGaps(t *testing.T) {
	s := su.open(t)
	_, start := all(t, s, "", 0)
	const n, rounds, followers = 4, 60, 4
	var acked sync.Map
	wait := writers(t, s, n, rounds, func(rev store.Revision) {
		if _, twice := acked.LoadOrStore(rev, true); twice {
			t.Errorf("two commits have the revision %d", rev)
		}
	})
	var wg sync.WaitGroup
	models := make([]map[string]store.Item, followers)
	seen := make([][]store.Revision, followers)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for i := range followers {
		wg.Go(func() {
			model := map[string]store.Item{}
			at := start
			if i > 0 { // the first one follows from the beginning, the others from wherever they find the store
				rev, err := s.List(ctx, "", 0, func(it store.Item) error { model[it.Key] = it; return nil })
				if err != nil {
					t.Error(err)
					return
				}
				at = rev
			}
			w, err := s.Watch(ctx, at)
			if err != nil {
				t.Error(err)
				return
			}
			defer w.Close()
			for !ended(model) {
				b, err := w.Next(ctx)
				if err != nil {
					t.Errorf("follower %d: Next = %v", i, err)
					return
				}
				if b.Revision <= at || len(b.Events) == 0 {
					t.Errorf("follower %d: a batch of %d events at %d after %d", i, len(b.Events), b.Revision, at)
				}
				at = b.Revision
				seen[i] = append(seen[i], at)
				for _, e := range b.Events {
					if e.Modified != b.Revision {
						t.Errorf("an event of revision %d in the batch of %d", e.Modified, b.Revision)
					}
					if e.Deleted {
						delete(model, e.Key)
					} else {
						model[e.Key] = e.Item
					}
				}
				if err := paired(sorted(model)); err != nil {
					t.Errorf("follower %d at %d: %v", i, at, err)
				}
			}
			models[i] = model
		})
	}
	wait()
	last := commit(t, s, set("end", "end")) // by this every follower knows that it has seen all
	wg.Wait()
	for i := range followers {
		same(t, s, models[i])
	}
	acked.Store(last, true)
	if got := len(seen[0]); got != n*rounds+1 {
		t.Errorf("the first follower saw %d commits, want %d", got, n*rounds+1)
	}
	for _, rev := range seen[0] {
		if _, ok := acked.Load(rev); !ok {
			t.Errorf("the watch has revision %d, which nobody committed", rev)
		}
	}
}

func ended(model map[string]store.Item) bool {
	_, ok := model["end"]
	return ok
}

func sorted(model map[string]store.Item) []store.Item {
	var items []store.Item
	for _, k := range slices.Sorted(maps.Keys(model)) {
		items = append(items, model[k])
	}
	return items
}

func (su Suite) watchContext(t *testing.T) {
	s := su.open(t)
	_, start := all(t, s, "", 0)
	w := watch(t, s, start)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Next with an ended context = %v", err)
	}
	r1 := commit(t, s, set("b", "1"), set("a", "2"), del("none"))
	r2 := commit(t, s, del("b"))
	b := next(t, w)
	if b.Revision != r1 || len(b.Events) != 2 || b.Events[0].Key != "b" || b.Events[1].Key != "a" || b.Events[0].Created != r1 || b.Events[0].Deleted {
		t.Errorf("first batch %v, want b then a at %d", b, r1)
	}
	b = next(t, w)
	if b.Revision != r2 || len(b.Events) != 1 || b.Events[0].Key != "b" || !b.Events[0].Deleted || b.Events[0].Modified != r2 {
		t.Errorf("second batch %v, want the removal of b at %d", b, r2)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := w.Next(t.Context())
		waiting <- err
	}()
	w.Close()
	w.Close()
	if err := <-waiting; !errors.Is(err, store.ErrClosed) {
		t.Errorf("Next of a closed watcher = %v, want ErrClosed", err)
	}
	if _, err := s.Watch(t.Context(), r2+1000); !errors.Is(err, store.ErrFuture) {
		t.Errorf("Watch from a revision to come = %v, want ErrFuture", err)
	}
	// Contexts that have ended.
	if _, err := s.Commit(ctx, nil, []store.Write{set("late", "1")}); !errors.Is(err, context.Canceled) {
		t.Errorf("Commit with an ended context = %v", err)
	}
	if _, err := s.Get(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get with an ended context = %v", err)
	}
}

// watchForgotten has a reader fall behind what the store remembers.
func (su Suite) watchForgotten(t *testing.T) {
	s := su.open(t)
	_, start := all(t, s, "", 0)
	w := watch(t, s, start)
	r1 := commit(t, s, set("a", "1"))
	if b := next(t, w); b.Revision != r1 {
		t.Fatalf("first batch at %d, want %d", b.Revision, r1)
	}
	commit(t, s, set("a", "2"))
	if su.Forget != nil {
		su.Forget(t, s)
	} else {
		forget(t, s)
	}
	for range 2 {
		if _, err := w.Next(t.Context()); !errors.Is(err, store.ErrCompacted) {
			t.Fatalf("Next of a reader that is too slow = %v, want ErrCompacted", err)
		}
	}
	if _, err := s.Watch(t.Context(), start); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("Watch from a forgotten revision = %v, want ErrCompacted", err)
	}
	if _, err := s.List(t.Context(), "", start, func(store.Item) error { return nil }); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("List at a forgotten revision = %v, want ErrCompacted", err)
	}
	// The way back: list, then watch.
	_, rev := all(t, s, "", 0)
	w = watch(t, s, rev)
	r := commit(t, s, set("a", "3"))
	if b := next(t, w); b.Revision != r {
		t.Errorf("after listing again the first batch is at %d, want %d", b.Revision, r)
	}
}

func forget(t testing.TB, s store.Store) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			var writes []store.Write
			for j := range store.MaxWrites {
				writes = append(writes, set(fmt.Sprintf("filler/%d/%d", i, j), "v"))
			}
			for range 70_000 / store.MaxWrites / 32 * 2 {
				if _, err := s.Commit(t.Context(), nil, writes); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (su Suite) barrier(t *testing.T) {
	s := su.open(t)
	wait := writers(t, s, 4, 40, func(rev store.Revision) {
		if b, err := s.Barrier(t.Context()); err != nil || b < rev {
			t.Errorf("Barrier = %d, %v after %d was acknowledged", b, err, rev)
		}
	})
	wait()
	_, rev := all(t, s, "", 0)
	if b, err := s.Barrier(t.Context()); err != nil || b != rev {
		t.Errorf("Barrier = %d, %v at rest; want %d", b, err, rev)
	}
}
