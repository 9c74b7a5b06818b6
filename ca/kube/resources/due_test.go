package resources

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/registry"
)

// TestManyRefusedResourcesWait: thousands of resources that are refused are not all planned anew for each change of another one,
// but each is after a while, and at once when it changes itself.
func TestManyRefusedResourcesWait(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	r := &run{Controller: New(Config{Client: &kube.Client{Cluster: "prod"}, Now: func() time.Time { return now }}), judged: map[types.UID]verdict{}, changes: map[string]*rate.Limiter{}}
	kind := Kinds[1]
	if !kind.Namespaced {
		t.Fatalf("%s is of no namespace", kind.Kind)
	}
	var all []*wanted
	for i := range 5000 {
		obj := &unstructured.Unstructured{Object: map[string]any{"metadata": map[string]any{"uid": fmt.Sprint(i), "name": fmt.Sprint("p", i), "namespace": "web", "generation": int64(1)}}}
		w := &wanted{kind: &kind, obj: obj, ref: registry.Ref{Kind: kind.Document, Name: documentName("prod", obj)}}
		all = append(all, w)
		r.judge(w, verdict{reason: reasonNamespace, message: "not of its namespace"}, 1)
	}
	planned := func(templates int) (n int) {
		left := triedAnew
		for _, w := range all {
			if r.due(w, registry.Resource{}, templates, &left) {
				n++
			}
		}
		return n
	}
	if n := planned(1); n != triedAnew {
		t.Errorf("%d are planned anew when something else changes, want %d", n, triedAnew)
	}
	all[4000].obj.SetGeneration(2)
	if n := planned(1); n != triedAnew+1 {
		t.Errorf("%d with one that changed", n)
	}
	if n := planned(2); n != len(all) {
		t.Errorf("%d once Identities changed", n)
	}
	now = now.Add(lookAgain)
	if n := planned(1); n != len(all) {
		t.Errorf("%d after a while", n)
	}
}

// TestManyChangesOfANamespaceWait: who changes resources of one namespace all the time has a commit and audit records for some of it,
// and the last state of each in the end; other namespaces, and what the CA has to look at by itself, do not wait for it.
func TestManyChangesOfANamespaceWait(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	r := &run{Controller: New(Config{Client: &kube.Client{Cluster: "prod"}, Now: func() time.Time { return now }}), judged: map[types.UID]verdict{}, changes: map[string]*rate.Limiter{}}
	kind := Kinds[1]
	resource := func(namespace string) *wanted {
		obj := &unstructured.Unstructured{Object: map[string]any{"metadata": map[string]any{"uid": namespace, "name": "p", "namespace": namespace, "generation": int64(1)}}}
		return &wanted{kind: &kind, obj: obj, ref: registry.Ref{Kind: kind.Document, Name: documentName("prod", obj)}}
	}
	left := triedAnew
	stored := registry.Resource{Revision: 7}
	w, other := resource("evil"), resource("shop")
	planned := 0
	for g := range int64(10_000) {
		w.obj.SetGeneration(g + 2)
		if r.due(w, stored, 1, &left) {
			planned++
			r.judge(w, verdict{accepted: true, revision: 7}, 1)
		}
	}
	if planned != changeBurst+1 { // the first look is the CA's own
		t.Errorf("%d of 10,000 changes in a moment are planned, want %d", planned, changeBurst+1)
	}
	if !r.due(other, registry.Resource{}, 1, &left) {
		t.Error("another namespace waits for it")
	}
	if !r.due(w, stored, 2, &left) || !r.due(w, registry.Resource{Revision: 8}, 1, &left) {
		t.Error("what changed in the store, or which services the namespace has, is not looked at")
	}
	now = now.Add(lookAgain)
	if !r.due(w, stored, 1, &left) {
		t.Error("the last state is not planned after a while")
	}
}

// TestStatusesOfANamespaceWait: who writes nonsense into the statuses of thousands of resources keeps the CA from nothing else: some are
// put right at each look, and those of others at once.
func TestStatusesOfANamespaceWait(t *testing.T) {
	kind := Kinds[1]
	api := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{kind.resource(): kind.Kind + "List"})
	var mu sync.Mutex
	written := map[string]int{}
	api.PrependReactor("update", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		written[a.GetNamespace()]++
		return true, a.(clienttesting.UpdateAction).GetObject(), nil
	})
	r := &run{Controller: New(Config{Client: &kube.Client{Cluster: "prod", Dynamic: api}}), judged: map[types.UID]verdict{}, told: map[types.UID]*rate.Limiter{}, wake: make(chan struct{}, 1)}
	w := &watched{Kind: kind, kept: newKept(func() {})}
	r.kinds = []*watched{w}
	add := func(namespace string, i int) {
		obj := &unstructured.Unstructured{Object: map[string]any{"metadata": map[string]any{"uid": fmt.Sprint(namespace, i), "name": fmt.Sprint("p", i), "namespace": namespace, "generation": int64(1)}, "status": map[string]any{"document": "nonsense"}}}
		w.kept.Put(obj)
		r.judge(&wanted{kind: &kind, obj: obj}, verdict{reason: reasonInvalid, message: "no"}, 1)
	}
	for i := range 1000 {
		add("evil", i)
	}
	add("shop", 1)
	if err := r.report(t.Context()); err != nil {
		t.Fatal(err)
	}
	if written["evil"] != statusesAtOnce || written["shop"] != 1 {
		t.Errorf("written at one look: %v", written)
	}
	if len(r.told) != statusesAtOnce+1 {
		t.Errorf("the turns of %d are used up", len(r.told))
	}
	select {
	case <-r.wake:
	default:
		t.Error("the rest waits for something to change")
	}
}
