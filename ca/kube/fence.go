package kube

import (
	"context"
	"errors"
	"time"
)

// tenureKey is where the context of a leader's work has its tenure.
type tenureKey struct{}

// A tenure is what a leader's work knows of its Lease.
type tenure struct {
	e    *election
	lost func() // ends the work
}

var errLeaseOver = errors.New("the lease may be another replica's by now; nothing is written")

// mayWrite returns an error, and ends the work, if ctx is one of work and the Lease may be another's. Both clocks count: one
// stands still while the machine sleeps, and the other one can be set.
func mayWrite(ctx context.Context) error {
	t, ok := ctx.Value(tenureKey{}).(*tenure)
	if !ok {
		return nil
	}
	// For so long after a renewal was begun nobody else can have the Lease, with some to spare.
	lasts := t.e.duration * 2 / 3
	if at := t.e.confirmed.Load(); at != nil {
		now := time.Now()
		if now.Sub(*at) < lasts && now.Round(0).Sub(at.Round(0)) < lasts {
			return nil
		}
	}
	t.lost()
	return errLeaseOver
}
