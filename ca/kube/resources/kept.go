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

const (
	// maxKept bounds how many resources of one kind are read, the first that are seen. It is above what one store of policies takes.
	maxKept = 20_000
	// maxKeptBytes bounds the memory that they take, as weigh estimates it.
	maxKeptBytes = 256 << 20
	// namespaceShare is the part of both that those of one namespace may take: who may write there takes no room from the others.
	namespaceShare = 4
	// bytesPerNode is about what a key or a value takes besides its text, with the document that is made of it.
	bytesPerNode = 250
)

// A held resource is one as the API server has it, without what of it is too much.
type held struct {
	obj  *unstructured.Unstructured
	size int64
	// wrong is why its spec was not kept.
	wrong error
}

// A share is what some take.
type share struct {
	n     int
	bytes int64
}

// kept are the resources of one kind as the API server has them. It implements follow.Store and follow.Hungry.
type kept struct {
	changed func() // something came, went or is another

	mu     sync.Mutex
	byName map[types.NamespacedName]held
	taken  share
	shares map[string]share                  // by namespace; of what is of none there is none
	listed map[types.NamespacedName]struct{} // while a list is under way: what it held until now
	whole  bool                              // a list has come to its end, once
	left   map[types.NamespacedName]struct{} // for which there is no room
	freed  bool                              // there is more room than when the last list began
}

func newKept(changed func()) *kept {
	return &kept{changed: changed, byName: map[types.NamespacedName]held{}, shares: map[string]share{}, left: map[types.NamespacedName]struct{}{}}
}

// all returns what is there, and whether that is known.
func (k *kept) all() (out []held, known bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, o := range k.byName {
		out = append(out, o)
	}
	return out, k.whole
}

// fits tells whether there is room for n more in a namespace, which take more bytes. k.mu is held.
func (k *kept) fits(namespace string, n int, more int64) bool {
	has := k.shares[namespace]
	return k.taken.n+n <= maxKept && k.taken.bytes+more <= maxKeptBytes &&
		(namespace == "" || has.n+n <= maxKept/namespaceShare && has.bytes+more <= maxKeptBytes/namespaceShare)
}

// set keeps a resource, or none, in the place of what is there. k.mu is held.
func (k *kept) set(name types.NamespacedName, h held) {
	n, more := 0, h.size
	if was, there := k.byName[name]; there {
		n, more = n-1, more-was.size
		delete(k.byName, name)
	}
	if h.obj != nil {
		n++
		k.byName[name] = h
	}
	k.taken.n, k.taken.bytes = k.taken.n+n, k.taken.bytes+more
	k.freed = k.freed || n < 0 || more < 0
	if name.Namespace == "" {
		return
	}
	has := k.shares[name.Namespace]
	has.n, has.bytes = has.n+n, has.bytes+more
	if k.shares[name.Namespace] = has; has.n == 0 {
		delete(k.shares, name.Namespace)
	}
}

// hold takes off what nobody looks at, and a spec that is too large for a document.
func hold(u *unstructured.Unstructured) held {
	u.SetManagedFields(nil)
	h := held{obj: u}
	if spec, ok := u.Object["spec"].(map[string]any); ok {
		if h.wrong = check(spec); h.wrong != nil {
			u.Object["spec"] = map[string]any{}
		}
	}
	nodes, text := weigh(u.Object)
	h.size = bytesPerNode*int64(nodes) + int64(text)
	return h
}

// weigh counts the keys and values of an object, and the bytes of their text.
func weigh(v any) (nodes, text int) {
	nodes = 1
	add := func(x any) {
		n, t := weigh(x)
		nodes, text = nodes+n, text+t
	}
	switch v := v.(type) {
	case string:
		text = len(v)
	case map[string]any:
		for k, x := range v {
			nodes, text = nodes+1, text+len(k)
			add(x)
		}
	case []any:
		for _, x := range v {
			add(x)
		}
	}
	return nodes, text
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
	k.listed, k.freed = map[types.NamespacedName]struct{}{}, false
}

// Hungry implements follow.Hungry.
func (k *kept) Hungry() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.freed && len(k.left) > 0
}

// Put implements follow.Store.
func (k *kept) Put(o metav1.Object) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok || u.GetName() == "" || u.GetUID() == "" {
		return
	}
	h, name := hold(u), nameOf(u)
	k.mu.Lock()
	if k.listed != nil {
		k.listed[name] = struct{}{}
	}
	was, there := k.byName[name]
	if there && was.obj.GetUID() == u.GetUID() && was.obj.GetResourceVersion() == u.GetResourceVersion() {
		k.mu.Unlock()
		return
	}
	n := 1
	if there {
		n = 0
	}
	if k.fits(name.Namespace, n, h.size-was.size) {
		k.set(name, h)
		delete(k.left, name)
	} else {
		k.set(name, held{})
		if len(k.left) < maxKept {
			k.left[name] = struct{}{}
		}
	}
	k.mu.Unlock()
	k.changed()
}

// End implements follow.Store.
func (k *kept) End() {
	k.mu.Lock()
	for name := range k.byName {
		if _, there := k.listed[name]; !there {
			k.set(name, held{})
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
	was, there := k.byName[name]
	if !there || o.GetUID() != "" && was.obj.GetUID() != o.GetUID() { // it is the one before the one that is there
		k.mu.Unlock()
		return
	}
	k.set(name, held{})
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
			out = append(out, fmt.Sprintf("cluster %s: there is no room for %d %s, which are not read (%d in all and %d MiB, of which one namespace has a quarter)",
				c.c.Client.Cluster, n, k.name(), maxKept, maxKeptBytes>>20))
		}
	}
	if failure != "" {
		out = append(out, fmt.Sprintf("cluster %s: custom resources are not in force yet: %s", c.c.Client.Cluster, failure))
	}
	return out
}
