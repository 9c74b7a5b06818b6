// Package events writes Events to the API server of a cluster: few, each once, and never so that somebody waits for it. An Event is for whoever
// looks at the object with kubectl; nothing depends on it.
package events

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/signet-id/signet/ca/kube"
)

const (
	perSecond = 2
	burst     = 20
	// maxPending bounds what waits to be written; the rest of a flood is counted, and written if it comes again.
	maxPending = 500
	// maxPendingOf bounds those of one namespace among them: who may make pods there does not keep others from hearing of theirs.
	maxPendingOf = 100
	// stale is when what waits is not worth writing any more.
	stale = 10 * time.Minute
	// again is when the same Event may be written once more: API servers forget Events after an hour.
	again      = 50 * time.Minute
	maxWritten = 10_000
	maxMessage = 1000
	retryAfter = 5 * time.Second
	logEvery   = time.Minute

	component = "signet-ca"
	reporter  = "signet-id.github.io/ca"
)

// An Event says what is wrong with an object.
type Event struct {
	// Object is what it is about. Its namespace is where the Event is written; a namespace is written about in itself.
	Object corev1.ObjectReference
	// Reason is one word in CamelCase, Message what is wrong and how to put it right.
	Reason, Message string
	// Normal tells that nothing is wrong: what was is right again.
	Normal bool
	// Occasion tells Events apart that say the same at different times, such as by when it began. Empty: it is said once.
	Occasion string
}

// Pod names a pod.
func Pod(namespace, name, uid string) corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: namespace, Name: name, UID: types.UID(uid)}
}

// Stats are numbers of Events.
type Stats struct{ Written, Dropped, Pending uint64 }

// A Recorder takes Events from anybody and writes them in Run. One that is nil takes none.
type Recorder struct {
	client *kube.Client
	log    *slog.Logger
	limit  flowcontrol.RateLimiter
	wake   chan struct{}

	mu       sync.Mutex
	pending  []pending
	known    map[string]time.Time // names of those that wait or were written
	stats    Stats
	loggedAt time.Time
}

type pending struct {
	event Event
	name  string
	at    time.Time
}

// New returns a Recorder for a cluster.
func New(c *kube.Client, log *slog.Logger) *Recorder {
	return &Recorder{client: c, log: log, limit: flowcontrol.NewTokenBucketRateLimiter(perSecond, burst), wake: make(chan struct{}, 1), known: map[string]time.Time{}}
}

// Record takes an Event, unless the same one was taken lately or too many wait. It never blocks.
func (r *Recorder) Record(e Event) {
	if r == nil {
		return
	}
	if len(e.Message) > maxMessage {
		e.Message = strings.ToValidUTF8(e.Message[:maxMessage], "") + "..."
	}
	name := nameOf(e)
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if at, ok := r.known[name]; ok && now.Sub(at) < again {
		return
	}
	if len(r.pending) >= maxPending || r.waiting(e.Object.Namespace) >= maxPendingOf {
		r.stats.Dropped++
		if now.Sub(r.loggedAt) >= logEvery {
			r.loggedAt = now
			r.log.Warn("there are more Events than are written to the API server", "dropped", r.stats.Dropped, "about", e.Object.Namespace+"/"+e.Object.Name, "reason", e.Reason, "message", e.Message)
		}
		return
	}
	if len(r.known) >= maxWritten {
		clear(r.known) // those that are at the API server still are found there by their names
		for _, p := range r.pending {
			r.known[p.name] = p.at
		}
	}
	r.known[name] = now
	r.pending = append(r.pending, pending{e, name, now})
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// waiting is how many Events of a namespace wait. r.mu is held.
func (r *Recorder) waiting(namespace string) (n int) {
	for _, p := range r.pending {
		if p.event.Object.Namespace == namespace {
			n++
		}
	}
	return n
}

// nameOf makes the same Event of any replica have the same name, so that the API server takes it once.
func nameOf(e Event) string {
	h := sha256.New()
	for _, t := range []string{e.Object.Kind, e.Object.Namespace, e.Object.Name, string(e.Object.UID), e.Reason, e.Message, e.Occasion} {
		h.Write(append([]byte(t), 0))
	}
	return strings.TrimRight(e.Object.Name[:min(len(e.Object.Name), 200)], ".-") + "." + hex.EncodeToString(h.Sum(nil)[:8])
}

// Stats returns the numbers since the start.
func (r *Recorder) Stats() Stats {
	if r == nil {
		return Stats{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Pending = uint64(len(r.pending))
	return s
}

// Run writes what was recorded until ctx ends. One replica at a time should.
func (r *Recorder) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		p, ok := r.next()
		if !ok {
			select {
			case <-r.wake:
			case <-ctx.Done():
			}
			continue
		}
		if r.limit.Wait(ctx) != nil {
			r.put(p)
			return nil
		}
		err := r.write(ctx, p)
		switch {
		case err == nil:
			r.count(func(s *Stats) { s.Written++ })
		case apierrors.IsAlreadyExists(err): // by another replica, or before a restart
		case ctx.Err() != nil:
			r.put(p)
		case refused(err):
			r.count(func(s *Stats) { s.Dropped++ })
			r.warn("an Event was not written", p, err)
		default:
			r.put(p)
			r.warn("Events cannot be written; trying again", p, err)
			select {
			case <-time.After(retryAfter):
			case <-ctx.Done():
			}
		}
	}
	return nil
}

// refused tells that to try again is of no use.
func refused(err error) bool {
	return apierrors.IsForbidden(err) || apierrors.IsNotFound(err) || apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)
}

func (r *Recorder) next() (pending, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.pending) > 0 {
		p := r.pending[0]
		r.pending[0] = pending{}
		r.pending = r.pending[1:]
		if time.Since(p.at) < stale {
			return p, true
		}
		r.stats.Dropped++
		delete(r.known, p.name)
	}
	r.pending = nil
	return pending{}, false
}

// put puts back what was not written.
func (r *Recorder) put(p pending) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending = append([]pending{p}, r.pending...)
}

func (r *Recorder) count(f func(*Stats)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.stats)
}

func (r *Recorder) warn(message string, p pending, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.loggedAt) >= logEvery {
		r.loggedAt = time.Now()
		r.log.Warn(message, "about", p.event.Object.Kind+" "+p.event.Object.Namespace+"/"+p.event.Object.Name, "reason", p.event.Reason, "message", p.event.Message, "err", err)
	}
}

func (r *Recorder) write(ctx context.Context, p pending) error {
	at, kind := metav1.NewTime(p.at), corev1.EventTypeWarning
	if p.event.Normal {
		kind = corev1.EventTypeNormal
	}
	namespace := p.event.Object.Namespace
	if namespace == "" { // of what is in none, the API server takes Events here
		namespace = metav1.NamespaceDefault
	}
	_, err := r.client.Events(namespace).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: p.name, Namespace: namespace},
		InvolvedObject: p.event.Object,
		Type:           kind, Reason: p.event.Reason, Message: p.event.Message,
		Source: corev1.EventSource{Component: component}, ReportingController: reporter, ReportingInstance: component,
		FirstTimestamp: at, LastTimestamp: at, Count: 1,
	}, metav1.CreateOptions{})
	return err
}
