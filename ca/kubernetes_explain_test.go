package ca

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/kube/pods"
)

// watching is a configuration with a cluster whose API server is away.
func watching(t *testing.T, names ...string) Config {
	t.Helper()
	dir := t.TempDir()
	kubeconfig := filepath.Join(dir, "kubeconfig")
	text := "apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{name: x, context: {cluster: x, user: x}}]\nusers: [{name: x, user: {token: very-secret}}]\nclusters: [{name: x, cluster: {server: \"https://127.0.0.1:1\"}}]\n"
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config(dir)
	c.Kubernetes.Clusters = map[string]KubernetesCluster{}
	for _, n := range names {
		c.Kubernetes.Clusters[n] = KubernetesCluster{Kubeconfig: kubeconfig, Pods: &KubernetesPods{}, DisableEvents: true}
	}
	return c
}

// TestExplainPod asks over the admin socket and the port: what a pod is given, what it is refused, what comes near, and who may ask.
func TestExplainPod(t *testing.T) {
	h := start(t, watching(t, "prod", "test"))
	a := h.onNode("prod", "node-a")
	h.onNode("test", "node-a") // the same UID elsewhere
	h.apply(`kind: Identity
name: all
spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}
match: [unix:uid:7]
on: [k8s_psat:cluster:prod, k8s_psat:agent_node_name:x]
---
kind: Identity
name: by-label
spiffeID: /app/{{ .k8s.label["app"] }}
---
kind: Identity
name: near
spiffeID: /near/{{ .k8s.sa }}
match: [k8s:ns:shpo]
`)
	for _, cluster := range []string{"prod", "test"} {
		p := aPod("1", "node-a", "shop")
		h.ca.pods.Update(cluster, []*pods.Pod{p, aPod("2", "node-b", "bank")}, nil)
	}
	h.ca.pods.Synced("prod", true)
	ask := func(conn grpc.ClientConnInterface, req *adminv1.ExplainPodRequest) (*adminv1.ExplainPodResponse, error) {
		return adminv1.NewPodsClient(conn).ExplainPod(t.Context(), req)
	}
	r, err := ask(h.admin, &adminv1.ExplainPodRequest{Cluster: "prod", Namespace: "shop", Name: "pod-shop"})
	if err != nil || len(r.Pods) != 1 || r.Templates != 3 || len(r.Clusters) != 2 || r.Clusters[0].Name != "prod" || !r.Clusters[0].Synced || r.Clusters[1].Synced {
		t.Fatalf("%v, %v", r, err)
	}
	p := r.Pods[0]
	if p.State != "known" || p.Uid != "1" || p.Cluster != "prod" || p.NodeName != "name-node-a" || p.NodeUid != "node-a" || p.ServiceAccount != "sa-shop" || len(p.Agents) != 1 || p.Agents[0].Id != a.id.String() || p.Agents[0].Banned || len(p.Rules) != 3 {
		t.Fatalf("the pod is %v", p)
	}
	all, byLabel, near := p.Rules[0], p.Rules[1], p.Rules[2]
	if all.Rule != "Identity all" || all.SpiffeId != "spiffe://example.org/ns/shop/sa/sa-shop" || strings.Join(all.ProcessSelectors, " ") != "unix:uid:7" || strings.Join(all.MissingOn, " ") != "k8s_psat:agent_node_name:x" || all.Expired {
		t.Errorf("what it is given: %v", all)
	}
	if e, err := entryv1.NewEntryClient(h.admin).GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: all.EntryId}); err != nil || e.SpiffeId.Path != "/ns/shop/sa/sa-shop" {
		t.Errorf("its entry: %v, %v", e, err)
	}
	if byLabel.Rule != "Identity by-label" || byLabel.Refused != `spiffeID: .k8s.label["app"] is empty` || byLabel.EntryId != "" {
		t.Errorf("what it is refused: %v", byLabel)
	}
	if d := near.Differences; near.Rule != "Identity near" || len(d) != 1 || d[0].Want != "k8s:ns:shpo" || d[0].Kind != "typo" || strings.Join(d[0].Have, " ") != "k8s:ns:shop" {
		t.Errorf("what comes near: %v", near)
	}

	// Where several clusters have it, each says so; who is not known is looked up, which fails here, and says why without secrets.
	both, err := ask(h.admin, &adminv1.ExplainPodRequest{Namespace: "shop", Name: "pod-shop"})
	if err != nil || len(both.Pods) != 2 || len(both.Pods[1].Rules) != 3 || both.Pods[1].Rules[0].Refused == "" {
		t.Errorf("in all clusters: %v, %v", both, err)
	}
	nobody, err := ask(h.admin, &adminv1.ExplainPodRequest{Cluster: "prod", Namespace: "shop", Name: "nobody"})
	if err != nil || len(nobody.Pods) != 1 || nobody.Pods[0].State != "unclear" || !strings.Contains(nobody.Pods[0].Detail, "cluster prod") || strings.Contains(nobody.Pods[0].Detail, "very-secret") {
		t.Errorf("nobody: %v, %v", nobody, err)
	}
	if r, err := ask(h.admin, &adminv1.ExplainPodRequest{Cluster: "moon", Namespace: "shop", Name: "pod-shop"}); err != nil || len(r.Pods) != 0 || len(r.Clusters) != 2 {
		t.Errorf("a cluster that is not there: %v, %v", r, err)
	}
	for _, req := range []*adminv1.ExplainPodRequest{{}, {Namespace: "shop"}, {Name: "x"}, {Namespace: strings.Repeat("x", 254), Name: "x"}, {Namespace: "x", Name: strings.Repeat("x", 1<<20)}, {Cluster: strings.Repeat("x", 254), Namespace: "x", Name: "x"}} {
		if _, err := ask(h.admin, req); code(err) != codes.InvalidArgument || len(err.Error()) > 300 {
			t.Errorf("%.80v: %v", req, err)
		}
	}

	// The agent whose own pod it is may not ask, nor may who shows nothing; an admin may, over the port.
	if _, err := ask(a.conn, &adminv1.ExplainPodRequest{Cluster: "prod", Namespace: "shop", Name: "pod-shop"}); code(err) != codes.PermissionDenied {
		t.Errorf("the node's own agent: %v", err)
	}
	if _, err := ask(h.dial(nil, nil), &adminv1.ExplainPodRequest{Cluster: "prod", Namespace: "shop", Name: "pod-shop"}); code(err) != codes.PermissionDenied && code(err) != codes.Unauthenticated {
		t.Errorf("a stranger: %v", err)
	}
	if r, err := ask(h.adminConn("/admin"), &adminv1.ExplainPodRequest{Cluster: "prod", Namespace: "shop", Name: "pod-shop"}); err != nil || len(r.Pods) != 1 {
		t.Errorf("an admin over the port: %v, %v", r, err)
	}

	counts, err := adminv1.NewAdminClient(h.admin).GetResources(t.Context(), &adminv1.GetResourcesRequest{Kind: "Identity"})
	if err != nil || len(counts.Resources) != 3 || counts.Resources[0].Pods != 2 || counts.Resources[1].Pods != 0 || counts.Resources[1].RefusedPods != 4 || counts.Resources[2].RefusedPods != 0 {
		t.Errorf("counts: %v, %v", counts, err)
	}
	h.ca.pods.Update("prod", nil, []string{"1"})
	if r, err := ask(h.admin, &adminv1.ExplainPodRequest{Cluster: "prod", Namespace: "shop", Name: "pod-shop"}); err != nil || r.Pods[0].State != "unclear" {
		t.Errorf("a pod that is gone: %v, %v", r, err)
	}
}

// TestExplainPodWithoutClusters: a CA that watches none says so.
func TestExplainPodWithoutClusters(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.apply("kind: Identity\nname: all\nspiffeID: /ns/{{ .k8s.ns }}\n")
	r, err := adminv1.NewPodsClient(h.admin).ExplainPod(t.Context(), &adminv1.ExplainPodRequest{Namespace: "a", Name: "b"})
	if err != nil || len(r.Clusters) != 0 || len(r.Pods) != 0 || r.Templates != 1 {
		t.Errorf("%v, %v", r, err)
	}
}
