package k8s

import (
	"fmt"
	"strings"
	"testing"
)

func TestConfig(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
		want string // the field; empty: it is right
	}{
		{"nothing", Config{}, ""},
		{"a port beyond", Config{SecurePort: 65536}, "kubelet_secure_port"},
		{"a negative port", Config{ReadOnlyPort: -1}, "kubelet_read_only_port"},
		{"two addresses", Config{KubeletAddress: "10.0.0.1", KubeletAddressEnv: "X"}, "kubelet_address_env"},
		{"two names", Config{NodeName: "a", NodeNameEnv: "X"}, "node_name_env"},
		{"a URL for an address", Config{KubeletAddress: "https://10.0.0.1"}, "kubelet_address"},
		{"an IPv6 address", Config{KubeletAddress: "fd00::1"}, ""},
		{"a relative path", Config{KubeletCAPath: "ca.crt"}, "kubelet_ca_path"},
		{"a relative token", Config{TokenPath: "token"}, "token_path"},
		{"two ports", Config{ReadOnlyPort: 10255, SecurePort: 10250}, "kubelet_secure_port"},
		{"authorities without TLS", Config{ReadOnlyPort: 10255, KubeletCAPath: "/ca"}, "kubelet_ca_path"},
		{"nothing to skip without TLS", Config{ReadOnlyPort: 10255, SkipKubeletVerification: true}, "skip_kubelet_verification"},
		{"verified and not", Config{KubeletCAPath: "/ca", SkipKubeletVerification: true}, "skip_kubelet_verification"},
		{"half a certificate", Config{CertificatePath: "/c"}, "certificate_path"},
		{"certificate and token", Config{CertificatePath: "/c", PrivateKeyPath: "/k", TokenPath: "/t"}, "token_path"},
		{"certificate for the kubelet, token for the API server", Config{CertificatePath: "/c", PrivateKeyPath: "/k", TokenPath: "/t", NamespaceLabels: []string{"team"}, APIServer: "https://a:6443"}, ""},
		{"a cgroup root that is none", Config{CgroupRoots: []string{"kube"}}, "cgroup_roots"},
		{"the cgroup root itself", Config{CgroupRoots: []string{"/"}}, "cgroup_roots"},
		{"a label that is none", Config{NamespaceLabels: []string{"team:x"}, APIServer: "https://a"}, "namespace_labels"},
		{"all labels", Config{NamespaceLabels: []string{"*"}, APIServer: "https://a"}, "namespace_labels"},
		{"too many labels", Config{NamespaceLabels: make([]string, maxNamespaceLabels+1), APIServer: "https://a"}, "namespace_labels"},
		{"an API server for nothing", Config{APIServer: "https://a"}, "api_server"},
		{"an API server without TLS", Config{APIServer: "http://a", NamespaceLabels: []string{"team"}}, "api_server"},
		{"an API server with a password", Config{APIServer: "https://a:b@c", NamespaceLabels: []string{"team"}}, "api_server"},
		{"no API server", Config{NamespaceLabels: []string{"team"}}, "api_server"},
		{"an address that the environment does not have", Config{KubeletAddressEnv: "SIGNET_TEST_ABSENT"}, "kubelet_address_env"},
		{"a name that the environment does not have", Config{NodeNameEnv: "SIGNET_TEST_ABSENT"}, "node_name_env"},
	} {
		t.Setenv("KUBERNETES_SERVICE_HOST", "")
		m, err := New(tt.cfg)
		if err == nil {
			_ = m.Close()
		}
		if (err != nil) != (tt.want != "") || err != nil && !strings.HasPrefix(err.Error(), "k8s attestation: "+tt.want+": ") {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
}

func TestWhereTheKubeletIs(t *testing.T) {
	t.Setenv("SIGNET_TEST_IP", "10.0.0.7")
	t.Setenv("SIGNET_TEST_NAME", "node-7")
	for _, tt := range []struct {
		cfg       Config
		url, name string
	}{
		{Config{NodeName: "n"}, "https://127.0.0.1:10250/pods", "n"},
		{Config{KubeletAddress: "fd00::1", SecurePort: 1}, "https://[fd00::1]:1/pods", "fd00::1"},
		{Config{ReadOnlyPort: 10255}, "http://127.0.0.1:10255/pods", ""},
		{Config{KubeletAddressEnv: "SIGNET_TEST_IP", NodeNameEnv: "SIGNET_TEST_NAME"}, "https://10.0.0.7:10250/pods", "node-7"},
	} {
		c := tt.cfg
		if err := c.complete(); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(c.kubeletURL()); got != tt.url || tt.name != "" && c.kubeletName() != tt.name {
			t.Errorf("%+v: %s, name %q; want %s, %q", tt.cfg, got, c.kubeletName(), tt.url, tt.name)
		}
	}
}

// What a sandbox must let through is what is used, and no more.
func TestNeeds(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "6443")
	const dir = "/var/run/secrets/kubernetes.io/serviceaccount/"
	for _, tt := range []struct {
		name, want string
		cfg        Config
	}{
		{"nothing", "[" + dir + "ca.crt " + dir + "token] [10250]", Config{}},
		{"no TLS", "[] [10255]", Config{ReadOnlyPort: 10255}},
		{"a certificate", "[/ca /c /k] [1]", Config{SecurePort: 1, KubeletCAPath: "/ca", CertificatePath: "/c", PrivateKeyPath: "/k"}},
		{"namespaces", "[/t " + dir + "ca.crt /t] [10250 6443]", Config{SkipKubeletVerification: true, TokenPath: "/t", NamespaceLabels: []string{"team"}}},
		{"an API server elsewhere", "[" + dir + "ca.crt " + dir + "token " + dir + "ca.crt " + dir + "token] [10250 443]", Config{APIServer: "https://a", NamespaceLabels: []string{"team"}}},
	} {
		files, ports := tt.cfg.Needs()
		if got := fmt.Sprint(files, " ", ports); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}
