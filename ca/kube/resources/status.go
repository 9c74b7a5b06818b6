package resources

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-id/signet/ca/kube/events"
	"github.com/signet-id/signet/ca/registry"
)

// Reasons of the condition Accepted.
const (
	reasonApplied   = "Applied"
	reasonInvalid   = "Invalid"
	reasonNameTaken = "NameTaken"
	reasonNamespace = "NotOfItsNamespace"
	reasonNeedsYes  = "NeedsYes"
	reasonInRollout = "InRollout"
	reasonExpired   = "Expired"
	reasonLifted    = "Lifted"
	reasonDiskFull  = "DiskFull"
)

// reasonOf names why a document was refused.
func reasonOf(err error) string {
	if _, ok := errors.AsType[*registry.OwnedError](err); ok {
		return reasonNameTaken
	}
	if _, ok := errors.AsType[*registry.NeedsYesError](err); ok {
		return reasonNeedsYes
	}
	if _, ok := errors.AsType[*registry.NamespaceError](err); ok {
		return reasonNamespace
	}
	if errors.Is(err, registry.ErrInRollout) {
		return reasonInRollout
	}
	return reasonInvalid
}

// A verdict is what became of one version of a resource.
type verdict struct {
	generation  int64
	annotations [2]string
	templates   int
	at          time.Time

	accepted        bool
	reason, message string
	revision        int64 // of the document
	document        string
	counts          map[string]any // by the field of the status

	of *wanted
}

func (r *run) judge(w *wanted, v verdict, templates int) {
	v.generation, v.annotations, v.templates, v.at, v.of, v.document = w.obj.GetGeneration(), annotations(w.obj), templates, r.c.Now(), w, w.ref.Name
	r.judged[w.obj.GetUID()] = v
}

// accepted is the verdict on a resource that was applied.
func accepted(w *wanted, p *registry.Plan, stored registry.Resource) verdict {
	v := verdict{accepted: true, reason: reasonApplied, message: "in force as it is written here", revision: int64(stored.Revision)}
	var warnings []string
	for _, f := range p.Findings {
		if f.Policy == w.ref.Name {
			warnings = append(warnings, f.Message)
		}
	}
	for _, warning := range p.Warnings {
		if warning.Of == w.ref || warning.Of == (registry.Ref{}) {
			warnings = append(warnings, warning.Text)
		}
	}
	if len(warnings) > 0 {
		v.message += "; " + strings.Join(warnings, "; ")
	}
	for _, c := range p.Changes {
		if was := condition(w.obj); c.Name == w.ref.Name && c.Action == registry.Unchanged && was["status"] == "True" && was["observedGeneration"] == w.obj.GetGeneration() {
			v.message, _ = was["message"].(string) // what was found when it was applied
		}
	}
	switch w.kind.Document {
	case registry.KindCallPolicy:
		v.counts = rules(w)
	case registry.KindRevocation:
		for _, c := range p.Changes {
			if c.Name == w.ref.Name && c.Revocation != nil {
				v.counts = map[string]any{"items": int64(len(c.Revocation.Items)), "target": c.Revocation.Target}
			}
		}
	}
	return v
}

func rules(w *wanted) map[string]any {
	count := func(field string) int64 {
		list, _, _ := unstructured.NestedSlice(w.obj.Object, "spec", field)
		return int64(len(list))
	}
	return map[string]any{"allow": count("allow"), "deny": count("deny")}
}

// condition is the one that a resource has; nil if it has none.
func condition(obj *unstructured.Unstructured) map[string]any {
	list, _, _ := unstructured.NestedSlice(obj.Object, "status", "conditions")
	for _, c := range list {
		if m, ok := c.(map[string]any); ok && m["type"] == "Accepted" {
			return m
		}
	}
	return nil
}

// since is when a resource came to be as its condition says.
func since(obj *unstructured.Unstructured) string {
	at, _ := condition(obj)["lastTransitionTime"].(string)
	return at
}

const (
	statusWriters = 4
	// statusesAtOnce bounds how many statuses of one namespace are written at one look: who may write them there, too, and does so all the
	// time, would keep the CA from looking at the resources of others.
	statusesAtOnce = 50
)

// tooLarge tells that a resource is so large that there is no room for a status in it. Its author can say so of his own alone: nobody else's waits for it.
func tooLarge(err error) bool {
	return apierrors.IsRequestEntityTooLargeError(err) || err != nil && strings.Contains(err.Error(), "request is too large") // by etcd, as an internal error
}

// report writes the verdicts into the resources whose status says something else, and Events where a resource is refused or
// accepted again.
func (r *run) report(ctx context.Context) error {
	var mu sync.Mutex // guards r.mute
	written, more := map[string]int{}, false
	defer func() {
		if more {
			r.lookAgain()
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(statusWriters)
	for _, k := range r.kinds {
		objects, _ := k.kept.all()
		for _, h := range objects {
			obj := h.obj
			v, known := r.judged[obj.GetUID()]
			if !known || v.generation != obj.GetGeneration() {
				continue
			}
			mu.Lock()
			at, mute := r.mute[obj.GetUID()]
			mu.Unlock()
			if mute && at == obj.GetResourceVersion() {
				continue
			}
			status, changed, event := r.status(obj, v)
			if !changed {
				continue
			}
			ns := obj.GetNamespace()
			if ns != "" && written[ns] == statusesAtOnce {
				more = true
				continue
			}
			if !r.mayTell(obj.GetUID()) {
				continue
			}
			written[ns]++
			g.Go(func() error {
				next := obj.DeepCopy()
				next.Object["status"] = status
				_, err := r.c.Client.Dynamic.Resource(k.resource()).Namespace(obj.GetNamespace()).UpdateStatus(ctx, next, metav1.UpdateOptions{})
				switch {
				case apierrors.IsConflict(err), apierrors.IsNotFound(err): // it was changed: the watch brings what it is now
					return nil
				case tooLarge(err): // an Event has room
					r.c.Log.Warn("a custom resource is so large that no status fits into it", "resource", v.of.file)
					mu.Lock()
					r.mute[obj.GetUID()] = obj.GetResourceVersion()
					mu.Unlock()
				case err != nil:
					return fmt.Errorf("the status of %s: %w", v.of.file, err)
				}
				if event {
					r.c.Events.Record(events.Event{Object: corev1.ObjectReference{APIVersion: Group + "/" + Version, Kind: k.Kind.Kind, Namespace: obj.GetNamespace(), Name: obj.GetName(), UID: obj.GetUID()},
						Reason: v.reason, Message: v.message, Normal: v.accepted, Occasion: since(next)})
				}
				return nil
			})
		}
	}
	return g.Wait()
}

// status returns what the status is to be, whether it is not that yet, and whether that is worth an Event.
func (r *run) status(obj *unstructured.Unstructured, v verdict) (status map[string]any, changed, event bool) {
	have, _, _ := unstructured.NestedMap(obj.Object, "status")
	word := "False"
	if v.accepted {
		word = "True"
	}
	now := map[string]any{"type": "Accepted", "status": word, "reason": v.reason, "message": v.message, "observedGeneration": v.generation,
		"lastTransitionTime": r.c.Now().UTC().Format("2006-01-02T15:04:05Z")}
	var others []any
	list, _, _ := unstructured.NestedSlice(have, "conditions")
	was := condition(obj)
	for _, c := range list {
		if m, ok := c.(map[string]any); !ok || m["type"] != "Accepted" {
			others = append(others, c)
		}
	}
	if was["status"] == word {
		now["lastTransitionTime"] = was["lastTransitionTime"]
	}
	status = map[string]any{"observedGeneration": v.generation, "document": v.document, "conditions": append([]any{now}, others...)}
	if v.revision != 0 {
		status["revision"] = v.revision
	} else if rev := have["revision"]; rev != nil && v.reason != reasonLifted {
		status["revision"] = rev // of what was accepted before
	}
	for _, field := range []string{"allow", "deny", "items", "target"} {
		if n := have[field]; n != nil && v.counts == nil {
			status[field] = n
		}
	}
	maps.Copy(status, v.counts)
	event = was["status"] != word && (!v.accepted || was["status"] != nil) || !v.accepted && was["message"] != v.message
	return status, !reflect.DeepEqual(have, status), event
}
