package why

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/internal/why"
)

const (
	podUID      = "3c5f0a52-95b6-4a1f-8c52-0d6a7a7d2a10"
	containerID = "6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f6f"
)

// kubelet serves these pods on its read-only port, until the tests end.
func kubelet(items string) int {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"kind":"PodList","apiVersion":"v1","items":[%s]}`, items)
	}))
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	n, _ := strconv.Atoi(port)
	return n
}

// onKubernetes is a node whose kubelet knows one pod.
var onKubernetes = maker{Agent: func(c *agent.Config) {
	c.WorkloadAttestation.K8s = &agent.K8sAttestation{KubeletAddress: "127.0.0.1", KubeletReadOnlyPort: kubelet(fmt.Sprintf(`{
		"metadata":{"name":"web-0","namespace":"prod","uid":%q,"labels":{"app":"web","tier":"front"}},
		"spec":{"serviceAccountName":"web","nodeName":"n1","containers":[{"name":"server","image":"docker.io/library/web:1.2"}]},
		"status":{"phase":"Running","containerStatuses":[{"name":"server","image":"docker.io/library/web:1.2","imageID":"docker.io/library/web@sha256:%s",
			"containerID":"containerd://%s","state":{"running":{"startedAt":"2026-01-01T00:00:00Z"}}}]}}`, podUID, strings.Repeat("0a", 32), containerID))}
}}

// podWith builds the pod's process, with an entry for its namespace and one more selector, and asks about the pod.
func podWith(selector string) func(*world) why.Target {
	return func(w *world) why.Target {
		w.entry(entrySpec{selectors: []string{"k8s:ns:prod", selector}})
		w.cgroup(w.run(w.program("web/server"), as(4711, 4711)), "kubepods/burstable/pod"+podUID+"/"+containerID)
		return why.Target{Pod: "prod/web-0"}
	}
}

// podSetups have a pod that the kubelet knows, and an entry that does not match it.
var podSetups = []setup{
	{name: "pod, typo in the service account", root: true, make: onKubernetes, build: podWith("k8s:sa:wbe"), want: why.Typo, says: "k8s:sa:web"},
	{name: "pod, its name in upper case", root: true, make: onKubernetes, build: podWith("k8s:pod-name:Web-0"), want: why.WrongCase, says: "k8s:pod-name:web-0"},
	{name: "pod, wrong label", root: true, make: onKubernetes, build: podWith("k8s:pod-label:tier:backend"), want: why.LabelDiffers, says: "k8s:pod-label:tier:front"},
	{name: "pod, label missing", root: true, make: onKubernetes, build: podWith("k8s:pod-label:team:payments"), want: why.LabelMissing, says: "no such label"},
	{name: "pod, image without its registry", root: true, make: onKubernetes, build: podWith("k8s:container-image:web:1.2"), want: why.ImageForm, says: "docker.io/library/web:1.2"},
	{name: "pod, image of the tag before", root: true, make: onKubernetes, build: podWith("k8s:container-image:docker.io/library/web:1.1"), want: why.ImageForm, says: "docker.io/library/web:1.2"},
	{name: "pod, two service accounts in one entry", root: true, make: onKubernetes, build: func(w *world) why.Target {
		w.entry(entrySpec{selectors: []string{"k8s:sa:web", "k8s:sa:shop"}})
		w.cgroup(w.run(w.program("web/server"), as(4711, 4711)), "kubepods/burstable/pod"+podUID+"/"+containerID)
		return why.Target{Pod: "prod/web-0"}
	}, want: why.SelectorsTwoOfOne, says: "an entry for each"},
	{name: "kubelet down", root: true, make: maker{Agent: func(c *agent.Config) {
		c.WorkloadAttestation.K8s = &agent.K8sAttestation{KubeletAddress: "127.0.0.1", KubeletReadOnlyPort: 1}
	}}, build: inPod, want: why.AttestorFailed, says: "k8s"},
	{name: "pod that the kubelet does not know", root: true, make: maker{Agent: func(c *agent.Config) {
		c.WorkloadAttestation.K8s = &agent.K8sAttestation{KubeletAddress: "127.0.0.1", KubeletReadOnlyPort: kubelet("")}
	}}, build: inPod, want: why.AttestorFailed, says: "k8s"},
}

// inPod builds a process in a pod's cgroup, with an entry for its namespace, and asks about the process.
func inPod(w *world) why.Target {
	path := w.program("web/server")
	w.entry(entrySpec{selectors: []string{"k8s:ns:prod", "unix:path:" + path}})
	p := w.run(path, as(4711, 4711))
	w.cgroup(p, "kubepods/burstable/pod"+podUID+"/"+containerID)
	return pid(p)
}
