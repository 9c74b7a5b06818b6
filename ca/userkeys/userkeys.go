// Package userkeys fetches the keys of those issuers of user tokens whose documents name a URL, and keeps them up to date in
// the registry. It polls for as long as it runs. What was fetched last stays in force while an issuer cannot be reached or
// answers with something that is no usable key set.
package userkeys

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

const (
	// refresh is how often keys are fetched anew, and the longest wait after a failure.
	refresh = 5 * time.Minute
	// firstRetry is the first wait after a failure.
	firstRetry = 15 * time.Second
	// maxFetches is how many issuers are asked at once.
	maxFetches = 4
	// maxSleep is the longest wait without a look at the clock, which can be set.
	maxSleep = 30 * time.Second
)

// Config says what a Poller works on. All fields but Now and Log are needed.
type Config struct {
	Registry *registry.Registry
	// Fetch gets a document of at most limit bytes from an https URL; of a longer one it returns more than limit.
	Fetch func(ctx context.Context, url string, limit int64) ([]byte, error)
	// Audit writes a record of keys that changed, or of an issuer that began to fail.
	Audit func(ctx context.Context, rec auditlog.Record) error
	// Actor is who acts in the audit log.
	Actor string
	Now   func() time.Time
	Log   *slog.Logger
}

// A Poller keeps the keys of all issuers up to date.
type Poller struct {
	c Config

	// mu guards issuers and what is in them. No fetch and no commit is made under it.
	mu      sync.Mutex
	issuers map[string]*issuer
	wake    chan struct{} // one slot: look again
}

type issuer struct {
	revision store.Revision // of the document
	busy     bool
	next     time.Time
	failures int
	failed   string // what was wrong with the last fetch
}

// New returns a Poller.
func New(c Config) *Poller {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Poller{c: c, issuers: map[string]*issuer{}, wake: make(chan struct{}, 1)}
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
		case <-p.c.Registry.UserIssuersChanged():
		case <-p.wake:
		case <-timer.C:
		}
		due, wait := p.due(cap(slots) - len(slots))
		for _, i := range due {
			slots <- struct{}{} // there is room: due returns no more
			fetches.Go(func() {
				p.fetch(ctx, i)
				<-slots
				select {
				case p.wake <- struct{}{}:
				default:
				}
			})
		}
		timer.Reset(wait)
	}
}

// due returns at most limit issuers whose keys are to be fetched now, marked busy, and how long to wait for the next.
func (p *Poller) due(limit int) (due []*registry.UserIssuer, wait time.Duration) {
	now := p.c.Now()
	all := p.c.Registry.UserIssuers()
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.issuers {
		if !slices.ContainsFunc(all, func(i *registry.UserIssuer) bool { return i.Compiled.Name == name && i.JWKSURL != "" }) {
			delete(p.issuers, name)
		}
	}
	wait = maxSleep
	for _, u := range all {
		if u.JWKSURL == "" {
			continue
		}
		i := p.issuers[u.Compiled.Name]
		if i == nil || i.revision != u.Revision {
			i = &issuer{revision: u.Revision}
			p.issuers[u.Compiled.Name] = i
		}
		left := i.next.Sub(now)
		switch {
		case i.busy:
		case left <= 0 || left > 2*refresh: // the clock was set back
			if len(due) == limit {
				continue // the end of a fetch wakes us
			}
			i.busy = true
			due = append(due, u)
		default:
			wait = min(wait, left)
		}
	}
	return due, wait
}

// fetch fetches the keys of one issuer and notes when to do so again.
func (p *Poller) fetch(ctx context.Context, u *registry.UserIssuer) {
	name := u.Compiled.Name
	err := p.fetchInto(ctx, u)
	if ctx.Err() != nil {
		return // we were told to stop: that says nothing about the issuer
	}
	p.mu.Lock()
	i := p.issuers[name]
	if i == nil || i.revision != u.Revision {
		p.mu.Unlock()
		return // it is another one meanwhile
	}
	i.busy = false
	pause, before := refresh, i.failed
	i.failed = ""
	if err != nil {
		i.failed = clip(err.Error())
		pause = min(refresh, firstRetry<<min(i.failures, 8))
		i.failures++
	} else {
		i.failures = 0
	}
	const spread = 0.2
	i.next = p.c.Now().Add(time.Duration(float64(pause) * (1 - spread/2 + spread*rand.Float64())))
	failed := i.failed
	p.mu.Unlock()
	if failed == "" {
		return
	}
	p.c.Log.Warn("fetching the keys of an issuer of user tokens; the last ones stay in force", "user_issuer", name, "url", u.JWKSURL, "err", err)
	if failed != before { // once, not at every attempt
		if err := p.audit(ctx, "userissuer.failed", u, auditlog.Failed, map[string]any{"reason": failed}); err != nil {
			p.c.Log.Error("audit of a fetch that failed", "user_issuer", name, "err", err)
		}
	}
}

// fetchInto fetches once and stores what comes, unless it is what is there.
func (p *Poller) fetchInto(ctx context.Context, u *registry.UserIssuer) error {
	doc, err := p.c.Fetch(ctx, u.JWKSURL, spiffe.MaxUserKeysBytes)
	if err != nil {
		return err
	}
	keys, skipped, err := policy.ParseUserKeys(doc)
	if err != nil {
		return err
	}
	for _, s := range skipped {
		p.c.Log.Debug("an element of a fetched key set", "user_issuer", u.Compiled.Name, "url", u.JWKSURL, "err", s)
	}
	now, err := p.c.Registry.UserIssuer(u.Compiled.Name)
	if err != nil || now.Revision != u.Revision {
		return nil // its document is gone or another one: what was fetched is not wanted any more
	}
	if slices.EqualFunc(now.Compiled.Keys, keys, func(a, b *policyv1.UserKey) bool { return proto.Equal(a, b) }) {
		return nil
	}
	var ids []string
	for _, k := range keys {
		ids = append(ids, k.KeyId)
	}
	// Whom we trust does not change without a record of it, so the record comes first.
	if err := p.audit(ctx, "userissuer.fetched", u, auditlog.Done, map[string]any{"key_ids": ids[:min(len(ids), 32)], "keys": len(ids)}); err != nil {
		return err
	}
	err = p.c.Registry.StoreUserKeys(ctx, now, keys)
	if errors.Is(err, registry.ErrConflict) {
		return nil // another replica was faster; the next time shows with what
	}
	return err
}

func (p *Poller) audit(ctx context.Context, event string, u *registry.UserIssuer, outcome string, details map[string]any) error {
	details["url"] = u.JWKSURL
	return p.c.Audit(context.WithoutCancel(ctx), auditlog.Record{Time: p.c.Now(), Event: event, Actor: p.c.Actor, ActorKind: "system",
		Subject: registry.KindUserIssuer + "/" + u.Compiled.Name, Outcome: outcome, Details: details})
}

func clip(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
