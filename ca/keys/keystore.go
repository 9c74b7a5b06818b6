package keys

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"go.step.sm/crypto/kms"
	"go.step.sm/crypto/kms/apiv1"
)

// Defaults of Limits.
const (
	DefaultTimeout     = 10 * time.Second
	DefaultConcurrency = 32
)

const (
	// tripAfter is how many calls in a row must fail before others fail at once instead of being sent.
	tripAfter = 3

	// A key store that is down is tried again after firstRetry, then after twice the time, and so on to lastRetry.
	firstRetry = 200 * time.Millisecond
	lastRetry  = 15 * time.Second
)

var (
	// ErrUnavailable is in the chain of every error that says that a key store did not do what it was asked in time: it is
	// slow, failing or gone. It is tried again; nobody needs to do anything but repair the key store.
	ErrUnavailable = errors.New("key store is unavailable")

	// ErrNoKey is returned by Ring.Find when the key store answered that it has no such key.
	ErrNoKey = errors.New("no such key in the key store")

	errStoreClosed = errors.New("the CA is shutting down")
)

// Limits bound what is asked of a key store.
type Limits struct {
	// Timeout bounds one call, the wait for its turn included. Zero means DefaultTimeout.
	Timeout time.Duration

	// Concurrency is the most calls under way in one key store at once, including those that hang and that nobody waits
	// for any more. Zero means DefaultConcurrency.
	Concurrency int
}

// A keyStore is one key store outside this process. It connects when it is needed, and again after a failure.
//
// A driver's calls know no context: each is made in a goroutine of its own, which holds its turn until the driver returns.
// So a key store that hangs costs at most Limits.Concurrency goroutines however long it hangs, and whoever waits for it
// stops waiting at the deadline. After tripAfter failures in a row it counts as down: then one call is let through from
// time to time, and all others fail at once.
type keyStore struct {
	place  Place
	limits Limits
	log    *slog.Logger
	turns  chan struct{}
	making chan struct{} // held while the driver makes a key, one at a time

	mu       sync.Mutex // guards what follows; no call of a driver is made under it
	conn     *connection
	opening  *opening
	closed   bool
	failures int       // in a row
	since    time.Time // of the first of them
	retryAt  time.Time
	last     error
	// refused is the PIN that the key store did not take. It is not tried again: tokens lock themselves after a few.
	refused *[32]byte
}

// A connection is one opened driver. Its fields are guarded by the keyStore's mu, but for manager and pin, which are fixed.
type connection struct {
	manager apiv1.KeyManager
	pin     secret
	signers map[string]crypto.Signer
	calls   int
	broken  bool          // no new calls; closed as soon as calls is 0
	gone    chan struct{} // closed when it is closed
}

// An opening is the making of a connection, for which several may wait.
type opening struct {
	done chan struct{}
	err  error
}

func newKeyStore(place Place, limits Limits, log *slog.Logger) *keyStore {
	if limits.Timeout == 0 {
		limits.Timeout = DefaultTimeout
	}
	if limits.Concurrency == 0 {
		limits.Concurrency = DefaultConcurrency
	}
	return &keyStore{place: place, limits: limits, log: log, turns: make(chan struct{}, limits.Concurrency), making: make(chan struct{}, 1)}
}

// ask makes one call of the driver, or two if the first failed and there is time: the connection may have been lost long
// ago. retry is false for calls that must not be made twice. What the driver's error says about the key store is noted.
func ask[T any](ctx context.Context, s *keyStore, what string, retry bool, call func(*connection) (T, error)) (T, error) {
	var none T
	if err := s.admit(what); err != nil {
		return none, err
	}
	limited, cancel := context.WithTimeout(ctx, s.limits.Timeout)
	defer cancel()
	select {
	case s.turns <- struct{}{}:
	case <-limited.Done():
		return none, s.note(ctx, what, fmt.Errorf("%d calls are under way and none ended within %v", s.limits.Concurrency, s.limits.Timeout))
	}
	type answer struct {
		value T
		err   error
	}
	answers := make(chan answer, 1)
	go func() {
		defer func() { <-s.turns }()
		value, err := once(limited, s, call)
		if err != nil && retry && !settled(err) && limited.Err() == nil {
			value, err = once(limited, s, call)
		}
		answers <- answer{value, err}
	}()
	select {
	case a := <-answers:
		return a.value, s.note(ctx, what, a.err)
	case <-limited.Done():
		return none, s.note(ctx, what, fmt.Errorf("no answer within %v", s.limits.Timeout))
	}
}

// once makes one call on a connection, and gives the connection up if it fails.
func once[T any](ctx context.Context, s *keyStore, call func(*connection) (T, error)) (T, error) {
	c, err := s.connect(ctx)
	if err != nil {
		var none T
		return none, err
	}
	value, err := call(c)
	s.release(c, err != nil && !settled(err))
	return value, c.pin.scrub(err)
}

// settled reports whether an error is an answer of a key store that works.
func settled(err error) bool {
	return errors.Is(err, ErrNoKey) || errors.Is(err, apiv1.AlreadyExistsError{}) || errors.Is(err, apiv1.NotImplementedError{})
}

// admit lets a call pass unless the key store is closed, or is down and was tried a moment ago.
func (s *keyStore) admit(what string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("%s: %w", what, errStoreClosed)
	}
	if s.failures < tripAfter {
		return nil
	}
	now := time.Now()
	if now.Before(s.retryAt) {
		return s.unavailable(what, s.last)
	}
	s.backOff(now)
	return nil
}

// backOff says when the next call is let through. The caller holds mu.
func (s *keyStore) backOff(now time.Time) {
	wait := lastRetry
	if doublings := s.failures - tripAfter; doublings < 7 {
		wait = min(firstRetry<<doublings, lastRetry)
	}
	s.retryAt = now.Add(wait/2 + rand.N(wait/2))
}

// note counts the outcome of a call and returns the error for its caller. A caller that went away says nothing about the
// key store.
func (s *keyStore) note(ctx context.Context, what string, err error) error {
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s in key store %s: %w", what, s.place, ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil || settled(err) {
		if s.failures >= tripAfter {
			s.log.Info("key store answers again", "key_store", s.place.String(), "down_for", time.Since(s.since).Truncate(time.Millisecond).String())
		}
		s.failures, s.last = 0, nil
		return err
	}
	now := time.Now()
	if s.failures == 0 {
		s.since = now
	}
	s.failures++
	s.last = err
	if s.failures == tripAfter {
		s.log.Error("key store is down", "key_store", s.place.String(), "err", err)
	}
	if s.failures >= tripAfter {
		s.backOff(now)
	}
	return s.unavailable(what, err)
}

// unavailable words the error of a call that was not answered. The caller holds mu.
func (s *keyStore) unavailable(what string, err error) error {
	return fmt.Errorf("%s: %w (%s, since %s): %w", what, ErrUnavailable, s.place, s.since.UTC().Format(time.RFC3339), err)
}

// health returns nil if the last call was answered, or else what is wrong. If the key store is down and its time to be
// tried again has come, it is tried in the background, by proof: so it recovers when nobody asks for anything.
func (s *keyStore) health(proof func(context.Context) error) error {
	s.mu.Lock()
	err, due := s.last, s.failures > 0 && !s.closed && !time.Now().Before(s.retryAt)
	if err != nil {
		err = s.unavailable("signing", err)
	}
	s.mu.Unlock()
	if due {
		// It ends at the deadline of its call, and close waits for the turn that it takes.
		go func() { _ = proof(context.Background()) }()
	}
	return err
}

// connect returns a connection that the caller releases. One at a time opens; a driver with state in this process is closed
// before it is opened again, which waits for the calls that still use it.
func (s *keyStore) connect(ctx context.Context) (*connection, error) {
	for {
		s.mu.Lock()
		switch c := s.conn; {
		case s.closed:
			s.mu.Unlock()
			return nil, errStoreClosed
		case c != nil && !c.broken:
			c.calls++
			s.mu.Unlock()
			return c, nil
		case c != nil && schemes[s.place.scheme].device:
			s.mu.Unlock()
			select {
			case <-c.gone:
				continue
			case <-ctx.Done():
				return nil, errors.New("earlier calls hang in the driver, which cannot be opened again before they end; if the key store works again, restart the CA")
			}
		case s.opening != nil:
			o := s.opening
			s.mu.Unlock()
			select {
			case <-o.done:
				if o.err != nil {
					return nil, o.err
				}
				continue
			case <-ctx.Done():
				return nil, errors.New("opening it has not ended in time")
			}
		}
		o := &opening{done: make(chan struct{})}
		s.opening = o
		s.mu.Unlock()
		c, err := s.open()
		s.mu.Lock()
		s.opening, o.err = nil, err
		if err == nil {
			c.calls, s.conn = 1, c
		}
		s.mu.Unlock()
		close(o.done)
		return c, err
	}
}

// open opens the driver.
func (s *keyStore) open() (*connection, error) {
	options, pin, err := s.place.options()
	if err != nil {
		return nil, err
	}
	sum := pin.sum()
	s.mu.Lock()
	known := s.refused != nil && *s.refused == sum
	s.mu.Unlock()
	if known {
		return nil, errors.New("the key store refused this PIN, which is not tried again, since tokens lock themselves; correct the file that pin-source names")
	}
	// The driver may keep the context for as long as it is open.
	manager, err := kms.New(context.Background(), options)
	if err != nil {
		if strings.Contains(err.Error(), "CKR_PIN_") {
			s.mu.Lock()
			s.refused = &sum
			s.mu.Unlock()
		}
		return nil, fmt.Errorf("opening it: %w", pin.scrub(err))
	}
	return &connection{manager: manager, pin: pin, signers: map[string]crypto.Signer{}, gone: make(chan struct{})}, nil
}

// release ends the use of a connection. The last user of a broken one closes it.
func (s *keyStore) release(c *connection, broken bool) {
	s.mu.Lock()
	c.calls--
	c.broken = c.broken || broken
	last := c.broken && c.calls == 0
	s.mu.Unlock()
	if last {
		s.drop(c)
	}
}

func (s *keyStore) drop(c *connection) {
	if err := c.manager.Close(); err != nil {
		s.log.Debug("closing a key store", "key_store", s.place.String(), "err", c.pin.scrub(err))
	}
	s.mu.Lock()
	if s.conn == c {
		s.conn = nil
	}
	s.mu.Unlock()
	close(c.gone)
}

// close lets calls end, for as long as a call may take, and closes the driver unless one still hangs in it.
func (s *keyStore) close() {
	s.mu.Lock()
	s.closed = true
	c := s.conn
	last := false
	if c != nil && !c.broken {
		c.broken = true
		last = c.calls == 0
	}
	s.mu.Unlock()
	if last {
		s.drop(c)
	}
	deadline := time.NewTimer(s.limits.Timeout)
	defer deadline.Stop()
	for range cap(s.turns) {
		select {
		case s.turns <- struct{}{}:
		case <-deadline.C:
			s.log.Warn("calls hang in the driver of a key store", "key_store", s.place.String())
			return
		}
	}
}
