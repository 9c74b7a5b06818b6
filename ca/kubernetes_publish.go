package ca

import "github.com/signet-id/signet/ca/kube/publish"

// KubernetesBundle says that the trust bundle is handed out in a cluster: as the ConfigMap signet-bundle in every namespace with the label
// signet-id.github.io/bundle=true and in the CA's own, and as a ClusterTrustBundle where the API server has those.
type KubernetesBundle struct {
	// DisableClusterTrustBundle makes no ClusterTrustBundle. Default: false.
	DisableClusterTrustBundle bool `yaml:"disable_cluster_trust_bundle"`
}

// publishBundle adds what publishes the trust bundle in a cluster.
func (ca *CA) publishBundle(c KubernetesCluster, k *kubeCluster) {
	if c.Bundle == nil {
		return
	}
	k.publisher = publish.New(publish.Config{Client: k.client, TrustDomain: ca.td, Bundle: ca.set.Bundle, Namespace: k.namespace,
		NoClusterTrustBundle: c.Bundle.DisableClusterTrustBundle, Events: k.events, Log: ca.log.With("cluster", k.client.Cluster)})
	k.leading = append(k.leading, k.publisher.Run)
}

// publishedBundleChanged has the bundle published as it is now.
func (ca *CA) publishedBundleChanged() {
	for _, k := range ca.clusters {
		if k.publisher != nil {
			k.publisher.BundleChanged()
		}
	}
}
