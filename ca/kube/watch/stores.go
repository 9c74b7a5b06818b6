package watch

import (
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
	shared *shared
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
	if !ok || object.UID == "" || object.Spec.NodeName == "" || ended(object) {
		return
	}
	uid := string(object.UID)
	version, _ := strconv.ParseUint(object.ResourceVersion, 10, 64)
	was := s.byUID[uid]
	if s.listed != nil {
		s.listed[uid] = struct{}{}
	} else if was != nil && version < was.version {
		return // an older state that came late
	}
	pod, size := s.shared.pod(s.k.cluster, object, s.k.keepObjects)
	if was == nil {
		if !s.k.fits(size, size, len(s.byUID)+1, maxPods) {
			s.leave(uid)
			return
		}
		delete(s.left, uid)
		s.byUID[uid] = &podKnown{pod: pod, version: version, bound: boundAt(object), size: size}
		s.k.bytes += size
		s.dirty[uid] = struct{}{}
		delete(s.gone, uid)
		return
	}
	was.version = version
	if same(was.pod, pod) {
		return
	}
	if !s.k.fits(size, size-was.size, len(s.byUID), maxPods) {
		s.drop(uid)
		s.leave(uid)
		return
	}
	pod.NodeUID, pod.NamespaceLabels, pod.Node = was.pod.NodeUID, was.pod.NamespaceLabels, was.pod.Node
	s.k.bytes += size - was.size
	was.pod, was.size = pod, size
	s.dirty[uid] = struct{}{}
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
	s.k.bytes -= p.size
	delete(s.byUID, uid)
	delete(s.dirty, uid)
	s.gone[uid] = struct{}{}
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

// nodesKnown are the nodes of a cluster by name.
type nodesKnown struct {
	k      *known
	byName map[string]*nodeKnown
	former map[string]struct{} // names of nodes that are gone
	dirty  map[string]struct{}
	left   int
	listed map[string]struct{}
}

type nodeKnown struct {
	uid     string
	created time.Time
	// again tells that this CA has known another node of that name.
	again   bool
	object  *corev1.Node
	version uint64
	size    int64
}

func (s *nodesKnown) begin() { s.listed, s.left = make(map[string]struct{}, len(s.byName)), 0 }

func (s *nodesKnown) put(o metav1.Object) {
	name := o.GetName()
	n := &nodeKnown{uid: string(o.GetUID()), created: o.GetCreationTimestamp().Time, size: perObject + 2*int64(len(name))}
	if name == "" || n.uid == "" {
		return
	}
	n.version, _ = strconv.ParseUint(o.GetResourceVersion(), 10, 64)
	was := s.byName[name]
	if s.listed != nil {
		s.listed[name] = struct{}{}
	} else if was != nil && n.version < was.version {
		return
	}
	if object, ok := o.(*corev1.Node); ok && s.k.keepObjects {
		object.TypeMeta, object.ManagedFields, object.Status = metav1.TypeMeta{}, nil, corev1.NodeStatus{}
		n.object, n.size = object, n.size+int64(object.Size())
	}
	_, again := s.former[name]
	n.again = again
	more := n.size
	if was != nil {
		n.again = was.again || was.uid != n.uid
		if was.uid == n.uid {
			if n.object = kept(was.object, n.object); n.object == was.object {
				was.version = n.version
				return
			}
		}
		more -= was.size
	}
	if !s.k.fits(n.size, more, len(s.byName)+1, maxNodes) {
		s.left++
		s.drop(name)
		return
	}
	s.byName[name] = n
	s.k.bytes += more
	s.dirty[name] = struct{}{}
}

// kept returns the object that is there already if the new one says the same.
func kept(was, now *corev1.Node) *corev1.Node {
	if was == nil || now == nil {
		return now
	}
	a, b := *was, *now
	a.ResourceVersion, b.ResourceVersion = "", ""
	if equal(&a, &b) {
		return was
	}
	return now
}

func (s *nodesKnown) end() {
	for name := range s.byName {
		if _, there := s.listed[name]; !there {
			s.drop(name)
		}
	}
	s.listed = nil
}

func (s *nodesKnown) remove(o metav1.Object) {
	if n := s.byName[o.GetName()]; n != nil && (o.GetUID() == "" || string(o.GetUID()) == n.uid) {
		s.drop(o.GetName())
	}
}

func (s *nodesKnown) drop(name string) {
	n := s.byName[name]
	if n == nil {
		return
	}
	s.k.bytes -= n.size
	delete(s.byName, name)
	s.dirty[name] = struct{}{}
	if len(s.former) >= maxNodes {
		clear(s.former)
	}
	s.former[name] = struct{}{}
}

// namespacesKnown are the labels of a cluster's namespaces.
type namespacesKnown struct {
	k      *known
	byName map[string]*namespaceKnown
	dirty  map[string]struct{}
	left   int
	listed map[string]struct{}
}

type namespaceKnown struct {
	labels  map[string]string
	version uint64
	size    int64
}

func (s *namespacesKnown) begin() { s.listed, s.left = make(map[string]struct{}, len(s.byName)), 0 }

func (s *namespacesKnown) put(o metav1.Object) {
	name := o.GetName()
	if name == "" {
		return
	}
	n := &namespaceKnown{labels: o.GetLabels(), size: perObject + 2*int64(len(name)) + textOf(o.GetLabels())}
	n.version, _ = strconv.ParseUint(o.GetResourceVersion(), 10, 64)
	was := s.byName[name]
	if s.listed != nil {
		s.listed[name] = struct{}{}
	} else if was != nil && n.version < was.version {
		return
	}
	more := n.size
	if was != nil {
		if sameMap(was.labels, n.labels) {
			was.version = n.version
			return
		}
		more -= was.size
	}
	if !s.k.fits(n.size, more, len(s.byName)+1, maxNamespaces) {
		s.left++
		s.drop(name)
		return
	}
	s.byName[name] = n
	s.k.bytes += more
	s.dirty[name] = struct{}{}
}

func (s *namespacesKnown) end() {
	for name := range s.byName {
		if _, there := s.listed[name]; !there {
			s.drop(name)
		}
	}
	s.listed = nil
}

func (s *namespacesKnown) remove(o metav1.Object) { s.drop(o.GetName()) }

func (s *namespacesKnown) drop(name string) {
	if n := s.byName[name]; n != nil {
		s.k.bytes -= n.size
		delete(s.byName, name)
		s.dirty[name] = struct{}{}
	}
}
