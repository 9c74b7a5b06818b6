package watch

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/test/kubetest"
)

func contextOf(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithCancel(context.WithoutCancel(t.Context()))
}

// shop is a cluster with a node, a namespace and two pods.
func shop(t *testing.T) *api {
	a := newAPI(t)
	a.apply("nodes", node("n1", "node-1", 0))
	a.apply("namespaces", namespace("web", object{"team": "shop"}))
	a.apply("pods", pod("web", "a", "pod-a", "n1", time.Hour, object{"app": "web"}))
	a.apply("pods", pod("web", "b", "pod-b", "n1", time.Hour, object{"app": "web"}))
	return a
}

func TestWhatThereIs(t *testing.T) {
	a := shop(t)
	mirror := pod("web", "static", "pod-s", "n1", time.Hour, nil)
	mirror["metadata"].(object)["annotations"] = object{"kubernetes.io/config.mirror": "x"}
	a.apply("pods", mirror)
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	p := h.pods["pod-a"]
	if p == nil || p.Cluster != "prod" || p.NodeUID != "node-1" || p.NodeName != "n1" || p.Namespace != "web" || p.Name != "a" || p.ServiceAccount != "default" ||
		p.Labels["app"] != "web" || p.NamespaceLabels["team"] != "shop" || len(p.Owners) != 1 || p.Owners[0] != (pods.Owner{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-1", Controller: true}) ||
		!p.Created.Equal(epoch.Add(time.Hour)) || p.Mirror || p.Object != nil {
		t.Errorf("pod a is told as %+v", p)
	}
	if !h.pods["pod-s"].Mirror {
		t.Error("a mirror pod is told as another one")
	}
	if h.told != 3 {
		t.Errorf("told %d pods at first, want 3, each once", h.told)
	}

	// What no rule looks at is not told; what one does, is.
	status := pod("web", "a", "pod-a", "n1", time.Hour, object{"app": "web"})
	status["status"] = object{"phase": "Running", "podIP": "10.0.0.7"}
	a.apply("pods", status)
	a.apply("pods", pod("web", "b", "pod-b", "n1", time.Hour, object{"app": "other"}))
	h.until(t, "b has its new label", func() bool { return h.pods["pod-b"].Labels["app"] == "other" })
	if h.told != 4 {
		t.Errorf("told %d times, want 4", h.told)
	}
	a.apply("namespaces", namespace("web", object{"team": "bakery"}))
	h.until(t, "all have the namespace's new label", func() bool {
		return h.pods["pod-a"].NamespaceLabels["team"] == "bakery" && h.pods["pod-b"].NamespaceLabels["team"] == "bakery"
	})
	a.delete("pods", "web", "a")
	h.until(t, "a is gone", h.has("pod-b", "pod-s"))
	ended := pod("web", "b", "pod-b", "n1", time.Hour, nil)
	ended["status"] = object{"phase": "Succeeded"}
	a.raw("pods", "DELETED", ended) // it left what is watched
	h.until(t, "b has ended", h.has("pod-s"))
}

// A pod whose namespace or node is not known belongs to no node: a rule for namespaces without a label must not take it.
func TestPodsOfWhatIsNotKnown(t *testing.T) {
	a := shop(t)
	a.apply("pods", pod("new", "c", "pod-c", "n2", time.Hour, nil))
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	on := func(uid string) func() bool { return func() bool { return h.pods["pod-c"].NodeUID == uid } }
	if !on("")() {
		t.Error("a pod of an unknown node and namespace has a node")
	}
	a.apply("nodes", node("n2", "node-2", 0))
	a.apply("namespaces", namespace("other", nil))
	h.until(t, "the other pods are told", func() bool { return h.pods["pod-a"].NodeUID == "node-1" })
	if !on("")() {
		t.Error("a pod of an unknown namespace has a node")
	}
	a.apply("namespaces", namespace("new", nil))
	h.until(t, "c has its node", on("node-2"))
	a.delete("nodes", "", "n2")
	h.until(t, "c has none any more", on(""))
	if s := h.w.Status(); s.Untold != 1 || s.Pods != 3 || s.Nodes != 1 || s.Namespaces != 3 {
		t.Errorf("status %+v", s)
	}
}

// Who brings a node under the name of a former one does not get what ran there.
func TestNodeOfTheSameName(t *testing.T) {
	scheduled := func(p object, at_ time.Duration) object {
		p["status"] = object{"phase": "Pending", "conditions": []object{{"type": "PodScheduled", "status": "True", "lastTransitionTime": at(at_)}}}
		return p
	}
	for name, anew := range map[string]func(a *api){
		"seen as it happens": func(a *api) {},
		"while the API server was away": func(a *api) {
			a.forget()
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := shop(t)
			h := start(t, a.srv.URL)
			h.until(t, "a is on its node", func() bool { return h.synced && h.pods["pod-a"].NodeUID == "node-1" })
			a.delete("nodes", "", "n1")
			a.apply("nodes", node("n1", "node-2", 2*time.Hour))
			anew(a)
			// Made before the node, but put on it after; and one made after.
			a.apply("pods", scheduled(pod("web", "waited", "pod-w", "n1", time.Hour, nil), 2*time.Hour))
			a.apply("pods", pod("web", "later", "pod-l", "n1", 3*time.Hour, nil))
			h.until(t, "pods that came to the new node are on it", func() bool {
				return h.pods["pod-w"] != nil && h.pods["pod-w"].NodeUID == "node-2" && h.pods["pod-l"] != nil && h.pods["pod-l"].NodeUID == "node-2"
			})
			h.until(t, "those of the old one are on none", func() bool { return h.pods["pod-a"].NodeUID == "" && h.pods["pod-b"].NodeUID == "" })
			h.until(t, "and it is said why", func() bool { return len(h.refused) == 2 })
			if r := h.refused[0]; !strings.Contains(r.Reason, "former node named n1") || !strings.Contains(r.Reason, "delete the pod") {
				t.Errorf("refused because %q", r.Reason)
			}
			// The new node's kubelet writes that the pod came to it just now.
			a.apply("pods", scheduled(pod("web", "a", "pod-a", "n1", time.Hour, object{"app": "forged"}), 4*time.Hour))
			h.until(t, "the change is told", func() bool { return h.pods["pod-a"].Labels["app"] == "forged" })
			if got := h.pods["pod-a"].NodeUID; got != "" {
				t.Errorf("what the kubelet writes moves the pod to node %q", got)
			}
			// Nor does a pod come to it that ended, and of which the kubelet writes that it runs after all.
			a.delete("pods", "web", "a") // as a watch of those that have not ended tells it
			h.until(t, "it is gone", func() bool { return h.pods["pod-a"] == nil })
			a.apply("pods", scheduled(pod("web", "a", "pod-a", "n1", time.Hour, object{"app": "again"}), 4*time.Hour))
			h.until(t, "it is there again", func() bool { return h.pods["pod-a"] != nil })
			if got := h.pods["pod-a"].NodeUID; got != "" {
				t.Errorf("ending and running again moves the pod to node %q", got)
			}
		})
	}
}

// Clocks of API servers differ a little; where no other node of that name was known, that costs no pod its identity.
func TestClocksDiffer(t *testing.T) {
	a := newAPI(t)
	a.apply("namespaces", namespace("web", nil))
	a.apply("nodes", node("n1", "node-1", time.Hour))
	a.apply("pods", pod("web", "a", "pod-a", "n1", time.Hour-skew, nil))
	a.apply("pods", pod("web", "b", "pod-b", "n1", time.Hour-skew-time.Second, nil))
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	if h.pods["pod-a"].NodeUID != "node-1" || h.pods["pod-b"].NodeUID != "" {
		t.Errorf("nodes %q and %q", h.pods["pod-a"].NodeUID, h.pods["pod-b"].NodeUID)
	}
}

// What was missed is put right by a new list: pods that went, came, and came again under the same name.
func TestTooOldToGoOn(t *testing.T) {
	a := shop(t)
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	away := func(w http.ResponseWriter, _ *http.Request, _ string, _ bool) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	a.fail(away)
	a.delete("pods", "web", "a")
	a.apply("pods", pod("web", "a", "pod-a2", "n1", 2*time.Hour, nil))
	a.delete("pods", "web", "b")
	a.forget()
	if h.has("pod-a", "pod-b"); !h.synced {
		t.Error("a moment without the API server makes known pods unknown")
	}
	a.fail(nil)
	h.until(t, "the new list holds", h.has("pod-a2"))
	h.until(t, "it is on its node", func() bool { return h.pods["pod-a2"].NodeUID == "node-1" })
	if n := a.asked("pods list"); n < 2 {
		t.Errorf("%d lists of pods, want 2 at least", n)
	}
}

// For as long as the API server is away all that is known stays; after a while it counts as old, until there is a new list.
func TestAwayForLong(t *testing.T) {
	a := shop(t)
	h := start(t, a.srv.URL, func(c *Config) { c.follow.LostAfter = 300 * time.Millisecond })
	h.until(t, "all is known", func() bool { return h.synced })
	a.fail(func(w http.ResponseWriter, r *http.Request, _ string, _ bool) bool {
		w.WriteHeader(http.StatusBadGateway)
		return true
	})
	h.until(t, "it counts as old", func() bool { return !h.synced })
	if !h.has("pod-a", "pod-b")() || h.pods["pod-a"].NodeUID != "node-1" {
		t.Error("what is known is lost with the API server")
	}
	if p := h.w.Problem(); !strings.Contains(p, "cluster prod: its pods are not known: ") {
		t.Errorf("problem %q", p)
	}
	before := a.asked("pods list")
	a.delete("pods", "web", "a")
	for a.asked("pods list") < before+30 {
		runtime.Gosched()
		wait(t, 5*time.Millisecond)
	}
	a.fail(nil)
	h.until(t, "all is known again", func() bool { return h.synced && h.has("pod-b")() })
	if p := h.w.Problem(); p != "" {
		t.Errorf("problem %q", p)
	}
	if n := strings.Count(h.log.String(), "level=WARN"); n > 12 {
		t.Errorf("%d warnings about one outage:\n%s", n, h.log)
	}
	if strings.Contains(h.log.String(), kubetest.Token) {
		t.Error("the log holds the token")
	}
}

// A CA that starts first knows of nothing, and of all once the API server is there.
func TestStartsBeforeTheAPIServer(t *testing.T) {
	a := shop(t)
	a.fail(func(http.ResponseWriter, *http.Request, string, bool) bool { panic(http.ErrAbortHandler) })
	h := start(t, a.srv.URL)
	for a.asked("pods list") < 5 {
		wait(t, 5*time.Millisecond)
	}
	if h.told != 0 || h.synced {
		t.Error("something is told")
	}
	if p := h.w.Problem(); !strings.Contains(p, "cluster prod: its pods are not known") {
		t.Errorf("problem %q", p)
	}
	a.fail(nil)
	h.until(t, "all is known", func() bool { return h.synced && h.has("pod-a", "pod-b")() })
}

// wait lets others go on; what is waited for is asked again by the caller.
func wait(t *testing.T, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
		t.Fatal("it takes too long")
	}
}

// A list that breaks off takes nothing away.
func TestHalfAList(t *testing.T) {
	a := shop(t)
	for i := range 1200 {
		a.apply("pods", pod("web", fmt.Sprintf("p%04d", i), fmt.Sprintf("pod-%04d", i), "n1", time.Hour, nil))
	}
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced && len(h.pods) == 1202 })
	broken := 0
	a.fail(func(w http.ResponseWriter, r *http.Request, resource string, watch bool) bool {
		if resource != "pods" || watch || r.URL.Query().Get("continue") == "" {
			return false
		}
		a.mu.Lock()
		broken++
		n := broken
		a.mu.Unlock()
		switch n {
		case 1, 2:
			w.WriteHeader(http.StatusGone) // the continue token is too old
			io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}`)
		case 3:
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[{"meta`)
		default:
			return false
		}
		return true
	})
	a.mu.Lock()
	for k := range a.objects["pods"] {
		if k != "web/p1100" {
			delete(a.objects["pods"], k)
		}
	}
	for i := range 600 { // so that there are two pages, and all before is gone
		a.set("pods", pod("web", fmt.Sprintf("q%04d", i), fmt.Sprintf("podq-%04d", i), "n1", time.Hour, nil))
	}
	a.mu.Unlock()
	a.forget()
	least := 1202
	h.until(t, "the whole list holds", func() bool {
		if h.pods["pod-0000"] != nil {
			least = min(least, len(h.pods))
		}
		return len(h.pods) == 601 && h.pods["pod-1100"] != nil
	})
	if least < 1202 {
		t.Errorf("%d pods were known in between", least)
	}
}

// An older state that comes late changes nothing, nor do bookmarks, and the end of a former pod does not end its successor.
func TestOutOfOrder(t *testing.T) {
	a := shop(t)
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	old := pod("web", "a", "pod-a", "n1", time.Hour, object{"app": "old"})
	old["metadata"].(object)["resourceVersion"] = "7"
	a.raw("pods", "MODIFIED", old)
	a.raw("pods", "BOOKMARK", object{"kind": "Pod", "apiVersion": "v1", "metadata": object{"resourceVersion": "900"}})
	a.raw("pods", "DELETED", pod("web", "a", "pod-before", "n1", time.Hour, nil))
	a.raw("nodes", "DELETED", object{"kind": "Node", "apiVersion": "v1", "metadata": object{"name": "n1", "uid": "node-before", "resourceVersion": "901"}})
	last := pod("web", "c", "pod-c", "n1", time.Hour, nil)
	last["metadata"].(object)["resourceVersion"] = "902"
	a.raw("pods", "ADDED", last)
	h.until(t, "the pod that came last is there", h.has("pod-a", "pod-b", "pod-c"))
	if h.pods["pod-a"].Labels["app"] != "web" || h.pods["pod-c"].NodeUID != "node-1" {
		t.Errorf("a has label %q, c is on %q", h.pods["pod-a"].Labels["app"], h.pods["pod-c"].NodeUID)
	}
}

// The store of the API server is put back to an earlier state: a watch would say nothing of what that state does not have, and of what comes
// until it is where it was. A bookmark tells, and what there is is listed anew.
func TestStorePutBack(t *testing.T) {
	a := shop(t)
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	a.apply("pods", pod("web", "c", "pod-c", "n1", time.Hour, nil))
	h.until(t, "c is there", h.has("pod-a", "pod-b", "pod-c"))
	a.mu.Lock()
	lists := a.requests["pods list"]
	a.version = 50
	delete(a.objects["pods"], "web/c")
	a.history["pods"] = nil
	a.set("pods", pod("web", "d", "pod-d", "n1", time.Hour, nil)) // which no watch from later on shows
	a.version++
	back := a.version
	a.history["pods"] = []event{{1 << 20, "BOOKMARK", object{"kind": "Pod", "apiVersion": "v1", "metadata": object{"resourceVersion": strconv.Itoa(back)}}}}
	a.notify()
	a.mu.Unlock()
	h.until(t, "what there is now is known", h.has("pod-a", "pod-b", "pod-d"))
	if n := a.asked("pods list"); n != lists+1 {
		t.Errorf("%d more lists, want one", n-lists)
	}
	a.mu.Lock()
	a.version = 1 << 21
	a.mu.Unlock()
	a.apply("pods", pod("web", "e", "pod-e", "n1", time.Hour, nil))
	h.until(t, "and what comes", h.has("pod-a", "pod-b", "pod-d", "pod-e"))
}

// Whatever an API server answers, the CA lives, what was known stays, and it all comes right when the API server does.
func TestGarbage(t *testing.T) {
	const head = `{"kind":"PodList","apiVersion":"v1","metadata":`
	for name, text := range map[string]string{
		"nothing":                   ``,
		"no JSON":                   "\x00\xff\xfe{]",
		"half":                      head + `{"resourceVersion":"5"},"items":[{"metadata":{"name":"x"`,
		"another kind":              `{"kind":"SecretList","apiVersion":"v1","metadata":{"resourceVersion":"5"},"items":[{"metadata":{"name":"x"}}]}`,
		"an unknown kind":           `{"kind":"Zebra","apiVersion":"zoo/v1"}`,
		"a status":                  `{"kind":"Status","apiVersion":"v1","status":"Success"}`,
		"no resource version":       head + `{},"items":[]}`,
		"a list that never ends":    head + `{"resourceVersion":"5","continue":"again"},"items":[]}`,
		"deep":                      head + strings.Repeat(`{"a":`, 20_000) + `1` + strings.Repeat(`}`, 20_000) + `}`,
		"text where numbers belong": head + `{"resourceVersion":"5"},"items":[{"metadata":{"uid":"u","generation":"many"},"spec":{"nodeName":7}}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			a := shop(t)
			h := start(t, a.srv.URL)
			h.until(t, "all is known", func() bool { return h.synced })
			answers := func(w http.ResponseWriter, _ *http.Request, resource string, _ bool) bool {
				if resource != "pods" {
					return false
				}
				w.Header().Set("Content-Type", "application/json")
				io.WriteString(w, text)
				return true
			}
			before := a.asked("pods list")
			a.fail(answers)
			a.forget()
			for a.asked("pods list") < before+4 {
				wait(t, 2*time.Millisecond)
			}
			if !h.has("pod-a", "pod-b")() {
				t.Error("what was known is lost")
			}
			a.fail(nil)
			a.apply("pods", pod("web", "c", "pod-c", "n1", time.Hour, nil))
			h.until(t, "the new pod is there", h.has("pod-a", "pod-b", "pod-c"))
		})
	}
}

// Events that cannot be understood lead to a new list.
func TestGarbageInAWatch(t *testing.T) {
	for name, text := range map[string]string{
		"no JSON":         "\x00\xff{]\n",
		"another kind":    `{"type":"ADDED","object":{"kind":"Zebra","apiVersion":"zoo/v1"}}` + "\n",
		"an unknown type": `{"type":"EATEN","object":{"kind":"Pod","apiVersion":"v1","metadata":{"uid":"x"}}}` + "\n",
		"an error":        `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","code":500,"message":"` + strings.Repeat("no", 100_000) + `"}}` + "\n",
		"no object":       `{"type":"ADDED"}` + "\n",
		"a large event":   `{"type":"ADDED","object":"` + strings.Repeat("x", 17<<20) + `"}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			a := shop(t)
			h := start(t, a.srv.URL)
			h.until(t, "all is known", func() bool { return h.synced })
			lists := a.asked("pods list")
			a.fail(func(w http.ResponseWriter, _ *http.Request, resource string, watch bool) bool {
				if resource != "pods" || !watch {
					return false
				}
				w.Header().Set("Content-Type", "application/json")
				io.WriteString(w, text)
				return true
			})
			for a.asked("pods list") < lists+2 && a.asked("pods watch") < 6 {
				wait(t, 2*time.Millisecond)
			}
			a.fail(nil)
			a.apply("pods", pod("web", "c", "pod-c", "n1", time.Hour, nil))
			h.until(t, "the new pod is there", h.has("pod-a", "pod-b", "pod-c"))
			if len(h.log.String()) > 100_000 {
				t.Errorf("%d bytes of log", len(h.log.String()))
			}
		})
	}
}

// What is too large or too much is left out and said; the rest is served.
func TestTooLarge(t *testing.T) {
	a := shop(t)
	labels := object{}
	for i := range 40 {
		labels[fmt.Sprintf("label-%d", i)] = strings.Repeat("x", 40<<10)
	}
	a.apply("pods", pod("web", "large", "pod-large", "n1", time.Hour, labels))
	a.apply("namespaces", namespace("large", labels))
	h := start(t, a.srv.URL)
	h.until(t, "the others are known", func() bool { return h.synced && h.has("pod-a", "pod-b")() })
	left := func(n int) {
		t.Helper()
		if p := h.w.Problem(); !strings.Contains(p, fmt.Sprintf("%d objects are too large or too many", n)) {
			t.Errorf("problem %q, want %d objects", p, n)
		}
	}
	left(2)
	team := func(name string) {
		a.apply("namespaces", namespace("web", object{"team": name}))
		h.until(t, "what came before is known, too", func() bool { return h.pods["pod-a"].NamespaceLabels["team"] == name })
	}
	labels["one"] = "more"
	a.apply("namespaces", namespace("large", labels))
	team("bakery")
	left(2) // it is the same one
	a.delete("namespaces", "", "large")
	team("shop")
	left(1)
	a.delete("pods", "web", "large")
	a.apply("pods", pod("web", "b", "pod-b", "n1", time.Hour, labels))
	h.until(t, "a pod that became too large is gone", h.has("pod-a"))
}

// Objects are kept for who asks, without what no rule looks at.
func TestKeepObjects(t *testing.T) {
	a := shop(t)
	h := start(t, a.srv.URL, func(c *Config) { c.KeepObjects = true })
	h.until(t, "all is known", func() bool { return h.synced })
	o, _ := h.pods["pod-a"].Object.(*corev1.Pod)
	n, _ := h.pods["pod-a"].Node.(*corev1.Node)
	if o == nil || o.Spec.Containers[0].Image != "i" || o.Status.Phase != "" || n == nil || string(n.UID) != "node-1" {
		t.Fatalf("kept %+v and %+v", o, n)
	}
	busy := node("n1", "node-1", 0)
	busy["status"] = object{"phase": "Running"}
	a.apply("nodes", busy) // a heartbeat
	status := pod("web", "a", "pod-a", "n1", time.Hour, object{"app": "web"})
	status["status"] = object{"phase": "Running", "podIP": "10.0.0.7"}
	a.apply("pods", status)
	labelled := node("n1", "node-1", 0)
	labelled["metadata"].(object)["labels"] = object{"zone": "a"}
	a.apply("nodes", labelled)
	h.until(t, "the node's label is told", func() bool { return h.pods["pod-b"].Node.(*corev1.Node).Labels["zone"] == "a" })
	if h.told != 4 {
		t.Errorf("told %d times, want 4: two pods, and both again for the node's label", h.told)
	}
}

// 5,000 pods at once, on a hundred nodes.
func TestFlood(t *testing.T) {
	const n = 5000
	a := shop(t)
	for i := range 100 {
		a.apply("nodes", node(fmt.Sprintf("node%02d", i), fmt.Sprintf("uid%02d", i), 0))
	}
	h := start(t, a.srv.URL)
	h.until(t, "all is known", func() bool { return h.synced })
	began := time.Now()
	a.mu.Lock()
	for i := range n {
		a.set("pods", pod("web", fmt.Sprintf("p%d", i), fmt.Sprintf("flood-%d", i), fmt.Sprintf("node%02d", i%100), time.Hour, object{"app": "web", "pod-template-hash": "x"}))
	}
	a.notify()
	a.mu.Unlock()
	h.until(t, "all are told", func() bool { return len(h.pods) == n+2 })
	t.Logf("%d pods told %v after they were made; about %d bytes are counted for each", n, time.Since(began).Round(time.Millisecond), h.w.Status().Bytes/int64(n))
	for uid, p := range h.pods {
		if p.NodeUID == "" {
			t.Fatalf("pod %s is on no node", uid)
		}
	}
}
