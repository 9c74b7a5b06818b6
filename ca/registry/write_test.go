package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// patience is how long calls may take that must not wait for each other for ever.
const patience = 20 * time.Second

func numbered(n int) *Entry {
	return &Entry{SPIFFEID: spiffeid.RequireFromPath(td, fmt.Sprintf("/w/%d", n)), ParentID: spiffeid.RequireFromPath(td, "/node"),
		Selectors: []spiffe.Selector{sel("unix:uid:1")}}
}

// TestBatchesInOppositeOrderDoNotWaitForEachOther creates the same entries from both ends at the same time.
func TestBatchesInOppositeOrderDoNotWaitForEachOther(t *testing.T) {
	r := open(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	const rounds, size = 40, 90
	for round := range rounds {
		up, down := make([]*Entry, size), make([]*Entry, size)
		for i := range size {
			up[i], down[size-1-i] = numbered(round*size+i), numbered(round*size+i)
		}
		var wg sync.WaitGroup
		made := make([]int, 2)
		for i, batch := range [][]*Entry{up, down} {
			wg.Go(func() {
				for _, res := range r.CreateEntries(ctx, batch) {
					if _, exists := errors.AsType[*ExistsError](res.Err); res.Err != nil && !exists {
						t.Errorf("round %d: %v", round, res.Err)
					}
					if res.Err == nil {
						made[i]++
					}
				}
			})
		}
		wg.Wait()
		if made[0]+made[1] != size {
			t.Errorf("round %d: %d and %d entries made of %d", round, made[0], made[1], size)
		}
		if t.Failed() {
			return
		}
	}
}

// TestRacingUpdatesOfOneEntry changes what makes an entry similar to others, from many sides at once.
func TestRacingUpdatesOfOneEntry(t *testing.T) {
	r := open(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	res := r.CreateEntries(ctx, []*Entry{numbered(0)})
	if res[0].Err != nil {
		t.Fatal(res[0].Err)
	}
	const rounds = 30
	for round := range rounds {
		for _, same := range []bool{false, true} {
			var wg sync.WaitGroup
			for i := range 4 {
				s := []spiffe.Selector{sel(fmt.Sprintf("unix:uid:%d", 100+round*10+i))}
				if same {
					s = []spiffe.Selector{sel(fmt.Sprintf("unix:gid:%d", round))}
				}
				wg.Go(func() {
					e, err := r.UpdateEntry(ctx, res[0].Entry.ID, func(e *Entry) error { e.Selectors = s; return nil })
					if err != nil && !errors.Is(err, ErrConflict) {
						t.Errorf("round %d, same change %t: %v", round, same, err)
					}
					if err == nil && !slices.Equal(e.Selectors, s) {
						t.Errorf("round %d: answered %v, asked for %v", round, e.Selectors, s)
					}
				})
			}
			wg.Wait()
			if t.Failed() {
				return
			}
		}
	}
}

// TestSweepRemovesAllThatHasEnded has more of it than fits into one commit.
func TestSweepRemovesAllThatHasEnded(t *testing.T) {
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var offset atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	r, err := Open(t.Context(), Config{TrustDomain: td, Store: s, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() { cancel(); <-done }()
	const entries, tokens = 250, 120
	agent, _ := AgentID(td, "join_token", "n")
	var batch []*Entry
	for i := range entries {
		e := numbered(i)
		e.ExpiresAt, e.ParentID = now().Add(time.Minute), agent
		batch = append(batch, e)
	}
	batch = append(batch, numbered(entries))
	for _, res := range r.CreateEntries(ctx, batch) {
		if res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	for range tokens {
		if _, err := r.CreateToken(ctx, NewJoinToken(""), time.Minute, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	// A clock that jumps ahead and back destroys nothing, and what has ended is no longer there for its agents.
	if err := r.PutNode(ctx, &Node{ID: agent, Serial: "1", Active: true}, nil); err != nil {
		t.Fatal(err)
	}
	f := r.Follow(agent, 0, false)
	defer f.Close()
	before := len(f.Next(true).Entries)
	offset.Store(int64(time.Hour))
	if ended := r.NoteEnds(); len(ended) != entries {
		t.Errorf("%d entries ended, want %d", len(ended), entries)
	}
	if d := f.Next(true); before != entries || len(d.RemovedEntries) != entries {
		t.Errorf("the agent loses %d entries of %d", len(d.RemovedEntries), before)
	}
	if gone, err := r.Sweep(ctx); err != nil || len(gone) != 0 {
		t.Errorf("%d entries removed an hour after their end: %v", len(gone), err)
	}
	offset.Store(0)
	if ended := r.NoteEnds(); len(ended) != 0 {
		t.Errorf("%d entries ended when the clock went back", len(ended))
	}
	if d := f.Next(true); len(d.Entries) != entries {
		t.Errorf("the agent has %d entries back of %d", len(d.Entries), before)
	}
	offset.Store(int64(26 * time.Hour))
	gone, err := r.Sweep(ctx)
	if err != nil || len(gone) != entries {
		t.Errorf("%d entries removed, want %d: %v", len(gone), entries, err)
	}
	if left, _, _ := r.Counts(); left != 1 || len(r.ix.tokens) != 0 {
		t.Errorf("%d entries and %d tokens left, want 1 and 0", left, len(r.ix.tokens))
	}
}

// compactedOnce is a store whose first watch has fallen behind.
type compactedOnce struct {
	store.Store
	watches atomic.Int64
	fall    chan struct{}
}

func (s *compactedOnce) Watch(ctx context.Context, from store.Revision) (store.Watcher, error) {
	w, err := s.Store.Watch(ctx, from)
	if s.watches.Add(1) == 1 {
		w = &fallingWatcher{w, s.fall}
	}
	return w, err
}

type fallingWatcher struct {
	store.Watcher
	fall chan struct{}
}

func (w *fallingWatcher) Next(ctx context.Context) (store.Batch, error) {
	select {
	case <-w.fall:
		return store.Batch{}, store.ErrCompacted
	case <-ctx.Done():
		return store.Batch{}, ctx.Err()
	}
}

// TestRelistShowsTheOwnBundleToFollowers: its change may be in what was missed.
func TestRelistShowsTheOwnBundleToFollowers(t *testing.T) {
	b, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	s := &compactedOnce{Store: b, fall: make(chan struct{})}
	relisted := make(chan struct{})
	r, err := Open(t.Context(), Config{TrustDomain: td, Store: s, Relisted: func(context.Context) error { close(relisted); return nil }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() { cancel(); <-done }()
	f := r.Follow(spiffeid.RequireFromPath(td, "/spire/agent/x/1"), 0, true)
	defer f.Close()
	<-f.Wake()
	f.Next(false)
	close(s.fall)
	<-relisted
	for {
		select {
		case <-f.Wake():
		case <-ctx.Done():
			t.Fatal("a follower was never told of the own bundle after everything was read afresh")
		}
		if d := f.Next(false); d != nil && d.OwnBundle {
			return
		}
	}
}

// TestRacingPlansMakeOneRegistration plans two Identities that are the same registration before either is applied.
func TestRacingPlansMakeOneRegistration(t *testing.T) {
	r := open(t)
	plan := func(docs string) *Plan {
		t.Helper()
		split, err := strictyaml.Split([]byte(docs), "test.yaml", 1)
		if err != nil {
			t.Fatal(err)
		}
		p, err := r.Plan(split, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	a := plan("kind: Identity\nname: a\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	b := plan("kind: Identity\nname: b\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	if _, err := r.Apply(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), b); !errors.Is(err, ErrConflict) {
		t.Errorf("the second Identity of one registration: %v", err)
	}
	swap := plan("kind: Identity\nname: a\nspiffeID: /other\nmatch: [\"unix:uid:1\"]\n")
	if _, err := r.Apply(t.Context(), swap); err != nil {
		t.Errorf("a change of the Identity itself: %v", err)
	}
}
