package agent

import (
	"log/slog"
	"path/filepath"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/k8s"
)

// K8sAttestation configures the workload attestor k8s. Without any field it fits an agent in a pod with hostPID and
// hostNetwork.
type K8sAttestation struct {
	// KubeletAddress is the host name or IP address of the node's kubelet. Default 127.0.0.1.
	KubeletAddress string `yaml:"kubelet_address"`
	// KubeletAddressEnv is an environment variable that holds it, such as one from status.hostIP. Excludes KubeletAddress.
	KubeletAddressEnv string `yaml:"kubelet_address_env"`
	// KubeletSecurePort is the kubelet's port with TLS. Default 10250.
	KubeletSecurePort int `yaml:"kubelet_secure_port"`
	// KubeletReadOnlyPort is the kubelet's port without TLS, which is used instead. Whoever can listen on it while the
	// kubelet does not says what pods there are.
	KubeletReadOnlyPort int `yaml:"kubelet_read_only_port"`
	// KubeletCAPath is a PEM file with the authorities that sign the kubelet's serving certificate, or with that certificate. Default
	// /var/run/secrets/kubernetes.io/serviceaccount/ca.crt.
	KubeletCAPath string `yaml:"kubelet_ca_path"`
	// SkipKubeletVerification takes anybody who answers for the kubelet, and shows the token to them.
	SkipKubeletVerification bool `yaml:"skip_kubelet_verification"`
	// NodeName is the name in the kubelet's certificate; a kubelet that has pods of another node is refused. Default: the
	// variable of NodeNameEnv; without it the host name if KubeletAddress is a loopback address, else KubeletAddress.
	NodeName string `yaml:"node_name"`
	// NodeNameEnv is an environment variable that holds it, such as one from spec.nodeName. Excludes NodeName.
	NodeNameEnv string `yaml:"node_name_env"`
	// TokenPath is a file with the bearer token for kubelet and API server, which is read for each request. Default
	// /var/run/secrets/kubernetes.io/serviceaccount/token.
	TokenPath string `yaml:"token_path"`
	// CertificatePath and PrivateKeyPath are a client certificate and its key in PEM, which the kubelet is shown instead.
	CertificatePath string `yaml:"certificate_path"`
	PrivateKeyPath  string `yaml:"private_key_path"`
	// CgroupRoots are values of the kubelet's option --cgroup-root, other than / and /kubelet.
	CgroupRoots []string `yaml:"cgroup_roots"`
	// NamespaceLabels are the keys of those labels of namespaces that become selectors. The API server is asked for them, and
	// for nothing else. Default: none.
	NamespaceLabels []string `yaml:"namespace_labels"`
	// APIServer is the URL of the API server. Default: what Kubernetes tells the agent's pod.
	APIServer string `yaml:"api_server"`
	// APIServerCAPath is a PEM file with the API server's authorities. Default as KubeletCAPath's.
	APIServerCAPath string `yaml:"api_server_ca_path"`
}

func (c *K8sAttestation) config() k8s.Config {
	return k8s.Config{
		KubeletAddress: c.KubeletAddress, KubeletAddressEnv: c.KubeletAddressEnv, SecurePort: c.KubeletSecurePort, ReadOnlyPort: c.KubeletReadOnlyPort,
		KubeletCAPath: c.KubeletCAPath, SkipKubeletVerification: c.SkipKubeletVerification, NodeName: c.NodeName, NodeNameEnv: c.NodeNameEnv,
		TokenPath: c.TokenPath, CertificatePath: c.CertificatePath, PrivateKeyPath: c.PrivateKeyPath, CgroupRoots: c.CgroupRoots,
		NamespaceLabels: c.NamespaceLabels, APIServer: c.APIServer, APIServerCAPath: c.APIServerCAPath,
	}
}

func (c *K8sAttestation) check(bad func(field, format string, args ...any)) { c.config().Check(bad) }

func (c *K8sAttestation) open(*slog.Logger) (workloadattest.Method, error) {
	return k8s.New(c.config())
}

func (c *K8sAttestation) needs() need {
	files, ports := c.config().Needs()
	n := need{feature: "workload_attestation.k8s", ports: ports}
	for _, f := range files {
		n.read = append(n.read, filepath.Dir(f)) // files there are replaced by others
	}
	return n
}
