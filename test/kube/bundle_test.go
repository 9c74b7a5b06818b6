//go:build kube

package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/kube/publish"
	"github.com/signet-id/signet/test/signettest"
)

// clusterRoles are what the page says that the CA needs, with the test's own namespace.
func (k *cluster) clusterRoles() string {
	k.t.Helper()
	page, err := os.ReadFile("../../docs/kubernetes/bundle.md")
	if err != nil {
		k.t.Fatal(err)
	}
	for _, block := range strings.Split(string(page), "```") {
		if text, ok := strings.CutPrefix(block, "yaml\n"); ok && strings.Contains(text, "kind: ClusterRole") {
			return strings.ReplaceAll(text, "signet-system", k.namespace)
		}
	}
	k.t.Fatal("the documentation has no ClusterRole")
	return ""
}

// allow gives the service account ca what the page says, and nothing else.
func (k *cluster) allow() {
	k.t.Helper()
	k.apply(k.clusterRoles())
	name := k.namespace + "-cluster"
	k.kubectl("create", "clusterrolebinding", name, "--clusterrole=signet-cluster", "--serviceaccount="+k.namespace+":ca")
	k.atEnd("delete", "clusterrolebinding", name)
	k.kubectl("-n", k.namespace, "create", "rolebinding", "lease", "--role=signet-lease", "--serviceaccount="+k.namespace+":ca")
}

// atEnd runs kubectl when the test has ended.
func (k *cluster) atEnd(args ...string) {
	k.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		at := *k
		at.ctx = ctx
		at.kubectl(args...)
	})
}

// space makes a namespace.
func (k *cluster) space(suffix string, labels ...string) string {
	k.t.Helper()
	name := k.namespace + "-" + suffix
	k.kubectl("create", "namespace", name)
	k.atEnd("delete", "namespace", name, "--wait=false")
	for _, l := range labels {
		k.kubectl("label", "namespace", name, l)
	}
	return name
}

// until waits until what kubectl says is as f wants it.
func (k *cluster) until(what string, f func(out string, err error) bool, args ...string) string {
	k.t.Helper()
	for {
		out, err := k.try("", args...)
		if f(out, err) {
			return out
		}
		if k.ctx.Err() != nil {
			k.t.Fatalf("it never comes that %s: %s, %v", what, out, err)
		}
		pause(k.t, k.ctx)
	}
}

func (k *cluster) untilBundle(ns, what string, f func(data map[string]string) bool) {
	k.t.Helper()
	k.until(what, func(out string, err error) bool {
		var cm struct{ Data map[string]string }
		return err == nil && json.Unmarshal([]byte(out), &cm) == nil && f(cm.Data)
	}, "-n", ns, "get", "configmap", publish.ConfigMap, "-o", "json")
}

func gone(_ string, err error) bool { return err != nil && strings.Contains(err.Error(), "NotFound") }

// The bundle is where it is asked for, as it is now, and put right; what others made stays theirs. The CA has no more than the documented rights.
func TestBundle(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	web, other, foreign := k.space("web", publish.Label+"=true"), k.space("other"), k.space("foreign", publish.Label+"=true")
	k.kubectl("-n", foreign, "create", "configmap", publish.ConfigMap, "--from-literal=bundle.pem=mine")
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{}, Bundle: &ca.KubernetesBundle{}}}
	}})
	td := spiffeid.RequireTrustDomainFromString("example.org")
	current := func() int {
		roots, err := s.Roots()
		if err != nil {
			t.Fatal(err)
		}
		return len(roots)
	}
	holds := func(n int) func(map[string]string) bool {
		return func(data map[string]string) bool {
			b, err := spiffebundle.Parse(td, []byte(data[publish.JSONKey]))
			return err == nil && strings.Count(data[publish.PEMKey], "BEGIN CERTIFICATE") == n && len(b.X509Authorities()) == n && len(b.JWTAuthorities()) > 0
		}
	}
	n := current()
	for _, ns := range []string{k.namespace, web} {
		k.untilBundle(ns, "the bundle is in "+ns, holds(n))
	}
	if _, err := k.try("", "-n", other, "get", "configmap", publish.ConfigMap); err == nil {
		t.Error("a namespace that does not ask has the bundle")
	}
	k.kubectl("label", "namespace", other, publish.Label+"=true")
	k.untilBundle(other, "the bundle comes with the label", holds(n))

	// What others do to it is put right.
	k.kubectl("-n", web, "patch", "configmap", publish.ConfigMap, "--type=merge", "-p", `{"data":{"bundle.pem":"evil"}}`)
	k.untilBundle(web, "an edit is put right", holds(n))
	k.kubectl("-n", web, "delete", "configmap", publish.ConfigMap)
	k.untilBundle(web, "a deleted one is made again", holds(n))
	k.kubectl("-n", web, "patch", "configmap", publish.ConfigMap, "--type=merge", "-p", `{"data":{"bundle.pem":"evil"},"immutable":true}`)
	k.untilBundle(web, "an immutable one is put right", holds(n))

	// A foreign one is left, and the namespace says why.
	if got := k.kubectl("-n", foreign, "get", "configmap", publish.ConfigMap, "-o", "jsonpath={.data.bundle\\.pem}"); got != "mine" {
		t.Errorf("a foreign ConfigMap holds %q", got)
	}
	event := k.until("there is an Event", func(out string, err error) bool { return err == nil && out != "" },
		"-n", foreign, "get", "events", "--field-selector=reason=TrustBundleNotPublished", "-o", "jsonpath={.items[*].involvedObject.kind} {.items[*].message}")
	if !strings.HasPrefix(event, "Namespace the trust bundle of example.org is not published in namespace "+foreign) || !strings.Contains(event, "rename or delete it") {
		t.Errorf("the Event says %q", event)
	}
	k.kubectl("-n", foreign, "delete", "configmap", publish.ConfigMap)
	k.untilBundle(foreign, "the bundle comes when the foreign one goes", holds(n))

	// A prepared authority is in it before it signs.
	authorities := localauthorityv1.NewLocalAuthorityClient(s.AdminConn())
	prepared, err := authorities.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{k.namespace, web, other, foreign} {
		k.untilBundle(ns, "the prepared authority is in "+ns, holds(n+1))
	}
	name := publish.ClusterTrustBundleName(td)
	pem := func(n int) func(string, error) bool {
		return func(out string, err error) bool { return err == nil && strings.Count(out, "BEGIN CERTIFICATE") == n }
	}
	has := k.kubectl("api-resources", "--api-group=certificates.k8s.io", "-o", "name")
	if strings.Contains(has, "clustertrustbundles") {
		k.atEnd("delete", "clustertrustbundle", name)
		_, clusterCA := k.server()
		k.until("there is a ClusterTrustBundle", pem(n+1), "get", "clustertrustbundle", name, "-o", "jsonpath={.spec.trustBundle}")
		k.kubectl("patch", "clustertrustbundle", name, "--type=merge", "-p", fmt.Sprintf(`{"spec":{"trustBundle":%q}}`, clusterCA))
		k.until("an edit of it is put right", pem(n+1), "get", "clustertrustbundle", name, "-o", "jsonpath={.spec.trustBundle}")
	} else {
		t.Log("this API server has no ClusterTrustBundles")
	}
	// One that is revoked is out of it.
	id := prepared.PreparedAuthority.AuthorityId
	if _, err := authorities.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id}); err != nil {
		t.Fatal(err)
	}
	state, err := authorities.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	old := state.Old.AuthorityId
	if _, err := authorities.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	if _, err := authorities.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{k.namespace, web} {
		k.untilBundle(ns, "the revoked authority is out of "+ns, holds(n))
	}

	k.kubectl("label", "namespace", other, publish.Label+"-")
	k.until("it goes with the label", gone, "-n", other, "get", "configmap", publish.ConfigMap)
	for _, may := range []string{"get configmaps/another", "create configmaps", "list configmaps", "get secrets", "list secrets", "delete pods"} {
		args := append(append([]string{"auth", "can-i"}, strings.Fields(may)...), "-n", web, "--as=system:serviceaccount:"+k.namespace+":ca")
		if _, err := k.try("", args...); err == nil {
			t.Errorf("the CA may %s", may)
		}
	}
}
