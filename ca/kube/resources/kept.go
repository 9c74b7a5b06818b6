package resources

import (
	"context"
	"fmt"
	"slices"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/kube/follow"
)

// maxKept bounds how many resources of one kind are read, the first that are seen. It is above what one store of policies takes.
const maxKept = 20_000

// kept are the resources of one kind as the API server has them. It implements follow.Store.
type kept struct {
	changed func() // something came, went or is another

	mu     sync.Mutex
	byName map[types.NamespacedName]*unstructured.Unstructured
	listed map[types.NamespacedName]struct{} // while a list is under way: what it held until now
	whole  bool                              // a list has come to its end, once
	left   map[types.NamespacedName]struct{} // what is over maxKept
}

func newKept(changed func()) *kept {
	return &kept{changed: changed, byName: map[types.NamespacedName]*unstructured.Unstructured{}, left: map[types.NamespacedName]struct{}{}}
}

// all returns what is there, and whether that is known.
func (k *kept) all() (out []*unstructured.Unstructured, known bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, o := range k.byName {
		out = append(out, o)
	}
	return out, k.whole
}

// leftOut returns how many are over what is read.
func (k *kept) leftOut() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.left)
}

func nameOf(o metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// Begin implements follow.Store.
func (k *kept) Begin() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listed = map[types.NamespacedName]struct{}{}
}

// Put implements follow.Store.
func (k *kept) Put(o metav1.Object) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok || u.GetName() == "" || u.GetUID() == "" {
		return
	}
	u.SetManagedFields(nil) // nobody looks at them
	name := nameOf(u)
	k.mu.Lock()
	if k.listed != nil {
		k.listed[name] = struct{}{}
	}
	was := k.byName[name]
	switch {
	case was == nil && len(k.byName) >= maxKept:
		if len(k.left) < maxKept {
			k.left[name] = struct{}{}
		}
	case was == nil || was.GetUID() != u.GetUID() || was.GetResourceVersion() != u.GetResourceVersion():
		k.byName[name] = u
		k.mu.Unlock()
		k.changed()
		return
	}
	k.mu.Unlock()
}

// End implements follow.Store.
func (k *kept) End() {
	k.mu.Lock()
	for name := range k.byName {
		if _, there := k.listed[name]; !there {
			delete(k.byName, name)
		}
	}
	for name := range k.left {
		if _, there := k.listed[name]; !there {
			delete(k.left, name)
		}
	}
	k.listed, k.whole = nil, true
	k.mu.Unlock()
	k.changed()
}

// Delete implements follow.Store.
func (k *kept) Delete(o metav1.Object) {
	name := nameOf(o)
	k.mu.Lock()
	delete(k.left, name)
	was := k.byName[name]
	if was == nil || o.GetUID() != "" && was.GetUID() != o.GetUID() { // it is the one before the one that is there
		k.mu.Unlock()
		return
	}
	delete(k.byName, name)
	k.mu.Unlock()
	k.changed()
}

// follower keeps up with one kind.
func (c *Controller) follower(k Kind, into *kept) *follow.Follower {
	api := c.c.Client.Dynamic.Resource(k.resource())
	return follow.New(follow.Config{Name: k.name(), Store: into, Log: c.c.Log,
		List:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, o) },
		Watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return api.Watch(ctx, o) }})
}

// Problems says in lines what keeps the custom resources from being read or from being in force. It is empty on a replica that does
// not lead.
func (c *Controller) Problems() (out []string) {
	c.mu.Lock()
	kinds, failure := slices.Clone(c.kinds), c.failure
	c.mu.Unlock()
	for _, k := range kinds {
		if err := k.follower.Status().Err; err != nil {
			out = append(out, fmt.Sprintf("cluster %s: changes of custom resources are not seen: %v", c.c.Client.Cluster, err))
		}
		if n := k.kept.leftOut(); n > 0 {
			out = append(out, fmt.Sprintf("cluster %s: %d %s are over the %d that are read", c.c.Client.Cluster, n, k.name(), maxKept))
		}
	}
	if failure != "" {
		out = append(out, fmt.Sprintf("cluster %s: custom resources are not in force yet: %s", c.c.Client.Cluster, failure))
	}
	return out
}
