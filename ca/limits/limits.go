// Package limits bounds how often each of many callers may do something: a token bucket for each, in a table that cannot
// grow beyond its size however many callers there are. It knows nothing of who they are or what they do.
package limits

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// MaxCallers is how many callers a Table remembers at most. Whoever is forgotten begins with a full bucket, so that a
// flood from many addresses takes nothing from those who call seldom.
const MaxCallers = 1 << 16

// tellEvery is how often a refusal is told of anew while the same caller goes on to call too often.
const tellEvery = time.Minute

// A Limit is a token bucket: Rate tokens come in a second, and Burst of them are kept.
type Limit struct{ Rate, Burst int }

// An ExceededError says that a caller is over its limit.
type ExceededError struct {
	// RetryAfter is when there would be enough tokens. Zero: never, since more were asked for than a full bucket holds.
	RetryAfter time.Duration
	// First is set for the first refusal of this caller in a minute, for logs that a flood must not fill.
	First bool
	Limit Limit
}

func (e *ExceededError) Error() string {
	if e.RetryAfter == 0 {
		return fmt.Sprintf("more than %d at once", e.Limit.Burst)
	}
	return fmt.Sprintf("more than %d a second", e.Limit.Rate)
}

// A Table holds the buckets of callers that K tells apart. It is safe for concurrent use.
type Table[K comparable] struct {
	limit   Limit
	maxWait time.Duration

	// mu guards the two generations of buckets and what is in them. Who calls is moved to the younger one; when that is
	// full, the older one is forgotten: nobody who called lately is, and nothing has to be swept.
	mu         sync.Mutex
	young, old map[K]*bucket
	generation int // most of one
}

// A bucket is less than empty while somebody waits for its tokens.
type bucket struct {
	tokens float64
	filled time.Time // when tokens was true
	told   time.Time // of a refusal
}

// NewTable returns a Table whose callers wait for tokens for maxWait at most.
func NewTable[K comparable](l Limit, maxWait time.Duration) *Table[K] {
	return &Table[K]{limit: l, maxWait: maxWait, young: map[K]*bucket{}, generation: MaxCallers / 2}
}

// Take takes n tokens of a caller's, and waits for them if they come soon: within the Table's bound and the end of ctx.
// Otherwise it returns an *ExceededError at once and takes nothing. Those who wait for one bucket are bounded with that:
// by the tokens that come in the time. If ctx is cancelled meanwhile, its error is returned.
func (t *Table[K]) Take(ctx context.Context, k K, n int) error {
	now, most := time.Now(), t.maxWait
	if deadline, ok := ctx.Deadline(); ok {
		most = min(most, deadline.Sub(now))
	}
	wait, err := t.take(k, float64(n), now, most)
	if wait == 0 || err != nil {
		return err
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		t.giveBack(k, float64(n))
		return ctx.Err()
	}
}

func (t *Table[K]) take(k K, n float64, now time.Time, most time.Duration) (wait time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.bucket(k, now)
	perSecond := float64(t.limit.Rate)
	b.tokens = min(float64(t.limit.Burst), b.tokens+max(0, now.Sub(b.filled)).Seconds()*perSecond)
	b.filled = now
	if n > float64(t.limit.Burst) {
		return 0, t.exceeded(b, now, 0)
	}
	if short := n - b.tokens; short > 0 {
		if wait = time.Duration(short / perSecond * float64(time.Second)); wait > most {
			return 0, t.exceeded(b, now, wait)
		}
	}
	b.tokens -= n
	return wait, nil
}

// giveBack is for a caller who waited and is gone.
func (t *Table[K]) giveBack(k K, n float64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.bucket(k, time.Now())
	b.tokens = min(float64(t.limit.Burst), b.tokens+n)
}

// exceeded makes the error of a refusal. mu is held.
func (t *Table[K]) exceeded(b *bucket, now time.Time, retry time.Duration) error {
	first := b.told.IsZero() || now.Sub(b.told) >= tellEvery
	if first {
		b.told = now
	}
	return &ExceededError{RetryAfter: retry, First: first, Limit: t.limit}
}

// bucket finds a caller's bucket, or makes a full one. mu is held.
func (t *Table[K]) bucket(k K, now time.Time) *bucket {
	if b := t.young[k]; b != nil {
		return b
	}
	b := t.old[k]
	if b == nil {
		b = &bucket{tokens: float64(t.limit.Burst), filled: now}
	}
	if len(t.young) >= t.generation {
		t.old, t.young = t.young, make(map[K]*bucket)
	}
	t.young[k] = b
	return b
}

// Callers returns how many callers are remembered.
func (t *Table[K]) Callers() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.young) + len(t.old)
}

// sitePrefix is how much of an IPv6 address counts: a customer gets at least a /64, with more addresses than there is
// room to tell apart.
const sitePrefix = 64

// Address returns what tells callers on the network apart: an IPv4 address, or the /64 of an IPv6 address. It takes
// host:port or a host alone; what is neither is the zero value, which all such callers share.
func Address(s string) netip.Addr {
	var a netip.Addr
	if ap, err := netip.ParseAddrPort(s); err == nil {
		a = ap.Addr()
	} else if a, err = netip.ParseAddr(s); err != nil {
		return netip.Addr{}
	}
	if a = a.Unmap().WithZone(""); a.Is6() {
		if p, err := a.Prefix(sitePrefix); err == nil {
			return p.Addr()
		}
	}
	return a
}
