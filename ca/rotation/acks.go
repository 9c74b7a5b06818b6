package rotation

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
)

const (
	// gather is how long acknowledgements are collected, so that those of many agents are one commit.
	gather = 50 * time.Millisecond
	// ackRetryMin and ackRetryMax bound the wait after a commit that failed.
	ackRetryMin = 200 * time.Millisecond
	ackRetryMax = 30 * time.Second
)

// acks are what agents have handed on and the store does not say yet. Agents that follow need no memory here: their streams
// know it, and are asked.
type acks struct {
	wake chan struct{} // one slot: look again

	mu      sync.Mutex
	fetched map[spiffeid.ID][]string // prepared authorities in the bundle that an agent has fetched
}

func (a *acks) init() {
	a.wake = make(chan struct{}, 1)
	a.fetched = map[spiffeid.ID][]string{}
}

func (a *acks) kick() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// HandedOn tells that an agent that follows this replica has said what it has handed on. It does not block.
func (r *Rotator) HandedOn(agent spiffeid.ID, authorities []string) {
	for _, id := range r.c.Set.Prepared() {
		if slices.Contains(authorities, id) && !r.c.Registry.Ack(agent).Has(id) {
			r.acks.kick()
			return
		}
	}
}

// Fetched tells that an agent has fetched, with its SVID, a bundle with these authorities. For an agent that follows it
// means nothing, since it says itself what its workloads have. It does not block; what is not written by then is not
// lost, because such an agent fetches the bundle again within seconds.
func (r *Rotator) Fetched(n *registry.Node, authorities []string) {
	if n == nil || n.Follows {
		return
	}
	prepared := r.c.Set.Prepared()
	if len(prepared) == 0 {
		return
	}
	known, news := r.c.Registry.Ack(n.ID), false
	var has []string
	for _, id := range prepared {
		if slices.Contains(authorities, id) {
			has = append(has, id)
			news = news || !known.Has(id)
		}
	}
	if !news {
		return
	}
	r.acks.mu.Lock()
	r.acks.fetched[n.ID] = has // bounded by the number of attested agents, and emptied by the writer
	r.acks.mu.Unlock()
	r.acks.kick()
}

// writeAcks brings into the store what agents have handed on, until ctx ends.
func (r *Rotator) writeAcks(ctx context.Context) {
	wait := ackRetryMin
	for ctx.Err() == nil {
		select {
		case <-r.acks.wake:
		case <-ctx.Done():
			return
		}
		if sleep(ctx, gather, nil) != nil {
			return
		}
		if err := r.writePending(ctx); err != nil && ctx.Err() == nil {
			if !errors.Is(err, registry.ErrConflict) {
				r.c.Log.Warn("acknowledgements of a prepared authority were not written, retrying", "err", err)
			}
			if sleep(ctx, wait/2+rand.N(wait), nil) != nil {
				return
			}
			wait = min(2*wait, ackRetryMax)
			r.acks.kick()
			continue
		}
		wait = ackRetryMin
	}
}

// writePending writes what is news, a commit at a time.
func (r *Rotator) writePending(ctx context.Context) error {
	prepared := r.c.Set.Prepared()
	r.acks.mu.Lock()
	fetched := r.acks.fetched
	r.acks.fetched = map[spiffeid.ID][]string{}
	r.acks.mu.Unlock()
	if len(prepared) == 0 {
		return nil
	}
	news := map[spiffeid.ID][]string{}
	note := func(agent spiffeid.ID, has []string) {
		known := r.c.Registry.Ack(agent)
		var now []string
		changed := false
		for _, id := range prepared {
			switch {
			case known.Has(id):
				now = append(now, id)
			case slices.Contains(has, id):
				now, changed = append(now, id), true
			}
		}
		if changed {
			news[agent] = now
		}
	}
	for agent, f := range r.c.Following() {
		note(agent, f.HandedOn)
	}
	for agent, has := range fetched {
		note(agent, has)
	}
	batch := map[spiffeid.ID][]string{}
	for agent, has := range news {
		batch[agent] = has
		delete(news, agent)
		if len(batch) < registry.MaxAcks && len(news) > 0 {
			continue
		}
		if err := r.c.Registry.PutAcks(store.WithReserve(ctx), batch); err != nil {
			return err
		}
		batch = map[spiffeid.ID][]string{}
	}
	return nil
}
