package podcert

import (
	"sync"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
)

// waiting holds the requests for our signer that have no answer yet, and queues each when it comes or changes.
type waiting struct {
	queue  workqueue.TypedRateLimitingInterface[types.NamespacedName]
	listed map[types.NamespacedName]bool // by the list that is under way; nil: none is

	mu       sync.Mutex // guards what follows
	requests map[types.NamespacedName]*certificatesv1beta1.PodCertificateRequest
}

// get returns a request; nil if it is answered or gone. It is not to be changed.
func (w *waiting) get(key types.NamespacedName) *certificatesv1beta1.PodCertificateRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.requests[key]
}

// Begin implements follow.Store.
func (w *waiting) Begin() { w.listed = map[types.NamespacedName]bool{} }

// Put implements follow.Store.
func (w *waiting) Put(o metav1.Object) {
	r, ok := o.(*certificatesv1beta1.PodCertificateRequest)
	if !ok || r.Spec.SignerName != SignerName {
		return
	}
	key := types.NamespacedName{Namespace: r.Namespace, Name: r.Name}
	if answered(r) {
		w.Delete(r)
		return
	}
	r = r.DeepCopy()                                         // the list as a whole would be kept
	r.ManagedFields, r.Annotations, r.Labels = nil, nil, nil // nobody reads them
	w.mu.Lock()
	w.requests[key] = r
	w.mu.Unlock()
	if w.listed != nil {
		w.listed[key] = true
	}
	w.queue.Add(key)
}

// End implements follow.Store.
func (w *waiting) End() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key := range w.requests {
		if !w.listed[key] {
			delete(w.requests, key)
		}
	}
	w.listed = nil
}

// Delete implements follow.Store.
func (w *waiting) Delete(o metav1.Object) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.requests, types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()})
}
