package podcert

import (
	"strings"
	"sync"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
)

// Bounds of what waits, and of one request. A kubelet has one for each volume of its pods.
const (
	maxWaiting     = 20_000
	maxOfNode      = 1000
	maxOfNamespace = 4000 // of those that are not for a pod of the namespace, or not yet as far as is known
	maxKeyBytes    = 2 << 10
	maxIDBytes     = 2049 // a SPIFFE ID has one less
)

// waiting holds the requests for our signer that have no answer yet, and queues each when it comes or changes. One for which there is
// no room is one of a node that has a thousand others, or of nobody's pod; it is told again when there is room. It implements follow.Store and
// follow.Hungry.
type waiting struct {
	queue  workqueue.TypedRateLimitingInterface[types.NamespacedName]
	whose  func(*certificatesv1beta1.PodCertificateRequest) (whose string, most int)
	full   func(whose string)            // somebody has more than there is room for
	listed map[types.NamespacedName]bool // by the list that is under way, of those that are held; nil: none is

	mu       sync.Mutex // guards what follows
	requests map[types.NamespacedName]waits
	of       map[string]int // how many each has
	over     bool           // there were some for which there was no room
	freed    bool           // and there may be now
}

type waits struct {
	request *certificatesv1beta1.PodCertificateRequest
	whose   string
}

func newWaiting(queue workqueue.TypedRateLimitingInterface[types.NamespacedName], whose func(*certificatesv1beta1.PodCertificateRequest) (string, int), full func(string)) *waiting {
	return &waiting{queue: queue, whose: whose, full: full, requests: map[types.NamespacedName]waits{}, of: map[string]int{}}
}

// get returns a request; nil if it is answered or gone. It is not to be changed.
func (w *waiting) get(key types.NamespacedName) *certificatesv1beta1.PodCertificateRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.requests[key].request
}

// hold keeps a request in the place of what is there, if there is room.
func (w *waiting) hold(key types.NamespacedName, r *certificatesv1beta1.PodCertificateRequest) bool {
	whose, most := w.whose(r)
	w.mu.Lock()
	defer w.mu.Unlock()
	freed := w.freed
	w.drop(key)
	if len(w.requests) >= maxWaiting || w.of[whose] >= most {
		w.full(whose)
		w.over = true
		return false
	}
	w.freed = freed // it is in the place of itself
	w.requests[key] = waits{slim(r), whose}
	w.of[whose]++
	return true
}

// drop forgets one. mu is held.
func (w *waiting) drop(key types.NamespacedName) {
	r, there := w.requests[key]
	if !there {
		return
	}
	delete(w.requests, key)
	w.freed = true
	if w.of[r.whose]--; w.of[r.whose] == 0 {
		delete(w.of, r.whose)
	}
}

// slim returns what is looked at of a request. What is too large to be right is cut so that it stays wrong: whoever may make requests
// must not fill the CA's memory with them.
func slim(r *certificatesv1beta1.PodCertificateRequest) *certificatesv1beta1.PodCertificateRequest {
	out := certificatesv1beta1.PodCertificateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: r.Name, UID: r.UID, ResourceVersion: r.ResourceVersion, CreationTimestamp: r.CreationTimestamp}, Spec: r.Spec}
	s := &out.Spec
	s.PKIXPublicKey, s.ProofOfPossession = s.PKIXPublicKey[:min(len(s.PKIXPublicKey), maxKeyBytes)], s.ProofOfPossession[:min(len(s.ProofOfPossession), maxProofBytes+1)]
	s.UnverifiedUserAnnotations = nil
	for key, value := range r.Spec.UnverifiedUserAnnotations {
		if key != AnnotationID { // it is denied for this one
			s.UnverifiedUserAnnotations = map[string]string{strings.Clone(clip(key)): ""}
			break
		}
		s.UnverifiedUserAnnotations = map[string]string{key: strings.Clone(value[:min(len(value), maxIDBytes)])}
	}
	return out.DeepCopy() // the list as a whole would be kept
}

// Begin implements follow.Store.
func (w *waiting) Begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listed, w.over, w.freed = map[types.NamespacedName]bool{}, false, false
}

// Hungry implements follow.Hungry.
func (w *waiting) Hungry() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.over && w.freed
}

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
	if !w.hold(key, r) {
		return
	}
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
			w.drop(key)
		}
	}
	w.listed = nil
}

// Delete implements follow.Store.
func (w *waiting) Delete(o metav1.Object) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drop(types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()})
}
