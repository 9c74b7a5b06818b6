package watch

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
)

// A State is how the API server has a pod of which the Expander was not told.
type State string

// The states.
const (
	Absent      State = "absent"      // there is none of that name
	Unscheduled State = "unscheduled" // it is on no node yet
	Ended       State = "ended"       // its containers have ended for good
	Unseen      State = "unseen"      // it is on a node, and the watch has not told of it yet
	LeftOut     State = "left_out"    // there was no room for it
)

// Found is what Lookup finds out.
type Found struct {
	State State
	UID   string
	// Detail says more: why it is not scheduled, as the scheduler says, or how it ended.
	Detail   string
	NodeName string
}

const (
	lookupTimeout = 5 * time.Second
	maxDetail     = 512
)

// Lookup asks the API server for one pod, which takes no more than the permission to list pods. It is for operators who ask
// about a pod that is not known.
func (w *Watcher) Lookup(ctx context.Context, namespace, name string) (Found, error) {
	if !plainName(namespace) || !plainName(name) {
		return Found{State: Absent}, nil // no pod has such a name, and it is not put into a request
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	list, err := w.c.Client.Pods(namespace).List(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String(), Limit: 1})
	if err != nil {
		return Found{}, fmt.Errorf("asking the API server of cluster %s for the pod: %w", w.c.Client.Cluster, err)
	}
	if len(list.Items) == 0 {
		return Found{State: Absent}, nil
	}
	p := &list.Items[0]
	f := Found{State: Unseen, UID: string(p.UID), NodeName: p.Spec.NodeName}
	switch {
	case ended(p):
		f.State, f.Detail = Ended, string(p.Status.Phase)
	case p.Spec.NodeName == "":
		f.State = Unscheduled
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Status != corev1.ConditionTrue {
				f.Detail = strings.ToValidUTF8(c.Message[:min(len(c.Message), maxDetail)], "")
			}
		}
	default:
		w.mu.Lock()
		defer w.mu.Unlock()
		if _, left := w.known.pods.left[f.UID]; left {
			f.State = LeftOut
		}
	}
	return f, nil
}

// plainName tells whether text has the characters of names in Kubernetes.
func plainName(text string) bool {
	return text != "" && len(text) <= 253 && strings.Trim(text, "abcdefghijklmnopqrstuvwxyz0123456789.-") == "" && text != "." && text != ".."
}

// maxUIDBytes bounds a UID: those of Kubernetes have 36.
const maxUIDBytes = 64

// plainUID tells whether a UID has the characters of UIDs in Kubernetes.
func plainUID(uid types.UID) bool {
	return uid != "" && len(uid) <= maxUIDBytes && strings.Trim(string(uid), "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") == ""
}

// A Placement is why a pod that is known belongs to no node.
type Placement string

// The placements. Placed is that of a pod that does.
const (
	Placed           Placement = ""
	NamespaceUnknown Placement = "namespace_unknown"
	NodeUnknown      Placement = "node_unknown"
	FormerNode       Placement = "former_node" // another node has the name of the one that it was put on
)

// Placement says why a pod belongs to no node.
func (w *Watcher) Placement(uid string) Placement {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.known.pods.byUID[uid]
	if p == nil {
		return Placed
	}
	switch node, _, _, why := w.known.place(p); {
	case node != "":
		return Placed
	case why != "":
		return FormerNode
	case w.known.namespaces.byName[p.pod.Namespace] == nil:
		return NamespaceUnknown
	}
	return NodeUnknown
}
