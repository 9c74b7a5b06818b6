//go:build kube

package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The agent on the node tells the processes of pods apart by what Kubernetes says of them.
func TestWorkloads(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.kubectl("label", "namespace", k.namespace, "team=payments")
	s := startCA(t, map[string]*cluster{"prod": k}, nil)
	d := k.runAgents(s, "prod", nil)
	if n := d.nodes(); len(n) != 1 || !n[0].CanReattest {
		t.Fatalf("the CA knows the agents %v; want one that may attest again", n)
	}
	ns, sa := "k8s:ns:"+k.namespace, "k8s:sa:web"
	documents := []string{
		d.document("guaranteed", ns, sa, "k8s:pod-label:qos:guaranteed", "k8s:container-name:main"),
		d.document("burstable", ns, sa, "k8s:pod-name:burstable", "k8s:pod-image-count:1"),
		d.document("besteffort", ns, "k8s:pod-label:qos:besteffort", "k8s:container-image:"+os.Getenv("SIGNET_KUBE_WORKLOAD_IMAGE")),
		d.document("team", "k8s:namespace-label:team:payments", "k8s:pod-label:qos:besteffort"),
		d.document("setup", ns, "k8s:container-name:setup", "k8s:pod-init-image-count:1"),
		d.document("after", ns, "k8s:container-name:after"),
		d.document("again", ns, "k8s:container-name:again"),
		d.document("sidecar", ns, "k8s:container-name:sidecar"),
		d.document("beside", ns, "k8s:container-name:beside"),
		d.document("debug", ns, "k8s:container-name:debug"),
		d.document("image-a", ns, "k8s:pod-name:two", "k8s:container-image:"+os.Getenv("SIGNET_KUBE_WORKLOAD_IMAGE")),
		d.document("image-b", ns, "k8s:pod-name:two", "k8s:container-image:"+os.Getenv("SIGNET_KUBE_OTHER_IMAGE")),
		d.document("both", ns, "k8s:pod-name:two", "k8s:pod-image-count:2"),
		d.document("host", ns, "k8s:container-name:host"),
		d.document("hostpid", ns, "k8s:container-name:hostpid"),
		d.document("own", ns, "k8s:container-name:own"),
		d.document("user", ns, "k8s:container-name:user", "unix:uid:4711"),
	}
	s.Apply(strings.Join(documents, "---\n"))

	one := func(container, more string) string {
		return fmt.Sprintf("  containers: [{name: %s, IMAGE, command: [/workload, who]%s}]\n", container, more)
	}
	d.workload("guaranteed", "qos: guaranteed", one("main", ", resources: {limits: {cpu: 100m, memory: 64Mi}}"))
	d.workload("burstable", "", one("main", ", resources: {requests: {cpu: 10m, memory: 16Mi}}"))
	d.workload("besteffort", "qos: besteffort", one("main", ""))
	d.workload("nobody", "", one("nobody", ""))
	d.workload("staged", "", "  initContainers: [{name: setup, IMAGE, command: [/workload, who, once]}]\n"+one("after", ""))
	d.workload("native", "", "  initContainers: [{name: sidecar, IMAGE, restartPolicy: Always, command: [/workload, who]}]\n"+one("beside", ""))
	d.workload("crashing", "", "  containers: [{name: again, IMAGE, command: [/workload, who, once]}]\n")
	d.workload("two", "", "  containers: [{name: a, IMAGE, command: [/workload, who]}, {name: b, OTHER, command: [/workload, who]}]\n")
	d.workload("on-host", "", "  hostNetwork: true\n"+one("host", ""))
	d.workload("host-pid", "", "  hostPID: true\n"+one("hostpid", ""))
	d.workload("own-cgroups", "", "  containers: [{name: own, IMAGE, command: [/workload, private, /workload, who], securityContext: {capabilities: {add: [SYS_ADMIN]}}}]\n")
	d.workload("as-user", "", one("user", ", securityContext: {runAsUser: 4711, runAsGroup: 4711, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}"))

	for _, w := range []struct{ pod, container, ids string }{
		{"guaranteed", "main", "/guaranteed"}, {"burstable", "main", "/burstable"}, {"besteffort", "main", "/besteffort /team"}, {"nobody", "nobody", "none"},
		{"staged", "setup", "/setup"}, {"staged", "after", "/after"}, {"native", "sidecar", "/sidecar"}, {"native", "beside", "/beside"},
		{"two", "a", "/both /image-a"}, {"two", "b", "/both /image-b"}, {"on-host", "host", "/host"}, {"host-pid", "hostpid", "/hostpid"},
		{"own-cgroups", "own", "/own"}, {"as-user", "user", "/user"},
	} {
		k.says(w.pod, w.container, "ids: "+w.ids)
	}
	for pod, qos := range map[string]string{"guaranteed": "Guaranteed", "burstable": "Burstable", "besteffort": "BestEffort"} {
		if got := k.field("pod/"+pod, ".status.qosClass"); got != qos {
			t.Errorf("pod %s is of class %s, so the test tries less than it says", pod, got)
		}
	}

	// A container that ends is started again, and is known each time.
	k.says("crashing", "again", "ids: /again", "--previous")
	k.says("crashing", "again", "ids: /again")

	// One that is put into a running pod.
	k.kubectl("-n", k.namespace, "patch", "pod", "burstable", "--subresource=ephemeralcontainers", "--type=strategic", "-p", fmt.Sprintf(
		`{"spec": {"ephemeralContainers": [{"name": "debug", "image": %q, "command": ["/workload", "who"], "env": [{"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix://%[2]s/agent.sock"}], "volumeMounts": [{"name": "socket", "mountPath": %[2]q}]}]}}`,
		os.Getenv("SIGNET_KUBE_WORKLOAD_IMAGE"), d.dir))
	k.says("burstable", "debug", "ids: /burstable /debug") // by the pod, and by the container

	// A pod of the same name is another one.
	uid := k.field("pod/nobody", ".metadata.uid")
	d.identity("that-one", ns, "k8s:pod-uid:"+uid)
	k.kubectl("-n", k.namespace, "delete", "pod", "guaranteed", "nobody")
	d.workload("guaranteed", "", one("nobody", ""))
	d.workload("nobody", "", one("nobody", ""))
	k.says("guaranteed", "nobody", "ids: none")
	k.says("nobody", "nobody", "ids: none")
	if again := k.field("pod/nobody", ".metadata.uid"); again == uid {
		t.Errorf("the new pod has the UID of the old one, %s", uid)
	}
}

// A static pod, which the kubelet runs by a file and shows to the API server as a mirror.
func TestStaticPod(t *testing.T) {
	dir := optional(t, "SIGNET_KUBEBOX_DIR", "the state directory of the first cluster, if it is kubebox's")
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, nil)
	d := k.runAgents(s, "prod", nil)
	d.identity("static", "k8s:ns:"+k.namespace, "k8s:container-name:static", "k8s:sa:")
	d.identity("mirror", "k8s:ns:"+k.namespace, "k8s:sa:web")
	manifest := strings.Replace(d.manifest("static", "", "  containers: [{name: static, IMAGE, command: [/workload, who]}]\n"), "  serviceAccountName: web\n", "", 1)
	file := filepath.Join(dir, "manifests", k.namespace+".yaml")
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(file) })
	k.says("static-"+k.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"), "static", "ids: /static")
}

// An agent with a cgroup namespace of its own, as pods have by default with cgroup v2, reads the cgroups of others by ways up.
func TestAgentWithCgroupNamespace(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, nil)
	d := k.runAgents(s, "prod", func(a *agentSpec) {
		a.image = os.Getenv("SIGNET_KUBE_WORKLOAD_IMAGE")
		a.command = append([]string{"/workload", "private"}, a.command...)
		a.caps = "SYS_ADMIN"
	})
	d.identity("web", "k8s:ns:"+k.namespace, "k8s:sa:web", "k8s:container-name:main")
	for pod, more := range map[string]string{"besteffort": "", "burstable": ", resources: {requests: {cpu: 10m, memory: 16Mi}}", "guaranteed": ", resources: {limits: {cpu: 100m, memory: 64Mi}}"} {
		d.workload(pod, "", "  containers: [{name: main, IMAGE, command: [/workload, who]"+more+"}, {name: nobody, IMAGE, command: [/workload, who]"+more+"}]\n")
	}
	for _, pod := range []string{"besteffort", "burstable", "guaranteed"} {
		k.says(pod, "main", "ids: /web")
		k.says(pod, "nobody", "ids: none")
	}
}
