//go:build kube

package kube

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/signet-id/signet/ca"
	cakube "github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/publish"
	"github.com/signet-id/signet/test/signettest"
)

// Somebody changes the bundle of a namespace back each time that it is put right, as quickly as the API server takes it: the CA does not
// write all the time, and puts it right when they stop. Nor does it forget a namespace that failed meanwhile.
func TestBundleThatSomebodyElseWrites(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	contested, full := k.space("contested"), k.space("full")
	k.apply("apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: none, namespace: " + full + "}\nspec: {hard: {count/configmaps: \"0\"}}\n")
	k.until("the quota counts", func(out string, err error) bool { return err == nil && out != "" }, "-n", full, "get", "resourcequota", "none", "-o", "jsonpath={.status.hard}")
	signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Bundle: &ca.KubernetesBundle{}}}
	}})
	there := func(data map[string]string) bool { return len(data[publish.PEMKey]) > 100 }
	k.untilBundle(k.namespace, "the bundle is in the CA's own namespace", there)

	admin, err := cakube.Open("prod", k.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	var changed atomic.Int64
	fighting, peace := context.WithCancel(ctx)
	var g sync.WaitGroup
	defer g.Wait()
	defer peace()
	g.Go(func() {
		maps := admin.ConfigMaps(contested)
		for fighting.Err() == nil {
			if cm, err := maps.Get(fighting, publish.ConfigMap, metav1.GetOptions{}); err == nil && there(cm.Data) {
				if _, err := maps.Patch(fighting, publish.ConfigMap, types.MergePatchType, []byte(`{"data":{"bundle.pem":"mine"}}`), metav1.PatchOptions{}); err == nil {
					changed.Add(1)
				}
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-fighting.Done():
			}
		}
	})
	began := time.Now()
	for _, ns := range []string{contested, full} {
		k.kubectl("label", "namespace", ns, publish.Label+"=true")
	}
	k.until("the bundle is fought for", func(string, error) bool { return changed.Load() > 3 }, "version", "--client")
	k.kubectl("-n", full, "delete", "resourcequota", "none")
	k.untilBundle(full, "the bundle comes once there is room, whatever happens elsewhere", there)
	if n, most := changed.Load(), 12+int64(time.Since(began)/(8*time.Second)); n > most {
		t.Errorf("the CA wrote the contested bundle %d times in %s, more than %d", n, time.Since(began), most)
	}
	peace()
	g.Wait()
	k.untilBundle(contested, "it is put right when nobody changes it any more", there)
}

// CAs of two trust domains read the custom resources of one cluster, and each has its own to say of them. Neither writes a status
// all the time.
func TestTwoCAsThatReadOneResource(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	signettest.Start(t, signettest.Config{TrustDomain: "example.com", CA: func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.kubeconfig, Namespace: k.namespace, Resources: &ca.KubernetesResources{}}}
	}})
	for i := range 3 { // so that the two have other revisions
		s.ca.Apply(fmt.Sprintf("kind: Identity\nname: other-%d\nspiffeID: /other/%d\nmatch: [unix:uid:%d]\n", i, i, i))
	}
	if _, err := s.create("Identity", "contested", "spiffeID: /contested\nmatch: [unix:uid:7]\n"); err != nil {
		t.Fatal(err)
	}
	within, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	w, err := s.of("Identity", "").Watch(within, metav1.ListOptions{FieldSelector: "metadata.name=contested"})
	if err != nil {
		t.Fatal(err)
	}
	written := map[any]int{} // by what it says
	for e := range w.ResultChan() {
		if u, ok := e.Object.(*unstructured.Unstructured); ok {
			revision, _, _ := unstructured.NestedInt64(u.Object, "status", "revision")
			written[revision]++
		}
	}
	if len(written) < 3 {
		t.Fatalf("the status says %v; want what two CAs say", written)
	}
	for revision, n := range written {
		if n > 12 {
			t.Errorf("a CA wrote the status with revision %v %d times in 15 s", revision, n)
		}
	}
}
