//go:build kube

package kube

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/authority"
	cakube "github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/kube/publish"
	"github.com/signet-id/signet/ca/kube/watch"
	"github.com/signet-id/signet/test/kubetest"
	"github.com/signet-id/signet/test/signettest"
)

// told is what a Watcher has told, as an Expander would hold it: of the pods of one namespace.
type told struct {
	namespace string

	kubetest.State
	pods    map[string]*pods.Pod // by name
	names   map[string]string    // by UID
	synced  bool
	refused []pods.Refusal
}

func newTold(namespace string) *told {
	return &told{namespace: namespace, pods: map[string]*pods.Pod{}, names: map[string]string{}}
}

func (c *told) Update(_ string, changed []*pods.Pod, gone []string) {
	c.Change(func() {
		for _, uid := range gone {
			delete(c.pods, c.names[uid])
			delete(c.names, uid)
		}
		for _, p := range changed {
			if p.Namespace == c.namespace {
				c.pods[p.Name], c.names[p.UID] = p, p.Name
			}
		}
	})
}

func (c *told) Synced(_ string, synced bool) { c.Change(func() { c.synced = synced }) }

func (c *told) refuse(r pods.Refusal) { c.Change(func() { c.refused = append(c.refused, r) }) }

func (c *told) until(t *testing.T, ctx context.Context, what string, f func() bool) {
	t.Helper()
	if !c.Await(ctx, f) {
		c.Look(func() { t.Fatalf("it never comes that %s; told of %v", what, slices.Sorted(maps.Keys(c.pods))) })
	}
}

// on tells whether a pod is on the node with a UID; empty: on none.
func (c *told) on(name, uid string) func() bool {
	return func() bool { return c.pods[name] != nil && c.pods[name].NodeUID == uid }
}

// admin is a client that may do everything, as fast as it can.
func (k *cluster) admin() *kubernetes.Clientset {
	k.t.Helper()
	c, err := clientcmd.BuildConfigFromFlags("", k.kubeconfig)
	if err != nil {
		k.t.Fatal(err)
	}
	c.QPS, c.Burst = 2000, 2000
	c.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(c)
	if err != nil {
		k.t.Fatal(err)
	}
	return client
}

// simulatedNode makes a node that nothing runs on, and returns its UID.
func (k *cluster) simulatedNode(name string) string {
	k.t.Helper()
	n, err := k.admin().CoreV1().Nodes().Create(k.ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := k.admin().CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			k.t.Logf("deleting node %s: %v", name, err)
		}
	})
	return string(n.UID)
}

// simulatedPod is a pod that no kubelet starts.
func simulatedPod(namespace, name, node string) *corev1.Pod {
	grace := int64(0)
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: map[string]string{"app": "simulated", "pod-template-hash": "7d4b9c"}},
		Spec: corev1.PodSpec{NodeName: node, ServiceAccountName: "web", TerminationGracePeriodSeconds: &grace,
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers:  []corev1.Container{{Name: "c", Image: "simulated.invalid/c:1"}}}}
}

func (k *cluster) simulate(name, node string) {
	k.t.Helper()
	if _, err := k.admin().CoreV1().Pods(k.namespace).Create(k.ctx, simulatedPod(k.namespace, name, node), metav1.CreateOptions{}); err != nil {
		k.t.Fatal(err)
	}
}

// watched watches the cluster through a kubeconfig.
func watched(t *testing.T, kubeconfig, namespace string) (*told, *watch.Watcher, *cakube.Client) {
	t.Helper()
	client, err := cakube.Open("prod", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	c := newTold(namespace)
	w := watch.New(watch.Config{Client: client, Expander: c, Refused: c.refuse, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		client.Close()
	})
	return c, w, client
}

// Pods belong to the node object on which they were put; what was missed while the API server was away is put right, and a
// connection of which only one side is left is noticed.
func TestWatchedPods(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	name := k.namespace + "-node"
	uid := k.simulatedNode(name)
	k.simulate("a", name)
	line := newWire(t, k.credentials("ca"))
	c, w, _ := watched(t, line.kubeconfig, k.namespace)
	c.until(t, ctx, "a is on its node", c.on("a", uid))
	var p *pods.Pod
	c.Look(func() { p = c.pods["a"] })
	if p.ServiceAccount != "web" || p.Labels["app"] != "simulated" || p.NamespaceLabels["kubernetes.io/metadata.name"] != k.namespace {
		t.Errorf("a is told as %+v", p)
	}
	k.kubectl("label", "namespace", k.namespace, "team=shop")
	c.until(t, ctx, "the namespace's label is told", func() bool { return c.pods["a"].NamespaceLabels["team"] == "shop" })

	// The node is re-created under the same name; the clocks of nodes have whole seconds.
	k.kubectl("delete", "node", name)
	c.until(t, ctx, "a is on no node", c.on("a", ""))
	pauseFor(t, ctx, 1100*time.Millisecond)
	again := k.simulatedNode(name)
	k.simulate("b", name)
	c.until(t, ctx, "a new pod is on the new node", c.on("b", again))
	c.Look(func() {
		if !c.on("a", "")() {
			t.Error("a pod of the former node is on the new one")
		}
	})
	c.until(t, ctx, "it is said why", func() bool { return len(c.refused) == 1 && c.refused[0].Pod.Name == "a" })

	// The API server is away.
	line.setCut(true)
	k.kubectl("-n", k.namespace, "delete", "pod", "b", "--grace-period=0", "--force")
	k.simulate("c", name)
	for w.Status().Err == nil {
		pause(t, ctx)
	}
	c.Look(func() {
		if c.pods["b"] == nil || !c.synced || c.pods["c"] != nil {
			t.Error("what is known has changed while the API server is away")
		}
	})
	line.setCut(false)
	c.until(t, ctx, "what was missed is put right", func() bool { return c.pods["b"] == nil && c.on("c", again)() })

	// Nothing passes on the connections that there are, and nobody is told.
	line.strand()
	k.simulate("d", name)
	c.until(t, ctx, "the dead connection is noticed", c.on("d", again))

	k.kubectl("-n", k.namespace, "delete", "pod", "d", "--grace-period=0", "--force")
	c.until(t, ctx, "a deleted pod is gone", func() bool { return c.pods["d"] == nil })
	k.kubectl("-n", k.namespace, "patch", "pod", "c", "--subresource=status", "--type=merge", "-p", `{"status":{"phase":"Succeeded"}}`)
	c.until(t, ctx, "a pod that has ended is gone", func() bool { return c.pods["c"] == nil })
}

func pauseFor(t *testing.T, ctx context.Context, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		t.Fatal("it takes too long")
	}
}

// A pod that two Identities claim has an Event that says so. It comes from the CA as a whole, with the documented rights.
func TestEventOnRefusedPod(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	name := k.namespace + "-node"
	k.simulatedNode(name)
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{}}}
	}})
	s.Apply("kind: Identity\nname: by-app\nspiffeID: '/app/{{ .k8s.label[\"app\"] }}'\n'on': ['k8s_psat:cluster:prod']\n")
	bare := simulatedPod(k.namespace, "bare", name)
	bare.Labels = map[string]string{"other": "x"}
	if _, err := k.admin().CoreV1().Pods(k.namespace).Create(ctx, bare, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	out := k.until("there is an Event", func(out string, err error) bool { return err == nil && out != "" },
		"-n", k.namespace, "get", "events", "--field-selector=reason=IdentityRefused", "-o", "jsonpath={.items[*].involvedObject.kind}/{.items[*].involvedObject.name}: {.items[*].message}")
	if !strings.HasPrefix(out, "Pod/bare: no identity by Identity by-app: ") {
		t.Errorf("the Event says %q", out)
	}
}

// meddler passes requests on to an API server, after f has had its way with each.
func (k *cluster) meddler(f func(r *http.Request)) (kubeconfig string) {
	k.t.Helper()
	return k.between(func(w http.ResponseWriter, r *http.Request, server http.Handler) {
		f(r)
		server.ServeHTTP(w, r)
	})
}

// between stands between a CA and an API server, and answers as f says.
func (k *cluster) between(f func(w http.ResponseWriter, r *http.Request, server http.Handler)) (kubeconfig string) {
	k.t.Helper()
	c, err := clientcmd.BuildConfigFromFlags("", k.credentials("ca"))
	if err != nil {
		k.t.Fatal(err)
	}
	transport, err := rest.TransportFor(c)
	if err != nil {
		k.t.Fatal(err)
	}
	at, err := url.Parse(c.Host)
	if err != nil {
		k.t.Fatal(err)
	}
	p := httputil.NewSingleHostReverseProxy(at)
	p.Transport, p.FlushInterval, p.ErrorLog = transport, -1, slog.NewLogLogger(slog.DiscardHandler, 0)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { f(w, r, p) }))
	k.t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
	})
	return kubetest.Kubeconfig(k.t, srv.URL)
}

// Somebody makes a ConfigMap of the bundle's name between the CA's look and its writing: it stays theirs, whole.
func TestForeignConfigMapAtTheSameMoment(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	ns := k.space("race", publish.Label+"=true")
	var once sync.Once
	made := make(chan struct{})
	kubeconfig := k.meddler(func(r *http.Request) {
		if r.Method == http.MethodPatch && strings.Contains(r.URL.Path, "/namespaces/"+ns+"/configmaps/") {
			once.Do(func() {
				k.kubectl("-n", ns, "create", "configmap", publish.ConfigMap, "--from-literal=other=theirs")
				close(made)
			})
		}
	})
	s := signettest.Start(t, signettest.Config{})
	roots, err := s.Roots()
	if err != nil {
		t.Fatal(err)
	}
	client, err := cakube.Open("prod", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	p := publish.New(publish.Config{Client: client, TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), NoClusterTrustBundle: true,
		Bundle: func() authority.Bundle {
			return authority.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), X509: []authority.X509Authority{{ID: "1", Certificate: roots[0]}}, Sequence: 1}
		},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	rctx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- p.Run(rctx) }()
	select {
	case <-made:
	case <-ctx.Done():
		t.Fatal("nothing is written")
	}
	for p.Status().Foreign == 0 {
		pause(t, ctx)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	client.Close()
	if got := k.kubectl("-n", ns, "get", "configmap", publish.ConfigMap, "-o", "jsonpath={.data}{.metadata.labels}"); got != `{"other":"theirs"}` {
		t.Errorf("the foreign ConfigMap is %s", got)
	}
}

// 5,000 pods made at once reach the Expander; then what 10,000 cost. SIGNET_SIMULATED_PODS makes it another number. The figures are in docs/performance.md.
func TestManyPods(t *testing.T) {
	n := 5000
	if v := os.Getenv("SIGNET_SIMULATED_PODS"); v != "" {
		if _, err := fmt.Sscan(v, &n); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	k := first(t, ctx)
	k.allow()
	const nodes = 50
	for i := range nodes {
		k.simulatedNode(fmt.Sprintf("%s-n%02d", k.namespace, i))
	}
	c, w, client := watched(t, k.credentials("ca"), k.namespace)
	c.until(t, ctx, "all is known", func() bool { return c.synced })
	admin := k.admin()
	var mu sync.Mutex
	madeAt := map[string]time.Time{}
	var wg sync.WaitGroup
	next := make(chan int)
	began := time.Now()
	for range 32 {
		wg.Go(func() {
			for i := range next {
				name := fmt.Sprintf("p%05d", i)
				if _, err := admin.CoreV1().Pods(k.namespace).Create(ctx, simulatedPod(k.namespace, name, fmt.Sprintf("%s-n%02d", k.namespace, i%nodes)), metav1.CreateOptions{}); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				madeAt[name] = time.Now()
				mu.Unlock()
			}
		})
	}
	toldAt := map[string]time.Time{}
	look := func() bool { // a pod may be told before the one who made it hears that it is made
		now := time.Now()
		for name := range c.pods {
			if _, ok := toldAt[name]; !ok {
				toldAt[name] = now
			}
		}
		return len(toldAt) == n
	}
	go func() {
		for i := range n {
			next <- i
		}
		close(next)
	}()
	c.until(t, ctx, "all are told", look)
	wg.Wait()
	var delays []time.Duration
	for name, at := range toldAt {
		delays = append(delays, max(0, at.Sub(madeAt[name])))
	}
	slices.Sort(delays)
	s := w.Status()
	t.Logf("%d pods made in %v; told after the API server acknowledged them, p50 %v, p99 %v, max %v; counted as %d bytes a pod; requests %+v", n, time.Since(began).Round(time.Millisecond),
		delays[len(delays)/2].Round(time.Millisecond), delays[len(delays)*99/100].Round(time.Millisecond), delays[len(delays)-1].Round(time.Millisecond), s.Bytes/int64(s.Pods), client.Requests())
}
