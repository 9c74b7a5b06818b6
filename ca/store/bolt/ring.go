package bolt

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/signet-id/signet/ca/store"
)

const (
	// maxRingEvents and maxRingBytes bound the commits kept for Watch, whichever is reached first.
	maxRingEvents = 65536
	maxRingBytes  = 64 << 20

	// eventOverhead is about what an event costs in memory besides its key and value.
	eventOverhead = 96
)

// ring holds the newest commits. Watchers have no queue of their own: they read from here at their own pace, and one that
// falls behind its oldest commit has to list again.
type ring struct {
	mu      sync.Mutex // guards all below; held only for memory operations
	batches []store.Batch
	events  int
	bytes   int
	// Every commit after floor is in batches. newest is durable.
	floor, newest store.Revision
	changed       chan struct{} // closed and replaced by each publish
	err           error         // set once: why there will be no more
	maxEvents     int
}

func newRing(at store.Revision, maxEvents int) *ring {
	return &ring{floor: at, newest: at, changed: make(chan struct{}), maxEvents: maxEvents}
}

// publish makes durable commits visible, oldest first.
func (r *ring) publish(batches []store.Batch) {
	if len(batches) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.batches = append(r.batches, batches...)
	for _, b := range batches {
		r.events += len(b.Events)
		r.bytes += batchBytes(b)
	}
	r.newest = batches[len(batches)-1].Revision
	drop := 0
	for drop < len(r.batches) && (r.events > r.maxEvents || r.bytes > maxRingBytes) {
		b := r.batches[drop]
		r.events -= len(b.Events)
		r.bytes -= batchBytes(b)
		r.floor = b.Revision
		drop++
	}
	clear(r.batches[:drop])
	r.batches = r.batches[drop:]
	close(r.changed)
	r.changed = make(chan struct{})
}

func batchBytes(b store.Batch) int {
	n := 0
	for _, e := range b.Events {
		n += len(e.Key) + len(e.Value) + eventOverhead
	}
	return n
}

// stop ends all waiting with err. Only the first call counts.
func (r *ring) stop(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = err
		close(r.changed)
		r.changed = make(chan struct{})
	}
}

// failure returns why the store has stopped, or nil.
func (r *ring) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// wait returns once rev is durable.
//
// bbolt lets readers see a commit while it is still being synced. An answer that used it would outlive a power cut that
// the commit does not, and the same revision would then be given to another commit.
func (r *ring) wait(ctx context.Context, rev store.Revision) error {
	for {
		r.mu.Lock()
		done, err, changed := r.newest >= rev, r.err, r.changed
		r.mu.Unlock()
		switch {
		case done:
			return nil
		case err != nil:
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unchanged returns store.ErrCompacted unless it is known that nothing under prefix was changed after from, up to to.
func (r *ring) unchanged(prefix string, from, to store.Revision) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if from < r.floor {
		return fmt.Errorf("%w: revision %d, the oldest is %d", store.ErrCompacted, from, r.floor)
	}
	for _, b := range r.batches[r.after(from):] {
		if b.Revision > to {
			break
		}
		if slices.ContainsFunc(b.Events, func(e store.Event) bool { return strings.HasPrefix(e.Key, prefix) }) {
			return fmt.Errorf("%w: revision %d, keys under %q were changed at %d", store.ErrCompacted, from, prefix, b.Revision)
		}
	}
	return nil
}

// after returns the index of the first batch after rev. The caller holds mu.
func (r *ring) after(rev store.Revision) int {
	return sort.Search(len(r.batches), func(i int) bool { return r.batches[i].Revision > rev })
}

func (r *ring) watch(from store.Revision) (*watcher, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.err != nil:
		return nil, r.err
	case from > r.newest:
		return nil, fmt.Errorf("%w: revision %d, the newest is %d", store.ErrFuture, from, r.newest)
	case from < r.floor:
		return nil, fmt.Errorf("%w: revision %d, the oldest is %d", store.ErrCompacted, from, r.floor)
	}
	return &watcher{ring: r, at: from, closed: make(chan struct{})}, nil
}

// watcher implements store.Watcher.
type watcher struct {
	ring   *ring
	at     store.Revision // delivered up to here
	lost   error          // set once at has left the ring
	once   sync.Once
	closed chan struct{}
}

func (w *watcher) Next(ctx context.Context) (store.Batch, error) {
	for {
		select {
		case <-w.closed:
			return store.Batch{}, store.ErrClosed
		default:
		}
		if w.lost != nil {
			return store.Batch{}, w.lost
		}
		batch, ok, changed, err := w.look()
		if ok || err != nil {
			return batch, err
		}
		select {
		case <-changed:
		case <-w.closed:
		case <-ctx.Done():
			return store.Batch{}, ctx.Err()
		}
	}
}

func (w *watcher) look() (batch store.Batch, ok bool, changed <-chan struct{}, err error) {
	r := w.ring
	r.mu.Lock()
	defer r.mu.Unlock()
	if w.at < r.floor {
		w.lost = fmt.Errorf("%w: this watcher is at revision %d, the oldest is %d", store.ErrCompacted, w.at, r.floor)
		return store.Batch{}, false, nil, w.lost
	}
	if i := r.after(w.at); i < len(r.batches) {
		w.at = r.batches[i].Revision
		return r.batches[i], true, nil, nil
	}
	// What is durable is delivered even after the store has stopped.
	return store.Batch{}, false, r.changed, r.err
}

func (w *watcher) Close() { w.once.Do(func() { close(w.closed) }) }
