//go:build kube

package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInjected: programs that know nothing of TLS and SPIFFE, in pods with the label, call each other by mutual TLS through their
// proxies, as the chart puts them there. Who is allowed is answered, who is not is refused. The proxies are native sidecars: the
// program starts after they are ready, and a Job ends though its proxy would not.
func TestInjected(t *testing.T) {
	k, env, more := chart(t)
	registry, tag := need(t, "SIGNET_KUBE_IMAGES", "where signet's images are"), need(t, "SIGNET_KUBE_TAG", "their tag")
	values := filepath.Join(t.TempDir(), "values.yaml")
	text := fmt.Sprintf("trustDomain: example.org\nclusterName: prod\nimage: {registry: %s, tag: %s}\n%s", registry, tag,
		strings.Replace(more, "ca: {", "ca: {kubernetes: {injection: {enabled: true, failurePolicy: Fail}}, ", 1))
	if err := os.WriteFile(values, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k.shell(env, "helm install signet deploy/helm/signet --namespace "+installation+" --create-namespace --values "+values+" --wait --timeout 2m")
	bundle := []string{"get", "mutatingwebhookconfiguration", "signet-inject", "-o", "jsonpath={.webhooks[0].clientConfig.caBundle}"}
	was := k.until("there is a caBundle", func(out string, err error) bool { return err == nil && out != "" }, bundle...)
	k.shell(env, "helm upgrade signet deploy/helm/signet --namespace "+installation+" --values "+values+" --set ca.kubernetes.injection.failurePolicy=Ignore --wait --timeout 2m")
	if is := k.kubectl(bundle...); is != was {
		t.Errorf("after an upgrade the caBundle is %q, before %q", is, was)
	}
	k.kubectl("-n", k.namespace, "create", "serviceaccount", "intruder")
	k.kubectl("-n", k.namespace, "create", "serviceaccount", "documents")
	k.kubectlIn(fmt.Sprintf("kind: Identity\nname: pods\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\non: [k8s_psat:cluster:prod]\n---\n"+
		"kind: CallPolicy\nname: documents\nservice: /ns/%[1]s/sa/documents\nmode: enforce\nallow:\n  - from: [/ns/%[1]s/sa/web]\n    http: [{methods: [GET], paths: [/v1/**]}]\n", k.namespace),
		"-n", installation, "exec", "-i", "signet-ca-0", "--", "signet", "apply", "-f", "-")
	image := need(t, "SIGNET_KUBE_WORKLOAD_IMAGE", "an image with test/kube/workload")
	k.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: documents
  namespace: %[1]s
  labels: {app: documents, signet-id.github.io/inject: "true"}
  annotations: {signet-id.github.io/inject-inbound: "8443=http:8080"}
spec:
  serviceAccountName: documents
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: %[2]q, args: [plain, "127.0.0.1:8080"]}]
---
apiVersion: v1
kind: Service
metadata: {name: documents, namespace: %[1]s}
spec: {selector: {app: documents}, ports: [{port: 8443}]}
`, k.namespace, image))
	k.kubectl("-n", k.namespace, "wait", "--for=condition=Ready", "pod/documents", "--timeout=90s")
	times := strings.Fields(k.field("pod/documents", ".status.initContainerStatuses[0].started} {.status.initContainerStatuses[0].state.running.startedAt} {.status.containerStatuses[0].state.running.startedAt"))
	if len(times) != 3 || times[0] != "true" || times[1] > times[2] {
		t.Errorf("proxy started (%q), and when, and the program when: want the program after it", times)
	}
	for _, c := range []struct{ account, path, want string }{{"web", "v1/7", "got: 200 plain /v1/7"}, {"web", "other", "got: 403"}, {"intruder", "v1/7", "got: 502"}} {
		name := strings.ReplaceAll(c.account+"-"+c.path, "/", "-")
		k.apply(fmt.Sprintf(`apiVersion: batch/v1
kind: Job
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  backoffLimit: 0
  template:
    metadata:
      labels: {job: %[1]s, signet-id.github.io/inject: "true"}
      annotations: {signet-id.github.io/inject-outbound: "15001=http:documents.%[2]s.svc:8443 /ns/%[2]s/sa/documents"}
    spec:
      serviceAccountName: %[3]s
      automountServiceAccountToken: false
      restartPolicy: Never
      containers: [{name: app, image: %[4]q, args: [get, "http://127.0.0.1:15001/%[5]s"]}]
`, name, k.namespace, c.account, image, c.path))
		// The Job ends, and with it the proxy.
		k.until(name+" ends", func(out string, err error) bool { return err == nil && strings.Contains(out, "True") }, "-n", k.namespace, "get", "job", name, "-o", `jsonpath={.status.conditions[?(@.type=="Complete")].status}{.status.conditions[?(@.type=="Failed")].status}`)
		said := k.kubectl("-n", k.namespace, "logs", "job/"+name, "-c", "app")
		if !strings.HasPrefix(said, c.want) {
			t.Errorf("%s says %q, want %q", name, said, c.want)
		}
		t.Logf("%s: %s", name, said)
	}
}
