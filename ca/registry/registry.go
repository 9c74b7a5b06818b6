// Package registry holds what the CA knows of its trust domain: registration entries, attested nodes, join tokens,
// call policies and federated bundles. The full set is in memory, fed by the store's watch alone (also for writes made
// here), so that reads never touch the disk and every replica behaves the same. It decides which of it concerns
// which agent, and never signs anything.
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// Errors a caller may test for. A *ValidationError and an *ExistsError come beside them.
var (
	ErrNotFound = errors.New("not found")
	// ErrNotReady means that the registry has not caught up with the store: answer Unavailable, never a no.
	ErrNotReady = errors.New("the registry has not caught up with the store; try again")
	// ErrConflict means that somebody else changed the same object meanwhile.
	ErrConflict = errors.New("changed meanwhile; look again and retry")
)

// Key prefixes in the store.
const (
	entryPrefix  = "entry/"
	nodePrefix   = "node/"
	tokenPrefix  = "token/"
	policyPrefix = "policy/"
	bundlePrefix = "bundle/"
	defaultsKey  = "defaults"
)

// Config says what a Registry works on.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Store       store.Store
	// Replicated says that other replicas serve agents from the same store: what an agent was sent here may not be what it holds.
	Replicated bool
	// CheckTTL refuses TTLs that the authorities could not honour; nil allows all.
	CheckTTL func(x509, jwt time.Duration) error
	// CheckRevokedAuthority refuses the revocation of an authority by a document, such as of the active one; nil allows all.
	CheckRevokedAuthority func(id string) error
	// Admins are admins besides those whom an entry makes one; nil: there are none.
	Admins func() []spiffeid.ID
	// CheckBundle refuses a foreign bundle that must not be stored; nil allows all.
	CheckBundle func(*spiffebundle.Bundle) error
	// Observe is called with every batch of the store before it is indexed, in order, so that what else lives in the
	// store can be followed through the same watch. It must not block. Nil: nobody else.
	Observe func(store.Batch)
	// Relisted is called after the watch fell behind the store's history and everything was read afresh: what Observe
	// feeds missed batches. Nil: nobody else.
	Relisted func(context.Context) error
	// OwnerGone tells that the source of an entry's owner is not at work, so that anybody may change the entry. Nil: all are.
	OwnerGone func(owner string) bool
	// Callers returns, of services whose calls were seen lately, the callers that were allowed. Nil: no calls are seen.
	Callers func() map[spiffeid.ID][]spiffeid.ID
	Now     func() time.Time // nil: time.Now
	Log     *slog.Logger     // nil: discarded
}

// A Registry is safe for concurrent use once Open has returned and while Run runs.
type Registry struct {
	c Config

	// mu guards ix and subs. No store or network call is made under it.
	mu      sync.RWMutex
	ix      *index
	applied chan struct{} // closed and replaced whenever ix.revision moves
	watch   store.Watcher
	follow  followers

	federationsChanged chan struct{} // one slot: look again
	issuersChanged     chan struct{} // likewise
	takenChanged       chan struct{} // likewise
	templatesChanged   chan struct{} // likewise

	denied denials // by roll-outs, not yet written down

	// expanded is the revision whose templated Identities are those that the entries of pods are made by; 0: nobody makes any.
	// mu guards it.
	expanded store.Revision

	// wmu guards pending: registrations that are being written, by what makes them similar.
	wmu     sync.Mutex
	pending map[string]chan struct{}

	checks policyChecks

	// amu is held while a plan is committed and indexed: of two that make the same registration one comes first.
	amu sync.Mutex

	salt []byte // of the agents' tags; set by Open
}

// A Policy is one CallPolicy with the document it was compiled from. It is never changed in place.
type Policy struct {
	Compiled  *policyv1.Policy
	Document  Document
	CreatedAt time.Time
	Revision  store.Revision

	hinted []*policyv1.Rule // those whose conditions ask for peer.hint
	bytes  int              // of Compiled
}

// Defaults is the PolicyDefaults document.
type Defaults struct {
	Mode      policyv1.DefaultsMode
	Document  Document
	CreatedAt time.Time
	Revision  store.Revision
}

// A Bundle holds a foreign trust domain's authorities as an operator set them, in SPIFFE bundle format.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Content     []byte
	Revision    store.Revision
}

// Open reads the whole store into memory and begins to watch it. Run keeps it up to date.
func Open(ctx context.Context, c Config) (*Registry, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	r := &Registry{c: c, applied: make(chan struct{}), pending: map[string]chan struct{}{}, federationsChanged: make(chan struct{}, 1), issuersChanged: make(chan struct{}, 1), takenChanged: make(chan struct{}, 1), templatesChanged: make(chan struct{}, 1), denied: newDenials()}
	r.follow.init()
	if err := r.openSalt(ctx); err != nil {
		return nil, fmt.Errorf("the salt of the agents' tags: %w", err)
	}
	if err := r.load(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// load replaces the index by what the store holds and starts a watch that continues it.
func (r *Registry) load(ctx context.Context) error {
	ix := newIndex()
	ix.asOf = r.c.Now()
	rev, err := r.c.Store.List(ctx, "", 0, func(it store.Item) error {
		return ix.apply(r.c.TrustDomain, store.Event{Item: it}, nil)
	})
	if err != nil {
		return fmt.Errorf("reading the store: %w", err)
	}
	ix.revision, ix.revocations.since, ix.revocations.changes = rev, rev, nil
	w, err := r.c.Store.Watch(ctx, rev)
	if err != nil {
		return fmt.Errorf("watching the store: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watch != nil {
		r.watch.Close()
	}
	if r.ix != nil {
		ix.derived = r.ix.derived
		ix.noteHints()
		notify(r.takenChanged)
		notify(r.templatesChanged)
		ix.templatedAt = rev // any may have changed
		ix.templatesChanged += r.ix.templatesChanged + 1
	}
	r.ix, r.watch = ix, w
	r.moved()
	r.follow.markAll()
	r.noteFederations()
	notify(r.issuersChanged)
	return nil
}

// reloadPause is between two attempts to read a store that does not answer, with jitter.
const reloadPause = time.Second

// reload is load, and what follows from it, as soon as the store answers. Until then the index is what it was.
func (r *Registry) reload(ctx context.Context) error {
	for {
		err := r.load(ctx)
		if err == nil && r.c.Relisted != nil {
			err = r.c.Relisted(ctx)
		}
		if !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrCompacted) {
			return err
		}
		r.c.Log.Warn("reading the store afresh; trying again", "err", err)
		t := time.NewTimer(reloadPause/2 + rand.N(reloadPause))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}

// moved wakes whoever waits for a revision. mu is held.
func (r *Registry) moved() {
	close(r.applied)
	r.applied = make(chan struct{})
}

// Run follows the store until ctx ends. A record it cannot read ends it with an error: a CA that does not understand
// its store must not go on as if the record were absent.
func (r *Registry) Run(ctx context.Context) error {
	defer func() {
		r.mu.Lock()
		r.watch.Close()
		r.mu.Unlock()
	}()
	for {
		b, err := r.watch.Next(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, store.ErrCompacted):
			r.c.Log.Warn("fell behind the store's history; reading it afresh")
			if err := r.reload(ctx); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return err
			}
			r.OwnBundleChanged() // it may have changed in what was missed
			continue
		case err != nil:
			return fmt.Errorf("watching the store: %w", err)
		}
		if r.c.Observe != nil {
			r.c.Observe(b)
		}
		if err := r.applyBatch(b); err != nil {
			return err
		}
	}
}

func (r *Registry) applyBatch(b store.Batch) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ch changes
	for _, ev := range b.Events {
		if err := r.ix.apply(r.c.TrustDomain, ev, &ch); err != nil {
			return err
		}
	}
	r.ix.revision = b.Revision
	r.follow.mark(r.ix, &ch)
	r.notifyChanged(&ch)
	if ch.federations {
		r.noteFederations()
	}
	if ch.issuers {
		notify(r.issuersChanged)
	}
	r.moved()
	return nil
}

// notifyChanged tells who makes the entries of pods what changed for them. mu is held.
func (r *Registry) notifyChanged(ch *changes) {
	if ch.taken {
		notify(r.takenChanged)
	}
	if ch.templated {
		notify(r.templatesChanged)
	}
	if ch.namespaces {
		r.moved()
	}
}

// TrustDomain returns the trust domain that the registry is of.
func (r *Registry) TrustDomain() spiffeid.TrustDomain { return r.c.TrustDomain }

// Revision returns the revision up to which the store is in memory.
func (r *Registry) Revision() store.Revision {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.revision
}

// WaitFor returns when the index holds everything up to rev, and pods the entries that templated Identities give them.
func (r *Registry) WaitFor(ctx context.Context, rev store.Revision) error {
	for {
		r.mu.RLock()
		at, moved := r.ix.revision, r.applied
		expanding := r.expanded != 0 && r.expanded < r.ix.templatedAt
		r.mu.RUnlock()
		if at >= rev && !expanding {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrNotReady, ctx.Err())
		}
	}
}

// Barrier returns when the index holds everything that was committed before the call, by any replica.
func (r *Registry) Barrier(ctx context.Context) (store.Revision, error) {
	rev, err := r.c.Store.Barrier(ctx)
	if err != nil {
		return 0, err
	}
	return rev, r.WaitFor(ctx, rev)
}

// commit writes and waits until the index shows it, so that whoever got the answer finds what it wrote.
func (r *Registry) commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	fence, fenced := store.Fence(ctx)
	if fenced {
		checks = append(slices.Clip(checks), fence)
	}
	rev, err := r.c.Store.Commit(ctx, checks, writes)
	if err != nil {
		if c, ok := errors.AsType[*store.ConflictError](err); ok {
			if fenced && c.Key == fence.Key {
				err = ErrTermOver
			}
			return 0, fmt.Errorf("%w: %w", ErrConflict, err)
		}
		return 0, err
	}
	return rev, r.WaitFor(ctx, rev)
}

type policyRecord struct {
	V         int      `json:"v"`
	Document  document `json:"document"`
	Compiled  []byte   `json:"compiled,omitempty"` // signet.policy.v1.Policy; absent in PolicyDefaults
	Mode      int32    `json:"mode,omitempty"`     // PolicyDefaults
	CreatedAt int64    `json:"created_at"`
}

func (ix *index) applyPolicy(name string, ev store.Event, ch *changes) error {
	old := ix.policies[name]
	if old != nil {
		ix.services.remove(name, old)
		delete(ix.policies, name)
		ix.hints.forget(name)
	}
	var new *Policy
	if !ev.Deleted {
		var err error
		if new, err = decodePolicy(ev.Item); err != nil {
			return err
		}
		ix.policies[name] = new
		ix.services.add(name, new)
	}
	ch.policies = append(ch.policies, policyChange{old, new})
	return nil
}

func decodePolicy(it store.Item) (*Policy, error) {
	var rec policyRecord
	if err := decodeRecord(it, &rec, func() int { return rec.V }); err != nil {
		return nil, err
	}
	compiled := &policyv1.Policy{}
	if err := proto.Unmarshal(rec.Compiled, compiled); err != nil {
		return nil, fmt.Errorf("record %s: %w (is the store damaged?)", it.Key, err)
	}
	compiled.Revision = int64(it.Modified)
	p := newPolicy(compiled)
	p.Document, p.CreatedAt, p.Revision = rec.Document.domain(), fromUnix(rec.CreatedAt), it.Modified
	return p, nil
}

func newPolicy(compiled *policyv1.Policy) *Policy {
	return &Policy{Compiled: compiled, hinted: asksHints(compiled), bytes: proto.Size(compiled)}
}

type bundleRecord struct {
	V       int             `json:"v"`
	Content json.RawMessage `json:"bundle"`
}

func (ix *index) applyBundle(name string, ev store.Event, ch *changes) error {
	td, err := spiffe.ParseTrustDomain(name)
	if err != nil {
		return fmt.Errorf("record %s: %w", ev.Key, err)
	}
	ch.bundles = append(ch.bundles, td)
	ix.who++
	if ev.Deleted {
		delete(ix.bundles, td)
		return nil
	}
	var rec bundleRecord
	if err := decodeRecord(ev.Item, &rec, func() int { return rec.V }); err != nil {
		return err
	}
	ix.bundles[td] = &Bundle{td, rec.Content, ev.Modified}
	return nil
}

func marshal(v any) ([]byte, error) { return json.Marshal(v) }
