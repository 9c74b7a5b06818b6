// Package rotation moves the trust domain's authorities through their lives, by hand and by schedule: it knows which live
// agents have handed a prepared authority on, names those that lag, and activates when all have, or when the old one
// could no longer cover the longest TTL. Both doors call it; every act is in the audit log before its answer leaves. It
// signs nothing and keeps no state of its own: package authority has the steps, package registry the acknowledgements, so
// that every replica of the CA comes to the same conclusions and commits decide between them.
package rotation

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// Config says what a Rotator works on. All fields but those with a default are needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Set         *authority.Set
	Registry    *registry.Registry
	Audit       *auditlog.Log

	// Automatic rotates by schedule. Without it nothing happens that an operator does not ask for.
	Automatic bool

	// ActivationDeadline is how long after its preparation an authority is activated whoever lags. Zero means the last moment
	// at which the active one still covers the longest TTL; it is never later than that.
	ActivationDeadline time.Duration

	// RefreshHint is how often consumers of the bundle fetch it.
	RefreshHint time.Duration

	// Federated tells whether consumers fetch the bundle who acknowledge nothing: other trust domains, downstream CAs.
	Federated func() bool

	// Following returns the agents that follow this replica.
	Following func() map[spiffeid.ID]Follower

	Now func() time.Time
	Log *slog.Logger

	// Settle is how long the clock must have run steadily, after a jump, before it is believed. Zero means 5 minutes.
	Settle time.Duration

	// Look is the longest time between two looks at the schedule. Zero means 10 seconds.
	Look time.Duration
}

// A Follower is what this replica knows of an agent that follows it.
type Follower struct {
	// HandedOn are the authorities that it has written to every open stream.
	HandedOn []string
	// InUse are the X.509 authorities of which it, or one of its workloads, holds an X509-SVID. Nil if it did not say.
	InUse []string
}

// A Rotator is made by New and works in Run. Its methods may be called concurrently.
type Rotator struct {
	c     Config
	acks  acks
	began time.Time // on the steady clock
	wake  chan struct{}

	retries map[authority.Kind]retry // of steps that failed; follow alone has it

	// mu guards what the schedule last saw.
	mu    sync.Mutex
	clock clock
	told  map[string]time.Time // warnings, when they were logged
}

// New returns a Rotator.
func New(c Config) *Rotator {
	if c.Settle == 0 {
		c.Settle = 5 * time.Minute
	}
	if c.Look == 0 {
		c.Look = 10 * time.Second
	}
	r := &Rotator{c: c, began: time.Now(), wake: make(chan struct{}, 1), retries: map[authority.Kind]retry{}, told: map[string]time.Time{}}
	r.acks.init()
	return r
}

// Run writes acknowledgements and follows the schedule until ctx ends, and returns when all it started has ended.
func (r *Rotator) Run(ctx context.Context) error {
	var group sync.WaitGroup
	group.Go(func() { r.writeAcks(ctx) })
	group.Go(func() { r.follow(ctx) })
	group.Wait()
	return nil
}

// BundleChanged tells that the authorities changed. It does not block.
func (r *Rotator) BundleChanged() {
	r.acks.kick()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Automatic tells whether authorities rotate by schedule.
func (r *Rotator) Automatic() bool { return r.c.Automatic }

// An Actor is who asks for a change, as the audit log names it.
type Actor struct {
	Name, Kind, Address string
}

// Schedule is the actor of what nobody asked for.
func (r *Rotator) Schedule() Actor {
	return Actor{Name: registry.ServerID(r.c.TrustDomain).String(), Kind: "system"}
}

// act makes one step with its audit records: what is about to be done before it, so that nothing happens that cannot be
// logged, and the outcome before the answer.
func (r *Rotator) act(ctx context.Context, by Actor, event string, kind authority.Kind, id string, details map[string]any, step func() (authority.Step, error)) (authority.Step, error) {
	record := func(event string, outcome string, more map[string]any) auditlog.Record {
		d := map[string]any{"kind": string(kind)}
		if by.Address != "" {
			d["address"] = by.Address
		}
		for k, v := range details {
			d[k] = v
		}
		for k, v := range more {
			d[k] = v
		}
		return auditlog.Record{Time: r.c.Now(), Event: event, Actor: by.Name, ActorKind: by.Kind, Subject: clip(id), Outcome: outcome, Details: d}
	}
	if err := r.c.Audit.Append(ctx, auditlog.Essential, record(event+".begin", auditlog.Done, nil)); err != nil {
		return authority.Step{}, err
	}
	st, err := step()
	var outcome auditlog.Record
	if err != nil {
		outcome = record(event, auditlog.Refused, map[string]any{"reason": clip(err.Error())})
	} else {
		id = st.ID
		outcome = record(event, auditlog.Done, map[string]any{"state": string(st.State), "changed": st.Changed})
	}
	if err := r.c.Audit.Append(context.WithoutCancel(ctx), auditlog.Essential, outcome); err != nil {
		r.c.Log.Error("audit of an outcome; its begin record is in the log", "event", event, "err", err)
	}
	return st, err
}

// Prepare makes and publishes a new authority, or returns the one that is prepared already.
func (r *Rotator) Prepare(ctx context.Context, by Actor, kind authority.Kind) (authority.Step, error) {
	return r.act(ctx, by, "authority.prepare", kind, "", nil, func() (authority.Step, error) { return r.c.Set.Prepare(ctx, kind) })
}

// Taint has all that an old authority signed re-issued. With stolen, any authority can be tainted; if it is the active one
// another takes over at once.
func (r *Rotator) Taint(ctx context.Context, by Actor, kind authority.Kind, id string, stolen bool) (authority.Step, error) {
	return r.end(ctx, by, "authority.taint", kind, id, authority.StateTainted, stolen, r.c.Set.Taint)
}

// Revoke takes a tainted authority out of the bundle. With stolen, any authority can be revoked, and it waits for nobody.
func (r *Rotator) Revoke(ctx context.Context, by Actor, kind authority.Kind, id string, stolen bool) (authority.Step, error) {
	return r.end(ctx, by, "authority.revoke", kind, id, authority.StateRevoked, stolen, r.c.Set.Revoke)
}

func (r *Rotator) end(ctx context.Context, by Actor, event string, kind authority.Kind, id string, to authority.State, stolen bool,
	step func(context.Context, authority.Kind, string) (authority.Step, error)) (authority.Step, error) {
	details := map[string]any{}
	if stolen {
		details["stolen"] = true
	}
	return r.act(ctx, by, event, kind, id, details, func() (authority.Step, error) {
		if stolen {
			return r.c.Set.Stolen(ctx, kind, id, to)
		}
		return step(ctx, kind, id)
	})
}

// TaintRoot has all below a root of the upstream CA re-issued.
func (r *Rotator) TaintRoot(ctx context.Context, by Actor, id string) error {
	return r.root(ctx, by, "authority.taint", id, r.c.Set.TaintUpstreamRoot)
}

// RevokeRoot takes a tainted root of the upstream CA out of the bundle.
func (r *Rotator) RevokeRoot(ctx context.Context, by Actor, id string) error {
	return r.root(ctx, by, "authority.revoke", id, r.c.Set.RevokeUpstreamRoot)
}

func (r *Rotator) root(ctx context.Context, by Actor, event, id string, step func(context.Context, string) error) error {
	_, err := r.act(ctx, by, event, authority.KindX509, id, map[string]any{"upstream": true}, func() (authority.Step, error) {
		return authority.Step{Authority: authority.Authority{ID: id}, Changed: true}, step(ctx, id)
	})
	return err
}

// clip bounds what an audit record says.
func clip(s string) string {
	const most = 512
	if len(s) > most {
		return fmt.Sprintf("%.*q...", most, s)
	}
	return s
}
