//go:build kube

package kube

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// The agent in a pod of the node tells the processes of other pods apart by what Kubernetes says of them: pods of all three
// classes, init containers, a container that is started again, and one that nobody named.
func TestWorkloads(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	image := need(t, "SIGNET_KUBE_AGENT_IMAGE", "an image whose program /podagent is test/kube/podagent")
	k.kubectl("label", "namespace", k.namespace, "team=payments")
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
metadata: {name: identities, namespace: %[1]s}
data:
  identities.yaml: |
    {kind: Identity, name: guaranteed, spiffeID: /guaranteed, match: ["k8s:ns:%[1]s", "k8s:sa:web", "k8s:pod-label:qos:guaranteed", "k8s:container-name:main"]}
    ---
    {kind: Identity, name: burstable, spiffeID: /burstable, match: ["k8s:ns:%[1]s", "k8s:sa:web", "k8s:pod-name:burstable", "k8s:pod-image-count:1"]}
    ---
    {kind: Identity, name: besteffort, spiffeID: /besteffort, match: ["k8s:ns:%[1]s", "k8s:pod-label:qos:besteffort", "k8s:container-image:%[2]s"]}
    ---
    {kind: Identity, name: team, spiffeID: /team, match: ["k8s:namespace-label:team:payments", "k8s:pod-label:qos:besteffort"]}
    ---
    {kind: Identity, name: setup, spiffeID: /setup, match: ["k8s:ns:%[1]s", "k8s:container-name:setup", "k8s:pod-init-image-count:1"]}
    ---
    {kind: Identity, name: after, spiffeID: /after, match: ["k8s:ns:%[1]s", "k8s:container-name:after"]}
    ---
    {kind: Identity, name: again, spiffeID: /again, match: ["k8s:ns:%[1]s", "k8s:container-name:again"]}
---
apiVersion: v1
kind: Pod
metadata: {name: signet, namespace: %[1]s}
spec:
  serviceAccountName: agent
  hostPID: true
  hostNetwork: true
  terminationGracePeriodSeconds: 5
  containers:
  - name: agent
    image: %[2]q
    command: [/podagent, agent, /identities/identities.yaml]
    env: [{name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}, {name: CGROUP_ROOTS, value: %[3]q}]
    volumeMounts: [{name: socket, mountPath: /run/signet-kube}, {name: state, mountPath: /state}, {name: identities, mountPath: /identities}]
  volumes:
  - {name: socket, hostPath: {path: /run/signet-kube, type: DirectoryOrCreate}}
  - {name: state, emptyDir: {}}
  - {name: identities, configMap: {name: identities}}
`, k.namespace, image, os.Getenv("SIGNET_KUBE_CGROUP_ROOT")))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		k.ctx = ctx
		if t.Failed() {
			t.Log(k.kubectl("-n", k.namespace, "logs", "signet", "--tail=200"))
		}
		k.kubectl("delete", "clusterrole,clusterrolebinding", k.namespace+"-agent")
	})
	k.log("signet", "agent", "ready")

	pod := func(name, qos, resources, containers string) {
		k.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s, labels: {qos: %[3]q}}
spec:
  serviceAccountName: web
  terminationGracePeriodSeconds: 0
  volumes: [{name: socket, hostPath: {path: /run/signet-kube}}]
%[4]s`, name, k.namespace, qos, strings.NewReplacer("IMAGE", fmt.Sprintf("image: %q, volumeMounts: [{name: socket, mountPath: /run/signet-kube}]", image),
			"RESOURCES", resources).Replace(containers)))
	}
	const one = "  containers: [{name: main, IMAGE, command: [/podagent, who], resources: RESOURCES}]\n"
	pod("guaranteed", "guaranteed", "{limits: {cpu: 100m, memory: 64Mi}}", one)
	pod("burstable", "burstable", "{requests: {cpu: 10m, memory: 16Mi}}", one)
	pod("besteffort", "besteffort", "{}", one)
	pod("nobody", "none", "{}", "  containers: [{name: nobody, IMAGE, command: [/podagent, who]}]\n")
	pod("staged", "staged", "{}", "  initContainers: [{name: setup, IMAGE, command: [/podagent, who, once]}]\n  containers: [{name: after, IMAGE, command: [/podagent, who]}]\n")
	pod("restarted", "restarted", "{}", "  containers: [{name: again, IMAGE, command: [/podagent, who, once]}]\n")

	k.log("guaranteed", "main", "ids: /guaranteed")
	k.log("burstable", "main", "ids: /burstable")
	k.log("besteffort", "main", "ids: /besteffort /team")
	k.log("nobody", "nobody", "ids: none")
	k.log("staged", "setup", "ids: /setup")
	k.log("staged", "after", "ids: /after")
	k.log("restarted", "again", "ids: /again", "--previous")
	k.log("restarted", "again", "ids: /again")
	t.Log(k.kubectl("-n", k.namespace, "exec", "signet", "--", "/podagent", "layouts"))
}

// log waits until a container has logged a line, and no other SPIFFE IDs.
func (k *cluster) log(pod, container, want string, more ...string) {
	k.t.Helper()
	for {
		got, err := k.try("", append([]string{"-n", k.namespace, "logs", pod, "-c", container}, more...)...)
		lines := strings.Split(got, "\n")
		switch {
		case err == nil && slices.Contains(lines, want):
			return
		case err == nil && slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "ids:") }):
			k.t.Errorf("container %s of pod %s says %q, want %q", container, pod, got, want)
			return
		case k.ctx.Err() != nil:
			k.t.Fatalf("container %s of pod %s says %q, %v; want %q", container, pod, got, err, want)
		}
		pause(k.t, k.ctx)
	}
}
