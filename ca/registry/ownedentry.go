package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/signet-id/signet/ca/store"
)

// This file holds registration entries that belong to a resource elsewhere, such as a custom resource of a cluster: they are what
// it says, and nobody else changes them while its source is at work. They are entries as others are in all else.

// SetOwned makes the entry of a resource of source hold. An entry with the same SPIFFE ID, parent and selectors that belongs to
// nobody or to another resource of source is taken over, with its ID; *ExistsError if one is there that belongs to somebody else.
func (r *Registry) SetOwned(ctx context.Context, source, name string, want *Entry) (e *Entry, changed bool, err error) {
	for range maxAttempts {
		e := *want
		e.ID, e.Owner = "", source+"/"+name
		e.normalise()
		have := r.similarEntry(&e)
		if have == nil {
			got := r.CreateEntries(ctx, []*Entry{&e})[0]
			if _, exists := errors.AsType[*ExistsError](got.Err); exists {
				continue // since we looked
			}
			return got.Entry, got.Err == nil, got.Err
		}
		if have.Identity != nil || have.Owner != "" && !ownedBy(have, source) {
			return nil, false, &ExistsError{have}
		}
		e.ID, e.CreatedAt = have.ID, have.CreatedAt
		if err := r.CheckEntry(&e); err != nil {
			return nil, false, err
		}
		b, err := e.encode()
		if err != nil {
			return nil, false, err
		}
		if was, _ := have.encode(); string(was) == string(b) {
			return have, false, nil
		}
		key := entryPrefix + string(e.ID)
		rev, err := r.commit(ctx, []store.Check{{Key: key, Modified: have.Revision}}, []store.Write{{Key: key, Value: b}})
		if err == nil {
			e.Revision = rev
			return &e, true, nil
		}
		if !errors.Is(err, ErrConflict) {
			return nil, false, err
		}
		if _, err := r.Barrier(ctx); err != nil {
			return nil, false, err
		}
	}
	return nil, false, fmt.Errorf("entry of %s/%s: %w", source, name, ErrConflict)
}

// DeleteOwned removes an entry that belongs to a resource of source. It is no error if it is gone, or belongs to somebody
// else by now.
func (r *Registry) DeleteOwned(ctx context.Context, source string, id EntryID) error {
	for range maxAttempts {
		e, err := r.Entry(id)
		if errors.Is(err, ErrNotFound) || err == nil && !ownedBy(e, source) {
			return nil
		}
		if err != nil {
			return err
		}
		key := entryPrefix + string(id)
		if _, err = r.commit(ctx, []store.Check{{Key: key, Modified: e.Revision}}, []store.Write{{Key: key, Delete: true}}); !errors.Is(err, ErrConflict) {
			return err
		}
		if _, err := r.Barrier(ctx); err != nil {
			return err
		}
	}
	return fmt.Errorf("entry %q: %w", string(id), ErrConflict)
}

// OwnedEntries returns the entries that belong to resources of source, in order of ID.
func (r *Registry) OwnedEntries(source string) []*Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []*Entry
	for _, e := range r.ix.entries {
		if ownedBy(e, source) {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b *Entry) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return out
}

func ownedBy(e *Entry, source string) bool { return strings.HasPrefix(e.Owner, source+"/") }

// checkOwned refuses a change of an entry that belongs to a resource whose source is at work.
func (r *Registry) checkOwned(e *Entry) error {
	if e.Owner == "" || r.c.OwnerGone != nil && r.c.OwnerGone(e.Owner) {
		return nil
	}
	return invalid("id", string(e.ID), "belongs to %s; change it there", e.Owner)
}

// HoldsOwned returns the entry of a resource of source if it is there as want says; nil if SetOwned would change something.
func (r *Registry) HoldsOwned(source, name string, want *Entry) *Entry {
	e := *want
	e.ID, e.Owner = "", source+"/"+name
	e.normalise()
	have := r.similarEntry(&e)
	if have == nil {
		return nil
	}
	e.ID, e.CreatedAt = have.ID, have.CreatedAt
	a, errA := e.encode()
	b, errB := have.encode()
	if errA != nil || errB != nil || string(a) != string(b) {
		return nil
	}
	return have
}
