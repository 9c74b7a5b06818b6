package spireresources

import (
	"fmt"
	"log/slog"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// TestMoreResourcesThanAreRead: what is over the bound is said, and comes in when there is room again.
func TestMoreResourcesThanAreRead(t *testing.T) {
	s := newResources("Thing", slog.New(slog.DiscardHandler), func(u *unstructured.Unstructured) string { return u.GetName() }, func() {})
	thing := func(i int) *unstructured.Unstructured {
		u := &unstructured.Unstructured{Object: map[string]any{}}
		u.SetName(fmt.Sprint("t", i))
		return u
	}
	list := func(from, to int) {
		s.Begin()
		for i := from; i < to; i++ {
			s.Put(thing(i))
		}
		s.End()
	}
	list(0, maxResources)
	if s.isOver() || s.Hungry() {
		t.Errorf("as many as are read: over %t, hungry %t", s.isOver(), s.Hungry())
	}
	list(0, maxResources+1)
	if !s.isOver() || s.Hungry() {
		t.Errorf("one more: over %t, hungry %t", s.isOver(), s.Hungry())
	}
	s.Delete(thing(0))
	if !s.Hungry() {
		t.Error("with room for it, nobody asks for the one that is over")
	}
	list(1, maxResources+1)
	if _, ok := s.one(fmt.Sprint("t", maxResources)); !ok || s.isOver() || s.Hungry() {
		t.Errorf("the one that was over is there: %t; over %t, hungry %t", ok, s.isOver(), s.Hungry())
	}
}
