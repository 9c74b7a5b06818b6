//go:build kube

package kube

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/test/signettest"
)

// signRules are what a CA that signs Pod Certificates may, besides what watchRules say.
const signRules = `
- {apiGroups: [certificates.k8s.io], resources: [podcertificaterequests], verbs: [list, watch]}
- {apiGroups: [certificates.k8s.io], resources: [podcertificaterequests/status], verbs: [update]}
- {apiGroups: [certificates.k8s.io], resources: [signers], resourceNames: [signet-id.github.io/x509-svid], verbs: [sign]}`

// TestPodCertificateVolume: a real kubelet makes a key, gets the certificate, and puts both into the pod's volume. No agent is there.
func TestPodCertificateVolume(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	if k.nodeRoot == "" {
		t.Skip("SIGNET_KUBE_NODE_ROOT is not set; set it to where the file system of the node can be read")
	}
	k.may("sign", watchRules+signRules)
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes = ca.Kubernetes{Clusters: map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{}, PodCertificates: &ca.PodCertificates{}}}}
	}})
	s.Apply("kind: Identity\nname: pods\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\non: [k8s_psat:cluster:prod]\n")
	k.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: web, namespace: %s}
spec:
  serviceAccountName: web
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers: [{name: app, image: %q, volumeMounts: [{name: svid, mountPath: /run/svid, readOnly: true}]}]
  volumes: [{name: svid, projected: {sources: [{podCertificate: {signerName: signet-id.github.io/x509-svid, keyType: ECDSAP256, credentialBundlePath: credentials.pem}}]}}]
`, k.namespace, need(t, "SIGNET_KUBE_IMAGE", "an image whose program just waits")))
	k.kubectl("-n", k.namespace, "wait", "--for=condition=Ready", "pod/web", "--timeout=90s")
	text, err := os.ReadFile(filepath.Join(k.nodeRoot, "var/lib/kubelet/pods", k.field("pod/web", ".metadata.uid"), "volumes/kubernetes.io~projected/svid/credentials.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(text, text) // the key is the certificate's
	if err != nil {
		t.Fatal(err)
	}
	if id, err := spiffe.CheckX509SVIDLeaf(pair.Leaf); err != nil || id != s.ID("/ns/"+k.namespace+"/sa/web") {
		t.Errorf("SPIFFE ID %v, %v", id, err)
	}
	bundle, err := os.ReadFile(s.BundlePath())
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		between.AddCert(c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Error(err)
		}
	}
}
