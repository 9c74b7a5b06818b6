package publish

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/follow"
)

const (
	// SignerName is that of the ClusterTrustBundle. What may be written under it needs the permission to attest for it.
	SignerName    = kube.SignerName
	signerPrefix  = "signet-id.github.io:x509-svid:"
	group         = "certificates.k8s.io"
	resource      = "clustertrustbundles"
	discoverEvery = 15 * time.Minute
)

// versions of the API in which there are ClusterTrustBundles, the newest first.
var versions = []string{"v1", "v1beta1", "v1alpha1"}

// clusterBundle is what is known of the ClusterTrustBundle. The Publisher's lock is held over it.
type clusterBundle struct {
	version string // of the API; empty: there are none, or that is not known yet
	known   bool   // what is at the API server was seen
	there   bool
	have    held
	foreign bool // it was said that somebody else's is in the way
	failed  bool
}

var dnsSubdomain = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)

// ClusterTrustBundleName returns the name of the ClusterTrustBundle of a trust domain. Trust domains may have names that are none of
// DNS; these are named by a digest.
func ClusterTrustBundleName(td spiffeid.TrustDomain) string {
	if name := signerPrefix + td.Name(); dnsSubdomain.MatchString(td.Name()) && len(name) <= 253 {
		return name
	}
	return signerPrefix + digest(td.Name())
}

// discoverCluster finds out from time to time whether the API server has ClusterTrustBundles, and follows ours while it has.
func (p *Publisher) discoverCluster(ctx context.Context) {
	var followed string
	var g sync.WaitGroup
	defer g.Wait()
	stop := func() {}
	defer func() { stop() }()
	for {
		version, err := p.discover(ctx)
		if err == nil && version != followed {
			stop()
			g.Wait()
			followed = version
			p.mu.Lock()
			p.cluster = clusterBundle{version: version}
			p.mu.Unlock()
			stop = func() {}
			if version != "" {
				p.c.Log.Info("the API server has ClusterTrustBundles", "version", version)
				fctx, cancel := context.WithCancel(ctx)
				stop = cancel
				g.Go(func() { p.followCluster(fctx, version) })
			}
		}
		t := time.NewTimer(p.c.discover/2 + rand.N(p.c.discover))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

func (p *Publisher) discover(ctx context.Context) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	for _, v := range versions {
		text, err := p.c.Client.Raw(ctx, "/apis/"+group+"/"+v)
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		var list metav1.APIResourceList
		if err := json.Unmarshal(text, &list); err != nil {
			return "", fmt.Errorf("the resources of %s/%s: %w", group, v, err)
		}
		for _, r := range list.APIResources {
			if r.Name == resource {
				return v, nil
			}
		}
	}
	return "", nil
}

func (p *Publisher) bundles(version string) dynamic.ResourceInterface {
	return p.c.Client.Dynamic.Resource(schema.GroupVersionResource{Group: group, Version: version, Resource: resource})
}

func (p *Publisher) followCluster(ctx context.Context, version string) {
	r := p.bundles(version)
	selector := "metadata.name=" + ClusterTrustBundleName(p.c.TrustDomain)
	f := p.c.follow
	f.Log, f.Name, f.Store = p.c.Log, "the ClusterTrustBundle", &clusterStore{p: p}
	f.List = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		o.FieldSelector = selector
		return r.List(ctx, o)
	}
	f.Watch = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		o.FieldSelector = selector
		return r.Watch(ctx, o)
	}
	follow.New(f).Run(ctx)
}

func (p *Publisher) holdCluster(u *unstructured.Unstructured) held {
	text, _, _ := unstructured.NestedString(u.Object, "spec", "trustBundle")
	signer, _, _ := unstructured.NestedString(u.Object, "spec", "signerName")
	return held{uid: string(u.GetUID()), version: u.GetResourceVersion(), ours: u.GetLabels()[OwnerLabel] == p.owner && signer == SignerName, sum: sumOf(text, "")}
}

// reconcileCluster brings the ClusterTrustBundle to what it should be. It is never removed: somebody may verify by it.
func (p *Publisher) reconcileCluster(ctx context.Context) {
	p.mu.Lock()
	c, pem := p.cluster, p.content.pem
	p.mu.Unlock()
	if c.version == "" || !c.known {
		return
	}
	name := ClusterTrustBundleName(p.c.TrustDomain)
	if c.there && !c.have.ours {
		if !c.foreign {
			p.c.Log.Warn("a ClusterTrustBundle that somebody else made has the name of ours and is left alone; delete it to have the bundle published there", "name", name)
			p.mu.Lock()
			p.cluster.foreign = true
			p.mu.Unlock()
		}
		return
	}
	if c.there && c.have.sum == sumOf(pem, "") {
		p.noteCluster(nil)
		return
	}
	if err := p.may(""); err != nil {
		p.noteCluster(err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": group + "/" + c.version, "kind": "ClusterTrustBundle",
		"metadata": map[string]any{"name": name, "labels": map[string]any{OwnerLabel: p.owner, "app.kubernetes.io/managed-by": "signet"}},
		"spec":     map[string]any{"signerName": SignerName, "trustBundle": pem},
	}}
	if c.there {
		u.SetUID(types.UID(c.have.uid))
		u.SetResourceVersion(c.have.version)
	}
	made, err := p.bundles(c.version).Apply(ctx, name, u, metav1.ApplyOptions{FieldManager: manager, Force: c.there})
	if err == nil {
		p.mu.Lock()
		p.writes++
		if p.cluster.version == c.version {
			p.cluster.there, p.cluster.have = true, p.holdCluster(made)
		}
		p.mu.Unlock()
	}
	p.noteCluster(err)
}

func (p *Publisher) noteCluster(err error) {
	p.mu.Lock()
	before := p.cluster.failed
	p.cluster.failed = err != nil
	p.soon = p.soon || err != nil && (!before || errors.Is(err, errFight))
	p.mu.Unlock()
	if err != nil && !before {
		p.c.Log.Warn("the ClusterTrustBundle is not as it should be; trying again", "err", err)
	}
}

// A clusterStore holds what the ClusterTrustBundle is like.
type clusterStore struct {
	p      *Publisher
	listed *bool
}

// Begin implements follow.Store.
func (s *clusterStore) Begin() { s.listed = new(bool) }

// Put implements follow.Store.
func (s *clusterStore) Put(o metav1.Object) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok || u.GetName() != ClusterTrustBundleName(s.p.c.TrustDomain) {
		return
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.listed != nil {
		*s.listed = true
	}
	s.p.cluster.there, s.p.cluster.have = true, s.p.holdCluster(u)
	s.p.signal()
}

// End implements follow.Store.
func (s *clusterStore) End() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.p.cluster.known = true
	s.p.cluster.there = *s.listed
	s.listed = nil
	s.p.signal()
}

// Delete implements follow.Store.
func (s *clusterStore) Delete(o metav1.Object) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.p.cluster.have.uid == string(o.GetUID()) {
		s.p.cluster.there, s.p.cluster.foreign = false, false
		s.p.signal()
	}
}
