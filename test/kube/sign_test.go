//go:build kube

package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/test/signettest"
)

// yamlOf returns the block of a page of the documentation that has a text in it.
func yamlOf(t *testing.T, page, has string) string {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(text), "```") {
		if y, ok := strings.CutPrefix(block, "yaml\n"); ok && strings.Contains(y, has) {
			return y
		}
	}
	t.Fatalf("%s has no block with %q", page, has)
	return ""
}

// may gives the service account ca more rights.
func (k *cluster) may(name, rules string) {
	k.t.Helper()
	name = k.namespace + "-" + name
	k.apply(fmt.Sprintf(`apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: %[1]s}
rules:
%[2]s
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: %[1]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: %[1]s}
subjects: [{kind: ServiceAccount, name: ca, namespace: %[3]s}]
`, name, rules, k.namespace))
	k.afterwards(func() {
		k.kubectl("delete", "clusterrolebinding", name)
		k.kubectl("delete", "clusterrole", name)
	})
}

const watchRules = `- {apiGroups: [""], resources: [pods, nodes, namespaces], verbs: [get, list, watch]}
- {apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, create, update]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}`

// TestPodCertificates: the API server takes what the CA answers to a request: its own rules for certificates, times and who may
// sign hold. A lie gets a reason.
func TestPodCertificates(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.may("sign", watchRules+`
- {apiGroups: [certificates.k8s.io], resources: [podcertificaterequests], verbs: [list, watch]}
- {apiGroups: [certificates.k8s.io], resources: [podcertificaterequests/status], verbs: [update]}
- {apiGroups: [certificates.k8s.io], resources: [signers], resourceNames: [signet-id.github.io/x509-svid], verbs: [sign]}`)
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes = ca.Kubernetes{Clusters: map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{}, PodCertificates: &ca.PodCertificates{}}}}
	}})
	s.Apply("kind: Identity\nname: pods\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\non: [k8s_psat:cluster:prod]\n")
	node := "sign-" + strings.ToLower(rand.Text()[:8])
	nodeUID := k.simulatedNode(node)
	client := k.admin()
	p := simulatedPod(k.namespace, "web", node)
	p.Spec.Volumes = []corev1.Volume{{Name: "svid", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{
		PodCertificate: &corev1.PodCertificateProjection{SignerName: "signet-id.github.io/x509-svid", KeyType: "ECDSAP256", CredentialBundlePath: "credentials.pem"}}}}}}}
	made, err := client.CoreV1().Pods(k.namespace).Create(ctx, p, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	account, err := client.CoreV1().ServiceAccounts(k.namespace).Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(change func(*certificatesv1beta1.PodCertificateRequestSpec)) *certificatesv1beta1.PodCertificateRequest {
		t.Helper()
		pkix, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256([]byte(made.UID))
		proof, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		spec := certificatesv1beta1.PodCertificateRequestSpec{SignerName: "signet-id.github.io/x509-svid", PodName: made.Name, PodUID: made.UID, ServiceAccountName: "web", ServiceAccountUID: account.UID,
			NodeName: types.NodeName(node), NodeUID: types.UID(nodeUID), PKIXPublicKey: pkix, ProofOfPossession: proof}
		if change != nil {
			change(&spec)
		}
		api := client.CertificatesV1beta1().PodCertificateRequests(k.namespace)
		r, err := api.Create(ctx, &certificatesv1beta1.PodCertificateRequest{ObjectMeta: metav1.ObjectMeta{GenerateName: "req-"}, Spec: spec}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		watch, err := api.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + r.Name, ResourceVersion: r.ResourceVersion})
		if err != nil {
			t.Fatal(err)
		}
		defer watch.Stop()
		for e := range watch.ResultChan() {
			if r, ok := e.Object.(*certificatesv1beta1.PodCertificateRequest); ok && len(r.Status.Conditions) > 0 {
				return r
			}
		}
		t.Fatalf("no answer to %s: %v", r.Name, ctx.Err())
		return nil
	}
	hour := int32(3600)
	for _, most := range []*int32{nil, &hour} {
		r := ask(func(s *certificatesv1beta1.PodCertificateRequestSpec) { s.MaxExpirationSeconds = most })
		if r.Status.Conditions[0].Type != "Issued" {
			t.Fatalf("condition %+v", r.Status.Conditions[0])
		}
		block, _ := pem.Decode([]byte(r.Status.CertificateChain))
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := spiffe.CheckX509SVIDLeaf(leaf); err != nil || id != s.ID("/ns/"+k.namespace+"/sa/web") {
			t.Errorf("SPIFFE ID %v, %v", id, err)
		}
		bundle, err := os.ReadFile(s.BundlePath())
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(bundle)
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots}); err != nil {
			t.Error(err)
		}
	}
	r := ask(func(s *certificatesv1beta1.PodCertificateRequestSpec) { s.PodName = "other" })
	if c := r.Status.Conditions[0]; c.Type != "Denied" || c.Reason != "PodDiffers" {
		t.Errorf("a lie about the pod's name: %+v", c)
	}
}

// TestInjectionAtAPIServer: a real API server asks the webhook, by the objects in the documentation: pods with the label get the sidecar, which
// the API server's validation takes, nonsense is refused with its fix, and with the CA away pods start, or do not, by choice.
func TestInjectionAtAPIServer(t *testing.T) {
	host := optional(t, "SIGNET_KUBE_WEBHOOK_HOST", "the name by which the API server of SIGNET_KUBECONFIG_WEBHOOK reaches 127.0.0.1 of this machine, such as localhost")
	ctx := bounded(t)
	k := open(t, ctx, need(t, "SIGNET_KUBECONFIG_WEBHOOK", "a kubeconfig of an admin of that API server"), "")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(listen)
	docs := yamlOf(t, "../../docs/kubernetes/injection.md", "kind: MutatingWebhookConfiguration")
	parts := strings.Split(docs, "---\n")
	_, rules, _ := strings.Cut(parts[1], "rules:\n")
	k.may("inject", watchRules+"\n"+strings.TrimSpace(rules))
	webhook := strings.ReplaceAll(strings.Replace(parts[2], "service: {name: signet-inject, namespace: signet-system, path: /inject}", fmt.Sprintf("url: 'https://%s:%s/inject'", host, port), 1), "signet-system", k.namespace+"-ca")
	k.apply(webhook)
	k.afterwards(func() { k.kubectl("delete", "mutatingwebhookconfiguration", "signet-inject") })
	k.kubectl("create", "namespace", k.namespace+"-ca")
	k.afterwards(func() { k.kubectl("delete", "namespace", k.namespace+"-ca", "--wait=false") })
	conf := k.credentials("ca")
	node := "inject-" + strings.ToLower(rand.Text()[:8])
	k.simulatedNode(node)
	client := k.admin()
	create := func(name string, annotations map[string]string) (*corev1.Pod, error) {
		p := simulatedPod(k.namespace, name, node)
		p.Labels["signet-id.github.io/inject"] = "true"
		p.Annotations = annotations
		return client.CoreV1().Pods(k.namespace).Create(ctx, p, metav1.CreateOptions{})
	}
	injected := func(p *corev1.Pod) bool {
		return p != nil && len(p.Spec.InitContainers) == 1 && p.Spec.InitContainers[0].Name == "signet-proxy"
	}
	good := map[string]string{"signet-id.github.io/inject-inbound": "8443=http:8080", "signet-id.github.io/inject-outbound": "15001=documents.shop.svc:8443 /documents"}

	t.Run("with the CA", func(t *testing.T) {
		signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
			c.Kubernetes = ca.Kubernetes{Clusters: map[string]ca.KubernetesCluster{"prod": {Kubeconfig: conf, Namespace: k.namespace + "-ca",
				Injection: &ca.Injection{Listen: listen, DNSNames: []string{host}, Image: "localhost/signet-proxy:test"}}}}
		}})
		// Until the API server has seen the caBundle, pods are as they are.
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ; n++ {
			p, err := create(fmt.Sprintf("early-%d", n), good)
			if err != nil {
				t.Fatal(err)
			}
			if injected(p) {
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatal(ctx.Err())
			}
		}
		p, err := create("web", good)
		if err != nil || !injected(p) || p.Spec.InitContainers[0].RestartPolicy == nil || *p.Spec.InitContainers[0].RestartPolicy != corev1.ContainerRestartPolicyAlways {
			t.Errorf("pod %+v, %v", p, err)
		}
		_, err = create("bad", map[string]string{"signet-id.github.io/inject-inbound": "web=8080"})
		var status *apierrors.StatusError
		if !errors.As(err, &status) || !strings.Contains(status.Error(), `signet-id.github.io/inject-inbound: "web=8080"`) || !strings.Contains(status.Error(), "8443=http:8080") {
			t.Errorf("nonsense: %v", err)
		}
		plain, err := client.CoreV1().Pods(k.namespace).Create(ctx, simulatedPod(k.namespace, "plain", node), metav1.CreateOptions{})
		if err != nil || len(plain.Spec.InitContainers) != 0 {
			t.Errorf("a pod without the label: %+v, %v", plain, err)
		}
	})
	if p, err := create("ignored", good); err != nil || injected(p) {
		t.Errorf("the CA away and failurePolicy Ignore: %v", err)
	}
	k.kubectl("patch", "mutatingwebhookconfiguration", "signet-inject", "--type=json", `-p=[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Fail"}]`)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		if _, err := create(fmt.Sprintf("failing-%d", n), good); err != nil {
			if !strings.Contains(err.Error(), "inject.signet-id.github.io") {
				t.Errorf("failurePolicy Fail: %v", err)
			}
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("pods are made with failurePolicy Fail and no webhook")
		}
	}
	if _, err := client.CoreV1().Pods(k.namespace).Create(context.WithoutCancel(ctx), simulatedPod(k.namespace, "unconcerned", node), metav1.CreateOptions{}); err != nil {
		t.Errorf("a pod without the label: %v", err)
	}
}
