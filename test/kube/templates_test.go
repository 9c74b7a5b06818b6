//go:build kube

package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
)

// templated starts a CA that watches the pods of a cluster, and agents.
func templated(t *testing.T, k *cluster, changes ...func(*ca.Config)) *daemonSet {
	t.Helper()
	k.allow()
	kubeconfig := k.credentials("ca")
	s := startCA(t, map[string]*cluster{"prod": k}, func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: kubeconfig, Namespace: k.namespace, Pods: &ca.KubernetesPods{}}}
		for _, change := range changes {
			change(c)
		}
	})
	return k.runAgents(s, "prod", nil)
}

// template is an Identity of the pods of a namespace.
func (d *daemonSet) template(name, spiffeID, more string) string {
	return fmt.Sprintf("{kind: Identity, name: %s, spiffeID: '%s', match: ['k8s:ns:%s', 'k8s:sa:web'], on: ['k8s_psat:cluster:%s']%s}\n", name, spiffeID, d.k.namespace, d.name, more)
}

const firstCall = "  containers: [{name: main, IMAGE, command: [/workload, first]}]\n"

// stubborn makes the pod one that lives on for a while after it was deleted.
func (d *daemonSet) stubborn(name, labels string) {
	d.k.t.Helper()
	d.k.apply(strings.Replace(d.manifest(name, labels, firstCall), "terminationGracePeriodSeconds: 0", "terminationGracePeriodSeconds: 60", 1))
}

// printed is what the container main of a pod has printed, as the node has it, also of a pod that the API server has not any more and
// when there is no API server. Restarts are put together.
func (k *cluster) printed(uid string) string {
	k.t.Helper()
	if k.nodeRoot == "" {
		k.t.Skip("SIGNET_KUBE_NODE_ROOT is not set: where the node's files can be read")
	}
	files, err := filepath.Glob(filepath.Join(k.nodeRoot, "var/log/pods", "*_"+uid, "main", "*.log"))
	if err != nil {
		k.t.Fatal(err)
	}
	slices.Sort(files)
	var out strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil && !os.IsNotExist(err) {
			k.t.Fatal(err)
		}
		for l := range strings.Lines(string(text)) { // time, stream, F, what was printed
			if parts := strings.SplitN(l, " ", 4); len(parts) == 4 {
				out.WriteString(parts[3])
			}
		}
	}
	return out.String()
}

// untilPrinted waits until a pod's container main has printed something.
func (k *cluster) untilPrinted(uid, what string, f func(text string) bool) string {
	k.t.Helper()
	for {
		text := k.printed(uid)
		if f(text) {
			return text
		}
		if k.ctx.Err() != nil {
			k.t.Fatalf("%s never happens; the pod prints\n%s", what, text)
		}
		pause(k.t, k.ctx)
	}
}

func has(part string) func(string) bool {
	return func(text string) bool { return strings.Contains(text, part) }
}

// watchErrors are the lines that say that a stream broke or that the process has no identity.
func watchErrors(text string) string { return grep(text, "watch: ") }

// killProgram kills a program of a pod, which runs on this machine.
func (k *cluster) killProgram(uid, program string) {
	k.t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		k.t.Fatal(err)
	}
	killed := 0
	for _, f := range files {
		cgroup, err := os.ReadFile(f)
		if err != nil || !strings.Contains(strings.ReplaceAll(string(cgroup), "_", "-"), uid) {
			continue
		}
		name, err := os.ReadFile(filepath.Join(filepath.Dir(f), "comm"))
		if pid, e := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil && e == nil && string(name) == program+"\n" {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				k.t.Fatal(err)
			}
			killed++
		}
	}
	if killed == 0 {
		k.t.Fatalf("no process of pod %s is on this machine", uid)
	}
}

// standsFor waits until an Identity stands for so many pods.
func (d *daemonSet) standsFor(name string, want int64) {
	d.k.t.Helper()
	for {
		res, err := adminv1.NewAdminClient(d.s.AdminConn()).GetResources(d.k.ctx, &adminv1.GetResourcesRequest{Kind: "Identity"})
		if err != nil {
			d.k.t.Fatal(err)
		}
		for _, r := range res.Resources {
			if r.Name == name && r.Pods == want {
				return
			}
		}
		if d.k.ctx.Err() != nil {
			d.k.t.Fatalf("Identity %s never stands for %d pods: %v", name, want, res.Resources)
		}
		pause(d.k.t, d.k.ctx)
	}
}

// uid is that of a pod, once it is there.
func (k *cluster) uid(pod string) string {
	k.t.Helper()
	return k.field("pod/"+pod, ".metadata.uid")
}

// began waits for a pod's first answer, which must be the one that is wanted, and returns the pod's UID.
func (d *daemonSet) began(pod string, want ...string) string {
	d.k.t.Helper()
	uid := d.k.uid(pod)
	text := d.k.untilPrinted(uid, "a first answer", has("took: "))
	if line, _, _ := strings.Cut(text, "\n"); line != "first: "+strings.Join(want, " ")+" ok" {
		d.k.t.Errorf("the first call of pod %s has brought %q, want %q", pod, line, want)
	}
	return uid
}

// A pod's first call brings its identities, however many start at once, after a restart too; and they leave with the pod, before its
// processes do.
func TestTemplatedPods(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	d := templated(t, k)
	ns := k.namespace
	d.s.Apply(d.template("b-app", `/app/{{ .k8s.ns }}/{{ .k8s.label["app"] }}`, "") + "---\n" + d.template("a-pod", "/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}/{{ .k8s.pod }}", ""))
	of := func(pod, app string) []string {
		return []string{"/ns/" + ns + "/sa/web/" + pod, "/app/" + ns + "/" + app}
	}

	var manifests []string
	for i := range 30 {
		manifests = append(manifests, d.manifest(fmt.Sprintf("many-%d", i), "app: many", firstCall))
	}
	k.apply(strings.Join(manifests, "---\n"))
	for i := range 30 {
		name := fmt.Sprintf("many-%d", i)
		d.began(name, of(name, "many")...)
	}
	k.kubectl("-n", ns, "delete", "pod", "-l", "app=many", "--wait=false")

	// A container that is killed begins anew, and its first call is as good.
	d.stubborn("again", "app: again")
	again := d.began("again", of("again", "again")...)
	k.killProgram(again, "workload")
	text := k.untilPrinted(again, "a restart", func(text string) bool { return strings.Count(text, "took: ") == 2 })
	if n := strings.Count(text, "first: "+strings.Join(of("again", "again"), " ")+" ok\n"); n != 2 {
		t.Errorf("%d of two first calls of a container that was restarted brought its identities:\n%s", n, text)
	}

	// The API server forgets the pod at once, the kubelet lets its process live for a while: it has no identity any more.
	if e := watchErrors(k.untilPrinted(again, "a stream", has("svid: "))); e != "" {
		t.Errorf("before the pod is deleted its stream saw\n%s", e)
	}
	deleted := time.Now()
	k.kubectl("-n", ns, "delete", "pod", "again", "--grace-period=0", "--force")
	k.untilPrinted(again, "the loss of the identity", has("watch: PermissionDenied"))
	t.Logf("a deleted pod's stream ended within %v", time.Since(deleted))

	// One whose deletion is only asked for drains with its identity.
	d.stubborn("draining", "app: draining")
	draining := d.began("draining", of("draining", "draining")...)
	k.kubectl("-n", ns, "delete", "pod", "draining", "--wait=false")
	d.stubborn("late", "app: late")
	d.began("late", of("late", "late")...)
	if text := k.printed(draining); watchErrors(text) != "" {
		t.Errorf("a pod that is being deleted has lost its identity before it ended:\n%s", text)
	}

	// One that has ended has none: the CA says for how many pods the Identity stands.
	k.kubectl("-n", ns, "delete", "pod", "draining", "late", "--grace-period=0", "--force")
	d.workload("ends", "app: ends", "  restartPolicy: Never\n  containers: [{name: main, IMAGE, command: [/workload, who, once]}]\n")
	k.kubectl("-n", ns, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/ends", "--timeout=60s")
	ends := k.printed(k.uid("ends"))
	if want := of("ends", "ends"); ends != "ids: "+want[1]+" "+want[0]+"\n" {
		t.Errorf("a pod that ends printed %q", ends)
	}
	d.standsFor("a-pod", 0)
}

// Refusals are Events on the pods; labels that are taken count at once; pods of other namespaces and static pods get nothing.
func TestTemplatedPodsThatGetNothing(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	d := templated(t, k)
	ns := k.namespace
	d.s.Apply(d.template("by-app", `/app/{{ .k8s.label["app"] }}`, ""))
	d.workload("bare", "other: x", firstCall)
	bare := k.uid("bare")
	if line := k.untilPrinted(bare, "a first answer", has("took: ")); !strings.Contains(line, "PermissionDenied") {
		t.Errorf("a pod that is refused: %q", line)
	}
	event := func(pod, want string) {
		t.Helper()
		k.until("there is an Event on pod "+pod, func(out string, err error) bool { return err == nil && strings.Contains(out, want) },
			"-n", ns, "get", "events", "--field-selector=reason=IdentityRefused,involvedObject.name="+pod, "-o", "jsonpath={.items[*].message}")
	}
	event("bare", `no identity by Identity by-app: spiffeID: .k8s.label["app"] is empty`)
	k.kubectl("-n", ns, "label", "pod", "bare", "app=shop")
	k.untilPrinted(bare, "an identity by the label", has("svid: /app/shop "))

	// Somebody in another namespace takes the label: the Identity is for one namespace.
	other := k.space("other")
	k.kubectl("-n", other, "create", "serviceaccount", "web")
	k.apply(strings.Replace(d.manifest("thief", "app: shop", firstCall), "namespace: "+ns, "namespace: "+other, 1))
	thief := k.kubectl("-n", other, "get", "pod", "thief", "-o", "jsonpath={.metadata.uid}")
	if line := k.untilPrinted(thief, "a first answer", has("took: ")); !strings.Contains(line, "PermissionDenied") {
		t.Errorf("a pod of another namespace: %q", line)
	}
	k.kubectl("-n", other, "delete", "pod", "thief", "--grace-period=0", "--force")

	// An ID that is registered is nobody's by a label.
	d.s.Apply("{kind: Identity, name: payments, spiffeID: /app/payments, match: ['k8s:ns:nowhere'], on: ['k8s_psat:cluster:prod']}\n")
	d.workload("greedy", "app: payments", firstCall)
	if line := k.untilPrinted(k.uid("greedy"), "a first answer", has("took: ")); !strings.Contains(line, "PermissionDenied") {
		t.Errorf("a pod with a label that makes a registered ID: %q", line)
	}
	event("greedy", "is the SPIFFE ID of Identity payments")

	// A static pod is nobody's whom the API server was asked by.
	dir := optional(t, "SIGNET_KUBEBOX_DIR", "the state directory of the first cluster")
	file := filepath.Join(dir, "manifests", ns+".yaml")
	static := strings.NewReplacer("serviceAccountName: web\n", "\n", "  automountServiceAccountToken: false\n", "").Replace(d.manifest("static", "app: static", firstCall))
	d.s.Apply(fmt.Sprintf("{kind: Identity, name: all, spiffeID: '/all/{{ .k8s.pod }}', match: ['k8s:ns:%s'], on: ['k8s_psat:cluster:prod']}\n", ns))
	k.untilPrinted(bare, "an identity by the other template", has("svid: /all/bare "))
	if err := os.WriteFile(file, []byte(static), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(file) })
	mirror := k.until("the mirror pod is there", func(out string, err error) bool { return err == nil && strings.Contains(out, "pod/static-") }, "-n", ns, "get", "pods", "-o", "name")
	for _, l := range strings.Fields(mirror) {
		if name, ok := strings.CutPrefix(l, "pod/"); ok && strings.HasPrefix(name, "static-") {
			mirror = name
		}
	}
	k.until("the static pod runs", func(out string, err error) bool { return err == nil && strings.Contains(out, "took: ") }, "-n", ns, "logs", mirror)
	if out := k.kubectl("-n", ns, "logs", mirror); !strings.Contains(out, "PermissionDenied") {
		t.Errorf("a static pod: %q", out)
	}
}

// A template that is edited reaches the pods that run by their streams; where only a TTL changes nobody sees a gap.
func TestTemplateEdited(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	d := templated(t, k)
	d.s.Apply(d.template("t", "/v1/{{ .k8s.pod }}", ""))
	d.workload("main", "", firstCall)
	uid := d.began("main", "/v1/main")
	k.untilPrinted(uid, "a stream", has("svid: /v1/main "))
	d.workload("asks", "", "  containers: [{name: main, IMAGE, command: [/workload, call, '127.0.0.1:1']}]\n") // its calls fail, its fetches count
	asks := k.uid("asks")
	fetched := func(atLeast int) (failed int) {
		k.untilPrinted(asks, "more fetches", func(text string) bool {
			var n, m, f int
			lines := strings.Split(strings.TrimSpace(text), "\n")
			for _, l := range lines {
				if got, _ := fmt.Sscanf(l, "calls: %d failed: %d fetches: %d failed: %d", &n, &m, &f, &failed); got == 4 && f >= atLeast {
					return true
				}
			}
			return false
		})
		return failed
	}
	fetched(1)
	before := strings.Count(k.printed(uid), "svid: ")
	d.s.Apply(d.template("t", "/v1/{{ .k8s.pod }}", ", x509TTL: 10m"))
	k.untilPrinted(uid, "an SVID of the new life", func(text string) bool { return strings.Count(text, "svid: ") > before })
	d.s.Apply(d.template("t", "/v2/{{ .k8s.pod }}", ", x509TTL: 10m"))
	text := k.untilPrinted(uid, "the new ID", has("svid: /v2/main "))
	if e := watchErrors(text); e != "" {
		t.Errorf("the stream saw a gap:\n%s", e)
	}
	if failed := fetched(20); failed > 0 {
		t.Errorf("%d fetches failed while the template was edited:\n%s", failed, grep(k.printed(asks), "failed: fetch"))
	}
	d.s.Delete("Identity", "t")
	k.untilPrinted(uid, "the loss of the identity", has("watch: PermissionDenied"))
}

// The CA is started anew with the API server there and away, and the agent is killed while the CA is down: nobody who has an
// identity loses it.
func TestTemplatedPodsOverRestarts(t *testing.T) {
	optional(t, "SIGNET_KUBEBOX", "the program kubebox")
	ctx := bounded(t)
	k := first(t, ctx)
	d := templated(t, k)
	d.s.Apply(d.template("t", "/pod/{{ .k8s.pod }}", ""))
	d.workload("main", "", firstCall)
	uid := d.began("main", "/pod/main")
	k.untilPrinted(uid, "a stream", has("svid: /pod/main "))
	d.workload("asks", "", "  containers: [{name: main, IMAGE, command: [/workload, call, '127.0.0.1:1']}]\n") // its calls fail, its fetches count
	asks := k.uid("asks")
	tally := func() (fetches, failed int) {
		lines := strings.Split(k.printed(asks), "\n")
		for _, l := range slices.Backward(lines) {
			var n, m int
			if got, _ := fmt.Sscanf(l, "calls: %d failed: %d fetches: %d failed: %d", &n, &m, &fetches, &failed); got == 4 {
				return fetches, failed
			}
		}
		return 0, 0
	}
	goesOn := func(when string) {
		t.Helper()
		from, _ := tally()
		k.untilPrinted(asks, "more fetches "+when, func(string) bool { n, _ := tally(); return n >= from+20 })
		if n, failed := tally(); failed > 0 {
			t.Errorf("%s: %d of %d fetches failed:\n%s", when, failed, n, grep(k.printed(asks), "failed: fetch"))
		}
		if e := watchErrors(k.printed(uid)); e != "" {
			t.Errorf("%s: a stream saw\n%s", when, e)
		}
	}
	goesOn("at first")
	restart := func() {
		t.Helper()
		if err := d.s.RestartCA(ctx); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	d.standsFor("t", 2)
	goesOn("after a start of the CA")

	k.kubebox("stop", "kube-apiserver")
	back := false
	t.Cleanup(func() {
		if !back {
			k.kubebox("start", "kube-apiserver")
		}
	})
	restart()
	connected := func() bool {
		got, err := agentv1.NewAgentClient(d.s.AdminConn()).ListAgents(ctx, &agentv1.ListAgentsRequest{})
		return err == nil && len(got.Agents) > 0
	}
	for !connected() {
		pause(t, ctx)
	}
	goesOn("after a start of the CA without the API server")
	k.kubebox("start", "kube-apiserver")
	back = true
	d.standsFor("t", 2)
	goesOn("when the API server is back")
	d.workload("late", "", firstCall)
	d.began("late", "/pod/late")

	if err := d.s.StopCA(); err != nil {
		t.Fatal(err)
	}
	agent := k.kubectl("-n", k.namespace, "get", "pods", "-l", "app=agent", "-o", "jsonpath={.items[0].metadata.uid}")
	k.killProgram(agent, "signet-agent")
	// While no agent is there calls fail; from its start on, which asks no CA, they bring what they brought.
	k.untilPrinted(asks, "a fetch at the new agent", func(string) bool {
		n, f := tally()
		pause(t, ctx)
		n2, f2 := tally()
		return n2 > n && f2 == f
	})
	d.serves()
	if text := k.printed(asks); strings.Contains(text, "PermissionDenied") {
		t.Errorf("an agent that started without its CA refused a pod:\n%s", grep(text, "failed: fetch"))
	}
	d.workload("asks-again", "", "  containers: [{name: main, IMAGE, command: [/workload, who]}]\n")
	if err := d.s.RestartCA(ctx); err != nil {
		t.Fatal(err)
	}
	k.says("asks-again", "main", "ids: /pod/asks-again")
	if text := k.printed(uid); strings.Contains(text, "PermissionDenied") {
		t.Errorf("a stream was told that there is no identity:\n%s", watchErrors(text))
	}
}
