// Package publish hands the trust domain's bundle to the programs of a cluster: as a ConfigMap in every namespace that asks for it by its label and
// in the CA's own, and as a ClusterTrustBundle where the API server has those. It puts right what others change, takes away
// what is not asked for any more, and touches nothing that it did not make.
package publish

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"regexp"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/events"
	"github.com/signet-id/signet/ca/kube/follow"
	"github.com/signet-id/signet/spiffe"
)

// Names that others rely on.
const (
	// ConfigMap is the name of the ConfigMap in each namespace, PEMKey and JSONKey what is in it: the X.509 authorities, and the
	// whole bundle in SPIFFE format.
	ConfigMap = "signet-bundle"
	PEMKey    = "bundle.pem"
	JSONKey   = "bundle.json"
	// Label of a namespace, with the value "true", asks for the ConfigMap.
	Label = "signet-id.github.io/bundle"
	// OwnerLabel marks what a CA made, with its trust domain as the value.
	OwnerLabel = "signet-id.github.io/bundle-of"

	manager = "signet-ca"
)

// Config says what is published where.
type Config struct {
	Client *kube.Client
	// TrustDomain is that of the bundle, Bundle returns it as it is now.
	TrustDomain spiffeid.TrustDomain
	Bundle      func() authority.Bundle
	// Namespace always has the ConfigMap; empty: none does that has not asked.
	Namespace string
	// NoClusterTrustBundle keeps the bundle out of ClusterTrustBundles.
	NoClusterTrustBundle bool
	// Events is told of ConfigMaps that are in the way. Nil: the log alone is.
	Events *events.Recorder
	Log    *slog.Logger

	follow   follow.Config // times, for tests
	discover time.Duration
	retry    time.Duration
}

// A Publisher publishes in Run.
type Publisher struct {
	c     Config
	owner string // the value of OwnerLabel
	wake  chan struct{}

	mu       sync.Mutex
	content  content
	labelled map[string]bool // namespaces that ask, true: and are not about to go
	maps     map[string]held // ConfigMaps of our name by namespace
	dirty    map[string]struct{}
	failed   map[string]struct{}
	soon     bool // something fails that did not a moment ago, or waits for its turn
	foreign  map[string]struct{}
	cluster  clusterBundle
	paces    map[string]*rate.Limiter // by namespace; "": of the ClusterTrustBundle
	writes   uint64
}

// content is the bundle in the forms in which it is published.
type content struct {
	pem, json string
	sum       [sha256.Size]byte
}

// held is what a ConfigMap is like, without what is in it.
type held struct {
	uid, version string
	ours         bool
	sum          [sha256.Size]byte
}

func sumOf(pem, json string) [sha256.Size]byte {
	return sha256.Sum256([]byte(fmt.Sprintf("%d\x00%s%s", len(pem), pem, json)))
}

// New returns a Publisher that has not begun.
func New(c Config) *Publisher {
	if c.discover == 0 {
		c.discover = discoverEvery
	}
	if c.retry == 0 {
		c.retry = retryAfter
	}
	return &Publisher{c: c, owner: ownerValue(c.TrustDomain), wake: make(chan struct{}, 1), labelled: map[string]bool{}, maps: map[string]held{},
		dirty: map[string]struct{}{}, failed: map[string]struct{}{}, foreign: map[string]struct{}{}, paces: map[string]*rate.Limiter{}}
}

var labelValue = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// ownerValue is the trust domain as the value of a label, which may have 63 characters.
func ownerValue(td spiffeid.TrustDomain) string {
	if labelValue.MatchString(td.Name()) {
		return td.Name()
	}
	return digest(td.Name())
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:16])
}

// BundleChanged says that the bundle may be another one. It never blocks.
func (p *Publisher) BundleChanged() { p.signal() }

func (p *Publisher) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Status are numbers of what is published.
type Status struct {
	// Namespaces are how many are to have the ConfigMap, Failing how many have it not as it should be, Foreign how many have one
	// that somebody else made.
	Namespaces, Failing, Foreign int
	// Writes is how often something was written since the start.
	Writes uint64
}

// Status returns the numbers.
func (p *Publisher) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Status{Failing: len(p.failed), Foreign: len(p.foreign), Writes: p.writes}
	for ns := range p.labelled {
		if p.wanted(ns) {
			s.Namespaces++
		}
	}
	if _, labelled := p.labelled[p.c.Namespace]; p.c.Namespace != "" && !labelled {
		s.Namespaces++
	}
	return s
}

const (
	retryAfter    = 5 * time.Second
	maxRetryAfter = 5 * time.Minute
	writeTimeout  = time.Minute
	// fightBurst is how often the bundle of one namespace is put right at once, and fightEvery how often in the long run: somebody else
	// may change it back each time, as quickly as the API server takes it.
	fightBurst = 10
	fightEvery = 10 * time.Second
)

// Run publishes until ctx ends. One replica at a time should; that two do, for a moment, does no harm.
func (p *Publisher) Run(ctx context.Context) error {
	p.mu.Lock()
	clear(p.labelled)
	clear(p.maps)
	p.cluster = clusterBundle{}
	p.mu.Unlock()

	all := p.c.Client.ConfigMaps("")
	f := p.c.follow
	f.Log, f.Changed = p.c.Log, p.signal
	f.Name, f.Store = "ConfigMaps "+ConfigMap, &mapStore{p: p}
	f.List = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		o.FieldSelector = "metadata.name=" + ConfigMap
		return all.List(ctx, o)
	}
	f.Watch = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		o.FieldSelector = "metadata.name=" + ConfigMap
		return all.Watch(ctx, o)
	}
	maps := follow.New(f)
	namespaces := p.c.Client.Metadata.Resource(corev1.SchemeGroupVersion.WithResource("namespaces"))
	f.Name, f.Store = "namespaces with the label "+Label, &namespaceStore{p: p}
	f.List = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		o.LabelSelector = Label + "=true"
		return namespaces.List(ctx, o)
	}
	f.Watch = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		o.LabelSelector = Label + "=true"
		return namespaces.Watch(ctx, o)
	}
	labelled := follow.New(f)

	var g sync.WaitGroup
	g.Go(func() { maps.Run(ctx) })
	g.Go(func() { labelled.Run(ctx) })
	if !p.c.NoClusterTrustBundle {
		g.Go(func() { p.discoverCluster(ctx) })
	}
	// What others made is known before anything is written.
	known := func() bool { return maps.Status().Known && labelled.Status().Known }
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	delay, due := p.c.retry, time.Time{} // zero: nothing is to be tried again
	for {
		select {
		case <-ctx.Done():
			g.Wait()
			return nil
		case <-p.wake:
		case <-retry.C:
			due = time.Time{}
			p.again()
		}
		if !p.refresh() {
			continue
		}
		p.reconcileCluster(ctx)
		if known() {
			p.reconcile(ctx)
		}
		failing, soon := p.failing()
		if soon {
			delay = p.c.retry
		}
		switch next := time.Now().Add(delay/2 + rand.N(delay)); {
		case !failing:
			retry.Stop()
			due = time.Time{}
		case due.IsZero() || soon && next.Before(due): // what others do all the time does not put it off
			due = next
			retry.Reset(time.Until(due))
			delay = min(2*delay, maxRetryAfter)
		}
	}
}

// refresh takes the bundle as it is now. If it is another one, all that is published is to be looked at.
func (p *Publisher) refresh() bool {
	b := p.c.Bundle()
	var out bytes.Buffer
	for _, a := range b.X509 {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Raw}) // a Buffer takes all
	}
	document, err := spiffe.MarshalBundle(b.SPIFFE())
	if err != nil || out.Len() == 0 {
		p.c.Log.Error("the bundle cannot be published", "err", err, "x509_authorities", len(b.X509))
		return false
	}
	now := content{pem: out.String(), json: string(document)}
	now.sum = sumOf(now.pem, now.json)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.content.sum != now.sum {
		p.content = now
		for ns := range p.labelled {
			p.dirty[ns] = struct{}{}
		}
		for ns := range p.maps {
			p.dirty[ns] = struct{}{}
		}
	}
	if _, there := p.maps[p.c.Namespace]; p.c.Namespace != "" && !there {
		p.dirty[p.c.Namespace] = struct{}{}
	}
	return true
}

// wanted tells whether a namespace is to have the ConfigMap. p.mu is held.
func (p *Publisher) wanted(ns string) bool {
	return p.labelled[ns] || ns == p.c.Namespace && ns != ""
}

// failing tells whether something is to be tried again, and whether that is to be soon.
func (p *Publisher) failing() (failing, soon bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	soon, p.soon = p.soon, false
	return len(p.failed) > 0 || p.cluster.failed, soon
}

// may tells whether the bundle of a namespace may be written now.
func (p *Publisher) may(ns string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.paces[ns]
	if l == nil {
		l = rate.NewLimiter(rate.Every(fightEvery), fightBurst)
		p.paces[ns] = l
	}
	if !l.Allow() {
		return errFight
	}
	return nil
}

func (p *Publisher) again() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ns := range p.failed {
		p.dirty[ns] = struct{}{}
	}
}

// reconcile looks at every namespace where something may have changed.
func (p *Publisher) reconcile(ctx context.Context) {
	p.mu.Lock()
	dirty := p.dirty
	p.dirty = map[string]struct{}{}
	p.mu.Unlock()
	for ns := range dirty {
		if ctx.Err() != nil {
			return
		}
		err := p.one(ctx, ns)
		p.mu.Lock()
		_, failedBefore := p.failed[ns]
		if err == nil {
			delete(p.failed, ns)
		} else {
			p.failed[ns] = struct{}{}
			p.soon = p.soon || !failedBefore || errors.Is(err, errFight)
		}
		first := err != nil && len(p.failed) == 1
		p.mu.Unlock()
		if first && !failedBefore && ctx.Err() == nil {
			p.c.Log.Warn("the bundle is not published as it should be; trying again", "namespace", ns, "err", err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.paces, func(_ string, l *rate.Limiter) bool { return l.Tokens() >= fightBurst })
}

// one brings the ConfigMap of a namespace to what it should be.
func (p *Publisher) one(ctx context.Context, ns string) error {
	p.mu.Lock()
	have, there := p.maps[ns]
	want, content := p.wanted(ns), p.content
	foreign := there && !have.ours && want
	_, told := p.foreign[ns]
	if foreign {
		p.foreign[ns] = struct{}{}
	} else {
		delete(p.foreign, ns)
	}
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	switch {
	case foreign:
		if !told {
			p.reportForeign(ns)
		}
		return nil
	case want && there && have.sum == content.sum, !want && !have.ours:
		return nil
	}
	if err := p.may(ns); err != nil {
		return err
	}
	switch {
	case !there:
		return p.create(ctx, ns, content)
	case want:
		return p.update(ctx, ns, have, content)
	}
	return p.remove(ctx, ns, have)
}

func (p *Publisher) reportForeign(ns string) {
	p.c.Log.Warn("a ConfigMap that somebody else made has the name of the trust bundle's and is left alone", "namespace", ns, "name", ConfigMap)
	p.c.Events.Record(events.Event{Object: corev1.ObjectReference{APIVersion: "v1", Kind: "Namespace", Name: ns, Namespace: ns}, Reason: "TrustBundleNotPublished",
		Message: fmt.Sprintf("the trust bundle of %s is not published in namespace %s: a ConfigMap %s is there that has not the label %s=%s; rename or delete it, or take the label %s from the namespace",
			p.c.TrustDomain.Name(), ns, ConfigMap, OwnerLabel, p.owner, Label)})
}

// wrote notes what was written, so that the watch brings nothing new.
func (p *Publisher) wrote(cm *corev1.ConfigMap) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writes++
	p.maps[cm.Namespace] = p.hold(cm)
}

func (p *Publisher) hold(cm *corev1.ConfigMap) held {
	return held{uid: string(cm.UID), version: cm.ResourceVersion, ours: cm.Labels[OwnerLabel] == p.owner, sum: sumOf(cm.Data[PEMKey], cm.Data[JSONKey])}
}

// gone tells that a namespace is going or gone, where nothing can be made. Its watch says so, too.
func gone(err error) bool {
	return apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) || apierrors.IsNotFound(err)
}

// errFight tells that somebody else changes what was put right a moment ago, again and again.
var errFight = errors.New("somebody changes it each time that it was put right; it is put right six times a minute at most: find out who (kubectl get --show-managed-fields), and take it from them")

// errTaken tells that somebody else made a ConfigMap at the same moment.
var errTaken = errors.New("a ConfigMap of that name was made by somebody else at the same moment")
