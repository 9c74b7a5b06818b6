package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/signet-id/signet/ca/store"
)

// This file holds whose turn it is to do what one replica does at a time. Who leads is decided elsewhere, by a Lease at an API
// server, and a Lease is a promise by clocks: a replica that stood still does not know that it has lost it. So each leader begins
// a term in the store, and its commits hold only as long as no other one has begun the next.

// ErrTermOver means that another replica has begun a term since. It comes with ErrConflict.
var ErrTermOver = errors.New("another replica leads now")

const termPrefix = "term/"

// termRecord is for who reads the store; that it is another one than before is what counts.
type termRecord struct {
	V      int    `json:"v"`
	Holder string `json:"holder"`
	Since  int64  `json:"since"`
}

// A Term is the time from Lead until another replica leads what it is of.
type Term struct {
	r     *Registry
	check store.Check
}

// Lead begins a term of what, such as a cluster. When it returns, the index holds all that former leaders committed, and they
// commit nothing any more. Errors: ErrConflict if another replica began one at the same moment, and the store's.
func (r *Registry) Lead(ctx context.Context, what, holder string) (*Term, error) {
	key := termPrefix + what
	it, err := r.c.Store.Get(ctx, key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("the term of %s: %w", what, err)
	}
	value, err := json.Marshal(termRecord{1, holder, r.c.Now().Unix()})
	if err != nil {
		return nil, err
	}
	rev, err := r.commit(store.WithReserve(ctx), []store.Check{{Key: key, Modified: it.Modified}}, []store.Write{{Key: key, Value: value}})
	if err != nil {
		return nil, fmt.Errorf("the term of %s: %w", what, err)
	}
	return &Term{r, store.Check{Key: key, Modified: rev}}, nil
}

// Bind returns a context under which the registry commits in this term or not at all.
func (t *Term) Bind(ctx context.Context) context.Context { return store.WithFence(ctx, t.check) }

// Wait returns ErrTermOver once another replica has begun a term, or nil when ctx ends.
func (t *Term) Wait(ctx context.Context) error {
	for {
		t.r.mu.RLock()
		now, moved := t.r.ix.terms[t.check.Key], t.r.applied
		t.r.mu.RUnlock()
		if now != t.check.Modified {
			return ErrTermOver
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return nil
		}
	}
}
