package resources

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/events"
	"github.com/signet-id/signet/ca/kube/follow"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
)

const (
	// settle is how long resources are gathered before they become one plan.
	settle = 50 * time.Millisecond
	// lookAgain is how often what was refused is tried anew, and whether somebody else changed a document of ours; up to half
	// as much is added, so that replicas and clusters do not move in step.
	lookAgain = 30 * time.Second
	// After a failure that is of the moment, such as a full disk, it is tried again after firstRetry and then ever later.
	firstRetry = time.Second
	// triedAnew is how many refused resources are tried anew whenever something changes. With more of them the rest waits for
	// lookAgain: who may write into one namespace would have the CA plan thousands for each change of one.
	triedAnew = 100
	// changeRate and changeBurst bound how often resources of one namespace are changed: each change is a commit and records in the audit
	// log, and a full disk ends issuance for all.
	changeRate, changeBurst = 1, 1000
	// tellEvery and tellBurst bound how often the status of one resource is written: somebody else may write another each time, such as
	// a CA of another trust domain that reads the same cluster.
	tellEvery, tellBurst = 30 * time.Second, 10
	// perCommit is how many documents are planned as one commit: fewer than the registry takes, since some are two writes.
	perCommit = registry.MaxDocuments / 2
)

// Config says what a Controller works on. All fields but Events, Now and Log are needed.
type Config struct {
	Client      *kube.Client
	Registry    *registry.Registry
	TrustDomain spiffeid.TrustDomain
	// Clusters are all clusters whose pods can have identities of the trust domain.
	Clusters []string
	// Apply plans and applies documents as one commit, as `signet apply` does, with its records in the audit log.
	Apply func(ctx context.Context, docs []strictyaml.Document, o registry.Options, yes bool, actor func(registry.Ref) string) (*registry.Plan, store.Revision, error)
	// Refused writes into the audit log that a document was refused.
	Refused func(ctx context.Context, ref registry.Ref, actor string, err error)
	// Events are where it is told what is refused, and what is accepted again. Nil: in the status and the log alone.
	Events *events.Recorder
	Now    func() time.Time
	Log    *slog.Logger
}

// A Controller keeps the registry at what the custom resources of one cluster say. One replica runs it at a time.
type Controller struct {
	c     Config
	owner string

	mu      sync.Mutex
	kinds   []*watched // of the run that there is
	failure string     // why what was read is not in force; empty if it is
}

// Owner is whose documents those of a cluster's custom resources are.
func Owner(cluster string) string { return "kubernetes/" + cluster + "/resources" }

// New returns a Controller.
func New(c Config) *Controller {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Log = c.Log.With("cluster", c.Client.Cluster)
	return &Controller{c: c, owner: Owner(c.Client.Cluster)}
}

// A run is the work of one leader, from its election to its end. It is used by one goroutine, but for wake.
type run struct {
	*Controller
	kinds []*watched
	wake  chan struct{} // one slot: look again

	templates int                         // as the namespaces of policies were judged
	judged    map[types.UID]verdict       // by the resource
	mute      map[types.UID]string        // resource versions of those that take no status
	failures  int                         // in a row, which were of the moment
	changes   map[string]*rate.Limiter    // by namespace, of those that changed lately
	told      map[types.UID]*rate.Limiter // by the resource, of those whose status was written lately
}

type watched struct {
	Kind
	kept     *kept
	follower *follow.Follower
	read     map[types.UID]*wanted // as of the resource version in it
}

// Run works until ctx ends. An API server that is away leaves everything as it is.
func (c *Controller) Run(ctx context.Context) error {
	r := &run{Controller: c, wake: make(chan struct{}, 1), judged: map[types.UID]verdict{}, mute: map[types.UID]string{}, templates: -1, changes: map[string]*rate.Limiter{}, told: map[types.UID]*rate.Limiter{}}
	g, ctx := errgroup.WithContext(ctx)
	for _, k := range Kinds {
		w := &watched{Kind: k, kept: newKept(r.lookAgain), read: map[types.UID]*wanted{}}
		w.follower = c.follower(k, w.kept)
		r.kinds = append(r.kinds, w)
		g.Go(func() error {
			w.follower.Run(ctx)
			return nil
		})
	}
	c.say(r.kinds, nil)
	defer c.say(nil, nil)
	g.Go(func() error { return r.followTemplates(ctx) })
	g.Go(func() error { return r.loop(ctx) })
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// say notes what Problems looks at.
func (c *Controller) say(kinds []*watched, failure error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kinds, c.failure = kinds, ""
	if failure != nil {
		c.failure = line(failure)
	}
}

// line makes one line of bounded length of an error, which may be several and foreign.
func line(err error) string {
	const most = 300
	s := strings.ToValidUTF8(err.Error(), "")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + " ..."
	}
	return strings.Join(strings.Fields(s), " ")
}

func (r *run) lookAgain() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// followTemplates looks again when templated Identities changed: which services a namespace has may be another set then.
func (r *run) followTemplates(ctx context.Context) error {
	last := -1
	for ctx.Err() == nil {
		last = r.c.Registry.AwaitTemplates(ctx, last)
		r.lookAgain()
	}
	return nil
}

func (r *run) loop(ctx context.Context) error {
	for {
		wait := lookAgain + rand.N(lookAgain/2)
		if r.failures > 0 {
			wait = min(firstRetry<<min(r.failures-1, 10), lookAgain)
			wait += rand.N(wait / 2)
		}
		timer := time.NewTimer(wait)
		select {
		case <-r.wake:
			timer.Stop()
			if !sleep(ctx, settle) {
				return nil
			}
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		if err := r.reconcile(ctx); err != nil && ctx.Err() == nil {
			r.failures++
			if r.failures == 1 {
				r.c.Log.Warn("custom resources are not in force yet; trying again", "err", line(err))
			}
			r.say(r.kinds, err)
			continue
		}
		if r.failures > 0 {
			r.c.Log.Info("custom resources are in force again")
		}
		r.failures = 0
		r.say(r.kinds, nil)
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// reconcile brings the registry to what the resources say, and says at them what became of it. An error is one of the moment.
func (r *run) reconcile(ctx context.Context) error {
	templates := r.c.Registry.TemplatesChanged()
	owned := r.c.Registry.Owned(r.owner)
	var errs []error
	left := triedAnew
	here := map[registry.Ref]bool{}
	present := map[types.UID]bool{}
	complete := map[*watched]bool{}
	for _, k := range r.kinds {
		all, known := r.list(k, present)
		if !known {
			continue // nothing is known of them: what is in force stays
		}
		complete[k] = true
		var due []*wanted
		for _, w := range all {
			here[w.ref] = true
			if r.due(w, owned[w.ref], templates, &left) {
				due = append(due, w)
			}
		}
		errs = append(errs, r.apply(ctx, k, due, owned, templates))
	}
	for _, k := range r.kinds {
		if complete[k] {
			errs = append(errs, r.remove(ctx, k, here, owned))
		}
	}
	maps.DeleteFunc(r.judged, func(uid types.UID, _ verdict) bool { return !present[uid] })
	maps.DeleteFunc(r.mute, func(uid types.UID, _ string) bool { return !present[uid] })
	maps.DeleteFunc(r.changes, func(_ string, l *rate.Limiter) bool { return l.TokensAt(r.c.Now()) >= changeBurst })
	maps.DeleteFunc(r.told, func(_ types.UID, l *rate.Limiter) bool { return l.TokensAt(r.c.Now()) >= tellBurst })
	errs = append(errs, r.report(ctx))
	return errors.Join(errs...)
}

// list reads the resources of a kind, each once for each version of it, in order of age: of two that exclude each other the older
// one has it. known tells whether these are all.
func (r *run) list(k *watched, present map[types.UID]bool) (all []*wanted, known bool) {
	objects, known := k.kept.all()
	now := map[types.UID]*wanted{}
	for _, h := range objects {
		obj := h.obj
		present[obj.GetUID()] = true
		w := k.read[obj.GetUID()]
		if w == nil || w.obj.GetResourceVersion() != obj.GetResourceVersion() {
			if w = read(r.c.Client.Cluster, &k.Kind, obj); h.wrong != nil {
				w.err = h.wrong
			}
		}
		now[obj.GetUID()] = w
		all = append(all, w)
	}
	k.read = now
	slices.SortFunc(all, func(a, b *wanted) int {
		if c := a.obj.GetCreationTimestamp().Compare(b.obj.GetCreationTimestamp().Time); c != 0 {
			return c
		}
		return strings.Compare(a.file, b.file)
	})
	return all, known
}

// due tells whether a resource must be planned: it, what is stored, or what decides over it has changed since, or it was refused.
// left is how many that were refused are tried anew at this look.
func (r *run) due(w *wanted, stored registry.Resource, templates int, left *int) bool {
	v, known := r.judged[w.obj.GetUID()]
	switch {
	case !known && stored.Revision != 0, known && (v.accepted && v.revision != int64(stored.Revision) || w.kind.Namespaced && v.templates != templates):
		return true
	case !known || v.generation != w.obj.GetGeneration() || v.annotations != annotations(w.obj):
		return !w.kind.Namespaced || r.mayChange(w.obj.GetNamespace())
	case v.accepted, v.reason == reasonLifted, v.reason == reasonExpired:
		return false
	case v.reason == reasonDiskFull:
		return true
	}
	*left--
	return *left >= 0 || r.c.Now().Sub(v.at) >= lookAgain
}

// mayChange tells whether one more change of a namespace's resources is looked at now. One that is not is later: nothing is judged.
func (r *run) mayChange(namespace string) bool {
	l := r.changes[namespace]
	if l == nil {
		l = rate.NewLimiter(changeRate, changeBurst)
		r.changes[namespace] = l
	}
	return l.AllowN(r.c.Now(), 1)
}

// mayTell tells whether the status of a resource is written now. One that is not is later.
func (r *run) mayTell(uid types.UID) bool {
	l := r.told[uid]
	if l == nil {
		l = rate.NewLimiter(rate.Every(tellEvery), tellBurst)
		r.told[uid] = l
	}
	return l.AllowN(r.c.Now(), 1)
}

// annotations are those that decide.
func annotations(obj *unstructured.Unstructured) [2]string {
	a := obj.GetAnnotations()
	return [2]string{a[AnnotationYes], a[AnnotationLift]}
}

// apply plans resources of one kind and applies them, many as one commit where nothing is wrong with any of them.
func (r *run) apply(ctx context.Context, k *watched, due []*wanted, owned map[registry.Ref]registry.Resource, templates int) error {
	if len(due) == 0 {
		return nil
	}
	uid, err := r.definition(ctx, k)
	if err != nil {
		return err
	}
	var errs []error
	var good []*wanted
	for _, w := range due {
		switch {
		case w.err != nil:
			r.refuse(ctx, w, owned, reasonInvalid, w.err, templates)
		case w.kind.Document == registry.KindRevocation && w.obj.GetAnnotations()[AnnotationLift] == "true":
			if _, there := owned[w.ref]; there {
				if err := r.delete(ctx, w.ref); err != nil {
					errs = append(errs, err)
					continue
				}
			}
			r.judge(w, verdict{reason: reasonLifted, message: "lifted by the annotation " + AnnotationLift}, templates)
		case r.ended(w):
			r.judge(w, verdict{reason: reasonExpired, message: "spec.expires has passed"}, templates)
		default:
			good = append(good, w)
		}
	}
	for chunk := range slices.Chunk(good, perCommit) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if len(chunk) > 1 && !slices.ContainsFunc(chunk, confirmed) { // a yes is for one resource
			err := r.commit(ctx, chunk, uid, templates)
			if err == nil {
				continue
			}
			if full(err) { // none of them would fare better alone
				errs = append(errs, fmt.Errorf("%d resources of kind %s: %w", len(chunk), k.Kind.Kind, err))
				for _, w := range chunk {
					r.wait(w, owned, templates)
				}
				continue
			}
		}
		for _, w := range chunk { // one of them is wrong: find out which
			err := r.commit(ctx, []*wanted{w}, uid, templates)
			if err != nil && isRefusal(err) {
				reason := reasonOf(err)
				r.refuse(ctx, w, owned, reason, err, templates)
			} else if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", w.file, err))
				if full(err) {
					r.wait(w, owned, templates)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// full tells whether an error is that there is no room for anything new.
func full(err error) bool {
	return errors.Is(err, store.ErrDiskFull) || errors.Is(err, auditlog.ErrDisk)
}

// wait judges a resource one that waits for room. Whoever applied it sees why it is not in force, which may last.
func (r *run) wait(w *wanted, owned map[registry.Ref]registry.Resource, templates int) {
	message := "the CA's disk is full; it is taken by itself once there is room again"
	if _, there := owned[w.ref]; there {
		message += "; what was accepted before stays in force"
	}
	r.judge(w, verdict{reason: reasonDiskFull, message: message}, templates)
}

// ended tells whether a Revocation has come to its end: it is not made anew then.
func (r *run) ended(w *wanted) bool {
	if w.kind.Document != registry.KindRevocation {
		return false
	}
	d, err := policy.ParseRevocation(w.doc, r.c.TrustDomain)
	return err == nil && !d.Expires.IsZero() && !r.c.Now().Before(d.Expires)
}

// confirmed tells whether somebody said yes to this generation of a resource.
func confirmed(w *wanted) bool {
	return w.obj.GetAnnotations()[AnnotationYes] == fmt.Sprint(w.obj.GetGeneration())
}

// commit applies some resources as one commit and judges them accepted.
func (r *run) commit(ctx context.Context, ws []*wanted, definition string, templates int) error {
	o := registry.Options{Owner: r.owner, Definitions: map[registry.Ref]string{}, Namespaces: map[string]registry.Namespace{}}
	var docs []strictyaml.Document
	files := map[registry.Ref]string{}
	for _, w := range ws {
		docs = append(docs, w.doc)
		files[w.ref] = w.file
		o.Definitions[w.ref] = definition
		if w.kind.Namespaced {
			o.Namespaces[w.ref.Name] = registry.Namespace{Cluster: r.c.Client.Cluster, Name: w.obj.GetNamespace(), Clusters: r.c.Clusters}
		}
	}
	p, _, err := r.c.Apply(ctx, docs, o, len(ws) == 1 && confirmed(ws[0]), func(ref registry.Ref) string { return files[ref] })
	if err != nil {
		return err
	}
	now := r.c.Registry.Owned(r.owner)
	for _, w := range ws {
		r.judge(w, accepted(w, p, now[w.ref]), templates)
	}
	return nil
}

// isRefusal tells whether an error is one of the documents, and not of the moment.
func isRefusal(err error) bool {
	for _, e := range []error{registry.ErrConflict, registry.ErrNotReady, auditlog.ErrDisk, auditlog.ErrBroken, auditlog.ErrClosed, store.ErrDiskFull, store.ErrUnavailable, store.ErrCorrupt, store.ErrClosed,
		context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, e) {
			return false
		}
	}
	return true
}

// refuse judges a resource refused. Its former document stays in force, but not one that speaks for what its namespace has not.
func (r *run) refuse(ctx context.Context, w *wanted, owned map[registry.Ref]registry.Resource, reason string, err error, templates int) {
	message := explain(w, err)
	stored, there := owned[w.ref]
	switch {
	case there && reason == reasonNamespace && !r.still(stored, w):
		if derr := r.delete(ctx, w.ref); derr != nil {
			message += "; the former one is still in force: " + derr.Error()
		}
	case there:
		message += "; what was accepted before stays in force"
	}
	if reason == reasonNeedsYes {
		message += fmt.Sprintf("; if that is meant, annotate it with %s=%d", AnnotationYes, w.obj.GetGeneration())
	}
	if v := r.judged[w.obj.GetUID()]; v.message != message || v.accepted {
		r.c.Log.Warn("a custom resource was refused", "resource", w.file, "reason", reason, "err", message)
		r.c.Refused(ctx, w.ref, w.file, err)
	}
	r.judge(w, verdict{reason: reason, message: message}, templates)
}

// still tells whether the former document of a policy, as it is stored, speaks for its namespace only.
func (r *run) still(stored registry.Resource, w *wanted) bool {
	docs, err := strictyaml.Split(stored.Document.Content, stored.Document.File, 1)
	if err != nil {
		return false
	}
	_, err = r.c.Registry.Plan(docs, registry.Options{Owner: r.owner, Definitions: map[registry.Ref]string{w.ref: stored.Document.Definition},
		Namespaces: map[string]registry.Namespace{w.ref.Name: {Cluster: r.c.Client.Cluster, Name: w.obj.GetNamespace(), Clusters: r.c.Clusters}}})
	return err == nil
}

func (r *run) delete(ctx context.Context, refs ...registry.Ref) error {
	owned := r.c.Registry.Owned(r.owner)
	_, _, err := r.c.Apply(ctx, nil, registry.Options{Owner: r.owner, Delete: refs}, true, func(ref registry.Ref) string { return owned[ref].Document.File })
	return err
}

// remove deletes the documents of resources that somebody deleted. Those whose definition is gone, or was made anew, stay: nobody
// deleted them. Revocations stay until they are lifted.
func (r *run) remove(ctx context.Context, k *watched, here map[registry.Ref]bool, owned map[registry.Ref]registry.Resource) error {
	var gone []registry.Ref
	prefix := fmt.Sprintf("kubernetes/%s/%s/", r.c.Client.Cluster, k.Kind.Kind)
	for ref, stored := range owned {
		if !here[ref] && ref.Kind != registry.KindRevocation && strings.HasPrefix(stored.Document.File, prefix) {
			gone = append(gone, ref)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	slices.SortFunc(gone, func(a, b registry.Ref) int { return strings.Compare(a.Name, b.Name) })
	var sure []registry.Ref
	for _, ref := range gone {
		// A list can be of an API server that lags. What it does not have yet was not deleted.
		ns, name, _ := strings.Cut(strings.TrimPrefix(owned[ref].Document.File, prefix), "/")
		if !k.Namespaced {
			ns, name = "", ns
		}
		_, err := r.c.Client.Dynamic.Resource(k.resource()).Namespace(ns).Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			sure = append(sure, ref)
		case err != nil:
			return fmt.Errorf("%s: %w", owned[ref].Document.File, err)
		}
	}
	// This comes after it was seen that they are not there: a definition is marked before its resources are deleted.
	uid, err := r.definition(ctx, k)
	if err != nil {
		return err
	}
	sure = slices.DeleteFunc(sure, func(ref registry.Ref) bool { return owned[ref].Document.Definition != uid })
	for chunk := range slices.Chunk(sure, perCommit) {
		if err := r.delete(ctx, chunk...); err != nil {
			return err
		}
	}
	return nil
}

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// definition returns the UID of the definition of a kind, or an error if there is none or somebody deletes it.
func (r *run) definition(ctx context.Context, k *watched) (string, error) {
	d, err := r.c.Client.Dynamic.Resource(definitions).Get(ctx, k.name(), metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("the definition of %s, without which nothing is changed: %w", k.Kind.Kind, err)
	}
	if d.GetDeletionTimestamp() != nil {
		return "", fmt.Errorf("the definition of %s is being deleted; what came from it stays", k.Kind.Kind)
	}
	return string(d.GetUID()), nil
}
