//go:build kube

package kube

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// installation is the namespace that the documentation speaks of. One test at a time has it.
const installation = "signet-system"

// environment is that of a reader of the documentation, with a home of its own for what helm keeps.
func (k *cluster) environment() []string {
	path := filepath.Dir(need(k.t, "SIGNET_KUBECTL", "kubectl")) + ":" + filepath.Dir(need(k.t, "HELM", "helm")) + ":" + os.Getenv("PATH")
	return append(os.Environ(), "KUBECONFIG="+k.kubeconfig, "HOME="+k.t.TempDir(), "PATH="+path)
}

// shell runs a script from the root of the tree, and returns what it prints.
func (k *cluster) shell(env []string, script string) string {
	k.t.Helper()
	out, err := k.tryShell(env, script)
	if err != nil {
		k.t.Fatalf("%v\n%s\n%s", err, script, out)
	}
	return out
}

// tryShell is shell for what may fail.
func (k *cluster) tryShell(env []string, script string) (string, error) {
	cmd := exec.CommandContext(k.ctx, "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir, cmd.Env = "../..", env
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// volume gives the cluster, which has no storage, one volume for a CA, and returns its storage class.
func (k *cluster) volume() string {
	k.t.Helper()
	dir := k.t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		k.t.Fatal(err)
	}
	name := k.namespace
	k.apply(fmt.Sprintf(`apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 4Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: %[1]s
  persistentVolumeReclaimPolicy: Retain
  local: {path: %[2]q}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: Exists}]}]}}
`, name, dir))
	k.afterwards(func() { k.kubectl("delete", "persistentvolume", name, "--wait=false") })
	return name
}

// chart is the first cluster with nothing of the chart in it, which is so again after the test, and what it needs as values.
func chart(t *testing.T) (k *cluster, env []string, values string) {
	t.Helper()
	return chartFor(t, 8*time.Minute)
}

// chartFor is chart for a test that takes longer.
func chartFor(t *testing.T, d time.Duration) (k *cluster, env []string, values string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	k = first(t, ctx)
	env, values = k.environment(), k.values()
	// Other tests bring the definitions without helm, which then takes them for somebody else's, and the namespace.
	const away = "kubectl delete namespace shop " + installation + " --ignore-not-found && kubectl delete -f deploy/helm/signet/files/crds --ignore-not-found"
	k.afterwards(func() {
		if t.Failed() {
			out, err := k.try("", "get", "pods,events", "-A")
			t.Log(out, err)
			for _, of := range []string{"statefulset/signet-ca", "daemonset/signet-agent"} {
				out, err := k.try("", "-n", installation, "logs", of, "--tail=80")
				t.Log(out, err)
			}
		}
		k.shell(env, "helm uninstall signet --namespace "+installation+" --ignore-not-found --wait && "+away)
	})
	k.shell(env, away)
	return k, env, values
}

// values are what this cluster needs besides what the documentation says.
func (k *cluster) values() string {
	k.t.Helper()
	return fmt.Sprintf("ca: {persistence: {storageClass: %s}}\n", k.volume()) + k.agentValues()
}

func (k *cluster) agentValues() string {
	k.t.Helper()
	roots := os.Getenv("SIGNET_KUBE_CGROUP_ROOT")
	if roots == "" {
		roots = "/"
	}
	// The node's file system is the machine's: there, an agent would find what one of another cluster has left, and serve from that.
	return fmt.Sprintf("agent: {dataDirectory: %q, config: {workload_attestation: {k8s: {cgroup_roots: [%s]}}}}\n", k.t.TempDir(), roots)
}

var block = regexp.MustCompile("(?s)\n```sh\n(.*?)```\n")

// TestWalk runs the commands of docs/start/kubernetes.md, as they are but for the names of the images and what this cluster needs.
func TestWalk(t *testing.T) {
	k, env, more := chart(t)
	page, err := os.ReadFile("../../docs/start/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	registry, tag := need(t, "SIGNET_KUBE_IMAGES", "where signet's images are"), need(t, "SIGNET_KUBE_TAG", "their tag")
	blocks := block.FindAllStringSubmatch(string(page), -1)
	if len(blocks) < 9 {
		t.Fatalf("the page has %d blocks of commands", len(blocks))
	}
	values := filepath.Join(t.TempDir(), "values.yaml")
	said := map[string]string{} // by what was asked
	for _, b := range blocks {
		script := b[1]
		script = strings.ReplaceAll(script, "registry: images.example.org/signet, tag: 1.2.3", "registry: "+registry+", tag: "+tag)
		script = strings.ReplaceAll(script, "images.example.org/signet/signet-examples:1.2.3", registry+"/signet-examples:"+tag)
		script = strings.ReplaceAll(script, "values.yaml", values)
		script = strings.Replace(script, "clusterName: prod\n", "clusterName: prod\n"+more, 1)
		if before, why, ok := strings.Cut(script, "kubectl -n signet-system exec signet-ca-0 -- signet why-denied"); ok {
			said["logs job/intruder"] = k.shell(env, before)
			said["why-denied"] = k.eventually(env, "kubectl -n signet-system exec signet-ca-0 -- signet why-denied"+why)
			continue
		}
		out := k.shell(env, script)
		t.Logf("%s\n%s", script, out)
		for _, asked := range []string{"signet agent list", "logs job/web"} {
			if strings.Contains(script, asked) {
				said[asked] = out
			}
		}
	}
	for _, want := range []struct{ asked, says string }{
		{"signet agent list", "/spire/agent/k8s_psat/prod/"},
		{"logs job/web", "document 7 for spiffe://example.org/ns/shop/sa/web"},
		{"logs job/intruder", "tls: bad certificate"},
		{"why-denied", "denied: no rule allows it"},
		{"why-denied", "+ - from: [/ns/shop/sa/intruder]"}, // what would
	} {
		if !strings.Contains(said[want.asked], want.says) {
			t.Errorf("%s says %q, and not %q", want.asked, said[want.asked], want.says)
		}
	}
	if left := k.kubectl("get", "clusterroles,clusterrolebindings", "-o", "name"); strings.Contains(left, "signet-system-") {
		t.Errorf("after the removal there are\n%s", left)
	}
}

// eventually runs a script until it succeeds: the CA hears of a decision within seconds.
func (k *cluster) eventually(env []string, script string) string {
	k.t.Helper()
	for {
		cmd := exec.CommandContext(k.ctx, "bash", "-euo", "pipefail", "-c", script)
		cmd.Env = env
		if out, err := cmd.Output(); err == nil {
			return string(out)
		}
		pause(k.t, k.ctx)
	}
}

// TestChartUpgrade upgrades an installation to another image and another configuration and rolls it back, with pods that hold
// streams, fetch anew, and call each other by mutual TLS all the time. Nothing fails.
func TestChartUpgrade(t *testing.T) {
	k, env, more := chart(t)
	registry, tag, next := need(t, "SIGNET_KUBE_IMAGES", "where signet's images are"), need(t, "SIGNET_KUBE_TAG", "their tag"), need(t, "SIGNET_KUBE_TAG_NEXT", "the tag of others")
	values := filepath.Join(t.TempDir(), "values.yaml")
	text := fmt.Sprintf("trustDomain: example.org\nclusterName: prod\nimage: {registry: %s, tag: %s}\n%s", registry, tag, more)
	if err := os.WriteFile(values, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k.shell(env, "helm install signet deploy/helm/signet --namespace "+installation+" --create-namespace --values "+values+" --wait --timeout 2m")

	// The API server tells which pods a level of Pod Security would refuse: the agent's, and nobody else's.
	warned := k.shell(env, "kubectl label --dry-run=server --overwrite namespace "+installation+" pod-security.kubernetes.io/enforce=restricted")
	if !strings.Contains(warned, "signet-agent-") || strings.Contains(warned, "signet-ca") {
		t.Errorf("restricted Pod Security: %s", warned)
	}

	k.apply("apiVersion: signet-id.github.io/v1alpha1\nkind: Identity\nmetadata: {name: pods}\nspec: {spiffeID: '/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}', on: ['k8s_psat:cluster:prod']}\n")
	k.traffic()
	agent := func() string {
		return k.kubectl("-n", installation, "get", "pods", "-l", "app.kubernetes.io/name=signet-agent", "-o", "jsonpath={.items[*].metadata.name} {.items[*].spec.containers[0].image}")
	}
	before := agent()
	k.moves()
	held := k.held()
	goesOn := func(when string) {
		t.Helper()
		for k.held() == held { // the stream at the agent that is there now
			pause(t, k.ctx)
		}
		held = k.held()
		if lost := grep(k.kubectl("-n", k.namespace, "logs", "hold"), "watch: PermissionDenied"); lost != "" {
			t.Errorf("%s a stream was told that there is no identity:\n%s", when, lost)
		}
	}

	k.shell(env, "helm upgrade signet deploy/helm/signet --namespace "+installation+" --values "+values+" --set image.tag="+next+",log.level=debug,ca.config.ttl.x509=30m --wait --timeout 2m")
	upgraded := agent()
	if upgraded == before || !strings.HasSuffix(upgraded, "signet-agent:"+next) {
		t.Errorf("after the upgrade the agent is %s, before %s", upgraded, before)
	}
	k.moves()
	goesOn("after the upgrade")

	k.shell(env, "helm rollback signet --namespace "+installation+" --wait --timeout 2m")
	if back := agent(); back == upgraded || !strings.HasSuffix(back, "signet-agent:"+tag) {
		t.Errorf("after the rollback the agent is %s, before %s", back, upgraded)
	}
	calls, fetches := k.moves()
	goesOn("after the rollback")
	t.Logf("%d calls and %d fetches over an upgrade and a rollback", calls, fetches)
	for _, name := range []string{"serve", "call", "hold"} {
		if n := k.kubectl("-n", k.namespace, "get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"); n != "0" {
			t.Errorf("%s was started again %s times", name, n)
		}
	}
}

// traffic starts a server, a caller and a holder of streams.
func (k *cluster) traffic() {
	k.t.Helper()
	image := need(k.t, "SIGNET_KUBE_WORKLOAD_IMAGE", "an image with test/kube/workload")
	run := func(name string, args ...string) {
		k.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  serviceAccountName: web
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: %q
    args: ["%s"]
    env: [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///spiffe/agent.sock"}]
    volumeMounts: [{name: spiffe, mountPath: /spiffe, readOnly: true}]
  volumes: [{name: spiffe, hostPath: {path: /run/signet/agent, type: Directory}}]
`, name, k.namespace, image, strings.Join(args, `", "`)))
	}
	run("serve", "serve", ":9443")
	k.kubectl("-n", k.namespace, "wait", "--for=condition=Ready", "pod/serve", "--timeout=60s")
	ip := k.kubectl("-n", k.namespace, "get", "pod", "serve", "-o", "jsonpath={.status.podIP}")
	k.prints("serve", "serving")
	run("call", "call", ip+":9443")
	run("hold", "hold")
	k.prints("hold", "svid: ")
}

// held counts the answers that the pod hold has had by its streams.
func (k *cluster) held() int {
	k.t.Helper()
	return strings.Count(k.kubectl("-n", k.namespace, "logs", "hold"), "svid: ")
}

// prints waits until a pod has printed something, and returns the last line from there on.
func (k *cluster) prints(pod, what string) string {
	k.t.Helper()
	for {
		out, err := k.try("", "-n", k.namespace, "logs", pod, "--tail=50")
		if err == nil {
			if i := strings.LastIndex(out, what); i >= 0 {
				line, _, _ := strings.Cut(out[i:], "\n")
				return line
			}
		}
		pause(k.t, k.ctx)
	}
}

var counted = regexp.MustCompile(`calls: (\d+) failed: (\d+).* fetches: (\d+) failed: (\d+)`)

// moves waits until calls and fetches have gone on, and none of them has ever failed.
func (k *cluster) moves() (calls, fetches int) {
	k.t.Helper()
	read := func() (n [4]int) {
		line := k.prints("call", "calls: ")
		m := counted.FindStringSubmatch(line)
		if m == nil {
			k.t.Fatalf("the caller says %q", line)
		}
		for i := range n {
			n[i], _ = strconv.Atoi(m[i+1]) // digits
		}
		if n[1]+n[3] > 0 {
			k.t.Fatalf("%d calls and %d fetches failed: %s", n[1], n[3], k.kubectl("-n", k.namespace, "logs", "call", "--tail=20"))
		}
		return n
	}
	from := read()
	for {
		if now := read(); now[0] >= from[0]+20 && now[2] >= from[2]+20 {
			return now[0], now[2]
		}
		pause(k.t, k.ctx)
	}
}
