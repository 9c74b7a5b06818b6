//go:build kube

package kube

import (
	"fmt"
	"os"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/resources"
)

// resourceRules are what the CA needs for custom resources, besides its Lease.
const resourceRules = `- {apiGroups: [signet-id.github.io], resources: [identities, callpolicies, clustercallpolicies, federations, revocations], verbs: [get, list, watch]}
- {apiGroups: [signet-id.github.io], resources: [identities/status, callpolicies/status, clustercallpolicies/status, federations/status, revocations/status], verbs: [update]}
- {apiGroups: [apiextensions.k8s.io], resources: [customresourcedefinitions], verbs: [get]}
- {apiGroups: [""], resources: [events], verbs: [create]}`

// sceneOf is a scene with a CA that is a process, which has not been started.
func (k *cluster) sceneOf(kubernetes, more string) (*scene, *process) {
	k.t.Helper()
	client, err := kube.Open("prod", k.kubeconfig)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(client.Close)
	p := k.newProcess(fmt.Sprintf("kubeconfig: %s, namespace: %s, %s", k.credentials("ca"), k.namespace, kubernetes), more)
	return &scene{cluster: k, dyn: client.Dynamic, admin: p.Admin}, p
}

// A CA that may not read custom resources, or whose cluster has no definitions of them, says so once, with what to do, and where an operator
// looks; when it is mended it goes on by itself.
func TestResourcesThatCannotBeRead(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	k.define()
	s, p := k.sceneOf("resources: {}", "")
	p.start()
	problems := func(of string) func(string) bool {
		return func(page string) bool {
			for _, kind := range resources.Kinds {
				if !strings.Contains(page, "warning: cluster prod: changes of custom resources are not seen: ") || !strings.Contains(page, fmt.Sprintf(of, kind.Plural+"."+resources.Group)) {
					return false
				}
			}
			return true
		}
	}
	none := func(page string) bool { return strings.HasPrefix(page, "200") && !strings.Contains(page, "warning") }
	page := p.readyUntil("each kind that may not be listed is a problem", problems("listing %[1]s: the CA may not; grant its service account list and watch on %[1]s: "))
	if !strings.HasPrefix(page, "200") {
		t.Errorf("a CA that serves is not ready: %s", page)
	}
	reads := func() (n int) {
		for l := range strings.Lines(p.page("/metrics")) {
			fmt.Sscanf(l, `signet_ca_kubernetes_requests_total{cluster="prod",kind="read"} %d`, &n)
		}
		return n
	}
	if m := p.page("/metrics"); !strings.Contains(m, `signet_ca_kubernetes_problems{cluster="prod"} 5`) {
		t.Errorf("the metrics do not count five problems:\n%s", grep(m, "signet_ca_kubernetes_"))
	}
	for before := reads(); reads() < before+12; { // it tries again and again
		pause(t, ctx)
	}
	warned := func() (n int) {
		for l := range strings.Lines(p.Out.String()) {
			if strings.Contains(l, "level=WARN") && strings.Contains(l, resources.Group) {
				n++
				if !strings.Contains(l, "cluster=prod") || !strings.Contains(l, "grant its service account") {
					t.Errorf("a warning does not say where and what to do: %s", l)
				}
			}
		}
		return n
	}
	if n := warned(); n != len(resources.Kinds) {
		t.Errorf("%d warnings about %d kinds", n, len(resources.Kinds))
	}
	s.mustCreate("ClusterCallPolicy", "waits", "service: /web\nallow:\n- from: [/shop]\n")
	k.may("resources", resourceRules)
	p.readyUntil("nothing is wrong any more", none) // which can take as long as the longest wait between two tries
	s.accepted("ClusterCallPolicy", "waits")

	k.kubectl("delete", "-f", definitionFiles)
	p.readyUntil("each kind without a definition is a problem", problems("%s: the cluster does not know them; install their definitions"))
	if s.document("CallPolicy", "waits") == "" {
		t.Error("the document went with the definition")
	}
	k.kubectl("apply", "-f", definitionFiles)
	k.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", definitionFiles)
	s.mustCreate("ClusterCallPolicy", "after", "service: /web\nallow:\n- from: [/shop]\n")
	p.readyUntil("nothing is wrong any more", none)
	s.accepted("ClusterCallPolicy", "after")
}

// A full disk of the CA, while pods and custom resources come and go: pods get and lose their identities as before; a custom resource that cannot be taken
// says so and is taken by itself when there is room; what only takes away is done.
func TestResourcesOnAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a tmpfs in a mount namespace; CI runs as root")
	}
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	k.define()
	k.may("resources", resourceRules)
	node := k.namespace + "-node"
	k.simulatedNode(node)
	spire := newMadeUp(t, ctx)
	k.may("spire", "- {apiGroups: [spire.spiffe.io], resources: [clusterstaticentries], verbs: [list, watch]}\n- {apiGroups: [spire.spiffe.io], resources: [clusterstaticentries/status], verbs: [patch]}")
	s, p := k.sceneOf("pods: {}, resources: {}, spire_resources: {kinds: [ClusterStaticEntry], class_name: "+spire.class+"}", "audit: {reserve_bytes: 8388608}\n")
	p.disk(96 << 20)
	p.start()
	template := "spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}'\nmatch: ['k8s:pod-label:app:simulated']\n'on': ['k8s_psat:cluster:prod']\n"
	s.mustCreate("Identity", "pods", template)
	s.accepted("Identity", "pods")
	for _, name := range []string{"there", "goes"} {
		s.mustCreate("ClusterCallPolicy", name, "service: /web\nallow:\n- from: [/shop]\n")
		s.accepted("ClusterCallPolicy", name)
	}
	agent := follow(t, ctx, p.Addr, k.agentToken("agent", node), p.roots())
	id := func(pod string) string { return "/ns/" + k.namespace + "/pod/" + pod }
	k.simulate("before", node)
	agent.until(ctx, "a pod has its identity", id("before"))

	fill, err := os.Create(fmt.Sprintf("/proc/%d/root%s/disk/fill", p.PID(), p.Dir)) // the mount is visible there only
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	chunk := make([]byte, 64<<10)
	for len(chunk) > 1 { // to the last byte
		if _, err := fill.Write(chunk); err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
	for i, callers := 0, 2000; callers > 0; i++ { // the store has some room of its own
		var doc strings.Builder
		fmt.Fprintf(&doc, "kind: CallPolicy\nname: fill-%d\nservice: /fill\nallow:\n- from:\n", i)
		for j := range callers {
			fmt.Fprintf(&doc, "  - /fill/%032d/%032d\n", i, j)
		}
		if err := p.apply(doc.String()); err != nil {
			if !strings.Contains(err.Error(), "disk") {
				t.Fatal(err)
			}
			callers /= 2
		}
	}
	late := 0
	for { // what is smaller may still find room
		name := fmt.Sprintf("late-%03d", late)
		late++
		s.mustCreate("ClusterCallPolicy", name, "service: /web\nallow:\n- from: [/late]\n")
		u := s.until("ClusterCallPolicy", name, "it is judged", func(u *unstructured.Unstructured) bool { st, _, _ := accepted(u); return st != "" })
		if st, reason, message := accepted(u); st == "False" {
			if reason != "DiskFull" || !strings.Contains(message, "disk is full") || strings.Contains(message, "stays in force") {
				t.Errorf("a resource that the disk has no room for: %s: %s", reason, message)
			}
			break
		}
	}
	s.set("ClusterCallPolicy", "there", "service: /web\nallow:\n- from: [/changed]\n", nil)
	if m := s.refused("ClusterCallPolicy", "there", "DiskFull"); !strings.Contains(m, "what was accepted before stays in force") {
		t.Errorf("a change that the disk has no room for: %s", m)
	}
	if doc := s.document("CallPolicy", "there"); !strings.Contains(doc, "/shop") {
		t.Errorf("the CA holds %q", doc)
	}
	p.readyUntil("the disk is a problem", func(page string) bool { return strings.HasPrefix(page, "503") && strings.Contains(page, "disk") })
	// More than are looked at whenever something changes.
	for range 120 {
		s.mustCreate("ClusterCallPolicy", fmt.Sprintf("late-%03d", late), "service: /web\nallow:\n- from: [/late]\n")
		late++
	}
	s.refused("ClusterCallPolicy", fmt.Sprintf("late-%03d", late-1), "DiskFull")
	for _, kind := range []string{"Federation", "Identity", "Revocation", "CallPolicy"} {
		s.mustCreate(kind, "late", map[string]string{"Federation": "trustDomain: partner.example\nbundleEndpointURL: https://partner.example/bundle\nprofile: https_web\n",
			"Identity": "spiffeID: '/late/{{ .k8s.pod }}'\nmatch: ['k8s:pod-label:app:simulated']\n'on': ['k8s_psat:cluster:prod']\n", "Revocation": "id: /late\n",
			"CallPolicy": "service: /ns/" + k.namespace + "/pod/before\nallow:\n- from: [/shop]\n"}[kind])
		s.refused(kind, "late", "DiskFull")
	}
	entryIs := func(status string) {
		t.Helper()
		until(t, ctx, func() string {
			if got := spire.status("clusterstaticentry", "late"); got != status {
				return fmt.Sprintf("the status of the ClusterStaticEntry is %s, want %s", got, status)
			}
			return ""
		})
	}
	spire.resource("ClusterStaticEntry", "late", `spiffeID: "spiffe://example.org/static", parentID: "spiffe://example.org/node", selectors: ["unix:uid:7"]`)
	entryIs(`{"masked":false,"rendered":true,"set":false}`)
	k.until("an Event says that the disk is full", func(out string, err error) bool { return err == nil && strings.Contains(out, "disk is full") },
		"-n", "default", "get", "events", "--field-selector=involvedObject.kind=ClusterStaticEntry,involvedObject.name="+spire.mark+"-late", "-o", "jsonpath={.items[*].message}")
	// Pods come and go.
	k.simulate("during", node)
	agent.until(ctx, "a pod that came has its identity", id("before"), id("during"))
	now := int64(0)
	if err := k.admin().CoreV1().Pods(k.namespace).Delete(ctx, "before", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	agent.until(ctx, "a pod that went has none", id("during"))
	s.remove("ClusterCallPolicy", "goes")
	s.gone("CallPolicy", "goes")
	var events strings.Builder
	for l := range strings.Lines(p.Out.String()) {
		if strings.Contains(l, "custom resources are not in force yet") {
			events.WriteString(l)
		}
	}
	if n := strings.Count(events.String(), "\n"); n < 1 || n > 3 {
		t.Errorf("%d warnings, want one for a while of a full disk:\n%s", n, events.String())
	}

	if err := fill.Truncate(0); err != nil {
		t.Fatal(err)
	}
	for i := range late {
		s.accepted("ClusterCallPolicy", fmt.Sprintf("late-%03d", i))
	}
	for _, kind := range []string{"Federation", "Identity", "Revocation", "CallPolicy"} {
		s.accepted(kind, "late")
	}
	entryIs(`{"masked":false,"rendered":true,"set":true}`)
	s.accepted("ClusterCallPolicy", "there")
	if doc := s.document("CallPolicy", "there"); !strings.Contains(doc, "/changed") {
		t.Errorf("with room again the CA holds %q", doc)
	}
	agent.until(ctx, "an Identity that waited gives its identity", id("during"), "/late/during")
	p.readyUntil("all is well", func(page string) bool { return strings.HasPrefix(page, "200") && !strings.Contains(page, "warning") })
}
