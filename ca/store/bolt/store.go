// Package bolt is the store of a single CA: one file, nothing to install.
//
// It implements store.Store on bbolt. One goroutine writes; commits that arrive while it syncs share the next sync, and
// each keeps its own revision and stays all or nothing. The newest commits are kept in memory for Watch. Every record
// carries a checksum, the file as a whole a count and a digest: a damaged file is refused when it is opened, with what is
// wrong with it, and never used in part. The file keeps allocated room for a full disk.
//
// The data directory holds store.db, store.lock (flock, with the number of the process that holds it) and, during the
// first start only, store.db.new.
package bolt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/durable"
)

// formatVersion is the newest format that this code reads and the one it writes.
const formatVersion = 1

// DefaultReserve is the headroom in bytes if Config.Reserve is 0.
const DefaultReserve = 16 << 20

// DefaultLockTimeout is the wait for a CA that is just ending if Config.LockTimeout is 0.
const DefaultLockTimeout = time.Second

var (
	// ErrLocked says that another process uses the data directory.
	ErrLocked = errors.New("store is in use")

	// ErrNewerFormat says that a newer signet wrote the store. Nothing was touched.
	ErrNewerFormat = errors.New("store was written by a newer version of signet")
)

// Config says where the store is and what it may use.
type Config struct {
	// Dir is the data directory. It is made, with mode 0700, if it does not exist.
	Dir string

	// Reserve is the room in bytes that is kept for commits under store.WithReserve when the disk is full. Zero means
	// DefaultReserve. It takes effect on file systems that can allocate ahead (ext4, XFS, Btrfs, tmpfs).
	Reserve int64

	// LockTimeout is how long Open waits for another process to let go of Dir. Zero means DefaultLockTimeout, a negative
	// value no wait.
	LockTimeout time.Duration

	// Log gets what an operator should know. Nil means slog.Default.
	Log *slog.Logger
}

// Store implements store.Store. Use Open.
type Store struct {
	path     string
	epoch    string
	log      *slog.Logger
	lockFile *os.File
	db       *bolt.DB
	ring     *ring

	queue    chan *request
	closing  chan struct{} // closed by Close
	finished chan struct{} // closed by the writer at its end
	once     sync.Once
	closeErr error

	// readers counts those between enter and leave, for Close. mu makes enter and Close exclude each other.
	mu      sync.Mutex
	readers sync.WaitGroup
	shut    bool

	full atomic.Bool // the disk is: only the reserve is left

	// Only the writer uses these.
	state    state
	headroom headroom
}

var _ store.Store = (*Store)(nil)

// Open opens the store in cfg.Dir, or makes it. It reads and checks the whole file, about 0.1 s for 100,000 items.
//
// Errors: ErrLocked, ErrNewerFormat, store.ErrCorrupt (nothing was changed in these cases) and those of the file system.
func Open(cfg Config) (*Store, error) {
	if cfg.Dir == "" {
		return nil, errors.New("opening store: no data directory is given")
	}
	if cfg.Reserve < 0 {
		return nil, fmt.Errorf("opening store: a reserve of %d bytes is negative", cfg.Reserve)
	}
	if cfg.Reserve == 0 {
		cfg.Reserve = DefaultReserve
	}
	if cfg.LockTimeout == 0 {
		cfg.LockTimeout = DefaultLockTimeout
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s, err := open(cfg, maxRingEvents)
	if err != nil {
		return nil, fmt.Errorf("opening store %s: %w", filepath.Join(cfg.Dir, fileName), err)
	}
	go s.run()
	return s, nil
}

func open(cfg Config, ringEvents int) (_ *Store, err error) {
	if err := durable.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	lockFile, err := lock(cfg.Dir, cfg.LockTimeout)
	if err != nil {
		return nil, err
	}
	s := &Store{
		path:     filepath.Join(cfg.Dir, fileName),
		log:      cfg.Log,
		lockFile: lockFile,
		queue:    make(chan *request, maxQueued),
		closing:  make(chan struct{}),
		finished: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if err := create(cfg.Dir); err != nil {
		return nil, diskFull(err)
	}
	if s.epoch, s.state, err = inspect(s.path); err != nil {
		return nil, err
	}
	opts := options()
	opts.OpenFile = func(name string, flag int, mode os.FileMode) (*os.File, error) {
		f, err := os.OpenFile(name, flag&^os.O_CREATE, mode)
		s.headroom.file = f
		return f, err
	}
	err = guard(func() error {
		s.db, err = bolt.Open(s.path, 0o600, opts)
		return openError(err)
	})
	if err != nil {
		return nil, diskFull(err)
	}
	s.headroom.reserve = cfg.Reserve
	s.ring = newRing(s.state.revision, ringEvents)
	return s, s.makeHeadroom()
}

func (s *Store) makeHeadroom() error {
	tx, err := s.db.Begin(false)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	free, err := s.headroom.ensure(tx.Size(), 0)
	if err != nil {
		return fmt.Errorf("allocating %d bytes ahead: %w", s.headroom.reserve, err)
	}
	switch {
	case s.headroom.blind:
		s.log.Warn("the file system cannot allocate ahead, renewals have no reserve when the disk is full", "path", s.path)
	case free < s.headroom.reserve:
		s.full.Store(true)
		s.log.Error("the disk is full, the store takes only renewals", "path", s.path, "reserve_bytes", free)
	}
	return nil
}

func diskFull(err error) error {
	if isFull(err) {
		return fmt.Errorf("%w: %w", store.ErrDiskFull, err)
	}
	return err
}

// Epoch implements store.Store.
func (s *Store) Epoch() string { return s.epoch }

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.Item, error) {
	if err := store.CheckKey(key); err != nil {
		return store.Item{}, err
	}
	var it store.Item
	rev, err := s.view(ctx, func(tx *bolt.Tx) error {
		var found bool
		var err error
		it, _, found, err = read(tx.Bucket(itemBucket), key)
		if err == nil && !found {
			return store.ErrNotFound
		}
		it.Value = append([]byte{}, it.Value...)
		return err
	})
	if err == nil || errors.Is(err, store.ErrNotFound) {
		// Without this wait not even the absence of the key is certain.
		if werr := s.ring.wait(ctx, rev); werr != nil {
			err = werr
		}
	}
	if err != nil {
		return store.Item{}, fmt.Errorf("reading key %q: %w", key, err)
	}
	return it, nil
}

// List implements store.Store. An old revision can be had as long as nothing under prefix was changed since.
func (s *Store) List(ctx context.Context, prefix string, at store.Revision, yield func(store.Item) error) (store.Revision, error) {
	if at < 0 {
		return 0, fmt.Errorf("listing %q: %w: revision %d cannot exist", prefix, store.ErrInvalid, at)
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.readers.Done()
	tx, err := s.db.Begin(false)
	if err != nil {
		return 0, fmt.Errorf("listing %q: %w", prefix, err)
	}
	defer tx.Rollback()
	l := lister{tx: tx, prefix: []byte(prefix)}
	rev, err := s.listRevision(ctx, tx, prefix, at)
	for err == nil && !l.done {
		if err = guard(l.fill); err != nil {
			break
		}
		// Outside of guard, so that a fault of the caller's is not taken for damage of the file.
		for _, it := range l.items {
			if err := yield(it); err != nil {
				return 0, err
			}
		}
		err = ctx.Err()
	}
	if err != nil {
		return 0, fmt.Errorf("listing %q: %w", prefix, s.judge(err))
	}
	return rev, nil
}

// listRevision returns the revision that a List at at in tx has.
func (s *Store) listRevision(ctx context.Context, tx *bolt.Tx, prefix string, at store.Revision) (store.Revision, error) {
	var st state
	err := guard(func() error {
		var err error
		st, err = readState(tx)
		return err
	})
	if err != nil {
		return 0, err
	}
	if at > st.revision {
		return 0, fmt.Errorf("%w: revision %d, the newest is %d", store.ErrFuture, at, st.revision)
	}
	if err := s.ring.wait(ctx, st.revision); err != nil {
		return 0, err
	}
	if at == 0 {
		return st.revision, nil
	}
	return at, s.ring.unchanged(prefix, at, st.revision)
}

// listItems and listBytes bound what a List copies at a time.
const (
	listItems = 256
	listBytes = 1 << 20
)

// lister reads the items under prefix in portions.
type lister struct {
	tx     *bolt.Tx
	prefix []byte
	cursor *bolt.Cursor
	items  []store.Item
	done   bool
}

// fill replaces items by the next ones.
func (l *lister) fill() error {
	var k, v []byte
	if l.cursor == nil {
		l.cursor = l.tx.Bucket(itemBucket).Cursor()
		k, v = l.cursor.Seek(l.prefix)
	} else {
		k, v = l.cursor.Next()
	}
	l.items = l.items[:0]
	for size := 0; ; k, v = l.cursor.Next() {
		if k == nil || !bytes.HasPrefix(k, l.prefix) {
			l.done = true
			return nil
		}
		it, _, err := parseRecord(string(k), v)
		if err != nil {
			return err
		}
		it.Value = append([]byte{}, it.Value...)
		l.items = append(l.items, it)
		size += len(it.Key) + len(it.Value)
		if len(l.items) >= listItems || size >= listBytes {
			return nil
		}
	}
}

// view runs f in a read transaction of which it returns the revision.
func (s *Store) view(ctx context.Context, f func(*bolt.Tx) error) (rev store.Revision, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.readers.Done()
	err = guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			st, err := readState(tx)
			if err != nil {
				return err
			}
			rev = st.revision
			return f(tx)
		})
	})
	return rev, s.judge(err)
}

// judge stops the store if err says that it is damaged.
func (s *Store) judge(err error) error {
	if errors.Is(err, store.ErrCorrupt) {
		return s.fail(fmt.Errorf("store %s: %w", s.path, err))
	}
	return err
}

// enter keeps the file open until readers.Done is called.
func (s *Store) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shut {
		return store.ErrClosed
	}
	if err := s.ring.failure(); err != nil {
		return err
	}
	s.readers.Add(1)
	return nil
}

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, from store.Revision) (store.Watcher, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w, err := s.ring.watch(from)
	if err != nil {
		return nil, fmt.Errorf("watching from revision %d: %w", from, err)
	}
	return w, nil
}

// Barrier implements store.Store.
func (s *Store) Barrier(ctx context.Context) (store.Revision, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	// A commit is in the ring before it is acknowledged.
	s.ring.mu.Lock()
	defer s.ring.mu.Unlock()
	return s.ring.newest, s.ring.err
}

// Health returns nil if the store takes every commit, store.ErrDiskFull if it takes only those under store.WithReserve
// (as of the last commit), and otherwise why it takes none.
func (s *Store) Health() error {
	if err := s.ring.failure(); err != nil {
		return err
	}
	if s.full.Load() {
		return fmt.Errorf("store %s: %w", s.path, store.ErrDiskFull)
	}
	return nil
}

// fail stops the store for good and returns why it has stopped, which is an earlier reason if there is one.
func (s *Store) fail(err error) error {
	if s.ring.failure() == nil {
		s.log.Error("the store has stopped", "path", s.path, "err", err)
	}
	s.ring.stop(err)
	return s.ring.failure()
}

// stopped says why a Commit found no writer.
func (s *Store) stopped() error {
	if err := s.ring.failure(); err != nil {
		return err
	}
	return store.ErrClosed
}

// Close implements store.Store. It waits for the writer and for all reads.
func (s *Store) Close() error {
	s.once.Do(func() {
		close(s.closing)
		<-s.finished
		s.mu.Lock()
		s.shut = true
		s.mu.Unlock()
		s.ring.stop(store.ErrClosed)
		s.readers.Wait()
		s.closeErr = s.release()
	})
	return s.closeErr
}

func (s *Store) release() error {
	var err error
	if s.db != nil {
		err = guard(s.db.Close)
	} else if s.headroom.file != nil {
		_ = s.headroom.file.Close() // bbolt has closed it already, unless it ended in a panic
	}
	return errors.Join(err, s.lockFile.Close())
}
