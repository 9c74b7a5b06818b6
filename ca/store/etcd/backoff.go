package etcd

import (
	"context"
	"math/rand/v2"
	"time"
)

// Bounds of the pause between two attempts.
const (
	firstPause = 20 * time.Millisecond
	maxPause   = 2 * time.Second
)

// backoff is how long to wait before the next attempt: longer each time, with jitter, up to maxPause.
type backoff struct{ next time.Duration }

func newBackoff() *backoff { return &backoff{firstPause} }

// sleep waits and tells whether ctx is still alive.
func (b *backoff) sleep(ctx context.Context) bool {
	d := b.next/2 + rand.N(b.next/2+1)
	b.next = min(2*b.next, maxPause)
	return pause(ctx, d)
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// jittered is d, a tenth more or less, so that replicas do not all act at once.
func jittered(d time.Duration) time.Duration {
	return d*9/10 + rand.N(d/5+1)
}
