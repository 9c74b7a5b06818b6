package spireresources

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/signet-id/signet/ca/kube/events"
)

// maxRefused bounds of how many resources it is remembered why they are refused.
const maxRefused = 10_000

// refused tells of a resource that is refused as a whole: once, in the log and by an Event on it, and again when the reason changes.
// It is called by the leader only.
func (r *Reader) refused(kind, name string, why error) {
	key, reason := kind+"/"+name, clip(why).Error()
	r.mu.Lock()
	if r.reasons == nil || len(r.reasons) >= maxRefused {
		r.reasons = map[string]string{}
	}
	known := r.reasons[key] == reason
	r.reasons[key] = reason
	r.mu.Unlock()
	if known {
		return
	}
	r.c.Log.Warn("a resource is refused", "cluster", r.c.Client.Cluster, "kind", kind, "name", name, "err", reason)
	r.c.Events.Record(events.Event{Object: corev1.ObjectReference{APIVersion: group.String(), Kind: kind, Name: name, UID: r.uid(kind, name)}, Reason: "Refused", Message: reason})
}

// accepted forgets why a resource was refused.
func (r *Reader) accepted(kind, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.reasons, kind+"/"+name)
}
