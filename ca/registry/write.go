package registry

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
)

// An ExistsError means that an entry with the same ID, or with the same SPIFFE ID, parent and selectors, exists.
type ExistsError struct{ Existing *Entry }

func (e *ExistsError) Error() string {
	return fmt.Sprintf("entry %q for %q exists already", string(e.Existing.ID), e.Existing.SPIFFEID)
}

// An EntryResult is the outcome of one item of a batch.
type EntryResult struct {
	Entry *Entry
	Err   error
}

// MaxEntriesPerCommit bounds how many items of a batch share a commit; each item stays all-or-nothing.
const MaxEntriesPerCommit = store.MaxWrites

// CreateEntries registers each entry, or says what is wrong with it: a *ValidationError, or an *ExistsError with the
// entry that stands in its way. The others are registered all the same. An empty ID gets a random one.
func (r *Registry) CreateEntries(ctx context.Context, entries []*Entry) []EntryResult {
	out := make([]EntryResult, len(entries))
	var batch []int
	size := 0
	var writes []store.Write
	var checks []store.Check
	flush := func() {
		if len(batch) == 0 {
			return
		}
		rev, err := r.commit(ctx, checks, writes)
		for i, at := range batch {
			switch {
			case err == nil:
				out[at].Entry.Revision = rev
			case errors.Is(err, ErrConflict) && len(batch) > 1: // one of them: find out which, alone
				var one store.Revision
				if one, out[at].Err = r.commit(ctx, checks[i:i+1], writes[i:i+1]); out[at].Err == nil {
					out[at].Entry.Revision = one
				}
			default:
				out[at].Err = err
			}
			if errors.Is(out[at].Err, ErrConflict) {
				if e, err := r.Entry(out[at].Entry.ID); err == nil {
					out[at] = EntryResult{Err: &ExistsError{e}}
				}
			}
			r.release(entries[at])
		}
		batch, writes, checks, size = nil, nil, nil, 0
	}
	for i, e := range entries {
		e.normalise()
		if e.ID == "" {
			e.ID = NewEntryID()
		} else if e.Identity == nil && strings.HasPrefix(string(e.ID), identityPrefix) {
			out[i].Err = invalid("id", string(e.ID), "begins with %q, which is reserved for Identities", identityPrefix)
			continue
		}
		e.CreatedAt = r.c.Now().Truncate(time.Second)
		if out[i].Err = r.CheckEntry(e); out[i].Err != nil {
			continue
		}
		b, err := e.encode()
		if err != nil {
			out[i].Err = err
			continue
		}
		if len(batch) == MaxEntriesPerCommit || size+len(b) > store.MaxCommitBytes/2 || r.reservedBy(e, entries, batch) {
			flush()
		}
		wait, err := r.tryReserve(e)
		if wait != nil {
			flush() // whoever waits holds nothing: two batches would wait for each other for ever
			err = r.reserve(ctx, e)
		}
		if err != nil {
			out[i].Err = err
			continue
		}
		out[i].Entry = e
		batch = append(batch, i)
		size += len(b)
		checks = append(checks, store.Check{Key: entryPrefix + string(e.ID)})
		writes = append(writes, store.Write{Key: entryPrefix + string(e.ID), Value: b})
	}
	flush()
	return out
}

// reservedBy tells whether the open batch itself holds a similar entry or the same ID: it must be written first, or
// this one would wait for it for ever.
func (r *Registry) reservedBy(e *Entry, entries []*Entry, batch []int) bool {
	for _, at := range batch {
		if entries[at].ID == e.ID || entries[at].similar() == e.similar() {
			return true
		}
	}
	return false
}

// tryReserve makes sure that no similar entry exists and that none is created until release. If somebody else holds the
// reservation, it returns what to wait for.
func (r *Registry) tryReserve(e *Entry) (wait <-chan struct{}, err error) {
	key := e.similar()
	r.wmu.Lock()
	defer r.wmu.Unlock()
	if held := r.pending[key]; held != nil {
		return held, nil
	}
	if existing := r.similarEntry(e); existing != nil {
		return nil, &ExistsError{existing}
	}
	r.pending[key] = make(chan struct{})
	return nil, nil
}

// reserve is tryReserve that waits. The caller holds no other reservation.
func (r *Registry) reserve(ctx context.Context, e *Entry) error {
	for {
		wait, err := r.tryReserve(e)
		if wait == nil {
			return err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *Registry) release(e *Entry) {
	key := e.similar()
	r.wmu.Lock()
	defer r.wmu.Unlock()
	close(r.pending[key])
	delete(r.pending, key)
}

func (r *Registry) similarEntry(e *Entry) *Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if have := r.ix.entries[e.ID]; have != nil {
		return have
	}
	if id, ok := r.ix.similar[e.similar()]; ok {
		return r.ix.entries[id]
	}
	return nil
}

// CheckEntry says what is wrong with a normalised entry.
func (r *Registry) CheckEntry(e *Entry) error {
	if err := e.validate(r.c.TrustDomain); err != nil {
		return err
	}
	if r.c.CheckTTL != nil {
		if err := r.c.CheckTTL(e.X509TTL, e.JWTTTL); err != nil {
			return &ValidationError{Field: "ttl", Problem: err.Error()}
		}
	}
	return nil
}

// maxAttempts bounds retries after a conflict with another writer.
const maxAttempts = 5

// UpdateEntry changes an entry by change, which is called with a copy and may be called again after a conflict.
func (r *Registry) UpdateEntry(ctx context.Context, id EntryID, change func(*Entry) error) (*Entry, error) {
	for range maxAttempts {
		e, err := r.tryUpdate(ctx, id, change)
		if !errors.Is(err, ErrConflict) {
			return e, err
		}
		if _, err := r.Barrier(ctx); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("entry %q: %w", string(id), ErrConflict)
}

// tryUpdate is one attempt; what it reserves is released when it returns.
func (r *Registry) tryUpdate(ctx context.Context, id EntryID, change func(*Entry) error) (*Entry, error) {
	old, err := r.AnyEntry(id)
	if err != nil {
		return nil, err
	}
	if old.Pod != nil {
		return nil, ofPod(old)
	}
	if old.Identity != nil {
		return nil, invalid("id", string(id), "belongs to Identity %q; change that document and apply it", old.Identity.Name)
	}
	e := *old
	if err := change(&e); err != nil {
		return nil, err
	}
	e.normalise()
	if err := r.CheckEntry(&e); err != nil {
		return nil, err
	}
	b, err := e.encode()
	if err != nil {
		return nil, err
	}
	if was, _ := old.encode(); string(was) == string(b) {
		return old, nil // no change, no revision: nothing is renewed for it
	}
	if err := r.checkOwned(old); err != nil {
		return nil, err
	}
	if e.similar() != old.similar() {
		if err := r.reserveChange(ctx, &e); err != nil {
			return nil, err
		}
		defer r.release(&e)
	}
	key := entryPrefix + string(id)
	rev, err := r.commit(ctx, []store.Check{{Key: key, Modified: old.Revision}}, []store.Write{{Key: key, Value: b}})
	if err != nil {
		return nil, err
	}
	e.Revision = rev
	return &e, nil
}

// reserveChange is reserve for an entry that exists and gets another ID, parent or selectors. That it has them already,
// by somebody else's change at the same moment, is a conflict and not another entry in its way.
func (r *Registry) reserveChange(ctx context.Context, e *Entry) error {
	probe := *e
	probe.ID = ""
	err := r.reserve(ctx, &probe)
	if x, ok := errors.AsType[*ExistsError](err); ok && x.Existing.ID == e.ID {
		return ErrConflict
	}
	return err
}

// ofPod refuses to change what is not stored.
func ofPod(e *Entry) error {
	return invalid("id", string(e.ID), "is that of pod %s/%s in cluster %s by %s; it goes with the pod, or with that rule", e.Pod.Namespace, e.Pod.Name, e.Pod.Cluster, e.Rule)
}

// DeleteEntry removes an entry. ErrNotFound if there is none.
func (r *Registry) DeleteEntry(ctx context.Context, id EntryID) (*Entry, store.Revision, error) {
	e, err := r.AnyEntry(id)
	if err != nil {
		return nil, 0, err
	}
	if e.Pod != nil {
		return nil, 0, ofPod(e)
	}
	if e.Identity != nil {
		return nil, 0, invalid("id", string(id), "belongs to Identity %q; delete it with `signet delete identity %s`", e.Identity.Name, e.Identity.Name)
	}
	if err := r.checkOwned(e); err != nil {
		return nil, 0, err
	}
	key := entryPrefix + string(id)
	rev, err := r.commit(ctx, []store.Check{{Key: key, Modified: e.Revision}}, []store.Write{{Key: key, Delete: true}})
	return e, rev, err
}

// CreateToken stores the hash of a new join token.
func (r *Registry) CreateToken(ctx context.Context, t JoinToken, ttl time.Duration, groups []string, extra *Entry) (*Token, error) {
	h := sha256.Sum256([]byte(t.secret))
	rec := &Token{ID: t.id, SecretHash: h[:], ExpiresAt: r.c.Now().Add(ttl).Truncate(time.Second), Groups: groups}
	b, err := rec.encode()
	if err != nil {
		return nil, err
	}
	checks := []store.Check{{Key: tokenPrefix + t.id}}
	writes := []store.Write{{Key: tokenPrefix + t.id, Value: b}}
	if extra != nil {
		extra.ID = NewEntryID()
		extra.CreatedAt = r.c.Now().Truncate(time.Second)
		extra.normalise()
		if err := r.CheckEntry(extra); err != nil {
			return nil, err
		}
		eb, err := extra.encode()
		if err != nil {
			return nil, err
		}
		checks = append(checks, store.Check{Key: entryPrefix + string(extra.ID)})
		writes = append(writes, store.Write{Key: entryPrefix + string(extra.ID), Value: eb})
	}
	if _, err := r.commit(ctx, checks, writes); err != nil {
		return nil, err
	}
	return rec, nil
}

// TokenNow reads a token from the store itself: a no that comes from an index that lags would shut out a good node.
func (r *Registry) TokenNow(ctx context.Context, id string) (*Token, error) {
	it, err := r.c.Store.Get(ctx, tokenPrefix+id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return decodeToken(id, it)
}

// NodeNow reads a node from the store itself, for the same reason.
func (r *Registry) NodeNow(ctx context.Context, id spiffeid.ID) (*Node, error) {
	it, err := r.c.Store.Get(ctx, nodeKey(id))
	if errors.Is(err, store.ErrNotFound) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return decodeNode(id, it)
}

func nodeKey(id spiffeid.ID) string {
	return nodePrefix + strings.TrimPrefix(id.Path(), agentPathPrefix)
}

// PutNode writes a node and, with it or not at all, the token that it used. Both are checked against the revision they
// carry (0: must not exist), so that of two racing attestations one wins. ErrConflict for the other.
func (r *Registry) PutNode(ctx context.Context, n *Node, used *Token) error {
	b, err := n.encode()
	if err != nil {
		return err
	}
	checks := []store.Check{{Key: nodeKey(n.ID), Modified: n.Revision}}
	writes := []store.Write{{Key: nodeKey(n.ID), Value: b}}
	if used != nil {
		tb, err := used.encode()
		if err != nil {
			return err
		}
		checks = append(checks, store.Check{Key: tokenPrefix + used.ID, Modified: used.Revision})
		writes = append(writes, store.Write{Key: tokenPrefix + used.ID, Value: tb})
	}
	rev, err := r.commit(ctx, checks, writes)
	if err == nil {
		n.Revision = rev
	}
	return err
}

// DeleteNode forgets a node: it may attest again. A join token that it used stays used.
func (r *Registry) DeleteNode(ctx context.Context, id spiffeid.ID) (store.Revision, error) {
	n, err := r.NodeNow(ctx, id)
	if err != nil {
		return 0, err
	}
	// The token dies with the node: otherwise the same key could come back with it after an evict. [DESIGN §4]
	writes := []store.Write{{Key: nodeKey(id), Delete: true}, {Key: ackKey(id), Delete: true}}
	if t, ok := strings.CutPrefix(id.Path(), agentPathPrefix+"join_token/"); ok {
		writes = append(writes, store.Write{Key: tokenPrefix + t, Delete: true})
	}
	return r.commit(ctx, []store.Check{{Key: nodeKey(id), Modified: n.Revision}}, writes)
}

// NoteEnds tells the followers which entries came to their end since the last call, or hold again because the clock
// was set back, and returns the former. Issuance needs no notice: it looks at the end itself.
func (r *Registry) NoteEnds() []*Entry {
	now := r.c.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ix.asOf = now
	var ch changes
	var ended []*Entry
	endings := func(yield func(EntryID, *Entry) bool) {
		for _, m := range []map[EntryID]*Entry{r.ix.ending, r.ix.derived.ending} {
			for id, e := range m {
				if !yield(id, e) {
					return
				}
			}
		}
	}
	for id, e := range endings {
		is := e.Expired(now)
		if is == r.ix.ended[id] {
			continue
		}
		r.ix.ended[id] = is
		ch.policySide = r.ix.noteHint(e.SPIFFEID) || ch.policySide
		ch.entries = append(ch.entries, entryChange{e, e})
		ch.roots = ch.roots || e.alias()
		switch {
		case e.Template != nil:
			r.ix.endTemplated(e, &ch)
		case e.Pod == nil:
			r.ix.retake(e, nil, &ch)
		}
		if is && e.Pod == nil { // of a templated Identity its own end is noted
			ended = append(ended, e)
		}
	}
	r.follow.mark(r.ix, &ch)
	r.notifyChanged(&ch)
	return ended
}

// sweepGrace is how long what has ended is kept: a clock that jumped forward and is set right again shall not have
// destroyed anything.
const sweepGrace = 24 * time.Hour

// Sweep deletes what ended a day ago: entries past expires_at, and join tokens past their expiry. It returns the entries
// that it removed.
func (r *Registry) Sweep(ctx context.Context) ([]*Entry, error) {
	now := r.c.Now().Add(-sweepGrace)
	var entries, gone []*Entry
	var checks []store.Check
	r.mu.RLock()
	for _, e := range r.ix.ending {
		if e.Expired(now) {
			entries = append(entries, e)
			checks = append(checks, store.Check{Key: entryPrefix + string(e.ID), Modified: e.Revision})
		}
	}
	for _, t := range r.ix.tokens {
		if now.After(t.ExpiresAt) {
			checks = append(checks, store.Check{Key: tokenPrefix + t.ID, Modified: t.Revision})
		}
	}
	r.mu.RUnlock()
	for chunk := range slices.Chunk(checks, store.MaxWrites) {
		var writes []store.Write
		for _, c := range chunk {
			writes = append(writes, store.Write{Key: c.Key, Delete: true})
		}
		mine := entries[:min(len(entries), len(chunk))]
		entries = entries[len(mine):]
		_, err := r.commit(ctx, chunk, writes)
		switch {
		case err == nil:
			gone = append(gone, mine...)
		case !errors.Is(err, ErrConflict): // after a conflict somebody was faster; look again next time
			return gone, err
		}
	}
	return gone, nil
}
