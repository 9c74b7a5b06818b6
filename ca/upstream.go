package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/upstream"
)

// An upstreamDriver is a CA above this one. Its methods are called one at a time, but for Name.
type upstreamDriver interface {
	authority.Upstream

	// Follow returns the roots of the upstream as they are now, and the JWT keys of the trust domain's CAs above this one.
	Follow(ctx context.Context) ([]*x509.Certificate, []upstream.JWTKey, error)

	// Close lets go of what the driver holds open.
	Close() error
}

// A jwtPublisher is a driver whose CA publishes the JWT keys of those below it.
type jwtPublisher interface {
	PublishJWTKey(ctx context.Context, key upstream.JWTKey) error
}

// A tainter is a driver whose CA says which of its roots it has tainted, as of the last Follow.
type tainter interface{ Tainted() []*x509.Certificate }

const (
	// mintTimeout bounds one request for an intermediate, followTimeout what else is asked of the upstream.
	mintTimeout   = 60 * time.Second
	followTimeout = 20 * time.Second

	// followEvery is how often the upstream is asked what it publishes: its new roots and JWT keys must be known here before
	// they are used there.
	followEvery = 5 * time.Second

	// After a failure the pauses grow from the first to the last, each spread by half.
	firstUpstreamPause = time.Second
	lastUpstreamPause  = time.Minute
)

// An upstreamKeeper keeps this CA below its upstream: it has intermediates renewed, follows what the upstream publishes, and
// has it publish this CA's JWT keys. It is also what the authorities mint through, so that whatever the upstream does is
// seen by one.
type upstreamKeeper struct {
	ca     *CA
	driver upstreamDriver

	turn chan struct{} // held while the driver is asked something

	mu        sync.Mutex
	published map[string]bool // JWT keys that the upstream has taken since the start
	failing   map[string]failure
}

// A failure is what keeps one of the keeper's duties from being done.
type failure struct {
	since time.Time
	err   error
}

func newUpstreamKeeper(ca *CA, driver upstreamDriver) *upstreamKeeper {
	return &upstreamKeeper{ca: ca, driver: driver, turn: make(chan struct{}, 1), published: map[string]bool{}, failing: map[string]failure{}}
}

// Name implements authority.Upstream.
func (k *upstreamKeeper) Name() string { return k.driver.Name() }

// Mint implements authority.Upstream.
func (k *upstreamKeeper) Mint(ctx context.Context, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, mintTimeout)
	defer cancel()
	if err := k.take(ctx); err != nil {
		return nil, nil, err
	}
	defer k.give()
	return k.driver.Mint(ctx, csr, ttl)
}

func (k *upstreamKeeper) take(ctx context.Context) error {
	select {
	case k.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (k *upstreamKeeper) give() { <-k.turn }

// run works until ctx ends.
func (k *upstreamKeeper) run(ctx context.Context) error {
	pause := firstUpstreamPause
	for {
		wait := followEvery
		if k.once(ctx) {
			pause = firstUpstreamPause
		} else {
			wait, pause = pause, min(2*pause, lastUpstreamPause)
		}
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// once does what is due, and tells whether all of it succeeded. A duty that fails keeps no other from being done.
func (k *upstreamKeeper) once(ctx context.Context) bool {
	k.note(ctx, "following it", k.follow(ctx))
	k.note(ctx, "publishing JWT keys", k.publish(ctx))
	k.note(ctx, "renewing the intermediate", k.renew(ctx))
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.failing) == 0
}

// note keeps what failed, and logs when it begins and ends.
func (k *upstreamKeeper) note(ctx context.Context, duty string, err error) {
	if ctx.Err() != nil {
		return
	}
	k.mu.Lock()
	was, failed := k.failing[duty]
	switch {
	case err == nil:
		delete(k.failing, duty)
	case failed:
		k.failing[duty] = failure{was.since, err}
	default:
		k.failing[duty] = failure{k.ca.c.Now(), err}
	}
	k.mu.Unlock()
	switch {
	case err == nil && failed:
		k.ca.log.Info("the upstream CA is back", "upstream", k.Name(), "duty", duty, "since", was.since)
	case err != nil && !failed:
		k.ca.log.Error("the upstream CA fails", "upstream", k.Name(), "duty", duty, "err", err)
	}
}

// follow publishes what the upstream publishes.
func (k *upstreamKeeper) follow(ctx context.Context) error {
	asking, cancel := context.WithTimeout(ctx, followTimeout)
	defer cancel()
	if err := k.take(asking); err != nil {
		return err
	}
	roots, theirs, err := k.driver.Follow(asking)
	k.give()
	if err != nil || len(roots) == 0 {
		return err
	}
	keys := make([]authority.ForeignJWTKey, len(theirs))
	for i, t := range theirs {
		keys[i] = authority.ForeignJWTKey(t)
	}
	changed, err := k.ca.set.FollowUpstream(asking, roots, keys)
	if changed {
		k.ca.log.Info("what the upstream CA publishes has changed", "upstream", k.Name(), "roots", len(roots), "jwt_keys", len(keys))
	}
	if errors.Is(err, authority.ErrConflict) {
		return nil // somebody else did the same, or the next look does it
	}
	if err != nil {
		return err
	}
	return k.taint(asking)
}

// taint has everything re-issued below the roots that the upstream has tainted, once the active authority leads to another
// one: those roots will be revoked above.
func (k *upstreamKeeper) taint(ctx context.Context) error {
	t, ok := k.driver.(tainter)
	if !ok {
		return nil
	}
	active := ""
	for _, a := range k.ca.set.Authorities(authority.KindX509) {
		if a.State == authority.StateActive {
			active = a.PublishedID()
		}
	}
	for _, root := range t.Tainted() {
		for _, a := range k.ca.set.Bundle().X509 {
			if !a.Upstream || a.State == authority.StateTainted || a.ID == active || !a.Certificate.Equal(root) {
				continue
			}
			err := k.ca.rotator.TaintRoot(ctx, k.ca.rotator.Schedule(), a.ID)
			if err != nil && !errors.Is(err, authority.ErrConflict) && !errors.Is(err, authority.ErrRootState) {
				return err
			}
		}
	}
	return nil
}

// publish has the upstream publish the JWT keys of this CA and of those below it, each once.
func (k *upstreamKeeper) publish(ctx context.Context) error {
	p, ok := k.driver.(jwtPublisher)
	if !ok {
		return nil
	}
	now := k.ca.c.Now()
	for _, a := range k.ca.set.Bundle().JWT {
		k.mu.Lock()
		done := k.published[a.KeyID]
		k.mu.Unlock()
		if done || a.Origin == authority.OriginUpstream || a.Appended || !now.Before(a.ExpiresAt) {
			continue
		}
		spki, err := x509.MarshalPKIXPublicKey(a.PublicKey)
		if err != nil {
			return err
		}
		asking, cancel := context.WithTimeout(ctx, followTimeout)
		if err = k.take(asking); err == nil {
			err = p.PublishJWTKey(asking, upstream.JWTKey{KeyID: a.KeyID, PublicKey: spki, ExpiresAt: a.ExpiresAt})
			k.give()
		}
		cancel()
		if err != nil {
			return err
		}
		k.mu.Lock()
		k.published[a.KeyID] = true
		k.mu.Unlock()
		k.ca.log.Info("the upstream CA publishes a JWT key of ours", "upstream", k.Name(), "key_id", a.KeyID)
	}
	return nil
}

// renew has the upstream sign a new intermediate when it is time.
func (k *upstreamKeeper) renew(ctx context.Context) error {
	at, ok := k.ca.set.IntermediateDue()
	if !ok || k.ca.c.Now().Before(at) {
		return nil
	}
	actor := registry.ServerID(k.ca.td).String()
	record := func(event string, details map[string]any) auditlog.Record {
		details["upstream"] = k.Name()
		return auditlog.Record{Time: k.ca.c.Now(), Event: event, Actor: actor, ActorKind: "system", Subject: k.ca.td.IDString(), Outcome: auditlog.Done, Details: details}
	}
	if err := k.ca.audit.Append(ctx, auditlog.Essential, record("upstreamca.renew", map[string]any{})); err != nil {
		return err
	}
	r, err := k.ca.set.RenewIntermediate(ctx)
	switch {
	case errors.Is(err, authority.ErrConflict):
		return nil // another replica or an operator was faster; the next look tells
	case err != nil:
		return err
	}
	k.ca.log.Info("the upstream CA signed a new X.509 authority", "upstream", k.Name(), "authority_id", r.ID, "root", r.Root, "active", r.Active, "not_after", r.NotAfter)
	return k.ca.audit.Append(ctx, auditlog.Essential, record("upstreamca.renewed", map[string]any{"authority": r.ID, "root": r.Root, "active": r.Active, "not_after": r.NotAfter.Unix()}))
}

// problems returns what the upstream does not do at the moment, each with its name and how long.
func (k *upstreamKeeper) problems() []string {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []string
	for _, duty := range []string{"following it", "publishing JWT keys", "renewing the intermediate"} {
		if f, ok := k.failing[duty]; ok {
			out = append(out, fmt.Sprintf("upstream %s: %s fails for %v: %v", k.Name(), duty, k.ca.c.Now().Sub(f.since).Truncate(time.Second), f.err))
		}
	}
	return out
}

// health returns an error when the intermediate will end before long and no new one can be had: before that the CA does
// all of its work, however long its upstream is away.
func (k *upstreamKeeper) health() error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	f, failing := k.failing["renewing the intermediate"]
	k.mu.Unlock()
	if !failing {
		return nil
	}
	left, whole := k.ca.set.AuthorityLeft()
	if left > whole/8 {
		return nil
	}
	return fmt.Errorf("upstream %s gives no new intermediate, and the one in use ends in %v: %w", k.Name(), left.Truncate(time.Second), f.err)
}
