package etcd

import (
	"context"
	"time"

	"github.com/signet-id/signet/ca/store"
)

// WithBuffer makes watchers let go of what their reader leaves unread beyond n events.
func (c Config) WithBuffer(n int) Config {
	c.bufferEvents = n
	return c
}

// WithHeartbeat is how often a watch is asked for a sign of life.
func (c Config) WithHeartbeat(d time.Duration) Config {
	c.heartbeat = d
	return c
}

// Overflows counts the watchers that let go of their queues.
func (s *Store) Overflows() int64 { return s.overflows.Load() }

// Foreign counts the revisions that nobody's commit made.
func (s *Store) Foreign() int64 { return s.foreign.Load() }

// Compact removes the history before rev.
func (s *Store) Compact(ctx context.Context, rev store.Revision) error { return s.compact(ctx, rev) }

// CompactionTurn is one look of keepCompacting's.
func (s *Store) CompactionTurn(ctx context.Context, seen int64) (int64, store.Revision, error) {
	return s.compactionTurn(ctx, seen)
}

// Remember writes down the newest revision.
func (s *Store) Remember() error { return s.remember() }

// LookAtRoom asks the members for their sizes.
func (s *Store) LookAtRoom(ctx context.Context) { s.lookAtRoom(ctx) }

// AskMembers asks the members whether they answer.
func (s *Store) AskMembers(ctx context.Context) { s.askMembers(ctx) }

// EpochRecord makes the value under which an epoch is kept.
func EpochRecord(name string) string { return seal(epochKey, []byte(name)) }

// Seal and Unseal make and read what etcd keeps under a key.
func Seal(key string, value []byte) string             { return seal(key, value) }
func Unseal(key string, record []byte) ([]byte, error) { return unseal(key, record) }

// ItemPrefix is where etcd has the items.
func (s *Store) ItemPrefix() string { return s.itemKey("") }
