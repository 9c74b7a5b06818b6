// Package watch tells the Expander of the pods that a cluster's API server knows: which there are, on which nodes they were put and what
// their namespaces are labelled. It follows pods, nodes and namespaces, keeps of each the little that rules look at, and
// writes nothing but Events. What it knows stays while the API server is away.
package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kwatch "k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/follow"
	"github.com/signet-id/signet/ca/kube/pods"
)

// An Expander is told of pods. *pods.Expander is one.
type Expander interface {
	Update(cluster string, changed []*pods.Pod, gone []string)
	Synced(cluster string, synced bool)
}

// Config says what is watched for whom.
type Config struct {
	Client   *kube.Client
	Expander Expander
	// Refused is told of pods that get no identity because of their node. Nil: nobody is.
	Refused func(pods.Refusal)
	// KeepObjects asks for Pod.Object and Pod.Node: metadata and spec of the pod and its node.
	KeepObjects bool
	// Telling is told, before the Expander is, how new the newest change is that it is told of, and Followed, after it, up to where it
	// was told everything: resource versions by resource. Nil: nobody is.
	Telling, Followed func(map[string]uint64)
	Log               *slog.Logger

	follow follow.Config // times, for tests
}

// A Watcher watches one cluster.
type Watcher struct {
	c                       Config
	pods, nodes, namespaces *follow.Follower
	wake                    chan struct{}

	mu               sync.Mutex
	known            *known
	begun, synced    bool
	newest, followed map[string]uint64 // versions by resource: of the objects that were seen, and of the last that was heard
}

// Of pods without a node there is nothing to know yet, and of those that have ended nothing any more.
const podsThatRun = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"

// New returns a Watcher that has not begun, and tells the Expander that nothing is known.
func New(c Config) *Watcher {
	if c.Refused == nil {
		c.Refused = func(pods.Refusal) {}
	}
	if c.Telling == nil {
		c.Telling = func(map[string]uint64) {}
	}
	if c.Followed == nil {
		c.Followed = func(map[string]uint64) {}
	}
	w := &Watcher{c: c, wake: make(chan struct{}, 1), known: newKnown(c.Client.Cluster, c.KeepObjects), newest: map[string]uint64{}, followed: map[string]uint64{}}
	c.Expander.Synced(c.Client.Cluster, false)

	f := c.follow
	f.Log, f.Changed = c.Log, w.signal
	f.Name, f.Store = "pods", &store{w, "pods", &w.known.pods}
	f.List = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		o.FieldSelector = podsThatRun
		return c.Client.Pods("").List(ctx, o)
	}
	f.Watch = func(ctx context.Context, o metav1.ListOptions) (kwatch.Interface, error) {
		o.FieldSelector = podsThatRun
		return c.Client.Pods("").Watch(ctx, o)
	}
	w.pods = follow.New(f)

	metadata := func(resource string) {
		r := c.Client.Metadata.Resource(corev1.SchemeGroupVersion.WithResource(resource))
		f.List = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return r.List(ctx, o) }
		f.Watch = r.Watch
	}
	f.Name, f.Store = "namespaces", &store{w, "namespaces", &w.known.namespaces}
	metadata("namespaces")
	w.namespaces = follow.New(f)
	f.Name, f.Store = "nodes", &store{w, "nodes", &w.known.nodes}
	metadata("nodes")
	if c.KeepObjects {
		f.List = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.Client.Nodes().List(ctx, o)
		}
		f.Watch = c.Client.Nodes().Watch
	}
	w.nodes = follow.New(f)
	return w
}

// Run watches until ctx ends.
func (w *Watcher) Run(ctx context.Context) error {
	var g sync.WaitGroup
	for _, f := range []*follow.Follower{w.namespaces, w.nodes, w.pods} {
		g.Go(func() { f.Run(ctx) })
	}
	for {
		select {
		case <-ctx.Done():
			g.Wait()
			return nil
		case <-w.wake:
			w.tell()
		}
	}
}

func (w *Watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// A batch is how many pods the Expander is told of at once.
const batch = 2000

// tell tells the Expander what has changed. What is there before all three lists were whole would be told twice.
func (w *Watcher) tell() {
	known := w.pods.Status().Known && w.nodes.Status().Known && w.namespaces.Status().Known
	w.mu.Lock()
	w.begun = w.begun || known
	if !w.begun {
		w.mu.Unlock()
		return
	}
	changed, gone, misplaced := w.known.take()
	newest, followed := maps.Clone(w.newest), maps.Clone(w.followed)
	synced := w.synced
	w.synced = known
	w.mu.Unlock()
	w.c.Telling(newest)
	defer w.c.Followed(followed)

	cluster := w.c.Client.Cluster
	if !known && synced {
		w.c.Expander.Synced(cluster, false)
	}
	for len(changed) > 0 || len(gone) > 0 {
		n := min(batch, len(changed))
		w.c.Expander.Update(cluster, changed[:n], gone)
		changed, gone = changed[n:], nil
	}
	if known && !synced {
		w.c.Expander.Synced(cluster, true)
		w.c.Log.Info("all pods of the cluster are known")
	}
	for _, r := range misplaced {
		w.c.Refused(r)
	}
}

// Status says what is known of a cluster.
type Status struct {
	// Synced tells that all is known.
	Synced bool
	// Err is what keeps the API server from being followed at the moment; nil if nothing does.
	Err error
	// Pods, Nodes and Namespaces are how many are known; Untold are pods whose node or namespace is not; Left are objects
	// that were too large or too many.
	Pods, Nodes, Namespaces, Untold, Left int
	// Bytes is about how much memory they take.
	Bytes int64
	// Contact is when the API server was heard last by the one that heard it longest ago.
	Contact time.Time
}

// Status returns what is known.
func (w *Watcher) Status() Status {
	var s Status
	var errs []string
	for _, f := range []*follow.Follower{w.pods, w.nodes, w.namespaces} {
		fs := f.Status()
		if fs.Err != nil {
			errs = append(errs, fs.Err.Error())
		}
		if s.Contact.IsZero() || fs.Contact.Before(s.Contact) {
			s.Contact = fs.Contact
		}
	}
	if len(errs) > 0 {
		s.Err = errors.New(strings.Join(errs, "; "))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s.Synced = w.synced
	w.known.count(&s)
	return s
}

// Problem says in a line what is wrong with the cluster; empty if nothing is.
func (w *Watcher) Problem() string {
	s := w.Status()
	switch cluster := w.c.Client.Cluster; {
	case !s.Synced && s.Err != nil:
		return fmt.Sprintf("cluster %s: its pods are not known: %v", cluster, s.Err)
	case !s.Synced:
		return fmt.Sprintf("cluster %s: its pods are not known yet", cluster)
	case s.Err != nil:
		return fmt.Sprintf("cluster %s: its pods are known as of %s: %v", cluster, s.Contact.UTC().Format(time.RFC3339), s.Err)
	case s.Left > 0:
		return fmt.Sprintf("cluster %s: %d objects are too large or too many, and get no identity", cluster, s.Left)
	}
	return ""
}

// A store hands what one Follower sees to what is known, under the lock.
type store struct {
	w        *Watcher
	resource string
	of       interface {
		begin()
		put(metav1.Object)
		end()
		remove(metav1.Object)
	}
}

func (s *store) do(f func()) {
	s.w.mu.Lock()
	f()
	s.w.mu.Unlock()
	s.w.signal()
}

// Begin implements follow.Store.
func (s *store) Begin() { s.do(s.of.begin) }

// Put implements follow.Store.
func (s *store) Put(o metav1.Object) { s.do(func() { s.saw(o); s.of.put(o) }) }

// End implements follow.Store.
func (s *store) End() { s.do(s.of.end) }

// Delete implements follow.Store.
func (s *store) Delete(o metav1.Object) { s.do(func() { s.saw(o); s.of.remove(o) }) }

// At implements follow.Placed.
func (s *store) At(version uint64) { s.do(func() { s.w.followed[s.resource] = version }) }

// saw notes how new an object is. Replicas that saw the same changes have the same newest one; where a list or a watch ended differs.
func (s *store) saw(o metav1.Object) {
	if n, err := strconv.ParseUint(o.GetResourceVersion(), 10, 64); err == nil {
		s.w.newest[s.resource] = max(s.w.newest[s.resource], n)
	}
}

// Now asks the API server where it is now: the resource versions of lists that are as new as anything it has ever acknowledged.
func (w *Watcher) Now(ctx context.Context) (map[string]uint64, error) {
	out := map[string]uint64{}
	for resource, f := range map[string]*follow.Follower{"pods": w.pods, "nodes": w.nodes, "namespaces": w.namespaces} {
		version, err := f.Now(ctx)
		if err != nil {
			return nil, err
		}
		out[resource] = version
	}
	return out, nil
}
