package k8s

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	defaultSecurePort = 10250
	serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"
	// maxNamespaceLabels bounds the keys that are asked for.
	maxNamespaceLabels = 64
)

// Config says how the kubelet is reached. The zero value is right for an agent in a pod with hostNetwork, hostPID and a
// service account that may get nodes/pods, if the cluster's authorities sign the kubelet's serving certificate.
type Config struct {
	// KubeletAddress is the host name or IP address of the node's kubelet. Empty means 127.0.0.1.
	KubeletAddress string

	// KubeletAddressEnv is an environment variable that holds it, such as one from status.hostIP.
	KubeletAddressEnv string

	// SecurePort is the kubelet's port with TLS. Zero means 10250.
	SecurePort int

	// ReadOnlyPort is the kubelet's port without TLS and without authentication. Zero means that it is not used. Whoever can
	// listen on it when the kubelet does not says what pods there are.
	ReadOnlyPort int

	// KubeletCAPath is a PEM file with the authorities that sign the kubelet's serving certificate. Empty means the
	// authorities of the cluster, as pods get them.
	KubeletCAPath string

	// SkipKubeletVerification takes anybody who answers for the kubelet and shows the token to them.
	SkipKubeletVerification bool

	// NodeName is the name in the kubelet's certificate. Empty means what NodeNameEnv holds; if that is empty too, the host
	// name if the kubelet is asked at a loopback address, else KubeletAddress. If it is set, pods of another node are refused.
	NodeName string

	// NodeNameEnv is an environment variable that holds the name of the node, such as one from spec.nodeName.
	NodeNameEnv string

	// TokenPath is a file with the bearer token, which is read for each request. Empty means the one of the pod's service
	// account, if there is no certificate.
	TokenPath string

	// CertificatePath and PrivateKeyPath are a client certificate and its key in PEM, which are shown instead of a token.
	CertificatePath, PrivateKeyPath string

	// CgroupRoots are values of the kubelet's option --cgroup-root other than / and /kubelet.
	CgroupRoots []string

	// NamespaceLabels are the keys of the labels of namespaces that become selectors. Empty means that the API server is
	// not asked at all.
	NamespaceLabels []string

	// APIServer is the URL of the API server. Empty means what Kubernetes tells the agent's pod.
	APIServer string

	// APIServerCAPath is a PEM file with the API server's authorities. Empty means those that pods get.
	APIServerCAPath string

	// serviceAccountDir is where a pod's token and authorities are.
	serviceAccountDir string
}

// Check tells each mistake by its field, as it is called in the agent's configuration.
func (c Config) Check(bad func(field, format string, args ...any)) {
	for _, f := range []struct {
		field string
		port  int
	}{{"kubelet_secure_port", c.SecurePort}, {"kubelet_read_only_port", c.ReadOnlyPort}} {
		if f.port < 0 || f.port > 65535 {
			bad(f.field, "%d is no port", f.port)
		}
	}
	if c.KubeletAddress != "" && c.KubeletAddressEnv != "" {
		bad("kubelet_address_env", "excludes kubelet_address; keep one of them")
	}
	if c.NodeName != "" && c.NodeNameEnv != "" {
		bad("node_name_env", "excludes node_name; keep one of them")
	}
	if strings.ContainsAny(c.KubeletAddress, "/[]@ ") {
		bad("kubelet_address", "%q is not a host name or IP address", c.KubeletAddress)
	}
	for _, f := range []struct{ field, path string }{
		{"kubelet_ca_path", c.KubeletCAPath}, {"token_path", c.TokenPath}, {"certificate_path", c.CertificatePath},
		{"private_key_path", c.PrivateKeyPath}, {"api_server_ca_path", c.APIServerCAPath},
	} {
		if f.path != "" && !filepath.IsAbs(f.path) {
			bad(f.field, "%q must be absolute", f.path)
		}
	}
	if c.ReadOnlyPort != 0 {
		for _, f := range []struct {
			field string
			set   bool
		}{
			{"kubelet_secure_port", c.SecurePort != 0}, {"kubelet_ca_path", c.KubeletCAPath != ""}, {"certificate_path", c.CertificatePath != ""},
			{"skip_kubelet_verification", c.SkipKubeletVerification},
		} {
			if f.set {
				bad(f.field, "excludes kubelet_read_only_port, which has no TLS")
			}
		}
	}
	if c.SkipKubeletVerification && c.KubeletCAPath != "" {
		bad("skip_kubelet_verification", "excludes kubelet_ca_path; keep one of them, better that one")
	}
	if (c.CertificatePath == "") != (c.PrivateKeyPath == "") {
		bad("certificate_path", "needs private_key_path, and the other way round")
	}
	if c.CertificatePath != "" && c.TokenPath != "" && len(c.NamespaceLabels) == 0 {
		bad("token_path", "excludes certificate_path; the kubelet is asked in one way")
	}
	for _, r := range c.CgroupRoots {
		if r == "/" || !path.IsAbs(r) || path.Clean(r) != r {
			bad("cgroup_roots", "%q is not an absolute path below /, such as /kube", r)
		}
	}
	c.checkNamespaces(bad)
}

func (c Config) checkNamespaces(bad func(field, format string, args ...any)) {
	if len(c.NamespaceLabels) > maxNamespaceLabels {
		bad("namespace_labels", "has %d keys, at most %d are allowed", len(c.NamespaceLabels), maxNamespaceLabels)
	}
	for _, k := range c.NamespaceLabels {
		if k == "" || len(k) > 317 || strings.ContainsAny(k, ": *") {
			bad("namespace_labels", "%q is not the key of a label, such as team", k)
		}
	}
	if len(c.NamespaceLabels) == 0 {
		if c.APIServer != "" || c.APIServerCAPath != "" {
			bad("api_server", "is asked for namespace_labels only; name some, or leave it out")
		}
		return
	}
	if c.APIServer == "" {
		return
	}
	if u, err := url.Parse(c.APIServer); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		bad("api_server", "%q is not a URL such as https://10.0.0.1:6443", c.APIServer)
	}
}

// complete checks the configuration and fills in what is not set.
func (c *Config) complete() error {
	var first error
	c.Check(func(field, format string, args ...any) {
		if first == nil {
			first = fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...))
		}
	})
	if first != nil {
		return first
	}
	for _, f := range []struct {
		field, env string
		value      *string
	}{{"kubelet_address_env", c.KubeletAddressEnv, &c.KubeletAddress}, {"node_name_env", c.NodeNameEnv, &c.NodeName}} {
		if f.env == "" {
			continue
		}
		if *f.value = os.Getenv(f.env); *f.value == "" {
			return fmt.Errorf("%s: the environment has no %s; set it in the agent's pod by fieldRef, or leave the option out", f.field, f.env)
		}
	}
	if c.serviceAccountDir == "" {
		c.serviceAccountDir = serviceAccountDir
	}
	if c.KubeletAddress == "" {
		c.KubeletAddress = "127.0.0.1"
	}
	if c.SecurePort == 0 {
		c.SecurePort = defaultSecurePort
	}
	if c.KubeletCAPath == "" {
		c.KubeletCAPath = filepath.Join(c.serviceAccountDir, "ca.crt")
	}
	if c.TokenPath == "" {
		c.TokenPath = filepath.Join(c.serviceAccountDir, "token")
	}
	if c.APIServerCAPath == "" {
		c.APIServerCAPath = filepath.Join(c.serviceAccountDir, "ca.crt")
	}
	if c.APIServer == "" && len(c.NamespaceLabels) > 0 {
		host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
		if host == "" || port == "" {
			return fmt.Errorf("api_server: missing, and the agent is in no pod, since the environment has no KUBERNETES_SERVICE_HOST and " +
				"KUBERNETES_SERVICE_PORT; namespace_labels need it")
		}
		c.APIServer = "https://" + net.JoinHostPort(host, port)
	}
	c.APIServer = strings.TrimSuffix(c.APIServer, "/")
	return nil
}

// Needs are the files that are read, and the TCP ports that are connected to, while the method is used.
func (c Config) Needs() (files []string, ports []uint16) {
	if c.complete() != nil {
		return nil, nil // New will say so
	}
	if c.ReadOnlyPort != 0 {
		ports = append(ports, uint16(c.ReadOnlyPort))
	} else {
		ports = append(ports, uint16(c.SecurePort))
		if !c.SkipKubeletVerification {
			files = append(files, c.KubeletCAPath)
		}
		if c.CertificatePath != "" {
			files = append(files, c.CertificatePath, c.PrivateKeyPath)
		} else {
			files = append(files, c.TokenPath)
		}
	}
	if len(c.NamespaceLabels) > 0 {
		files = append(files, c.APIServerCAPath, c.TokenPath)
		port := "443"
		if u, err := url.Parse(c.APIServer); err == nil && u.Port() != "" {
			port = u.Port()
		}
		if p, err := strconv.ParseUint(port, 10, 16); err == nil {
			ports = append(ports, uint16(p))
		}
	}
	return files, ports
}

// kubeletURL is where the pod list is.
func (c Config) kubeletURL() string {
	if c.ReadOnlyPort != 0 {
		return "http://" + net.JoinHostPort(c.KubeletAddress, strconv.Itoa(c.ReadOnlyPort)) + "/pods"
	}
	return "https://" + net.JoinHostPort(c.KubeletAddress, strconv.Itoa(c.SecurePort)) + "/pods"
}

// kubeletName is the name in the kubelet's certificate.
func (c Config) kubeletName() string {
	if c.NodeName != "" {
		return c.NodeName
	}
	if ip := net.ParseIP(c.KubeletAddress); ip != nil && ip.IsLoopback() || c.KubeletAddress == "localhost" {
		if name, err := os.Hostname(); err == nil && name != "" {
			return strings.ToLower(name)
		}
	}
	return c.KubeletAddress
}
