package spireresources

import (
	"fmt"
	"slices"
	"strings"
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
	s.take()
	put("evil", "x-1", "again")
	for _, m := range s.take() {
		if m.namespace != "evil" {
			t.Errorf("a slice of evil has the pod %v looked at", m)
		}
	}
	want := []string{"accounts", "accounts.bank", "accounts.bank.svc", "accounts.bank.svc.cluster.local"}
	if got := s.dnsNames("1", "bank", "cluster.local"); !slices.Equal(got, want) {
		t.Errorf("the pod has %d names, %.10q; want %q", len(got), got, want)
	}
}

// TestSlicesOfANamespaceTakeTheirShare: EndpointSlices of one namespace, as many and as large as an API server takes them, leave room for
// those of others.
func TestSlicesOfANamespaceTakeTheirShare(t *testing.T) {
	s := newServices(func() {})
	of := func(namespace string, i int, uids ...string) *discoveryv1.EndpointSlice {
		x := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("s", i), Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}}
		for _, uid := range uids {
			x.Endpoints = append(x.Endpoints, discoveryv1.Endpoint{TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, UID: types.UID(uid)}})
		}
		return x
	}
	many := make([]string, maxSliceMembers)
	for i := range many {
		many[i] = fmt.Sprint("pod", i)
	}
	for i := range maxMembers/namespaceShare/maxSliceMembers + 10 {
		s.Put(of("evil", i, many...))
	}
	s.Put(of("evil", 0, strings.Repeat("x", 100_000))) // makes room
	if s.leftOut() != 10 || len(s.byPod) != maxSliceMembers || s.shares["evil"].members != maxMembers/namespaceShare-maxSliceMembers {
		t.Errorf("left out %d, %d pods, share %v", s.leftOut(), len(s.byPod), s.shares["evil"])
	}
	s.Put(of("bank", 1, "1"))
	if got := s.dnsNames("1", "bank", ""); len(got) != 3 {
		t.Errorf("there is no room for a slice of another namespace: names %q", got)
	}
	for i := range maxSlices/namespaceShare + 10 {
		s.Put(of("small", i, "1"))
	}
	if s.shares["small"].slices != maxSlices/namespaceShare || s.leftOut() != 20 {
		t.Errorf("share %v, left out %d", s.shares["small"], s.leftOut())
	}
	s.Begin()
	s.End()
	if len(s.slices)+len(s.byPod)+len(s.shares)+s.leftOut() != 0 || s.taken != (share{}) {
		t.Errorf("with no slice left: %d slices, %d pods, %v of %v", len(s.slices), len(s.byPod), s.taken, s.shares)
	}
}
