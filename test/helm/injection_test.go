package helm

import (
	"slices"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// By default nobody is asked about pods. Switched on, the API server finds the CA by the Service, and asks about pods with the label alone.
func TestInjection(t *testing.T) {
	c, _, all := configs(t)
	if _, ok := find[*admissionregistrationv1.MutatingWebhookConfiguration](t, all, "signet-inject"); ok || c.Kubernetes.Clusters["prod"].Injection != nil {
		t.Error("there is a webhook though nobody asked for it")
	}

	c, a, all := configs(t, "image: {registry: images.example.org/signet, tag: 1.2.3}\nagent: {socket: {directory: /run/other, name: api.sock, mount: csi}}\n"+
		"ca: {kubernetes: {injection: {enabled: true, failurePolicy: Fail, namespaceSelector: {matchLabels: {team: payments}, matchExpressions: [{key: stage, operator: Exists}]}}}}\nnetworkPolicy: {injectionFrom: [{ipBlock: {cidr: 10.0.0.1/32}}]}")
	i := c.Kubernetes.Clusters["prod"].Injection
	if i == nil || i.Listen != ":9443" || i.Image != "images.example.org/signet/signet-proxy:1.2.3" || i.Volume != "csi" || i.HostPath+"/"+i.SocketName != a.SocketPath || i.Service != "signet-inject" || i.Webhook != "signet-inject" {
		t.Fatalf("the CA injects %+v; the agent's socket is %s", i, a.SocketPath)
	}
	spec := podSpecs(all)["signet-ca"]
	n := slices.IndexFunc(spec.Containers[0].Ports, func(p corev1.ContainerPort) bool { return p.Name == "inject" })
	s, ok := find[*corev1.Service](t, all, i.Service)
	if n < 0 || spec.Containers[0].Ports[n].ContainerPort != 9443 || !ok || s.Spec.Ports[0].Port != 443 || s.Spec.Ports[0].TargetPort.StrVal != "inject" || s.Spec.Selector["app.kubernetes.io/name"] != "signet-ca" {
		t.Errorf("the Service is %+v, the pod's ports %+v", s, spec.Containers[0].Ports)
	}
	m, ok := find[*admissionregistrationv1.MutatingWebhookConfiguration](t, all, i.Webhook)
	if !ok || len(m.Webhooks) != 1 {
		t.Fatalf("webhook %+v", m)
	}
	w := m.Webhooks[0]
	if by := w.ClientConfig.Service; by.Name != s.Name || by.Namespace != s.Namespace || *by.Port != 443 || *by.Path != "/inject" || *w.FailurePolicy != admissionregistrationv1.Fail || *w.SideEffects != admissionregistrationv1.SideEffectClassNone {
		t.Errorf("the API server asks by %+v, failurePolicy %v", by, *w.FailurePolicy)
	}
	if len(w.ClientConfig.CABundle) > 0 {
		t.Error("the chart has a caBundle: an upgrade would take away the one that the CA wrote")
	}
	asked, err := metav1.LabelSelectorAsSelector(w.ObjectSelector)
	if err != nil {
		t.Fatal(err)
	}
	// What is misspelt is asked about, so that somebody hears of it.
	for value, want := range map[string]bool{"true": true, "yes": true, "True": true, "": true, "false": false} {
		if got := asked.Matches(labels.Set{"app": "web", "signet-id.github.io/inject": value}); got != want {
			t.Errorf("it is asked about pods whose label is %q: %t", value, got)
		}
	}
	if asked.Matches(labels.Set{"app": "web", "inject": "true"}) {
		t.Error("it is asked about pods without the label")
	}
	e := w.NamespaceSelector.MatchExpressions
	if len(e) != 2 || strings.Join(e[0].Values, " ") != "kube-system kube-public kube-node-lease signet-system" || e[0].Operator != "NotIn" || e[1].Key != "stage" || w.NamespaceSelector.MatchLabels["team"] != "payments" {
		t.Errorf("and about the namespaces %+v", w.NamespaceSelector)
	}

	// Who has the CA's token is held to the caBundle; which changes that refuses, test/kube asks an API server.
	p, ok := find[*admissionregistrationv1.ValidatingAdmissionPolicy](t, all, "signet-inject")
	b, bound := find[*admissionregistrationv1.ValidatingAdmissionPolicyBinding](t, all, "signet-inject")
	if !ok || !bound || b.Spec.PolicyName != p.Name || !slices.Equal(b.Spec.ValidationActions, []admissionregistrationv1.ValidationAction{admissionregistrationv1.Deny}) || *p.Spec.FailurePolicy != admissionregistrationv1.Fail ||
		len(p.Spec.MatchConditions) != 1 || p.Spec.MatchConditions[0].Expression != "request.userInfo.username == 'system:serviceaccount:signet-system:"+spec.ServiceAccountName+"'" {
		t.Errorf("the admission policy is %+v, its binding %+v", p, b)
	}

	for from, want := range map[string]int{"[]": 0, "[{ipBlock: {cidr: 10.0.0.1/32}}]": 1} {
		_, _, all := configs(t, "ca: {kubernetes: {injection: {enabled: true}}}\nnetworkPolicy: {injectionFrom: "+from+"}")
		p, ok := find[*networkingv1.NetworkPolicy](t, all, "signet-ca")
		n := slices.IndexFunc(p.Spec.Ingress, func(r networkingv1.NetworkPolicyIngressRule) bool { return r.Ports[0].Port.StrVal == "inject" })
		if !ok || n < 0 || len(p.Spec.Ingress[n].From) != want {
			t.Errorf("injectionFrom %s lets in %+v", from, p.Spec.Ingress)
		}
	}
}
