package watch

import (
	"maps"
	"reflect"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/signet-id/signet/ca/kube/pods"
)

// podsKnown are the pods of a cluster by UID.
type podsKnown struct {
	k      *known
	byUID  map[string]*podKnown
	dirty  map[string]struct{} // those that changed since the Expander was told
	gone   map[string]struct{}
	left   map[string]struct{} // UIDs of those that did not fit
	listed map[string]struct{} // while a list is under way: what it held until now
	shares map[string]share    // by namespace
	shared *shared
	former former
}

// A share is what the pods of one namespace take.
type share struct {
	pods  int
	bytes int64
}

// fits tells whether there is room for n more pods in a namespace, and for more bytes, with one of size among them.
func (s *podsKnown) fits(namespace string, size, more int64, n int) bool {
	has := s.shares[namespace]
	return s.k.fits(size, more, len(s.byUID)+n, maxPods) && has.pods+n <= maxPods/namespaceShare && has.bytes+more <= maxBytes/namespaceShare
}

// count notes that the pods of a namespace are n more and take more bytes by more.
func (s *podsKnown) count(namespace string, more int64, n int) {
	s.k.bytes += more
	has := s.shares[namespace]
	has.pods, has.bytes = has.pods+n, has.bytes+more
	if s.shares[namespace] = has; has.pods == 0 {
		delete(s.shares, namespace)
	}
}

type podKnown struct {
	pod     *pods.Pod
	version uint64 // the object's resource version, zero if it is no number
	// bound is when the pod was put on its node, as it said when it was first seen there: what the node's kubelet writes later does not count.
	bound time.Time
	size  int64
	why   string // it belongs to no node
}

func (s *podsKnown) begin() { s.listed = make(map[string]struct{}, len(s.byUID)) }

func (s *podsKnown) put(o metav1.Object) {
	object, ok := o.(*corev1.Pod)
	if !ok || !plainUID(object.UID) || ended(object) || !plainName(object.Namespace) || !plainName(object.Name) || !plainName(object.Spec.NodeName) ||
		object.Spec.ServiceAccountName != "" && !plainName(object.Spec.ServiceAccountName) {
		return
	}
	uid := string(object.UID)
	version, _ := strconv.ParseUint(object.ResourceVersion, 10, 64)
	was := s.byUID[uid]
	if s.listed == nil && was != nil && version < was.version {
		return // an older state that came late
	}
	defer s.list(uid)
	pod, size := s.shared.pod(s.k.cluster, object, s.k.keepObjects)
	if was == nil {
		if !s.fits(pod.Namespace, size, size, 1) {
			s.leave(uid)
			return
		}
		delete(s.left, uid)
		s.byUID[uid] = &podKnown{pod: pod, version: version, bound: s.former.bound(uid, boundAt(object)), size: size}
		s.count(pod.Namespace, size, 1)
		s.dirty[uid] = struct{}{}
		delete(s.gone, uid)
		return
	}
	was.version = version
	if same(was.pod, pod) {
		return
	}
	if !s.fits(pod.Namespace, size, size-was.size, 0) {
		s.drop(uid)
		s.leave(uid)
		return
	}
	pod.NodeUID, pod.NamespaceLabels, pod.Node = was.pod.NodeUID, was.pod.NamespaceLabels, was.pod.Node
	s.count(pod.Namespace, size-was.size, 0)
	was.pod, was.size = pod, size
	s.dirty[uid] = struct{}{}
}

// list notes that the list under way, if there is one, holds what is known of a pod.
func (s *podsKnown) list(uid string) {
	if s.listed == nil {
		return
	}
	_, left := s.left[uid]
	if left || s.byUID[uid] != nil { // of all else there is nothing to forget
		s.listed[uid] = struct{}{}
	}
}

func (s *podsKnown) leave(uid string) {
	if len(s.left) < maxPods {
		s.left[uid] = struct{}{}
	}
}

func (s *podsKnown) end() {
	for uid := range s.byUID {
		if _, there := s.listed[uid]; !there {
			s.drop(uid)
		}
	}
	for uid := range s.left {
		if _, there := s.listed[uid]; !there {
			delete(s.left, uid)
		}
	}
	s.listed = nil
}

func (s *podsKnown) remove(o metav1.Object) {
	uid := string(o.GetUID())
	delete(s.left, uid)
	s.drop(uid)
}

func (s *podsKnown) drop(uid string) {
	p := s.byUID[uid]
	if p == nil {
		return
	}
	s.count(p.pod.Namespace, -p.size, -1)
	s.former.note(uid, p.bound)
	delete(s.byUID, uid)
	delete(s.dirty, uid)
	s.gone[uid] = struct{}{}
}

// maxFormer bounds of how many pods that are gone it is remembered when they were put on their nodes.
const maxFormer = 50_000

// former are pods that are gone, with when they were put on their nodes. One that has ended is gone, and its kubelet can write that it
// runs after all: it is the same pod then, and came when it came.
type former struct {
	at   map[string]time.Time
	uids []string // the oldest at next, once there are maxFormer
	next int
}

func (f *former) note(uid string, bound time.Time) {
	if f.at == nil {
		f.at = map[string]time.Time{}
	}
	if _, known := f.at[uid]; !known {
		if len(f.uids) < maxFormer {
			f.uids = append(f.uids, uid)
		} else {
			delete(f.at, f.uids[f.next])
			f.uids[f.next] = uid
			f.next = (f.next + 1) % maxFormer
		}
	}
	f.at[uid] = bound
}

// bound returns when a pod was put on its node, of which it says that it was now.
func (f *former) bound(uid string, now time.Time) time.Time {
	if at, known := f.at[uid]; known && at.Before(now) {
		return at
	}
	return now
}

func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// boundAt returns when a pod was put on its node, by the clocks of the API servers.
func boundAt(p *corev1.Pod) time.Time {
	at := p.CreationTimestamp.Time
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionTrue && c.LastTransitionTime.After(at) {
			at = c.LastTransitionTime.Time
		}
	}
	return at
}

// named are the objects of one kind by name, of each the little that is kept: nodes, or namespaces.
type named[T any] struct {
	k      *known
	most   int // of them
	byName map[string]*one[T]
	dirty  map[string]struct{} // names of those that changed since the Expander was told
	left   map[string]struct{} // names of those that did not fit
	listed map[string]struct{} // while a list is under way: what it held until now

	// keep returns what is kept of an object, and its size. was is what is kept of the one of that name that is there, and
	// nil if there is none; same tells that it still holds.
	keep func(o metav1.Object, was *one[T]) (now T, size int64, same bool)
	// went is told of the name of one that is gone.
	went func(name string)
}

type one[T any] struct {
	value   T
	uid     types.UID
	version uint64 // the object's resource version, zero if it is no number
	size    int64
}

func newNamed[T any](k *known, most int, keep func(metav1.Object, *one[T]) (T, int64, bool), went func(string)) named[T] {
	return named[T]{k: k, most: most, byName: map[string]*one[T]{}, dirty: map[string]struct{}{}, left: map[string]struct{}{}, keep: keep, went: went}
}

func (s *named[T]) begin() { s.listed = make(map[string]struct{}, len(s.byName)) }

func (s *named[T]) put(o metav1.Object) {
	name := o.GetName()
	if !plainName(name) || !plainUID(o.GetUID()) {
		return
	}
	version, _ := strconv.ParseUint(o.GetResourceVersion(), 10, 64)
	was := s.byName[name]
	if s.listed == nil && was != nil && version < was.version {
		return // an older state that came late
	}
	defer s.list(name)
	value, size, same := s.keep(o, was)
	more, n := size, len(s.byName)+1
	if was != nil {
		if same {
			was.uid, was.version = o.GetUID(), version
			return
		}
		more, n = size-was.size, len(s.byName)
	}
	if !s.k.fits(size, more, n, s.most) {
		s.drop(name)
		if len(s.left) < s.most {
			s.left[name] = struct{}{}
		}
		return
	}
	delete(s.left, name)
	s.byName[name] = &one[T]{value, o.GetUID(), version, size}
	s.k.bytes += more
	s.dirty[name] = struct{}{}
}

// list notes that the list under way, if there is one, holds what is known of a name.
func (s *named[T]) list(name string) {
	if s.listed == nil {
		return
	}
	_, left := s.left[name]
	if left || s.byName[name] != nil {
		s.listed[name] = struct{}{}
	}
}

func (s *named[T]) end() {
	for name := range s.byName {
		if _, there := s.listed[name]; !there {
			s.drop(name)
		}
	}
	maps.DeleteFunc(s.left, func(name string, _ struct{}) bool { _, there := s.listed[name]; return !there })
	s.listed = nil
}

func (s *named[T]) remove(o metav1.Object) {
	name := o.GetName()
	if x := s.byName[name]; x != nil && o.GetUID() != "" && o.GetUID() != x.uid {
		return // a former one of that name
	}
	delete(s.left, name)
	s.drop(name)
}

func (s *named[T]) drop(name string) {
	x := s.byName[name]
	if x == nil {
		return
	}
	s.k.bytes -= x.size
	delete(s.byName, name)
	s.dirty[name] = struct{}{}
	s.went(name)
}

// nodesKnown are the nodes of a cluster.
type nodesKnown struct {
	named[nodeKnown]
	former map[string]struct{} // names of nodes that are gone
}

type nodeKnown struct {
	created time.Time
	// again tells that this CA has known another node of that name.
	again  bool
	object *corev1.Node
}

func newNodes(k *known) nodesKnown {
	s := nodesKnown{former: map[string]struct{}{}}
	former := s.former
	s.named = newNamed(k, maxNodes, func(o metav1.Object, was *one[nodeKnown]) (nodeKnown, int64, bool) {
		_, again := former[o.GetName()]
		n, size := nodeKnown{created: o.GetCreationTimestamp().Time, again: again}, perObject+2*int64(len(o.GetName()))
		if object, ok := o.(*corev1.Node); ok && k.keepObjects {
			object.TypeMeta, object.ManagedFields, object.Status = metav1.TypeMeta{}, nil, corev1.NodeStatus{}
			n.object, size = object, size+weigh(reflect.ValueOf(object))
		}
		if was == nil {
			return n, size, false
		}
		n.again = was.value.again || was.uid != o.GetUID()
		return n, size, was.uid == o.GetUID() && sameNode(was.value.object, n.object)
	}, func(name string) {
		if len(former) >= maxNodes {
			clear(former)
		}
		former[name] = struct{}{}
	})
	return s
}

// sameNode tells whether two states of a node are one but for their versions.
func sameNode(was, now *corev1.Node) bool {
	if was == nil || now == nil {
		return was == now
	}
	a, b := *was, *now
	a.ResourceVersion, b.ResourceVersion = "", ""
	return equality.Semantic.DeepEqual(&a, &b)
}

// newNamespaces are the namespaces of a cluster: their labels.
func newNamespaces(k *known) named[map[string]string] {
	return newNamed(k, maxNamespaces, func(o metav1.Object, was *one[map[string]string]) (map[string]string, int64, bool) {
		labels := o.GetLabels()
		return labels, perObject + 2*int64(len(o.GetName())) + textOf(labels), was != nil && maps.Equal(was.value, labels)
	}, func(string) {})
}
