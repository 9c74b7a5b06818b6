package bolt

import (
	"context"
	"errors"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/signet-id/signet/ca/store"
)

const (
	// maxQueued bounds the commits that wait for the writer. Further callers wait for a place.
	maxQueued = 1024

	// maxGroupWrites and maxGroupBytes bound what shares one sync.
	maxGroupWrites = 1000
	maxGroupBytes  = 8 << 20
)

// A request is one Commit on its way through the writer.
type request struct {
	checks  []store.Check
	writes  []store.Write
	reserve bool
	done    chan result // has room for the one answer
}

type result struct {
	revision store.Revision
	err      error
}

// Commit implements store.Store.
func (s *Store) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	if err := store.CheckCommit(checks, writes); err != nil {
		return 0, err
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	// When ctx ends early, the writer still reads the request: it must not share memory with the caller.
	r := &request{
		checks:  slices.Clone(checks),
		writes:  slices.Clone(writes),
		reserve: store.UsesReserve(ctx),
		done:    make(chan result, 1),
	}
	for i := range r.writes {
		if r.writes[i].Delete {
			r.writes[i].Value = nil
		} else {
			r.writes[i].Value = append([]byte{}, r.writes[i].Value...)
		}
	}
	select {
	case <-s.closing:
		return 0, s.stopped()
	default:
	}
	select {
	case s.queue <- r:
	case <-s.closing:
		return 0, s.stopped()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case res := <-r.done:
		return res.revision, res.err
	case <-s.finished:
		// The writer has ended. It answered this request before, or it never saw it.
		select {
		case res := <-r.done:
			return res.revision, res.err
		default:
			return 0, s.stopped()
		}
	case <-ctx.Done():
		return 0, fmt.Errorf("%w (the commit may still take effect)", ctx.Err())
	}
}

// run is the writer. It ends when closing is closed and the queue is empty.
func (s *Store) run() {
	defer close(s.finished)
	var held *request // taken from the queue, but too large for the group before it
	for {
		first := held
		held = nil
		if first == nil {
			select {
			case first = <-s.queue:
			case <-s.closing:
				select {
				case first = <-s.queue:
				default:
					return
				}
			}
		}
		var group []*request
		group, held = s.gather(first)
		s.commit(group)
	}
}

// gather takes what is waiting already. It does not wait for more: while one group is synced, the next one queues up.
func (s *Store) gather(first *request) (group []*request, held *request) {
	group = []*request{first}
	writes, bytes := len(first.writes), first.bytes()
	for {
		select {
		case r := <-s.queue:
			writes += len(r.writes)
			bytes += r.bytes()
			if writes > maxGroupWrites || bytes > maxGroupBytes {
				return group, r
			}
			group = append(group, r)
		default:
			return group, nil
		}
	}
}

func (r *request) bytes() int {
	n := 0
	for _, w := range r.writes {
		n += len(w.Key) + len(w.Value)
	}
	return n
}

// commit makes one bbolt transaction of the group and answers each request.
func (s *Store) commit(group []*request) {
	if err := s.ring.failure(); err != nil {
		answer(group, result{err: err})
		return
	}
	var g outcome
	err := guard(func() error { return s.transact(group, &g) })
	switch {
	case err == nil:
		s.state = g.state
		s.ring.publish(g.batches)
		for i, r := range group {
			r.done <- g.results[i]
		}
	case errors.Is(err, store.ErrDiskFull):
		answer(group, result{err: err})
	case errors.Is(err, store.ErrCorrupt):
		answer(group, result{err: s.fail(fmt.Errorf("store %s: %w", s.path, err))})
	default:
		// After a failed sync nobody knows what is on the disk, and asking again gives no truer answer: the kernel
		// forgets the failure. Only a new start, which reads the file from the disk, may go on.
		answer(group, result{err: s.fail(fmt.Errorf("%w: writing %s: %w (restart the CA once the disk is well)", store.ErrUnavailable, s.path, err))})
	}
}

func answer(group []*request, res result) {
	for _, r := range group {
		r.done <- res
	}
}

// outcome is what a transaction leads to once it is durable.
type outcome struct {
	state   state
	results []result
	batches []store.Batch
}

func (s *Store) transact(group []*request, g *outcome) (err error) {
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	defer func() {
		if rerr := tx.Rollback(); rerr != nil && !errors.Is(rerr, bolterrors.ErrTxClosed) {
			err = errors.Join(err, rerr)
		}
	}()
	refused, err := s.admit(tx, group)
	if err != nil {
		return err
	}
	items := tx.Bucket(itemBucket)
	g.state = s.state
	g.results = make([]result, len(group))
	for i, r := range group {
		if refused[i] {
			g.results[i].err = store.ErrDiskFull
			continue
		}
		batch, err := apply(items, r, &g.state)
		var conflict *store.ConflictError
		switch {
		case errors.As(err, &conflict):
			g.results[i].err = err
			continue
		case err != nil:
			return err
		}
		g.results[i].revision = g.state.revision
		if len(batch.Events) > 0 {
			g.batches = append(g.batches, batch)
		}
	}
	if len(g.batches) == 0 {
		return nil
	}
	if err := tx.Bucket(metaBucket).Put(stateKey, g.state.bytes()); err != nil {
		return err
	}
	return s.finish(tx)
}

// finish makes tx durable. A full disk is store.ErrDiskFull only if it is certain that nothing of tx remains.
func (s *Store) finish(tx *bolt.Tx) error {
	id := tx.ID()
	err := tx.Commit()
	if err == nil || !isFull(err) {
		return err
	}
	after, berr := s.db.Begin(false)
	if berr != nil {
		return errors.Join(err, berr)
	}
	defer after.Rollback()
	if after.ID() >= id {
		return err // the meta page was written: the transaction may or may not survive
	}
	return fmt.Errorf("%w: %w", store.ErrDiskFull, err)
}

// admit says which requests have to be refused because the disk is full.
func (s *Store) admit(tx *bolt.Tx, group []*request) (refused []bool, err error) {
	refused = make([]bool, len(group))
	var need int64
	for _, r := range group {
		need += demand(r)
	}
	free, err := s.headroom.ensure(tx.Size(), need)
	if err != nil {
		return nil, err
	}
	full := free < need+s.headroom.reserve
	s.full.Store(full)
	if !full {
		return refused, nil
	}
	var used int64
	for i, r := range group {
		limit := free
		if !r.reserve {
			limit -= s.headroom.reserve
		}
		if d := demand(r); used+d <= limit {
			used += d
		} else {
			refused[i] = true
		}
	}
	return refused, nil
}

// apply makes the writes of r in the transaction, as the revision after st.revision, and brings st up to date. A
// *store.ConflictError comes before anything was changed; any other error ends the transaction.
func apply(items *bolt.Bucket, r *request, st *state) (store.Batch, error) {
	for _, c := range r.checks {
		it, _, found, err := read(items, c.Key)
		if err != nil {
			return store.Batch{}, err
		}
		if found && it.Modified != c.Modified || !found && c.Modified != 0 {
			return store.Batch{}, &store.ConflictError{Key: c.Key}
		}
	}
	batch := store.Batch{Revision: st.revision + 1}
	for _, w := range r.writes {
		old, oldSum, found, err := read(items, w.Key)
		if err != nil {
			return store.Batch{}, err
		}
		if found {
			st.remove(oldSum)
		}
		if w.Delete {
			if !found {
				continue
			}
			if err := items.Delete([]byte(w.Key)); err != nil {
				return store.Batch{}, err
			}
			batch.Events = append(batch.Events, store.Event{Item: store.Item{Key: w.Key, Modified: batch.Revision}, Deleted: true})
			continue
		}
		it := store.Item{Key: w.Key, Value: w.Value, Created: batch.Revision, Modified: batch.Revision}
		if found {
			it.Created = old.Created
		}
		record, sum := appendRecord(make([]byte, 0, len(w.Value)+24), it)
		if err := items.Put([]byte(w.Key), record); err != nil {
			return store.Batch{}, err
		}
		st.add(sum)
		batch.Events = append(batch.Events, store.Event{Item: it})
	}
	if len(batch.Events) > 0 {
		st.revision = batch.Revision
	}
	return batch, nil
}

func read(items *bolt.Bucket, key string) (it store.Item, sum uint32, found bool, err error) {
	record := items.Get([]byte(key))
	if record == nil {
		return store.Item{}, 0, false, nil
	}
	it, sum, err = parseRecord(key, record)
	return it, sum, err == nil, err
}
