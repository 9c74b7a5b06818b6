//go:build kube

package kube

import (
	"os"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// monitors is as much of the Prometheus operator as an API server needs to have ServiceMonitors: the fields that the chart writes.
const monitors = `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: servicemonitors.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {kind: ServiceMonitor, listKind: ServiceMonitorList, plural: servicemonitors, singular: servicemonitor}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        required: [spec]
        properties:
          spec:
            type: object
            required: [endpoints, selector]
            properties:
              selector: {type: object, properties: {matchLabels: {type: object, additionalProperties: {type: string}}}}
              endpoints:
                type: array
                items: {type: object, properties: {port: {type: string}, interval: {type: string, pattern: '^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$'}}}
`

// monitored gives the cluster ServiceMonitors, until the test has ended.
func (k *cluster) monitored() {
	k.t.Helper()
	k.apply(monitors)
	k.atEnd("delete", "crd", "servicemonitors.monitoring.coreos.com")
	k.kubectl("wait", "--for=condition=Established", "crd/servicemonitors.monitoring.coreos.com", "--timeout=60s")
}

// TestChartAccepted: whatever an operator chooses of the values with which test/helm renders the chart, the API server takes it, every
// object and every field, without a warning.
func TestChartAccepted(t *testing.T) {
	k := first(t, bounded(t))
	k.monitored()
	env := k.environment()
	data, err := os.ReadFile("../helm/testdata/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var variants map[string]yaml.Node
	if err := yaml.Unmarshal(data, &variants); err != nil || len(variants) < 20 {
		t.Fatalf("%d variants, %v", len(variants), err)
	}
	for name, values := range variants {
		text, err := yaml.Marshal(&values)
		if err != nil {
			t.Fatal(err)
		}
		file := t.TempDir() + "/values.yaml"
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := k.tryShell(env, "helm template signet deploy/helm/signet --namespace "+k.namespace+" --set trustDomain=example.org,clusterName=prod --values "+file+
			" --api-versions monitoring.coreos.com/v1/ServiceMonitor | kubectl apply --server-side --force-conflicts --dry-run=server --validate=strict -f -")
		if err != nil || strings.Contains(out, "Warning") || !strings.Contains(out, "(server dry run)") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// TestInstalledNamesStay: by another trust domain or another name of the cluster no pod would have its identity any more. An upgrade to one is
// refused before anything is changed; any other is not.
func TestInstalledNamesStay(t *testing.T) {
	k := first(t, bounded(t))
	env := k.environment()
	helm := func(command string, values string) (string, error) {
		return k.tryShell(env, "helm "+command+" names deploy/helm/signet --namespace "+k.namespace+" --set crds.install=false,"+values)
	}
	const installed = "trustDomain=example.org,clusterName=prod"
	if out, err := helm("install", installed); err != nil {
		t.Fatal(out, err)
	}
	k.afterwards(func() { k.shell(env, "helm uninstall names --namespace "+k.namespace) })
	for values, want := range map[string]string{
		"trustDomain=example.com,clusterName=prod":                                                                `trustDomain: "names-ca" here was installed with "example.org", which cannot be changed`,
		"trustDomain=example.org,clusterName=prod2":                                                               `clusterName: "names-ca" here was installed with "prod", which cannot be changed`,
		"ca.enabled=false,agent.serverAddress=ca:1,agent.bundleConfigMap=b,trustDomain=example.org,clusterName=x": `clusterName: "names-`,
	} {
		if out, err := helm("upgrade", values); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v, %s", values, err, out)
		}
	}
	if out, err := helm("upgrade", installed+",log.level=debug"); err != nil {
		t.Error(out, err)
	}
}
