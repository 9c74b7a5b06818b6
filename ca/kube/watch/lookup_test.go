package watch

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"
)

// byName answers lists of one pod from what the API server has, as a field selector asks; everything else goes on.
func (a *api) byName(answer func(w http.ResponseWriter, key string) bool) {
	a.fail(func(w http.ResponseWriter, r *http.Request, resource string, watch bool) bool {
		name, one := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
		if resource != "pods" || watch || !one {
			return false
		}
		key := strings.Split(r.URL.Path, "/")[4] + "/" + name
		if answer != nil && answer(w, key) {
			return true
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		items := []object{}
		if o := a.objects["pods"][key]; o != nil {
			items = append(items, o)
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(object{"kind": "PodList", "apiVersion": "v1", "metadata": object{"resourceVersion": "1"}, "items": items})
		return true
	})
}

// TestLookup: how the API server has a pod that the watch does not tell of.
func TestLookup(t *testing.T) {
	a := shop(t)
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	pending := pod("web", "pending", "pod-p", "", time.Hour, nil)
	pending["status"] = object{"phase": "Pending", "conditions": []object{{"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available: " + strings.Repeat("x", 1000)}}}
	done := pod("web", "done", "pod-d", "n1", time.Hour, nil)
	done["status"] = object{"phase": "Succeeded"}
	a.apply("pods", pending)
	a.apply("pods", done)
	broken := false
	a.byName(func(w http.ResponseWriter, key string) bool {
		if broken {
			http.Error(w, "no", http.StatusForbidden)
		}
		return broken
	})
	for name, want := range map[string]Found{
		"a":              {State: Unseen, UID: "pod-a", NodeName: "n1"}, // it is known, and so nobody looks it up
		"pending":        {State: Unscheduled, UID: "pod-p", Detail: ("0/1 nodes are available: " + strings.Repeat("x", 1000))[:maxDetail]},
		"done":           {State: Ended, UID: "pod-d", Detail: "Succeeded", NodeName: "n1"},
		"nobody":         {State: Absent},
		"../../nodes":    {State: Absent},
		"x,spec.y=1":     {State: Absent},
		"":               {State: Absent},
		"..":             {State: Absent},
		"Upper":          {State: Absent},
		"very" + longish: {State: Absent},
	} {
		before := a.asked("pods list")
		got, err := h.w.Lookup(t.Context(), "web", name)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", name, got, err, want)
		}
		if asked := a.asked("pods list") > before; asked != plainName(name) {
			t.Errorf("%q: the API server was asked: %t", name, asked)
		}
	}
	h.w.mu.Lock()
	h.w.known.pods.left["pod-a"] = struct{}{}
	h.w.mu.Unlock()
	if got, err := h.w.Lookup(t.Context(), "web", "a"); err != nil || got.State != LeftOut {
		t.Errorf("one without room: %+v, %v", got, err)
	}
	broken = true
	if got, err := h.w.Lookup(t.Context(), "web", "a"); err == nil || !strings.Contains(err.Error(), "cluster prod") || strings.Contains(err.Error(), "very-secret") {
		t.Errorf("an API server that refuses: %+v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.w.Lookup(ctx, "web", "a"); err == nil {
		t.Error("who has gone is answered")
	}
}

var longish = strings.Repeat("y", 300)

// TestPlacement: why a pod that is known belongs to no node.
func TestPlacement(t *testing.T) {
	a := shop(t)
	a.apply("pods", pod("web", "nodeless", "pod-n", "n9", time.Hour, nil))
	a.apply("pods", pod("other", "x", "pod-o", "n1", time.Hour, nil))
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	for uid, want := range map[string]Placement{"pod-a": Placed, "pod-n": NodeUnknown, "pod-o": NamespaceUnknown, "nobody": Placed} {
		if got := h.w.Placement(uid); got != want {
			t.Errorf("%s: %q, want %q", uid, got, want)
		}
	}
	a.delete("nodes", "", "n1")
	h.until(t, "the node is gone", func() bool { return h.pods["pod-a"].NodeUID == "" })
	a.apply("nodes", node("n1", "node-2", 2*time.Hour))
	h.until(t, "a pod of the former node is refused", func() bool { return len(h.refused) > 0 })
	if got := h.w.Placement("pod-a"); got != FormerNode {
		t.Errorf("a pod of a former node: %q", got)
	}
}
