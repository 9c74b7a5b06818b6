package federation

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

const (
	// maxFetches is how many endpoints are asked at once.
	maxFetches = 8
	// maxSleep is the longest wait without a look at the clock, which can be set.
	maxSleep = 30 * time.Second
	// storeAttempts bounds how often a fetched bundle is compared anew because another replica or an operator was faster.
	storeAttempts = 4
)

// Config says what a Poller works on. All fields but Fetch, Now and Log are needed.
type Config struct {
	Registry *registry.Registry
	// Audit writes a record of a bundle that changed, or of a relationship that began to fail.
	Audit func(ctx context.Context, rec auditlog.Record) error
	// Fetch fetches one bundle: Fetcher.Fetch, or what a test puts in its place.
	Fetch func(context.Context, *registry.Federation) (*spiffebundle.Bundle, []error, error)
	// Actor is who acts in the audit log.
	Actor string
	Now   func() time.Time
	Log   *slog.Logger
}

// A Status is how a relationship's bundle was last fetched by this replica.
type Status struct {
	TrustDomain spiffeid.TrustDomain
	// FetchedAt is the last attempt, SucceededAt the last that brought a valid bundle, changed or not; both may be zero.
	FetchedAt, SucceededAt, NextAt time.Time
	// Err is what was wrong with the last attempt.
	Err error
}

// A Poller keeps the bundles of all relationships up to date.
type Poller struct {
	c Config

	// mu guards endpoints and what is in them, but for their turn. No fetch and no commit is made under it.
	mu        sync.Mutex
	endpoints map[spiffeid.TrustDomain]*endpoint
	wake      chan struct{} // one slot: look again
}

// An endpoint is what is known of one relationship.
type endpoint struct {
	rel      *registry.Federation
	turn     chan struct{} // one slot, held while its bundle is fetched
	busy     bool          // by the poller
	interval time.Duration
	status   Status
}

// New returns a Poller. Run makes it poll; Refresh works without.
func New(c Config) *Poller {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Poller{c: c, endpoints: map[spiffeid.TrustDomain]*endpoint{}, wake: make(chan struct{}, 1)}
}

// Run polls until ctx ends, and returns when every fetch has ended.
func (p *Poller) Run(ctx context.Context) error {
	var fetches sync.WaitGroup
	defer fetches.Wait()
	slots := make(chan struct{}, maxFetches)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.c.Registry.FederationsChanged():
		case <-p.wake:
		case <-timer.C:
		}
		due, wait := p.due()
		for _, e := range due {
			select {
			case slots <- struct{}{}:
			default:
				p.release(e) // the end of a fetch wakes us
				continue
			}
			fetches.Go(func() {
				_ = p.fetch(ctx, e.rel.TrustDomain) // it is in the status and the log
				p.release(e)
				<-slots
				p.lookAgain()
			})
		}
		timer.Reset(wait)
	}
}

// due returns the endpoints to be asked now, marked busy, and how long to wait for the next.
func (p *Poller) due() (due []*endpoint, wait time.Duration) {
	now := p.c.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.compare()
	wait = maxSleep
	for _, e := range p.endpoints {
		left := e.status.NextAt.Sub(now)
		switch {
		case e.busy:
		case left <= 0 || left > 2*e.interval: // the clock was set back
			e.busy = true
			due = append(due, e)
		default:
			wait = min(wait, left)
		}
	}
	return due, wait
}

// compare takes over which relationships there are. A new or changed one is due at once. mu is held.
func (p *Poller) compare() {
	rels := p.c.Registry.Federations()
	there := map[spiffeid.TrustDomain]bool{}
	for _, rel := range rels {
		there[rel.TrustDomain] = true
		p.endpointOf(rel)
	}
	for td := range p.endpoints {
		if !there[td] {
			delete(p.endpoints, td)
		}
	}
}

func (p *Poller) endpointOf(rel *registry.Federation) *endpoint {
	e := p.endpoints[rel.TrustDomain]
	if e == nil {
		e = &endpoint{turn: make(chan struct{}, 1), status: Status{TrustDomain: rel.TrustDomain}}
		p.endpoints[rel.TrustDomain] = e
	}
	if e.rel == nil || e.rel.Revision != rel.Revision {
		e.rel, e.status.NextAt = rel, time.Time{}
	}
	return e
}

func (p *Poller) release(e *endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.busy = false
}

func (p *Poller) lookAgain() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Refresh fetches the bundle of one trust domain now. registry.ErrNotFound if there is no relationship with it.
func (p *Poller) Refresh(ctx context.Context, td spiffeid.TrustDomain) error {
	if _, err := p.c.Registry.Federation(td); err != nil {
		return err
	}
	defer p.lookAgain() // the next fetch is due at another time
	return p.fetch(ctx, td)
}

// Statuses returns how each relationship is doing, in order of trust domain.
func (p *Poller) Statuses() []Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.compare()
	out := make([]Status, 0, len(p.endpoints))
	for _, e := range p.endpoints {
		out = append(out, e.status)
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name()) })
	return out
}

// fetch fetches and stores one bundle. Only one fetch of a trust domain is under way at a time.
func (p *Poller) fetch(ctx context.Context, td spiffeid.TrustDomain) error {
	p.mu.Lock()
	rel, err := p.c.Registry.Federation(td)
	if err != nil {
		p.mu.Unlock()
		return err
	}
	e := p.endpointOf(rel)
	p.mu.Unlock()
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	at := p.c.Now()
	err = p.fetchInto(ctx, rel)
	if ctx.Err() != nil {
		return ctx.Err() // we were told to stop: that says nothing about the endpoint
	}
	interval := spiffe.RefreshInterval(spiffebundle.New(td))
	if have, hErr := p.c.Registry.Bundle(td); hErr == nil {
		if parsed, _, pErr := spiffe.ParseBundle(td, have.Content); pErr == nil {
			interval = spiffe.RefreshInterval(parsed)
		}
	}
	p.mu.Lock()
	before := e.status.Err
	e.interval = interval
	e.status.FetchedAt, e.status.Err = at, err
	if err == nil {
		e.status.SucceededAt = at
	}
	// After a failure too: an endpoint in trouble is not helped by being asked more often. [FED-27]
	const spread = 0.2
	if e.rel.Revision == rel.Revision { // otherwise it is due already
		e.status.NextAt = at.Add(time.Duration(float64(interval) * (1 - spread/2 + spread*rand.Float64())))
	}
	p.mu.Unlock()
	if err != nil {
		p.c.Log.Warn("fetching a bundle", "trust_domain", td.Name(), "url", rel.URL, "profile", string(rel.Profile), "err", err)
	}
	if err != nil && (before == nil || before.Error() != err.Error()) { // once, not at every interval
		if err := p.audit(ctx, "federation.failed", rel, auditlog.Failed, map[string]any{"reason": clip(err.Error())}); err != nil {
			p.c.Log.Error("audit of a fetch that failed", "trust_domain", td.Name(), "err", err)
		}
	}
	return err
}

// fetchInto fetches once and stores what comes, unless it is what is there or something older.
func (p *Poller) fetchInto(ctx context.Context, rel *registry.Federation) error {
	td := rel.TrustDomain
	got, skipped, err := p.c.Fetch(ctx, rel)
	if err != nil {
		return err
	}
	for _, s := range skipped {
		p.c.Log.Warn("an element of a fetched bundle cannot be used", "trust_domain", td.Name(), "url", rel.URL, "err", s)
	}
	content, err := spiffe.MarshalBundle(got)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(content)
	hash := hex.EncodeToString(sum[:])
	sequence, _ := got.SequenceNumber()
	for range storeAttempts {
		have, err := p.c.Registry.Bundle(td)
		var current *spiffebundle.Bundle
		if err == nil {
			if current, _, err = spiffe.ParseBundle(td, have.Content); err != nil {
				return err
			}
		} else {
			have = nil
		}
		adopt, alarm := spiffe.Supersedes(got, current)
		if !adopt {
			return fmt.Errorf("%w: %w", errStale, alarm)
		}
		if alarm != nil {
			p.c.Log.Warn("adopted a bundle that breaks a rule", "trust_domain", td.Name(), "url", rel.URL, "err", alarm)
		}
		p.c.Log.Info("fetched a bundle", "trust_domain", td.Name(), "url", rel.URL, "profile", string(rel.Profile), "endpoint_id", endpointID(rel), "sequence", sequence, "sha256", hash)
		if have != nil && bytes.Equal(have.Content, content) {
			return nil
		}
		// Whom we trust does not change without a record of it, so the record comes first.
		if err := p.audit(ctx, "federation.fetched", rel, auditlog.Done, map[string]any{"sequence": sequence, "sha256": hash, "x509": len(got.X509Authorities()), "jwt": len(got.JWTAuthorities())}); err != nil {
			return err
		}
		err = p.c.Registry.StoreFetched(ctx, rel, have, content)
		if errors.Is(err, registry.ErrConflict) {
			if _, err := p.c.Registry.Barrier(ctx); err != nil {
				return err
			}
			now, err := p.c.Registry.Federation(td)
			if err != nil {
				return err
			}
			if now.Revision != rel.Revision {
				return errors.New("the relationship was changed while its bundle was fetched; it is fetched again")
			}
			continue
		}
		return err
	}
	return registry.ErrConflict
}

func endpointID(rel *registry.Federation) string {
	if rel.EndpointID.IsZero() {
		return ""
	}
	return rel.EndpointID.String()
}

func (p *Poller) audit(ctx context.Context, event string, rel *registry.Federation, outcome string, details map[string]any) error {
	details["url"], details["profile"] = rel.URL, string(rel.Profile)
	if id := endpointID(rel); id != "" {
		details["endpoint_id"] = id
	}
	return p.c.Audit(context.WithoutCancel(ctx), auditlog.Record{Time: p.c.Now(), Event: event, Actor: p.c.Actor, ActorKind: "system",
		Subject: rel.TrustDomain.IDString(), Outcome: outcome, Details: details})
}
