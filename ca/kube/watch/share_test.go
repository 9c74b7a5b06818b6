package watch

import (
	"fmt"
	"strings"
	"testing"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestANamespaceTakesItsShare: pods of one namespace that are as many, or as large, as an API server takes them leave room for those of
// others, and what they took is free again when they are gone.
func TestANamespaceTakesItsShare(t *testing.T) {
	of := func(namespace string, i int, labels map[string]string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("p", i), UID: types.UID(fmt.Sprint(namespace, i)), ResourceVersion: "1", Labels: labels},
			Spec: corev1.PodSpec{NodeName: "one", ServiceAccountName: "web"}}
	}
	large := map[string]string{"x": strings.Repeat("y", maxObject/2)} // shared here, and counted as if it were not
	for name, tt := range map[string]struct {
		n      int
		labels map[string]string
	}{"many": {maxPods + 1000, nil}, "large": {3 * maxBytes / maxObject, large}} {
		t.Run(name, func(t *testing.T) {
			k := newKnown("prod", false)
			for i := range tt.n {
				k.pods.put(of("evil", i, tt.labels))
			}
			if len(k.pods.byUID) == tt.n || len(k.pods.left) == 0 {
				t.Fatalf("all %d pods of one namespace are kept", tt.n)
			}
			victim := of("shop", 1, tt.labels)
			k.pods.put(victim)
			victim = of("shop", 1, map[string]string{"more": "than before", "x": tt.labels["x"]})
			victim.ResourceVersion = "2"
			k.pods.put(victim)
			if p := k.pods.byUID["shop1"]; p == nil || p.pod.Labels["more"] == "" {
				t.Error("there is no room for a pod of another namespace")
			}
			for i := range tt.n {
				k.pods.remove(of("evil", i, nil))
			}
			k.pods.remove(victim)
			if k.bytes != 0 || len(k.pods.shares) != 0 || len(k.pods.left) != 0 {
				t.Errorf("with no pod left %d bytes are taken, by %v", k.bytes, k.pods.shares)
			}
		})
	}
}

// TestLargePodsAreForgotten: labels and owners as large as an API server takes them do not outlive their pods, and weigh what they take.
func TestLargePodsAreForgotten(t *testing.T) {
	k := newKnown("prod", true)
	large := func(i int) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "evil", Name: fmt.Sprint("p", i), UID: types.UID(fmt.Sprint("evil-", i)), ResourceVersion: "1", Labels: map[string]string{}}, Spec: corev1.PodSpec{NodeName: "one"}}
		for j := range 1000 {
			p.Labels[fmt.Sprint("label-", j)] = fmt.Sprint(i)
			p.OwnerReferences = append(p.OwnerReferences, metav1.OwnerReference{APIVersion: "v1", Kind: "Job", Name: fmt.Sprint("job-", i, "-", j), UID: "u"})
		}
		return p
	}
	for i := range 100 {
		p := large(i)
		k.pods.put(p)
		if kept := k.pods.byUID[string(p.UID)]; kept == nil || kept.size < 2*1000*100 {
			t.Fatalf("it weighs %+v", kept)
		}
		k.pods.remove(p)
	}
	bytes := 0
	for key := range k.pods.shared.labels {
		bytes += len(key)
	}
	for key := range k.pods.shared.owners {
		bytes += len(key)
	}
	if bytes > maxSetBytes {
		t.Errorf("%d bytes of pods that are gone are remembered", bytes)
	}
	// Of a list, an element takes many times of what it has on the wire.
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "evil", Name: "containers", UID: "c", ResourceVersion: "1"}, Spec: corev1.PodSpec{NodeName: "one"}}
	for i := range 10_000 {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprint("c", i), Image: "i"})
	}
	k.pods.put(p)
	if len(k.pods.byUID) != 0 || len(k.pods.left) != 1 {
		t.Errorf("a pod of %d bytes is kept, which takes %d", p.Size(), len(p.Spec.Containers)*int(unsafe.Sizeof(corev1.Container{})))
	}
}

// TestNamesThatCannotBe: what an API server could not have made, such as names of a megabyte or ones that no answer to an operator could
// hold, is not kept, and a list of it without end takes no memory.
func TestNamesThatCannotBe(t *testing.T) {
	k := newKnown("prod", false)
	k.pods.begin()
	k.nodes.begin()
	for i, bad := range []string{"", strings.Repeat("x", 1<<20), "a\x00b", "a\xffb", "../../etc", "A", "a b", "\x1b[2J"} {
		uid := types.UID(fmt.Sprint("u", i))
		for _, change := range []func(*corev1.Pod){
			func(p *corev1.Pod) { p.Name = bad }, func(p *corev1.Pod) { p.Namespace = bad }, func(p *corev1.Pod) { p.Spec.NodeName = bad },
			func(p *corev1.Pod) {
				if p.Spec.ServiceAccountName = bad; bad == "" { // that may be
					p.UID = ""
				}
			},
			func(p *corev1.Pod) { p.UID = types.UID(bad + "_") },
		} {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: uid, ResourceVersion: "1"}, Spec: corev1.PodSpec{NodeName: "one", ServiceAccountName: "web"}}
			change(p)
			k.pods.put(p)
		}
		k.nodes.put(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: bad, UID: uid, ResourceVersion: "1"}})
	}
	if len(k.pods.byUID)+len(k.pods.left)+len(k.pods.listed)+len(k.nodes.byName)+len(k.nodes.left)+len(k.nodes.listed) != 0 {
		t.Errorf("kept: %v, nodes %v", k.pods.byUID, k.nodes.byName)
	}
}
