package svidcache

import (
	"fmt"
	"strings"
	"testing"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
)

// A caller of whom some selectors are known has enough if an entry may match by them, and no entry may match by those that are to come.
func TestEnough(t *testing.T) {
	later := func(s spiffe.Selector) bool { return strings.HasPrefix(s.Value, "container-") }
	have := caller(0, "k8s:ns:shop", "k8s:sa:web", "k8s:pod-uid:1").Selectors
	for _, tt := range []struct {
		name    string
		entries string // the selectors of each, by semicolons
		want    bool
	}{
		{"no entry", "", false},
		{"one by what is known", "k8s:pod-uid:1", true},
		{"one that asks another method too", "k8s:pod-uid:1 unix:uid:0", false},
		{"one beside it that does not", "k8s:pod-uid:1 unix:uid:0; k8s:pod-uid:1", true},
		{"one by another method alone", "unix:uid:0", false},
		{"one of another pod", "k8s:pod-uid:2", false},
		{"one that needs what is to come", "k8s:pod-uid:1 k8s:container-name:web", false},
		{"one by what is to come alone", "k8s:container-name:web", false},
		{"both", "k8s:pod-uid:1; k8s:ns:shop k8s:container-name:web", false},
		{"both, the latter by another method too", "k8s:pod-uid:1; k8s:container-name:web unix:uid:0", false},
		{"one, and one to come of another pod", "k8s:pod-uid:1; k8s:pod-uid:2 k8s:container-name:web", true},
		{"one, and one of a method that has no such selectors", "k8s:pod-uid:1; docker:container-name:web", true},
	} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, nil)
			var entries []*nodev1.Entry
			for i, selectors := range strings.Split(tt.entries, "; ") {
				if selectors != "" {
					entries = append(entries, anEntry(string(rune('a'+i)), "/x", strings.Fields(selectors)...))
				}
			}
			w.start(entries...)
			if got := w.cache.Enough(have, later); got != tt.want {
				t.Errorf("%s: %t, want %t", tt.name, got, tt.want)
			}
			if w.cache.Enough(nil, later) {
				t.Errorf("%s: nothing is enough", tt.name)
			}
		})
	}
	// An entry that has ended neither serves nor is waited for.
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		ends, served := anEntry("a", "/x", "k8s:ns:shop", "k8s:container-name:web"), anEntry("b", "/y", "k8s:ns:shop")
		ends.ExpiresAt = time.Now().Add(time.Hour).Unix()
		w.start(ends, served)
		if w.cache.Enough(have, later) {
			t.Error("the entry is not waited for while it lasts")
		}
		w.jump(2 * time.Hour)
		if !w.cache.Enough(have, later) {
			t.Error("the entry is waited for though it has ended")
		}
	})
}

// What it costs to look through a node's entries, beside matching one caller.
func BenchmarkEnough(b *testing.B) {
	later := func(s spiffe.Selector) bool { return strings.HasPrefix(s.Value, "container-") }
	have := caller(0, "k8s:ns:shop", "k8s:sa:web", "k8s:pod-uid:1", "k8s:pod-label:a:b").Selectors
	w := newWorld(b, nil)
	var entries []*nodev1.Entry
	for i := range 10_000 {
		entries = append(entries, anEntry(fmt.Sprintf("e%d", i), fmt.Sprintf("/x/%d", i), "k8s:ns:shop", fmt.Sprintf("k8s:pod-uid:%d", i), "k8s:pod-label:a:b"))
	}
	w.start(entries...)
	known := map[spiffe.Selector]struct{}{}
	for _, s := range have {
		known[s] = struct{}{}
	}
	b.Run("enough", func(b *testing.B) {
		for b.Loop() {
			if !w.cache.Enough(have, later) {
				b.Fatal("it is not enough")
			}
		}
	})
	b.Run("match", func(b *testing.B) {
		for b.Loop() {
			if len(w.cache.state.Load().match(known, time.Now())) != 1 {
				b.Fatal("no match")
			}
		}
	})
}
