// Package spireserver reads from an unmodified SPIRE server what this node may serve, by polling, as SPIRE's agents do: the
// registration entries, the bundle, and the bundles that entries federate with. It says it in the messages that a CA of
// signet sends by itself, so that whoever takes those knows no difference. The client of the CA calls it; it makes no
// connections and signs nothing.
package spireserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
)

// Epoch is the epoch of all messages of this package. Revisions within it are the agent's own: the number of the message.
const Epoch = "spire"

const (
	// callTimeout bounds one RPC, as at SPIRE's agents.
	callTimeout = 30 * time.Second
	// maxEntries and maxBytes bound what one poll takes, so that a broken server cannot fill the node's memory.
	maxEntries = 1_000_000
	maxBytes   = 1 << 30
	// maxForeign bounds the other trust domains whose bundles are asked for, foreignAtOnce the calls for them under way.
	maxForeign    = 1000
	foreignAtOnce = 10
)

// A Poller remembers what a server has said, so that it can tell what is new. It is used by one goroutine at a time.
type Poller struct {
	// TrustDomain is the agent's.
	TrustDomain spiffeid.TrustDomain
	// Log receives what operators want to know.
	Log *slog.Logger

	revision int64 // of the last message
	entries  map[string]heldEntry
	bundles  map[string]*nodev1.Bundle // by name of the trust domain; those of others too
	troubles map[string]string         // by trust domain: why its bundle was not had, as the log has it
	whole    bool                      // the server knows no SyncAuthorizedEntries
}

// A heldEntry is what is remembered of an entry.
type heldEntry struct {
	stamp
	given         int64 // the revision that it was told with
	federatesWith []string
	unusable      bool // known, and not for workloads
}

// Poll asks the server for everything once. It returns the message that brings a follower who holds epoch and revision up
// to what the server says: a snapshot, unless that is what the last message brought it to; nil if nothing is new. After an
// error nothing was learnt.
func (p *Poller) Poll(ctx context.Context, conn grpc.ClientConnInterface, epoch string, revision int64) (*nodev1.FollowResponse, error) {
	m := &nodev1.FollowResponse{Epoch: Epoch, From: p.revision, To: p.revision + 1, Complete: true}
	base := p
	if p.entries == nil || epoch != Epoch || revision != p.revision {
		base = &Poller{TrustDomain: p.TrustDomain, Log: p.Log, whole: p.whole}
		m.Snapshot, m.From = true, 0
		if epoch == Epoch {
			m.To = max(m.To, revision+1)
		}
	}
	entries, err := base.pollEntries(ctx, conn, m)
	if err != nil {
		return nil, fmt.Errorf("asking for registration entries: %w", err)
	}
	bundles, troubles, err := base.pollBundles(ctx, conn, entries, m)
	if err != nil {
		return nil, err
	}
	p.whole = base.whole
	p.entries, p.bundles, p.troubles = entries, bundles, troubles
	if !m.Snapshot && len(m.Entries)+len(m.RemovedEntryIds)+len(m.Bundles)+len(m.RemovedBundles) == 0 {
		return nil, nil
	}
	m.Complete = m.Snapshot
	p.revision = m.To
	return m, nil
}

// pollBundles asks for the own bundle and those of the trust domains that entries federate with.
func (p *Poller) pollBundles(ctx context.Context, conn grpc.ClientConnInterface, entries map[string]heldEntry, m *nodev1.FollowResponse) (bundles map[string]*nodev1.Bundle, troubles map[string]string, err error) {
	own, err := p.ownBundle(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	foreign, err := p.foreignBundles(ctx, conn, p.federated(entries))
	if err != nil {
		return nil, nil, err
	}
	bundles, troubles = map[string]*nodev1.Bundle{p.TrustDomain.Name(): own}, make(map[string]string)
	for name, f := range foreign {
		if f.trouble != nil {
			// What was known of that trust domain stands; its bundle must not keep this node from everything else.
			troubles[name] = f.trouble.Error()
			if f.bundle = p.bundles[name]; troubles[name] != p.troubles[name] {
				p.Log.Warn("the bundle of a federated trust domain was not had", "trust_domain", name, "err", f.trouble)
			}
		}
		if f.bundle != nil {
			bundles[name] = f.bundle
		}
	}
	for name, b := range bundles {
		old := p.bundles[name]
		if old != nil {
			b.Revision = old.GetRevision()
		}
		if old == nil || !proto.Equal(old, b) {
			b.Revision = m.GetTo()
			m.Bundles = append(m.Bundles, b)
		}
	}
	for name := range p.bundles {
		if bundles[name] == nil {
			m.RemovedBundles = append(m.RemovedBundles, name)
		}
	}
	return bundles, troubles, nil
}

func (p *Poller) ownBundle(ctx context.Context, conn grpc.ClientConnInterface) (*nodev1.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	b, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, fmt.Errorf("asking for the bundle: %w", err)
	}
	if got := b.GetTrustDomain(); got != p.TrustDomain.Name() {
		return nil, fmt.Errorf("the server's bundle is of trust domain %q, not %q; see trust_domain in the configuration", got, p.TrustDomain.Name())
	}
	return translateBundle(b), nil
}

// federated returns the trust domains, other than the own one, that entries name.
func (p *Poller) federated(entries map[string]heldEntry) map[string]struct{} {
	names := make(map[string]struct{})
	left := 0
	for _, e := range entries {
		for _, name := range e.federatesWith {
			if _, known := names[name]; known || name == p.TrustDomain.Name() {
				continue
			}
			if td, err := spiffe.ParseTrustDomain(name); err != nil || td.Name() != name {
				continue // whoever reads the entry says so
			}
			if len(names) == maxForeign {
				left++
				continue
			}
			names[name] = struct{}{}
		}
	}
	if left > 0 {
		p.Log.Error("entries federate with more trust domains than bundles are kept of; the rest is left out", "most", maxForeign)
	}
	return names
}

// A foreignBundle is what became of the question for one: nothing of both if the server has none.
type foreignBundle struct {
	bundle  *nodev1.Bundle
	trouble error
}

// foreignBundles asks for the bundles of other trust domains. It fails only if the server refuses this agent or is away.
func (p *Poller) foreignBundles(ctx context.Context, conn grpc.ClientConnInterface, names map[string]struct{}) (map[string]foreignBundle, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		mu    sync.Mutex
		found = make(map[string]foreignBundle, len(names))
		group sync.WaitGroup
		slots = make(chan struct{}, foreignAtOnce)
	)
	for name := range names {
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		group.Go(func() {
			defer func() { <-slots }()
			f, err := p.foreignBundle(ctx, conn, name)
			if err != nil {
				cancel(err)
				return
			}
			mu.Lock()
			found[name] = f
			mu.Unlock()
		})
	}
	group.Wait()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("asking for the bundles of other trust domains: %w", context.Cause(ctx))
	}
	return found, nil
}

func (p *Poller) foreignBundle(ctx context.Context, conn grpc.ClientConnInterface, name string) (foreignBundle, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	b, err := bundlev1.NewBundleClient(conn).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: name})
	switch status.Code(err) {
	case codes.OK:
	case codes.NotFound:
		return foreignBundle{}, nil
	case codes.Unavailable, codes.PermissionDenied, codes.Unauthenticated, codes.Canceled, codes.DeadlineExceeded:
		return foreignBundle{}, err
	default:
		return foreignBundle{trouble: err}, nil
	}
	if got := b.GetTrustDomain(); got != name {
		// Taken for what it says it is, it could take the place of our own.
		return foreignBundle{trouble: fmt.Errorf("the server answered with the bundle of %q", got)}, nil
	}
	if n := max(len(b.GetX509Authorities()), len(b.GetJwtAuthorities()), len(b.GetWitAuthorities())); n > maxAuthorities {
		return foreignBundle{trouble: fmt.Errorf("it has %d authorities of a kind, more than the %d allowed", n, maxAuthorities)}, nil
	}
	return foreignBundle{bundle: translateBundle(b)}, nil
}

// errTooMuch says that the server sends more than anybody can mean.
var errTooMuch = errors.New("the server sends more than is taken")
