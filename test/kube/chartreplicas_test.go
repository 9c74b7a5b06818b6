//go:build kube

package kube

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-id/signet/test/etcdtest"
)

// etcd runs one member in the installation's namespace, with TLS and client certificates, and returns the values by which the chart
// uses it, with the Secrets that they name.
func (k *cluster) etcd(env []string) string {
	k.t.Helper()
	k.shell(env, "kubectl create namespace "+installation)
	dir := k.t.TempDir()
	pki := etcdtest.NewPKI(k.t, filepath.Join(dir, "pki"), "etcd."+installation+".svc")
	client, clientKey := pki.Issue(k.t, "signet")
	seal := filepath.Join(dir, "seal.key")
	key := make([]byte, 32)
	rand.Read(key)
	if err := os.WriteFile(seal, key, 0o600); err != nil {
		k.t.Fatal(err)
	}
	secret := "kubectl -n " + installation + " create secret generic "
	k.shell(env, secret+"etcd-server --type=kubernetes.io/tls --from-file=tls.crt="+pki.ServerCert+" --from-file=tls.key="+pki.ServerKey+" --from-file=ca.crt="+pki.CA+"\n"+
		secret+"etcd-client --type=kubernetes.io/tls --from-file=tls.crt="+client+" --from-file=tls.key="+clientKey+" --from-file=ca.crt="+pki.CA+"\n"+
		secret+"signet-seal --from-file=seal-key="+seal)
	k.apply(fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: etcd, namespace: %[1]s}
spec: {selector: {app: etcd}, ports: [{port: 2379}]}
---
apiVersion: v1
kind: Pod
metadata: {name: etcd, namespace: %[1]s, labels: {app: etcd}}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
  - name: etcd
    image: %[2]q
    command: [/etcd, --data-dir, /tmp/etcd, --listen-client-urls, "https://0.0.0.0:2379", --advertise-client-urls, "https://etcd.%[1]s.svc:2379", --client-cert-auth,
      --cert-file, /tls/tls.crt, --key-file, /tls/tls.key, --trusted-ca-file, /tls/ca.crt, --auto-compaction-mode, periodic, --auto-compaction-retention, 10m]
    readinessProbe: {tcpSocket: {port: 2379}, periodSeconds: 1}
    volumeMounts: [{name: tls, mountPath: /tls, readOnly: true}]
  volumes: [{name: tls, secret: {secretName: etcd-server}}]
`, installation, need(k.t, "SIGNET_KUBE_ETCD_IMAGE", "an image with etcd as its program /etcd")))
	k.kubectl("-n", installation, "wait", "--for=condition=Ready", "pod/etcd", "--timeout=60s")
	return fmt.Sprintf(`ca:
  replicas: 2
  store: {type: etcd, etcd: {endpoints: ["https://etcd.%s.svc:2379"], tlsSecret: etcd-client}}
  persistence: {enabled: false}
  seal: {source: secret, secretName: signet-seal}
`, installation)
}

// TestChartWithReplicas installs the chart with two replicas of the CA on an etcd with TLS and a seal key that was given, and takes replicas
// away, by eviction, by force and by an upgrade, with pods that hold streams, fetch anew, and call each other all the time. Nothing fails.
func TestChartWithReplicas(t *testing.T) {
	k, env, _ := chart(t)
	more := k.etcd(env) + k.agentValues()
	registry, tag, next := need(t, "SIGNET_KUBE_IMAGES", "where signet's images are"), need(t, "SIGNET_KUBE_TAG", "their tag"), need(t, "SIGNET_KUBE_TAG_NEXT", "the tag of others")
	values := filepath.Join(t.TempDir(), "values.yaml")
	text := fmt.Sprintf("trustDomain: example.org\nclusterName: prod\nimage: {registry: %s, tag: %s}\n%s", registry, tag, more)
	if err := os.WriteFile(values, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k.shell(env, "helm install signet deploy/helm/signet --namespace "+installation+" --values "+values+" --wait --timeout 3m")
	k.apply("apiVersion: signet-id.github.io/v1alpha1\nkind: Identity\nmetadata: {name: pods}\nspec: {spiffeID: '/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}', on: ['k8s_psat:cluster:prod']}\n")
	k.traffic()
	k.moves()

	ready := func() {
		t.Helper()
		k.kubectl("-n", installation, "rollout", "status", "statefulset/signet-ca", "--timeout=120s")
	}
	same := func() {
		t.Helper()
		ready()
		var said [2]string
		for i := range said {
			said[i] = k.eventually(env, fmt.Sprintf("kubectl -n %s exec signet-ca-%d -- signet get identity pods", installation, i))
		}
		if said[0] != said[1] || !strings.Contains(said[0], "pods") {
			t.Errorf("the replicas say of the Identity\n%s\nand\n%s", said[0], said[1])
		}
	}
	same()
	evict := func(pod string) error {
		_, err := k.try(fmt.Sprintf(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":%q,"namespace":%q}}`, pod, installation),
			"create", "--raw", "/api/v1/namespaces/"+installation+"/pods/"+pod+"/eviction", "-f", "-")
		return err
	}
	if err := evict("signet-ca-0"); err != nil {
		t.Fatal(err)
	}
	if err := evict("signet-ca-1"); err == nil || !strings.Contains(err.Error(), "disruption budget") {
		t.Errorf("evicting both at once: %v, want that the budget does not let it", err)
	}
	same()
	k.moves()
	for _, pod := range []string{"signet-ca-1", "signet-ca-0"} { // one of them leads
		k.kubectl("-n", installation, "delete", "pod", pod, "--force", "--grace-period=0")
		k.moves()
		same()
	}
	k.shell(env, "helm upgrade signet deploy/helm/signet --namespace "+installation+" --values "+values+" --set image.tag="+next+",ca.config.ttl.x509=30m --wait --timeout 3m")
	same()
	for i := range 2 {
		if image := k.kubectl("-n", installation, "get", "pod", fmt.Sprintf("signet-ca-%d", i), "-o", "jsonpath={.spec.containers[0].image}"); !strings.HasSuffix(image, ":"+next) {
			t.Errorf("after the upgrade replica %d is %s", i, image)
		}
	}
	calls, fetches := k.moves()
	t.Logf("%d calls and %d fetches over an eviction, two deletions by force and an upgrade", calls, fetches)
	for _, name := range []string{"serve", "call", "hold"} {
		if n := k.kubectl("-n", k.namespace, "get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"); n != "0" {
			t.Errorf("%s was started again %s times", name, n)
		}
	}
}
