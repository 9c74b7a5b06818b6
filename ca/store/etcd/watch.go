package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/signet-id/signet/ca/store"
)

const (
	// heartbeat is how often a watch is asked for a sign of life. One that gave none for missedBeats of them is begun anew, at
	// another member if there is one: a member that hangs must not hold back a revocation until the connection is given up.
	heartbeat   = 2 * time.Second
	missedBeats = 2

	// maxBufferedEvents and maxBufferedBytes bound what a reader has not yet taken, whichever is reached first.
	maxBufferedEvents = 65536
	maxBufferedBytes  = 64 << 20

	// eventOverhead is about what an event costs in memory besides its key and value.
	eventOverhead = 96
)

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, from store.Revision) (store.Watcher, error) {
	err := s.call(ctx, func(ctx context.Context) error { return s.reaches(ctx, from) })
	if err != nil {
		return nil, fmt.Errorf("watching from revision %d: %w", from, err)
	}
	w := &watcher{s: s, at: from, changed: make(chan struct{}, 1), taken: make(chan struct{}, 1), done: make(chan struct{})}
	var wctx context.Context
	wctx, w.cancel = context.WithCancel(s.closing)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.shut:
		w.cancel()
		return nil, store.ErrClosed
	case s.failed != nil:
		w.cancel()
		return nil, s.failed
	}
	s.watchers[w] = struct{}{}
	s.tasks.Go(func() { w.run(wctx) })
	return w, nil
}

// reaches tells whether all commits after from are known.
func (s *Store) reaches(ctx context.Context, from store.Revision) error {
	m, err := s.newest(ctx)
	if err != nil {
		return err
	}
	if from > m.Revision {
		return fmt.Errorf("%w: revision %d, the newest is %d", store.ErrFuture, from, m.Revision)
	}
	return s.remembers(ctx, from)
}

// remembers tells whether etcd has the history since from.
func (s *Store) remembers(ctx context.Context, from store.Revision) error {
	if from <= 0 {
		return store.ErrCompacted
	}
	_, err := s.client.Get(ctx, s.key(markKey), clientv3.WithRev(int64(from)), clientv3.WithKeysOnly())
	return err
}

// watcher implements store.Watcher. run fills its queue, which is bounded; Next empties it.
type watcher struct {
	s      *Store
	cancel context.CancelFunc
	done   chan struct{}

	changed chan struct{} // one slot: look at queue and err again
	taken   chan struct{} // one slot: the reader asks for more after an overflow

	mu     sync.Mutex // guards all below
	queue  []store.Batch
	events int
	bytes  int
	at     store.Revision // what the reader holds
	err    error          // why there will be no more
	// lost: the queue was let go of, since it was full; the watch begins again after at once the reader asks.
	lost bool
}

// Next implements store.Watcher.
func (w *watcher) Next(ctx context.Context) (store.Batch, error) {
	for {
		if err := ctx.Err(); err != nil {
			return store.Batch{}, err
		}
		w.mu.Lock()
		if w.err != nil {
			defer w.mu.Unlock()
			return store.Batch{}, w.err
		}
		if len(w.queue) > 0 {
			b := w.queue[0]
			w.queue[0] = store.Batch{}
			w.queue = w.queue[1:]
			w.events -= len(b.Events)
			w.bytes -= batchBytes(b)
			w.at = b.Revision
			w.mu.Unlock()
			return b, nil
		}
		lost := w.lost
		w.mu.Unlock()
		if lost {
			signal(w.taken)
		}
		select {
		case <-w.changed:
		case <-ctx.Done():
			return store.Batch{}, ctx.Err()
		}
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Close implements store.Watcher.
func (w *watcher) Close() {
	w.finish(store.ErrClosed)
	w.s.mu.Lock()
	delete(w.s.watchers, w)
	w.s.mu.Unlock()
}

// finish ends the watch with err, unless it has ended.
func (w *watcher) finish(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return
	}
	w.err, w.queue, w.events, w.bytes = err, nil, 0, 0
	w.cancel()
	signal(w.changed)
}

var errOverflow = errors.New("the reader is too slow")

// run follows etcd until the watch has ended.
func (w *watcher) run(ctx context.Context) {
	defer close(w.done)
	wait := newBackoff()
	for ctx.Err() == nil {
		w.mu.Lock()
		from := w.at
		if n := len(w.queue); n > 0 {
			from = w.queue[n-1].Revision
		}
		lost := w.lost
		w.mu.Unlock()
		if lost {
			select {
			case <-w.taken:
			case <-ctx.Done():
				return
			}
			w.mu.Lock()
			w.lost = false
			w.mu.Unlock()
		}
		progressed, err := w.stream(ctx, from)
		if e := w.s.mapped(ctx, err); errors.Is(e, store.ErrCompacted) || errors.Is(e, store.ErrFuture) {
			// Both may come of a restore, which the newest commit then shows.
			rctx, rcancel := context.WithTimeout(ctx, w.s.c.Timeout)
			if _, again := w.s.newest(rctx); again != nil || errors.Is(e, store.ErrFuture) {
				err = again
			}
			rcancel()
		}
		switch mapped := w.s.mapped(ctx, err); {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errOverflow):
			continue
		case errors.Is(mapped, store.ErrCompacted), errors.Is(mapped, store.ErrCorrupt), errors.Is(mapped, ErrHistory):
			w.finish(mapped)
			return
		default:
			w.s.c.Log.Debug("the watch was cut", "after", from, "err", err)
		}
		if progressed {
			wait = newBackoff()
		}
		w.s.members.suspect()
		if !wait.sleep(ctx) {
			return
		}
	}
}

// stream makes one watch of etcd's and queues what it brings, until it is cut.
func (w *watcher) stream(ctx context.Context, from store.Revision) (progressed bool, err error) {
	// A quorum is asked first: after a restore the member at hand would wait for revisions that do not come.
	rctx, rcancel := context.WithTimeout(ctx, w.s.c.Timeout)
	if _, err = w.s.newest(rctx); err == nil {
		err = w.s.remembers(rctx, from)
	}
	rcancel()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	api := clientv3.NewWatcher(w.s.client) // with a connection's stream of its own, so that it can be given up
	defer api.Close()
	responses := api.Watch(ctx, w.s.c.Prefix, clientv3.WithPrefix(), clientv3.WithRev(int64(from)+1), clientv3.WithProgressNotify(), clientv3.WithFragment(), clientv3.WithCreatedNotify())
	a := assembler{w: w, at: from}
	beat := time.NewTicker(w.s.c.heartbeat)
	defer beat.Stop()
	for missed := 0; ; {
		select {
		case <-ctx.Done():
			return progressed, ctx.Err()
		case <-beat.C:
			if missed++; missed > missedBeats {
				return progressed, fmt.Errorf("no sign of life in %v", time.Duration(missed)*w.s.c.heartbeat)
			}
			bctx, bcancel := context.WithTimeout(ctx, w.s.c.heartbeat)
			err := api.RequestProgress(bctx)
			bcancel()
			if err != nil {
				return progressed, err
			}
		case r, ok := <-responses:
			if !ok {
				return progressed, errors.New("the watch ended")
			}
			if r.CompactRevision > 0 {
				return progressed, store.ErrCompacted
			}
			if err := r.Err(); err != nil {
				return progressed, err
			}
			if err := w.s.checkCluster(r.Header); err != nil {
				return progressed, err
			}
			missed, progressed = 0, true
			if err := a.add(&r); err != nil {
				return progressed, err
			}
		}
	}
}

// assembler puts the events of a watch together to batches.
type assembler struct {
	w     *watcher
	at    store.Revision // the last batch's
	batch store.Batch    // not yet whole
}

func (a *assembler) add(r *clientv3.WatchResponse) error {
	s := a.w.s
	for _, ev := range r.Events {
		rev := store.Revision(ev.Kv.ModRevision)
		if rev <= a.at {
			continue // sent again after a cut
		}
		if len(a.batch.Events) > 0 && rev != a.batch.Revision {
			if err := a.foreign(); err != nil {
				return err
			}
		}
		name := strings.TrimPrefix(string(ev.Kv.Key), s.c.Prefix)
		switch key, ours := strings.CutPrefix(name, itemSpace); {
		case name == markKey && ev.Type == clientv3.EventTypePut:
			nonce, err := unseal(markKey, ev.Kv.Value)
			if err != nil {
				return err
			}
			s.history.learn(mark{rev, string(nonce)})
			if err := a.whole(rev); err != nil {
				return err
			}
		case name == markKey:
			return s.fail(fmt.Errorf("%w: %q was removed below %s", ErrHistory, markKey, s.c.Prefix))
		case name == epochKey:
			if ev.Kv.ModRevision != s.history.epochMod {
				return s.fail(fmt.Errorf("%w: the store has a new epoch, which another replica gave it", ErrHistory))
			}
		case ours && ev.Type == clientv3.EventTypeDelete:
			a.batch.Revision = rev
			a.batch.Events = append(a.batch.Events, store.Event{Item: store.Item{Key: key, Modified: rev}, Deleted: true})
		case ours:
			it, err := s.item(ev.Kv)
			if err != nil {
				return err
			}
			a.batch.Revision = rev
			a.batch.Events = append(a.batch.Events, store.Event{Item: it})
		}
	}
	// All events of a revision come together, so what is left when a later one is known has no mark.
	if len(a.batch.Events) > 0 && r.IsProgressNotify() && store.Revision(r.Header.Revision) >= a.batch.Revision {
		return a.foreign()
	}
	return nil
}

// whole hands on the batch of a revision whose mark has come.
func (a *assembler) whole(rev store.Revision) error {
	b := a.batch
	a.batch = store.Batch{}
	a.at = rev
	if len(b.Events) == 0 {
		return nil
	}
	return a.w.push(b)
}

// foreign hands on what no signet wrote: it is what etcd holds, and every check builds on it.
func (a *assembler) foreign() error {
	a.w.s.foreign.Add(1)
	a.w.s.c.Log.Error("somebody else writes below the store's prefix: who can do that owns the trust domain; give the prefix to signet's user alone",
		"prefix", a.w.s.c.Prefix, "revision", int64(a.batch.Revision), "key", fmt.Sprintf("%.100q", a.batch.Events[0].Key))
	return a.whole(a.batch.Revision)
}

// push queues a batch, or lets go of the whole queue if it is full.
func (w *watcher) push(b store.Batch) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	w.events += len(b.Events)
	w.bytes += batchBytes(b)
	if len(w.queue) > 0 && (w.events > w.s.c.bufferEvents || w.bytes > maxBufferedBytes) {
		w.queue, w.events, w.bytes, w.lost = nil, 0, 0, true
		w.s.overflows.Add(1)
		return errOverflow
	}
	w.queue = append(w.queue, b)
	signal(w.changed)
	return nil
}

func batchBytes(b store.Batch) int {
	n := 0
	for _, e := range b.Events {
		n += len(e.Key) + len(e.Value) + eventOverhead
	}
	return n
}
