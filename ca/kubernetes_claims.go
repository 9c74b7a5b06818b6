package ca

import (
	"context"
	"math/rand/v2"
	"time"
)

// Waits before the API server is asked anew whether what agents claim of a cluster can be.
const minClaims, maxClaims = time.Second, 30 * time.Second

// checkClaims finds out, of agents that say they were told more of the cluster than this replica has seen, whether there is that much
// to see. Who says so before the API server was restored, or lies, is told what there is.
func (ca *CA) checkClaims(ctx context.Context, k *kubeCluster) error {
	cluster := k.client.Cluster
	changed := ca.reg.Behind(cluster)
	for wait := minClaims; ; {
		waiting := ca.reg.Waiting(cluster)
		if len(waiting) > 0 {
			now, err := k.watcher.Now(ctx)
			if err == nil {
				wait = minClaims
				if n := ca.reg.Refute(cluster, waiting, now); n > 0 {
					ca.log.Warn("agents said that they were told of changes in the cluster that have not happened there; they are told what there is", "cluster", cluster, "agents", n)
				}
			} else {
				wait = min(2*wait, maxClaims)
			}
		}
		// Not more often than this, whatever agents say.
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
		if len(waiting) > 0 && wait > minClaims {
			continue // it could not be found out
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}
