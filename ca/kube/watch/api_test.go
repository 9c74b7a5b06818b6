package watch

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/follow"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/test/kubetest"
)

type object = map[string]any

// An api is an API server over real HTTP as far as a Watcher needs one, which can be made to misbehave.
type api struct {
	t   *testing.T
	srv *httptest.Server

	mu       sync.Mutex
	version  int
	objects  map[string]map[string]object // resource, key
	history  map[string][]event
	floor    int // watches from below it are too old
	requests map[string]int
	fault    func(w http.ResponseWriter, r *http.Request, resource string, watch bool) bool // answers instead; mu is not held
	changed  chan struct{}
}

type event struct {
	version int
	kind    string
	object  object
}

func newAPI(t *testing.T) *api {
	a := &api{t: t, version: 100, objects: map[string]map[string]object{}, history: map[string][]event{}, requests: map[string]int{}, changed: make(chan struct{})}
	a.srv = httptest.NewServer(a)
	t.Cleanup(func() {
		a.srv.CloseClientConnections()
		a.srv.Close()
	})
	return a
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resource := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	watch := r.URL.Query().Get("watch") != ""
	a.mu.Lock()
	fault := a.fault
	a.requests[resource+map[bool]string{true: " watch", false: " list"}[watch]]++
	a.mu.Unlock()
	if fault != nil && fault(w, r, resource, watch) {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if watch {
		a.serveWatch(w, r, resource)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	limit, _ := strconv.Atoi(r.URL.Query().Get("limit"))
	from, _ := strconv.Atoi(r.URL.Query().Get("continue"))
	var items []object
	keys := slices.Sorted(maps.Keys(a.objects[resource]))
	more := ""
	for i, k := range keys {
		if i < from {
			continue
		}
		if limit > 0 && len(items) == limit {
			more = strconv.Itoa(i)
			break
		}
		items = append(items, shown(a.objects[resource][k], r))
	}
	kind, version := map[string]string{"pods": "PodList", "nodes": "NodeList", "namespaces": "NamespaceList"}[resource], "v1"
	if metadataOnly(r) {
		kind, version = "PartialObjectMetadataList", "meta.k8s.io/v1"
	}
	if items == nil {
		items = []object{}
	}
	json.NewEncoder(w).Encode(object{"kind": kind, "apiVersion": version, "metadata": object{"resourceVersion": strconv.Itoa(a.version), "continue": more}, "items": items})
}

func metadataOnly(r *http.Request) bool {
	return strings.Contains(r.Header.Get("Accept"), "PartialObjectMetadata")
}

func shown(o object, r *http.Request) object {
	if metadataOnly(r) {
		return object{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": o["metadata"]}
	}
	return o
}

func (a *api) serveWatch(w http.ResponseWriter, r *http.Request, resource string) {
	from, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	out := json.NewEncoder(w)
	w.(http.Flusher).Flush()
	for {
		a.mu.Lock()
		changed := a.changed
		if from < a.floor {
			a.mu.Unlock()
			out.Encode(object{"type": "ERROR", "object": object{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410, "message": "too old resource version"}})
			return
		}
		var send []event
		for _, e := range a.history[resource] {
			if e.version > from {
				send = append(send, e)
			}
		}
		a.mu.Unlock()
		for _, e := range send {
			out.Encode(object{"type": e.kind, "object": shown(e.object, r)})
			from = e.version
		}
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func (a *api) apply(resource string, o object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.set(resource, o)
	a.notify()
}

// set is apply under the lock.
func (a *api) set(resource string, o object) {
	a.version++
	m := maps.Clone(o["metadata"].(object))
	m["resourceVersion"] = strconv.Itoa(a.version)
	o = maps.Clone(o)
	o["metadata"] = m
	if a.objects[resource] == nil {
		a.objects[resource] = map[string]object{}
	}
	key := fmt.Sprint(m["namespace"], "/", m["name"])
	kind := "ADDED"
	if a.objects[resource][key] != nil {
		kind = "MODIFIED"
	}
	a.objects[resource][key] = o
	a.history[resource] = append(a.history[resource], event{a.version, kind, o})
}

func (a *api) delete(resource, namespace, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := fmt.Sprint(any(namespace), "/", name)
	if namespace == "" {
		key = fmt.Sprint(any(nil), "/", name)
	}
	o := a.objects[resource][key]
	if o == nil {
		a.t.Fatalf("no %s %s", resource, key)
	}
	delete(a.objects[resource], key)
	a.version++
	m := maps.Clone(o["metadata"].(object))
	m["resourceVersion"] = strconv.Itoa(a.version)
	o = maps.Clone(o)
	o["metadata"] = m
	a.history[resource] = append(a.history[resource], event{a.version, "DELETED", o})
	a.notify()
}

// raw sends an event as it stands to all watches of a resource.
func (a *api) raw(resource, kind string, o object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	a.history[resource] = append(a.history[resource], event{a.version, kind, o})
	a.notify()
}

// forget makes watches from before now too old, and ends those there are.
func (a *api) forget() {
	a.mu.Lock()
	a.version++
	a.floor = a.version
	clear(a.history)
	a.mu.Unlock()
	a.srv.CloseClientConnections()
}

func (a *api) notify() {
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *api) fail(f func(w http.ResponseWriter, r *http.Request, resource string, watch bool) bool) {
	a.mu.Lock()
	a.fault = f
	a.mu.Unlock()
	a.srv.CloseClientConnections()
}

func (a *api) asked(what string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[what]
}

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func at(d time.Duration) string { return epoch.Add(d).Format(time.RFC3339) }

func node(name, uid string, created time.Duration) object {
	return object{"kind": "Node", "apiVersion": "v1", "metadata": object{"name": name, "uid": uid, "creationTimestamp": at(created)}}
}

func namespace(name string, labels object) object {
	return object{"kind": "Namespace", "apiVersion": "v1", "metadata": object{"name": name, "uid": "ns-" + name, "labels": labels}}
}

// pod is a pod that was made and put on its node at a time.
func pod(ns, name, uid, node string, created time.Duration, labels object) object {
	return object{"kind": "Pod", "apiVersion": "v1", "metadata": object{"name": name, "namespace": ns, "uid": uid, "creationTimestamp": at(created), "labels": labels,
		"ownerReferences": []object{{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-1", "uid": "rs", "controller": true}}},
		"spec": object{"nodeName": node, "serviceAccountName": "default", "containers": []object{{"name": "c", "image": "i"}}}, "status": object{"phase": "Running"}}
}

// A cluster is what a Watcher has told, as an Expander would hold it.
type cluster struct {
	kubetest.State
	pods    map[string]*pods.Pod
	told    int
	synced  bool
	refused []pods.Refusal
}

func (c *cluster) Update(_ string, changed []*pods.Pod, gone []string) {
	c.Change(func() {
		for _, uid := range gone {
			delete(c.pods, uid)
		}
		for _, p := range changed {
			c.pods[p.UID] = p
		}
		c.told += len(changed)
	})
}

func (c *cluster) Synced(_ string, synced bool) { c.Change(func() { c.synced = synced }) }

func (c *cluster) refuse(r pods.Refusal) { c.Change(func() { c.refused = append(c.refused, r) }) }

// until waits until f holds of what was told.
func (c *cluster) until(t *testing.T, what string, f func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if !c.Await(ctx, f) {
		c.Look(func() {
			t.Fatalf("it never comes that %s; told of %v, synced %t", what, slices.Sorted(maps.Keys(c.pods)), c.synced)
		})
	}
}

func (c *cluster) has(uids ...string) func() bool {
	return func() bool { return slices.Equal(slices.Sorted(maps.Keys(c.pods)), uids) }
}

type harness struct {
	*cluster
	w   *Watcher
	log *lines
}

// lines is a log.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func start(t *testing.T, address string, change ...func(*Config)) *harness {
	t.Helper()
	client, err := kube.Open("prod", kubetest.Kubeconfig(t, address))
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{cluster: &cluster{pods: map[string]*pods.Pod{}}, log: &lines{}}
	c := Config{Client: client, Expander: h.cluster, Refused: h.refuse, Log: slog.New(slog.NewTextHandler(io.MultiWriter(h.log, t.Output()), nil)),
		follow: follow.Config{MinDelay: time.Millisecond, MaxDelay: 20 * time.Millisecond}}
	for _, f := range change {
		f(&c)
	}
	h.w = New(c)
	done := make(chan error, 1)
	ctx, cancel := contextOf(t)
	go func() { done <- h.w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return h
}
