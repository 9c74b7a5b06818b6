package spireresources

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// maxResources bounds how many resources of one kind are read; what is over is left out, and logged.
const maxResources = 10_000

// absentFor is how long a kind that was there has to be unknown to the API server until its resources count as deleted: an
// API server that begins may not know it yet.
const absentFor = time.Minute

// resources are those of one kind, each in the form that parse makes of it. They implement follow.Store and follow.Hungry.
type resources[T any] struct {
	place
	kind    string
	log     *slog.Logger
	parse   func(*unstructured.Unstructured) T
	changed func()

	mu       sync.Mutex
	byName   map[string]held[T]
	serial   uint64 // rises when a spec changes, or one comes or goes
	listed   map[string]bool
	complete bool
	gone     time.Time // since when the API server does not know the kind; zero: it does
	over     bool      // there are more
	freed    bool      // and may be room for them
}

type held[T any] struct {
	version string // of the spec
	value   T
	status  any    // as it was seen last
	at      string // the resource version of that
}

func newResources[T any](kind string, log *slog.Logger, parse func(*unstructured.Unstructured) T, changed func()) *resources[T] {
	return &resources[T]{place: place{moved: func() {}}, kind: kind, log: log, parse: parse, changed: changed, byName: map[string]held[T]{}}
}

// all returns them in order of name, with a number that rises whenever one changes, and whether that is all there are.
func (s *resources[T]) all() (out []T, serial uint64, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(s.byName)) {
		out = append(out, s.byName[name].value)
	}
	return out, s.serial, s.complete
}

func (s *resources[T]) one(name string) (T, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, ok := s.byName[name]
	return x.value, ok
}

// status returns the status of one as it was seen last, and the resource version of that.
func (s *resources[T]) status(name string) seenStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return seenStatus{s.byName[name].status, s.byName[name].at}
}

type seenStatus struct {
	status any
	at     string
}

// absent tells that the API server does not know the kind.
func (s *resources[T]) absent(now time.Time) {
	s.mu.Lock()
	if s.gone.IsZero() {
		s.gone = now
	}
	if s.complete && len(s.byName) > 0 && now.Sub(s.gone) < absentFor {
		s.mu.Unlock()
		return
	}
	if len(s.byName) > 0 {
		s.log.Warn("the API server does not know the kind any more; its resources count as deleted", "kind", s.kind, "resources", len(s.byName))
		s.serial++
	}
	clear(s.byName)
	first := !s.complete
	s.complete = true
	s.mu.Unlock()
	if first {
		s.log.Info("the API server does not know the kind; there are no resources of it", "kind", s.kind)
	}
	s.changed()
}

// isOver tells whether there are more than are read.
func (s *resources[T]) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// isAbsent tells whether the API server does not know the kind, or did not when it was asked last.
func (s *resources[T]) isAbsent() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.gone.IsZero()
}

// Begin implements follow.Store.
func (s *resources[T]) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed, s.over, s.freed = map[string]bool{}, false, false
}

// Hungry implements follow.Hungry.
func (s *resources[T]) Hungry() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over && s.freed
}

// Put implements follow.Store.
func (s *resources[T]) Put(o metav1.Object) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return
	}
	s.saw(o)
	name := u.GetName()
	version := fmt.Sprint(u.GetUID(), "/", u.GetGeneration(), "/", u.GetDeletionTimestamp())
	s.mu.Lock()
	if s.listed != nil {
		s.listed[name] = true
	}
	was, there := s.byName[name]
	was.status, was.at = u.Object["status"], u.GetResourceVersion()
	switch {
	case there && was.version == version:
		s.byName[name] = was
		s.mu.Unlock()
		return
	case !there && len(s.byName) >= maxResources:
		first := !s.over
		s.over = true
		s.mu.Unlock()
		if first {
			s.log.Error("too many resources of one kind; what is over is left out", "kind", s.kind, "most", maxResources)
		}
		return
	}
	s.byName[name] = held[T]{version, s.parse(u), was.status, was.at}
	s.serial++
	s.mu.Unlock()
	s.changed()
}

// End implements follow.Store.
func (s *resources[T]) End() {
	s.mu.Lock()
	for name := range s.byName {
		if !s.listed[name] {
			delete(s.byName, name)
			s.serial++
			s.freed = true
		}
	}
	s.listed, s.complete, s.gone = nil, true, time.Time{}
	s.mu.Unlock()
	s.changed()
}

// Delete implements follow.Store.
func (s *resources[T]) Delete(o metav1.Object) {
	s.saw(o)
	s.mu.Lock()
	if _, there := s.byName[o.GetName()]; there {
		delete(s.byName, o.GetName())
		s.serial++
		s.freed = true
	}
	s.mu.Unlock()
	s.changed()
}
