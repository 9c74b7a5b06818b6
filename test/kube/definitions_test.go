//go:build kube

package kube

import (
	"strings"
	"testing"
	"time"
)

const crds = "deploy/helm/signet/files/crds"

// TestDefinitionsOfOthers: the definitions of the custom resources were there before the chart, or belong to another release. Helm says
// so and changes nothing; without them the chart installs; it takes them over if asked; and neither that, nor a rollback, nor an
// uninstallation takes away a definition or a custom resource.
func TestDefinitionsOfOthers(t *testing.T) {
	i := newInstaller(t, 8*time.Minute)
	i.shell(i.env, "kubectl apply -f "+crds)
	i.kubectl("wait", "--for=condition=Established", "crd/identities.signet-id.github.io", "--timeout=60s")
	i.apply("apiVersion: signet-id.github.io/v1alpha1\nkind: Identity\nmetadata: {name: pods}\nspec: {spiffeID: '/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}', on: ['k8s_psat:cluster:prod']}\n")
	uid := func() string {
		return i.kubectl("get", "identities.signet-id.github.io", "pods", "-o", "jsonpath={.metadata.uid}")
	}
	accepted := func() {
		t.Helper()
		i.until("the Identity is accepted", func(out string, err error) bool { return err == nil && out == "True" },
			"get", "identities.signet-id.github.io", "pods", "-o", `jsonpath={.status.conditions[?(@.type=="Accepted")].status}`)
	}
	keeper := func() string {
		return i.kubectl("get", "crd", "identities.signet-id.github.io", "-o", `jsonpath={.metadata.annotations.meta\.helm\.sh/release-name} {.metadata.annotations.helm\.sh/resource-policy}`)
	}
	was := uid()

	// Helm refuses, and there is nothing of the chart.
	out, err := i.tryHelm("install signet deploy/helm/signet --namespace " + installation + " --create-namespace")
	if err == nil || !strings.Contains(out, "invalid ownership metadata") || !strings.Contains(out, "signet-id.github.io") {
		t.Fatalf("helm install over the definitions of others: %v: %s", err, out)
	}
	if got := i.kubectl("-n", installation, "get", "all,configmaps", "-l", "app.kubernetes.io/part-of=signet", "-o", "name"); got != "" {
		t.Errorf("after the refusal there are %s", got)
	}
	const install, upgrade = "install signet deploy/helm/signet --namespace " + installation + " --create-namespace --wait --timeout 2m", "upgrade signet deploy/helm/signet --namespace " + installation + " --wait --timeout 2m"
	i.helm(install, "crds: {install: false}")
	accepted()
	if got := keeper(); got != "" {
		t.Errorf("without being asked, the chart has the definitions: %q", got)
	}

	// It takes them over, then leaves them, and goes back to before.
	i.helm(upgrade + " --take-ownership")
	if got := keeper(); got != "signet keep" {
		t.Errorf("asked to, the chart has not taken the definitions over: %q", got)
	}
	out, err = i.tryHelm("install other deploy/helm/signet --namespace "+i.namespace, "ca: {enabled: false}\nagent: {serverAddress: 'signet-ca.signet-system.svc:8081', bundleConfigMap: signet-bundle}")
	if err == nil || !strings.Contains(out, `"meta.helm.sh/release-name" must equal "other"`) {
		t.Errorf("a second release with the definitions of the first: %v: %s", err, out)
	}
	i.helm(upgrade, "crds: {install: false}")
	if got := uid(); got != was {
		t.Fatalf("with crds.install false the Identity is %s, before %s", got, was)
	}
	i.helm("upgrade signet deploy/helm/signet --namespace " + installation + " --wait --timeout 2m") // it has them again
	i.shell(i.env, "helm rollback signet 1 --namespace "+installation+" --wait --timeout 2m")
	if got := uid(); got != was {
		t.Fatalf("after a rollback to before the definitions were the chart's, the Identity is %s, before %s", got, was)
	}
	i.helm(upgrade)
	i.shell(i.env, "helm uninstall signet --namespace "+installation+" --wait")
	if got := uid(); got != was {
		t.Fatalf("after the uninstallation the Identity is %s, before %s", got, was)
	}

	// Nothing holds a resource when no CA is there to let it go, and the next installation goes on with what is there.
	i.apply("apiVersion: signet-id.github.io/v1alpha1\nkind: Identity\nmetadata: {name: other}\nspec: {spiffeID: /other, match: ['unix:uid:1']}\n")
	i.kubectl("delete", "identities.signet-id.github.io", "other", "--timeout=20s")
	i.kubectl("annotate", "identities.signet-id.github.io", "pods", "signet.test/again=1")
	i.helm(install)
	if got := uid(); got != was {
		t.Errorf("after another installation the Identity is %s, before %s", got, was)
	}
	i.apply("apiVersion: signet-id.github.io/v1alpha1\nkind: Identity\nmetadata: {name: pods}\nspec: {spiffeID: '/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}', on: ['k8s_psat:cluster:prod'], x509TTL: 2h}\n")
	i.until("the new installation speaks of the new generation", func(out string, err error) bool { return err == nil && out == "2" },
		"get", "identities.signet-id.github.io", "pods", "-o", `jsonpath={.status.observedGeneration}`)
	accepted()
}
