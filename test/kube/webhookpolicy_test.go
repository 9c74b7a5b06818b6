//go:build kube

package kube

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// TestTheCAsTokenChangesTheCABundleAlone: the CA's role lets it patch the webhook's configuration, and the chart's admission policy keeps
// that to the caBundle. Whoever has the CA's token sends nobody's pods elsewhere, and does not take the webhook out of force.
func TestTheCAsTokenChangesTheCABundleAlone(t *testing.T) {
	k := first(t, bounded(t))
	const chart = "helm template signet deploy/helm/signet --namespace %s --set trustDomain=example.org,clusterName=prod,ca.kubernetes.injection.enabled=true" +
		" --show-only templates/injection.yaml --show-only templates/ca-rbac.yaml"
	objects := k.shell(k.environment(), fmt.Sprintf(chart, k.namespace))
	k.afterwards(func() { k.kubectlIn(objects, "delete", "--ignore-not-found", "--wait=false", "-f", "-") })
	k.apply(objects)
	k.kubectl("label", "mutatingwebhookconfiguration", "signet-inject", "team=platform")
	as := func(user string) func(ops string, dryRun ...string) error {
		conf, err := clientcmd.BuildConfigFromFlags("", k.kubeconfig)
		if err != nil {
			t.Fatal(err)
		}
		conf.Impersonate.UserName = user
		c, err := kubernetes.NewForConfig(conf)
		if err != nil {
			t.Fatal(err)
		}
		return func(ops string, dryRun ...string) error {
			_, err := c.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(k.ctx, "signet-inject", types.JSONPatchType, []byte(ops), metav1.PatchOptions{DryRun: dryRun})
			return err
		}
	}
	theCA, anAdmin := as("system:serviceaccount:"+k.namespace+":signet-ca"), as("")

	// API servers begin to ask a policy a moment after it was made.
	const elsewhere, refusal = `[{"op": "replace", "path": "/webhooks/0/clientConfig/service/namespace", "value": "shop"}]`, "the CA may change caBundle alone"
	for err := theCA(elsewhere, metav1.DryRunAll); err == nil || !strings.Contains(err.Error(), refusal); err = theCA(elsewhere, metav1.DryRunAll) {
		pause(t, k.ctx)
	}
	another, err := json.Marshal(map[string]any{"name": "other.example.org", "clientConfig": map[string]any{"url": "https://203.0.113.1/"}, "sideEffects": "None", "admissionReviewVersions": []string{"v1"},
		"rules": []any{map[string]any{"apiGroups": []string{"*"}, "apiVersions": []string{"*"}, "operations": []string{"*"}, "resources": []string{"*"}}}})
	if err != nil {
		t.Fatal(err)
	}
	for what, ops := range map[string]string{
		"another Service":              elsewhere,
		"a URL":                        `[{"op": "remove", "path": "/webhooks/0/clientConfig/service"}, {"op": "add", "path": "/webhooks/0/clientConfig/url", "value": "https://203.0.113.1/"}]`,
		"another path":                 `[{"op": "replace", "path": "/webhooks/0/clientConfig/service/path", "value": "/other"}]`,
		"all resources":                `[{"op": "replace", "path": "/webhooks/0/rules/0/resources/0", "value": "secrets"}]`,
		"all pods":                     `[{"op": "replace", "path": "/webhooks/0/objectSelector", "value": {}}]`,
		"all namespaces":               `[{"op": "remove", "path": "/webhooks/0/namespaceSelector"}]`,
		"no pod":                       `[{"op": "add", "path": "/webhooks/0/matchConditions", "value": [{"name": "never", "expression": "false"}]}]`,
		"another failurePolicy":        `[{"op": "replace", "path": "/webhooks/0/failurePolicy", "value": "Fail"}]`,
		"another time limit":           `[{"op": "replace", "path": "/webhooks/0/timeoutSeconds", "value": 30}]`,
		"another name":                 `[{"op": "replace", "path": "/webhooks/0/name", "value": "other.signet-id.github.io"}]`,
		"another reinvocation":         `[{"op": "replace", "path": "/webhooks/0/reinvocationPolicy", "value": "Never"}]`,
		"another matchPolicy":          `[{"op": "replace", "path": "/webhooks/0/matchPolicy", "value": "Exact"}]`,
		"another webhook beside":       `[{"op": "add", "path": "/webhooks/-", "value": ` + string(another) + `}]`,
		"another webhook in its place": `[{"op": "replace", "path": "/webhooks/0", "value": ` + string(another) + `}]`,
		"no webhook":                   `[{"op": "remove", "path": "/webhooks"}]`,
		"a finalizer":                  `[{"op": "add", "path": "/metadata/finalizers", "value": ["example.org/stays"]}]`,
		"an owner":                     `[{"op": "add", "path": "/metadata/ownerReferences", "value": [{"apiVersion": "v1", "kind": "Node", "name": "none", "uid": "1"}]}]`,
		"no labels":                    `[{"op": "remove", "path": "/metadata/labels"}]`,
		"an annotation":                `[{"op": "add", "path": "/metadata/annotations", "value": {"a": "b"}}]`,
	} {
		if err := theCA(ops, metav1.DryRunAll); err == nil || !strings.Contains(err.Error(), refusal) {
			t.Errorf("the CA gives it %s: %v", what, err)
		}
		if err := anAdmin(ops, metav1.DryRunAll); err != nil { // or the API server would refuse it by itself
			t.Errorf("an admin gives it %s: %v", what, err)
		}
	}

	// What it is for: the caBundle is written, and written anew.
	_, authorities := k.server()
	for _, pem := range []string{authorities, authorities + authorities} {
		if err := theCA(fmt.Sprintf(`[{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": %q}]`, base64.StdEncoding.EncodeToString([]byte(pem)))); err != nil {
			t.Error(err)
		}
	}
	if err := theCA(elsewhere, metav1.DryRunAll); err == nil {
		t.Error("with a caBundle the CA has it called elsewhere")
	}
}
