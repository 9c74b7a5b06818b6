//go:build kube

package kube

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// A CA with a file is killed again and again while custom resources are made, changed and deleted and pods come and go: whatever a resource
// or an operator was told to be in force is in force when it is back, nothing is there in part, and in the end all is as the cluster says.
// SIGNET_KUBE_KILLS makes it more often.
func TestKilledWhileResourcesCome(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	rounds := measured(t, "SIGNET_KUBE_KILLS", 6)
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	k.define()
	k.may("resources", resourceRules)
	node := k.namespace + "-node"
	k.simulatedNode(node)
	s, p := k.sceneOf("pods: {}, resources: {}", "")
	p.start()
	s.mustCreate("Identity", "pods", "spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}'\nmatch: ['k8s:pod-label:app:simulated']\n'on': ['k8s_psat:cluster:prod']\n")
	s.accepted("Identity", "pods")
	token := k.agentToken("agent", node)

	// What is acknowledged: the newest generation of each policy that its status says is in force, and operators' documents.
	var mu sync.Mutex
	acked, want := map[string]int64{}, map[string]int64{} // by name; what the last one that was made or changed is
	operators, pods := map[string]bool{}, map[string]bool{}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(acked)
	}
	policies := s.of("ClusterCallPolicy", "")
	var working sync.WaitGroup
	defer working.Wait()
	wctx, stop := context.WithCancel(ctx)
	defer stop()
	working.Go(func() {
		for wctx.Err() == nil { // each begins with all there are
			w, err := policies.Watch(wctx, metav1.ListOptions{})
			if err != nil {
				if wctx.Err() == nil {
					t.Error(err)
				}
				return
			}
			for e := range w.ResultChan() {
				if u, ok := e.Object.(*unstructured.Unstructured); !ok {
					break
				} else if st, _, _ := accepted(u); st == "True" {
					mu.Lock()
					acked[u.GetName()] = max(acked[u.GetName()], u.GetGeneration())
					mu.Unlock()
				}
			}
			w.Stop()
		}
	})
	spec := func(generation int64) string {
		return fmt.Sprintf("service: /s\nallow:\n- from: [/generation/%d, /first]\ndeny:\n- from: [/generation/%[1]d, /second]\n", generation)
	}
	wait := func(d time.Duration) {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-wctx.Done():
		}
	}
	working.Go(func() { // by kubectl's way
		for n := 0; wctx.Err() == nil; n++ {
			name := fmt.Sprintf("k%04d", n)
			u := object(t, "ClusterCallPolicy", "", name, spec(1))
			made, err := policies.Create(ctx, u, metav1.CreateOptions{})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			want[name] = 1
			mu.Unlock()
			for generation := int64(2); n%3 == 0 && generation < 4; generation++ {
				next := object(t, "ClusterCallPolicy", "", name, spec(generation))
				next.SetResourceVersion(made.GetResourceVersion())
				if updated, err := policies.Update(ctx, next, metav1.UpdateOptions{}); err == nil {
					made = updated
					mu.Lock()
					want[name] = made.GetGeneration()
					mu.Unlock()
				} else if made, err = policies.Get(ctx, name, metav1.GetOptions{}); err != nil { // its status was written meanwhile
					t.Error(err)
					return
				} else {
					generation--
				}
			}
			wait(30 * time.Millisecond)
		}
	})
	working.Go(func() { // an operator
		for n := 0; wctx.Err() == nil; n++ {
			name := fmt.Sprintf("o%04d", n)
			actx, cancel := context.WithTimeout(wctx, 5*time.Second)
			_, err := p.Admin.Apply(actx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: fmt.Appendf(nil, "{kind: Identity, name: %s, spiffeID: /o/%[1]s, match: ['unix:uid:7'], 'on': ['k8s_psat:agent_node_name:nobody']}", name), File: "t.yaml"}}})
			cancel()
			if err == nil {
				mu.Lock()
				operators[name] = true
				mu.Unlock()
			}
			wait(20 * time.Millisecond)
		}
	})
	working.Go(func() { // pods
		admin, now := k.admin(), int64(0)
		for n := 0; wctx.Err() == nil; n++ {
			name := fmt.Sprintf("pod-%04d", n)
			if _, err := admin.CoreV1().Pods(k.namespace).Create(ctx, simulatedPod(k.namespace, name, node), metav1.CreateOptions{}); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			pods[name] = true
			mu.Unlock()
			if n%2 == 1 {
				if err := admin.CoreV1().Pods(k.namespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				delete(pods, name)
				mu.Unlock()
			}
			wait(50 * time.Millisecond)
		}
	})

	generations := regexp.MustCompile(`/generation/(\d+)`)
	check := func(when string) {
		t.Helper()
		for name := range operators {
			if s.document("Identity", name) == "" {
				t.Errorf("%s: the operator's Identity %s is lost", when, name)
			}
		}
		for name, generation := range acked {
			doc := s.document("CallPolicy", name)
			found := generations.FindAllStringSubmatch(doc, -1)
			if len(found) != 2 || found[0][1] != found[1][1] || !strings.Contains(doc, "/first") || !strings.Contains(doc, "/second") {
				t.Errorf("%s: the policy %s, which was in force, is %q", when, name, doc)
				continue
			}
			if got, _ := strconv.ParseInt(found[0][1], 10, 64); got < generation || got > want[name] {
				t.Errorf("%s: the policy %s is of generation %d, %d was in force and %d is wanted", when, name, got, generation, want[name])
			}
		}
	}
	for round := range rounds {
		for before := count(); count() <= before; { // something new is in force by this process
			pauseFor(t, ctx, 5*time.Millisecond)
		}
		pauseFor(t, ctx, time.Duration(rnd.IntN(400))*time.Millisecond)
		p.End(syscall.SIGKILL)
		// Its Lease would last for a while; what another leader has to wait for is tried elsewhere.
		k.kubectl("-n", k.namespace, "delete", "lease", "signet-ca", "--ignore-not-found")
		mu.Lock() // nothing is acknowledged while nobody is there, but what the watch still brings
		p.start()
		check(fmt.Sprintf("killed %d times", round+1))
		mu.Unlock()
	}
	stop()
	for name, generation := range want {
		s.until("ClusterCallPolicy", name, "it is in force as it is now", func(u *unstructured.Unstructured) bool {
			st, _, _ := accepted(u)
			return st == "True" && u.GetGeneration() == generation
		})
	}
	working.Wait()
	check("in the end")
	agent := follow(t, ctx, p.Addr, token, p.roots())
	var ids []string
	for name := range pods {
		ids = append(ids, "/ns/"+k.namespace+"/pod/"+name)
	}
	agent.until(ctx, "a node has the identities of the pods that there are", ids...)
	list, err := p.Admin.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: "CallPolicy"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range list.Resources {
		names = append(names, r.Name)
	}
	slices.Sort(names)
	if wanted := slices.Sorted(maps.Keys(want)); !slices.Equal(names, wanted) {
		t.Errorf("the CA holds the policies %q,\nwant %q", names, wanted)
	}
	t.Logf("killed %d times: %d policies, %d operators' Identities and %d pods; nothing is lost", rounds, len(want), len(operators), len(pods))
}
