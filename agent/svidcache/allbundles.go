package svidcache

import (
	"context"

	"github.com/signet-id/signet/workloadapi"
)

// WatchBundles sends, in updates without identities, the bundles of the own trust domain and of all that entries of this
// node federate with, at once and again after each change. The channel is closed when ctx ends. It counts as an open
// stream: an authority has been handed on when it has been written there too.
//
// Errors: workloadapi.ErrNotReady, ErrUnavailable at shutdown, and ctx's.
func (c *Cache) WatchBundles(ctx context.Context) (<-chan workloadapi.Update, error) {
	select {
	case <-c.synced:
	default:
		if err := c.awaitState(ctx); err != nil {
			return nil, err
		}
	}
	w := newWatcher(workloadapi.Caller{}, false)
	w.allBundles = true
	c.subscribe(w)
	return c.open(ctx, w)
}
