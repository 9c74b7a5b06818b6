//go:build kube

// Package kube tries signet in running clusters of Kubernetes. `make e2e-kube` starts them and says in the environment what is where;
// to run a test by hand in other clusters, say it yourself:
//
//	SIGNET_KUBECONFIG           a kubeconfig of an admin of a cluster, and in _OTHER the same of another cluster
//	SIGNET_KUBECTL              kubectl; default: the one in PATH
//	SIGNET_KUBE_IMAGE           an image whose program just waits; default registry.k8s.io/pause:3.10
//	SIGNET_KUBE_IMAGES          where the images signet-ca, signet-agent and signet-proxy are, such as localhost; SIGNET_KUBE_TAG is their tag,
//	                            and SIGNET_KUBE_TAG_NEXT that of others; HELM is helm
//	SIGNET_KUBE_WORKLOAD_IMAGE  an image with test/kube/workload as its program /workload, and /usr/bin/signet-agent, built without cgo;
//	                            SIGNET_KUBE_OTHER_IMAGE is another image with /workload
//	SIGNET_KUBE_ETCD_IMAGE      an image with etcd as its program /etcd; etcd itself is where make etcd puts it, or in SIGNET_ETCD_BIN
//	SIGNET_KUBE_CGROUP_ROOT     the --cgroup-root of the first cluster's kubelet, if it is not /; in _OTHER that of the other one
//	SIGNET_KUBE_CA_LISTEN       where the CA that a test runs listens, and in SIGNET_KUBE_CA_ADDRESS where pods find it
//	SIGNET_KUBE_NODE_ROOT       where the file system of the first cluster's only node can be read; then the tokens are those that the
//	                            kubelet has written into the pods. Default: tokens of the API call that the kubelet makes for them
//	SIGNET_KUBE_WEBHOOK_HOST    the name by which an API server reaches 127.0.0.1 of this machine, such as localhost, and in
//	                            SIGNET_KUBECONFIG_WEBHOOK a kubeconfig of an admin of it; it needs no nodes
//	SIGNET_KUBEBOX              kubebox, if the clusters are its, and in SIGNET_KUBEBOX_DIR the state directory of the first one;
//	                            SIGNET_KUBEBOX_DIR_NODES is where a test may make another, of two nodes, for which SIGNET_KUBE_ARCHIVES
//	                            has signet-agent.tar and signet.test_workload_e2e.tar, the images of above
//	SPIRE_AGENT_BIN             an unmodified spire-agent, and in SPIRE_SERVER_BIN an unmodified spire-server
//	SPIFFE_CSI_BIN              an unmodified spiffe-csi-driver, and in CSI_REGISTRAR_BIN csi-node-driver-registrar, both static
//	SIGNET_KUBE_RENEWAL         1: wait for what takes the kubelet half an hour
//
// A test skips when the programs of SPIRE, of the CSI driver or kubebox are not named; everything else it cannot do without.
package kube

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/nodeattest/k8spsat"
	"github.com/signet-id/signet/test/signettest"

	canodeattest "github.com/signet-id/signet/ca/nodeattest"
)

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func first(t *testing.T, ctx context.Context) *cluster {
	t.Helper()
	return open(t, ctx, need(t, "SIGNET_KUBECONFIG", "the path of a kubeconfig of a running cluster's admin"), os.Getenv("SIGNET_KUBE_NODE_ROOT"))
}

// An agent in a pod attests, renews by attesting again, and serves.
func TestAgent(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	p := k.run("agent-1", "agent")
	k.kubectl("label", "node", p.node, "--overwrite", "signet.test/rack=r7")
	s := signettest.Start(t, signettest.Config{
		CA: func(c *ca.Config) {
			c.TTL.Agent = 10 * time.Second
			c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{"prod": {
				ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: k.credentials("ca"), NodeLabels: []string{"signet.test/rack"}, PodLabels: []string{"app"}}}}
		},
		Agent: func(c *agent.Config) {
			c.JoinTokenFile = ""
			c.NodeAttestation.K8sPSAT = &agent.K8sPSAT{Cluster: "prod", TokenPath: p.tokenFile()}
		},
	})
	agents := agentv1.NewAgentClient(s.AdminConn())
	node := func() *types.Agent {
		r, err := agents.ListAgents(ctx, &agentv1.ListAgentsRequest{})
		if err != nil || len(r.Agents) != 1 {
			t.Fatalf("the CA has agents %v, %v", r.GetAgents(), err)
		}
		return r.Agents[0]
	}
	got := node()
	if want := "/spire/agent/k8s_psat/prod/" + p.nodeUID; got.Id.Path != want || !got.CanReattest {
		t.Errorf("agent %q, may attest again: %t; want %q", got.Id.Path, got.CanReattest, want)
	}
	want := []string{"cluster:prod", "agent_ns:" + k.namespace, "agent_sa:agent", "agent_pod_name:agent-1", "agent_pod_uid:" + p.uid, "agent_node_ip:" + p.get(".status.hostIP"),
		"agent_node_name:" + p.node, "agent_node_uid:" + p.nodeUID, "agent_node_label:signet.test/rack:r7", "agent_pod_label:app:signet-agent"}
	var have []string
	for _, s := range got.Selectors {
		if s.Type != "k8s_psat" {
			t.Errorf("selector of type %q", s.Type)
		}
		have = append(have, s.Value)
	}
	slices.Sort(want)
	if slices.Sort(have); !slices.Equal(have, want) {
		t.Errorf("selectors %q,\nwant %q", have, want)
	}

	s.Apply(fmt.Sprintf("kind: Identity\nname: web\nspiffeID: /web\nmatch: ['unix:uid:%d']\non: ['k8s_psat:agent_node_label:signet.test/rack:r7']\n", os.Getuid()))
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if svid, err := client.FetchX509SVID(ctx); err != nil || svid.ID.Path() != "/web" {
		t.Errorf("a workload gets %v, %v", svid, err)
	}
	for now := node(); now.X509SvidSerialNumber == got.X509SvidSerialNumber; now = node() {
		pause(t, ctx)
	}
}

func pause(t *testing.T, ctx context.Context) {
	t.Helper()
	timer := time.NewTimer(200 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		t.Fatal("it takes too long")
	}
}

// A door is a CA at which anything may be shown.
type door struct {
	t   *testing.T
	ctx context.Context
	s   *signettest.Signet
}

func openDoor(t *testing.T, ctx context.Context, clusters map[string]ca.K8sCluster) *door {
	t.Helper()
	return &door{t, ctx, signettest.Start(t, signettest.Config{CA: func(c *ca.Config) { c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: clusters} }})}
}

// show attests with a token and returns the path of the agent.
func (d *door) show(cluster, token string) (string, error) {
	d.t.Helper()
	roots, err := d.s.Roots()
	if err != nil {
		d.t.Fatal(err)
	}
	key, err := nodeattest.NewKey()
	if err != nil {
		d.t.Fatal(err)
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		d.t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	got, err := caclient.Attest(d.ctx, caclient.Attestation{Address: d.s.CAAddr(), TrustDomain: td, CSR: csr, Bundle: x509bundle.FromX509Authorities(td, roots),
		Evidence: nodeattest.Shown{Attestor: "k8s_psat", Bytes: fmt.Appendf(nil, `{"cluster":%q,"token":%q}`, cluster, token)}})
	if err != nil {
		return "", err
	}
	leaf, err := x509.ParseCertificate(got.Chain[0])
	if err != nil {
		d.t.Fatal(err)
	}
	return leaf.URIs[0].Path, nil
}

func (d *door) refuses(name, cluster, token string, code codes.Code, want ...string) {
	d.t.Helper()
	path, err := d.show(cluster, token)
	if status.Code(err) != code || !slices.ContainsFunc(want, func(w string) bool { return strings.Contains(err.Error(), w) }) {
		d.t.Errorf("%s: %q, %v; want %v with one of %q", name, path, err, code, want)
	}
	if err != nil && strings.Contains(err.Error(), token) {
		d.t.Errorf("%s: the error repeats the token", name)
	}
}

func TestTokens(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	agent1, web := k.run("agent-1", "agent"), k.run("web-1", "web")
	d := openDoor(t, ctx, map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: k.credentials("ca")}})
	good := agent1.token()
	if path, err := d.show("prod", good); err != nil || path != "/spire/agent/k8s_psat/prod/"+agent1.nodeUID {
		t.Fatalf("the pod's own token: %q, %v", path, err)
	}
	if _, err := d.show("prod", good); err != nil {
		t.Errorf("once more: %v", err)
	}

	const notAuthenticated, denied = "token not authenticated", codes.PermissionDenied
	d.refuses("another audience", "prod", agent1.bound("vault"), denied, notAuthenticated)
	d.refuses("the API server's audience", "prod", k.create("agent", "--bound-object-kind=Pod", "--bound-object-name="+agent1.name, "--bound-object-uid="+agent1.uid), denied, notAuthenticated)
	d.refuses("another service account", "prod", web.token(), denied, "is not an allowed service account")
	d.refuses("not bound to a pod", "prod", k.create("agent", "--audience=spire-server"), denied, "bound to a pod")
	d.refuses("bound to the node", "prod", k.create("agent", "--audience=spire-server", "--bound-object-kind=Node", "--bound-object-name="+agent1.node, "--bound-object-uid="+agent1.nodeUID), denied, "bound to a pod")
	d.refuses("another cluster's name", "test", good, codes.InvalidArgument, "not configured for cluster")
	parts := strings.Split(good, ".")
	d.refuses("a changed signature", "prod", parts[0]+"."+parts[1]+"."+reversed(parts[2]), denied, notAuthenticated)
	d.refuses("other claims", "prod", parts[0]+"."+strings.Split(web.token(), ".")[1]+"."+parts[2], denied, notAuthenticated)
	d.refuses("without a signature", "prod", "eyJhbGciOiJub25lIn0."+parts[1]+".AA", denied, notAuthenticated)

	// A pod that is gone proves nothing any more, nor does its name.
	gone := k.run("agent-2", "agent")
	token := gone.token()
	if _, err := d.show("prod", token); err != nil {
		t.Fatal(err)
	}
	k.kubectl("-n", k.namespace, "delete", "pod", gone.name, "--grace-period=0", "--force")
	d.refuses("a deleted pod", "prod", token, denied, notAuthenticated, "does not exist")
	k.run("agent-2", "agent")
	d.refuses("a pod of the same name", "prod", token, denied, notAuthenticated, "pod UID mismatch")
}

func reversed(s string) string {
	b := []byte(s)
	slices.Reverse(b)
	return string(b)
}

// Two clusters are two worlds: a token counts in its own only.
func TestTwoClusters(t *testing.T) {
	ctx := bounded(t)
	a := first(t, ctx)
	b := open(t, ctx, need(t, "SIGNET_KUBECONFIG_OTHER", "the path of a kubeconfig of another running cluster's admin"), "")
	inA, inB := a.run("agent-1", "agent"), b.run("agent-1", "agent")
	d := openDoor(t, ctx, map[string]ca.K8sCluster{
		"a": {ServiceAccounts: []string{a.namespace + ":agent"}, Kubeconfig: a.credentials("ca")},
		"b": {ServiceAccounts: []string{a.namespace + ":agent", b.namespace + ":agent"}, Kubeconfig: b.credentials("ca"), UsePodUID: true},
	})
	if path, err := d.show("a", inA.token()); err != nil || path != "/spire/agent/k8s_psat/a/"+inA.nodeUID {
		t.Errorf("a's token in a: %q, %v", path, err)
	}
	if path, err := d.show("b", inB.token()); err != nil || path != "/spire/agent/k8s_psat/b/pod/"+inB.uid {
		t.Errorf("b's token in b: %q, %v", path, err)
	}
	d.refuses("a's token in b", "b", inA.token(), codes.PermissionDenied, "token not authenticated")
	d.refuses("b's token in a", "a", inB.token(), codes.PermissionDenied, "token not authenticated")
}

// A CA that may not ask says so to its operator, and lets nobody in.
func TestCAWithoutPermission(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	p := k.run("agent-1", "agent")
	d := openDoor(t, ctx, map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: k.credentials("web")}})
	d.refuses("a CA without permission", "prod", p.token(), codes.Internal, "unable to validate the token")
	a, err := k8spsat.New(k8spsat.Config{Clusters: map[string]k8spsat.Cluster{"prod": {ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: k.credentials("web")}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Attest(ctx, canodeattest.Attempt{Payload: fmt.Appendf(nil, `{"cluster":"prod","token":%q}`, p.token())})
	if r, ok := errors.AsType[*canodeattest.Refusal](err); !ok || !strings.Contains(fmt.Sprint(r.Reason), "the CA needs create on tokenreviews") {
		t.Errorf("the operator is told %v", err)
	}
}

// A CA in a pod reaches the cluster by what Kubernetes gives it there.
func TestCAInThePod(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	p := k.run("agent-1", "agent")
	server, authorities := k.server()
	u, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"token": k.create("ca"), "ca.crt": authorities} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", u.Hostname())
	t.Setenv("KUBERNETES_SERVICE_PORT", u.Port())
	a, err := k8spsat.New(k8spsat.Config{Clusters: map[string]k8spsat.Cluster{"prod": {ServiceAccounts: []string{k.namespace + ":agent"}}}, ServiceAccountDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	e, err := a.Attest(ctx, canodeattest.Attempt{Payload: fmt.Appendf(nil, `{"cluster":"prod","token":%q}`, p.token())})
	if err != nil || !slices.Equal(e.Path, []string{"k8s_psat", "prod", p.nodeUID}) {
		t.Errorf("%+v, %v", e, err)
	}
}
