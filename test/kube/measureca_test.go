//go:build kube

package kube

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-id/signet/test/replicatest"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A measuredCA is the program signet as it is released, in a process of its own.
type measuredCA struct {
	t       *testing.T
	ctx     context.Context
	program string
	dir     string
	metrics string // address
	cmd     *exec.Cmd
	said    bytes.Buffer
}

// start starts it with what it is to do in the cluster. Its data stays from one start to the next.
func (c *measuredCA) start(kubernetes string) {
	c.t.Helper()
	c.metrics = replicatest.FreeAddress(c.t)
	config := fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %[2]s/data\nadmin_socket: {path: %[2]s/ca.sock}\nseal: {key_file: %[2]s/seal.key, create: true}\nmetrics: {listen: %[3]s}\nkubernetes: {clusters: {prod: %[4]s}}\n",
		replicatest.FreeAddress(c.t), c.dir, c.metrics, kubernetes)
	file := filepath.Join(c.dir, "ca.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.said.Reset()
	c.cmd = exec.Command(c.program, "ca", "run", "--config", file)
	c.cmd.Stdout, c.cmd.Stderr = &c.said, &c.said
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *measuredCA) stop() {
	if c.cmd == nil {
		return
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
	c.cmd.Wait()
	c.cmd = nil
	if c.t.Failed() {
		c.t.Log(c.said.String())
	}
}

// metric is the sum of the lines that begin so; 0 if there is none.
func (c *measuredCA) metric(prefix string) (sum float64) {
	req, err := http.NewRequestWithContext(c.ctx, http.MethodGet, "http://"+c.metrics+"/metrics", nil)
	if err != nil {
		c.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0 // it does not listen yet
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, prefix) {
			f := strings.Fields(line)
			v, err := strconv.ParseFloat(f[len(f)-1], 64)
			if err != nil {
				c.t.Fatal(err)
			}
			sum += v
		}
	}
	return sum
}

func (c *measuredCA) until(what string, ok func() bool) {
	c.t.Helper()
	for !ok() {
		if c.ctx.Err() != nil {
			c.t.Fatalf("it never comes that %s; the CA says:\n%s", what, c.said.String())
		}
		pauseFor(c.t, c.ctx, 100*time.Millisecond)
	}
}

func (c *measuredCA) knows(pods int) {
	c.t.Helper()
	c.until(fmt.Sprintf("%d pods are known", pods), func() bool {
		return c.metric(`signet_ca_kubernetes_objects{cluster="prod",kind="pods"}`) >= float64(pods) && c.metric("signet_ca_kubernetes_synced") == 1
	})
}

func (c *measuredCA) run(in string, args ...string) string {
	c.t.Helper()
	cmd := exec.CommandContext(c.ctx, c.program, append(args, "--socket", c.dir+"/ca.sock")...)
	cmd.Stdin = strings.NewReader(in)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("signet %q: %v: %s\nthe CA says:\n%s", args, err, out, c.said.String())
	}
	return string(out)
}

func (c *measuredCA) cpu() time.Duration {
	return cpuOf(c.t, []int{c.cmd.Process.Pid})[c.cmd.Process.Pid]
}

// weigh says what the process is, after its garbage had time to go.
func (c *measuredCA) weigh(what string, settle time.Duration) {
	c.t.Helper()
	pauseFor(c.t, c.ctx, settle)
	pid := c.cmd.Process.Pid
	c.t.Logf("%s: %.1f MiB resident, of which %.1f MiB are its own; %.1f MiB of heap in use; %.2f s of CPU since its start", what, mib(c.t, pid, "VmRSS"), mib(c.t, pid, "RssAnon"),
		c.metric("go_memstats_heap_inuse_bytes")/(1<<20), c.cpu().Seconds())
}

// What a CA costs in its own process with a hundred pods and with SIGNET_SIMULATED_PODS of them, that nobody runs, with a hundred
// templates that give each pod an identity and half of them a second one; and what it asks for while nothing changes, everything switched on, for
// SIGNET_MEASURE_IDLE seconds. SIGNET_BIN is the program. An API server is enough. The figures are in docs/performance.md.
func TestMeasureCA(t *testing.T) {
	program := optional(t, "SIGNET_BIN", "the program signet, as it is released, which is measured")
	n, idle := measured(t, "SIGNET_SIMULATED_PODS", 500), time.Duration(measured(t, "SIGNET_MEASURE_IDLE", 3))*time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Minute+idle)
	defer cancel()
	k := first(t, ctx)
	k.kubectl("create", "clusterrolebinding", k.namespace+"-measured", "--clusterrole=cluster-admin", "--serviceaccount="+k.namespace+":ca") // rights are tried elsewhere
	k.atEnd("delete", "clusterrolebinding", k.namespace+"-measured")
	k.kubectl("apply", "-f", spireCRDs(), "-f", "../../deploy/helm/signet/files/crds")
	k.apply(`apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {name: signet-inject}
webhooks:
- name: inject.signet-id.github.io
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Ignore
  clientConfig: {url: "https://127.0.0.1:9/"}
  objectSelector: {matchLabels: {signet.test/never: "true"}}
  rules: [{operations: [CREATE], apiGroups: [""], apiVersions: [v1], resources: [pods]}]
`)
	k.atEnd("delete", "mutatingwebhookconfiguration", "signet-inject")
	const nodes = 100
	for i := range nodes {
		k.simulatedNode(fmt.Sprintf("%s-n%02d", k.namespace, i))
	}
	text := "{kind: Identity, name: all, spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}', 'on': ['k8s_psat:cluster:prod']}\n"
	for i := range 99 {
		text += fmt.Sprintf("---\n{kind: Identity, name: t%02d, spiffeID: '/app/{{ .k8s.ns }}/%02[1]d', match: ['k8s:pod-label:app:t%02[1]d'], 'on': ['k8s_psat:cluster:prod']}\n", i)
	}
	made := 0
	grow := func(to int) time.Duration {
		t.Helper()
		admin, began := k.admin(), time.Now()
		next := make(chan int)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				for i := range next {
					p := simulatedPod(k.namespace, fmt.Sprintf("p%05d", i), fmt.Sprintf("%s-n%02d", k.namespace, i%nodes))
					p.Labels["app"] = fmt.Sprintf("t%02d", i%200)
					if _, err := admin.CoreV1().Pods(k.namespace).Create(ctx, p, metav1.CreateOptions{}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for ; made < to; made++ {
			next <- made
		}
		close(next)
		wg.Wait()
		return time.Since(began)
	}

	c := &measuredCA{t: t, ctx: ctx, program: program, dir: shortDir(t)}
	t.Cleanup(c.stop)
	settle := min(idle, 20*time.Second)
	base := fmt.Sprintf("kubeconfig: %s, namespace: %s, pods: {}, bundle: {}", k.credentials("ca"), k.namespace)
	grow(min(n, 100))
	c.start("{" + base + "}")
	c.knows(made)
	c.run(text, "apply", "-f", "-")
	c.weigh(fmt.Sprintf("pods and bundle, %d pods", made), settle)
	before := c.cpu()
	took := grow(n)
	c.knows(n)
	t.Logf("%d pods made at the API server in %v cost the CA %.2f s of CPU", n-min(n, 100), took.Round(100*time.Millisecond), (c.cpu() - before).Seconds())
	c.weigh(fmt.Sprintf("pods and bundle, %d pods", made), settle)
	identities := c.run("", "get", "identities")
	if !strings.Contains(identities, strconv.Itoa(n)) {
		t.Errorf("the CA does not say that an Identity stands for %d pods:\n%s", n, identities)
	}
	c.stop()
	c.start("{" + base + "}")
	c.knows(n)
	c.weigh(fmt.Sprintf("the same, started with %d pods", made), settle)
	c.stop()

	c.start(fmt.Sprintf("{%s, pod_certificates: {}, spire_resources: {}, injection: {listen: %q, image: 'signet.test/proxy:1'}, resources: {}}", base, replicatest.FreeAddress(t)))
	c.knows(n)
	c.weigh(fmt.Sprintf("everything on, so that whole objects are kept, started with %d pods", made), settle)
	audit, counted, cpu := len(k.auditLines()), c.metric("signet_ca_kubernetes_requests_total"), c.cpu()
	pauseFor(t, ctx, idle)
	t.Logf("everything on, nothing changes, %v: %.0f requests by the CA's own count, %.1f ms of CPU a minute", idle, c.metric("signet_ca_kubernetes_requests_total")-counted, float64((c.cpu()-cpu).Microseconds())/1000/idle.Minutes())
	k.logAudit(k.auditLines()[audit:], idle)
	c.weigh("then", 0)
}
