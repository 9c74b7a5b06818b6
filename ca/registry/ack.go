package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
)

// An Ack says which authorities that were prepared, and signed nothing yet, an agent has handed on to all its workloads.
// It has a key of its own, so that it neither races with the renewal of the node's SVID nor wakes the node's stream; it is
// written at most once for each authority that is prepared. An Ack in the registry is never changed in place.
type Ack struct {
	Authorities []string // X.509 authority ids and JWT key ids, sorted
	At          time.Time

	revision store.Revision
}

// Has tells whether the agent has handed the authority on. It holds for no Ack at all.
func (a *Ack) Has(authority string) bool {
	return a != nil && slices.Contains(a.Authorities, authority)
}

const (
	ackPrefix = "ack/"
	// MaxAckAuthorities bounds the authorities that one Ack names: one of each kind can be prepared at a time.
	MaxAckAuthorities = 4
	// MaxAcks is how many agents' acks go into one commit.
	MaxAcks = store.MaxWrites
)

type ackRecord struct {
	V           int      `json:"v"`
	Authorities []string `json:"authorities"`
	At          int64    `json:"at"`
}

func (a *Ack) encode() ([]byte, error) {
	return marshal(ackRecord{recordVersion, a.Authorities, unix(a.At)})
}

func decodeAck(item store.Item) (*Ack, error) {
	var r ackRecord
	if err := decodeRecord(item, &r, func() int { return r.V }); err != nil {
		return nil, err
	}
	return &Ack{r.Authorities, fromUnix(r.At), item.Modified}, nil
}

func ackKey(id spiffeid.ID) string { return ackPrefix + strings.TrimPrefix(id.Path(), agentPathPrefix) }

func (ix *index) applyAck(td spiffeid.TrustDomain, name string, ev store.Event) error {
	id, err := spiffeid.FromPath(td, agentPathPrefix+name)
	if err != nil {
		return fmt.Errorf("record %s: %w", ev.Key, err)
	}
	if ev.Deleted {
		delete(ix.acks, id)
		return nil
	}
	a, err := decodeAck(ev.Item)
	if err != nil {
		return err
	}
	ix.acks[id] = a
	return nil
}

// Ack returns what an agent has acknowledged, or nil.
func (r *Registry) Ack(agent spiffeid.ID) *Ack {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.acks[agent]
}

// PutAcks notes for each agent that it has handed on these authorities, and forgets what it handed on of others. Agents
// that are not known are left out. At most MaxAcks at once; it is one commit. Another replica may write the same agent's at
// the same moment: then it is ErrConflict, and the caller looks again.
func (r *Registry) PutAcks(ctx context.Context, acks map[spiffeid.ID][]string) error {
	if len(acks) > MaxAcks {
		return fmt.Errorf("%d acks at once, at most %d are possible", len(acks), MaxAcks)
	}
	now := r.c.Now()
	var checks []store.Check
	var writes []store.Write
	r.mu.RLock()
	for id, authorities := range acks {
		if r.ix.nodes[id] == nil || len(authorities) > MaxAckAuthorities {
			continue
		}
		old := r.ix.acks[id]
		a := &Ack{Authorities: slices.Sorted(slices.Values(authorities)), At: now}
		if old != nil && slices.Equal(old.Authorities, a.Authorities) {
			continue
		}
		value, err := a.encode()
		if err != nil {
			r.mu.RUnlock()
			return err
		}
		check := store.Check{Key: ackKey(id)}
		if old != nil {
			check.Modified = old.revision
		}
		checks, writes = append(checks, check), append(writes, store.Write{Key: check.Key, Value: value})
	}
	r.mu.RUnlock()
	if len(writes) == 0 {
		return nil
	}
	_, err := r.commit(ctx, checks, writes)
	return err
}

// Live tells whether a node counts among those that an activation waits for: its SVID, or the one that it was given to
// replace it, has not ended. Every SVID is given for one TTL, so that a node with one that has not ended was seen within
// one SVID TTL. [DESIGN §5]
func (n *Node) Live(now time.Time) bool {
	return !n.Banned && (n.Serial != "" && now.Before(n.ExpiresAt) || n.NewSerial != "" && now.Before(n.NewExpiresAt))
}

// LiveNodes calls visit for each live node with its Ack, which may be nil, in no order, until it returns false. visit must
// be quick and must not call the registry.
func (r *Registry) LiveNodes(visit func(*Node, *Ack) bool) {
	now := r.c.Now()
	r.mu.RLock()
	defer r.mu.RUnlock()
	for id, n := range r.ix.nodes {
		if n.Live(now) && !visit(n, r.ix.acks[id]) {
			return
		}
	}
}

// Moved returns a channel that is closed with the next change of anything in the registry.
func (r *Registry) Moved() <-chan struct{} {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.applied
}

// NoteFollows notes that the agent follows, and its version. From then on only Follow says what it has handed on. It is a
// write per upgrade of the agent.
func (r *Registry) NoteFollows(ctx context.Context, n *Node, version string) error {
	if n.Follows && n.Version == version {
		return nil
	}
	changed := *n
	changed.Follows, changed.Version = true, version
	err := r.PutNode(store.WithReserve(ctx), &changed, nil)
	if errors.Is(err, ErrConflict) { // the next stream notes it
		return nil
	}
	return err
}
