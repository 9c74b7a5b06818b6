// Package etcd is the store of a CA of several replicas: an etcd that the operator runs.
//
// It implements store.Store on etcd's v3 API. Each Commit is one transaction that compares the revisions of what it builds on,
// and writes, last of all, a mark: the newest mark's revision is the newest of the store, however much else is in etcd. Each Watcher
// is one watch of etcd's, started again wherever it was cut, and a reader that is too slow for etcd's history is told so. Values
// carry a checksum. Room is kept out of etcd's quota, history is compacted by one of the replicas, and a state that went back, as
// after a restore, stops the store. See docs/decisions/0042-etcd.md.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/signet-id/signet/ca/store"
)

const (
	keepaliveTime    = 10 * time.Second // gRPC allows no less
	keepaliveTimeout = 3 * time.Second

	// listItems and listBytes bound what a List asks for at a time. The second is a guess from the page before.
	listItems = 1000
	listBytes = 2 << 20
)

// kv is a key with its value as etcd has it.
type kv = mvccpb.KeyValue

// Store implements store.Store. Use Open.
type Store struct {
	c       Config
	client  *clientv3.Client
	history history
	room    *room
	members *members

	closing context.Context // ended by Close or fail
	stop    context.CancelFunc
	tasks   sync.WaitGroup
	once    sync.Once

	// mu makes enter and Close exclude each other.
	mu       sync.Mutex
	calls    sync.WaitGroup
	shut     bool
	failed   error // why the store has stopped by itself
	watchers map[*watcher]struct{}

	overflows atomic.Int64 // watchers that let go of what their reader was too slow for
	foreign   atomic.Int64 // revisions that no signet made
}

var _ store.Store = (*Store)(nil)

// Open connects to etcd and finds the store, or makes it. It tries until ctx ends or, if etcd cannot be reached, twice
// Config.Timeout is over.
//
// Errors: ErrHistory, store.ErrCorrupt, store.ErrUnavailable and what is wrong with the configuration.
func Open(ctx context.Context, c Config) (*Store, error) {
	var errs []error
	c.Check(func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	})
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	s, err := open(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("opening store %s in etcd: %w", c.Prefix, err)
	}
	return s, nil
}

func open(ctx context.Context, c Config) (_ *Store, err error) {
	tls, err := c.tls()
	if err != nil {
		return nil, err
	}
	password, err := c.password()
	if err != nil {
		return nil, err
	}
	s := &Store{c: c, watchers: map[*watcher]struct{}{}, room: newRoom(c.Reserve), members: newMembers(c.Endpoints)}
	s.closing, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			s.stop()
			if s.client != nil {
				s.client.Close()
			}
		}
	}()
	octx, cancel := context.WithTimeout(ctx, 2*c.Timeout)
	defer cancel()
	s.client, err = clientv3.New(clientv3.Config{Endpoints: c.Endpoints, TLS: tls, Username: c.Username, Password: password, DialTimeout: c.Timeout,
		DialKeepAliveTime: keepaliveTime, DialKeepAliveTimeout: keepaliveTimeout, Context: s.closing, Logger: zap.NewNop()})
	if err != nil {
		return nil, s.mapped(octx, err)
	}
	for wait := newBackoff(); ; {
		err := s.openHistory(octx)
		if err == nil {
			break
		}
		if errors.Is(err, ErrHistory) || errors.Is(err, store.ErrCorrupt) {
			return nil, err
		}
		if err := s.mapped(octx, err); !errors.Is(err, store.ErrUnavailable) || octx.Err() != nil || !wait.sleep(octx) {
			if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
				err = fmt.Errorf("%w: no answer in %v; %w", store.ErrUnavailable, 2*c.Timeout, c.reach(ctx, tls))
			}
			return nil, err
		}
	}
	s.tasks.Go(s.keepRoom)
	s.tasks.Go(s.keepMembers)
	s.tasks.Go(s.keepMemory)
	if c.Compaction > 0 {
		s.tasks.Go(s.keepCompacting)
	}
	return s, nil
}

// Epoch implements store.Store.
func (s *Store) Epoch() string { return s.history.epoch }

func (s *Store) key(name string) string { return s.c.Prefix + name }

func (s *Store) itemKey(key string) string { return s.c.Prefix + itemSpace + key }

// item turns what etcd has into an Item.
func (s *Store) item(x *kv) (store.Item, error) {
	key := strings.TrimPrefix(string(x.Key), s.c.Prefix+itemSpace)
	value, err := unseal(itemSpace+key, x.Value)
	return store.Item{Key: key, Value: value, Created: store.Revision(x.CreateRevision), Modified: store.Revision(x.ModRevision)}, err
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.Item, error) {
	if err := store.CheckKey(key); err != nil {
		return store.Item{}, err
	}
	var it store.Item
	err := s.call(ctx, func(ctx context.Context) error {
		rsp, err := s.client.Get(ctx, s.itemKey(key))
		if err != nil {
			return err
		}
		if err := s.checkCluster(rsp.Header); err != nil {
			return err
		}
		if len(rsp.Kvs) == 0 {
			return store.ErrNotFound
		}
		it, err = s.item(rsp.Kvs[0])
		return err
	})
	if err != nil {
		return store.Item{}, fmt.Errorf("reading key %q: %w", key, err)
	}
	return it, nil
}

// List implements store.Store.
func (s *Store) List(ctx context.Context, prefix string, at store.Revision, yield func(store.Item) error) (store.Revision, error) {
	if at < 0 {
		return 0, fmt.Errorf("listing %q: %w: revision %d cannot exist", prefix, store.ErrInvalid, at)
	}
	l := lister{s: s, from: s.itemKey(prefix), end: clientv3.GetPrefixRangeEnd(s.itemKey(prefix)), limit: listItems, at: at}
	for !l.done {
		if err := s.call(ctx, l.fill); err != nil {
			return 0, fmt.Errorf("listing %q: %w", prefix, err)
		}
		for _, it := range l.items {
			if err := yield(it); err != nil {
				return 0, err
			}
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
	}
	return l.rev, nil
}

// lister reads the items of a range in portions, all as of one revision.
type lister struct {
	s         *Store
	from, end string
	limit     int64
	at        store.Revision // asked for
	rev       store.Revision // what List returns
	read      int64          // the revision of etcd's at which the portions are read; 0: not known yet
	items     []store.Item
	done      bool
}

// fill replaces items by the next ones.
func (l *lister) fill(ctx context.Context) error {
	l.items = l.items[:0]
	opts := []clientv3.OpOption{clientv3.WithRange(l.end), clientv3.WithLimit(l.limit)}
	if l.at > 0 {
		opts = append(opts, clientv3.WithRev(int64(l.at)))
	} else if l.read > 0 {
		opts = append(opts, clientv3.WithRev(l.read))
	}
	before := l.s.history.known()
	// The mark comes with the first portion, so that both are of one moment.
	ops := []clientv3.Op{clientv3.OpGet(l.s.key(markKey)), clientv3.OpGet(l.from, opts...)}
	if l.at > 0 {
		// etcd answers a future revision with an error for both.
		ops = ops[:1]
	}
	if l.read == 0 {
		rsp, err := l.s.client.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return err
		}
		if err := l.s.checkCluster(rsp.Header); err != nil {
			return err
		}
		m, err := l.s.parseMark(rsp.Responses[0].GetResponseRange().Kvs)
		if err != nil {
			return err
		}
		if err := l.s.checkMark(m, before); err != nil {
			return err
		}
		l.read, l.rev = rsp.Header.Revision, m.Revision
		if l.at == 0 {
			r := rsp.Responses[1].GetResponseRange()
			return l.take(r.Kvs, r.More)
		}
		if l.at > m.Revision {
			return fmt.Errorf("%w: revision %d, the newest is %d", store.ErrFuture, l.at, m.Revision)
		}
		l.rev = l.at
	}
	rsp, err := l.s.client.Get(ctx, l.from, opts...)
	if err != nil {
		return err
	}
	if err := l.s.checkCluster(rsp.Header); err != nil {
		return err
	}
	return l.take(rsp.Kvs, rsp.More)
}

func (l *lister) take(kvs []*kv, more bool) error {
	size := 0
	for _, x := range kvs {
		it, err := l.s.item(x)
		if err != nil {
			return err
		}
		l.items = append(l.items, it)
		size += len(it.Key) + len(it.Value)
	}
	l.done = !more || len(kvs) == 0
	if n := len(kvs); n > 0 {
		l.from = string(kvs[n-1].Key) + "\x00"
		l.limit = int64(max(1, min(listItems, listBytes/max(1, size/n))))
	}
	return nil
}

// Barrier implements store.Store.
func (s *Store) Barrier(ctx context.Context) (store.Revision, error) {
	var m mark
	err := s.call(ctx, func(ctx context.Context) (err error) {
		m, err = s.newest(ctx)
		return err
	})
	return m.Revision, err
}

// newest reads the newest mark from a quorum of the members.
func (s *Store) newest(ctx context.Context) (mark, error) {
	before := s.history.known()
	rsp, err := s.client.Get(ctx, s.key(markKey))
	if err != nil {
		return mark{}, err
	}
	if err := s.checkCluster(rsp.Header); err != nil {
		return mark{}, err
	}
	m, err := s.parseMark(rsp.Kvs)
	if errors.Is(err, ErrHistory) {
		err = s.fail(err)
	}
	if err != nil {
		return mark{}, err
	}
	return m, s.checkMark(m, before)
}

// call makes one request, bounded by Config.Timeout and by Close.
func (s *Store) call(ctx context.Context, f func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.calls.Done()
	rctx, cancel := context.WithTimeout(ctx, s.c.Timeout)
	defer cancel()
	err := f(rctx)
	if err != nil && rctx.Err() != nil && ctx.Err() == nil {
		s.members.suspect()
	}
	return s.mapped(ctx, err)
}

// enter keeps the client open until calls.Done is called.
func (s *Store) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shut {
		return store.ErrClosed
	}
	if s.failed != nil {
		return s.failed
	}
	s.calls.Add(1)
	return nil
}

// mapped turns an error of a request, made for ctx, into one of package store.
func (s *Store) mapped(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{store.ErrNotFound, store.ErrCorrupt, store.ErrCompacted, store.ErrFuture, store.ErrDiskFull, store.ErrUnavailable, store.ErrClosed, store.ErrTooLarge, ErrHistory} {
		if errors.Is(err, known) {
			return err
		}
	}
	if _, conflict := errors.AsType[*store.ConflictError](err); conflict {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	switch e := rpctypes.Error(err); {
	case errors.Is(e, rpctypes.ErrNoSpace):
		return fmt.Errorf("%w: etcd is over its quota (compact, defragment, raise --quota-backend-bytes, then etcdctl alarm disarm)", store.ErrDiskFull)
	case errors.Is(e, rpctypes.ErrCompacted):
		return store.ErrCompacted
	case errors.Is(e, rpctypes.ErrFutureRev):
		return store.ErrFuture
	case errors.Is(e, rpctypes.ErrTooManyOps), errors.Is(e, rpctypes.ErrRequestTooLarge):
		return fmt.Errorf("%w: %w (etcd's --max-txn-ops and --max-request-bytes must not be below their defaults)", store.ErrTooLarge, err)
	case errors.Is(e, rpctypes.ErrCorrupt):
		return fmt.Errorf("%w: %w", store.ErrCorrupt, err)
	case errors.Is(e, rpctypes.ErrPermissionDenied):
		return fmt.Errorf("%w: %w (the user needs a role that may read and write the prefix %s)", store.ErrUnavailable, err, s.c.Prefix)
	}
	return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
}

// fail stops the store for good and returns why it has stopped, which is an earlier reason if there is one.
func (s *Store) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = err
		s.c.Log.Error("the store has stopped", "prefix", s.c.Prefix, "err", err)
		for w := range s.watchers {
			w.finish(err)
		}
	}
	return s.failed
}

// Health returns nil if the store takes every commit, store.ErrDiskFull if it takes only those under store.WithReserve, and
// otherwise why it takes none, as of the last look, which is made every few seconds.
func (s *Store) Health() error {
	s.mu.Lock()
	failed := s.failed
	s.mu.Unlock()
	if failed != nil {
		return failed
	}
	if err := s.members.health(); err != nil {
		return err
	}
	return s.room.health()
}

// Close implements store.Store. It waits for the requests under way, each of which is bounded.
func (s *Store) Close() error {
	var err error
	s.once.Do(func() {
		s.mu.Lock()
		s.shut = true
		for w := range s.watchers {
			w.finish(store.ErrClosed)
		}
		s.mu.Unlock()
		s.calls.Wait()
		s.stop()
		s.tasks.Wait()
		if err := s.remember(); err != nil {
			s.c.Log.Warn("remembering the store's newest revision", "err", err)
		}
		err = s.client.Close()
		if errors.Is(err, context.Canceled) {
			err = nil // of our own doing
		}
	})
	return err
}
