package ca

import (
	"context"
	"maps"
	"slices"

	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/kube/resources"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

// KubernetesResources says that the custom resources of signet-id.github.io in a cluster are read: Identities, CallPolicies,
// ClusterCallPolicies, Federations and Revocations. Whoever may write them there speaks for the whole trust domain, but for
// CallPolicies, which speak for services of their own namespace.
type KubernetesResources struct{}

// readResources adds what reads a cluster's custom resources.
func (ca *CA) readResources(c KubernetesCluster, k *kubeCluster) {
	if c.Resources == nil {
		return
	}
	cluster := k.client.Cluster
	source := func(actor func(registry.Ref) string) adminapi.Source {
		return adminapi.Source{Name: "kubernetes/" + cluster, Actor: actor}
	}
	r := resources.New(resources.Config{Client: k.client, Registry: ca.reg, TrustDomain: ca.td, Clusters: ca.podClusters(),
		Apply: func(ctx context.Context, docs []strictyaml.Document, o registry.Options, yes bool, actor func(registry.Ref) string) (*registry.Plan, store.Revision, error) {
			return ca.admin.ApplySource(ctx, source(actor), docs, o, yes)
		},
		Refused: func(ctx context.Context, ref registry.Ref, actor string, err error) {
			ca.admin.Refused(ctx, source(func(registry.Ref) string { return actor }), ref, err)
		},
		Events: k.events, Now: ca.c.Now, Log: ca.log})
	k.leading = append(k.leading, r.Run)
	k.ails = append(k.ails, r.Problems)
}

// podClusters are all clusters whose pods can have identities here: those whose agents attest, and those that are watched.
func (ca *CA) podClusters() []string {
	names := map[string]bool{}
	for name := range ca.c.Kubernetes.Clusters {
		names[name] = true
	}
	if psat := ca.c.NodeAttestors.K8sPSAT; psat != nil {
		for name := range psat.Clusters {
			names[name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}
