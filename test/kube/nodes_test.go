//go:build kube

package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/agent/nodeattest"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// twoNodes is a cluster of its own for one test, and what it is as seen from each of its nodes.
func twoNodes(t *testing.T, ctx context.Context) (*cluster, []*cluster) {
	t.Helper()
	dir := optional(t, "SIGNET_KUBEBOX_DIR_NODES", "where kubebox may make a cluster of two nodes, a path that is not there")
	images := need(t, "SIGNET_KUBE_ARCHIVES", "the directory with the images' archives")
	_, port, _ := strings.Cut(need(t, "SIGNET_KUBE_CA_LISTEN", "an address of this machine at which pods reach what listens there"), ":")
	_, inside, _ := strings.Cut(need(t, "SIGNET_KUBE_CA_ADDRESS", "the address at which pods find it"), ":")
	root := "/" + filepath.Base(filepath.Dir(dir)) + "-" + filepath.Base(dir)
	// The kubelets put their pods into two cgroups, where one cluster's machines would have the same.
	t.Setenv("SIGNET_KUBE_CGROUP_ROOT", root+", "+root+"/node2")
	box := func(ctx context.Context, script string, args ...string) {
		t.Helper()
		if out, err := command(ctx, "env", append([]string{"KUBEBOX_DIR=" + dir, "bash", "box/" + script}, args...)...); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	var spaces []string // namespaces of the nodes
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			for _, of := range []string{"", "node2"} {
				if err := os.CopyFS(filepath.Join(dir+"-failed", of, "logs"), os.DirFS(filepath.Join(dir, of, "logs"))); err != nil {
					t.Log(err)
				}
			}
		}
		box(ctx, "down.sh")
		left, err := filepath.Glob("/proc/[0-9]*/ns/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range left {
			if s, err := os.Readlink(l); err == nil && slices.Contains(spaces, s) {
				t.Errorf("%s is left of the cluster", l)
			}
		}
	})
	box(ctx, "up.sh", "-nodes", "2", "-api-port", "0", "-cgroup-root", root, "-outward", inside+":"+port)
	var roots []string
	for _, d := range []string{dir, filepath.Join(dir, "node2")} {
		pid, err := os.ReadFile(filepath.Join(d, "node.pid"))
		if err != nil {
			t.Fatal(err)
		}
		proc := filepath.Join("/proc", strings.TrimSpace(string(pid)))
		roots = append(roots, filepath.Join(proc, "root"))
		for _, kind := range []string{"pid", "net", "mnt"} {
			s, err := os.Readlink(filepath.Join(proc, "ns", kind))
			if err != nil {
				t.Fatal(err)
			}
			spaces = append(spaces, s)
		}
	}
	if out, err := command(ctx, need(t, "SIGNET_KUBEBOX", "the program kubebox"), "load", "-dir", dir, filepath.Join(images, "signet-agent.tar"), filepath.Join(images, "signet.test_workload_e2e.tar")); err != nil {
		t.Fatalf("loading images: %v: %s", err, out)
	}
	k := open(t, ctx, filepath.Join(dir, "host.kubeconfig"), roots[0])
	var nodes []*cluster
	for _, r := range roots {
		node := *k
		node.nodeRoot = r
		nodes = append(nodes, &node)
	}
	return k, nodes
}

// A theft is what a node's agent keeps on disk, taken elsewhere.
func (d *daemonSet) theft(node *cluster) *grpc.ClientConn {
	t := d.k.t
	t.Helper()
	data, err := os.ReadFile(filepath.Join(node.nodeRoot, d.dir+"-data", "agent", "node.json"))
	if err != nil {
		t.Fatal(err)
	}
	var kept struct {
		Key                string
		Chain, Authorities [][]byte
	}
	if err := json.Unmarshal(data, &kept); err != nil {
		t.Fatal(err)
	}
	key, err := nodeattest.ParseKey([]byte(kept.Key))
	if err != nil {
		t.Fatal(err)
	}
	pair := tls.Certificate{Certificate: kept.Chain, PrivateKey: key}
	var authorities []*x509.Certificate
	for _, der := range kept.Authorities {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		authorities = append(authorities, c)
	}
	config := tlsconfig.TLSClientConfig(x509bundle.FromX509Authorities(d.s.TrustDomain(), authorities), tlsconfig.AuthorizeID(d.s.ID("/spire/server")))
	config.Certificates = []tls.Certificate{pair}
	conn, err := grpc.NewClient(d.s.CAAddr(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// entries are those of pods that the CA gives to the agent of a node, by SPIFFE ID's path.
func (d *daemonSet) entries(node *cluster) map[string]string {
	d.k.t.Helper()
	conn := d.theft(node)
	defer conn.Close()
	got, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(d.k.ctx, &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil {
		d.k.t.Fatal(err)
	}
	ids := map[string]string{}
	for _, e := range got.Entries {
		ids[e.SpiffeId.Path] = e.Id
	}
	if len(ids) != len(got.Entries) {
		d.k.t.Errorf("some of a node's entries are for the same pod: %v", got.Entries)
	}
	return ids
}

// placed are the SPIFFE IDs that the pods of each node are to have, as the API server says where they are.
func (k *cluster) placed(nodes int) []map[string]bool {
	k.t.Helper()
	all := make([]map[string]bool, nodes)
	for i := range all {
		all[i] = map[string]bool{}
	}
	for l := range strings.Lines(k.kubectl("-n", k.namespace, "get", "pods", "-o", `jsonpath={range .items[?(@.spec.serviceAccountName=="web")]}{.spec.nodeName} {.metadata.name}{"\n"}{end}`)) {
		var i int
		var name string
		if n, _ := fmt.Sscanf(l, "node%d %s", &i, &name); n == 2 {
			all[i-1]["/pod/"+name] = true
		}
	}
	return all
}

// split waits until each agent has the identities of its own node's pods, so many in all, and no other.
func (d *daemonSet) split(nodes []*cluster, when string, counts ...int) {
	t := d.k.t
	t.Helper()
	for {
		want, got, same := d.k.placed(len(nodes)), make([]map[string]string, len(nodes)), true
		for i, node := range nodes {
			got[i] = d.entries(node)
			same = same && len(want[i]) == counts[i] && len(got[i]) == counts[i]
			for id := range got[i] {
				same = same && want[i][id]
			}
		}
		if same {
			return
		}
		if d.k.ctx.Err() != nil {
			t.Fatalf("%s the agents have %v; the pods of their nodes are %v, and should be %v", when, got, want, counts)
		}
		pause(t, d.k.ctx)
	}
}

func onNode(i int, rest string) string {
	return fmt.Sprintf("  nodeSelector: {kubernetes.io/hostname: node%d}\n%s", i, rest)
}

// TestTwoNodes has agents on two kubelets. They are rolled node by node under calls from node to node; each has what its own node's pods
// are to have, and whoever has stolen its key no more; a pod that is made anew elsewhere leaves the one and comes to the other; and a node
// is drained and filled again.
func TestTwoNodes(t *testing.T) {
	ctx := bounded(t)
	k, nodes := twoNodes(t, ctx)
	d := templated(t, k, shortLived)
	d.s.Apply(d.template("pod", "/pod/{{ .k8s.pod }}", ""))
	at := func(i int) *daemonSet {
		on := *d
		on.k = nodes[i]
		return &on
	}
	if n := d.nodes(); len(n) != 2 {
		t.Fatalf("the CA knows the agents %v; want one of each node", n)
	}

	// Who serves on one node is called from the other.
	for i := range nodes {
		name := fmt.Sprint("server-", i+1)
		d.workload(name, "", onNode(i+1, "  containers: [{name: main, IMAGE, command: [/workload, serve, ':8443']}]\n"))
		k.says(name, "main", "serving spiffe://example.org/pod/"+name)
	}
	var all []*traffic
	for i := range nodes {
		f := &traffic{d, fmt.Sprint("caller-", i+1), fmt.Sprint("holder-", i+1)}
		server := k.field(fmt.Sprint("pod/server-", 2-i), ".status.podIP")
		d.workload(f.caller, "", onNode(i+1, fmt.Sprintf("  containers: [{name: main, IMAGE, command: [/workload, call, '%s:8443']}]\n", server)))
		d.workload(f.holder, "", onNode(i+1, "  containers: [{name: main, IMAGE, command: [/workload, hold]}]\n"))
		all = append(all, f)
	}
	for _, f := range all {
		k.says(f.holder, "main", "svid: /pod/"+f.holder+" ")
		k.says(f.caller, "main", "calls: ")
	}
	goOn := func(when string, from time.Time) {
		t.Helper()
		for _, f := range all {
			f.goesOn(f.caller+" "+when, true)
			awaitRenewal(f, from)
		}
	}
	for n := range 2 {
		from := time.Now()
		d.roll()
		d.serves()
		d.oneByOne()
		goOn(fmt.Sprintf("after %d roll-outs", n+1), from)
	}
	d.split(nodes, "after the roll-outs", 3, 3)
	d.thieves(nodes)
	goOn("after the thefts", time.Now())

	// A pod leaves its node, where its process lives on for a while, and its name comes to the other.
	k.apply(strings.Replace(d.manifest("moves", "", onNode(1, firstCall)), "PeriodSeconds: 0", "PeriodSeconds: 60", 1))
	old := at(0).began("moves", "/pod/moves")
	nodes[0].untilPrinted(old, "a stream", has("svid: /pod/moves "))
	d.split(nodes, "with a pod more", 4, 3)
	k.kubectl("-n", k.namespace, "delete", "pod", "moves", "--grace-period=0", "--force")
	d.workload("moves", "", onNode(2, firstCall))
	nodes[0].untilPrinted(old, "the loss of the identity", has("watch: PermissionDenied"))
	at(1).began("moves", "/pod/moves")
	d.split(nodes, "when a pod has moved", 3, 4)

	d.drained(nodes, at)
}

// oneByOne looks at the agents that there are now: the second was made when the first was ready, and not before.
func (d *daemonSet) oneByOne() {
	t := d.k.t
	t.Helper()
	var agents struct {
		Items []struct {
			Metadata struct {
				CreationTimestamp time.Time
				DeletionTimestamp *time.Time
			}
			Spec   struct{ NodeName string }
			Status struct {
				Conditions []struct {
					Type               string
					LastTransitionTime time.Time
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(d.k.kubectl("-n", d.k.namespace, "get", "pods", "-l", "app=agent", "-o", "json")), &agents); err != nil {
		t.Fatal(err)
	}
	type turn struct {
		node           string
		created, ready time.Time
	}
	var turns []turn
	for _, p := range agents.Items {
		for _, c := range p.Status.Conditions {
			if c.Type == "Ready" && p.Metadata.DeletionTimestamp == nil {
				turns = append(turns, turn{p.Spec.NodeName, p.Metadata.CreationTimestamp, c.LastTransitionTime})
			}
		}
	}
	slices.SortFunc(turns, func(a, b turn) int { return a.created.Compare(b.created) })
	if len(turns) != 2 || turns[0].node == turns[1].node || turns[1].created.Before(turns[0].ready) {
		t.Errorf("the agents' turns are %v; want one on each node, the second when the first was ready", turns)
	}
}

// thieves have stolen the keys of both nodes' agents: each is told nothing of the other's pods, and is issued nothing for them.
func (d *daemonSet) thieves(nodes []*cluster) {
	t := d.k.t
	t.Helper()
	for i, node := range nodes {
		other := d.entries(nodes[1-i])
		conn := d.theft(node)
		defer conn.Close()
		follow, err := nodev1.NewNodeClient(conn).Follow(d.k.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := follow.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: &nodev1.FollowRequest_Hello{Format: 1}}}); err != nil {
			t.Fatal(err)
		}
		var told []byte
		for complete := false; !complete; {
			m, err := follow.Recv()
			if err != nil {
				t.Fatal(err)
			}
			b, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			told, complete = append(told, b...), m.Complete
		}
		for id := range d.entries(node) {
			if !strings.Contains(string(told), id) {
				t.Errorf("the agent of node %d is not told of its own %s", i+1, id)
			}
		}
		key, err := nodeattest.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		public, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		for path, entry := range other {
			if strings.Contains(string(told), path) || strings.Contains(string(told), entry) {
				t.Errorf("the agent of node %d is told of %s on the other one", i+1, path)
			}
			issued, err := nodev1.NewNodeClient(conn).IssueX509SVIDs(d.k.ctx, &nodev1.IssueX509SVIDsRequest{Items: []*nodev1.IssueX509SVIDsRequest_Item{{EntryId: entry, PublicKey: public}}})
			if err != nil || len(issued.Results) != 1 || codes.Code(issued.Results[0].Code) != codes.NotFound || len(issued.Results[0].CertChain) > 0 {
				t.Errorf("the agent of node %d asks for %s on the other one: %v, %v; want NotFound", i+1, path, issued, err)
			}
			_, err = svidv1.NewSVIDClient(conn).NewJWTSVID(d.k.ctx, &svidv1.NewJWTSVIDRequest{EntryId: entry, Audience: []string{"any"}})
			if status.Code(err) != codes.NotFound {
				t.Errorf("the agent of node %d asks for a token of %s on the other one: %v; want NotFound", i+1, path, err)
			}
		}
	}
}

// drained drains the second node, whose pods come to the first, rolls the agents meanwhile, and lets pods in again.
func (d *daemonSet) drained(nodes []*cluster, at func(int) *daemonSet) {
	k, t := d.k, d.k.t
	t.Helper()
	_, spec, _ := strings.Cut(d.manifest("web", "", `  topologySpreadConstraints:
  - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, nodeTaintsPolicy: Honor, labelSelector: {matchLabels: {app: web}}}
`+firstCall), "\nspec:\n")
	spec = strings.NewReplacer("  tolerations: [{operator: Exists}]\n", "", "PeriodSeconds: 0", "PeriodSeconds: 1").Replace(spec)
	k.apply(fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: %[1]s}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:%[2]s
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web, namespace: %[1]s}
spec: {minAvailable: 1, selector: {matchLabels: {app: web}}}
`, k.namespace, strings.ReplaceAll("\n"+strings.TrimRight(spec, "\n"), "\n", "\n    ")))
	serves := func() {
		t.Helper()
		k.kubectl("-n", k.namespace, "rollout", "status", "deployment/web", "--timeout=60s")
		for l := range strings.Lines(k.kubectl("-n", k.namespace, "get", "pods", "-l", "app=web", "-o", `jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name} {.metadata.deletionTimestamp}{"\n"}{end}`)) {
			if f := strings.Fields(l); len(f) == 2 {
				at(slices.Index([]string{"node1", "node2"}, f[0])).began(f[1], "/pod/"+f[1])
			}
		}
	}
	serves()
	d.split(nodes, "before the drain", 4, 5)
	k.kubectl("drain", "node2", "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=60s")
	serves()
	d.split(nodes, "after the drain", 5, 0)
	d.roll()
	d.serves()
	d.oneByOne() // on the drained node too
	d.split(nodes, "after agents were rolled on a drained node", 5, 0)
	k.kubectl("uncordon", "node2")
	k.kubectl("-n", k.namespace, "scale", "deployment/web", "--replicas=3")
	serves()
	d.split(nodes, "when the node takes pods again", 5, 1)
	if text := grep(k.kubectl("-n", k.namespace, "logs", "holder-1"), "watch: PermissionDenied"); text != "" {
		t.Errorf("a stream on the node that was not drained was told that there is no identity:\n%s", text)
	}
}
