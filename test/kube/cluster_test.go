//go:build kube

package kube

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// need returns a variable of the environment that a test cannot do without.
func need(t *testing.T, name, what string) string {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		t.Fatalf("%s is not set; set it to %s", name, what)
	}
	return v
}

// optional skips the test when a variable is not set.
func optional(t *testing.T, name, what string) string {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		t.Skipf("%s is not set; set it to %s", name, what)
	}
	return v
}

// A cluster is a running Kubernetes in which the test has a namespace of its own.
type cluster struct {
	t          *testing.T
	ctx        context.Context
	kubeconfig string
	namespace  string
	nodeRoot   string // where the node's file system is, if it can be read here
}

// open makes the namespace, the service accounts agent, web and ca in it, and what docs/operate/attestors/k8s_psat.md says
// that the CA needs.
func open(t *testing.T, ctx context.Context, kubeconfig, nodeRoot string) *cluster {
	t.Helper()
	k := &cluster{t: t, ctx: ctx, kubeconfig: kubeconfig, nodeRoot: nodeRoot, namespace: "signet-test-" + strings.ToLower(rand.Text()[:8])}
	k.kubectl("create", "namespace", k.namespace)
	k.afterwards(func() {
		k.kubectl("delete", "namespace", k.namespace, "--wait=false")
		k.kubectl("delete", "clusterrolebinding", k.namespace)
	})
	for _, sa := range []string{"agent", "web", "ca"} {
		k.kubectl("-n", k.namespace, "create", "serviceaccount", sa)
	}
	k.apply(documentedRole(t))
	k.kubectl("create", "clusterrolebinding", k.namespace, "--clusterrole=signet-node-attestation", "--serviceaccount="+k.namespace+":ca")
	return k
}

// afterwards does something when the test has ended, and its context with it.
func (k *cluster) afterwards(do func()) {
	k.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		k.ctx = ctx
		do()
	})
}

// documentedRole is the ClusterRole in the documentation, so that it is tried too.
func documentedRole(t *testing.T) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/operate/attestors/k8s_psat.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(page), "```") {
		if text, ok := strings.CutPrefix(block, "yaml\n"); ok && strings.Contains(text, "kind: ClusterRole") {
			return text
		}
	}
	t.Fatal("the documentation has no ClusterRole")
	return ""
}

func (k *cluster) kubectl(args ...string) string { return k.kubectlIn("", args...) }

func (k *cluster) kubectlIn(in string, args ...string) string {
	k.t.Helper()
	out, err := k.try(in, args...)
	if err != nil {
		k.t.Fatal(err)
	}
	return out
}

// try is kubectlIn for what may fail.
func (k *cluster) try(in string, args ...string) (string, error) {
	program := os.Getenv("SIGNET_KUBECTL")
	if program == "" {
		program = "kubectl"
	}
	cmd := exec.CommandContext(k.ctx, program, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+k.kubeconfig)
	cmd.Stdin = strings.NewReader(in)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// command returns all that a program says.
func command(ctx context.Context, program string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	return string(out), err
}

func (k *cluster) apply(documents string) { k.t.Helper(); k.kubectlIn(documents, "apply", "-f", "-") }

// A pod runs, with a projected token in it as agents have it.
type pod struct {
	k              *cluster
	name, uid      string
	node, nodeUID  string
	serviceAccount string
}

// run starts a pod and waits until it runs.
func (k *cluster) run(name, serviceAccount string) *pod {
	k.t.Helper()
	image := os.Getenv("SIGNET_KUBE_IMAGE")
	if image == "" {
		image = "registry.k8s.io/pause:3.10"
	}
	k.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: signet-agent}}
spec:
  serviceAccountName: %s
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: %q, volumeMounts: [{name: token, mountPath: /var/run/secrets/tokens, readOnly: true}]}
  volumes:
  - name: token
    projected: {sources: [{serviceAccountToken: {path: spire-agent, audience: spire-server, expirationSeconds: 7200}}]}
`, name, k.namespace, serviceAccount, image))
	k.kubectl("-n", k.namespace, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=90s")
	var o struct {
		Metadata struct{ UID string }
		Spec     struct{ NodeName string }
	}
	if err := json.Unmarshal([]byte(k.kubectl("-n", k.namespace, "get", "pod", name, "-o", "json")), &o); err != nil {
		k.t.Fatal(err)
	}
	return &pod{k: k, name: name, uid: o.Metadata.UID, serviceAccount: serviceAccount, node: o.Spec.NodeName,
		nodeUID: k.kubectl("get", "node", o.Spec.NodeName, "-o", "jsonpath={.metadata.uid}")}
}

// get returns a field of the pod.
func (p *pod) get(path string) string {
	return p.k.kubectl("-n", p.k.namespace, "get", "pod", p.name, "-o", "jsonpath={"+path+"}")
}

// tokenFile is the token in the pod: the file that the kubelet has written, where the node's file system can be read here.
// Elsewhere it is a file of ours with a token that the same call of the API gave, which the kubelet makes too.
func (p *pod) tokenFile() string {
	p.k.t.Helper()
	if p.k.nodeRoot != "" {
		return filepath.Join(p.k.nodeRoot, "var/lib/kubelet/pods", p.uid, "volumes/kubernetes.io~projected/token/spire-agent")
	}
	path := filepath.Join(p.k.t.TempDir(), "spire-agent")
	if err := os.WriteFile(path, []byte(p.bound("spire-server")), 0o600); err != nil {
		p.k.t.Fatal(err)
	}
	return path
}

// token is what is in the file.
func (p *pod) token() string {
	p.k.t.Helper()
	data, err := os.ReadFile(p.tokenFile())
	if err != nil {
		p.k.t.Fatal(err)
	}
	return string(data)
}

// bound is a token of the pod for an audience.
func (p *pod) bound(audience string) string {
	return p.k.create(p.serviceAccount, "--bound-object-kind=Pod", "--bound-object-name="+p.name, "--bound-object-uid="+p.uid, "--audience="+audience)
}

// create makes a token of a service account.
func (k *cluster) create(serviceAccount string, args ...string) string {
	k.t.Helper()
	return k.kubectl(append([]string{"-n", k.namespace, "create", "token", serviceAccount}, args...)...)
}

// server is where the API server is, and its authorities in PEM.
func (k *cluster) server() (url, authorities string) {
	k.t.Helper()
	var c struct {
		Clusters []struct {
			Cluster struct {
				Server string `json:"server"`
				CA     []byte `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
	}
	if err := json.Unmarshal([]byte(k.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json")), &c); err != nil {
		k.t.Fatal(err)
	}
	if len(c.Clusters) != 1 {
		k.t.Fatalf("%s has no current context", k.kubeconfig)
	}
	return c.Clusters[0].Cluster.Server, string(c.Clusters[0].Cluster.CA)
}

// credentials is a kubeconfig for one of the service accounts, with a token that is in a file beside it.
func (k *cluster) credentials(serviceAccount string) string {
	k.t.Helper()
	dir := k.t.TempDir()
	server, ca := k.server()
	for name, text := range map[string]string{
		"ca.crt": ca, "token": k.create(serviceAccount),
		"config": fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: test}}]
clusters: [{name: test, cluster: {server: %q, certificate-authority: ca.crt}}]
users: [{name: test, user: {tokenFile: token}}]
`, server)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			k.t.Fatal(err)
		}
	}
	return filepath.Join(dir, "config")
}
