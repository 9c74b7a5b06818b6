package ca

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/signet-id/signet/ca/kube"
)

// A kubeCluster is one cluster that the CA watches, with what works on it.
type kubeCluster struct {
	client *kube.Client
	// parts run for as long as the CA does. One that loses its API server waits for it; an error ends the CA.
	parts []func(context.Context) error
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
		ca.clusters = append(ca.clusters, &kubeCluster{client: client})
	}
	return errors.Join(errs...)
}
