//go:build kube

package kube

import (
	"fmt"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// 5,000 pods made at once at a real API server, each with an identity: the agent of one node is told of all of its own
// and of nothing else, and that they are gone when all are deleted at once. SIGNET_SIMULATED_PODS makes it another number. The
// figures are in docs/performance.md.
func TestThousandsOfPodsSeenByOneNode(t *testing.T) {
	const nodes = 50
	n := measured(t, "SIGNET_SIMULATED_PODS", 5000)
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	name := func(i int) string { return fmt.Sprintf("%s-n%02d", k.namespace, i) }
	uids := make([]string, nodes)
	for i := range nodes {
		uids[i] = k.simulatedNode(name(i))
	}
	p := k.newProcess(fmt.Sprintf("kubeconfig: %s, namespace: %s, pods: {}", k.credentials("ca"), k.namespace), "")
	p.start()
	if err := p.apply("{kind: Identity, name: pods, spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}', match: ['k8s:pod-label:app:simulated'], 'on': ['k8s_psat:cluster:prod']}\n"); err != nil {
		t.Fatal(err)
	}
	roots := p.roots()
	one, other := follow(t, ctx, p.Addr, k.agentToken("agent-0", name(0)), roots), follow(t, ctx, p.Addr, k.agentToken("agent-1", name(1)), roots)
	one.until(ctx, "the first snapshot is whole")
	other.until(ctx, "the first snapshot is whole")
	ids := func(node int) (out []string) {
		for i := node; i < n; i += nodes {
			out = append(out, fmt.Sprintf("/ns/%s/pod/p%05d", k.namespace, i))
		}
		return out
	}
	before, cpu := mib(t, p.PID(), "VmRSS"), cpuOf(t, []int{p.PID()})[p.PID()]

	admin := k.admin()
	next := make(chan int)
	var wg sync.WaitGroup
	began := time.Now()
	for range 32 {
		wg.Go(func() {
			for i := range next {
				if _, err := admin.CoreV1().Pods(k.namespace).Create(ctx, simulatedPod(k.namespace, fmt.Sprintf("p%05d", i), name(i%nodes)), metav1.CreateOptions{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	made := time.Now()
	one.until(ctx, "one node has all of its pods", ids(0)...)
	other.until(ctx, "another one has its own", ids(1)...)
	seen := time.Now()
	with := mib(t, p.PID(), "VmRSS")
	spent := cpuOf(t, []int{p.PID()})[p.PID()] - cpu

	deleting := time.Now()
	now := int64(0)
	if err := admin.CoreV1().Pods(k.namespace).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{LabelSelector: "app=simulated"}); err != nil {
		t.Fatal(err)
	}
	deleted := time.Now()
	one.until(ctx, "one node has none of them any more")
	other.until(ctx, "nor has the other")
	t.Logf("%d pods made in %v; two nodes had all of theirs, and nothing else, %v after the last was made; CPU of the CA meanwhile %.2f s; resident %.1f MiB before, %.1f with them, %.1f after they were deleted, in %v, and gone from the nodes %v later",
		n, made.Sub(began).Round(time.Millisecond), seen.Sub(made).Round(time.Millisecond), spent.Seconds(), before, with, mib(t, p.PID(), "VmRSS"), deleted.Sub(deleting).Round(time.Millisecond), time.Since(deleted).Round(time.Millisecond))

	// Nothing about other nodes was ever on the wire.
	for i, f := range []*follower{one, other} {
		text := f.was()
		mine := map[string]bool{}
		for _, m := range regexp.MustCompile(`/pod/(p\d{5})`).FindAllSubmatch(text, -1) {
			mine[string(m[1])] = true
		}
		for j := range n {
			if pod := fmt.Sprintf("p%05d", j); mine[pod] != (j%nodes == i) {
				t.Fatalf("node %d: it was told of pod %s: %t", i, pod, mine[pod])
			}
		}
		for j, uid := range uids {
			if j != i && slices.Contains([]bool{regexp.MustCompile(regexp.QuoteMeta(uid)).Match(text), regexp.MustCompile(regexp.QuoteMeta(name(j)) + `\b`).Match(text)}, true) {
				t.Errorf("node %d was told of node %d", i, j)
			}
		}
	}
}
