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

// TestChartInTwoNamespaces: the CA in a namespace in which Pod Security enforces its level restricted, agents in one of their own by a second
// release; the seal key in a Secret that was made by hand. What the CA knows outlives its pod, another seal key, and its uninstallation.
func TestChartInTwoNamespaces(t *testing.T) {
	i := newInstaller(t, 8*time.Minute)
	agents := i.space("agents", "pod-security.kubernetes.io/enforce=privileged", "signet-id.github.io/bundle=true")
	i.shell(i.env, "kubectl create namespace "+installation+" && kubectl label namespace "+installation+" pod-security.kubernetes.io/enforce=restricted pod-security.kubernetes.io/warn=restricted")
	of := fmt.Sprintf(`
agent: {enabled: false}
ca:
  agentServiceAccounts: ['%[1]s:signet-agent']
  seal: {source: secret, secretName: signet-seal}
networkPolicy: {caFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[1]s}}}]}
`, agents)

	// Until there is a seal key the pod waits, and says for what.
	if out := i.helm("install signet deploy/helm/signet --namespace "+installation, of); strings.Contains(out, "PodSecurity") {
		t.Errorf("a CA under restricted Pod Security: %s", out)
	}
	i.event(installation, "signet-ca-0", `secret "signet-seal" not found`)
	dir := t.TempDir()
	script := documented(t, "../../docs/kubernetes/chart.md", "create secret generic signet-seal")
	i.shell(i.env, "cd "+dir+" && "+script)
	if key, err := os.ReadFile(filepath.Join(dir, "seal-key")); err != nil || len(key) != 32 {
		t.Fatalf("the documentation makes a seal key of %d bytes, %v", len(key), err)
	}
	i.kubectl("-n", installation, "rollout", "status", "statefulset/signet-ca", "--timeout=150s")

	// Agents elsewhere.
	i.helm("install signet deploy/helm/signet --namespace "+agents+" --wait --timeout 2m", "crds: {install: false}\nca: {enabled: false}\nagent: {serverAddress: 'signet-ca."+installation+".svc:8081', bundleConfigMap: signet-bundle}")
	i.afterwards(func() { i.shell(i.env, "helm uninstall signet --namespace "+agents+" --wait") })
	i.apply("apiVersion: signet-id.github.io/v1alpha1\nkind: Identity\nmetadata: {name: pods}\nspec: {spiffeID: '/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}', on: ['k8s_psat:cluster:prod']}\n")
	i.traffic()
	i.moves()
	knows := func() string {
		t.Helper()
		return i.bundle() + i.signet("", "get", "identities", "-o", "json") + strings.Join(strings.Fields(i.signet("", "agent", "list", "-o", "json")), " ")
	}
	authorities := i.bundle()
	same := func(what string) {
		t.Helper()
		if now := i.bundle(); now != authorities {
			t.Fatalf("%s: the trust bundle is another one:\n%s\nwas\n%s\n%s", what, now, authorities, knows())
		}
		if got := i.signet("", "agent", "list"); !strings.Contains(got, "/spire/agent/k8s_psat/prod/") {
			t.Errorf("%s: the CA knows the agents %s", what, got)
		}
		if got := i.signet("", "get", "identities"); !strings.Contains(got, "pods") {
			t.Errorf("%s: the CA knows the identities %s", what, got)
		}
		i.moves()
	}

	i.kubectl("-n", installation, "delete", "pod", "signet-ca-0")
	i.kubectl("-n", installation, "rollout", "status", "statefulset/signet-ca", "--timeout=90s")
	same("a new pod")

	// Another seal key, in the same Secret.
	upgrade := "upgrade signet deploy/helm/signet --namespace " + installation + " --wait --timeout "
	key := func(name string, fill byte) {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(strings.Repeat(string(fill), 32)), 0o600); err != nil {
			t.Fatal(err)
		}
		i.shell(i.env, "kubectl -n "+installation+" create secret generic signet-seal --dry-run=client -o yaml $(for f in "+dir+"/*; do echo --from-file=$f; done) | kubectl apply -f - 2>/dev/null")
	}
	key("second", 'b')
	i.helm(upgrade+"90s", of, "ca: {seal: {secretKey: second}, config: {seal: {previous: {systemd_credential: seal-key}}}}")
	if got := i.kubectl("-n", installation, "logs", "signet-ca-0"); !strings.Contains(got, "sealed the keys anew") {
		t.Errorf("with seal.previous the CA says\n%s", got)
	}
	same("another seal key")
	i.helm(upgrade+"90s", of, "ca: {seal: {secretKey: second}}")
	same("without the former seal key")

	// A wrong one: it does not start, says why, and is back after the rollback.
	key("third", 'c')
	if out, err := i.tryHelm(upgrade+"15s", of, "ca: {seal: {secretKey: third}}"); err == nil {
		t.Errorf("a CA with a wrong seal key: %s", out)
	}
	i.until("the CA says that its seal key is wrong", func(out string, err error) bool {
		return err == nil && strings.Contains(out, "wrong seal key")
	}, "-n", installation, "logs", "signet-ca-0", "--tail=5")
	i.shell(i.env, "helm rollback signet --namespace "+installation+" --wait --timeout 90s")
	same("after the rollback")

	// The volume: what of it cannot be changed, Kubernetes says, and how it can be done is documented.
	out, err := i.tryHelm(upgrade+"90s", of, "ca: {seal: {secretKey: second}, persistence: {size: 5Gi}}")
	if err == nil || !strings.Contains(out, "updates to statefulset spec for fields other than") {
		t.Errorf("another size of the volume: %v: %s", err, out)
	}
	was := i.kubectl("-n", installation, "get", "pod", "signet-ca-0", "-o", "jsonpath={.metadata.uid}")
	i.shell(i.env, documented(t, "../../docs/kubernetes/chart.md", "delete statefulset signet-ca --cascade=orphan"))
	i.helm(upgrade+"90s", of, "ca: {seal: {secretKey: second}, persistence: {size: 5Gi}}")
	if is := i.kubectl("-n", installation, "get", "pod", "signet-ca-0", "-o", "jsonpath={.metadata.uid}"); is != was {
		t.Errorf("the pod was replaced for another size of its volume")
	}
	same("another size")

	// Without the CA, and with it again.
	i.shell(i.env, "helm uninstall signet --namespace "+installation+" --wait")
	if got := i.kubectl("-n", installation, "get", "persistentvolumeclaim", "data-signet-ca-0", "-o", "jsonpath={.status.phase}"); got != "Bound" {
		t.Fatalf("after the uninstallation the volume's claim is %q", got)
	}
	i.moves()
	i.helm("install signet deploy/helm/signet --namespace "+installation+" --wait --timeout 2m", of, "ca: {seal: {secretKey: second}}")
	same("after another installation")
}

// documented returns the commands of a page that have some words in them: a block, or a line's code.
func documented(t *testing.T, page, words string) string {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range block.FindAllStringSubmatch(string(text), -1) {
		if strings.Contains(b[1], words) {
			return b[1]
		}
	}
	t.Fatalf("%s has no commands with %q", page, words)
	return ""
}
