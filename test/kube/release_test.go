//go:build kube

package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// An installer is who installs the chart in the first cluster.
type installer struct {
	*cluster
	env []string
	// basic are the values of every release: names, images, and what this cluster needs.
	basic string
}

func newInstaller(t *testing.T, within time.Duration) *installer {
	t.Helper()
	k, env, more := chartFor(t, within)
	registry, tag := need(t, "SIGNET_KUBE_IMAGES", "where signet's images are"), need(t, "SIGNET_KUBE_TAG", "their tag")
	return &installer{k, env, fmt.Sprintf("trustDomain: example.org\nclusterName: prod\nimage: {registry: %s, tag: %s}\n%s", registry, tag, more)}
}

// helm runs helm with values, each of which is laid over those before it.
func (i *installer) helm(command string, values ...string) string {
	i.t.Helper()
	out, err := i.tryHelm(command, values...)
	if err != nil {
		i.t.Fatalf("helm %s: %v\n%s", command, err, out)
	}
	return out
}

func (i *installer) tryHelm(command string, values ...string) (string, error) {
	i.t.Helper()
	dir := i.t.TempDir()
	for n, v := range append([]string{i.basic}, values...) {
		file := filepath.Join(dir, fmt.Sprintf("values-%d.yaml", n))
		if err := os.WriteFile(file, []byte(v), 0o600); err != nil {
			i.t.Fatal(err)
		}
		command += " --values " + file
	}
	return i.tryShell(i.env, "helm "+command)
}

// signet runs a command of signet in the CA's pod.
func (i *installer) signet(in string, args ...string) string {
	i.t.Helper()
	return i.kubectlIn(in, append([]string{"-n", installation, "exec", "-i", "signet-ca-0", "--", "signet"}, args...)...)
}

// bundle is the trust domain's bundle as the CA has it.
func (i *installer) bundle() string {
	i.t.Helper()
	return i.signet("", "bundle", "show", "--format", "pem")
}

// event waits for an Event in a namespace that says something.
func (k *cluster) event(namespace, about, want string) string {
	k.t.Helper()
	return k.until(about+" has an Event with "+want, func(out string, err error) bool { return err == nil && strings.Contains(out, want) },
		"-n", namespace, "get", "events", "--field-selector", "involvedObject.name="+about, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`)
}

// unprivileged is a pod that the level restricted of Pod Security lets in: one container of test/kube/workload, with volumes and what else it needs.
func (k *cluster) unprivileged(name, serviceAccount, args, env, volumes, mounts string) {
	k.t.Helper()
	k.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  serviceAccountName: %s
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: main
    image: %q
    args: [%s]
    env: [%s]
    volumeMounts: [%s]
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
  volumes: [%s]
`, name, k.namespace, serviceAccount, need(k.t, "SIGNET_KUBE_WORKLOAD_IMAGE", "an image with test/kube/workload"), args, env, mounts, volumes))
}

// restrict lets only pods into this test's namespace that Pod Security's level restricted allows.
func (k *cluster) restrict() {
	k.t.Helper()
	k.kubectl("label", "namespace", k.namespace, "pod-security.kubernetes.io/enforce=restricted")
}
