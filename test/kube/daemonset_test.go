//go:build kube

package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// startCA starts a CA on this machine that pods of the clusters reach, and that takes their agents' tokens.
func startCA(t *testing.T, clusters map[string]*cluster, change func(*ca.Config)) *signettest.Signet {
	t.Helper()
	listen := need(t, "SIGNET_KUBE_CA_LISTEN", "an address of this machine at which pods reach what listens there")
	psat := &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{}}
	for name, k := range clusters {
		psat.Clusters[name] = ca.K8sCluster{ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: k.credentials("ca")}
	}
	return signettest.Start(t, signettest.Config{CA: func(c *ca.Config) { // again when the CA is started again
		c.Listen = listen
		c.NodeAttestors.K8sPSAT = psat
		if change != nil {
			change(c)
		}
	}})
}

// A daemonSet is our agent on every node of a cluster, with no more privileges than it needs, and its socket in a directory of the
// node that pods mount.
type daemonSet struct {
	k      *cluster
	s      *signettest.Signet
	name   string // of the cluster, for the CA
	dir    string // of the socket, on the node
	change func(*agentSpec)
	hash   int
}

// agentSpec is what tests change of the DaemonSet.
type agentSpec struct {
	image   string
	command []string
	caps    string // capabilities that are added
}

// runAgents starts the agents and waits until they serve.
func (k *cluster) runAgents(s *signettest.Signet, name string, change func(*agentSpec)) *daemonSet {
	k.t.Helper()
	d := &daemonSet{k: k, s: s, name: name, dir: "/run/" + k.namespace, change: change}
	bundle, err := os.ReadFile(s.BundlePath())
	if err != nil {
		k.t.Fatal(err)
	}
	roots := os.Getenv("SIGNET_KUBE_CGROUP_ROOT")
	if k.kubeconfig == os.Getenv("SIGNET_KUBECONFIG_OTHER") {
		roots = os.Getenv("SIGNET_KUBE_CGROUP_ROOT_OTHER")
	}
	cgroups := "[]"
	if roots != "" && roots != "/" {
		cgroups = "[" + roots + "]"
	}
	k.apply(fmt.Sprintf(`apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: %[1]s-agent}
rules:
- {apiGroups: [""], resources: [nodes/pods], verbs: [get]}
- {apiGroups: [""], resources: [namespaces], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: %[1]s-agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: %[1]s-agent}
subjects: [{kind: ServiceAccount, name: agent, namespace: %[1]s}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: agent, namespace: %[1]s}
data:
  bundle.pem: %[2]q
  agent.yaml: |
    trust_domain: example.org
    server_address: %[3]q
    data_dir: /var/lib/signet/agent
    socket_path: %[4]s/agent.sock
    trust_bundle_path: /etc/signet/bundle.pem
    node_attestation: {k8s_psat: {cluster: %[5]q}}
    workload_attestation:
      unix: {}
      k8s: {kubelet_address_env: NODE_IP, node_name_env: NODE_NAME, namespace_labels: [team], cgroup_roots: %[6]s}
    metrics: {listen: 0.0.0.0:9989}
    hand_over: true
    log: {level: debug}
`, k.namespace, bundle, need(k.t, "SIGNET_KUBE_CA_ADDRESS", "the address at which pods find what listens at SIGNET_KUBE_CA_LISTEN"), d.dir, name, cgroups))
	k.afterwards(func() {
		if k.t.Failed() {
			k.t.Log(k.kubectl("-n", k.namespace, "get", "pods", "-o", "wide"))
			k.t.Log(k.kubectl("-n", k.namespace, "logs", "-l", "app=agent", "--tail=150", "--prefix"))
		}
		k.kubectl("delete", "clusterrole,clusterrolebinding", k.namespace+"-agent")
	})
	d.roll()
	d.serves()
	return d
}

// roll applies the DaemonSet with another template each time, so that its pods are replaced.
func (d *daemonSet) roll() {
	d.k.t.Helper()
	d.hash++
	spec := agentSpec{image: need(d.k.t, "SIGNET_KUBE_IMAGES", "where signet's images are") + "/signet-agent:" + need(d.k.t, "SIGNET_KUBE_TAG", "the tag of signet's images"),
		command: []string{"/usr/bin/signet-agent", "-config", "/etc/signet/agent.yaml"}}
	if d.change != nil {
		d.change(&spec)
	}
	command, err := json.Marshal(spec.command)
	if err != nil {
		d.k.t.Fatal(err)
	}
	d.k.apply(fmt.Sprintf(`apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: agent}}
  updateStrategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
  template:
    metadata: {labels: {app: agent}, annotations: {generation: "%[2]d"}}
    spec:
      serviceAccountName: agent
      hostPID: true
      terminationGracePeriodSeconds: 10
      tolerations: [{operator: Exists}]
      securityContext: {seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: agent
        image: %[3]s
        command: %[4]s
        env:
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: NODE_IP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
        readinessProbe: {httpGet: {path: /ready, port: 9989}, periodSeconds: 1}
        livenessProbe: {httpGet: {path: /live, port: 9989}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}
        securityContext:
          runAsUser: 0
          runAsGroup: 0
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities: {drop: [ALL], add: [%[5]s]}
        volumeMounts:
        - {name: config, mountPath: /etc/signet, readOnly: true}
        - {name: token, mountPath: /var/run/secrets/tokens, readOnly: true}
        - {name: data, mountPath: /var/lib/signet}
        - {name: socket, mountPath: %[6]s}
      volumes:
      - {name: config, configMap: {name: agent}}
      - {name: token, projected: {sources: [{serviceAccountToken: {path: spire-agent, audience: spire-server, expirationSeconds: 7200}}]}}
      - {name: data, hostPath: {path: %[6]s-data, type: DirectoryOrCreate}}
      - {name: socket, hostPath: {path: %[6]s, type: DirectoryOrCreate}}
`, d.k.namespace, d.hash, spec.image, command, spec.caps, d.dir))
}

// serves waits until the pods of the newest template are ready.
func (d *daemonSet) serves() {
	d.k.t.Helper()
	d.k.kubectl("-n", d.k.namespace, "rollout", "status", "daemonset/agent", "--timeout=90s")
}

// nodes are the agents that the CA knows of this cluster.
func (d *daemonSet) nodes() []*types.Agent {
	d.k.t.Helper()
	r, err := agentv1.NewAgentClient(d.s.AdminConn()).ListAgents(d.k.ctx, &agentv1.ListAgentsRequest{})
	if err != nil {
		d.k.t.Fatal(err)
	}
	return slices.DeleteFunc(r.Agents, func(a *types.Agent) bool { return !strings.HasPrefix(a.Id.Path, "/spire/agent/k8s_psat/"+d.name+"/") })
}

// workload is the template of a pod that runs test/kube/workload. In containers, IMAGE stands for the image, the socket and where it is.
func (d *daemonSet) workload(name, labels, spec string) {
	d.k.t.Helper()
	d.k.apply(d.manifest(name, labels, spec))
}

func (d *daemonSet) manifest(name, labels, spec string) string {
	d.k.t.Helper()
	with := func(image string) string {
		return fmt.Sprintf("image: %q, env: [{name: SPIFFE_ENDPOINT_SOCKET, value: %q}], volumeMounts: [{name: socket, mountPath: %s, readOnly: true}]", image, "unix://"+d.dir+"/agent.sock", d.dir)
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {%s}}
spec:
  serviceAccountName: web
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  tolerations: [{operator: Exists}]
  volumes: [{name: socket, hostPath: {path: %s, type: Directory}}]
%s`, name, d.k.namespace, labels, d.dir, strings.NewReplacer(
		"IMAGE", with(need(d.k.t, "SIGNET_KUBE_WORKLOAD_IMAGE", "an image whose program is test/kube/workload")),
		"OTHER", with(need(d.k.t, "SIGNET_KUBE_OTHER_IMAGE", "another image whose program is test/kube/workload"))).Replace(spec))
}

// identity registers an identity that agents of this DaemonSet's service account give to workloads that match.
func (d *daemonSet) identity(name string, match ...string) {
	d.k.t.Helper()
	d.s.Apply(d.document(name, match...))
}

func (d *daemonSet) document(name string, match ...string) string {
	return fmt.Sprintf("{kind: Identity, name: %s, spiffeID: /%s, match: [%s], on: [\"k8s_psat:cluster:%s\"]}\n", name, name, quoted(match), d.name)
}

func quoted(words []string) string {
	var all []string
	for _, w := range words {
		all = append(all, fmt.Sprintf("%q", w))
	}
	return strings.Join(all, ", ")
}

// says waits until a container has logged a line that begins with want, and returns the line. Containers that say "ids: " must say
// nothing else. Of a container that was replaced meanwhile, the next is asked.
func (k *cluster) says(pod, container, want string, more ...string) string {
	k.t.Helper()
	for {
		got, err := k.try("", append([]string{"-n", k.namespace, "logs", pod, "-c", container}, more...)...)
		lines := strings.Split(got, "\n")
		i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, want) })
		switch {
		case err == nil && i >= 0 && (!strings.HasPrefix(want, "ids:") || lines[i] == want):
			return lines[i]
		case err == nil && strings.HasPrefix(want, "ids:") && slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "ids:") }):
			k.t.Errorf("container %s of pod %s says %q, want %q", container, pod, got, want)
			return ""
		case k.ctx.Err() != nil:
			k.t.Fatalf("container %s of pod %s says %q, %v; want %q", container, pod, got, err, want)
		}
		pause(k.t, k.ctx)
	}
}

// field is one of an object of this namespace.
func (k *cluster) field(object, path string) string {
	k.t.Helper()
	return k.kubectl("-n", k.namespace, "get", object, "-o", "jsonpath={"+path+"}")
}

// kubebox does something to a cluster that kubebox runs.
func (k *cluster) kubebox(args ...string) {
	k.t.Helper()
	program, dir := optional(k.t, "SIGNET_KUBEBOX", "the program kubebox"), optional(k.t, "SIGNET_KUBEBOX_DIR", "the state directory of the first cluster, if it is kubebox's")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // cleaning up goes on when the test's own time is over
	defer cancel()
	if out, err := command(ctx, program, append([]string{args[0], "-dir", dir}, args[1:]...)...); err != nil {
		k.t.Fatalf("kubebox %q: %v: %s", args, err, out)
	}
}
