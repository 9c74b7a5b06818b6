package spireresources

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestServicesOfTheirNamespace: who may write EndpointSlices in one namespace gives no name to a pod of another one, and so cannot
// give it more than it may have, for which it would get no identity.
func TestServicesOfTheirNamespace(t *testing.T) {
	s := newServices(func() {})
	put := func(namespace, name, service string) {
		s.Put(&discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
			Endpoints: []discoveryv1.Endpoint{{TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: "bank", UID: types.UID("1")}}}})
	}
	put("bank", "accounts-1", "accounts")
	for i := range 30 {
		put("evil", fmt.Sprint("x-", i), fmt.Sprint("x", i))
	}
	want := []string{"accounts", "accounts.bank", "accounts.bank.svc", "accounts.bank.svc.cluster.local"}
	if got := s.dnsNames("1", "bank", "cluster.local"); !slices.Equal(got, want) {
		t.Errorf("the pod has %d names, %.10q; want %q", len(got), got, want)
	}
}
