package jwtauth

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

// A Fetcher fetches JWT-SVIDs: a workloadapi.Client or a workloadapi.JWTSource of go-spiffe.
type Fetcher interface {
	FetchJWTSVID(context.Context, jwtsvid.Params) (*jwtsvid.SVID, error)
}

// Defaults and bounds of a Cache.
const (
	DefaultMaxAudiences = 64
	DefaultFetchTimeout = 10 * time.Second
	maxAudienceBytes    = 2048

	// spare is how much of its life a token still has when it is handed out, so that it arrives before its end.
	spare = 5 * time.Second
	// firstRetry and lastRetry bound the wait after a renewal that failed; the real one has jitter.
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
	// renewPause is how often a callee's refusal has a token renewed before its time, at most.
	renewPause = 10 * time.Second
	// maxSleep is the longest wait without a look at the clock, which can be set.
	maxSleep = 30 * time.Second
)

// Config says how a Cache works. Fetcher is required.
type Config struct {
	Fetcher Fetcher
	// Subject is whose tokens are wanted. Zero: those of the workload's default identity.
	Subject spiffeid.ID
	// MaxAudiences is how many tokens are kept; the one that was used longest ago makes way. Zero means 64.
	MaxAudiences int
	// FetchTimeout bounds one fetch, whoever waits for it. Zero means 10 seconds.
	FetchTimeout time.Duration
	// Log gets renewals that fail. Nil means slog.Default.
	Log *slog.Logger
	// Now is the clock. Nil means time.Now.
	Now func() time.Time
}

// A Cache keeps a token for each audience that is asked for. While it holds a valid one nobody waits: it is renewed behind,
// in time, as long as it is in use. Fetches for one audience at the same moment are one. It is safe for concurrent use.
type Cache struct {
	c      Config
	ctx    context.Context // of fetches; it ends with Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	wake   chan struct{} // one slot: look again for what is due

	mu     sync.Mutex // guards what follows, and what is in slots. No fetch is made under it.
	slots  map[string]*slot
	uses   uint64
	closed bool
}

// A slot is what is known for one audience.
type slot struct {
	audience string
	token    *Token
	life     time.Duration // that the token had when it came
	came     time.Time     // by the clock of the configuration
	mono     time.Time     // by the clock that nobody sets
	due      time.Time     // when it is to be renewed
	renewed  time.Time     // when a refusal last had it renewed
	used     bool          // since it came
	use      uint64        // order of the last use
	failures int
	flight   *flight
}

// A flight is one fetch. err and token are set when done is closed.
type flight struct {
	done  chan struct{}
	token *Token
	err   error
}

// ErrClosed is the error of a Cache after Close.
var ErrClosed = errors.New("jwtauth: the token cache is closed")

// New returns a Cache. Close ends what it does in the background.
func New(c Config) (*Cache, error) {
	switch {
	case c.Fetcher == nil:
		return nil, errors.New("jwtauth: config field Fetcher is nil; use a workloadapi.Client or a workloadapi.JWTSource")
	case c.MaxAudiences < 0:
		return nil, fmt.Errorf("jwtauth: config field MaxAudiences is %d; it must not be negative", c.MaxAudiences)
	case c.FetchTimeout < 0:
		return nil, fmt.Errorf("jwtauth: config field FetchTimeout is %v; it must not be negative", c.FetchTimeout)
	}
	if c.MaxAudiences == 0 {
		c.MaxAudiences = DefaultMaxAudiences
	}
	if c.FetchTimeout == 0 {
		c.FetchTimeout = DefaultFetchTimeout
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	cache := &Cache{c: c, wake: make(chan struct{}, 1), slots: map[string]*slot{}}
	cache.ctx, cache.cancel = context.WithCancel(context.Background())
	cache.tasks.Go(cache.keep)
	return cache, nil
}

// Close ends all fetches and waits for them. It may be called more than once.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.tasks.Wait()
	return nil
}

// Token returns a token for an audience. It waits, until ctx ends, only if there is no valid one.
func (c *Cache) Token(ctx context.Context, audience string) (*Token, error) {
	if audience == "" || len(audience) > maxAudienceBytes {
		return nil, fmt.Errorf("jwtauth: the audience has %d bytes; it must have 1 to %d", len(audience), maxAudienceBytes)
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, ErrClosed
	}
	s := c.slot(audience)
	if now := c.now(); s.valid(now) {
		token := s.token
		if !now.Before(s.due) { // it was not in use when it was due
			c.fetch(s)
		}
		c.mu.Unlock()
		return token, nil
	}
	f := c.fetch(s)
	c.mu.Unlock()
	select {
	case <-f.done:
		return f.token, f.err
	case <-ctx.Done():
		return nil, fmt.Errorf("jwtauth: waiting for a JWT-SVID for %q: %w", audience, context.Cause(ctx))
	}
}

// Source returns a TokenSource for one audience. Its Token waits for at most the timeout of a fetch.
func (c *Cache) Source(audience string) TokenSource { return source{c, audience} }

type source struct {
	cache    *Cache
	audience string
}

func (s source) Token() (*Token, error) { return s.cache.Token(s.cache.ctx, s.audience) }

// Refused says that the callee did not take a token: its authority may have been revoked. A new one is fetched behind, at
// most every ten seconds; the old one is handed out until it is there.
func (c *Cache) Refused(audience string, t *Token) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, now := c.slots[audience], c.now()
	if c.closed || s == nil || s.token != t || now.Sub(s.renewed).Abs() < renewPause {
		return
	}
	s.renewed = now
	c.fetch(s)
}

// now is the wall clock: the monotonic one stands still while a machine sleeps.
func (c *Cache) now() time.Time { return c.c.Now().Round(0) }

// slot returns the one for an audience, and notes its use. mu is held.
func (c *Cache) slot(audience string) *slot {
	s := c.slots[audience]
	if s == nil {
		if len(c.slots) >= c.c.MaxAudiences {
			c.evict()
		}
		s = &slot{audience: audience}
		c.slots[audience] = s
	}
	c.uses++
	s.use, s.used = c.uses, true
	return s
}

// evict makes room for one more. A fetch that is under way ends by itself. mu is held.
func (c *Cache) evict() {
	var oldest *slot
	for _, s := range c.slots {
		if oldest == nil || s.use < oldest.use {
			oldest = s
		}
	}
	delete(c.slots, oldest.audience)
}

// valid tells whether the token can be handed out. Both clocks count: one is set, and the other stands still in sleep.
func (s *slot) valid(now time.Time) bool {
	return s.token != nil && now.Before(s.token.Expiry.Add(-spare)) && time.Since(s.mono) < s.life-spare
}

// fetch returns the fetch for s that is under way, or begins one. mu is held.
func (c *Cache) fetch(s *slot) *flight {
	if s.flight != nil {
		return s.flight
	}
	f := &flight{done: make(chan struct{})}
	s.flight = f
	c.tasks.Go(func() {
		defer close(f.done)
		ctx, cancel := context.WithTimeoutCause(c.ctx, c.c.FetchTimeout, fmt.Errorf("the Workload API took longer than %v", c.c.FetchTimeout))
		defer cancel()
		svid, err := c.c.Fetcher.FetchJWTSVID(ctx, jwtsvid.Params{Audience: s.audience, Subject: c.c.Subject})
		switch {
		case c.ctx.Err() != nil:
			err = ErrClosed
		case err != nil && ctx.Err() != nil:
			err = context.Cause(ctx)
		}
		c.land(s, f, svid, err)
	})
	return f
}

// land notes what a fetch brought.
func (c *Cache) land(s *slot, f *flight, svid *jwtsvid.SVID, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.flight = nil
	now := c.now()
	if err == nil {
		err = c.check(svid, now)
	}
	if err != nil {
		f.err = fmt.Errorf("jwtauth: fetching a JWT-SVID for %q: %w", s.audience, err)
		// Half to the whole of the wait: programs that lost their agent do not all come back at once.
		wait := min(lastRetry, firstRetry<<min(s.failures, 10))
		s.failures++
		if now.Before(s.came) { // the clock was set back: it is due from here on
			s.came = now
		}
		s.due = now.Add(wait/2 + rand.N(wait/2))
		if s.token != nil && !errors.Is(err, ErrClosed) {
			c.c.Log.Warn("a JWT-SVID was not renewed; the old one is used until it expires", "audience", s.audience, "expires", s.token.Expiry, "err", err)
		}
	} else {
		s.token = &Token{AccessToken: svid.Marshal(), TokenType: "Bearer", Expiry: svid.Expiry, ID: svid.ID}
		s.life, s.came, s.mono, s.used, s.failures = svid.Expiry.Sub(now), now, time.Now(), false, 0
		// Between half and three quarters of its life: agents renew theirs at half.
		s.due = now.Add(s.life/2 + rand.N(s.life/4))
		f.token = s.token
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// check refuses a token that is of no use.
func (c *Cache) check(svid *jwtsvid.SVID, now time.Time) error {
	switch {
	case svid == nil:
		return errors.New("the Workload API returned none")
	case !c.c.Subject.IsZero() && svid.ID != c.c.Subject:
		return fmt.Errorf("the Workload API returned one of %q instead of %q", svid.ID, c.c.Subject)
	case svid.Expiry.Sub(now) <= spare:
		return fmt.Errorf("the Workload API returned one that ends at %s, and it is %s", svid.Expiry.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

// keep renews what is in use in its time, and drops what is not when it ends.
func (c *Cache) keep() {
	timer := time.NewTimer(maxSleep)
	defer timer.Stop()
	for {
		timer.Reset(c.renewDue())
		select {
		case <-c.ctx.Done():
			return
		case <-c.wake:
		case <-timer.C:
		}
	}
}

// renewDue begins to renew what is due, and returns how long to wait for the next.
func (c *Cache) renewDue() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wait := c.now(), maxSleep
	for audience, s := range c.slots {
		switch left := s.due.Sub(now); {
		case s.flight != nil || s.token == nil || c.closed: // whoever asks next fetches
		case left > 0 && now.After(s.came.Add(-spare)):
			wait = min(wait, left)
		case s.used: // it is time, or the clock was set back to before it came
			c.fetch(s)
		case !s.valid(now):
			delete(c.slots, audience)
		}
	}
	return max(wait, 10*time.Millisecond)
}
