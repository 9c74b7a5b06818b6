// Package storetest is the suite that every store.Store has to pass. The tests of the stores call it; nothing else does.
//
// Run holds the contract of one process. RunCrash kills processes that write, and RunDiskFull fills a small disk: both
// start the test binary again, running nothing but the calling test.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/store"
)

// Open opens the store in dir, which exists, or makes it. It ends the test on an error. It must not close the store at the
// end of the test: the suite does.
type Open func(t testing.TB, dir string) store.Store

// Suite is Run with what differs between stores.
type Suite struct {
	Open Open

	// Forget makes the store forget, for Watch, all that was committed so far. Nil means by so many commits that any
	// bounded memory has to.
	Forget func(t testing.TB, s store.Store)
}

// Run runs the suite.
func Run(t *testing.T, open Open) { Suite{Open: open}.Run(t) }

// Run runs the suite.
func (su Suite) Run(t *testing.T) {
	for _, tt := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"ItemsAndRevisions", su.itemsAndRevisions},
		{"ConflictsChangeNothing", su.conflicts},
		{"Limits", su.limits},
		{"MemoryIsNotShared", su.memoryIsNotShared},
		{"ListOrderAndPrefix", su.listOrder},
		{"ListAtRevision", su.listAt},
		{"RandomAgainstModel", su.randomModel},
		{"CountersLoseNothing", su.counters},
		{"ListIsOneRevision", su.listIsOneRevision},
		{"WatchHasNoGaps", su.watchHasNoGaps},
		{"WatchContext", su.watchContext},
		{"WatchForgotten", su.watchForgotten},
		{"BarrierIsNotBehind", su.barrier},
		{"Reopen", su.reopen},
		{"Close", su.close},
	} {
		t.Run(tt.name, tt.f)
	}
}

func (su Suite) open(t *testing.T) store.Store {
	s := su.Open(t, t.TempDir())
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
	return s
}

func set(key, value string) store.Write { return store.Write{Key: key, Value: []byte(value)} }
func del(key string) store.Write        { return store.Write{Key: key, Delete: true} }

// commit is Commit of writes without checks that must succeed.
func commit(t testing.TB, s store.Store, writes ...store.Write) store.Revision {
	t.Helper()
	rev, err := s.Commit(t.Context(), nil, writes)
	if err != nil {
		t.Fatalf("Commit(%d writes) = %v", len(writes), err)
	}
	return rev
}

// all returns the items under prefix at a revision.
func all(t testing.TB, s store.Store, prefix string, at store.Revision) ([]store.Item, store.Revision) {
	t.Helper()
	var items []store.Item
	rev, err := s.List(t.Context(), prefix, at, func(it store.Item) error {
		items = append(items, it)
		return nil
	})
	if err != nil {
		t.Fatalf("List(%q, %d) = %v", prefix, at, err)
	}
	return items, rev
}

func (su Suite) itemsAndRevisions(t *testing.T) {
	s := su.open(t)
	if _, rev := all(t, s, "", 0); rev < 1 {
		t.Errorf("an empty store is at revision %d, want at least 1", rev)
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get of a missing key = %v, want ErrNotFound", err)
	}
	r1 := commit(t, s, set("a", "1"), set("b", ""))
	r2 := commit(t, s, set("a", "2"))
	r3 := commit(t, s, del("b"))
	r4 := commit(t, s, set("b", "new"))
	if !(0 < r1 && r1 < r2 && r2 < r3 && r3 < r4) {
		t.Fatalf("revisions %d %d %d %d do not rise", r1, r2, r3, r4)
	}
	for _, want := range []store.Item{
		{Key: "a", Value: []byte("2"), Created: r1, Modified: r2},
		{Key: "b", Value: []byte("new"), Created: r4, Modified: r4},
	} {
		if got, err := s.Get(t.Context(), want.Key); err != nil || !equal(got, want) {
			t.Errorf("Get(%q) = %v, %v; want %v", want.Key, got, err, want)
		}
	}
	for name, writes := range map[string][]store.Write{"no writes": nil, "removal of nothing": {del("none")}} {
		if rev := commit(t, s, writes...); rev != r4 {
			t.Errorf("%s: revision %d, want %d, the newest", name, rev, r4)
		}
	}
	if _, err := s.Get(t.Context(), ""); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("Get of the empty key = %v, want ErrInvalid", err)
	}
}

func equal(a, b store.Item) bool {
	return a.Key == b.Key && bytes.Equal(a.Value, b.Value) && a.Created == b.Created && a.Modified == b.Modified
}

func (su Suite) conflicts(t *testing.T) {
	s := su.open(t)
	r1 := commit(t, s, set("a", "1"), set("c", "1"))
	r2 := commit(t, s, set("a", "2"))
	for _, tt := range []struct {
		name   string
		checks []store.Check
		key    string // of the conflict; "" for none
	}{
		{"must not exist, and does", []store.Check{{Key: "a"}}, "a"},
		{"old revision", []store.Check{{Key: "a", Modified: r1}}, "a"},
		{"revision to come", []store.Check{{Key: "a", Modified: r2 + 1000}}, "a"},
		{"must exist, and does not", []store.Check{{Key: "b", Modified: r1}}, "b"},
		{"second of two", []store.Check{{Key: "a", Modified: r2}, {Key: "c"}}, "c"},
		{"all hold", []store.Check{{Key: "a", Modified: r2}, {Key: "b"}, {Key: "c", Modified: r1}}, ""},
	} {
		_, before := all(t, s, "", 0)
		_, err := s.Commit(t.Context(), tt.checks, []store.Write{set("x", tt.name), del("none")})
		var conflict *store.ConflictError
		if tt.key == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		if !errors.As(err, &conflict) || conflict.Key != tt.key {
			t.Errorf("%s: %v, want a conflict at %q", tt.name, err, tt.key)
		}
		if _, err := s.Get(t.Context(), "x"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%s: the write was made", tt.name)
		}
		if _, after := all(t, s, "", 0); after != before {
			t.Errorf("%s: the revision went from %d to %d", tt.name, before, after)
		}
	}
	// Checks alone are a question that changes nothing.
	if _, err := s.Commit(t.Context(), []store.Check{{Key: "a", Modified: r2}}, nil); err != nil {
		t.Errorf("a check that holds, no writes: %v", err)
	}
	var conflict *store.ConflictError
	if _, err := s.Commit(t.Context(), []store.Check{{Key: "a", Modified: r1}}, nil); !errors.As(err, &conflict) {
		t.Errorf("a check that does not hold, no writes: %v, want a conflict", err)
	}
}

func (su Suite) limits(t *testing.T) {
	s := su.open(t)
	many := func(n int) []store.Write {
		var ws []store.Write
		for i := range n {
			ws = append(ws, set(fmt.Sprintf("many/%03d", i), "v"))
		}
		return ws
	}
	manyChecks := func(n int) []store.Check {
		var cs []store.Check
		for i := range n {
			cs = append(cs, store.Check{Key: fmt.Sprintf("none/%03d", i)})
		}
		return cs
	}
	long := strings.Repeat("k", store.MaxKeyBytes)
	for _, tt := range []struct {
		name   string
		checks []store.Check
		writes []store.Write
		want   error
	}{
		{"most writes", nil, many(store.MaxWrites), nil},
		{"too many writes", nil, many(store.MaxWrites + 1), store.ErrTooLarge},
		{"most checks", manyChecks(store.MaxChecks), nil, nil},
		{"too many checks", manyChecks(store.MaxChecks + 1), nil, store.ErrTooLarge},
		{"most bytes", nil, []store.Write{set("k", strings.Repeat("v", store.MaxCommitBytes-1))}, nil},
		{"too many bytes", nil, []store.Write{set("k", strings.Repeat("v", store.MaxCommitBytes))}, store.ErrTooLarge},
		{"checks count as bytes", []store.Check{{Key: "none"}}, []store.Write{set("k", strings.Repeat("v", store.MaxCommitBytes-1))}, store.ErrTooLarge},
		{"longest key", nil, []store.Write{set(long, "v")}, nil},
		{"key too long", nil, []store.Write{set(long+"k", "v")}, store.ErrInvalid},
		{"empty key", nil, []store.Write{set("", "v")}, store.ErrInvalid},
		{"empty key in a check", []store.Check{{}}, nil, store.ErrInvalid},
		{"negative revision", []store.Check{{Key: "a", Modified: -1}}, nil, store.ErrInvalid},
		{"one key twice", nil, []store.Write{set("a", "1"), del("a")}, store.ErrInvalid},
	} {
		if _, err := s.Commit(t.Context(), tt.checks, tt.writes); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if it, err := s.Get(t.Context(), "k"); err != nil || len(it.Value) != store.MaxCommitBytes-1 {
		t.Errorf("the largest value came back with %d bytes, %v", len(it.Value), err)
	}
}

func (su Suite) memoryIsNotShared(t *testing.T) {
	s := su.open(t)
	value := []byte("value")
	_, from := all(t, s, "", 0)
	commit(t, s, store.Write{Key: "k", Value: value})
	clear(value)
	for range 2 {
		it, err := s.Get(t.Context(), "k")
		if err != nil || string(it.Value) != "value" {
			t.Fatalf("Get = %q, %v", it.Value, err)
		}
		clear(it.Value)
		items, _ := all(t, s, "", 0)
		if len(items) != 1 || string(items[0].Value) != "value" {
			t.Fatalf("List = %v", items)
		}
		clear(items[0].Value)
	}
	w := watch(t, s, from)
	if b := next(t, w); len(b.Events) != 1 || string(b.Events[0].Value) != "value" {
		t.Errorf("the watch has %v", b)
	}
}

func (su Suite) listOrder(t *testing.T) {
	s := su.open(t)
	keys := []string{"\x00", "a", "a\x00", "a/", "a/1", "a/10", "a/2", "a/\xff", "a/\xff\xff", "a0", "b", "\xff", "\xff\xff"}
	shuffled := slices.Clone(keys)
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(keys), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	for _, k := range shuffled {
		commit(t, s, set(k, k))
	}
	for _, prefix := range []string{"", "a", "a/", "a/1", "a/\xff", "\xff", "none", "b", "bb"} {
		var want, got []string
		for _, k := range keys {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		items, _ := all(t, s, prefix, 0)
		for _, it := range items {
			if string(it.Value) != it.Key {
				t.Errorf("key %q has the value %q", it.Key, it.Value)
			}
			got = append(got, it.Key)
		}
		if !slices.Equal(got, want) {
			t.Errorf("List(%q) = %q, want %q", prefix, got, want)
		}
	}
	stop := errors.New("stop")
	calls := 0
	_, err := s.List(t.Context(), "", 0, func(store.Item) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("List with a yield that fails = %v after %d calls, want its error after one", err, calls)
	}
}

func (su Suite) listAt(t *testing.T) {
	s := su.open(t)
	commit(t, s, set("a", "1"))
	r2 := commit(t, s, set("b", "1"))
	nothing := func(store.Item) error { return nil }
	items, rev := all(t, s, "", r2)
	if len(items) != 2 || rev != r2 {
		t.Errorf("List at the newest revision = %v at %d", items, rev)
	}
	if _, err := s.List(t.Context(), "", r2+1000, nothing); !errors.Is(err, store.ErrFuture) {
		t.Errorf("List at a revision to come = %v, want ErrFuture", err)
	}
	if _, err := s.List(t.Context(), "", -1, nothing); err == nil {
		t.Error("List at revision -1 succeeded")
	}
	commit(t, s, set("c", "1"), del("a"))
	// The store may know the old state or not; it must not answer with another.
	var got []string
	switch rev, err := s.List(t.Context(), "", r2, func(it store.Item) error { got = append(got, it.Key); return nil }); {
	case err == nil:
		if rev != r2 || strings.Join(got, "") != "ab" {
			t.Errorf("List at %d = %q at %d, want a and b", r2, got, rev)
		}
	case !errors.Is(err, store.ErrCompacted):
		t.Errorf("List at %d = %v, want the state or ErrCompacted", r2, err)
	}
	if items, rev := all(t, s, "b", r2); len(items) != 1 || rev != r2 {
		t.Errorf("List of an unchanged prefix at %d = %v at %d", r2, items, rev)
	}
}

// randomModel compares the store with a map, over commits of all kinds and reopenings.
func (su Suite) randomModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	s := su.Open(t, dir)
	defer func() { s.Close() }()
	model := map[string]store.Item{}
	key := func() string { return fmt.Sprintf("k/%02d", rnd.IntN(40)) }
	var newest store.Revision
	for step := range 400 {
		if step%100 == 99 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = su.Open(t, dir)
		}
		var checks []store.Check
		holds := true
		for range rnd.IntN(3) {
			c := store.Check{Key: key()}
			if rnd.IntN(4) > 0 {
				c.Modified = model[c.Key].Modified
			} else {
				c.Modified = store.Revision(rnd.IntN(int(newest) + 1))
			}
			holds = holds && c.Modified == model[c.Key].Modified
			checks = append(checks, c)
		}
		writes := map[string]store.Write{}
		for range rnd.IntN(6) {
			w := store.Write{Key: key(), Delete: rnd.IntN(3) == 0}
			if !w.Delete {
				w.Value = bytes.Repeat([]byte{byte(rnd.IntN(256))}, rnd.IntN(3000))
			}
			writes[w.Key] = w
		}
		rev, err := s.Commit(t.Context(), checks, slices.Collect(maps.Values(writes)))
		var conflict *store.ConflictError
		switch {
		case holds && err != nil, !holds && !errors.As(err, &conflict):
			t.Fatalf("step %d: Commit = %v, although the checks hold is %t", step, err, holds)
		case err == nil:
			apply(model, writes, rev)
			if rev < newest {
				t.Fatalf("step %d: revision %d after %d", step, rev, newest)
			}
			newest = rev
		}
	}
	same(t, s, model)
}

func apply(model map[string]store.Item, writes map[string]store.Write, rev store.Revision) {
	for k, w := range writes {
		if w.Delete {
			delete(model, k)
			continue
		}
		created := rev
		if old, ok := model[k]; ok {
			created = old.Created
		}
		model[k] = store.Item{Key: k, Value: w.Value, Created: created, Modified: rev}
	}
}

// same compares all of the store with a model.
func same(t testing.TB, s store.Store, model map[string]store.Item) {
	t.Helper()
	items, _ := all(t, s, "", 0)
	if len(items) != len(model) {
		t.Errorf("the store has %d items, want %d", len(items), len(model))
	}
	for _, it := range items {
		if want, ok := model[it.Key]; !ok || !equal(it, want) {
			t.Errorf("key %q has %d bytes, created %d, modified %d; want %d bytes, %d, %d (exists: %t)",
				it.Key, len(it.Value), it.Created, it.Modified, len(want.Value), want.Created, want.Modified, ok)
		}
	}
}

func (su Suite) reopen(t *testing.T) {
	dir := t.TempDir()
	s := su.Open(t, dir)
	epoch := s.Epoch()
	r1 := commit(t, s, set("a", "1"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = su.Open(t, dir)
	defer s.Close()
	if s.Epoch() != epoch || epoch == "" {
		t.Errorf("epoch %q after reopening, was %q", s.Epoch(), epoch)
	}
	if it, err := s.Get(t.Context(), "a"); err != nil || string(it.Value) != "1" || it.Modified != r1 {
		t.Errorf("Get after reopening = %v, %v", it, err)
	}
	if rev, err := s.Barrier(t.Context()); err != nil || rev < r1 {
		t.Errorf("Barrier after reopening = %d, %v; want at least %d", rev, err, r1)
	}
	w := watch(t, s, r1)
	r2 := commit(t, s, set("b", "2"))
	if r2 <= r1 {
		t.Errorf("revision %d after reopening, was %d", r2, r1)
	}
	if b := next(t, w); b.Revision != r2 {
		t.Errorf("the first batch has revision %d, want %d", b.Revision, r2)
	}
	other := su.open(t)
	if other.Epoch() == epoch {
		t.Errorf("two stores have the epoch %q", epoch)
	}
}

func (su Suite) close(t *testing.T) {
	s := su.Open(t, t.TempDir())
	_, rev := all(t, s, "", 0)
	w, err := s.Watch(t.Context(), rev)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := w.Next(context.Background())
		waiting <- err
	}()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("a second Close = %v", err)
	}
	_, getErr := s.Get(t.Context(), "a")
	_, listErr := s.List(t.Context(), "", 0, func(store.Item) error { return nil })
	_, commitErr := s.Commit(t.Context(), nil, []store.Write{set("a", "1")})
	_, watchErr := s.Watch(t.Context(), rev)
	_, barrierErr := s.Barrier(t.Context())
	for name, err := range map[string]error{"Next": <-waiting, "Get": getErr, "List": listErr, "Commit": commitErr, "Watch": watchErr, "Barrier": barrierErr} {
		if !errors.Is(err, store.ErrClosed) {
			t.Errorf("%s after Close = %v, want ErrClosed", name, err)
		}
	}
	w.Close()
}
