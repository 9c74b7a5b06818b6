package watch

import (
	"fmt"
	"strings"
	"testing"

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
