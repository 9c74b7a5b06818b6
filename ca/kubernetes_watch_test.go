package ca

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/test/kubetest"
)

// An API server that is away, or takes connections and says nothing, keeps no CA from starting, serving and ending, and
// the CA says of which cluster it knows nothing.
func TestAPIServerAway(t *testing.T) {
	for name, serve := range map[string]func(net.Conn){
		"connections end": func(c net.Conn) { c.Close() },
		"nothing is said": func(net.Conn) {},
		"garbage": func(c net.Conn) {
			io.WriteString(c, "SSH-2.0-zebra\r\n")
			c.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			var mu sync.Mutex
			var open []net.Conn
			asked := make(chan struct{}, 100)
			wg.Go(func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					mu.Lock()
					open = append(open, conn)
					mu.Unlock()
					serve(conn)
					select {
					case asked <- struct{}{}:
					default:
					}
				}
			})
			t.Cleanup(func() {
				l.Close()
				wg.Wait()
				for _, c := range open {
					c.Close()
				}
			})
			dir := t.TempDir()
			kubeconfig := kubetest.Kubeconfig(t, "http://"+l.Addr().String())
			c := config(dir)
			c.Metrics.Listen = "127.0.0.1:0"
			c.Kubernetes.Clusters = map[string]KubernetesCluster{"prod": {Kubeconfig: kubeconfig, Pods: &KubernetesPods{}, Bundle: &KubernetesBundle{}}}
			h := start(t, c)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := adminv1.NewAdminClient(h.admin).Apply(ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{File: "web.yaml",
				Content: []byte("kind: Identity\nname: web\nspiffeID: /web\nmatch: ['unix:uid:1']\n")}}}); err != nil {
				t.Errorf("a plain Identity: %v", err)
			}
			select {
			case <-asked:
			case <-ctx.Done():
				t.Fatal("nobody asks the API server")
			}
			get := func(path string) (int, string) {
				r, err := http.Get(fmt.Sprintf("http://%s/%s", h.ca.MetricsAddr(), path))
				if err != nil {
					t.Fatal(err)
				}
				defer r.Body.Close()
				body, err := io.ReadAll(r.Body)
				if err != nil {
					t.Fatal(err)
				}
				return r.StatusCode, string(body)
			}
			if code, body := get("ready"); code != http.StatusOK || !strings.Contains(body, "warning: cluster prod: its pods are not known") || strings.Contains(body, kubetest.Token) {
				t.Errorf("/ready: %d %q", code, body)
			}
			if _, body := get("metrics"); !strings.Contains(body, `signet_ca_kubernetes_synced{cluster="prod"} 0`) || !strings.Contains(body, "signet_ca_healthy 1") {
				t.Error("the metrics do not tell that the cluster is not known and the CA healthy")
			}
			for service, want := range map[string]healthv1.HealthCheckResponse_ServingStatus{"": healthv1.HealthCheckResponse_SERVING, "kubernetes/prod": healthv1.HealthCheckResponse_NOT_SERVING} {
				r, err := healthv1.NewHealthClient(h.admin).Check(ctx, &healthv1.HealthCheckRequest{Service: service})
				if err != nil || r.Status != want {
					t.Errorf("health of %q: %v, %v; want %v", service, r.GetStatus(), err, want)
				}
			}
			if s := h.ca.Summary(); !strings.Contains(s, "ready; ") || !strings.Contains(s, "cluster prod: its pods are not known") {
				t.Errorf("summary %q", s)
			}
		})
	}
}
