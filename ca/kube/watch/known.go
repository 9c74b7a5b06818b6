package watch

import (
	"maps"
	"slices"
	"time"

	"github.com/signet-id/signet/ca/kube/pods"
)

// Bounds of what is kept of one cluster. Kubernetes itself is made for 150,000 pods, 5,000 nodes and 10,000 namespaces.
const (
	maxPods       = 300_000
	maxNodes      = 30_000
	maxNamespaces = 100_000
	maxObject     = 1 << 20   // bytes of one object as it is kept
	maxBytes      = 512 << 20 // of all of them
	perObject     = 300       // what one takes besides its text
	perOwner      = 100       // what an owner of one takes besides its text
	// namespaceShare is the part of the pods and of the bytes that those of one namespace may take: who may make pods in one takes no
	// room from those of the others. Kubernetes itself is made for 3,000 pods in a namespace.
	namespaceShare = 4
)

// known is what is known of a cluster. Its Watcher's lock is held over everything.
type known struct {
	cluster     string
	keepObjects bool
	pods        podsKnown
	nodes       nodesKnown
	namespaces  named[map[string]string]
	bytes       int64
}

func newKnown(cluster string, keepObjects bool) *known {
	k := &known{cluster: cluster, keepObjects: keepObjects}
	k.pods = podsKnown{k: k, byUID: map[string]*podKnown{}, dirty: map[string]struct{}{}, gone: map[string]struct{}{}, left: map[string]struct{}{}, shares: map[string]share{}, shared: newShared()}
	k.nodes, k.namespaces = newNodes(k), newNamespaces(k)
	return k
}

// fits tells whether there is room for one more of n, or for another form of one, which takes more bytes by more.
func (k *known) fits(size, more int64, n, most int) bool {
	return size <= maxObject && k.bytes+more <= maxBytes && n <= most
}

// take returns what the Expander is to be told: pods that are new or changed or whose node or namespace is another one, UIDs of pods that are
// gone, and pods that are new among those that belong to no node.
func (k *known) take() (changed []*pods.Pod, gone []string, misplaced []pods.Refusal) {
	look := func(uid string, p *podKnown) {
		_, dirty := k.pods.dirty[uid]
		node, labels, object, why := k.place(p)
		if !dirty && p.pod.NodeUID == node && maps.Equal(p.pod.NamespaceLabels, labels) && p.pod.Node == object && p.why == why {
			return
		}
		told := *p.pod
		told.NodeUID, told.NamespaceLabels, told.Node = node, labels, object
		p.pod = &told
		changed = append(changed, p.pod)
		if why != "" && p.why != why {
			misplaced = append(misplaced, pods.Refusal{Pod: p.pod, Reason: why})
		}
		p.why = why
	}
	if len(k.nodes.dirty)+len(k.namespaces.dirty) > 0 {
		for uid, p := range k.pods.byUID {
			_, dirty := k.pods.dirty[uid]
			_, node := k.nodes.dirty[p.pod.NodeName]
			_, namespace := k.namespaces.dirty[p.pod.Namespace]
			if dirty || node || namespace {
				look(uid, p)
			}
		}
	} else {
		for uid := range k.pods.dirty {
			if p := k.pods.byUID[uid]; p != nil {
				look(uid, p)
			}
		}
	}
	gone = slices.Collect(maps.Keys(k.pods.gone))
	clear(k.pods.gone)
	clear(k.pods.dirty)
	clear(k.nodes.dirty)
	clear(k.namespaces.dirty)
	return changed, gone, misplaced
}

// skew is what the clocks of the API servers may differ by.
const skew = 2 * time.Second

// place returns the UID of the node that the pod was put on. It is empty if that node is not known, if the pod's namespace is not, so
// that no rule takes a namespace for one without labels, and if the node came after the pod was put on one of that name:
// who brings a node under the name of a former one does not get what ran there. See docs/decisions/0037.
func (k *known) place(p *podKnown) (node string, labels map[string]string, object any, why string) {
	namespace := k.namespaces.byName[p.pod.Namespace]
	if namespace == nil {
		return "", nil, nil, ""
	}
	n := k.nodes.byName[p.pod.NodeName]
	if n == nil {
		return "", namespace.value, nil, ""
	}
	since := n.value.created
	if !n.value.again {
		since = since.Add(-skew)
	}
	if p.bound.Before(since) {
		return "", namespace.value, nil, "it was put on a former node named " + p.pod.NodeName + ", and the node of that name is another one; delete the pod, so that it is made and scheduled anew"
	}
	if n.value.object != nil {
		object = n.value.object
	}
	return string(n.uid), namespace.value, object, ""
}

func (k *known) count(s *Status) {
	s.Pods, s.Nodes, s.Namespaces, s.Bytes = len(k.pods.byUID), len(k.nodes.byName), len(k.namespaces.byName), k.bytes
	s.Left = len(k.pods.left) + len(k.nodes.left) + len(k.namespaces.left)
	for _, p := range k.pods.byUID {
		if p.pod.NodeUID == "" {
			s.Untold++
		}
	}
}
