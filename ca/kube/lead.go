package kube

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"os"
	"strings"
	"time"
)

// A Leader does work on one replica of the CA at a time, by a Lease at the API server of a cluster.
//
// A Lease is a promise by clocks, not a fence: a replica may stand still for longer than Duration in the middle of its work. So
// every request under the context of the work that would write is refused once the Lease may be another's, before it is sent, and
// such a one ends the work (fence.go). What was sent already must bear to come late: what is written at the API server names the
// version that it builds on, and commits to the store those of the term (registry.Term).
type Leader struct {
	Client *Client
	// Namespace and Lease name the Lease. The namespace must exist; the Lease is made if it is missing.
	Namespace, Lease string
	// Identity is what the Lease shows of its holder; a random part is added, so that no two are ever the same.
	// Empty: the host's name.
	Identity string
	// Duration is how long a holder that says nothing any more keeps the Lease. It says so five times in it, and stops its
	// work if it could not for two thirds of it. Whole seconds, at least three; zero means 20 seconds.
	Duration time.Duration
	// Log is told when this replica begins and ends to lead. Nil: discarded.
	Log *slog.Logger
}

const (
	leaseDuration    = 20 * time.Second
	minLeaseDuration = 3 * time.Second
	renewalsPerLease = 5
	releaseTimeout   = 5 * time.Second
	// A replica that lost the Lease stands again after a moment, which differs between replicas.
	standAgainAfter = 200 * time.Millisecond
)

// Run stands for leader until ctx ends, and calls work each time that this replica leads. The context of work ends when the
// Lease is lost or ctx ends. Only when work has returned does this replica stand again, or give the Lease up so that
// another one need not wait for its end. Run returns nil once ctx has ended and work has returned, or, with its error,
// when work returned though its context had not ended.
func (l *Leader) Run(ctx context.Context, work func(context.Context) error) error {
	d := l.Duration
	if d == 0 {
		d = leaseDuration
	}
	if d < minLeaseDuration || d%time.Second != 0 {
		return fmt.Errorf("the lease %s/%s: duration %s must be whole seconds, at least %s", l.Namespace, l.Lease, d, minLeaseDuration)
	}
	log := l.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("cluster", l.Client.Cluster, "lease", l.Namespace+"/"+l.Lease)
	name := l.Identity
	if name == "" {
		name, _ = os.Hostname()
	}
	name += "_" + strings.ToLower(rand.Text()[:12])
	e := &election{leases: l.Client.Leases(l.Namespace), name: l.Lease, identity: name, duration: d, log: log}
	for ctx.Err() == nil {
		if done, err := l.term(ctx, work, e); done {
			return err
		}
		select {
		case <-time.After(standAgainAfter + mrand.N(standAgainAfter)):
		case <-ctx.Done():
		}
	}
	return nil
}

// term stands once and, if elected, works until the Lease is lost. done tells that Run is to return err.
func (l *Leader) term(ctx context.Context, work func(context.Context) error, e *election) (done bool, err error) {
	if !e.win(ctx) {
		e.release() // it may have been won at this very moment
		return true, nil
	}
	// The work ends before the Lease is given up, so that it is held for as long as anything is done under it.
	renewing, stopRenewing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopRenewing()
	working, stopWorking := context.WithCancel(ctx)
	defer stopWorking()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer stopWorking() // lost
		e.keep(renewing)
	}()
	defer func() {
		stopRenewing()
		<-ended
	}()

	e.log.Info("this replica leads")
	err = work(context.WithValue(working, tenureKey{}, &tenure{e, stopWorking}))
	ownWill := working.Err() == nil
	stopRenewing()
	<-ended // nobody renews any more
	switch {
	case ctx.Err() != nil:
		e.release()
		e.log.Info("this replica has ended and leads no more")
		return true, nil
	case ownWill:
		e.release()
		e.log.Info("this replica leads no more", "err", err)
		return true, err
	}
	e.log.Warn("this replica has lost the lease and stands again", "err", err)
	return false, nil
}
