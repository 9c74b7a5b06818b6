package extauthz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Bounds of what is kept of callers.
const (
	// maxEnvoys bounds the processes whose policies are kept compiled, maxEnvoysPerUID those of one user.
	maxEnvoys, maxEnvoysPerUID = 4096, 1024

	// idleAfter is how long a process is remembered that asks no more; up to twice as long.
	idleAfter = time.Minute

	// firstWait is how long a check waits for a registered process's first SVID.
	firstWait = 10 * time.Second
)

// envoys are the processes that have asked lately, each with its IDs and its compiled policies. They follow the source as a
// stream would, so that a check costs neither a subscription nor a compilation. Who a process is, is not remembered here:
// each check is attested by itself, and what was kept for another state or for other selectors is not used.
type envoys struct {
	config Config
	limit  *workloadapi.CallLimit[uid]

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu   sync.Mutex
	byID map[uint64]*envoy // by peer.Process.ID
}

// An envoy is one process in one attested state. Its goroutine ends when the process does, when its identities are gone,
// when it has not asked for long, and with close.
type envoy struct {
	caller workloadapi.Caller
	end    context.CancelFunc
	asked  atomic.Bool

	ready chan struct{} // closed when there is a first known, or err
	err   error
	known atomic.Pointer[known]
}

// known is what a process is and what its policies say, at one moment. It never changes.
type known struct {
	services []spiffeid.ID // its own, each once, the default first
	byName   map[string]spiffeid.ID
	set      *policyv1.PolicySet
	bare     *policy.Policies // as compiled, without revocations; nil: unknown
	revoked  *policy.Revocations
	policies *policy.Policies // with the revocations
	stale    *policy.Policies // the same, once they are too old
	offline  time.Time        // since when there has been no contact to the CA; zero while there is
	apart    time.Time        // when offline was first seen, on the steady clock; zero while there is contact
	since    time.Time        // from when on the policies have not been up to date; zero if they are
	refused  time.Time        // since when there have been newer ones that could not be taken; zero if there are none
	bundles  jwtbundle.Source
}

type uid uint32

func (u uid) String() string { return fmt.Sprintf("uid %d", uint32(u)) }

func newEnvoys(c Config) *envoys {
	e := &envoys{config: c, limit: workloadapi.NewCallLimit[uid](maxEnvoys, maxEnvoysPerUID), byID: map[uint64]*envoy{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

func (e *envoys) close() {
	e.mu.Lock()
	e.cancel()
	e.mu.Unlock()
	e.done.Wait()
}

// of returns what is known of a process that was attested as caller just now.
func (e *envoys) of(ctx context.Context, p *peer.Process, caller workloadapi.Caller) (*known, error) {
	one, err := e.find(p, caller)
	if err != nil {
		return nil, err
	}
	select {
	case <-one.ready:
	default:
		select {
		case <-one.ready:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if k := one.known.Load(); k != nil {
		if !one.asked.Load() { // a look costs nothing, a write that everybody does does
			one.asked.Store(true)
		}
		return k, nil
	}
	return nil, one.err
}

func (e *envoys) find(p *peer.Process, caller workloadapi.Caller) (*envoy, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	one := e.byID[p.ID()]
	if one != nil && sameCaller(&one.caller, &caller) {
		return one, nil
	}
	if e.ctx.Err() != nil {
		return nil, workloadapi.ErrStopping
	}
	if err := e.limit.Take(uid(p.UID)); err != nil {
		return nil, fmt.Errorf("processes that ask for authorization: %w", err)
	}
	if one != nil {
		one.end()
	}
	ctx, end := context.WithCancel(e.ctx)
	one = &envoy{caller: caller, end: end, ready: make(chan struct{})}
	e.byID[p.ID()] = one
	e.done.Go(func() {
		defer e.limit.Put(uid(p.UID))
		defer end()
		one.err = e.follow(ctx, p, one)
		e.mu.Lock()
		if e.byID[p.ID()] == one {
			delete(e.byID, p.ID())
		}
		e.mu.Unlock()
		select {
		case <-one.ready:
		default:
			close(one.ready)
		}
	})
	return one, nil
}

// sameCaller reports whether two attestations of one process say the same. Usually the second is the first, remembered.
func sameCaller(a, b *workloadapi.Caller) bool {
	if n := len(a.Selectors); n != len(b.Selectors) || !a.State.Equal(b.State) {
		return false
	} else if n == 0 || &a.Selectors[0] == &b.Selectors[0] {
		return true
	}
	return !slices.ContainsFunc(b.Selectors, func(s spiffe.Selector) bool { return !slices.Contains(a.Selectors, s) })
}

// follow keeps one.known up to date. It returns why there is nothing to know.
func (e *envoys) follow(ctx context.Context, p *peer.Process, one *envoy) error {
	updates, err := e.config.Source.Watch(ctx, one.caller)
	if err != nil {
		return fmt.Errorf("the caller's identities: %w", err)
	}
	defer func() {
		one.end()
		for range updates { // until the source has let go
		}
	}()
	patience := time.NewTimer(firstWait)
	defer patience.Stop()
	idle := time.NewTicker(idleAfter)
	defer idle.Stop()
	first := true
	for {
		select {
		case u, ok := <-updates:
			switch {
			case !ok:
				return fmt.Errorf("the caller's identities: %w", workloadapi.ErrUnavailable)
			case len(u.Identities) == 0 && !u.Entitled:
				return fmt.Errorf("the caller's identities: %w", workloadapi.ErrNoIdentity)
			case len(u.Identities) == 0:
				continue // its SVIDs are on their way
			}
			one.known.Store(e.know(u, one.known.Load()))
			if first {
				first = false
				patience.Stop()
				close(one.ready)
			}
		case <-patience.C:
			return fmt.Errorf("the caller is registered, and its SVID is not there yet: %w", workloadapi.ErrUnavailable)
		case <-idle.C:
			if !one.asked.Swap(false) && !first {
				return nil
			}
		case <-p.Done():
			return peer.ErrGone
		case <-ctx.Done():
			return workloadapi.ErrStopping
		}
	}
}

// know reads an update. Policies that cannot be compiled do not replace those that could: they stay in force as they do
// when the CA is away.
func (e *envoys) know(u workloadapi.Update, before *known) *known {
	k := &known{byName: make(map[string]spiffeid.ID, len(u.Identities)), revoked: u.Revocations, offline: u.Offline, bundles: bundles(u)}
	if k.revoked == nil && before != nil {
		k.revoked = before.revoked // no word on them revives nobody
	}
	for i := range u.Identities {
		id := u.Identities[i].ID
		if name := id.String(); k.byName[name].IsZero() {
			k.byName[name] = id
			k.services = append(k.services, id)
		}
	}
	e.compile(u.Policies, before, k)
	k.policies = k.bare.WithRevocations(k.revoked)
	k.stale = k.policies.Stale()
	k.since = earlier(k.offline, k.refused)
	if !k.offline.IsZero() {
		if k.apart = time.Now(); before != nil && !before.apart.IsZero() {
			k.apart = before.apart
		}
	}
	return k
}

// compile sets what of k depends on the policies alone, which is what it was before if they are.
func (e *envoys) compile(set *policyv1.PolicySet, before, k *known) {
	if set == nil { // never synchronised, or the CA has none to tell
		return
	}
	k.set = set
	if before != nil && before.set == set {
		k.bare, k.refused = before.bare, before.refused
		return
	}
	var old *policy.Policies
	if before != nil {
		old = before.bare
	}
	var err error
	if k.bare, err = policy.CompileAfter(old, set); err == nil {
		return
	}
	e.config.Log.Error("policies of the CA cannot be read; for ext_authz the last ones stay in force until max_offline or better ones", slog.Any("err", err))
	if before != nil {
		k.bare, k.refused = before.bare, before.refused
	}
	if k.refused.IsZero() {
		k.refused = e.config.Now()
	}
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func bundles(u workloadapi.Update) jwtbundle.Source {
	set := jwtbundle.NewSet()
	for td, keys := range u.JWTBundles {
		set.Add(jwtbundle.FromJWTAuthorities(td, keys))
	}
	return set
}

// at are the policies as they hold now.
func (k *known) at(now time.Time, maxOffline, maxStaleness time.Duration) *policy.Policies {
	if !k.since.IsZero() && now.Sub(k.since) > maxOffline || maxStaleness > 0 && !k.offline.IsZero() && now.Sub(k.offline) > maxStaleness {
		return k.stale
	}
	// A wall clock that was set back must not make what is old young.
	if apart := time.Since(k.apart); !k.apart.IsZero() && (apart > maxOffline || maxStaleness > 0 && apart > maxStaleness) {
		return k.stale
	}
	return k.policies
}

// errNotOwn says that the Envoy's certificate is not one of the IDs of the process that asks.
var errNotOwn = errors.New("the Envoy speaks for an ID that is not its own")

// service is the ID that is judged. principal is what the Envoy says of the certificate that it has shown.
//
// A name that is no SPIFFE ID, such as that of a certificate for browsers, does not matter where there is one ID.
func (k *known) service(principal string) (spiffeid.ID, error) {
	if id, found := k.byName[principal]; found {
		return id, nil
	}
	switch {
	case strings.HasPrefix(strings.ToLower(principal), "spiffe:"):
		return spiffeid.ID{}, fmt.Errorf("%w: destination.principal is %q, and its own are %s", errNotOwn, excerpt(principal), k.names())
	case len(k.services) == 1:
		return k.services[0], nil
	default:
		return spiffeid.ID{}, fmt.Errorf("%w: it has several (%s), and destination.principal %q does not say which is called: show the X509-SVID of one on the listener", errNotOwn, k.names(), excerpt(principal))
	}
}

// names lists some of the IDs.
func (k *known) names() string {
	const most = 5
	var names []string
	for _, id := range k.services[:min(len(k.services), most)] {
		names = append(names, id.String())
	}
	if len(k.services) > most {
		names = append(names, "...")
	}
	return strings.Join(names, ", ")
}
