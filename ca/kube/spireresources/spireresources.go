// Package spireresources reads the custom resources of spire-controller-manager, so that its users can move without rewriting
// them: ClusterSPIFFEIDs become rules of the Expander, which give pods their identities without an entry per pod, ClusterStaticEntries registration
// entries, and ClusterFederatedTrustDomains federation relationships. Entries and relationships belong to their resources: nobody else
// changes them. Every replica reads; one of them, the leader, writes to the store and the resources' status.
//
// What the fields mean is taken from the public API and documentation of github.com/spiffe/spire-controller-manager; where
// signet means something else on purpose, docs/decisions/0039 says so.
package spireresources

import (
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	kwatch "k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/events"
	"github.com/signet-id/signet/ca/kube/follow"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
)

// statusEvery is Config.StatusEvery.
const statusEvery = 10 * time.Second

// Kinds that are read.
const (
	KindClusterSPIFFEID             = "ClusterSPIFFEID"
	KindClusterStaticEntry          = "ClusterStaticEntry"
	KindClusterFederatedTrustDomain = "ClusterFederatedTrustDomain"
)

// Kinds are all of them.
var Kinds = []string{KindClusterSPIFFEID, KindClusterStaticEntry, KindClusterFederatedTrustDomain}

var (
	group                       = schema.GroupVersion{Group: "spire.spiffe.io", Version: "v1alpha1"}
	clusterSPIFFEIDs            = group.WithResource("clusterspiffeids")
	clusterStaticEntries        = group.WithResource("clusterstaticentries")
	clusterFederatedTrustDomain = group.WithResource("clusterfederatedtrustdomains")
)

// An Expander gives pods their identities by rules. *pods.Expander is one.
type Expander interface {
	Expect(origins ...string)
	SetRules(origin string, rules []pods.Rule)
	Again(cluster string, uids []string)
	Pod(cluster, uid string) *pods.Pod
	All(cluster string) []*pods.Pod
	Refusals(cluster, uid string) []pods.Refusal
}

// Config says what a Reader works on.
type Config struct {
	Client      *kube.Client
	TrustDomain spiffeid.TrustDomain
	Registry    *registry.Registry
	Expander    Expander

	// Kinds are those that are read. Empty: all.
	Kinds []string
	// ClassName is the class of resources that are read, WatchClassless tells whether those without one are read, too.
	ClassName      string
	WatchClassless bool
	// ClusterDomain is the domain of the cluster's DNS names. Empty: there is none, and Services have no full name.
	ClusterDomain string
	// IgnoreNamespaces are namespaces whose pods get nothing by ClusterSPIFFEIDs: whose names these match anywhere.
	IgnoreNamespaces []*regexp.Regexp

	// Telling is told, before the Expander is, how new the newest change is that it is told of, and Followed, after it, up to where it
	// was told everything: resource versions by resource. Nil: nobody is.
	Telling, Followed func(map[string]uint64)
	// CheckTTL refuses TTLs that the authorities could not honour; nil allows all.
	CheckTTL func(x509, jwt time.Duration) error
	// Apply makes documents hold and deletes those that o says, as one commit, with its records in the audit log. actor says for
	// which resource.
	Apply func(ctx context.Context, docs []strictyaml.Document, o registry.Options, actor func(registry.Ref) string) error
	// Audit writes a record of an entry that is changed. It is called before the change, which is not made if it fails, and after.
	Audit func(context.Context, ...auditlog.Record) error
	// Events are where it is told what is refused. Nil: in the log alone.
	Events *events.Recorder
	// Actor is who acts in the audit log.
	Actor string
	Log   *slog.Logger     // nil: discarded
	Now   func() time.Time // nil: time.Now

	// StatusEvery is the least time between two rounds of statuses that change because of pods. Zero: ten seconds.
	StatusEvery time.Duration
}

func (c *Config) reads(kind string) bool { return len(c.Kinds) == 0 || slices.Contains(c.Kinds, kind) }

// mine tells whether a resource of that class is read.
func (c *Config) mine(class string) bool {
	return class == "" && c.WatchClassless || class == c.ClassName
}

// A Reader reads the resources of one cluster.
type Reader struct {
	c      Config
	origin string

	ids      *resources[*clusterSPIFFEID]
	entries  *resources[*staticEntry]
	domains  *resources[*federatedTrustDomain]
	services *services

	wake    chan struct{} // one slot: rules have to be looked at
	leading chan struct{} // one slot: the leader has to look
	need    chan struct{} // closed when Services are needed

	mu    sync.Mutex
	set   *set // the rules that the Expander has; nil: none yet
	dirty bool // pods were expanded since statuses were written

	followers []followed

	reasons map[string]string // why resources are refused, by kind/name
}

// followed is what keeps up with one kind.
type followed struct {
	*follow.Follower
	of interface {
		isAbsent() bool // which is no fault
		isOver() bool
	}
}

// Problems says in lines what keeps resources from being read.
func (r *Reader) Problems() (out []string) {
	r.mu.Lock()
	all := slices.Clone(r.followers)
	r.mu.Unlock()
	for _, f := range all {
		if err := f.Status().Err; err != nil && !f.of.isAbsent() {
			out = append(out, fmt.Sprintf("cluster %s: changes of the resources of spire-controller-manager are not seen: %v", r.c.Client.Cluster, err))
		}
		if f.of.isOver() {
			out = append(out, fmt.Sprintf("cluster %s: more than %d resources of one kind of spire-controller-manager's; the rest is not read", r.c.Client.Cluster, maxResources))
		}
	}
	if n := r.services.leftOut(); n > 0 {
		out = append(out, fmt.Sprintf("cluster %s: there is no room for %d EndpointSlices, and pods lack the names of their Services (%d slices and %d pods in them in all, of which one namespace has a quarter)",
			r.c.Client.Cluster, n, maxSlices, maxMembers))
	}
	return out
}

// New returns a Reader that has not begun. Until the ClusterSPIFFEIDs are known, agents keep what they hold for pods.
func New(c Config) *Reader {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Telling == nil {
		c.Telling = func(map[string]uint64) {}
	}
	if c.Followed == nil {
		c.Followed = func(map[string]uint64) {}
	}
	if c.StatusEvery == 0 {
		c.StatusEvery = statusEvery
	}
	r := &Reader{c: c, origin: "spire:" + c.Client.Cluster, wake: make(chan struct{}, 1), leading: make(chan struct{}, 1), need: make(chan struct{})}
	changed := func() { notify(r.wake); notify(r.leading) }
	r.ids = newResources(KindClusterSPIFFEID, c.Log, c.compile, changed)
	r.entries = newResources(KindClusterStaticEntry, c.Log, c.readStaticEntry, changed)
	r.domains = newResources(KindClusterFederatedTrustDomain, c.Log, readFederatedTrustDomain, changed)
	r.ids.moved = func() { notify(r.wake) }
	r.services = newServices(func() { notify(r.wake) })
	if c.reads(KindClusterSPIFFEID) {
		c.Expander.Expect(r.origin)
	}
	return r
}

func notify(slot chan struct{}) {
	select {
	case slot <- struct{}{}:
	default:
	}
}

// settle is how long changes are gathered before they are acted on.
const settle = 100 * time.Millisecond

// pause waits, and tells whether ctx goes on.
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

// Run reads until ctx ends. Every replica runs it.
func (r *Reader) Run(ctx context.Context) error {
	var g sync.WaitGroup
	defer g.Wait()
	run := func(f followed) {
		r.mu.Lock()
		r.followers = append(r.followers, f)
		r.mu.Unlock()
		g.Go(func() { f.Run(ctx) })
	}
	if r.c.reads(KindClusterStaticEntry) {
		run(followed{follower(r, clusterStaticEntries, r.entries), r.entries})
	}
	if r.c.reads(KindClusterFederatedTrustDomain) {
		run(followed{follower(r, clusterFederatedTrustDomain, r.domains), r.domains})
	}
	if !r.c.reads(KindClusterSPIFFEID) {
		<-ctx.Done()
		return nil
	}
	run(followed{follower(r, clusterSPIFFEIDs, r.ids), r.ids})
	g.Go(func() {
		select {
		case <-r.need:
			r.followServices(ctx)
		case <-ctx.Done():
		}
	})
	needed := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		}
		if !pause(ctx, settle) {
			return nil
		}
		_, followed := r.places()
		all, serial, known := r.ids.all()
		if !known {
			continue
		}
		if !needed && slices.ContainsFunc(all, func(x *clusterSPIFFEID) bool { return x.spec.AutoPopulateDNSNames }) {
			needed = true
			close(r.need)
		}
		if needed && !r.services.known() {
			continue // names of Services would come and go
		}
		newest, _ := r.places()
		r.c.Telling(newest)
		r.tell(all, serial)
		r.c.Followed(followed)
	}
}

// places are how far what rules are made of was followed, by resource.
func (r *Reader) places() (newest, followed map[string]uint64) {
	newest, followed = map[string]uint64{}, map[string]uint64{}
	for resource, p := range map[string]*place{clusterSPIFFEIDs.Resource: &r.ids.place, "endpointslices": &r.services.place} {
		n, f := p.get()
		if n > 0 {
			newest[resource] = n
		}
		if f > 0 {
			followed[resource] = f
		}
	}
	return newest, followed
}

// tell gives the Expander the rules if they changed, and has it look again at pods that are behind other Services.
func (r *Reader) tell(all []*clusterSPIFFEID, serial uint64) {
	r.mu.Lock()
	same := r.set != nil && r.set.serial == serial
	if !same {
		mine := slices.DeleteFunc(all, func(x *clusterSPIFFEID) bool { return !r.c.mine(x.spec.ClassName) })
		r.set = newSet(&r.c, mine, r.services, serial, func() {
			r.mu.Lock()
			r.dirty = true
			r.mu.Unlock()
		})
	}
	now := r.set
	r.mu.Unlock()
	moved := r.services.take()
	if same {
		if uids := r.known(moved); len(uids) > 0 {
			r.c.Expander.Again(r.c.Client.Cluster, uids)
		}
		return
	}
	var rules []pods.Rule
	for i, x := range now.all {
		if x.err == nil {
			rules = append(rules, &rule{set: now, at: i})
		}
	}
	r.c.Expander.SetRules(r.origin, rules)
	notify(r.leading)
}

// known returns the UIDs of those that are pods of the namespace that they are said to be of: whoever may write slices in one namespace
// does not have the CA look at the pods of others again and again.
func (r *Reader) known(all []member) (uids []string) {
	for _, m := range all {
		if p := r.c.Expander.Pod(r.c.Client.Cluster, m.uid); p != nil && p.Namespace == m.namespace {
			uids = append(uids, m.uid)
		}
	}
	return uids
}

// follower keeps up with one kind.
func follower[T any](r *Reader, gvr schema.GroupVersionResource, into *resources[T]) *follow.Follower {
	api := r.c.Client.Dynamic.Resource(gvr)
	return follow.New(follow.Config{Name: gvr.GroupResource().String(), Store: into, Log: r.c.Log,
		List: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := api.List(ctx, o)
			if err != nil {
				if apierrors.IsNotFound(err) {
					into.absent(r.c.Now())
				}
				return nil, err
			}
			return list, nil
		},
		Watch: func(ctx context.Context, o metav1.ListOptions) (kwatch.Interface, error) { return api.Watch(ctx, o) }})
}

func (r *Reader) followServices(ctx context.Context) {
	api := r.c.Client.EndpointSlices("")
	follow.New(follow.Config{Name: "endpointslices", Store: r.services, Log: r.c.Log,
		List:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, o) },
		Watch: func(ctx context.Context, o metav1.ListOptions) (kwatch.Interface, error) { return api.Watch(ctx, o) }}).Run(ctx)
}

// uid returns the UID of a resource, empty if it is not known.
func (r *Reader) uid(kind, name string) types.UID {
	switch kind {
	case KindClusterSPIFFEID:
		if x, ok := r.ids.one(name); ok {
			return x.meta.UID
		}
	case KindClusterStaticEntry:
		if x, ok := r.entries.one(name); ok {
			return x.meta.UID
		}
	case KindClusterFederatedTrustDomain:
		if x, ok := r.domains.one(name); ok {
			return x.meta.UID
		}
	}
	return ""
}
