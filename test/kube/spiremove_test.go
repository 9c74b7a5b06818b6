//go:build kube

package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/nodeattest"
	evidence "github.com/signet-id/signet/agent/nodeattest/k8spsat"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// The walk of docs/kubernetes/moving-from-spire-controller-manager.md: the controller works on the CA, the CA reads the
// resources too, the controller ends, and what it left behind is deleted. The agent of the pod's node may serve the pod's identity at
// every moment.
func TestMovingFromSPIREControllerManager(t *testing.T) {
	ctx := bounded(t)
	m := newMadeUp(t, ctx)
	node := m.node("n1", "")
	m.ns("shop", ", team: red")
	m.pod("shop", "agent-1", "n1", "agent", "app: agent", 31)
	m.pod("shop", "web-1", "n1", "web", "app: web", 32)
	m.resource("ClusterSPIFFEID", "web", `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}", podSelector: {matchLabels: {app: web}}, namespaceSelector: {matchLabels: {mark: `+m.mark+`}}`)
	m.resource("ClusterStaticEntry", "db", `spiffeID: "spiffe://example.org/db", parentID: "spiffe://example.org/spire/agent/k8s_psat/prod/`+node+`", selectors: ["unix:uid:7"]`)
	m.resource("ClusterFederatedTrustDomain", "partner", `trustDomain: partner.example, bundleEndpointURL: "https://127.0.0.1:1/", bundleEndpointProfile: {type: https_web}`)

	var reads atomic.Bool
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{m.mark + "-shop:agent"}, Kubeconfig: m.kubeconfig}}}
		c.Kubernetes.Clusters = nil
		if reads.Load() {
			c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: m.kubeconfig, Namespace: m.mark + "-shop", Pods: &ca.KubernetesPods{},
				SPIREResources: &ca.KubernetesSPIREResources{ClassName: m.class, IgnoreNamespaces: []string{"kube-system", m.mark + "-ignored"}}}}
		}
	}})
	end := m.manager(ctx, s.CASocket(), "")

	// An agent on the node.
	uid := m.kubectl("-n", m.mark+"-shop", "get", "pod", "agent-1", "-o", "jsonpath={.metadata.uid}")
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(m.kubectl("-n", m.mark+"-shop", "create", "token", "agent", "--bound-object-kind=Pod", "--bound-object-name=agent-1", "--bound-object-uid="+uid, "--audience=spire-server")), 0o600); err != nil {
		t.Fatal(err)
	}
	roots, err := s.Roots()
	if err != nil {
		t.Fatal(err)
	}
	key, err := nodeattest.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	shown, err := evidence.New(evidence.Config{Cluster: "prod", TokenPath: token}).Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, err := caclient.Attest(ctx, caclient.Attestation{Address: s.CAAddr(), TrustDomain: s.TrustDomain(), CSR: csr, Evidence: shown, Bundle: x509bundle.FromX509Authorities(s.TrustDomain(), roots)})
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	address := s.CAAddr()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{{Certificate: got.Chain, PrivateKey: key}}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		VerifyConnection: func(c tls.ConnectionState) error {
			_, err := c.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			return err
		}})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	want := "/ns/" + m.mark + "-shop/sa/web"
	served := func() (parents []string, err error) {
		r, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
		for _, e := range r.GetEntries() {
			if e.SpiffeId.Path == want {
				parents = append(parents, e.ParentId.Path)
			}
		}
		return parents, err
	}
	until(t, ctx, func() string {
		if p, err := served(); err != nil || len(p) == 0 {
			return fmt.Sprintf("by the controller: %v %v", p, err)
		}
		return ""
	})

	// From now on it is always there. A CA that is away says nothing of it.
	looking, stop := context.WithCancel(ctx)
	var looks atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for looking.Err() == nil {
			if p, err := served(); err == nil {
				if looks.Add(1); len(p) == 0 {
					t.Error("the agent may not serve the identity for a moment")
				}
			}
			select {
			case <-looking.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	defer func() {
		stop()
		<-ended
	}()
	look := func(after string) { // twice, so that one of them began now
		t.Helper()
		from := looks.Load()
		until(t, ctx, func() string {
			if looks.Load() < from+2 {
				return "nobody looked " + after
			}
			return ""
		})
	}

	reads.Store(true)
	if err := s.RestartCA(ctx); err != nil {
		t.Fatal(err)
	}
	if s.CAAddr() != address {
		t.Fatalf("the CA came back at %s, not %s", s.CAAddr(), address)
	}
	const theirs = "/spire/agent/k8s_psat/prod/"
	until(t, ctx, func() string {
		p, err := served()
		if err != nil || len(p) < 2 {
			return fmt.Sprintf("by both: %v %v", p, err)
		}
		return ""
	})
	look("while both are at work")
	admin, err := s.Admin()
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	entries := entryv1.NewEntryClient(admin)
	var static string
	list := func() (ofPods []string) {
		r, err := entries.ListEntries(ctx, &entryv1.ListEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Entries {
			if e.SpiffeId.Path == "/db" {
				static = e.Id
			}
			if len(e.Selectors) > 0 && strings.HasPrefix(e.Selectors[0].Value, "pod-uid:") && strings.HasPrefix(e.ParentId.Path, theirs) {
				ofPods = append(ofPods, e.Id)
			}
		}
		return ofPods
	}
	remove := func(ids ...string) (refused string) {
		r, err := entries.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: ids})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range r.Results {
			if x.Status.Code != 0 {
				refused = x.Status.Message
			}
		}
		return refused
	}
	end()
	look("when the controller had ended")
	// While both were at work each wrote the status: the controller says that an entry is set only when it has just made it.
	until(t, ctx, func() string {
		if m.status("clusterstaticentry", "db") != `{"masked":false,"rendered":true,"set":true}` {
			return "the static entry is not set"
		}
		if list(); static == "" {
			return "there is no static entry"
		}
		return ""
	})
	if why := remove(static); !strings.Contains(why, "belongs to kubernetes/prod/spire/ClusterStaticEntry/") {
		t.Errorf("the entry of a resource was deleted: %q", why)
	}
	left := list()
	if len(left) != 1 {
		t.Errorf("the controller left %d entries of pods, want 1", len(left))
	}
	if why := remove(left...); why != "" {
		t.Errorf("what the controller left: %s", why)
	}
	until(t, ctx, func() string {
		p, err := served()
		if err != nil || len(p) != 1 || strings.HasPrefix(p[0], theirs) {
			return fmt.Sprintf("by the CA alone: %v %v", p, err)
		}
		return ""
	})
	look("when what it left was deleted")
	stop()
	<-ended
	// Deleted pods leave their node.
	m.kubectl("-n", m.mark+"-shop", "delete", "pod", "web-1", "--wait=false", "--grace-period=0", "--force")
	until(t, ctx, func() string {
		if p, err := served(); err != nil || len(p) > 0 {
			return fmt.Sprintf("of a pod that is gone: %v %v", p, err)
		}
		return ""
	})
}
