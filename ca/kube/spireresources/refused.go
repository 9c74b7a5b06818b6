package spireresources

import (
	"crypto/sha256"
	"encoding/hex"

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
	if r.c.Events != nil {
		r.c.Events.Record(events.Event{Object: corev1.ObjectReference{APIVersion: group.String(), Kind: kind, Name: name, UID: r.uid(kind, name)}, Reason: "Refused", Message: reason})
	}
}

// accepted forgets why a resource was refused.
func (r *Reader) accepted(kind, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.reasons, kind+"/"+name)
}

// shortName keeps a name within the 200 characters that a document's may have.
func shortName(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	return s[:most-17] + "-" + hex.EncodeToString(sum[:8])
}
