package ca

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/events"
	"github.com/signet-id/signet/ca/kube/inject"
	"github.com/signet-id/signet/ca/kube/publish"
	"github.com/signet-id/signet/ca/kube/watch"
)

// A kubeCluster is one cluster that the CA watches, with what works on it.
type kubeCluster struct {
	client *kube.Client
	// namespace is the CA's own in the cluster.
	namespace string
	// parts run for as long as the CA does. One that loses its API server waits for it; an error ends the CA.
	parts []func(context.Context) error
	// leading run together on one replica of the CA at a time, by one Lease: each Lease costs requests all the time. They end
	// when their context does, and are run again when this replica leads again.
	leading []func(context.Context) error
	// ails say in lines what is wrong with the cluster, or with what works on it.
	ails []func() []string

	events    *events.Recorder   // nil: none are written
	watcher   *watch.Watcher     // nil unless pods are watched
	publisher *publish.Publisher // nil unless the bundle is published
	injector  *inject.Server     // nil unless proxies are injected
}

// openKubernetes makes what works on the clusters of the configuration. It makes no request: a cluster that is away now
// keeps no CA from starting.
func (ca *CA) openKubernetes() error {
	ca.openPods()
	var errs []error
	if len(ca.c.Kubernetes.Clusters) > 0 {
		kube.LogTo(ca.log)
	}
	for _, name := range slices.Sorted(maps.Keys(ca.c.Kubernetes.Clusters)) {
		c := ca.c.Kubernetes.Clusters[name]
		client, err := kube.Open(name, c.Kubeconfig)
		if err != nil {
			errs = append(errs, fmt.Errorf("kubernetes: %w", err))
			continue
		}
		k := &kubeCluster{client: client, namespace: c.ownNamespace()}
		if !c.DisableEvents {
			k.events = events.New(client, ca.log.With("cluster", name))
		}
		ca.clusters = append(ca.clusters, k)
		ca.watchPods(c, k)
		ca.publishBundle(c, k)
		ca.signPodCertificates(c, k)
		ca.readSPIREResources(c, k)
		if err := ca.injectProxies(c, k); err != nil {
			errs = append(errs, err)
			continue
		}
		ca.readResources(c, k)
		if len(k.leading) > 0 || k.watcher != nil {
			if k.events != nil {
				k.leading = append(k.leading, k.events.Run)
			}
			k.parts = append(k.parts, func(ctx context.Context) error { return ca.lead(ctx, k) })
		}
	}
	return errors.Join(errs...)
}
