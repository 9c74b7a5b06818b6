package watch

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"github.com/signet-id/signet/ca/kube/pods"
)

// shared makes pods that share what they have in common: pods of one Deployment have the same labels and the same owner,
// and all pods of a namespace its name. It remembers a bounded number of things; to forget them costs memory only.
type shared struct {
	text   map[string]string
	labels map[string]map[string]string
	owners map[string][]pods.Owner
	key    []byte
}

const maxShared = 100_000

func newShared() *shared {
	return &shared{text: map[string]string{}, labels: map[string]map[string]string{}, owners: map[string][]pods.Owner{}}
}

// pod returns what rules look at in a pod, and about how many bytes it takes if it shares nothing.
func (s *shared) pod(cluster string, o *corev1.Pod, keepObject bool) (*pods.Pod, int64) {
	_, mirror := o.Annotations[corev1.MirrorPodAnnotationKey]
	p := &pods.Pod{Cluster: cluster, UID: string(o.UID), NodeName: s.string(o.Spec.NodeName), Namespace: s.string(o.Namespace), Name: o.Name,
		ServiceAccount: s.string(o.Spec.ServiceAccountName), Labels: s.set(o.Labels), Mirror: mirror, Created: o.CreationTimestamp.Time}
	size := perObject + int64(len(p.UID)+len(p.Name)+len(p.NodeName)+len(p.Namespace)+len(p.ServiceAccount)) + textOf(o.Labels)
	s.key = s.key[:0]
	for _, r := range o.OwnerReferences {
		controller := "\x00"
		if r.Controller != nil && *r.Controller {
			controller = "\x01"
		}
		for _, t := range []string{r.APIVersion, r.Kind, r.Name, controller} {
			s.key = append(append(s.key, t...), 0)
			size += int64(len(t))
		}
		p.Mirror = p.Mirror || r.APIVersion == "v1" && r.Kind == "Node" // a kubelet's own pods have their node as owner
	}
	if len(o.OwnerReferences) > 0 {
		owners, ok := s.owners[string(s.key)]
		if !ok {
			for _, r := range o.OwnerReferences {
				owners = append(owners, pods.Owner{APIVersion: s.string(r.APIVersion), Kind: s.string(r.Kind), Name: r.Name, Controller: r.Controller != nil && *r.Controller})
			}
			remember(s.owners, string(s.key), owners)
		}
		p.Owners = owners
	}
	if keepObject {
		kept := &corev1.Pod{ObjectMeta: o.ObjectMeta, Spec: o.Spec}
		kept.ManagedFields = nil
		p.Object = kept
		size += int64(kept.Size())
	}
	return p, size
}

func (s *shared) string(t string) string {
	if known, ok := s.text[t]; ok {
		return known
	}
	remember(s.text, t, t)
	return t
}

func (s *shared) set(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	s.key = s.key[:0]
	for _, k := range slices.Sorted(maps.Keys(m)) {
		s.key = append(append(append(append(s.key, k...), 0), m[k]...), 0)
	}
	if known, ok := s.labels[string(s.key)]; ok {
		return known
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[s.string(k)] = s.string(v)
	}
	remember(s.labels, string(s.key), out)
	return out
}

func remember[V any](m map[string]V, k string, v V) {
	if len(m) >= maxShared {
		clear(m)
	}
	m[k] = v
}

func textOf(m map[string]string) int64 {
	n := int64(0)
	for k, v := range m {
		n += int64(len(k) + len(v) + 32)
	}
	return n
}

// same tells whether two states of a pod are one for every rule, but for what comes from node and namespace.
func same(a, b *pods.Pod) bool {
	if a.Namespace != b.Namespace || a.Name != b.Name || a.NodeName != b.NodeName || a.ServiceAccount != b.ServiceAccount || a.Mirror != b.Mirror ||
		!a.Created.Equal(b.Created) || !maps.Equal(a.Labels, b.Labels) || !slices.Equal(a.Owners, b.Owners) {
		return false
	}
	if a.Object == nil || b.Object == nil {
		return a.Object == b.Object
	}
	x, y := *a.Object.(*corev1.Pod), *b.Object.(*corev1.Pod)
	x.ResourceVersion, y.ResourceVersion = "", ""
	x.Generation, y.Generation = 0, 0
	return equality.Semantic.DeepEqual(&x, &y)
}
