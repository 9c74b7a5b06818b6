package spireresources

import (
	"maps"
	"slices"
	"sync"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Bounds of what is kept of EndpointSlices.
const (
	maxSlices       = 200_000
	maxSliceMembers = 1000 // the API server takes no more
)

// services know behind which Services each pod is, by EndpointSlices. They implement follow.Store.
type services struct {
	place
	changed func()

	mu     sync.Mutex
	serial uint64                         // rises with each change
	moved  map[string]bool                // UIDs of pods whose Services changed since take
	whole  bool                           // all were listed once
	slices map[string]slice               // by namespace/name
	byPod  map[string]map[string]struct{} // names of slices, by UID of a pod
	listed map[string]bool
}

// A slice says that pods are behind a Service.
type slice struct {
	namespace, service string
	pods               []string // UIDs, sorted
}

func newServices(changed func()) *services {
	return &services{place: place{moved: changed}, changed: changed, slices: map[string]slice{}, byPod: map[string]map[string]struct{}{}, moved: map[string]bool{}}
}

// known tells whether all were listed once.
func (s *services) known() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.whole
}

// take returns the UIDs of the pods whose Services changed since it was called last.
func (s *services) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Collect(maps.Keys(s.moved))
	clear(s.moved)
	return out
}

func (s *services) version() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serial
}

// dnsNames returns the names of the Services that the pod is behind, as the cluster's DNS has them, in order. Services are in their
// pods' namespace: a slice of another one was written by hand, by somebody with no say over the pod.
func (s *services) dnsNames(pod, namespace, domain string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for key := range s.byPod[pod] {
		x := s.slices[key]
		if x.namespace != namespace {
			continue
		}
		names := []string{x.service, x.service + "." + x.namespace, x.service + "." + x.namespace + ".svc"}
		if domain != "" {
			names = append(names, x.service+"."+x.namespace+".svc."+domain)
		}
		out = append(out, names...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Begin implements follow.Store.
func (s *services) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed = map[string]bool{}
}

// End implements follow.Store.
func (s *services) End() {
	s.mu.Lock()
	for key := range maps.Clone(s.slices) {
		if !s.listed[key] {
			s.drop(key)
		}
	}
	s.listed, s.whole = nil, true
	s.mu.Unlock()
	s.changed()
}

// Put implements follow.Store.
func (s *services) Put(o metav1.Object) {
	x, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		return
	}
	s.saw(o)
	now := slice{namespace: x.Namespace, service: x.Labels[discoveryv1.LabelServiceName]}
	for i, e := range x.Endpoints {
		if i < maxSliceMembers && e.TargetRef != nil && e.TargetRef.Kind == "Pod" && e.TargetRef.UID != "" {
			now.pods = append(now.pods, string(e.TargetRef.UID))
		}
	}
	slices.Sort(now.pods)
	now.pods = slices.Compact(now.pods)
	key := x.Namespace + "/" + x.Name
	s.mu.Lock()
	if s.listed != nil {
		s.listed[key] = true
	}
	was, there := s.slices[key]
	if now.service == "" || len(now.pods) == 0 {
		s.drop(key)
	} else if (there || len(s.slices) < maxSlices) && !(there && was.service == now.service && slices.Equal(was.pods, now.pods)) {
		s.drop(key)
		s.slices[key] = now
		s.serial++
		for _, uid := range now.pods {
			s.moved[uid] = true
			if s.byPod[uid] == nil {
				s.byPod[uid] = map[string]struct{}{}
			}
			s.byPod[uid][key] = struct{}{}
		}
	}
	s.mu.Unlock()
	s.changed()
}

// Delete implements follow.Store.
func (s *services) Delete(o metav1.Object) {
	s.saw(o)
	s.mu.Lock()
	s.drop(o.GetNamespace() + "/" + o.GetName())
	s.mu.Unlock()
	s.changed()
}

// drop forgets one. mu is held.
func (s *services) drop(key string) {
	was, there := s.slices[key]
	if !there {
		return
	}
	s.serial++
	delete(s.slices, key)
	for _, uid := range was.pods {
		s.moved[uid] = true
		delete(s.byPod[uid], key)
		if len(s.byPod[uid]) == 0 {
			delete(s.byPod, uid)
		}
	}
}
