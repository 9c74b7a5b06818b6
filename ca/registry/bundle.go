package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// bundleWrite checks a foreign bundle and returns the write that stores it.
func (r *Registry) bundleWrite(td spiffeid.TrustDomain, content []byte) (store.Write, error) {
	if td == r.c.TrustDomain {
		return store.Write{}, invalid("trust_domain", td.Name(), "is this trust domain itself [ID-24]")
	}
	parsed, _, err := spiffe.ParseBundle(td, content)
	if err != nil {
		return store.Write{}, invalid("bundle", td.Name(), "%v", err)
	}
	if r.c.CheckBundle != nil {
		if err := r.c.CheckBundle(parsed); err != nil {
			return store.Write{}, invalid("bundle", td.Name(), "%v", err)
		}
	}
	b, err := marshal(bundleRecord{recordVersion, json.RawMessage(content)})
	return store.Write{Key: bundlePrefix + td.Name(), Value: b}, err
}

// SetBundle stores a foreign trust domain's bundle, replacing what was there.
func (r *Registry) SetBundle(ctx context.Context, td spiffeid.TrustDomain, content []byte) (store.Revision, error) {
	w, err := r.bundleWrite(td, content)
	if err != nil {
		return 0, err
	}
	return r.commit(ctx, nil, []store.Write{w})
}

// ReplaceBundle is SetBundle if the bundle that is there is of revision at; 0: if there is none. ErrConflict otherwise.
func (r *Registry) ReplaceBundle(ctx context.Context, td spiffeid.TrustDomain, at store.Revision, content []byte) (store.Revision, error) {
	w, err := r.bundleWrite(td, content)
	if err != nil {
		return 0, err
	}
	return r.commit(ctx, []store.Check{{Key: w.Key, Modified: at}}, []store.Write{w})
}

// FederatedEntries says what becomes of the entries that federate with a trust domain whose bundle is deleted.
type FederatedEntries int

const (
	// RestrictEntries: while there are any, nothing is deleted.
	RestrictEntries FederatedEntries = iota
	// DeleteEntries: they are deleted.
	DeleteEntries
	// DissociateEntries: the trust domain is struck from them.
	DissociateEntries
)

// ErrFederated means that entries federate with a trust domain.
var ErrFederated = errors.New("entries federate with it")

// DeleteBundle forgets a foreign trust domain's bundle, and returns the entries that were deleted or changed on the way, as
// they were. Up to 99 entries and the bundle are one commit; more go in chunks, the bundle with the last, so that after a
// crash the same call completes the work. ErrNotFound if there is no bundle.
func (r *Registry) DeleteBundle(ctx context.Context, td spiffeid.TrustDomain, entries FederatedEntries) (touched []*Entry, err error) {
	key := bundlePrefix + td.Name()
	for range maxAttempts {
		b, err := r.Bundle(td)
		if err != nil {
			return touched, err
		}
		users := r.federatingWith(td)
		if len(users) > 0 && entries == RestrictEntries {
			return touched, fmt.Errorf("%w: %q and %d more; change or delete such entries first", ErrFederated, string(users[0].ID), len(users)-1)
		}
		for _, e := range users {
			if e.Identity != nil {
				return touched, fmt.Errorf("%w: entry %q belongs to Identity %q; change that document and apply it first", ErrFederated, string(e.ID), e.Identity.Name)
			}
			if err := r.checkOwned(e); err != nil {
				return touched, fmt.Errorf("%w: %w", ErrFederated, err)
			}
		}
		for chunk := oneCommit(users); len(chunk) < len(users); chunk = oneCommit(users) {
			if err = r.leave(ctx, td, chunk, entries, nil, nil); err != nil {
				break
			}
			touched, users = append(touched, chunk...), users[len(chunk):]
		}
		if err == nil {
			if err = r.leave(ctx, td, users, entries, []store.Check{{Key: key, Modified: b.Revision}}, []store.Write{{Key: key, Delete: true}}); err == nil {
				return append(touched, users...), nil
			}
		}
		if !errors.Is(err, ErrConflict) {
			return touched, err
		}
		if _, err := r.Barrier(ctx); err != nil {
			return touched, err
		}
	}
	return touched, fmt.Errorf("bundle of %q: %w", td.Name(), ErrConflict)
}

// leave takes entries away from a trust domain, in one commit with what else is given.
func (r *Registry) leave(ctx context.Context, td spiffeid.TrustDomain, users []*Entry, how FederatedEntries, checks []store.Check, writes []store.Write) error {
	for _, e := range users {
		w := store.Write{Key: entryPrefix + string(e.ID), Delete: true}
		checks = append(checks, store.Check{Key: w.Key, Modified: e.Revision})
		if how == DissociateEntries {
			changed := *e
			changed.FederatesWith = slices.DeleteFunc(slices.Clone(e.FederatesWith), func(x spiffeid.TrustDomain) bool { return x == td })
			value, err := changed.encode()
			if err != nil {
				return err
			}
			w.Delete, w.Value = false, value
		}
		writes = append(writes, w)
	}
	_, err := r.commit(ctx, checks, writes)
	return err
}

// oneCommit returns as many of the first entries as fit into one commit, with one more write.
func oneCommit(entries []*Entry) []*Entry {
	size := 0
	for i, e := range entries {
		b, _ := e.encode() // whoever writes it meets the error
		if size += len(b); i == store.MaxWrites-1 || i > 0 && size > store.MaxCommitBytes/2 {
			return entries[:i]
		}
	}
	return entries
}

func (r *Registry) federatingWith(td spiffeid.TrustDomain) []*Entry {
	all, _ := r.ListEntries(EntryFilter{FederatesWith: []spiffeid.TrustDomain{td}, FederatesMatch: MatchAny}, "", int(^uint(0)>>1))
	return all
}
