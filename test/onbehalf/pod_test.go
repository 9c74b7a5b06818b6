package onbehalf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/workloadapi/broker/brokerclient"
)

// A kubelet answers as one does on its read-only port, with at most one pod, shop/cart.
type kubelet struct {
	mu  sync.Mutex
	uid string // empty: there is none
}

func (k *kubelet) set(uid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.uid = uid
}

func (k *kubelet) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	k.mu.Lock()
	defer k.mu.Unlock()
	items := ""
	if k.uid != "" {
		items = fmt.Sprintf(`{"metadata":{"name":"cart","namespace":"shop","uid":%q,"labels":{"app":"cart"}},"spec":{"serviceAccountName":"cart","nodeName":"n"},
			"status":{"phase":"Running","containerStatuses":[{"name":"cart","image":"cart:1","containerID":"containerd://0","state":{"running":{}}}]}}`, k.uid)
	}
	fmt.Fprintf(w, `{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[%s]}`, items)
}

// A notifying Memory says when it was told something.
type notifying struct {
	brokerclient.Memory
	took, dropped chan struct{}
}

func (n *notifying) Take(x brokerclient.X509) error {
	err := n.Memory.Take(x)
	n.took <- struct{}{}
	return err
}

func (n *notifying) Drop() {
	n.Memory.Drop()
	n.dropped <- struct{}{}
}

// TestBrokerSpeaksForAPod: the agent finds the pod at its kubelet, by whatever it is named; it gets the identity of its
// service account; and when it is deleted, or made anew under its name, the broker drops what it held within seconds.
func TestBrokerSpeaksForAPod(t *testing.T) {
	const first, second = "0c0c0c0c-1111-2222-3333-444444444444", "0d0d0d0d-1111-2222-3333-444444444444"
	k := &kubelet{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: k, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	w := newWorld(t, func(w *world, c *agent.Config) {
		c.WorkloadAttestation.K8s = &agent.K8sAttestation{KubeletReadOnlyPort: l.Addr().(*net.TCPAddr).Port}
		c.Broker = agent.Broker{SocketPath: filepath.Join(w.dir, "broker", "b.sock"),
			Brokers: []agent.BrokerClient{{ID: "/speaker", References: []string{"kubernetes"}, Namespaces: []string{"shop"}, SPIFFEIDs: []string{"/shop/*"}}}}
	})
	w.Apply("kind: Identity\nname: cart\nspiffeID: /shop/cart\nmatch: ['k8s:ns:shop', 'k8s:sa:cart']\n")
	w.Apply("kind: Identity\nname: other\nspiffeID: /bank/cart\nmatch: ['k8s:sa:cart']\n")
	own := w.own()
	client, err := brokerclient.New(brokerclient.Config{Addr: "unix:" + filepath.Join(w.dir, "broker", "b.sock"), SVID: own, Bundles: own,
		Server: brokerclient.ServerID(w.Agent().Status().ID)})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.FollowX509SVIDs(w.ctx, brokerclient.Pod("shop", "cart", ""), &brokerclient.Memory{}); !errors.Is(err, brokerclient.ErrGone) || brokerclient.Reason(err) != "WORKLOAD_NOT_FOUND" {
		t.Errorf("before there is a pod: %v, want ErrGone", err)
	}
	for name, tt := range map[string]struct {
		ref  brokerclient.Reference
		stop func()
	}{
		"by name, deleted":           {brokerclient.Pod("shop", "cart", ""), func() { k.set("") }},
		"by name, made anew":         {brokerclient.Pod("shop", "cart", ""), func() { k.set(second) }},
		"by name and UID, made anew": {brokerclient.Pod("shop", "cart", first), func() { k.set(second) }},
		"by name and UID, deleted":   {brokerclient.Pod("shop", "cart", first), func() { k.set("") }},
	} {
		t.Run(name, func(t *testing.T) {
			k.set(first)
			held := &notifying{took: make(chan struct{}, 100), dropped: make(chan struct{}, 100)}
			ctx, cancel := context.WithCancel(w.ctx)
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- client.FollowX509SVIDs(ctx, tt.ref, held) }()
			select {
			case <-held.took:
			case err := <-ended:
				t.Fatal(err)
			}
			x, err := held.Get()
			if err != nil || len(x.SVIDs) != 1 || x.Default().ID.String() != "spiffe://example.org/shop/cart" {
				t.Fatalf("the broker gets %v, %v; want /shop/cart alone", x.SVIDs, err)
			}
			began := time.Now()
			tt.stop()
			<-held.dropped
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it was dropped after %s, want within 5s", took)
			}
			if err := <-ended; !errors.Is(err, brokerclient.ErrGone) {
				t.Errorf("FollowX509SVIDs = %v, want ErrGone", err)
			}
		})
	}
	k.set(first)
	if err := client.FollowX509SVIDs(w.ctx, brokerclient.Pod("shop", "cart", second), &brokerclient.Memory{}); !errors.Is(err, brokerclient.ErrGone) {
		t.Errorf("by name and another UID: %v, want ErrGone", err)
	}
	if err := client.FollowX509SVIDs(w.ctx, brokerclient.Pod("", "", first), &brokerclient.Memory{}); !errors.Is(err, brokerclient.ErrDenied) {
		t.Errorf("by UID alone, with a limit of namespaces: %v, want ErrDenied", err)
	}
	if err := client.FollowX509SVIDs(w.ctx, brokerclient.Process(int32(os.Getpid())), &brokerclient.Memory{}); !errors.Is(err, brokerclient.ErrDenied) {
		t.Errorf("by process id: %v, want ErrDenied", err)
	}
}
