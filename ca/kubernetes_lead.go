package ca

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
)

// lease is the name of the Lease in the CA's own namespace.
const lease = "signet-ca"

// lead runs what one replica does at a time in a cluster. Which one does is said by a Lease; that a former one, which may have stood
// still and not know it, writes nothing any more, by the term that the next one begins in the store.
func (ca *CA) lead(ctx context.Context, k *kubeCluster) error {
	l := kube.Leader{Client: k.client, Namespace: k.namespace, Lease: lease, Log: ca.log}
	for {
		err := l.Run(ctx, func(ctx context.Context) error {
			g, ctx := errgroup.WithContext(ctx)
			if ca.replicated() {
				term, err := ca.beginTerm(ctx, k.client.Cluster)
				if err != nil {
					return err
				}
				g.Go(func() error { return term.Wait(ctx) })
				ctx = term.Bind(ctx)
			}
			for _, f := range k.leading {
				g.Go(func() error { return f(ctx) })
			}
			return g.Wait()
		})
		if !errors.Is(err, registry.ErrTermOver) {
			return err
		}
		ca.log.Warn("another replica has begun to lead though this one held the lease; standing again", "cluster", k.client.Cluster)
	}
}

// Waits between two tries to begin a term.
const minTermRetry, maxTermRetry = 200 * time.Millisecond, 5 * time.Second

// beginTerm begins a term as soon as the store takes it: a leader that cannot commit would only keep others from leading, but all of
// them have one store.
func (ca *CA) beginTerm(ctx context.Context, cluster string) (*registry.Term, error) {
	host, _ := os.Hostname()
	for wait := minTermRetry; ; wait = min(2*wait, maxTermRetry) {
		t, err := ca.reg.Lead(ctx, "kubernetes/"+cluster, host)
		if err == nil {
			return t, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !errors.Is(err, registry.ErrConflict) && !errors.Is(err, registry.ErrNotReady) && !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrDiskFull) {
			return nil, err
		}
		ca.log.Warn("this replica has the lease but cannot begin its term; trying again", "cluster", cluster, "err", err)
		t0 := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-t0.C:
		case <-ctx.Done():
			t0.Stop()
			return nil, ctx.Err()
		}
	}
}
