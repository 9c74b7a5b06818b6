package spireresources

import (
	"sync"

	"github.com/signet-id/signet/ca/kube/pods"
)

// lastPod remembers what a set made of one pod: the Expander asks each rule for the same pod, one after the other.
type lastPod struct {
	mu      sync.Mutex
	pod     *pods.Pod
	version uint64 // of the services that were looked at
	results []result
}

func (l *lastPod) expand(s *set, p *pods.Pod) []result {
	l.mu.Lock()
	defer l.mu.Unlock()
	version := s.services.version()
	if l.pod != p || l.version != version || l.results == nil {
		l.pod, l.version, l.results = p, version, s.expand(p)
	}
	return l.results
}
