// Package pods gives the pods of a cluster their identities: it holds the pods that the CA has seen at an API server and
// the rules that operators wrote, and works out which registration entries each pod stands for. Nothing of it is stored.
// It knows neither client-go nor the wire; package watch brings the pods, package registry hands the entries on to the
// agents of the nodes that run them.
package pods

import (
	"time"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/template"
)

// A Pod is what the CA has seen of one pod at an API server. It is never changed in place.
type Pod struct {
	// Cluster is the name that the CA's configuration gives the cluster.
	Cluster string
	UID     string
	// NodeName and NodeUID say where the pod is scheduled. NodeUID is empty until the CA has seen the node itself.
	NodeName, NodeUID string

	Namespace, Name, ServiceAccount string
	Labels                          map[string]string
	// NamespaceLabels are those of the pod's namespace.
	NamespaceLabels map[string]string
	// Owners are the pod's owner references. A ReplicaSet that belongs to a Deployment is not looked through.
	Owners []Owner
	// Mirror tells that the pod is a static one of its kubelet's, which nobody asked the API server for.
	Mirror bool
	// Ended tells that all of its containers have ended for good.
	Ended   bool
	Created time.Time

	// Object and Node are the *corev1.Pod and *corev1.Node, if the source was asked to keep them; else nil.
	Object, Node any
}

// An Owner is an owner reference.
type Owner = template.Owner

// A Rule makes registration entries of pods: a templated Identity is one.
type Rule interface {
	// Name says which rule this is, as an operator knows it, such as "Identity cluster-default". It is the same for as long
	// as the rule is there.
	Name() string
	// Expand returns the entries that the pod stands for by this rule, or why it gets none, which becomes an Event on the
	// pod. A pod that the rule does not concern gets neither. It asks nobody and depends on nothing but the pod.
	//
	// Of an entry it sets all but ParentID, ID and CreatedAt, which are the Expander's; Revision rises when the rule is
	// changed; On says which nodes the rule is for.
	Expand(*Pod) ([]*registry.Entry, error)
}
