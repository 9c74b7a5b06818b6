//go:build kube

package kube

import (
	"fmt"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// An Identity that refuses thousands of pods that come at once makes Events at a bounded pace.
func TestThousandsOfRefusedPods(t *testing.T) {
	const n = 5000
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	name := k.namespace + "-node"
	k.simulatedNode(name)
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{}}}
	}})
	s.Apply("kind: Identity\nname: refuses\nspiffeID: '/none/{{ .k8s.label[\"none\"] }}'\n'on': ['k8s_psat:cluster:prod']\n")
	admin := k.admin()
	count := func() int {
		list, err := admin.EventsV1().Events(k.namespace).List(ctx, metav1.ListOptions{FieldSelector: "reason=IdentityRefused"})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Items)
	}
	began := time.Now()
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for i := worker; i < n; i += 16 {
				if _, err := admin.CoreV1().Pods(k.namespace).Create(ctx, simulatedPod(k.namespace, fmt.Sprintf("p%05d", i), name), metav1.CreateOptions{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for count() == 0 {
		pause(t, ctx)
	}
	got, took := count(), time.Since(began)
	if most := 20 + 2*int(took.Seconds()+1); got > most { // twenty at once, then two a second
		t.Errorf("%d Events after %v, want at most %d", got, took, most)
	}
	t.Logf("%d pods refused: %d Events after %v", n, got, took.Round(time.Millisecond))
	// The CA goes on: it takes an apply, and those that wait are written in their turn.
	s.Apply("kind: Identity\nname: refuses\nspiffeID: '/app/{{ .k8s.label[\"app\"] }}'\n'on': ['k8s_psat:cluster:prod']\n")
	for count() == got {
		pause(t, ctx)
	}
}
