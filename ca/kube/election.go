package kube

import (
	"context"
	"errors"
	"log/slog"
	mrand "math/rand/v2"
	"sync/atomic"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// An election is one replica's part in who holds a Lease. The fields of the Lease mean what they mean to client-go's
// leaderelection, which is not used: it links a client for every kind of Kubernetes, gives the Lease up while the work under
// it still ends, and goes on for as long as it may hope to renew, also when it has seen that another one holds it.
//
// Clocks of two machines are never compared: a Lease is over when this replica has looked at it for as long as it lasts and it did not
// change. Each method is called by one goroutine at a time.
type election struct {
	leases         Resource[coordinationv1.Lease, coordinationv1.LeaseList]
	name, identity string
	duration       time.Duration
	log            *slog.Logger

	have    *coordinationv1.Lease // as it was written last; nil: it is not ours
	renewed time.Time             // when the request began that wrote it
	// confirmed is renewed, for whoever asks while the Lease is kept; nil: never.
	confirmed atomic.Pointer[time.Time]

	seen   coordinationv1.LeaseSpec
	seenAt time.Time // when it was first seen so; zero: never
	silent bool      // the last request failed, and the log says so already
}

// errNotOurs tells that somebody else holds the Lease, or deleted it.
var errNotOurs = errors.New("the lease is not ours")

// win stands until the Lease is ours, or ctx ends.
func (e *election) win(ctx context.Context) bool {
	e.have = nil
	for ctx.Err() == nil {
		err := e.stand(ctx)
		e.note(ctx, err)
		if err == nil {
			return true
		}
		every := e.duration / renewalsPerLease
		if !pause(ctx, every+mrand.N(every/5)) {
			break
		}
	}
	return false
}

// stand takes the Lease if nobody holds it.
func (e *election) stand(ctx context.Context) error {
	began := time.Now()
	have, err := e.leases.Get(ctx, e.name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		e.have, err = e.leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: e.name}, Spec: e.spec(coordinationv1.LeaseSpec{})}, metav1.CreateOptions{})
		if apierrors.IsNotFound(err) { // the namespace is
			return err
		}
	case err != nil:
		return err
	case !e.over(have.Spec):
		return errNotOurs
	default:
		have.Spec = e.spec(have.Spec)
		e.have, err = e.leases.Update(ctx, have, metav1.UpdateOptions{})
	}
	if err != nil {
		return another(err)
	}
	e.renewed = began
	e.confirmed.Store(&began)
	return nil
}

// over tells whether a Lease may be taken.
func (e *election) over(s coordinationv1.LeaseSpec) bool {
	if e.seenAt.IsZero() || !equality.Semantic.DeepEqual(e.seen, s) {
		e.seen, e.seenAt = *s.DeepCopy(), time.Now()
	}
	if s.HolderIdentity == nil || *s.HolderIdentity == "" || *s.HolderIdentity == e.identity {
		return true
	}
	lasts := e.duration
	if s.LeaseDurationSeconds != nil && *s.LeaseDurationSeconds > 0 {
		lasts = time.Duration(*s.LeaseDurationSeconds) * time.Second
	}
	return time.Since(e.seenAt) >= lasts
}

// spec is what a Lease says that is ours from now on, after it was as in s.
func (e *election) spec(s coordinationv1.LeaseSpec) coordinationv1.LeaseSpec {
	now, seconds := metav1.NowMicro(), int32(e.duration/time.Second)
	if s.HolderIdentity == nil || *s.HolderIdentity != e.identity {
		transitions := int32(0)
		if s.LeaseTransitions != nil {
			transitions = *s.LeaseTransitions + 1
		}
		s.HolderIdentity, s.AcquireTime, s.LeaseTransitions = &e.identity, &now, &transitions
	}
	s.RenewTime, s.LeaseDurationSeconds = &now, &seconds
	return s
}

// keep renews the Lease until ctx ends. It returns earlier if somebody else has it, or if it could not be renewed for two
// thirds of the time that it lasts.
func (e *election) keep(ctx context.Context) {
	wait := e.duration / renewalsPerLease
	for pause(ctx, wait) {
		by := e.renewed.Add(e.duration * 2 / 3)
		rctx, cancel := context.WithDeadline(ctx, by)
		err := e.renew(rctx)
		cancel()
		e.note(ctx, err)
		wait = e.duration / renewalsPerLease
		switch {
		case err == nil:
		case errors.Is(err, errNotOurs):
			return
		default:
			wait = min(wait/2+mrand.N(wait), time.Until(by))
			if wait <= 0 {
				return
			}
		}
	}
}

// renew writes the Lease anew. One that has changed may still be ours: somebody labelled it, or the answer to the last renewal was lost.
func (e *election) renew(ctx context.Context) error {
	began := time.Now()
	next := e.have.DeepCopy()
	next.Spec = e.spec(next.Spec)
	made, err := e.leases.Update(ctx, next, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) {
		have, gerr := e.leases.Get(ctx, e.name, metav1.GetOptions{})
		if gerr != nil {
			return another(gerr)
		}
		if have.Spec.HolderIdentity == nil || *have.Spec.HolderIdentity != e.identity {
			return errNotOurs
		}
		have.Spec = e.spec(have.Spec)
		made, err = e.leases.Update(ctx, have, metav1.UpdateOptions{})
	}
	if err != nil {
		return another(err)
	}
	e.have, e.renewed = made, began
	e.confirmed.Store(&began)
	return nil
}

// release gives the Lease up if it is ours. Nobody works under it any more. If it fails, the Lease ends by itself.
func (e *election) release() {
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	have, err := e.leases.Get(ctx, e.name, metav1.GetOptions{})
	if err != nil || have.Spec.HolderIdentity == nil || *have.Spec.HolderIdentity != e.identity {
		return
	}
	nobody, now, seconds := "", metav1.NowMicro(), int32(1)
	have.Spec.HolderIdentity, have.Spec.RenewTime, have.Spec.LeaseDurationSeconds = &nobody, &now, &seconds
	if _, err = e.leases.Update(ctx, have, metav1.UpdateOptions{}); err != nil {
		e.log.Debug("the lease was not given up; it ends by itself", "err", err)
	}
}

// another makes errNotOurs of an error that tells that somebody else was there first.
func another(err error) error {
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) || apierrors.IsAlreadyExists(err) {
		return errNotOurs
	}
	return err
}

// note logs the first of several failures, and that they are over.
func (e *election) note(ctx context.Context, err error) {
	switch failed := err != nil && !errors.Is(err, errNotOurs) && ctx.Err() == nil; {
	case failed && !e.silent:
		e.silent = true
		e.log.Warn("the lease cannot be read or written; trying again", "err", err)
	case (err == nil || errors.Is(err, errNotOurs)) && e.silent:
		e.silent = false
		e.log.Info("the lease can be read and written again")
	}
}

// pause waits, and is false if ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
