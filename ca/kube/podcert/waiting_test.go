package podcert

import (
	"fmt"
	"testing"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
)

// What there was no room for is asked for again when there is some.
func TestWaitingRequestsComeWhenThereIsRoom(t *testing.T) {
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[types.NamespacedName]())
	defer queue.ShutDown()
	w := newWaiting(queue, func(*certificatesv1beta1.PodCertificateRequest) (string, int) { return "node", maxOfNode }, func(string) {})
	request := func(i int) *certificatesv1beta1.PodCertificateRequest {
		return &certificatesv1beta1.PodCertificateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint(i)}, Spec: certificatesv1beta1.PodCertificateRequestSpec{SignerName: SignerName}}
	}
	for i := range maxOfNode + 10 {
		w.Put(request(i))
	}
	if len(w.requests) != maxOfNode || w.Hungry() {
		t.Fatalf("%d requests are held, want %d; hungry %t", len(w.requests), maxOfNode, w.Hungry())
	}
	w.Delete(request(0))
	if !w.Hungry() {
		t.Error("with room for them, nobody asks for the others")
	}
	w.Begin()
	for i := 1; i <= maxOfNode; i++ {
		w.Put(request(i))
	}
	w.End()
	if w.get(types.NamespacedName{Namespace: "shop", Name: fmt.Sprint(maxOfNode)}) == nil || w.Hungry() {
		t.Errorf("one that was left out is not held (hungry %t)", w.Hungry())
	}
}
