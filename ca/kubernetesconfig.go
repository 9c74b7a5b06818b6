package ca

import (
	"path/filepath"
)

// Kubernetes names the clusters that the CA watches, and says what it does there.
type Kubernetes struct {
	// Clusters are the clusters by name: the one under which their agents attest (node_attestors.k8s_psat.clusters).
	Clusters map[string]KubernetesCluster `yaml:"clusters"`
}

// KubernetesCluster says how one cluster is reached and what the CA does there. Whatever is absent is off.
type KubernetesCluster struct {
	// Kubeconfig is a file that says how to reach the API server. Programs for credentials (exec) are refused. Default: as a
	// pod of that cluster does.
	Kubeconfig string `yaml:"kubeconfig"`
}

func (k *Kubernetes) check(bad func(field, format string, args ...any)) {
	for name, c := range k.Clusters {
		field := "kubernetes.clusters." + name
		if name == "" {
			bad("kubernetes.clusters", "a cluster has no name; give it the one under which its agents attest")
		}
		if c.Kubeconfig != "" && !filepath.IsAbs(c.Kubeconfig) {
			bad(field+".kubeconfig", "%q must be absolute", c.Kubeconfig)
		}
	}
}
