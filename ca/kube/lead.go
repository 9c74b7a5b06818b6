package kube

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"
)

// A Leader does work on one replica of the CA at a time, by a Lease at the API server of a cluster.
//
// A Lease is a promise by clocks, not a fence: a replica that stands still for longer than Duration, in the middle of its
// work, can write once more when it wakes. What is written must bear that, as commits to the store do by their checks.
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
	for ctx.Err() == nil {
		if done, err := l.term(ctx, work, d, name, log); done {
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
func (l *Leader) term(ctx context.Context, work func(context.Context) error, d time.Duration, name string, log *slog.Logger) (done bool, err error) {
	// The work ends before the election does, so that the Lease is held for as long as anything is done under it. client-go's
	// own release would give it up while the work still ends.
	electing, stopElecting := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), logr.FromSlogHandler(quiet{log.Handler()})))
	defer stopElecting()
	working, stopWorking := context.WithCancel(ctx)
	defer stopWorking()

	lock := &watchedLock{Interface: &resourcelock.LeaseLock{
		LeaseMeta: metav1.ObjectMeta{Namespace: l.Namespace, Name: l.Lease}, Client: l.Client.Typed.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: name},
	}, log: log, lost: stopWorking}
	started := make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: lock, Name: l.Lease, LeaseDuration: d, RenewDeadline: d * 2 / 3, RetryPeriod: d / renewalsPerLease,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { close(started) }, // in a goroutine of its own, which ends at once
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return true, fmt.Errorf("the lease %s/%s: %w", l.Namespace, l.Lease, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer stopWorking() // lost
		elector.Run(electing)
	}()
	defer func() {
		stopElecting()
		<-ended
	}()

	select {
	case <-started:
	case <-ended: // cannot be but by an election lost as soon as it was won
		return false, nil
	case <-ctx.Done():
		stopElecting()
		<-ended // it may have been won at this very moment
		l.release(lock)
		return true, nil
	}
	log.Info("this replica leads")
	err = work(working)
	ownWill := working.Err() == nil
	stopElecting()
	<-ended // nobody renews any more
	switch {
	case ctx.Err() != nil:
		l.release(lock)
		log.Info("this replica has ended and leads no more")
		return true, nil
	case ownWill:
		l.release(lock)
		log.Info("this replica leads no more", "err", err)
		return true, err
	}
	log.Warn("this replica has lost the lease and stands again", "err", err)
	return false, nil
}

// release gives the Lease up if it is ours. Nobody works under it any more. If it fails, the Lease ends by itself.
func (l *Leader) release(lock *watchedLock) {
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	held, _, err := lock.Interface.Get(ctx)
	if err != nil || held.HolderIdentity != lock.Identity() {
		return
	}
	now := metav1.Now()
	err = lock.Interface.Update(ctx, resourcelock.LeaderElectionRecord{LeaseDurationSeconds: 1, AcquireTime: now, RenewTime: now, LeaderTransitions: held.LeaderTransitions})
	if err != nil {
		lock.log.Debug("the lease was not given up; it ends by itself", "err", err)
	}
}

// A watchedLock looks at what the API server answers. client-go goes on for as long as it may hope to renew, also when it
// has seen that somebody deleted or changed the Lease and another replica holds it now; here the work ends at once.
type watchedLock struct {
	resourcelock.Interface
	log  *slog.Logger
	lost func()

	mu     sync.Mutex
	held   bool // we wrote it last
	silent bool // the last request failed, and the log says so already
}

func (w *watchedLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	r, raw, err := w.Interface.Get(ctx)
	w.note(ctx, err, apierrors.IsNotFound(err))
	if err == nil && r.HolderIdentity != w.Identity() {
		w.notOurs()
	}
	return r, raw, err
}

func (w *watchedLock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	err := w.Interface.Create(ctx, r)
	w.wrote(ctx, err)
	return err
}

func (w *watchedLock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	err := w.Interface.Update(ctx, r)
	w.wrote(ctx, err)
	return err
}

func (w *watchedLock) wrote(ctx context.Context, err error) {
	another := apierrors.IsConflict(err) || apierrors.IsNotFound(err) || apierrors.IsAlreadyExists(err)
	w.note(ctx, err, another)
	switch {
	case err == nil:
		w.mu.Lock()
		w.held = true
		w.mu.Unlock()
	case another:
		w.notOurs()
	}
}

// notOurs ends the work if there is any.
func (w *watchedLock) notOurs() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held {
		w.lost()
	}
}

// note logs the first of several failures, and that they are over.
func (w *watchedLock) note(ctx context.Context, err error, expected bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch failed := err != nil && !expected && ctx.Err() == nil; {
	case failed && !w.silent:
		w.silent = true
		w.log.Warn("the lease cannot be read or written; trying again", "err", err)
	case err == nil && w.silent:
		w.silent = false
		w.log.Info("the lease can be read and written again")
	}
}

// quiet hands client-go's lines on as those for whoever debugs: Leader says itself what an operator needs to know.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, _ slog.Level) bool {
	return q.Handler.Enabled(ctx, slog.LevelDebug)
}

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return q.Handler.Handle(ctx, r)
}

func (q quiet) WithAttrs(a []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(a)} }
func (q quiet) WithGroup(n string) slog.Handler      { return quiet{q.Handler.WithGroup(n)} }
