package etcd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-id/signet/ca/store"
)

const (
	// lookEvery is how often the members are asked for their sizes while commits are made or room is short.
	lookEvery = 10 * time.Second

	// recordOverhead is about what etcd needs for a key besides its bytes: its revision, the index, pages that are half full.
	recordOverhead = 256
)

// room keeps a part of etcd's quota for commits under store.WithReserve.
//
// etcd refuses every write once its file has grown to the quota, and then until an operator has defragmented it and disarmed the
// alarm; so ordinary commits end before. What a commit may use is what the members said of their files at the last look, less
// what was written through here since; other replicas and other users of etcd show in the next look.
type room struct {
	reserve int64
	look    chan struct{} // one slot: look now

	// since counts the bytes written since the look before the last.
	since atomic.Int64

	mu      sync.Mutex // guards all below
	known   bool
	quota   int64
	free    int64 // in the fullest member, at the last look
	full    bool  // etcd itself refuses to write
	counted int64 // of since, that had been written at the last look
	// refused: a commit was, since the last look.
	refused bool
}

func newRoom(reserve int64) *room {
	return &room{reserve: reserve, look: make(chan struct{}, 1)}
}

// kept is the reserve, which leaves most of a small quota to ordinary use.
func (r *room) kept() int64 { return min(r.reserve, r.quota/8) }

// take admits a commit that writes n bytes, or returns store.ErrDiskFull.
func (r *room) take(ctx context.Context, n int) error {
	written := r.since.Add(int64(n) + recordOverhead)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known {
		return nil
	}
	if r.free-written < 2*r.kept() || written > r.kept()/4 {
		signal(r.look)
	}
	if !r.short(written) || store.UsesReserve(ctx) {
		return nil // what the reserve lacks etcd says itself
	}
	r.since.Add(-int64(n) - recordOverhead)
	r.refused = true
	return fmt.Errorf("%w: etcd's quota of %d bytes is used but for %d, which are kept for renewals (compact and defragment etcd, or raise --quota-backend-bytes)", store.ErrDiskFull, r.quota, r.free)
}

// short tells whether, after so much was written, the largest commit might not leave the reserve alone. mu is held.
func (r *room) short(written int64) bool {
	return r.known && r.free-written < r.kept()+store.MaxCommitBytes
}

// spent notes that etcd itself refused to write.
func (r *room) spent() {
	r.mu.Lock()
	r.full = true
	r.mu.Unlock()
	signal(r.look)
}

func (r *room) health() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.full:
		return fmt.Errorf("%w: etcd refuses to write", store.ErrDiskFull)
	case r.refused, r.short(r.since.Load()):
		return fmt.Errorf("%w: %d bytes of etcd's quota are left, for renewals only", store.ErrDiskFull, r.free)
	}
	return nil
}

func isFull(err error) bool { return errors.Is(err, store.ErrDiskFull) }

// sizes is what a member says of itself.
type sizes struct {
	size, inUse, quota int64
	alarms             []string
}

// free is how much can still be written. etcd looks at the end of the pages that were ever used, and so does this, until most of
// them are free again: then they are used first. Close to the quota nothing counts any more.
func (z sizes) free() int64 {
	switch {
	case z.size+2*store.MaxCommitBytes >= z.quota:
		return 0
	case z.inUse < z.size/2:
		return z.quota - 2*z.inUse
	}
	return z.quota - z.size
}

// saw takes what the members said. They say it as of their last write to disk, a tenth of a second ago or more; so what was written
// since the look before this one counts until the next.
func (r *room) saw(members []sizes) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counted = r.since.Add(-r.counted)
	r.known, r.full, r.refused = false, false, false
	for _, z := range members {
		for _, a := range z.alarms {
			r.full = r.full || a == alarmNoSpace
		}
		if z.quota <= 0 {
			continue // it does not say
		}
		if !r.known || z.free() < r.free {
			r.free, r.quota = z.free(), z.quota
		}
		r.known = true
	}
}

// keepRoom looks at the members' sizes, at the start, while there are commits, and as long as room is short.
func (s *Store) keepRoom() {
	was := error(nil)
	for first := true; ; first = false {
		if first || s.room.since.Load() > 0 || s.room.health() != nil {
			s.lookAtRoom(s.closing)
		}
		now := s.room.health()
		switch {
		case now != nil && was == nil:
			s.c.Log.Error("etcd has no room: the store takes only renewals", "err", now)
		case now == nil && was != nil:
			s.c.Log.Info("etcd has room again")
		}
		was = now
		t := time.NewTimer(jittered(lookEvery))
		select {
		case <-s.closing.Done():
			t.Stop()
			return
		case <-t.C:
		case <-s.room.look:
			t.Stop()
			// Not at once, so that a burst of commits is looked at once.
			if !pause(s.closing, 200*time.Millisecond) {
				return
			}
		}
	}
}

func (s *Store) lookAtRoom(ctx context.Context) {
	var members []sizes
	for _, e := range s.c.Endpoints {
		if z, err := s.status(ctx, e); err == nil {
			members = append(members, z)
		} else {
			s.c.Log.Debug("asking a member of etcd for its size", "endpoint", e, "err", err)
		}
	}
	if len(members) > 0 {
		s.room.saw(members)
	}
}
