package k8s

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/agent/workloadattest/container"
	"github.com/signet-id/signet/workloadapi/peer"
)

func TestSelectorsAreThoseOfSPIRE(t *testing.T) {
	n := newNode(t)
	web := podObject(podA, "shop", "web", running("web", id("a")), running("proxy", id("b")))
	web["metadata"].(object)["ownerReferences"] = []object{{"kind": "ReplicaSet", "name": "web-7d4b", "uid": "90aa"}}
	web["status"].(object)["initContainerStatuses"] = []object{running("setup", id("c"))}
	web["status"].(object)["ephemeralContainerStatuses"] = []object{running("debug", id("d"))}
	n.has(web, podObject(podB, "shop", "other", running("web", id("e"))))
	m := n.method()
	digest := "@sha256:" + strings.Repeat("1", 64)
	pod := []string{"ns:shop", "sa:sa-web", "node-name:node-1", "pod-name:web", "pod-uid:" + podA, "pod-image-count:2", "pod-init-image-count:1",
		"pod-image:registry.example/web:1", "pod-image:registry.example/web" + digest, "pod-image:registry.example/proxy:1", "pod-image:registry.example/proxy" + digest,
		"pod-init-image:registry.example/setup:1", "pod-init-image:registry.example/setup" + digest, "pod-label:app:web",
		"pod-owner:ReplicaSet:web-7d4b", "pod-owner-uid:ReplicaSet:90aa"}
	for name, id := range map[string]string{"web": id("a"), "proxy": id("b"), "setup": id("c"), "debug": id("d")} {
		got, err := m.selectors(within(t, 10*time.Second), in(podA, id))
		want := slices.Concat(pod, []string{"container-name:" + name, "container-image:registry.example/" + name + ":1", "container-image:registry.example/" + name + digest})
		slices.Sort(want)
		if err != nil || !slices.Equal(values(got), want) {
			t.Errorf("%s: %q, %v;\nwant %q", name, values(got), err, want)
		}
		for _, s := range got {
			if err := s.Check(); err != nil {
				t.Error(err)
			}
		}
	}
	// A process in the pod's cgroup and in none of its containers has the pod's.
	slices.Sort(pod)
	if got, err := m.selectors(within(t, 10*time.Second), container.Container{PodUID: podA, Path: "/kubepods/pod" + podA}); err != nil || !slices.Equal(values(got), pod) {
		t.Errorf("the pod alone: %q, %v", values(got), err)
	}
	// The agent's own container is known by its name.
	if got, err := m.selectors(within(t, 10*time.Second), container.Container{PodUID: podA, Name: "proxy"}); err != nil || !slices.Contains(values(got), "container-name:proxy") {
		t.Errorf("by name: %q, %v", values(got), err)
	}
	// One beside the agent's is known by its id alone.
	if got, err := m.selectors(within(t, 10*time.Second), container.Container{ID: id("e"), Path: "/../" + id("e")}); err != nil || !slices.Contains(values(got), "pod-name:other") {
		t.Errorf("by id: %q, %v", values(got), err)
	}
	if lists := n.lists.Load(); lists != 1 {
		t.Errorf("the kubelet was asked %d times, want once", lists)
	}
}

// A list as a kubelet of Kubernetes 1.35 has it, recorded by test/kube: what runs matches, an init container that is done and one
// that waits to be started again do not.
func TestRecordedList(t *testing.T) {
	recorded, err := os.ReadFile("testdata/pods-1.35.json")
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t)
	n.says(text(string(recorded)))
	m := n.method(func(c *Config) { c.SkipKubeletVerification, c.NodeName = true, "node1" })
	for _, tt := range []struct {
		pod, id string
		want    []string // nil: it never matches
	}{
		{"7bf77862-20eb-4199-bf41-2ef9c75e0fed", "a58611fdba1d02dad410f425e0bb919dd5702a53418c3b50494546137b64c6b2", []string{"pod-name:guaranteed", "container-name:main", "pod-label:qos:guaranteed", "sa:web", "node-name:node1"}},
		{"1fb7ca6a-27e7-44e7-ad8c-8fd97429163b", "b329de75b1bf1629accd9fd26d3b9bac06fd10d85313c202e9094a091ccdafbe", []string{"pod-name:besteffort", "ns:shop", "container-image:signet.test/podagent:dev"}},
		{"a153916f-37fa-4468-b07a-508a5ee8a3b9", "f2d95d45b055865cbc8cafa8b59f84386c799fdc4369fd1ea0da81a107cdbeb8", []string{"container-name:after", "pod-init-image-count:1"}},
		{"a153916f-37fa-4468-b07a-508a5ee8a3b9", "84e492db71fb7a4fd2e78d652988bef912f5e1bd77f098026c5ab537c26854d2", nil},
		{"4eb29c87-0680-42cf-bfb7-60e712bebb4a", "618d0ce6b86234e845874e2b78f0e4cc42ace3788797dbb2d761e034f37dbcd2", nil},
	} {
		got, err := m.selectors(within(t, 20*time.Second), in(tt.pod, tt.id))
		if tt.want == nil {
			if !errors.Is(err, ErrNotFound) || len(got) > 0 {
				t.Errorf("%s: %q, %v", tt.id, values(got), err)
			}
			continue
		}
		for _, w := range tt.want {
			if err != nil || !slices.Contains(values(got), w) {
				t.Errorf("%s: %q, %v; want %q among them", tt.id, values(got), err, w)
			}
		}
	}
}

// Which pod a container is of must be said by cgroup and kubelet alike, and the container must run.
func TestWhatNeverMatches(t *testing.T) {
	state := func(o object, state object) object {
		o["state"] = state
		o["lastState"] = object{"terminated": object{"exitCode": 1, "containerID": o["containerID"]}}
		return o
	}
	ended := func(phase string) object {
		p := podObject(podA, "shop", "job", running("main", id("a")))
		p["status"].(object)["phase"] = phase
		return p
	}
	for _, tt := range []struct {
		name  string
		pods  []object
		where container.Container
		want  error
		text  string
	}{
		{"a container of another pod", []object{podObject(podA, "shop", "a", running("x", id("a"))), podObject(podB, "shop", "b", running("x", id("b")))},
			in(podA, id("b")), ErrMismatch, "of pod " + podB},
		{"a container of a pod that the kubelet does not have", []object{podObject(podB, "shop", "b", running("x", id("b")))}, in(podA, id("b")), ErrMismatch, ""},
		{"a pod that succeeded", []object{ended("Succeeded")}, in(podA, id("a")), ErrNotFound, "does not run"},
		{"a pod that failed", []object{ended("Failed")}, in(podA, id("a")), ErrNotFound, ""},
		{"a pod that failed, by its uid", []object{ended("Failed")}, container.Container{PodUID: podA}, ErrNotFound, "has ended"},
		{"an unknown container of a pod that failed", []object{ended("Failed")}, in(podA, id("c")), ErrNotFound, "has ended"},
		{"a container that ended", []object{podObject(podA, "shop", "a", state(running("x", id("a")), object{"terminated": object{"exitCode": 0, "containerID": "containerd://" + id("a")}}))},
			in(podA, id("a")), ErrNotFound, "does not run"},
		{"a container that is about to be made anew", []object{podObject(podA, "shop", "a", state(running("x", id("a")), object{"waiting": object{"reason": "CrashLoopBackOff"}}))},
			in(podA, id("a")), ErrNotFound, "does not run"},
		{"a container that ended before it ran", []object{podObject(podA, "shop", "a", state(running("x", id("a")), object{}))}, in(podA, id("a")), ErrNotFound, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.has(tt.pods...)
			got, err := n.method().selectors(within(t, 10*time.Second), tt.where)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || len(got) > 0 {
				t.Errorf("%q, %v; want %v with %q", values(got), err, tt.want, tt.text)
			}
		})
	}
}

// A container that the kubelet has seen made, and not yet running, is one that it does not know yet.
func TestContainerThatIsBeingStarted(t *testing.T) {
	n := newNode(t)
	n.says(func(w http.ResponseWriter, r *http.Request) {
		c := running("web", id("a"))
		if n.lists.Load() < 3 {
			c["state"] = object{"waiting": object{"reason": "ContainerCreating"}}
			c["lastState"] = object{"terminated": object{"containerID": "containerd://" + id("b")}}
		}
		text(podListOf(podObject(podA, "shop", "web", c)))(w, r)
	})
	if got, err := n.method().selectors(within(t, 20*time.Second), in(podA, id("a"))); err != nil || !slices.Contains(values(got), "container-name:web") {
		t.Errorf("%q, %v", values(got), err)
	}
	if lists := n.lists.Load(); lists != 3 {
		t.Errorf("%d lists, want 3", lists)
	}
}

// The container of before a restart is no more, and the one after it is known as soon as the kubelet knows it.
func TestRestart(t *testing.T) {
	n := newNode(t)
	n.has(podObject(podA, "shop", "a", running("x", id("a"))))
	m := n.method()
	if got, err := m.selectors(within(t, 10*time.Second), in(podA, id("a"))); err != nil || !slices.Contains(values(got), "container-name:x") {
		t.Fatalf("before: %q, %v", values(got), err)
	}
	after := running("x", id("b"))
	after["lastState"] = object{"terminated": object{"containerID": "containerd://" + id("a")}}
	n.has(podObject(podA, "shop", "a", after))
	if got, err := m.selectors(within(t, 10*time.Second), in(podA, id("b"))); err != nil || !slices.Contains(values(got), "container-name:x") {
		t.Errorf("the new one: %q, %v", values(got), err)
	}
	if got, err := m.selectors(within(t, time.Second), in(podA, id("a"))); err == nil || len(got) > 0 {
		t.Errorf("the old one: %q, %v", values(got), err)
	}
}

// A pod that is made anew under its name is another pod.
func TestPodOfTheSameName(t *testing.T) {
	n := newNode(t)
	before := podObject(podA, "shop", "db-0", running("db", id("a")))
	before["metadata"].(object)["labels"] = object{"version": "1"}
	before["metadata"].(object)["deletionTimestamp"] = "2026-11-28T20:00:00Z"
	after := podObject(podB, "shop", "db-0", running("db", id("b")))
	after["metadata"].(object)["labels"] = object{"version": "2"}
	n.has(before, after)
	m := n.method()
	for uid, want := range map[string]string{podA: "pod-label:version:1", podB: "pod-label:version:2"} {
		got, err := m.selectors(within(t, 10*time.Second), in(uid, map[string]string{podA: id("a"), podB: id("b")}[uid]))
		if err != nil || !slices.Contains(values(got), want) || !slices.Contains(values(got), "pod-uid:"+uid) {
			t.Errorf("%s: %q, %v; want %q", uid, values(got), err, want)
		}
	}
	// By name the one counts that stays, until the other is gone; by uid each.
	ctx := within(t, 10*time.Second)
	if p, err := m.Pod(ctx, Reference{Namespace: "shop", Name: "db-0"}); err != nil || p.UID != podB || !slices.Contains(values(p.Selectors), "pod-label:version:2") {
		t.Errorf("by name: %+v, %v", p, err)
	}
	if p, err := m.Pod(ctx, Reference{UID: podA}); err != nil || p.UID != podA || p.Name != "db-0" {
		t.Errorf("by uid: %+v, %v", p, err)
	}
	n.has(after)
	if _, err := m.Pod(ctx, Reference{Namespace: "shop", Name: "db-0", UID: podA}); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), podB) {
		t.Errorf("the name with the uid of before: %v", err)
	}
	if _, err := m.Pod(ctx, Reference{UID: podA}); !errors.Is(err, ErrNotFound) {
		t.Errorf("the uid of before: %v", err)
	}
}

func TestPodReference(t *testing.T) {
	n := newNode(t)
	done := podObject(podB, "shop", "job", running("x", id("b")))
	done["status"].(object)["phase"] = "Succeeded"
	n.has(podObject(podA, "shop", "web", running("x", id("a"))), done)
	m := n.method()
	for _, tt := range []struct {
		name string
		ref  Reference
		want error // nil: podA
		text string
	}{
		{"name", Reference{Namespace: "shop", Name: "web"}, nil, ""},
		{"uid", Reference{UID: podA}, nil, ""},
		{"both", Reference{Namespace: "shop", Name: "web", UID: podA}, nil, ""},
		{"another namespace", Reference{Namespace: "bank", Name: "web"}, ErrNotFound, `"web" in namespace "bank"`},
		{"another name", Reference{Namespace: "shop", Name: "wob"}, ErrNotFound, ""},
		{"another uid", Reference{UID: podB[:35] + "5"}, ErrNotFound, ""},
		{"name and another uid", Reference{Namespace: "shop", Name: "web", UID: podB}, ErrMismatch, ""},
		{"uid and an unknown name", Reference{Namespace: "shop", Name: "wob", UID: podA}, ErrMismatch, "the one with that uid is web"},
		{"ended", Reference{UID: podB}, ErrNotFound, "has ended"},
		{"ended, by name", Reference{Namespace: "shop", Name: "job"}, ErrNotFound, ""},
		{"nothing", Reference{}, ErrNotFound, "is named by"},
		{"half a name", Reference{Name: "web"}, ErrNotFound, "is named by"},
		{"half a name and a uid", Reference{Namespace: "shop", UID: podA}, ErrNotFound, "is named by"},
	} {
		p, err := m.Pod(within(t, 10*time.Second), tt.ref)
		if tt.want == nil {
			if err != nil || p.UID != podA || p.Namespace != "shop" || p.Name != "web" || !slices.Contains(values(p.Selectors), "sa:sa-web") || slices.Contains(values(p.Selectors), "container-name:x") {
				t.Errorf("%s: %+v, %v", tt.name, p, err)
			}
			continue
		}
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || len(p.Selectors) > 0 {
			t.Errorf("%s: %+v, %v; want %v with %q", tt.name, p, err, tt.want, tt.text)
		}
	}
}

// A new container's first call comes before the kubelet knows it. It waits, with all others for the same lists.
func TestWaitsForTheKubelet(t *testing.T) {
	n := newNode(t)
	n.says(func(w http.ResponseWriter, r *http.Request) {
		if n.lists.Load() < 3 {
			text(podListOf(podObject(podA, "shop", "web")))(w, r)
			return
		}
		text(podListOf(podObject(podA, "shop", "web", running("web", id("a")))))(w, r)
	})
	m := n.method()
	ctx := within(t, 30*time.Second)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if got, err := m.selectors(ctx, in(podA, id("a"))); err != nil || !slices.Contains(values(got), "container-name:web") {
				t.Errorf("%q, %v", values(got), err)
			}
		})
	}
	wg.Wait()
	if lists := n.lists.Load(); lists < 3 || lists > 4 {
		t.Errorf("%d lists for 50 who waited for the third", lists)
	}
	// One that never comes is waited for until the caller's time is over.
	begun := time.Now()
	got, err := m.selectors(within(t, time.Second), in(podA, id("b")))
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "does not know it yet") || !strings.Contains(err.Error(), id("b")) || len(got) > 0 {
		t.Errorf("a sandbox: %q, %v", values(got), err)
	}
	if took := time.Since(begun); took < 900*time.Millisecond {
		t.Errorf("gave up after %s", took)
	}
	// What may be none of Kubernetes is looked up once, and is no failure.
	for _, path := range []string{"/docker/" + id("c"), "/../../../../system.slice/docker-" + id("c") + ".scope"} {
		lists := n.lists.Load()
		if got, err := m.selectors(within(t, 10*time.Second), container.Container{ID: id("c"), Path: path, Runtime: "docker"}); err != nil || got != nil {
			t.Errorf("%s: %q, %v", path, values(got), err)
		}
		if more := n.lists.Load() - lists; more != 1 {
			t.Errorf("%s: %d lists, want 1", path, more)
		}
	}
	// One beside the agent's own in its pod is waited for.
	if got, err := m.selectors(within(t, 300*time.Millisecond), container.Container{ID: id("c"), Path: "/../" + id("c")}); !errors.Is(err, context.DeadlineExceeded) || got != nil {
		t.Errorf("beside the agent: %q, %v", values(got), err)
	}
}

// Who may make a pod, or write its status, takes nothing from the pods of others, whatever is in it.
func TestHostilePods(t *testing.T) {
	many := object{}
	for i := range maxLabels + 1 {
		many[fmt.Sprint("l", i)] = "v"
	}
	owners := make([]object, maxOwners+1)
	for i := range owners {
		owners[i] = object{"kind": "Job", "name": fmt.Sprint(i), "uid": fmt.Sprint(i)}
	}
	statuses := make([]object, maxContainers+1)
	for i := range statuses {
		statuses[i] = running(fmt.Sprint(i), "")
	}
	for _, tt := range []struct {
		name string
		make func(pod object)
		want string // what attestation of a process of the hostile pod says
	}{
		{"too many labels", func(p object) { p["metadata"].(object)["labels"] = many }, "too many labels"},
		{"too many owners", func(p object) { p["metadata"].(object)["ownerReferences"] = owners }, "too many labels"},
		{"too many containers", func(p object) { p["status"].(object)["containerStatuses"] = statuses }, "too many labels"},
		{"as large as it can be", func(p object) { p["spec"].(object)["x"] = strings.Repeat("\x01", 3<<19) }, ""},
		{"the container of another", func(p object) {
			p["status"].(object)["containerStatuses"] = []object{running("web", id("a")), running("b", id("b"))}
		}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			hostile := podObject(podB, "evil", "b", running("b", id("b")))
			tt.make(hostile)
			for _, order := range [][]object{{hostile, podObject(podA, "shop", "web", running("web", id("a")))}, {podObject(podA, "shop", "web", running("web", id("a"))), hostile}} {
				n := newNode(t)
				n.has(order...)
				m := n.method()
				got, err := m.selectors(within(t, 20*time.Second), in(podA, id("a")))
				if err != nil || !slices.Contains(values(got), "ns:shop") || slices.Contains(values(got), "ns:evil") {
					t.Errorf("the other pod: %q, %v", values(got), err)
				}
				got, err = m.selectors(within(t, 20*time.Second), in(podB, id("b")))
				if tt.want == "" && (err != nil || !slices.Contains(values(got), "ns:evil")) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || len(got) > 0) {
					t.Errorf("the hostile pod: %q, %v; want %q", values(got), err, tt.want)
				}
				// A container whose cgroup does not tell the pod is nobody's if two claim it.
				got, err = m.selectors(within(t, 20*time.Second), in("", id("a")))
				if strings.HasPrefix(tt.name, "the container") == (err == nil) || slices.Contains(values(got), "ns:evil") {
					t.Errorf("without a pod: %q, %v", values(got), err)
				}
				if _, err := m.Pod(within(t, 20*time.Second), Reference{UID: podB}); (err == nil) != (tt.want == "") {
					t.Errorf("by reference: %v", err)
				}
			}
		})
	}
}

func TestFaults(t *testing.T) {
	endless := func(start, chunk string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if _, err := w.Write([]byte(start)); err != nil {
				return
			}
			text := []byte(strings.Repeat(chunk, 1+64<<10/len(chunk)))
			for r.Context().Err() == nil {
				if _, err := w.Write(text); err != nil {
					return
				}
			}
		}
	}
	status := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, text, code) }
	}
	many := func(n int, each func(i int) object) string {
		var all []object
		for i := range n {
			all = append(all, each(i))
		}
		return podListOf(all...)
	}
	good := podObject(podA, "shop", "web", running("web", id("a")))
	elsewhere := podObject(podB, "shop", "other", running("x", id("b")))
	elsewhere["spec"].(object)["nodeName"] = "node-2"
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		want    string
	}{
		{"hangs", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "not answered in time"},
		{"stops in the middle", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, `{"kind":"PodList","items":[{"metadata":{"name":"`)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "not answered in time"},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "asking the kubelet"},
		{"cut off", text(podListOf(good)[:400]), "ends before"},
		{"nothing", text(""), "ends before"},
		{"garbage", text("<html>"), "not a PodList"},
		{"another object", text(`{"kind":"Status","items":[]}`), `of kind "Status"`},
		{"no items", text(`{"kind":"PodList"}`), "not a PodList"},
		{"items twice", text(`{"kind":"PodList","items":[],"items":[]}`), "items twice"},
		{"items of another kind", text(`{"kind":"PodList","items":{}}`), "items are not a list"},
		{"a pod of another kind", text(`{"kind":"PodList","items":[7]}`), "not a PodList"},
		{"a pod without a uid", text(podListOf(podObject("", "shop", "web"))), "no uid"},
		{"a pod twice", text(podListOf(good, good)), "there twice"},
		{"another node", text(podListOf(good, elsewhere)), "another node"},
		{"a pod without end", endless(`{"kind":"PodList","items":[{"metadata":{"name":"`, "a"), "larger than"},
		{"pods without end", endless(`{"kind":"PodList","items":[`+podListItem(good), `,{"metadata":{"name":"a","namespace":"b","uid":"c"}}`), "there twice"},
		{"blanks without end", endless(`{"kind":"PodList","items":[`, " "), "larger than"},
		{"something else without end", endless(`{"kind":"PodList","x":[`, `[],`), "larger than"},
		{"too deep", endless(`{"kind":"PodList","items":[`, `[`), "not a PodList"},
		{"too many pods", text(many(maxPods+1, func(i int) object { return podObject(fmt.Sprint(i), "n", fmt.Sprint(i)) })), "more than 4096 pods"},
		{"broken", status(http.StatusInternalServerError, "boom"), `answers 500: "boom"`},
		{"tells our token", status(http.StatusInternalServerError, "bad "+ownToken), "[a text with the token in it]"},
		{"not found", status(http.StatusNotFound, "404"), "answers 404"},
		{"not allowed", status(http.StatusForbidden, "Forbidden (user=x)"), "nodes/pods"},
		{"token not taken", status(http.StatusUnauthorized, "Unauthorized"), "is the token still good"},
		{"sends us elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.example/", http.StatusFound)
		}, "answers 302"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.says(tt.handler)
			m := n.method()
			if tt.want != "not answered in time" {
				m.kubelet.door.timeout = time.Minute // what never ends is ended by its size, however slow the machine is
				if err := m.Available(within(t, time.Minute)); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("Available: %.300v; want %q", err, tt.want)
				}
			}
			got, err := m.selectors(within(t, 200*time.Millisecond), in(podA, id("a")))
			if err == nil || !strings.Contains(err.Error(), tt.want) || len(got) > 0 {
				t.Errorf("%q, %.300v; want %q", values(got), err, tt.want)
			}
			if err != nil && (strings.Contains(err.Error(), ownToken) || len(err.Error()) > 2000) {
				t.Errorf("the error repeats the token, or too much: %.3000v", err)
			}
			n.has(good)
			ctx := within(t, time.Minute)
			got, err = m.selectors(ctx, in(podA, id("a")))
			for err != nil && ctx.Err() == nil { // what was asked before may still be under way
				got, err = m.selectors(ctx, in(podA, id("a")))
			}
			if err != nil || !slices.Contains(values(got), "ns:shop") {
				t.Errorf("after it was mended: %q, %v", values(got), err)
			}
			if err := m.Available(within(t, time.Minute)); err != nil {
				t.Errorf("Available after it was mended: %v", err)
			}
		})
	}
}

func podListItem(o object) string {
	s := podListOf(o)
	return s[strings.Index(s, `[{"metadata"`)+1 : strings.LastIndex(s, "]")]
}

// While the kubelet does not answer, a container that was known and whose process lives keeps what it has, and a new one
// gets nothing.
func TestKubeletDown(t *testing.T) {
	n := newNode(t)
	n.has(podObject(podA, "shop", "web", running("web", id("a"))))
	m := n.method()
	if _, err := m.selectors(within(t, 10*time.Second), in(podA, id("a"))); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		fail func()
	}{
		{"hangs", func() { n.says(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }) }},
		{"is gone", func() {
			n.server.CloseClientConnections()
			n.server.Listener.Close()
		}},
	} {
		tt.fail()
		m.now = func() time.Time { return time.Now().Add(time.Minute) } // the list is older than it should be
		got, err := m.selectors(within(t, 2*time.Second), in(podA, id("a")))
		if err == nil || !strings.Contains(err.Error(), "what is known of it is") || !slices.Contains(values(got), "ns:shop") {
			t.Errorf("%s, a known container: %q, %v", tt.name, values(got), err)
		}
		if got, err := m.selectors(within(t, time.Second), in(podA, id("b"))); err == nil || len(got) > 0 {
			t.Errorf("%s, an unknown container: %q, %v", tt.name, values(got), err)
		}
		m.now = func() time.Time { return time.Now().Add(time.Hour) }
		if got, err := m.selectors(within(t, time.Second), in(podA, id("a"))); err == nil || len(got) > 0 {
			t.Errorf("%s, by a list of an hour ago: %q, %v", tt.name, values(got), err)
		}
	}
}

func TestClosed(t *testing.T) {
	n := newNode(t)
	asked := make(chan struct{}, 16)
	n.says(func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done()
	})
	m := n.method()
	waits := make(chan error, 1)
	go func() {
		_, err := m.selectors(t.Context(), in(podA, id("a")))
		waits <- err
	}()
	select {
	case <-asked:
	case <-within(t, 20*time.Second).Done():
		t.Fatal("the kubelet was not asked")
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := <-waits; !errors.Is(err, errClosed) {
		t.Errorf("who waits is told %v", err)
	}
	if _, err := m.selectors(t.Context(), in(podA, id("a"))); !errors.Is(err, errClosed) {
		t.Errorf("who comes later is told %v", err)
	}
}

// A real process in a real cgroup, and one in none.
func TestRealProcess(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("making cgroups needs root")
	}
	hierarchy := "/sys/fs/cgroup/pids"
	if _, err := os.Stat(hierarchy + "/cgroup.procs"); err != nil {
		hierarchy = "/sys/fs/cgroup"
	}
	root := fmt.Sprintf("signet-test-k8s-%d", os.Getpid())
	dir := filepath.Join(hierarchy, root, "kubepods/burstable/pod"+podA, id("a"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Skipf("cgroups cannot be made here: %v", err)
	}
	cmd := exec.Command("/bin/sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for d := dir; d != hierarchy; d = filepath.Dir(d) {
			_ = os.Remove(d)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(cmd.Process.Pid)), 0); err != nil {
		t.Skipf("processes cannot be moved to cgroups here: %v", err)
	}
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	n := newNode(t)
	n.has(podObject(podA, "shop", "web", running("web", id("a"))))
	m := n.method(func(c *Config) { c.CgroupRoots = []string{"/" + root} })
	ask := func(pid int) ([]string, error) {
		p, err := table.Open(int32(pid))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		state, err := p.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		got, err := m.Selectors(within(t, 10*time.Second), p, state)
		return values(got), err
	}
	if got, err := ask(cmd.Process.Pid); err != nil || !slices.Contains(got, "container-name:web") || !slices.Contains(got, "pod-uid:"+podA) {
		t.Errorf("in the pod: %q, %v", got, err)
	}
	asked := n.lists.Load()
	if got, err := ask(os.Getpid()); err != nil || len(got) > 0 {
		t.Errorf("in no pod: %q, %v", got, err)
	}
	if n.lists.Load() != asked {
		t.Error("the kubelet was asked about a process that is in no container")
	}
}
