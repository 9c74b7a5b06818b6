package resources

import (
	"fmt"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
)

func object(namespace, name, version string, spec map[string]any) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
	u.SetNamespace(namespace)
	u.SetName(name)
	u.SetUID(types.UID(namespace + name))
	u.SetResourceVersion(version)
	return u
}

// TestANamespaceTakesItsShare: who may write into one namespace leaves room for the resources of others, whether he writes many or large
// ones, and what they took is free again when they are gone.
func TestANamespaceTakesItsShare(t *testing.T) {
	rules := make([]any, 1000)
	for i := range rules {
		rules[i] = map[string]any{"from": []any{strings.Repeat("x", 50)}}
	}
	for name, tt := range map[string]struct {
		n    int
		spec map[string]any
	}{"many": {maxKept + 10, map[string]any{"service": "/a"}}, "large": {maxKept / 10, map[string]any{"allow": rules}}} {
		t.Run(name, func(t *testing.T) {
			k := newKept(func() {})
			for i := range tt.n {
				k.Put(object("evil", fmt.Sprint(i), "1", tt.spec))
			}
			if k.leftOut() == 0 || k.taken.bytes > maxKeptBytes {
				t.Fatalf("of %d resources %d are left out; the others take %d bytes", tt.n, k.leftOut(), k.taken.bytes)
			}
			mine := types.NamespacedName{Namespace: "shop", Name: "mine"}
			k.Put(object("shop", "mine", "1", map[string]any{"service": "/b"}))
			k.Put(object("shop", "mine", "2", tt.spec))
			if k.byName[mine].obj.GetResourceVersion() != "2" {
				t.Error("there is no room for a resource of another namespace")
			}
			if k.Hungry() {
				t.Error("it wants to be told again though nothing went")
			}
			k.Delete(object("evil", "0", "1", nil))
			if !k.Hungry() {
				t.Error("with room again it does not want to be told of those that were left out")
			}
			k.Begin()
			if k.Hungry() {
				t.Error("it wants to be told again while it is told")
			}
			k.End()
			if k.taken != (share{}) || len(k.shares)+len(k.left)+len(k.byName) != 0 {
				t.Errorf("with nothing left %+v are taken, %v", k.taken, k.shares)
			}
		})
	}
}

// What is no document by its size is not kept, but for why.
func TestBombsAreNotKept(t *testing.T) {
	k := newKept(func() {})
	var deep any = "x"
	for range 100 {
		deep = []any{deep}
	}
	k.Put(object("evil", "deep", "1", map[string]any{"service": deep}))
	all, _ := k.all()
	if len(all) != 1 || all[0].wrong == nil || len(all[0].obj.Object["spec"].(map[string]any)) != 0 {
		t.Errorf("kept: %+v", all)
	}
	k.Put(object("evil", "deep", "2", map[string]any{"service": "/a"}))
	if all, _ := k.all(); len(all) != 1 || all[0].wrong != nil {
		t.Errorf("once it is mended: %+v", all)
	}
}
