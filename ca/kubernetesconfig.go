package ca

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Kubernetes names the clusters that the CA watches, and says what it does there.
type Kubernetes struct {
	// Clusters are the clusters by name: the one under which their agents attest (node_attestors.k8s_psat.clusters).
	Clusters map[string]KubernetesCluster `yaml:"clusters"`
}

// KubernetesCluster says how one cluster is reached and what the CA does there. Whatever is absent is off.
type KubernetesCluster struct {
	// Kubeconfig is a file that says how to reach the API server. It and the files that it names are read again when they change.
	// Programs for credentials (exec) are refused, and plain HTTP but to loopback addresses. Default: as a pod of that cluster does.
	Kubeconfig string `yaml:"kubeconfig"`
	// Namespace is the CA's own namespace in the cluster, where it keeps its Lease. Default: that of its pod (POD_NAMESPACE, or
	// the mounted service account's), and signet-system with a kubeconfig.
	Namespace string `yaml:"namespace"`
	// DisableEvents writes no Events, which say at pods, namespaces and custom resources what is refused. Default: false.
	DisableEvents bool `yaml:"disable_events"`
	// Pods gives the cluster's pods their identities by templated Identities. Default: off.
	Pods *KubernetesPods `yaml:"pods"`
	// Bundle publishes the trust bundle in the cluster. Default: off.
	Bundle *KubernetesBundle `yaml:"bundle"`
	// PodCertificates answers the PodCertificateRequests of kubelets. It needs the watch of the pods.
	PodCertificates *PodCertificates `yaml:"pod_certificates"`
	// SPIREResources reads the custom resources of spire-controller-manager. Default: off.
	SPIREResources *KubernetesSPIREResources `yaml:"spire_resources"`
	// Injection puts the proxy into pods that ask for it. Default: off.
	Injection *Injection `yaml:"injection"`
	// Resources reads the custom resources of signet-id.github.io in the cluster. Default: off.
	Resources *KubernetesResources `yaml:"resources"`
}

// The namespace of a pod is in a file beside its token.
const (
	namespaceFile    = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
	defaultNamespace = "signet-system"
)

func (c KubernetesCluster) ownNamespace() string {
	if c.Namespace != "" {
		return c.Namespace
	}
	if c.Kubeconfig != "" {
		return defaultNamespace
	}
	if ns := os.Getenv("POD_NAMESPACE"); namespaceName.MatchString(ns) {
		return ns
	}
	if text, err := os.ReadFile(namespaceFile); err == nil {
		if ns := strings.TrimSpace(string(text)); namespaceName.MatchString(ns) {
			return ns
		}
	}
	return defaultNamespace
}

var namespaceName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (k *Kubernetes) check(bad func(field, format string, args ...any)) {
	for name, c := range k.Clusters {
		field := "kubernetes.clusters." + name
		if name == "" {
			bad("kubernetes.clusters", "a cluster has no name; give it the one under which its agents attest")
		}
		if c.Kubeconfig != "" && !filepath.IsAbs(c.Kubeconfig) {
			bad(field+".kubeconfig", "%q must be absolute", c.Kubeconfig)
		}
		if c.Namespace != "" && !namespaceName.MatchString(c.Namespace) {
			bad(field+".namespace", "%q is not the name of a namespace, such as signet-system", c.Namespace)
		}
		c.SPIREResources.check(field+".spire_resources", c.Pods != nil, bad)
	}
}
