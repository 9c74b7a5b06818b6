package spireresources

import (
	"maps"
	"slices"
	"sync"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/ca/registry"
)

// Bounds of what is kept of EndpointSlices.
const (
	maxSlices       = 200_000
	maxSliceMembers = 1000 // the API server takes no more
	// maxMembers bounds the pods that all slices name. It is several Services for each pod that Kubernetes is made for.
	maxMembers = 1_000_000
	// namespaceShare is the part of both that the slices of one namespace may take.
	namespaceShare = 4
	maxUIDBytes    = 64     // those of API servers have 36
	maxLeft        = 10_000 // that are counted
)

// services know behind which Services each pod is, by EndpointSlices. They implement follow.Store.
type services struct {
	place
	changed func()

	mu     sync.Mutex
	serial uint64                         // rises with each change
	moved  map[member]bool                // pods whose Services changed since take
	whole  bool                           // all were listed once
	slices map[string]slice               // by namespace/name
	byPod  map[member]map[string]struct{} // names of slices, by pod
	listed map[string]bool                // of those that are held
	taken  share
	shares map[string]share    // by namespace
	left   map[string]struct{} // for which there is no room
}

// A member is a pod as a slice of its namespace names it. A slice of another one was written by hand, by somebody with no say over the pod.
type member struct{ namespace, uid string }

// A share is what some slices take.
type share struct{ slices, members int }

// A slice says that pods are behind a Service.
type slice struct {
	namespace, service string
	pods               []string // UIDs, sorted
}

func newServices(changed func()) *services {
	return &services{place: place{moved: changed}, changed: changed, slices: map[string]slice{}, byPod: map[member]map[string]struct{}{}, moved: map[member]bool{}, shares: map[string]share{}, left: map[string]struct{}{}}
}

// known tells whether all were listed once.
func (s *services) known() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.whole
}

// take returns the pods whose Services changed since it was called last.
func (s *services) take() []member {
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
// pods' namespace.
func (s *services) dnsNames(pod, namespace, domain string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	behind := map[string]struct{}{}
	for key := range s.byPod[member{namespace, pod}] {
		behind[s.slices[key].service] = struct{}{}
		if len(behind) > registry.MaxDNSNames { // the pod gets none of them
			break
		}
	}
	var out []string
	for service := range behind {
		out = append(out, service, service+"."+namespace, service+"."+namespace+".svc")
		if domain != "" {
			out = append(out, service+"."+namespace+".svc."+domain)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Begin implements follow.Store.
func (s *services) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed = map[string]bool{}
	clear(s.left)
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
		if t := e.TargetRef; i < maxSliceMembers && t != nil && t.Kind == "Pod" && t.UID != "" && len(t.UID) <= maxUIDBytes && (t.Namespace == "" || t.Namespace == x.Namespace) {
			now.pods = append(now.pods, string(e.TargetRef.UID))
		}
	}
	slices.Sort(now.pods)
	now.pods = slices.Compact(now.pods)
	key := x.Namespace + "/" + x.Name
	s.mu.Lock()
	was, there := s.slices[key]
	if !there || was.service != now.service || !slices.Equal(was.pods, now.pods) {
		s.drop(key)
		if now.service != "" && len(now.pods) > 0 {
			s.hold(key, now)
		}
	}
	if _, held := s.slices[key]; held && s.listed != nil {
		s.listed[key] = true
	}
	s.mu.Unlock()
	s.changed()
}

// hold keeps one, if there is room. mu is held.
func (s *services) hold(key string, x slice) {
	has := s.shares[x.namespace]
	if s.taken.slices >= maxSlices || s.taken.members+len(x.pods) > maxMembers || has.slices >= maxSlices/namespaceShare || has.members+len(x.pods) > maxMembers/namespaceShare {
		if len(s.left) < maxLeft {
			s.left[key] = struct{}{}
		}
		return
	}
	s.slices[key] = x
	s.count(x, 1)
	s.serial++
	for _, uid := range x.pods {
		m := member{x.namespace, uid}
		s.moved[m] = true
		if s.byPod[m] == nil {
			s.byPod[m] = map[string]struct{}{}
		}
		s.byPod[m][key] = struct{}{}
	}
}

// count notes that n more are held that are like x. mu is held.
func (s *services) count(x slice, n int) {
	add := func(to share) share { return share{to.slices + n, to.members + n*len(x.pods)} }
	s.taken = add(s.taken)
	if s.shares[x.namespace] = add(s.shares[x.namespace]); s.shares[x.namespace].slices == 0 {
		delete(s.shares, x.namespace)
	}
}

// leftOut returns for how many there is no room.
func (s *services) leftOut() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.left)
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
	delete(s.left, key)
	was, there := s.slices[key]
	if !there {
		return
	}
	s.serial++
	delete(s.slices, key)
	s.count(was, -1)
	for _, uid := range was.pods {
		m := member{was.namespace, uid}
		s.moved[m] = true
		delete(s.byPod[m], key)
		if len(s.byPod[m]) == 0 {
			delete(s.byPod, m)
		}
	}
}
