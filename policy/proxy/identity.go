package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/jwtauth"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/source"
)

// identity is what the agent gives this process: X509-SVIDs, bundles, and call policies with revocations. There is nothing of it
// before the agent is there, and while the agent is away the last of it stays. It is safe for concurrent use.
type identity struct {
	addr       string
	maxOffline time.Duration
	log        *slog.Logger
	now        func() time.Time

	x509     atomic.Pointer[workloadapi.X509Context]
	jwt      atomic.Pointer[jwtbundle.Set]
	policies atomic.Pointer[policySource]
	client   atomic.Pointer[workloadapi.Client]

	changed func() // called after each change; must not block

	mu          sync.Mutex
	subscribers map[chan struct{}]struct{}
	caches      map[spiffeid.ID]*jwtauth.Cache
}

// A policySource has the policies of the moment; a source.Source is one.
type policySource interface{ Policies() *policy.Policies }

// errNoAgent is why there is no identity yet.
var errNoAgent = errors.New("the agent has not given an identity to this process yet")

// run keeps it up to date until ctx ends.
func (i *identity) run(ctx context.Context) error {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(i.addr), workloadapi.WithBackoffStrategy(retries{}))
	if err != nil {
		return fmt.Errorf("agent_socket: %w", err)
	}
	i.client.Store(client)
	var g sync.WaitGroup
	g.Go(func() {
		again(ctx, func() error { return client.WatchX509Context(ctx, x509Watcher{i}) })
	})
	g.Go(func() {
		again(ctx, func() error { return client.WatchJWTBundles(ctx, jwtWatcher{i}) })
	})
	g.Go(func() {
		again(ctx, func() error { return i.watchPolicies(ctx) })
	})
	g.Wait()
	return client.Close()
}

// watchPolicies holds a source of policies until ctx ends. The source comes back by itself; only the first set can fail.
func (i *identity) watchPolicies(ctx context.Context) error {
	s, err := source.New(ctx, source.Options{Addr: i.addr, MaxOffline: i.maxOffline, Log: i.log, Now: i.now})
	if err != nil {
		if ctx.Err() == nil {
			i.log.Error("call policies of the agent refused; everything is denied", "err", err)
		}
		return err
	}
	defer s.Close()
	var p policySource = s
	i.policies.Store(&p)
	for {
		i.changed()
		i.tell()
		select {
		case <-ctx.Done():
			return nil
		case <-s.Updated():
		}
	}
}

// Subscribe returns a channel with one slot that is filled after each change of the policies, until stop is called.
func (i *identity) Subscribe() (changed <-chan struct{}, stop func()) {
	c := make(chan struct{}, 1)
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.subscribers == nil {
		i.subscribers = make(map[chan struct{}]struct{})
	}
	i.subscribers[c] = struct{}{}
	return c, func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		delete(i.subscribers, c)
	}
}

// tell says to subscribers that the policies have changed.
func (i *identity) tell() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for c := range i.subscribers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// again calls f until ctx ends, with pauses that grow.
func again(ctx context.Context, f func() error) {
	wait := retries{}.NewBackoff()
	for ctx.Err() == nil {
		if f() == nil {
			wait.Reset()
		}
		timer := time.NewTimer(wait.Next())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// retries are how often the agent is asked again: soon, since a restart takes it a moment, and not all workloads at once.
type retries struct{}

const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// NewBackoff is workloadapi.BackoffStrategy's.
func (retries) NewBackoff() workloadapi.Backoff { return &retry{wait: firstRetry} }

type retry struct{ wait time.Duration }

func (r *retry) Next() time.Duration {
	now := r.wait/2 + rand.N(r.wait/2)
	r.wait = min(2*r.wait, lastRetry)
	return now
}

func (r *retry) Reset() { r.wait = firstRetry }

type x509Watcher struct{ *identity }

// OnX509ContextUpdate is workloadapi.X509ContextWatcher's.
func (w x509Watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	if w.x509.Swap(c) == nil {
		w.log.Info("the agent has given X509-SVIDs to this process", "spiffe_ids", names(c))
	}
	w.changed()
}

// OnX509ContextWatchError is workloadapi.X509ContextWatcher's.
func (w x509Watcher) OnX509ContextWatchError(err error) {
	w.log.Warn("no X509-SVIDs from the agent at present; trying again", "err", err)
}

type jwtWatcher struct{ *identity }

// OnJWTBundlesUpdate is workloadapi.JWTBundleWatcher's.
func (w jwtWatcher) OnJWTBundlesUpdate(b *jwtbundle.Set) { w.jwt.Store(b) }

// OnJWTBundlesWatchError is workloadapi.JWTBundleWatcher's.
func (w jwtWatcher) OnJWTBundlesWatchError(err error) {
	w.log.Debug("no JWT bundles from the agent at present; trying again", "err", err)
}

// Policies returns the policies of the moment; nil, which denies everything, before there are any.
func (i *identity) Policies() *policy.Policies {
	if p := i.policies.Load(); p != nil {
		return (*p).Policies()
	}
	return nil
}

// Observe tells the source of the policies what was decided by them.
func (i *identity) Observe(j policy.Judgement) {
	if p := i.policies.Load(); p != nil {
		if o, ok := (*p).(policy.Observer); ok {
			o.Observe(j)
		}
	}
}

// GetX509BundleForTrustDomain is x509bundle.Source's.
func (i *identity) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	c := i.x509.Load()
	if c == nil {
		return nil, errNoAgent
	}
	return c.Bundles.GetX509BundleForTrustDomain(td)
}

// GetJWTBundleForTrustDomain is jwtbundle.Source's.
func (i *identity) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	b := i.jwt.Load()
	if b == nil {
		return nil, errNoAgent
	}
	return b.GetJWTBundleForTrustDomain(td)
}

// svid is the newest X509-SVID of one SPIFFE ID; of the default one if the ID is zero.
type svid struct {
	from *identity
	id   spiffeid.ID
}

// GetX509SVID is x509svid.Source's.
func (s svid) GetX509SVID() (*x509svid.SVID, error) {
	c := s.from.x509.Load()
	if c == nil {
		return nil, errNoAgent
	}
	for _, held := range c.SVIDs {
		if held.ID == s.id || s.id.IsZero() {
			return held, nil
		}
	}
	return nil, fmt.Errorf("the agent gives this process no X509-SVID of %s, but of %s; signet why with the number of this process says why", s.id, names(c))
}

// problem says why the SVID cannot be used now; empty: it can.
func (s svid) problem(now time.Time) string {
	held, err := s.GetX509SVID()
	if err != nil {
		return err.Error()
	}
	if end := held.Certificates[0].NotAfter; now.After(end) {
		return fmt.Sprintf("the X509-SVID of %s has expired at %s", held.ID, end.UTC().Format(time.RFC3339))
	}
	return ""
}

func names(c *workloadapi.X509Context) string {
	if len(c.SVIDs) == 0 {
		return "none"
	}
	var list []string
	for _, s := range c.SVIDs {
		list = append(list, s.ID.String())
	}
	return strings.Join(list, " ")
}
