// Package store says what the CA needs of the place that keeps its state: ordered keys, one revision counter,
// all-or-nothing commits that check what they build on, and a gapless watch.
//
// store/bolt keeps the state in one file for one CA; store/etcd keeps it in etcd for several replicas. Both pass the
// suite in store/storetest. The callers are the packages under ca that hold indexes in memory: they List once, Watch from
// there on, and never read the store to answer a request. The store is inside the trust boundary, and nothing secret may
// be put into it in clear.
package store

import (
	"context"
)

// Limits of one Commit. They hold for every store, so that nothing which works on one fails on another.
const (
	// MaxWrites is the largest number of writes in a Commit. etcd's own limit is 128 operations, and as many checks.
	MaxWrites = 100

	// MaxChecks is the largest number of checks in a Commit: one for each write, and some for what else it builds on.
	MaxChecks = 120

	// MaxCommitBytes is the largest sum of all keys and values in a Commit, checks included. etcd refuses requests over 1.5 MiB.
	MaxCommitBytes = 1 << 20

	// MaxKeyBytes is the longest key. A SPIFFE ID of 2048 bytes fits twice, less a little.
	MaxKeyBytes = 4000
)

// A Revision numbers the commits of one store history. It rises strictly with each commit and may skip; 0 is never a
// revision. Revisions of two histories (see Store.Epoch) cannot be compared.
type Revision int64

// An Item is a key with its value and where both come from.
type Item struct {
	Key   string
	Value []byte // the caller's own copy

	// Created is the commit that made the key, Modified the one that last wrote it. A key that was deleted and made
	// again has a new Created.
	Created, Modified Revision
}

// A Check is what a Commit builds on: the key still has the value last written at Modified. Modified 0 means that the key
// must not exist.
type Check struct {
	Key      string
	Modified Revision
}

// A Write sets a key, or removes it if Delete is set. Removing a key that does not exist is no change and no error.
type Write struct {
	Key    string
	Value  []byte
	Delete bool
}

// An Event is one change. For a removal Deleted is set, and of the Item only Key and Modified (the revision of the removal).
type Event struct {
	Item
	Deleted bool
}

// A Batch holds the changes of one commit, in the order of its writes. Readers share it and must not change it.
type Batch struct {
	Revision Revision
	Events   []Event
}

// A Store keeps the state of one trust domain. All methods may be called from any number of goroutines. After Close all
// of them return ErrClosed.
type Store interface {
	// Get returns the newest value of key, or ErrNotFound.
	Get(ctx context.Context, key string) (Item, error)

	// List calls yield for each item whose key begins with prefix, in ascending byte order of the keys, all as of one
	// revision, which it returns. An at of 0 asks for the newest; any other at returns exactly that state, or
	// ErrCompacted if it can no longer be had, or ErrFuture if it does not exist yet. An error from yield ends List and
	// is returned as it is. yield must not call the store, and should be quick: the store may hold resources for it.
	List(ctx context.Context, prefix string, at Revision, yield func(Item) error) (Revision, error)

	// Commit makes all writes, provided that all checks hold, or none, and returns the revision it made. What it returned
	// without error survives the loss of power. A commit that changes nothing (no writes, or only removals of keys that
	// do not exist) makes no revision and returns the newest.
	//
	// Errors: *ConflictError for a check that does not hold; ErrTooLarge over the limits above; ErrInvalid for an empty or
	// overlong key or a key written twice; ErrDiskFull, see WithReserve.
	//
	// When ctx ends before the answer is there, Commit returns its error, and the writes may still take effect: whoever
	// needs to know reads the keys again. The same holds for ErrUnavailable. After every other error nothing was changed.
	Commit(ctx context.Context, checks []Check, writes []Write) (Revision, error)

	// Watch follows every commit after from, in order and without gaps. It returns ErrCompacted if the commits after from
	// are no longer known, and ErrFuture if from is newer than the newest revision: in both cases the caller lists again.
	// The caller closes the Watcher. ctx covers only the call itself.
	Watch(ctx context.Context, from Revision) (Watcher, error)

	// Barrier returns a revision that is at least as new as every commit acknowledged, to anyone, before the call. Who
	// holds that revision knows all that was committed before.
	Barrier(ctx context.Context) (Revision, error)

	// Epoch returns the random name of this store history, made when the store was made.
	Epoch() string

	// Close lets the commits under way end, ends all watches with ErrClosed and releases the store.
	Close() error
}

// A Watcher hands out the commits after one revision. It is for one goroutine; only Close may be called from others.
type Watcher interface {
	// Next waits for the next commit. A reader that is so slow that the store has forgotten what comes next gets
	// ErrCompacted, from then on, and lists again. After Close of the watcher or of the store, Next returns ErrClosed.
	// When ctx ends, Next returns its error and nothing is lost: the next call goes on where this one was.
	Next(ctx context.Context) (Batch, error)

	// Close ends the watch. It may be called more than once.
	Close()
}

type reserveKey struct{}

// WithReserve marks the commits made under the returned context as necessary for identities that exist already, such as
// the renewal of an agent's SVID. They may use the headroom that the store keeps for a full disk, where all others get
// ErrDiskFull. When the headroom is spent, they get it too.
func WithReserve(ctx context.Context) context.Context {
	return context.WithValue(ctx, reserveKey{}, true)
}

// UsesReserve reports whether ctx comes from WithReserve. It is for implementations of Store.
func UsesReserve(ctx context.Context) bool {
	on, _ := ctx.Value(reserveKey{}).(bool)
	return on
}

type fenceKey struct{}

// WithFence makes commits under the returned context build on one more check, which only the caller's own term fulfils: what a
// former leader still commits when it wakes up is a conflict. Who commits for others, such as the registry, adds it by Fence.
func WithFence(ctx context.Context, c Check) context.Context {
	return context.WithValue(ctx, fenceKey{}, c)
}

// Fence returns the check of WithFence, if there is one.
func Fence(ctx context.Context) (Check, bool) {
	c, ok := ctx.Value(fenceKey{}).(Check)
	return c, ok
}
