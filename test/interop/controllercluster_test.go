package interop

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// A kube is a running Kubernetes cluster of which the test is an admin.
type kube struct {
	t          *testing.T
	kubeconfig string
}

func (k *kube) kubectl(ctx context.Context, in string, args ...string) string {
	k.t.Helper()
	program := os.Getenv("SIGNET_KUBECTL")
	if program == "" {
		program = "kubectl"
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+k.kubeconfig)
	cmd.Stdin = strings.NewReader(in)
	out, err := cmd.CombinedOutput()
	if err != nil {
		k.t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestControllerManagerCluster has the controller-manager register the pods of a cluster by a ClusterSPIFFEID: one entry per
// pod, below the agent of its node, gone with the pod.
func TestControllerManagerCluster(t *testing.T) {
	foreign(t, envController)
	k := &kube{t: t, kubeconfig: os.Getenv(envKubeconfig)}
	crds := os.Getenv(envCRDs)
	if k.kubeconfig == "" || crds == "" {
		t.Skipf("%s and %s are not set: this test needs a cluster, and the controller-manager's resource definitions (docs/interop.md)", envKubeconfig, envCRDs)
	}
	ctx := bounded(t, 3*time.Minute)
	ca := startCA(t, ctx, "")
	ns := "signet-interop-" + strings.ToLower(rand.Text()[:8])
	k.kubectl(ctx, "", "apply", "-f", crds)
	k.kubectl(ctx, "", "wait", "--for=condition=Established", "crd/clusterspiffeids.spire.spiffe.io", "--timeout=60s")
	k.kubectl(ctx, "", "create", "namespace", ns)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		k.kubectl(ctx, "", "delete", "clusterspiffeid", ns, "--ignore-not-found")
		k.kubectl(ctx, "", "delete", "namespace", ns, "--wait=false")
	})
	p := controller(t, ca, "ignoreNamespaces: [kube-system, kube-public]\n", "KUBECONFIG="+k.kubeconfig)
	p.start()
	k.kubectl(ctx, fmt.Sprintf(`apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata: {name: %s}
spec:
  className: scm
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}/{{ .PodMeta.Name }}"
  dnsNameTemplates: ["{{ .PodMeta.Name }}.test.internal"]
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}
  podSelector: {matchLabels: {app: web}}
  ttl: 10m
`, ns, ns), "apply", "-f", "-")
	image := os.Getenv("SIGNET_KUBE_IMAGE")
	if image == "" {
		image = "registry.k8s.io/pause:3.10"
	}
	pod := func(name, app string) {
		k.kubectl(ctx, fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s, labels: {app: %s}}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers: [{name: main, image: %q}]\n", name, ns, app, image), "apply", "-f", "-")
	}
	pod("web-1", "web")
	pod("web-2", "web")
	pod("other", "other")

	path := func(name string) string { return "/ns/" + ns + "/sa/default/" + name }
	var first *types.Entry
	for _, name := range []string{"web-1", "web-2"} {
		if err := eventually(ctx, func() (err error) {
			if !p.running() {
				t.Fatalf("%s ended: %v", p.name, p.err)
			}
			first, err = entryOf(ctx, ca, path(name))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		uid := k.kubectl(ctx, "", "-n", ns, "get", "pod", name, "-o", "jsonpath={.metadata.uid}")
		node := k.kubectl(ctx, "", "get", "node", k.kubectl(ctx, "", "-n", ns, "get", "pod", name, "-o", "jsonpath={.spec.nodeName}"), "-o", "jsonpath={.metadata.uid}")
		if got, want := first.ParentId.Path, "/spire/agent/k8s_psat/test/"+node; got != want {
			t.Errorf("%s: parent %s, want %s, the agent of its node", name, got, want)
		}
		if len(first.Selectors) != 1 || first.Selectors[0].Type+":"+first.Selectors[0].Value != "k8s:pod-uid:"+uid || first.X509SvidTtl != 600 || len(first.DnsNames) != 1 {
			t.Errorf("%s: %v", name, first)
		}
	}
	if e, err := entryOf(ctx, ca, path("other")); err == nil {
		t.Errorf("a pod that nothing selects is registered: %v", e)
	}
	// An operator's hand in it is put right.
	if _, err := entryv1.NewEntryClient(ca.conn).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{first.Id}}); err != nil {
		t.Fatal(err)
	}
	if err := eventually(ctx, func() error {
		_, err := entryOf(ctx, ca, path("web-2"))
		return err
	}); err != nil {
		t.Errorf("the entry was not made again: %v", err)
	}
	k.kubectl(ctx, "", "-n", ns, "delete", "pod", "web-1", "--wait=false")
	if err := eventually(ctx, func() error {
		_, one := entryOf(ctx, ca, path("web-1"))
		if one == nil {
			return errors.New("the entry of a pod that is gone is still there")
		}
		_, two := entryOf(ctx, ca, path("web-2"))
		return two
	}); err != nil {
		t.Error(err)
	}
	if err := p.end(syscall.SIGTERM); err != nil {
		t.Logf("on SIGTERM: %v", err)
	}
}
