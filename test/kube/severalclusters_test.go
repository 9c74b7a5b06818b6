//go:build kube

package kube

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-id/signet/ca"
)

// TestSeveralClusters runs what docs/kubernetes/chart.md says to do in a second cluster. A CA elsewhere has what it needs there by that alone.
func TestSeveralClusters(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	env := k.environment()
	page, err := os.ReadFile("../../docs/kubernetes/chart.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "\n## Several clusters\n")
	b := block.FindStringSubmatch(section)
	if b == nil {
		t.Fatal("the page has no commands for several clusters")
	}
	const clear = "kubectl delete namespace " + installation + " --ignore-not-found && kubectl delete clusterrole,clusterrolebinding --selector app.kubernetes.io/part-of=signet && kubectl delete -f deploy/helm/signet/files/crds --ignore-not-found"
	k.shell(env, clear)
	k.afterwards(func() { k.shell(env, clear) })
	server, _ := k.server()
	kubeconfig := filepath.Join(t.TempDir(), "second.yaml")
	k.shell(env, strings.NewReplacer("https://second.example.org:6443", server, "second.yaml", kubeconfig).Replace(b[1]))

	s := custom(t, ctx, k, kubeconfig, func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"second": {Kubeconfig: kubeconfig, Pods: &ca.KubernetesPods{}, Bundle: &ca.KubernetesBundle{}, Resources: &ca.KubernetesResources{}}}
	})
	k.eventually(env, "kubectl -n "+installation+" get configmap signet-bundle")
	if _, err := s.create("Identity", "pods", "spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\non: [k8s_psat:cluster:second]\n"); err != nil {
		t.Fatal(err)
	}
	u := s.until("Identity", "pods", "it is judged", func(u *unstructured.Unstructured) bool { st, _, _ := accepted(u); return st != "" })
	if st, _, message := accepted(u); st != "True" || message != "in force as it is written here" {
		t.Errorf("the Identity is %s: %s", st, message)
	}
	if problems := k.shell(env, "kubectl auth can-i create tokenreviews.authentication.k8s.io --as system:serviceaccount:"+installation+":signet-ca"); !strings.Contains(problems, "yes") {
		t.Errorf("agents cannot attest: %s", problems)
	}
}
