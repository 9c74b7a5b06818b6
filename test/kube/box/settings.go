package main

import (
	"path/filepath"
	"strings"
)

// What is in this version of Kubernetes but off by default, and switched on
// here: Pod Certificates, and ClusterTrustBundles with their projection into
// pods. The kubelet's settings name the same gates.
const (
	featureGates = "PodCertificateRequest=true,ClusterTrustBundle=true,ClusterTrustBundleProjection=true"
	betaAPIs     = "certificates.k8s.io/v1beta1=true"
)

// fill replaces {WORD}s in a template.
func fill(template string, pairs ...string) string {
	return strings.NewReplacer(pairs...).Replace(template)
}

func writeKubeconfig(dir, name, user, server string) error {
	return writeFile(dir, name+".kubeconfig", fill(`apiVersion: v1
kind: Config
current-context: kubebox
clusters:
- name: kubebox
  cluster:
    server: {SERVER}
    certificate-authority: {PKI}/ca.crt
users:
- name: {USER}
  user:
    client-certificate: {PKI}/{USER}.crt
    client-key: {PKI}/{USER}.key
contexts:
- name: kubebox
  context: {cluster: kubebox, user: {USER}}
`, "{SERVER}", server, "{USER}", user, "{PKI}", filepath.Join(dir, "pki")))
}

// writeSettings writes the configuration files of the node's programs.
func writeSettings(dir, cgroup string, at place) error {
	vars := []string{
		"{DIR}", dir, "{PKI}", filepath.Join(dir, "pki"), "{CGROUP}", cgroup,
		"{PODCIDR}", at.podCIDR, "{CLUSTERCIDR}", clusterCIDR, "{PAUSE}", pauseImage, "{DNS}", nodeIP,
	}
	for name, text := range map[string]string{
		"containerd.toml": containerdSettings,
		"kubelet.yaml":    kubeletSettings,
		"proxy.yaml":      proxySettings,
		"cni/10.conflist": cniSettings,
	} {
		if err := writeFile(filepath.Join(dir, "etc"), name, fill(text, vars...)); err != nil {
			return err
		}
	}
	return nil
}

const containerdSettings = `version = 2
root = "{DIR}/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # Without CAP_SYS_RESOURCE no score can be lowered.
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{DIR}/etc/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
`

// The eviction and garbage collection settings keep the kubelet from acting on
// how full the machine's disk is.
const kubeletSettings = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true} # it keeps what it learnt for two minutes, which is the default
  x509: {clientCAFile: "{PKI}/ca.crt"}
authorization:
  mode: Webhook
  webhook: {cacheUnauthorizedTTL: 5s}
tlsCertFile: "{PKI}/kubelet.crt"
tlsPrivateKeyFile: "{PKI}/kubelet.key"
staticPodPath: "{DIR}/manifests"
featureGates: {PodCertificateRequest: true, ClusterTrustBundle: true, ClusterTrustBundleProjection: true}
cgroupDriver: cgroupfs
cgroupRoot: "{CGROUP}"
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
kubeAPIQPS: 500
kubeAPIBurst: 1000
resolvConf: ""
clusterDNS: [{DNS}]
clusterDomain: cluster.local
syncFrequency: 10s
fileCheckFrequency: 2s
nodeStatusUpdateFrequency: 4s
crashLoopBackOff: {maxContainerRestartPeriod: 5s}
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 50Mi, nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%", imagefs.inodesFree: "0%"}
`

const proxySettings = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: "{DIR}/proxy.kubeconfig"}
mode: iptables
clusterCIDR: "{CLUSTERCIDR}"
iptables: {minSyncPeriod: 0s}
nodePortAddresses: [primary]
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`

const cniSettings = `{
  "cniVersion": "0.4.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
      "ipam": {
        "type": "host-local", "dataDir": "/run/cni",
        "ranges": [[{"subnet": "{PODCIDR}"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`
