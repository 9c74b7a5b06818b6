package k8s

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-id/signet/agent/workloadattest/container"
	"github.com/signet-id/signet/spiffe"
)

// waiting is the status of a container that the kubelet is about to start.
func waiting(name string) object {
	return object{"name": name, "image": "registry.example/" + name + ":1", "imageID": "", "state": object{"waiting": object{"reason": "ContainerCreating"}}}
}

func pending(p object) object {
	p["status"].(object)["phase"] = "Pending"
	return p
}

// Before the kubelet tells of a container, its pod's lasting selectors are known, and returned if they will do. Whoever is asked sees
// these alone, and that those of containers are still to come.
func TestThePodIsKnownBeforeItsContainers(t *testing.T) {
	lasting := []string{"node-name:node-1", "ns:shop", "pod-label:app:web", "pod-name:web", "pod-uid:" + podA, "sa:sa-web"}
	for name, containers := range map[string][]object{
		"no container yet": nil, "one that is being made": {waiting("web")}, "one beside that runs": {running("proxy", id("b")), waiting("web")},
	} {
		n := newNode(t)
		n.has(pending(podObject(podA, "shop", "web", containers...)), podObject(podB, "shop", "other", running("x", id("e"))))
		got, more, err := n.method().gradually(within(t, 10*time.Second), in(podA, id("a")), func(have []spiffe.Selector, later func(spiffe.Selector) bool) bool {
			if !slices.Equal(values(have), lasting) {
				t.Errorf("%s: asked about %q", name, values(have))
			}
			for _, s := range []string{"container-name:web", "container-image:x", "pod-image:x", "pod-image-count:1", "pod-init-image:x", "pod-init-image-count:0"} {
				if !later(spiffe.Selector{Type: Name, Value: s}) {
					t.Errorf("%s does not come later", s)
				}
			}
			for _, s := range append(lasting, "pod-owner:ReplicaSet:x", "pod-owner-uid:ReplicaSet:x", "namespace-label:a:b") {
				if later(spiffe.Selector{Type: Name, Value: s}) {
					t.Errorf("%s comes later", s)
				}
			}
			return true
		})
		if err != nil || !more || !slices.Equal(values(got), lasting) {
			t.Errorf("%s: %q, more %t, %v", name, values(got), more, err)
		}
	}
}

// If the pod will not do, the container is waited for as ever, and asked about with each list until then.
func TestThePodWillNotDo(t *testing.T) {
	n := newNode(t)
	n.has(pending(podObject(podA, "shop", "web", waiting("web"))))
	asked := 0
	got, more, err := n.method().gradually(within(t, 20*time.Second), in(podA, id("a")), func([]spiffe.Selector, func(spiffe.Selector) bool) bool {
		if asked++; asked == 3 {
			n.has(podObject(podA, "shop", "web", running("web", id("a"))))
		}
		return false
	})
	if err != nil || more || !slices.Contains(values(got), "container-name:web") || !slices.Contains(values(got), "pod-image-count:1") || asked < 3 {
		t.Errorf("%q, more %t, %v; asked %d times", values(got), more, err, asked)
	}
}

// Nobody is served as a pod whose containers all run or have ended, that ends, that the kubelet does not have, or that others say the container is of.
func TestNoPodForWhoIsInNoneOfItsContainers(t *testing.T) {
	crashed := object{"name": "web", "containerID": "containerd://" + id("c"), "state": object{"waiting": object{"reason": "CrashLoopBackOff"}},
		"lastState": object{"terminated": object{"exitCode": 1, "containerID": "containerd://" + id("c")}}}
	terminated := object{"name": "web", "containerID": "containerd://" + id("c"), "state": object{"terminated": object{"exitCode": 0}}}
	deleted := pending(podObject(podA, "shop", "web", waiting("web")))
	deleted["metadata"].(object)["deletionTimestamp"] = "2026-11-28T20:00:00Z"
	failed := podObject(podA, "shop", "web", waiting("web"))
	failed["status"].(object)["phase"] = "Failed"
	labels := map[string]string{}
	for i := range maxLabels + 1 {
		labels[string(rune('a'+i%26))+string(rune('a'+i/26%26))+string(rune('a'+i/676))] = ""
	}
	excess := pending(podObject(podA, "shop", "web", waiting("web")))
	excess["metadata"].(object)["labels"] = labels
	starting := pending(podObject(podA, "shop", "web", waiting("web")))
	for _, tt := range []struct {
		name  string
		pods  []object
		where container.Container
		want  error // nil: it is waited for in vain
	}{
		{"its container runs, and this is another one", []object{podObject(podA, "shop", "web", running("web", id("b")))}, in(podA, id("a")), nil},
		{"its container waits to be started again", []object{podObject(podA, "shop", "web", crashed)}, in(podA, id("a")), nil},
		{"its container has ended", []object{podObject(podA, "shop", "web", terminated)}, in(podA, id("a")), nil},
		{"the process is in the one that ended", []object{podObject(podA, "shop", "web", terminated, waiting("other"))}, in(podA, id("c")), ErrNotFound},
		{"it is being deleted", []object{deleted}, in(podA, id("a")), nil},
		{"it has failed", []object{failed}, in(podA, id("a")), ErrNotFound},
		{"it has too many labels", []object{excess}, in(podA, id("a")), errExcess},
		{"the kubelet has another pod", []object{starting}, in(podB, id("a")), nil},
		{"no cgroup names the pod", []object{starting}, container.Container{ID: id("a"), Path: "/../" + id("a")}, nil},
		{"the container is another pod's", []object{starting, podObject(podB, "shop", "other", running("x", id("a")))}, in(podA, id("a")), ErrMismatch},
	} {
		n := newNode(t)
		n.has(tt.pods...)
		got, more, err := n.method().gradually(within(t, 500*time.Millisecond), tt.where, func([]spiffe.Selector, func(spiffe.Selector) bool) bool {
			t.Errorf("%s: asked whether the pod will do", tt.name)
			return true
		})
		want := tt.want
		if want == nil {
			want = context.DeadlineExceeded
		}
		if !errors.Is(err, want) || more || len(got) > 0 {
			t.Errorf("%s: %q, more %t, %v; want %v", tt.name, values(got), more, err, want)
		}
	}
}

// Labels of the namespace belong to what must be known: without them nothing is early.
func TestTheNamespacesLabelsComeFirst(t *testing.T) {
	n := newNode(t)
	n.has(pending(podObject(podA, "shop", "web", waiting("web"))))
	var away atomic.Bool
	away.Store(true)
	n.space = func(w http.ResponseWriter, _ *http.Request) {
		if away.Load() {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		text(toJSON(object{"kind": "Namespace", "metadata": object{"name": "shop", "labels": object{"team": "payments"}}}))(w, nil)
	}
	wanted := func(c *Config) { c.NamespaceLabels, c.APIServer = []string{"team"}, n.server.URL }
	all := func([]spiffe.Selector, func(spiffe.Selector) bool) bool { return true }
	if got, more, err := n.method(wanted).gradually(within(t, 500*time.Millisecond), in(podA, id("a")), all); err == nil || more || len(got) > 0 {
		t.Errorf("without the labels: %q, more %t, %v", values(got), more, err)
	}
	away.Store(false)
	if got, more, err := n.method(wanted).gradually(within(t, 10*time.Second), in(podA, id("a")), all); err != nil || !more || !slices.Contains(values(got), "namespace-label:team:payments") {
		t.Errorf("with them: %q, more %t, %v", values(got), more, err)
	}
}
