package watch

import (
	"maps"
	"reflect"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"github.com/signet-id/signet/ca/kube/pods"
)

// shared makes pods that share what they have in common: pods of one Deployment have the same labels and the same owner,
// and all pods of a namespace its name. It remembers a bounded number of things of bounded size; to forget them costs memory only.
type shared struct {
	text   map[string]string
	labels map[string]map[string]string
	owners map[string][]pods.Owner
	key    []byte
}

const (
	maxText, maxSets = 100_000, 20_000
	// maxTextBytes and maxSetBytes are what one of them may have. The keys of labels, and ten labels, have less. What is larger would
	// outlive here the pods that somebody made of it.
	maxTextBytes, maxSetBytes = 320, 1 << 10
)

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
		size += perOwner
		p.Mirror = p.Mirror || r.APIVersion == "v1" && r.Kind == "Node" // a kubelet's own pods have their node as owner
	}
	if len(o.OwnerReferences) > 0 {
		owners, ok := s.owners[string(s.key)]
		if !ok {
			for _, r := range o.OwnerReferences {
				owners = append(owners, pods.Owner{APIVersion: s.string(r.APIVersion), Kind: s.string(r.Kind), Name: r.Name, Controller: r.Controller != nil && *r.Controller})
			}
			remember(s.owners, string(s.key), owners, maxSets, maxSetBytes)
		}
		p.Owners = owners
	}
	if keepObject {
		kept := &corev1.Pod{ObjectMeta: o.ObjectMeta, Spec: o.Spec}
		kept.ManagedFields = nil
		p.Object = kept
		size += weigh(reflect.ValueOf(kept))
	}
	return p, size
}

func (s *shared) string(t string) string {
	if known, ok := s.text[t]; ok {
		return known
	}
	remember(s.text, t, t, maxText, maxTextBytes)
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
	remember(s.labels, string(s.key), out, maxSets, maxSetBytes)
	return out
}

func remember[V any](m map[string]V, k string, v V, most, bytes int) {
	if len(k) > bytes {
		return
	}
	if len(m) >= most {
		clear(m)
	}
	m[k] = v
}

// weigh returns about how many bytes of memory are behind a value. On the wire an element of a list may have a fiftieth of it.
func weigh(v reflect.Value) int64 {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			return 0
		}
		return int64(v.Elem().Type().Size()) + weigh(v.Elem())
	case reflect.String:
		return int64(v.Len())
	case reflect.Slice:
		n := int64(v.Cap()) * int64(v.Type().Elem().Size())
		if flat(v.Type().Elem().Kind()) {
			return n
		}
		for i := range v.Len() {
			n += weigh(v.Index(i))
		}
		return n
	case reflect.Map:
		n := int64(v.Len()) * (int64(v.Type().Key().Size()+v.Type().Elem().Size()) + 16)
		for r := v.MapRange(); r.Next(); {
			n += weigh(r.Key()) + weigh(r.Value())
		}
		return n
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return 0 // behind it is what all share
		}
		n := int64(0)
		for i := range v.NumField() {
			n += weigh(v.Field(i))
		}
		return n
	}
	return 0
}

// flat tells whether nothing is behind values of a kind.
func flat(k reflect.Kind) bool { return k >= reflect.Bool && k <= reflect.Complex128 }

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
