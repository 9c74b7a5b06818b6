package spireresources

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxRefused bounds of how many resources it is remembered why they are refused.
const maxRefused = 10_000

const eventTimeout = 10 * time.Second

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
	now := metav1.NewTime(r.c.Now())
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	_, err := r.c.Client.Typed.CoreV1().Events(metav1.NamespaceDefault).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: "signet-spire-", Namespace: metav1.NamespaceDefault},
		InvolvedObject: corev1.ObjectReference{APIVersion: group.String(), Kind: kind, Name: name, UID: r.uid(kind, name)},
		Type:           corev1.EventTypeWarning, Reason: "Refused", Message: reason, Source: corev1.EventSource{Component: "signet-ca"},
		FirstTimestamp: now, LastTimestamp: now, Count: 1, ReportingController: "signet-ca",
	}, metav1.CreateOptions{})
	if err != nil {
		r.c.Log.Debug("an Event could not be written", "kind", kind, "name", name, "err", clip(err))
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
