//go:build kube

package kube

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/signet-id/signet/ca/kube"
)

// A wire stands between a client and an API server, and can be cut, so that connections break, or held, so that nothing
// passes and nobody is told.
type wire struct {
	kubeconfig string

	mu    sync.Mutex
	cut   bool
	held  chan struct{} // nil: not held; closed: no longer
	conns map[net.Conn]bool
	// stranded are connections on which nothing passes until never is closed, at the end of the test.
	stranded map[net.Conn]bool
	never    chan struct{}
}

func newWire(t *testing.T, kubeconfig string) *wire {
	t.Helper()
	c, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	if err := clientcmd.ResolveLocalPaths(c); err != nil {
		t.Fatal(err)
	}
	cluster := c.Clusters[c.Contexts[c.CurrentContext].Cluster]
	server, err := url.Parse(cluster.Server)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{kubeconfig: filepath.Join(t.TempDir(), "kubeconfig"), conns: map[net.Conn]bool{}, stranded: map[net.Conn]bool{}, never: make(chan struct{})}
	cluster.TLSServerName = server.Hostname()
	cluster.Server = "https://" + l.Addr().String()
	if err := clientcmd.WriteToFile(*c, w.kubeconfig); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", server.Host)
			w.mu.Lock()
			if w.cut || err != nil {
				in.Close()
				if out != nil {
					out.Close()
				}
				w.mu.Unlock()
				continue
			}
			w.conns[in], w.conns[out] = true, true
			w.mu.Unlock()
			wg.Go(func() { w.carry(in, out) })
			wg.Go(func() { w.carry(out, in) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		w.release()
		close(w.never)
		w.setCut(true)
		wg.Wait()
	})
	return w
}

func (w *wire) carry(from, to net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		w.mu.Lock()
		held := w.held
		if w.stranded[from] {
			held = w.never
		}
		w.mu.Unlock()
		if held != nil {
			<-held
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			break
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, from)
	delete(w.conns, to)
	from.Close()
	to.Close()
}

func (w *wire) setCut(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
	for c := range w.conns {
		if cut {
			c.Close()
		}
	}
}

func (w *wire) hold() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = make(chan struct{})
}

// strand lets nothing pass any more on the connections that there are. New ones work.
func (w *wire) strand() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		w.stranded[c] = true
	}
}

func (w *wire) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held != nil {
		close(w.held)
		w.held = nil
	}
}

// A worker is one replica. It counts how many work at once.
type worker struct {
	began, ended chan struct{}
	result       chan error
	stop         context.CancelFunc
}

func stand(t *testing.T, ctx context.Context, k *cluster, kubeconfig string, active *atomic.Int32, finish <-chan struct{}, fail <-chan error) *worker {
	t.Helper()
	client, err := kube.Open("prod", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(ctx)
	w := &worker{began: make(chan struct{}, 10), ended: make(chan struct{}, 10), result: make(chan error, 1), stop: stop}
	go func() {
		w.result <- (&kube.Leader{Client: client, Namespace: k.namespace, Lease: "work", Duration: 3 * time.Second}).Run(ctx, func(ctx context.Context) error {
			if n := active.Add(1); n != 1 {
				t.Errorf("%d replicas work at once", n)
			}
			w.began <- struct{}{}
			var err error
			select {
			case <-ctx.Done():
			case err = <-fail:
			}
			if finish != nil {
				<-finish
			}
			active.Add(-1)
			w.ended <- struct{}{}
			return err
		})
	}()
	t.Cleanup(stop)
	return w
}

func wait[T any](t *testing.T, ctx context.Context, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-ctx.Done():
		t.Fatalf("waited in vain until %s", what)
		panic("unreachable")
	}
}

// Of two replicas one works. When it is told to end, the other begins as soon as its work has ended, and not before.
func TestLeaderHandsOver(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	var active atomic.Int32
	finish := make(chan struct{})
	a := stand(t, ctx, k, k.kubeconfig, &active, finish, nil)
	wait(t, ctx, a.began, "the first works")
	b := stand(t, ctx, k, k.kubeconfig, &active, nil, nil)
	a.stop()
	// Its work takes longer than a Lease lasts, which is renewed for as long.
	holder := k.kubectl("-n", k.namespace, "get", "lease", "work", "-o", "jsonpath={.spec.holderIdentity}")
	renewed := k.kubectl("-n", k.namespace, "get", "lease", "work", "-o", "jsonpath={.spec.renewTime}")
	for range 8 { // renewals, each of which is a fifth of the Lease
		k.kubectl("-n", k.namespace, "wait", "lease/work", "--for=jsonpath={.spec.holderIdentity}="+holder, "--timeout=10s")
		next := renewed
		for next == renewed {
			next = k.kubectl("-n", k.namespace, "get", "lease", "work", "-o", "jsonpath={.spec.renewTime}")
		}
		renewed = next
	}
	select {
	case <-b.began:
		t.Fatal("the second began while the work of the first had not ended")
	default:
	}
	close(finish)
	if err := wait(t, ctx, a.result, "the first has ended"); err != nil {
		t.Errorf("Run = %v when its context ended, want nil", err)
	}
	wait(t, ctx, b.began, "the second works")
	b.stop()
	if err := wait(t, ctx, b.result, "the second has ended"); err != nil {
		t.Errorf("Run = %v when its context ended, want nil", err)
	}
	if holder := k.kubectl("-n", k.namespace, "get", "lease", "work", "-o", "jsonpath={.spec.holderIdentity}"); holder != "" {
		t.Errorf("after both ended %q holds the Lease", holder)
	}
}

// A leader whose API server is away stops working before another one begins, and stands again afterwards.
func TestLeaderAPIServerAway(t *testing.T) {
	for name, away := range map[string]func(*wire) (back func()){
		"connections break": func(w *wire) func() { w.setCut(true); return func() { w.setCut(false) } },
		"silence":           func(w *wire) func() { w.hold(); return w.release },
	} {
		t.Run(name, func(t *testing.T) {
			ctx := bounded(t)
			k := first(t, ctx)
			var active atomic.Int32
			w := newWire(t, k.kubeconfig)
			a := stand(t, ctx, k, w.kubeconfig, &active, nil, nil)
			wait(t, ctx, a.began, "the first works")
			b := stand(t, ctx, k, k.kubeconfig, &active, nil, nil)
			back := away(w)
			wait(t, ctx, a.ended, "the first has stopped")
			wait(t, ctx, b.began, "the second works")
			back()
			b.stop()
			wait(t, ctx, b.result, "the second has ended")
			wait(t, ctx, a.began, "the first works again")
			a.stop()
			wait(t, ctx, a.result, "the first has ended")
		})
	}
}

// A replica stands though the API server is away when it starts, and ends when it is told to.
func TestLeaderStartsWithoutAPIServer(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	var active atomic.Int32
	w := newWire(t, k.kubeconfig)
	w.setCut(true)
	a := stand(t, ctx, k, w.kubeconfig, &active, nil, nil)
	b := stand(t, ctx, k, w.kubeconfig, &active, nil, nil)
	b.stop()
	if err := wait(t, ctx, b.result, "the second has ended"); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
	w.setCut(false)
	wait(t, ctx, a.began, "the first works")
	a.stop()
	wait(t, ctx, a.result, "the first has ended")
}

// A Lease that somebody gave to another is lost at the next look, not when the hope to renew it is over.
func TestLeaderLeaseTaken(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	var active atomic.Int32
	a := stand(t, ctx, k, k.kubeconfig, &active, nil, nil)
	wait(t, ctx, a.began, "it works")
	k.kubectl("-n", k.namespace, "patch", "lease", "work", "--type=merge", "-p", `{"spec":{"holderIdentity":"somebody"}}`)
	wait(t, ctx, a.ended, "it has stopped")
	wait(t, ctx, a.began, "it works again, once that Lease has ended")
	k.kubectl("-n", k.namespace, "delete", "lease", "work")
	wait(t, ctx, a.ended, "it has stopped when the Lease was deleted")
	wait(t, ctx, a.began, "it works again by a new Lease")
	a.stop()
	wait(t, ctx, a.result, "it has ended")
}

// A Lease that somebody labels is still ours: it is renewed on, and the work goes on.
func TestLeaderLeaseLabelled(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	var active atomic.Int32
	a := stand(t, ctx, k, k.kubeconfig, &active, nil, nil)
	wait(t, ctx, a.began, "it works")
	client, err := kube.Open("prod", k.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	k.kubectl("-n", k.namespace, "label", "lease", "work", "team=shop")
	was, err := client.Leases(k.namespace).Get(ctx, "work", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for { // a Lease lasts three seconds, so a holder that did not renew is seen to lose it
		now, err := client.Leases(k.namespace).Get(ctx, "work", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if now.Spec.RenewTime.Sub(was.Spec.RenewTime.Time) >= 4*time.Second {
			if *now.Spec.HolderIdentity != *was.Spec.HolderIdentity || *now.Spec.LeaseTransitions != *was.Spec.LeaseTransitions || now.Labels["team"] != "shop" {
				t.Errorf("the Lease was %+v, and is %+v", was, now)
			}
			break
		}
		pause(t, ctx)
	}
	select {
	case <-a.ended:
		t.Error("the work was ended")
	default:
	}
	a.stop()
	wait(t, ctx, a.result, "it has ended")
}

// Work that ends by itself ends Run with its error, and gives the Lease up.
func TestLeaderWorkEnds(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	var active atomic.Int32
	broken := errors.New("broken")
	fail := make(chan error, 1)
	fail <- broken
	a := stand(t, ctx, k, k.kubeconfig, &active, nil, fail)
	if err := wait(t, ctx, a.result, "it has ended"); !errors.Is(err, broken) {
		t.Errorf("Run = %v, want the error of the work", err)
	}
	client, err := kube.Open("prod", k.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	lease, err := client.Leases(k.namespace).Get(ctx, "work", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if h := lease.Spec.HolderIdentity; h != nil && *h != "" {
		t.Errorf("%q holds the Lease after its work ended", *h)
	}
	for _, d := range []time.Duration{time.Second, 3500 * time.Millisecond, -time.Second} {
		if err := (&kube.Leader{Client: client, Namespace: k.namespace, Lease: "work", Duration: d}).Run(ctx, nil); err == nil || !strings.Contains(err.Error(), "duration") {
			t.Errorf("Run with a Lease of %s = %v, want an error that names the duration", d, err)
		}
	}
}

// A replica that is killed leaves the Lease to its end, and then another one leads.
func TestLeaderKilled(t *testing.T) {
	const variable = "SIGNET_KUBE_LEAD_IN"
	ctx := bounded(t)
	if namespace := os.Getenv(variable); namespace != "" { // we are the one to be killed
		client, err := kube.Open("prod", os.Getenv("SIGNET_KUBECONFIG"))
		if err != nil {
			t.Fatal(err)
		}
		t.Fatal((&kube.Leader{Client: client, Namespace: namespace, Lease: "work", Duration: 3 * time.Second}).Run(ctx, func(ctx context.Context) error {
			os.Stdout.WriteString("I lead\n")
			<-ctx.Done()
			return nil
		}))
	}
	k := first(t, ctx)
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestLeaderKilled$")
	cmd.Env = append(os.Environ(), variable+"="+k.namespace)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("I lead\n"))); err != nil {
		t.Fatal(err)
	}
	var active atomic.Int32
	b := stand(t, ctx, k, k.kubeconfig, &active, nil, nil)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	wait(t, ctx, b.began, "the other one works")
	b.stop()
	wait(t, ctx, b.result, "the other one has ended")
}
