//go:build kube

package kube

import (
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/test/replicatest"
	"github.com/signet-id/signet/test/signettest"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// The CA's clock jumps by hours, forward and back, while pods and custom resources come and go: what is known stays known, the Lease stays where
// it is, Revocations end by the clock that there is, and when the clock is right again, nodes attest and get what their pods are.
func TestClockJumps(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	k.define()
	k.may("resources", resourceRules)
	node := k.namespace + "-node"
	k.simulatedNode(node)
	var ahead atomic.Int64
	metrics := replicatest.FreeAddress(t)
	client, err := kube.Open("prod", k.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	signet := signettest.Start(t, signettest.Config{Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }, CA: func(c *ca.Config) {
		c.TTL.Agent = 24 * time.Hour
		c.Metrics.Listen = metrics
		c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: k.credentials("ca")}}}
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{}, Resources: &ca.KubernetesResources{}}}
	}})
	s := &scene{cluster: k, dyn: client.Dynamic, admin: adminv1.NewAdminClient(signet.AdminConn()), ca: signet}
	s.mustCreate("Identity", "pods", "spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}'\nmatch: ['k8s:pod-label:app:simulated']\n'on': ['k8s_psat:cluster:prod']\n")
	s.accepted("Identity", "pods")
	s.mustCreate("Revocation", "ends", "jti: some\nexpires: "+time.Now().Add(2*time.Hour).UTC().Format(time.RFC3339)+"\n")
	s.accepted("Revocation", "ends")
	roots, err := signet.Roots()
	if err != nil {
		t.Fatal(err)
	}
	agent := follow(t, ctx, signet.CAAddr(), k.agentToken("agent", node), roots)
	id := func(pod string) string { return "/ns/" + k.namespace + "/pod/" + pod }
	remove := func(pod string) {
		t.Helper()
		now := int64(0)
		if err := k.admin().CoreV1().Pods(k.namespace).Delete(ctx, pod, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
			t.Fatal(err)
		}
	}
	lease := func() string {
		return k.kubectl("-n", k.namespace, "get", "lease", "signet-ca", "-o", "jsonpath={.spec.holderIdentity} {.spec.leaseTransitions}")
	}
	renewed := func() string {
		return k.kubectl("-n", k.namespace, "get", "lease", "signet-ca", "-o", "jsonpath={.spec.renewTime}")
	}
	holder := lease()
	well := func(when string, before bool) { // before: it is earlier than the authorities began
		t.Helper()
		for was := renewed(); renewed() == was; { // it is renewed after the jump
			pause(t, ctx)
		}
		if now := lease(); now != holder {
			t.Errorf("%s: the Lease was with %q and is with %q", when, holder, now)
		}
		r, err := http.Get("http://" + metrics + "/ready")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		page, err := io.ReadAll(r.Body)
		if ready := r.StatusCode == http.StatusOK; err != nil || ready == before || before != strings.Contains(string(page), "check the clock") || strings.Contains(string(page), "cluster prod") {
			t.Errorf("%s: /ready says %d %s %v", when, r.StatusCode, page, err)
		}
	}
	k.simulate("a", node)
	agent.until(ctx, "a has its identity", id("a"))

	ahead.Store(int64(5 * time.Hour))
	k.simulate("b", node)
	remove("a")
	agent.until(ctx, "five hours later b has its identity, and a none", id("b"))
	s.mustCreate("ClusterCallPolicy", "later", "service: /web\nallow:\n- from: [/shop]\n")
	s.accepted("ClusterCallPolicy", "later")
	s.refused("Revocation", "ends", "Expired")
	if s.document("Revocation", "ends") != "" {
		t.Error("a Revocation that has ended is in force")
	}
	well("five hours later", false)

	ahead.Store(int64(-5 * time.Hour))
	k.simulate("c", node)
	agent.until(ctx, "ten hours earlier c has its identity", id("b"), id("c"))
	s.mustCreate("ClusterCallPolicy", "earlier", "service: /web\nallow:\n- from: [/shop]\n")
	s.accepted("ClusterCallPolicy", "earlier")
	s.set("ClusterCallPolicy", "later", "service: /web\nallow:\n- from: [/shop, /other]\n", nil)
	s.accepted("ClusterCallPolicy", "later")
	well("ten hours earlier", true)

	ahead.Store(0)
	remove("b")
	agent.until(ctx, "b has none", id("c"))
	again := follow(t, ctx, signet.CAAddr(), k.agentToken("agent-again", node), roots)
	again.until(ctx, "a node that attests gets what its pods are", id("c"))
	well("with the clock right again", false)
}
