//go:build kube

package kube

import (
	"fmt"
	"strings"
	"testing"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/kube/spireresources"
	"github.com/signet-id/signet/test/signettest"
)

// Who deletes the definitions of spire-controller-manager's resources has the API server delete the resources: what they gave is gone,
// and nothing else. It is the same again when both are made anew, without a restart.
func TestSPIREDefinitionsDeletedUnderTheReader(t *testing.T) {
	ctx := bounded(t)
	m := newMadeUp(t, ctx)
	m.node("n", "")
	m.ns("shop", "")
	m.pod("shop", "web", "n", "web", "app: web", 9)
	make := func() {
		m.kubectl("apply", "-f", spireCRDs())
		for _, crd := range []string{"clusterspiffeids", "clusterstaticentries", "clusterfederatedtrustdomains"} {
			m.kubectl("wait", "--for=condition=Established", "crd/"+crd+".spire.spiffe.io", "--timeout=60s")
		}
		m.resource("ClusterSPIFFEID", "id", `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/pod/{{ .PodMeta.Name }}", namespaceSelector: {matchLabels: {mark: `+m.mark+`}}`)
		m.resource("ClusterStaticEntry", "entry", `spiffeID: "spiffe://example.org/entry", parentID: "spiffe://example.org/node", selectors: ["unix:uid:1"]`)
		m.resource("ClusterFederatedTrustDomain", "domain", `trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", bundleEndpointProfile: {type: https_web}`)
	}
	make()
	g := m.read(ctx)
	g.run(g.r.Lead)
	holds := func(ids, entries, documents int) {
		t.Helper()
		until(t, ctx, func() string {
			i, e, d := len(g.identities()), len(g.reg.OwnedEntries(spireresources.Source("prod"))), len(g.reg.Owned(spireresources.Source("prod")))
			if i != ids || e != entries || d != documents {
				return fmt.Sprintf("%d identities of pods, %d entries, %d relationships; want %d, %d, %d", i, e, d, ids, entries, documents)
			}
			return ""
		})
	}
	holds(1, 1, 1)
	before := g.identities()[0]
	m.kubectl("delete", "-f", spireCRDs())
	holds(0, 0, 0)
	make()
	holds(1, 1, 1)
	if now := g.identities()[0]; now != before {
		t.Errorf("made anew, the identity is %s; it was %s", now, before)
	}
}

// What a ClusterFederatedTrustDomain changes is in the audit log as what an operator applies is, in its own name.
func TestFederatedTrustDomainsAreAudited(t *testing.T) {
	ctx := bounded(t)
	m := newMadeUp(t, ctx)
	m.ns("ca", "")
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: m.kubeconfig, Namespace: m.mark + "-ca",
			SPIREResources: &ca.KubernetesSPIREResources{Kinds: []string{spireresources.KindClusterFederatedTrustDomain}, ClassName: m.class}}}
	}})
	log := &scene{cluster: m.cluster, admin: adminv1.NewAdminClient(s.AdminConn())}
	says := func(event string) {
		t.Helper()
		until(t, ctx, func() string {
			found := auditOf(t, log, "kubernetes/prod/spire/ClusterFederatedTrustDomain/"+m.mark+"-partner")
			if !strings.Contains(found, `"`+event+`"`) || !strings.Contains(found, "partner.example") {
				return fmt.Sprintf("the audit log has no %s: %s", event, found)
			}
			return ""
		})
	}
	m.resource("ClusterFederatedTrustDomain", "partner", `trustDomain: partner.example, bundleEndpointURL: "https://127.0.0.1:1/", bundleEndpointProfile: {type: https_web}`)
	says("resource.create")
	m.resource("ClusterFederatedTrustDomain", "partner", `trustDomain: partner.example, bundleEndpointURL: "https://127.0.0.1:2/", bundleEndpointProfile: {type: https_web}`)
	says("resource.change")
	m.kubectl("delete", "clusterfederatedtrustdomain", m.mark+"-partner")
	says("resource.delete")
}
