package spireresources

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	kwatch "k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/kube/follow"
)

// stats is what the status of a ClusterSPIFFEID says.
type stats struct {
	NamespacesSelected     int `json:"namespacesSelected"`
	NamespacesIgnored      int `json:"namespacesIgnored"`
	PodsSelected           int `json:"podsSelected"`
	PodEntryRenderFailures int `json:"podEntryRenderFailures"`
	EntriesMasked          int `json:"entriesMasked"`
	EntriesToSet           int `json:"entriesToSet"`
	EntryFailures          int `json:"entryFailures"`
}

// A statusWriter writes statuses while its replica leads, and tells by an Event what is refused as a whole.
type statusWriter struct {
	r          *Reader
	namespaces namespaces

	pods   int // when stats were written last
	set    *set
	serial uint64 // of the namespaces
}

func newStatusWriter(r *Reader) *statusWriter {
	return &statusWriter{r: r, namespaces: namespaces{changed: func() { notify(r.leading) }, byName: map[string]labels.Set{}}}
}

// follower keeps up with the namespaces.
func (w *statusWriter) follower() *follow.Follower {
	api := w.r.c.Client.Metadata.Resource(corev1.SchemeGroupVersion.WithResource("namespaces"))
	return follow.New(follow.Config{Name: "namespaces", Store: &w.namespaces, Log: w.r.c.Log,
		List:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, o) },
		Watch: func(ctx context.Context, o metav1.ListOptions) (kwatch.Interface, error) { return api.Watch(ctx, o) }})
}

// write brings all statuses up to date.
func (w *statusWriter) write(ctx context.Context, entries map[string]entryStatus) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		st := entries[name]
		if st.problem == "" {
			w.r.accepted(KindClusterStaticEntry, name)
		} else {
			w.r.refused(KindClusterStaticEntry, name, errors.New(st.problem))
		}
		errs = append(errs, w.patch(ctx, clusterStaticEntries, name, w.r.entries.status(name), st))
	}
	return errors.Join(append(errs, w.writeStats(ctx))...)
}

// writeStats counts what each ClusterSPIFFEID makes of all pods, if something changed since it was counted.
func (w *statusWriter) writeStats(ctx context.Context) error {
	r := w.r
	all := r.c.Expander.All(r.c.Client.Cluster)
	names, serial, known := w.namespaces.all()
	r.mu.Lock()
	s, dirty := r.set, r.dirty
	r.dirty = false
	r.mu.Unlock()
	if s == nil || !known || !dirty && len(all) == w.pods && s == w.set && serial == w.serial {
		return nil
	}
	w.pods, w.set, w.serial = len(all), s, serial
	counts := make([]stats, len(s.all))
	for i, x := range s.all {
		for name, set := range names {
			if x.namespaces != nil && !x.namespaces.Matches(set) {
				continue
			}
			counts[i].NamespacesSelected++
			if ignored(r.c.IgnoreNamespaces, name) {
				counts[i].NamespacesIgnored++
			}
		}
	}
	for _, p := range all {
		if ctx.Err() != nil {
			return nil
		}
		var failed map[string]bool
		for i, got := range s.expand(p) {
			c := &counts[i]
			if got.selected {
				c.PodsSelected++
			}
			switch {
			case got.err != nil:
				c.PodEntryRenderFailures++
			case got.masked:
				c.EntriesMasked++
			case got.entry != nil:
				c.EntriesToSet++
				if failed == nil {
					failed = map[string]bool{}
					for _, f := range r.c.Expander.Refusals(r.c.Client.Cluster, p.UID) {
						failed[f.Rule] = true
					}
				}
				if failed[ruleName(s.all[i])] {
					c.EntryFailures++
				}
			}
		}
	}
	var errs []error
	for i, x := range s.all {
		if x.err == nil {
			r.accepted(KindClusterSPIFFEID, x.meta.Name)
		} else {
			r.refused(KindClusterSPIFFEID, x.meta.Name, x.err)
		}
		errs = append(errs, w.patch(ctx, clusterSPIFFEIDs, x.meta.Name, r.ids.status(x.meta.Name), map[string]any{"stats": counts[i]}))
	}
	return errors.Join(errs...)
}

// patch writes a status that is not what was seen last, unless the resource was written since: another replica may lead by now.
func (w *statusWriter) patch(ctx context.Context, gvr schema.GroupVersionResource, name string, seen seenStatus, status any) error {
	now, err := json.Marshal(status)
	if err != nil {
		return err
	}
	was, err := json.Marshal(seen.status)
	if err != nil || sameJSON(was, now) {
		return err
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": seen.at}, "status": json.RawMessage(now)})
	if err != nil {
		return err
	}
	_, err = w.r.c.Client.Dynamic.Resource(gvr).Patch(ctx, name, types.MergePatchType, body, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it went meanwhile
	}
	if apierrors.IsConflict(err) { // the watch brings what it is now
		w.r.mu.Lock()
		w.r.dirty = true
		w.r.mu.Unlock()
		notify(w.r.leading)
		return nil
	}
	if err != nil {
		return fmt.Errorf("status of %s %s: %w", gvr.Resource, name, err)
	}
	return nil
}

// sameJSON tells whether the status has every field of ours as we would write it.
func sameJSON(was, now []byte) bool {
	var a, b map[string]any
	if json.Unmarshal(was, &a) != nil || json.Unmarshal(now, &b) != nil {
		return false
	}
	for k, v := range b {
		x, err1 := json.Marshal(a[k])
		y, err2 := json.Marshal(v)
		if err1 != nil || err2 != nil || string(x) != string(y) {
			return false
		}
	}
	return true
}

// namespaces are those of the cluster with their labels. They implement follow.Store.
type namespaces struct {
	changed func()

	mu     sync.Mutex
	byName map[string]labels.Set
	listed map[string]bool
	whole  bool
	serial uint64
}

const maxNamespaces = 100_000

func (n *namespaces) all() (map[string]labels.Set, uint64, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.byName), n.serial, n.whole
}

// Begin implements follow.Store.
func (n *namespaces) Begin() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listed = map[string]bool{}
}

// Put implements follow.Store.
func (n *namespaces) Put(o metav1.Object) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listed != nil {
		n.listed[o.GetName()] = true
	}
	was, there := n.byName[o.GetName()]
	if there && maps.Equal(was, o.GetLabels()) || !there && len(n.byName) >= maxNamespaces {
		return
	}
	n.byName[o.GetName()] = maps.Clone(o.GetLabels())
	n.serial++
}

// End implements follow.Store.
func (n *namespaces) End() {
	n.mu.Lock()
	maps.DeleteFunc(n.byName, func(name string, _ labels.Set) bool { return !n.listed[name] })
	n.listed, n.whole = nil, true
	n.serial++
	n.mu.Unlock()
	n.changed()
}

// Delete implements follow.Store.
func (n *namespaces) Delete(o metav1.Object) {
	n.mu.Lock()
	delete(n.byName, o.GetName())
	n.serial++
	n.mu.Unlock()
}
