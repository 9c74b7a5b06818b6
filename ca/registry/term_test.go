package registry

import (
	"context"
	"errors"
	"testing"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

// beside is another replica on the same store.
func beside(t *testing.T, r *Registry) *Registry {
	t.Helper()
	other, err := Open(t.Context(), Config{TrustDomain: td, Store: r.c.Store})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- other.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return other
}

// TestAFormerLeaderCommitsNothing: from the moment that another replica leads, whatever the former one still tries is a conflict,
// whichever way it writes, and it hears of it; what it does beside its term goes on.
func TestAFormerLeaderCommitsNothing(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	first := open(t)
	second := beside(t, first)
	old, err := first.Lead(ctx, "kubernetes/prod", "first")
	if err != nil {
		t.Fatal(err)
	}
	if res := first.CreateEntries(old.Bind(ctx), []*Entry{numbered(1), numbered(2)}); res[0].Err != nil || res[1].Err != nil {
		t.Fatalf("while it leads: %v, %v", res[0].Err, res[1].Err)
	}
	if err := func() error { ctx, cancel := context.WithCancel(ctx); cancel(); return old.Wait(ctx) }(); err != nil {
		t.Errorf("its term is over by itself: %v", err)
	}
	if _, err := second.Lead(ctx, "kubernetes/other", "second"); err != nil { // another cluster is another matter
		t.Fatal(err)
	}
	if res := first.CreateEntries(old.Bind(ctx), []*Entry{numbered(3)}); res[0].Err != nil {
		t.Errorf("while another replica leads another cluster: %v", res[0].Err)
	}
	term, err := second.Lead(ctx, "kubernetes/prod", "second")
	if err != nil {
		t.Fatal(err)
	}
	if second.Revision() < first.Revision() {
		t.Error("the new leader does not hold what the former one committed")
	}
	revision := second.Revision()
	for _, r := range first.CreateEntries(old.Bind(ctx), []*Entry{numbered(4), numbered(5)}) {
		if !errors.Is(r.Err, ErrConflict) || !errors.Is(r.Err, ErrTermOver) {
			t.Errorf("an entry of a former leader: %v", r.Err)
		}
	}
	apply := func(r *Registry, ctx context.Context) error {
		p, err := r.Plan(parsed(t, "kind: Identity\nname: late\nspiffeID: /late\nmatch: [\"unix:uid:1\"]\n"), Options{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.Apply(ctx, p)
		return err
	}
	if err := apply(first, old.Bind(ctx)); !errors.Is(err, ErrTermOver) {
		t.Errorf("a document of a former leader: %v", err)
	}
	if err := old.Wait(ctx); !errors.Is(err, ErrTermOver) {
		t.Errorf("the former leader hears: %v", err)
	}
	if now, err := second.Barrier(ctx); err != nil || now != revision {
		t.Errorf("revision %d, %v, want %d: something was written", now, err, revision)
	}
	if err := apply(second, term.Bind(ctx)); err != nil {
		t.Errorf("the leader's own: %v", err)
	}
	if res := first.CreateEntries(ctx, []*Entry{numbered(6)}); res[0].Err != nil {
		t.Errorf("what has nothing to do with leading: %v", res[0].Err)
	}
}

// TestOfTwoThatLeadAtOnceOneDoes: of two terms that are begun on the same ground one fails or is over.
func TestOfTwoThatLeadAtOnceOneDoes(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	a := open(t)
	b := beside(t, a)
	for range 20 {
		type got struct {
			term *Term
			err  error
		}
		out := make(chan got, 2)
		for _, r := range []*Registry{a, b} {
			go func() {
				term, err := r.Lead(ctx, "x", "r")
				out <- got{term, err}
			}()
		}
		leads := 0
		for _, g := range []got{<-out, <-out} { // both have begun, or not
			if g.err != nil {
				if !errors.Is(g.err, ErrConflict) {
					t.Fatal(g.err)
				}
				continue
			}
			switch _, err := a.commit(g.term.Bind(ctx), nil, []store.Write{{Key: "x/y", Value: []byte("z")}}); {
			case err == nil:
				leads++
			case !errors.Is(err, ErrTermOver):
				t.Fatal(err)
			}
		}
		if leads != 1 {
			t.Fatalf("%d lead", leads)
		}
	}
}

func parsed(t *testing.T, text string) []strictyaml.Document {
	t.Helper()
	docs, err := strictyaml.Split([]byte(text), "t.yaml", MaxDocuments)
	if err != nil {
		t.Fatal(err)
	}
	return docs
}
