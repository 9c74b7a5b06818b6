//go:build kube

package kube

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// whole are values that switch on, or change, what the other tests leave as it is.
const whole = `
image: {pullSecrets: [signet-test-registry]}
log: {level: debug, format: text}
crds: {spire: true}
ca:
  agentNodeLabels: [kubernetes.io/hostname]
  agentPodLabels: [team]
  service: {type: NodePort, port: 8443, annotations: {signet.test/service: "1"}}
  kubernetes: {podCertificates: true, spireResources: true, injection: {enabled: true, port: 10443}}
  webRootsConfigMap: signet-test-roots
  metrics: {port: 9111}
  extraEnv: [{name: SIGNET_TEST, value: "1"}]
  serviceAccount: {annotations: {signet.test/account: "1"}}
  podAnnotations: {signet.test/pod: "1"}
  podLabels: {team: ca}
  resources: {requests: {cpu: 50m, memory: 64Mi}, limits: {cpu: "1", memory: 512Mi}}
  priorityClassName: signet-test
  nodeSelector: {kubernetes.io/os: linux}
  tolerations: [{key: signet.test/taint, operator: Exists}]
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: Exists}]}]}}}
  topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {team: ca}}}]
agent:
  socket: {directory: /run/other, name: api.sock}
  kubelet: {certificate: selfSigned, legacyAuthorization: true}
  namespaceLabels: [signet.test/team]
  executables: true
  metrics: {port: 9112}
  update: {maxSurge: 1}
  serviceAccount: {annotations: {signet.test/account: "1"}}
  podAnnotations: {signet.test/pod: "1"}
  podLabels: {team: agents}
  resources: {requests: {cpu: 10m, memory: 32Mi}, limits: {memory: 256Mi}}
  priorityClassName: system-node-critical
  nodeSelector: {kubernetes.io/os: linux}
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: Exists}]}]}}}
networkPolicy:
  caFrom: [{ipBlock: {cidr: 10.0.0.0/8}}]
  metricsFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
  injectionFrom: [{ipBlock: {cidr: 10.0.0.1/32}}]
serviceMonitor: {interval: 15s, labels: {release: prometheus}}
`

// TestChartWhole installs the chart with everything else than its defaults, where the API server has what it may use, and looks at it as those
// do for whom it is: the kubelet (probes), the scheduler, Prometheus, a network plugin, a workload.
func TestChartWhole(t *testing.T) {
	i := newInstaller(t, 8*time.Minute)
	i.monitored()
	const away = "kubectl delete -f deploy/helm/signet/files/crds-spire --ignore-not-found"
	i.shell(i.env, away) // as chart does with signet's own
	i.afterwards(func() { i.shell(i.env, away) })
	i.apply("apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: signet-test}\nvalue: 1000\n")
	i.atEnd("delete", "priorityclass", "signet-test")
	pki := filepath.Join(optional(t, "SIGNET_KUBEBOX_DIR", "the state directory of the first cluster, if it is kubebox's"), "pki")
	i.kubectl("create", "namespace", installation)
	i.kubectl("-n", installation, "create", "secret", "docker-registry", "signet-test-registry", "--docker-server=images.example.org", "--docker-username=u", "--docker-password=p")
	i.kubectl("-n", installation, "create", "configmap", "signet-test-roots", "--from-file=ca-certificates.crt="+filepath.Join(pki, "ca.crt"))
	i.helm("install signet deploy/helm/signet --namespace "+installation+" --wait --timeout 2m", whole, fmt.Sprintf("agent: {kubelet: {certificateFile: %q}}", filepath.Join(pki, "kubelet.crt")))

	var all struct{ Items []corev1.Pod }
	if err := json.Unmarshal([]byte(i.kubectl("-n", installation, "get", "pods", "-o", "json")), &all); err != nil || len(all.Items) != 2 {
		t.Fatalf("%d pods, %v", len(all.Items), err)
	}
	for _, p := range all.Items {
		c := p.Spec.Containers[0]
		priority := map[string]int32{"signet-ca": 1000, "signet-agent": 2000001000}[p.Labels["app.kubernetes.io/name"]]
		switch {
		case !slices.Equal(p.Spec.ImagePullSecrets, []corev1.LocalObjectReference{{Name: "signet-test-registry"}}):
			t.Errorf("%s has the pull secrets %v", p.Name, p.Spec.ImagePullSecrets)
		case p.Annotations["signet.test/pod"] != "1" || p.Labels["team"] == "":
			t.Errorf("%s has the annotations %v, labels %v", p.Name, p.Annotations, p.Labels)
		case p.Spec.Priority == nil || *p.Spec.Priority != priority:
			t.Errorf("%s has the priority %v, want %d", p.Name, p.Spec.Priority, priority)
		case p.Status.ContainerStatuses[0].RestartCount != 0 || !p.Status.ContainerStatuses[0].Ready || c.StartupProbe == nil || c.LivenessProbe == nil || c.ReadinessProbe == nil:
			t.Errorf("%s is %+v", p.Name, p.Status.ContainerStatuses[0])
		}
	}
	for _, of := range []string{"serviceaccount/signet-ca", "serviceaccount/signet-agent", "service/signet-ca"} {
		if got := i.kubectl("-n", installation, "get", of, "-o", "jsonpath={.metadata.annotations}"); !strings.Contains(got, "signet.test/") {
			t.Errorf("%s has the annotations %s", of, got)
		}
	}

	// A network plugin finds the pods and their ports.
	for name, want := range map[string]string{"signet-ca": "api inject metrics", "signet-agent": "metrics"} {
		var p networkingv1.NetworkPolicy
		if err := json.Unmarshal([]byte(i.kubectl("-n", installation, "get", "networkpolicy", name, "-o", "json")), &p); err != nil {
			t.Fatal(err)
		}
		selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
		if err != nil {
			t.Fatal(err)
		}
		var ports []string
		for _, r := range p.Spec.Ingress {
			if len(r.From) == 0 {
				t.Errorf("policy %s lets everybody in: %+v", name, r)
			}
			ports = append(ports, r.Ports[0].Port.StrVal)
		}
		for _, pod := range all.Items {
			if got := selector.Matches(labels.Set(pod.Labels)); got != (pod.Labels["app.kubernetes.io/name"] == name) {
				t.Errorf("policy %s is for %s: %t", name, pod.Name, got)
			} else if got {
				for _, port := range ports {
					if !slices.ContainsFunc(pod.Spec.Containers[0].Ports, func(p corev1.ContainerPort) bool { return p.Name == port }) {
						t.Errorf("policy %s speaks of the port %s, which %s does not have", name, port, pod.Name)
					}
				}
			}
		}
		if slices.Sort(ports); strings.Join(ports, " ") != want {
			t.Errorf("policy %s is about %q, want %q", name, ports, want)
		}
	}

	i.scraped()
	i.used()

	// One replica has no budget that would keep its node from being drained.
	if got := i.kubectl("-n", installation, "get", "poddisruptionbudgets", "-o", "name"); got != "" {
		t.Errorf("one replica has %s", got)
	}
	i.kubectlIn(`{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "signet-ca-0"}}`, "create", "--raw", "/api/v1/namespaces/"+installation+"/pods/signet-ca-0/eviction", "-f", "-")
	i.kubectl("-n", installation, "rollout", "status", "statefulset/signet-ca", "--timeout=90s")
}

// scraped reads metrics as Prometheus does by the ServiceMonitor: of the Services that it selects, at the port that it names.
func (i *installer) scraped() {
	i.t.Helper()
	var m struct {
		Metadata struct{ Labels map[string]string }
		Spec     struct {
			Selector  struct{ MatchLabels map[string]string }
			Endpoints []struct{ Port, Interval string }
		}
	}
	if err := json.Unmarshal([]byte(i.kubectl("-n", installation, "get", "servicemonitor", "signet", "-o", "json")), &m); err != nil {
		i.t.Fatal(err)
	}
	if m.Metadata.Labels["release"] != "prometheus" || len(m.Spec.Endpoints) != 1 || m.Spec.Endpoints[0].Interval != "15s" {
		i.t.Fatalf("the ServiceMonitor is %+v", m)
	}
	services := strings.Fields(i.kubectl("-n", installation, "get", "services", "-l", labels.Set(m.Spec.Selector.MatchLabels).String(), "-o", "jsonpath={.items[*].metadata.name}"))
	if len(services) != 2 {
		i.t.Fatalf("it selects the services %q", services)
	}
	for service, want := range map[string]string{"signet-ca-replicas": "signet_ca_", "signet-agent": "signet_agent_"} {
		text := i.kubectl("get", "--raw", "/api/v1/namespaces/"+installation+"/services/"+service+":"+m.Spec.Endpoints[0].Port+"/proxy/metrics")
		if !slices.Contains(services, service) || !strings.Contains(text, "\n"+want) {
			i.t.Errorf("of %s (%q) Prometheus reads\n%.500s", service, services, text)
		}
	}
}

// used is a workload that finds the socket where the values say, and has selectors that only this agent has.
func (i *installer) used() {
	i.t.Helper()
	run := func(name, args string) {
		i.unprivileged(name, "web", args, `{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///spiffe/api.sock"}`, `{name: spiffe, hostPath: {path: /run/other, type: Directory}}`, `{name: spiffe, mountPath: /spiffe, readOnly: true}`)
		i.kubectl("-n", i.namespace, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=60s")
	}
	run("wait", "wait")
	var hash string
	for _, pid := range processesOf(i.t, i.uid("wait"), "workload") {
		program, err := os.ReadFile(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			i.t.Fatal(err)
		}
		hash = fmt.Sprintf("%x", sha256.Sum256(program))
	}
	i.kubectl("label", "namespace", i.namespace, "signet.test/team=payments")
	i.apply(fmt.Sprintf(`apiVersion: signet-id.github.io/v1alpha1
kind: Identity
metadata: {name: chosen}
spec:
  spiffeID: /chosen
  match: ["k8s:ns:%s", "k8s:namespace-label:signet.test/team:payments", "unix:sha256:%s"]
  on: ["k8s_psat:cluster:prod", "k8s_psat:agent_pod_label:team:agents"]
`, i.namespace, hash))
	run("hold", "hold")
	i.prints("hold", "svid: /chosen")
	if _, err := os.Stat("/run/other/api.sock"); err == nil {
		i.t.Error("the socket is on this machine, and not on the node")
	}
}
