package ca

import (
	"context"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/nodeattest/k8spsat"
)

// K8sPSAT configures the node attestor k8s_psat.
type K8sPSAT struct {
	// Clusters are the Kubernetes clusters by the name that their agents send. The name becomes a part of the agents' SPIFFE IDs.
	Clusters map[string]K8sCluster `yaml:"clusters"`
}

// K8sCluster says who of one cluster may attest, and how its API server is reached.
type K8sCluster struct {
	// ServiceAccounts are the service accounts, as namespace:name, whose pods are agents. One at least is needed.
	ServiceAccounts []string `yaml:"service_accounts"`
	// Audiences are those of which the token must have one. Default spire-server.
	Audiences []string `yaml:"audiences"`
	// Kubeconfig is a file that says how to reach the API server; what it names is read again for each attestation. Programs for
	// credentials (exec) are refused. Default: as a pod of that cluster does.
	Kubeconfig string `yaml:"kubeconfig"`
	// NodeLabels are the keys of those labels of the node that become selectors. Default none.
	NodeLabels []string `yaml:"node_labels"`
	// PodLabels are the keys of those labels of the agent's pod that become selectors. Default none.
	PodLabels []string `yaml:"pod_labels"`
	// UsePodUID names agents after their pod's UID instead of their node's.
	UsePodUID bool `yaml:"use_pod_uid"`
}

func (c *K8sPSAT) config() k8spsat.Config {
	clusters := make(map[string]k8spsat.Cluster, len(c.Clusters))
	for name, k := range c.Clusters {
		clusters[name] = k8spsat.Cluster(k)
	}
	return k8spsat.Config{Clusters: clusters}
}

func (c *K8sPSAT) check(bad func(field, format string, args ...any)) { c.config().Check(bad) }

func (c *K8sPSAT) open(context.Context, attestorEnv) (nodeattest.Attestor, error) {
	return k8spsat.New(c.config())
}

// namesAgentsAfterPods tells whether the agents of a cluster are named after their pods, and not after their nodes.
func (n *NodeAttestors) namesAgentsAfterPods(cluster string) bool {
	return n.K8sPSAT != nil && n.K8sPSAT.Clusters[cluster].UsePodUID
}
