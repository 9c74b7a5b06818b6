package envoy

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/test/envoycheck"
)

// yes says yes to everything, without a look at it.
type yes struct {
	authv3.UnimplementedAuthorizationServer
}

func (yes) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return &authv3.CheckResponse{Status: &rpcstatus.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}, nil
}

// BenchmarkExtAuthz compares the agent's answers to those of a server that always says yes, on a socket of the same kind, with
// both asked alternately in one run: one call at a time, and 64 at once over two connections, as an Envoy of two workers.
func BenchmarkExtAuthz(b *testing.B) {
	n := start(b, func(c *agent.Config) { c.ExtAuthz.MaxChecksPerSecond = -1 })
	n.Apply(webPolicy)
	n.identity("web")
	call := envoycheck.Call{Peer: n.mint("/caller"), Local: n.mint("/web"), Method: "GET", Path: "/v1/things/7?q=1", Authority: "web.internal:8443", RawHeaders: true,
		Header: []envoycheck.Field{{Name: "user-agent", Value: "Mozilla/5.0 (X11; Linux x86_64)"}, {Name: "accept", Value: "application/json"},
			{Name: "accept-encoding", Value: "gzip, br"}, {Name: "traceparent", Value: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
			{Name: "x-forwarded-for", Value: "192.0.2.7"}, {Name: "x-envoy-external-address", Value: "192.0.2.7"}}}
	n.settled(call, true)
	socket := filepath.Join(b.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	server := grpc.NewServer()
	authv3.RegisterAuthorizationServer(server, yes{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(l)
	}()
	b.Cleanup(func() { server.Stop(); <-done })

	ours := [2]authv3.AuthorizationClient{authv3.NewAuthorizationClient(dial(b, n.AgentSocket())), authv3.NewAuthorizationClient(dial(b, n.AgentSocket()))}
	theirs := [2]authv3.AuthorizationClient{authv3.NewAuthorizationClient(dial(b, socket)), authv3.NewAuthorizationClient(dial(b, socket))}
	req := call.Request()
	check := func(c authv3.AuthorizationClient) time.Duration {
		began := time.Now()
		resp, err := c.Check(b.Context(), req)
		if err != nil || !call.Answer(resp, nil).Passed {
			b.Errorf("the answer is %v, %v", resp, err)
		}
		return time.Since(began)
	}
	b.Run("one", func(b *testing.B) {
		var took [2][]time.Duration
		for b.Loop() {
			took[0] = append(took[0], check(ours[0]))
			took[1] = append(took[1], check(theirs[0]))
		}
		for i := range took {
			slices.Sort(took[i])
		}
		at := func(i int, share float64) float64 {
			return float64(took[i][int(share*float64(len(took[i])-1))].Nanoseconds()) / 1000
		}
		b.ReportMetric(at(0, .5), "p50-µs")
		b.ReportMetric(at(0, .99), "p99-µs")
		b.ReportMetric(at(0, .5)/at(1, .5), "p50-ratio")
		b.ReportMetric(at(0, .99)/at(1, .99), "p99-ratio")
	})
	b.Run("many", func(b *testing.B) {
		const each = 2000
		many := func(clients [2]authv3.AuthorizationClient) time.Duration {
			began := time.Now()
			ended := make(chan struct{})
			for w := range 64 {
				go func() {
					for range each / 64 {
						check(clients[w%2])
					}
					ended <- struct{}{}
				}()
			}
			for range 64 {
				<-ended
			}
			return time.Since(began)
		}
		var took [2]time.Duration
		rounds := 0
		for b.Loop() {
			took[0] += many(ours)
			took[1] += many(theirs)
			rounds++
		}
		b.ReportMetric(float64(rounds*(each/64)*64)/took[0].Seconds(), "calls/s")
		b.ReportMetric(took[1].Seconds()/took[0].Seconds(), "rate-ratio")
	})
}
