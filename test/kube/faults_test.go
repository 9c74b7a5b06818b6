//go:build kube

package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/ca"
)

// traffic is a service and its caller in pods, and a program that holds a stream, while something happens to the node.
type traffic struct {
	d              *daemonSet
	caller, holder string // pods
}

// startTraffic returns when calls succeed. SVIDs last so short that they are renewed all the time.
func startTraffic(d *daemonSet) *traffic {
	d.k.t.Helper()
	for _, w := range []string{"server", "caller", "holder"} {
		d.identity(w, "k8s:ns:"+d.k.namespace, "k8s:sa:web", "k8s:container-name:"+w)
	}
	d.workload("server", "", "  containers: [{name: server, IMAGE, command: [/workload, serve, ':8443']}]\n")
	d.k.says("server", "server", "serving spiffe://example.org/server")
	d.workload("caller", "", fmt.Sprintf("  containers: [{name: caller, IMAGE, command: [/workload, call, '%s:8443']}]\n", d.k.field("pod/server", ".status.podIP")))
	d.workload("holder", "", "  containers: [{name: holder, IMAGE, command: [/workload, hold]}]\n")
	d.k.says("holder", "holder", "svid: /holder ")
	d.k.says("caller", "caller", "calls: ")
	return &traffic{d, "caller", "holder"}
}

// now is what was tried up to now: the last line of the tally.
func (f *traffic) now() (calls, failedCalls, fetches, failedFetches int) {
	f.d.k.t.Helper()
	for { // logs may not be had just now
		text, _ := f.d.k.try("", "-n", f.d.k.namespace, "logs", f.caller)
		lines := strings.Split(text, "\n")
		for i := len(lines) - 1; i >= 0; i-- {
			if n, _ := fmt.Sscanf(lines[i], "calls: %d failed: %d fetches: %d failed: %d", &calls, &failedCalls, &fetches, &failedFetches); n == 4 {
				return
			}
		}
		pause(f.d.k.t, f.d.k.ctx)
	}
}

// goesOn waits until fifty more calls were made, and says if one failed since the beginning. Whether fetches may have failed the
// test says.
func (f *traffic) goesOn(what string, fetchesToo bool) {
	f.d.k.t.Helper()
	before, _, asked, _ := f.now()
	for {
		calls, failed, fetches, missed := f.now()
		if calls >= before+50 && fetches > asked {
			if failed > 0 || fetchesToo && missed > 0 {
				f.d.k.t.Errorf("%s: %d of %d calls failed, and %d of %d fetches:\n%s", what, failed, calls, missed, fetches,
					grep(f.d.k.kubectl("-n", f.d.k.namespace, "logs", f.caller), "failed: "))
			}
			f.d.k.t.Logf("%s: %d calls, %d failed; %d fetches, %d failed", what, calls, failed, fetches, missed)
			return
		}
		pause(f.d.k.t, f.d.k.ctx)
	}
}

// grep returns the lines that begin with something, twenty at most.
func grep(text, prefix string) string {
	var found []string
	for l := range strings.Lines(text) {
		if strings.HasPrefix(l, prefix) && len(found) < 20 {
			found = append(found, l)
		}
	}
	return strings.Join(found, "")
}

// renewed counts the SVIDs that the holder's stream brought between two moments.
func (f *traffic) renewed(from, to time.Time) int {
	f.d.k.t.Helper()
	n := 0
	for l := range strings.Lines(f.d.k.kubectl("-n", f.d.k.namespace, "logs", f.holder, "--timestamps")) {
		at, line, _ := strings.Cut(l, " ")
		if when, err := time.Parse(time.RFC3339Nano, at); err == nil && strings.HasPrefix(line, "svid: ") && when.After(from) && when.Before(to) {
			n++
		}
	}
	return n
}

// shortLived makes SVIDs be renewed every few seconds.
func shortLived(c *ca.Config) { c.TTL.X509 = 10 * time.Second }

// A new agent takes the place of the old one while workloads hold streams and call each other: no call fails, and nobody
// who asks the agent anew is refused.
func TestRolling(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, shortLived)
	d := k.runAgents(s, "prod", nil)
	f := startTraffic(d)
	for i := range 3 {
		from := time.Now()
		d.roll()
		d.serves()
		f.goesOn(fmt.Sprintf("rolled %d times", i+1), true)
		awaitRenewal(f, from)
	}
}

// awaitRenewal waits until the holder has a new SVID by its stream, which may have broken and been begun anew, and was never told that it has none.
func awaitRenewal(f *traffic, from time.Time) {
	f.d.k.t.Helper()
	for f.renewed(from, time.Now()) == 0 {
		pause(f.d.k.t, f.d.k.ctx)
	}
	if lost := grep(f.d.k.kubectl("-n", f.d.k.namespace, "logs", f.holder), "watch: PermissionDenied"); lost != "" {
		f.d.k.t.Errorf("a stream was told that there is no identity:\n%s", lost)
	}
}

// away stops a component, lets SVIDs be renewed without it, and starts it again.
func away(f *traffic, component string, meanwhile func()) (from, to time.Time) {
	f.d.k.t.Helper()
	from = time.Now()
	f.d.k.kubebox("stop", component)
	back := false
	f.d.k.t.Cleanup(func() {
		if !back {
			f.d.k.kubebox("start", component)
		}
	})
	meanwhile()
	f.d.k.kubebox("start", component)
	back = true
	return from, time.Now()
}

// lives waits until the holder's node has renewed for so long that its SVID must have been replaced more than once: the CA knows.
func (f *traffic) lives() {
	f.d.k.t.Helper()
	timer := time.NewTimer(20 * time.Second) // two lives of an SVID, of which nothing else tells while the logs cannot be read
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-f.d.k.ctx.Done():
		f.d.k.t.Fatal("it takes too long")
	}
}

// The kubelet is killed, and stays away for longer than an SVID lives.
func TestKubeletAway(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, shortLived)
	d := k.runAgents(s, "prod", nil)
	f := startTraffic(d)
	from, to := away(f, "kubelet", f.lives)
	k.says("holder", "holder", "svid: ") // logs can be read again
	if n := f.renewed(from, to); n < 2 {
		t.Errorf("while the kubelet was away for %v a stream brought %d SVIDs, which last 10 s", to.Sub(from), n)
	}
	f.goesOn("the kubelet was away", true)
	d.identity("late", "k8s:ns:"+k.namespace, "k8s:container-name:late")
	d.workload("late", "", "  containers: [{name: late, IMAGE, command: [/workload, who]}]\n")
	k.says("late", "late", "ids: /late")
	if n := d.nodes(); len(n) != 1 {
		t.Errorf("the CA knows %d agents of one node", len(n))
	}
}

// containerd is killed: containers go on, and new ones are known.
func TestContainerdAway(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, shortLived)
	d := k.runAgents(s, "prod", nil)
	f := startTraffic(d)
	from, to := away(f, "containerd", f.lives)
	f.goesOn("containerd was away", true)
	// What was printed meanwhile has the time at which containerd took it.
	if n := f.renewed(from, time.Now()); n < 2 {
		t.Errorf("while containerd was away for %v a stream brought %d SVIDs, which last 10 s", to.Sub(from), n)
	}
	d.identity("late", "k8s:ns:"+k.namespace, "k8s:container-name:late")
	d.workload("late", "", "  containers: [{name: late, IMAGE, command: [/workload, who]}]\n")
	k.says("late", "late", "ids: /late")
}

// The API server is killed and stays away: pods keep their SVIDs, which are renewed, and processes in containers that run get theirs
// anew. Of containers that start meanwhile the kubelet tells nobody before the API server is back.
func TestAPIServerAway(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, shortLived)
	d := k.runAgents(s, "prod", nil)
	f := startTraffic(d)
	from, to := away(f, "kube-apiserver", f.lives)
	for {
		if _, err := k.try("", "get", "--raw", "/readyz"); err == nil {
			break
		}
		pause(t, ctx)
	}
	if n := f.renewed(from, to); n < 2 {
		t.Errorf("while the API server was away for %v a stream brought %d SVIDs, which last 10 s", to.Sub(from), n)
	}
	f.goesOn("the API server was away", true)
	d.identity("late", "k8s:ns:"+k.namespace, "k8s:container-name:late")
	d.workload("late", "", "  containers: [{name: late, IMAGE, command: [/workload, who]}]\n")
	k.says("late", "late", "ids: /late")
}

// A cordoned node keeps its agent, which is replaced as elsewhere, and its workloads their SVIDs.
func TestCordonedNode(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, shortLived)
	d := k.runAgents(s, "prod", nil)
	f := startTraffic(d)
	node := k.field("pod/holder", ".spec.nodeName")
	k.kubectl("cordon", node)
	k.afterwards(func() { k.kubectl("uncordon", node) })
	from := time.Now()
	d.roll()
	d.serves()
	awaitRenewal(f, from)
	f.goesOn("the node is cordoned", true)
}

// Whose service account is deleted does not attest any more; one that is made anew under its name is not the old one, and counts by
// tokens of its own.
func TestServiceAccountDeleted(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, func(c *ca.Config) { c.TTL.Agent = 20 * time.Second })
	d := k.runAgents(s, "prod", nil)
	d.identity("holder", "k8s:ns:"+k.namespace, "k8s:container-name:holder")
	d.workload("holder", "", "  containers: [{name: holder, IMAGE, command: [/workload, hold]}]\n")
	k.says("holder", "holder", "svid: /holder ")
	serial := func() string {
		n := d.nodes()
		if len(n) != 1 {
			t.Fatalf("the CA knows %d agents of one node", len(n))
		}
		return n[0].X509SvidSerialNumber
	}
	for was := serial(); serial() == was; { // it attests again and again
		pause(t, ctx)
	}
	k.kubectl("-n", k.namespace, "delete", "serviceaccount", "agent")
	refused := k.linesOf("daemonset/agent", "agent", "token not authenticated")
	was := serial()
	k.kubectl("-n", k.namespace, "create", "serviceaccount", "agent")
	d.roll()
	d.serves()
	for serial() == was {
		pause(t, ctx)
	}
	t.Log(refused)
	k.says("holder", "holder", "svid: /holder ")
}

// linesOf waits until a container's log has something in it, and returns the line.
func (k *cluster) linesOf(object, container, part string) string {
	k.t.Helper()
	for {
		got, _ := k.try("", "-n", k.namespace, "logs", object, "-c", container)
		for l := range strings.Lines(got) {
			if strings.Contains(l, part) {
				return l
			}
		}
		if k.ctx.Err() != nil {
			k.t.Fatalf("container %s of %s never says %q:\n%s", container, object, part, got)
		}
		pause(k.t, k.ctx)
	}
}

// A node that is deleted and comes back under its name is another one, with another identity; what was given to the old one by its UID
// the new one does not get. The pods live on, so the agent tells at its next attestation.
func TestNodeCreatedAnew(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, func(c *ca.Config) { c.TTL.Agent = 20 * time.Second })
	d := k.runAgents(s, "prod", nil)
	node := k.field("pods", ".items[0].spec.nodeName")
	old := d.only("")
	s.Apply(fmt.Sprintf("{kind: Identity, name: old, spiffeID: /old, match: ['k8s:container-name:who'], on: ['k8s_psat:agent_node_uid:%s']}\n---\n", old) +
		d.document("any", "k8s:container-name:who"))
	d.workload("before", "", "  containers: [{name: who, IMAGE, command: [/workload, who]}]\n")
	k.says("before", "who", "ids: /any /old")

	k.kubebox("stop", "kubelet")
	k.kubectl("delete", "node", node)
	k.kubebox("start", "kubelet")
	k.nodeReady(node)
	d.comesBackAs(old)
	d.workload("after", "", "  containers: [{name: who, IMAGE, command: [/workload, who]}]\n")
	k.says("after", "who", "ids: /any")
}

// A node that comes back under another name is another one as well.
func TestNodeRenamed(t *testing.T) {
	optional(t, "SIGNET_KUBEBOX", "the program kubebox")
	ctx := bounded(t)
	k := first(t, ctx)
	s := startCA(t, map[string]*cluster{"prod": k}, func(c *ca.Config) { c.TTL.Agent = 20 * time.Second })
	d := k.runAgents(s, "prod", nil)
	d.identity("any", "k8s:ns:"+k.namespace, "k8s:container-name:who")
	name, old := k.field("pods", ".items[0].spec.nodeName"), d.only("")
	back := func(from, to string) {
		k.kubebox("rename", to)
		k.nodeReady(to)
		k.kubectl("delete", "node", from)
	}
	back(name, name+"-renamed")
	k.afterwards(func() { back(name+"-renamed", name) })
	d.comesBackAs(old)
	d.workload("after", "", "  containers: [{name: who, IMAGE, command: [/workload, who]}]\n")
	k.says("after", "who", "ids: /any")
	agent := d.agent(d.only(old))
	var names []string
	for _, sel := range agent.Selectors {
		if v, ok := strings.CutPrefix(sel.Value, "agent_node_name:"); ok {
			names = append(names, v)
		}
	}
	if len(names) != 1 || names[0] != name+"-renamed" {
		t.Errorf("the agent is on nodes %q", names)
	}
}

// nodeReady waits until a node is there and ready.
func (k *cluster) nodeReady(name string) {
	k.t.Helper()
	for {
		if _, err := k.try("", "wait", "--for=condition=Ready", "node/"+name, "--timeout=60s"); err == nil {
			return
		}
		pause(k.t, k.ctx)
	}
}

// only waits until the CA knows one agent of this cluster besides a certain one, and returns the UID of its node.
func (d *daemonSet) only(but string) string {
	d.k.t.Helper()
	for {
		var uids []string
		for _, a := range d.nodes() {
			if uid := a.Id.Path[strings.LastIndexByte(a.Id.Path, '/')+1:]; uid != but {
				uids = append(uids, uid)
			}
		}
		if len(uids) == 1 {
			return uids[0]
		}
		pause(d.k.t, d.k.ctx)
	}
}

func (d *daemonSet) agent(uid string) *types.Agent {
	for _, a := range d.nodes() {
		if strings.HasSuffix(a.Id.Path, "/"+uid) {
			return a
		}
	}
	return &types.Agent{}
}

// comesBackAs waits until an agent serves that is attested as the node that there is now, and not as the old one.
func (d *daemonSet) comesBackAs(old string) {
	d.k.t.Helper()
	for {
		if uid := d.k.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.uid}"); uid != old && d.agent(uid).Id != nil {
			d.serves()
			return
		}
		if d.k.ctx.Err() != nil {
			d.k.t.Fatalf("no agent has attested as the new node; there are %v", d.nodes())
		}
		pause(d.k.t, d.k.ctx)
	}
}

// Two clusters in one trust domain: agents of both at one CA, each with what is meant for its own cluster.
func TestTwoClustersOneTrustDomain(t *testing.T) {
	ctx := bounded(t)
	a := first(t, ctx)
	b := open(t, ctx, need(t, "SIGNET_KUBECONFIG_OTHER", "the path of a kubeconfig of another running cluster's admin"), "")
	s := startCA(t, map[string]*cluster{"a": a, "b": b}, nil)
	da, db := a.runAgents(s, "a", nil), b.runAgents(s, "b", nil)
	s.Apply(da.document("in-a", "k8s:sa:web", "k8s:container-name:who") + "---\n" + db.document("in-b", "k8s:sa:web", "k8s:container-name:who") +
		"---\n{kind: Identity, name: both, spiffeID: /both, match: ['k8s:sa:web'], on: ['k8s_psat:agent_sa:agent']}\n")
	for _, d := range []*daemonSet{da, db} {
		d.workload("web", "", "  containers: [{name: who, IMAGE, command: [/workload, who]}]\n")
	}
	a.says("web", "who", "ids: /both /in-a")
	b.says("web", "who", "ids: /both /in-b")
	if len(da.nodes()) != 1 || len(db.nodes()) != 1 {
		t.Errorf("agents %v and %v; want one each", da.nodes(), db.nodes())
	}
}
