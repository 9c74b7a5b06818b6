package corpus

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/grpcauthz"
	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/tlsauthz"
)

// A point is one enforcement point with one kind of client.
type point struct {
	name string
	// takes reports whether such calls can be made there at all.
	takes func(*policy.TestCase) bool
	call  func(*testing.T, *policy.TestCase) answer
}

func isTLS(c *policy.TestCase) bool  { return c.Request.Protocol == policy.ProtocolTLS }
func isHTTP(c *policy.TestCase) bool { return c.Request.Protocol == policy.ProtocolHTTP }

// isGRPC: grpc-go answers what is not gRPC by itself, before anybody is asked.
func isGRPC(c *policy.TestCase) bool {
	return isHTTP(c) && c.Request.Method == "POST" && len(c.Request.ContentTypes) == 1 &&
		strings.HasPrefix(c.Request.ContentTypes[0], "application/grpc") && !strings.HasPrefix(c.Request.ContentTypes[0], "application/grpc-")
}

// The points that are no program: the package alone, and an interpreter of filters for Envoy.
const (
	purePoint = "package policy"
	rbacPoint = "Envoy's RBAC"
)

// leastCases is how many decisions every enforcement point has to agree on.
const leastCases = 500

func TestEveryPointAgrees(t *testing.T) {
	documents, cases := tables(t)
	if len(cases) < leastCases {
		t.Errorf("%d cases, want at least %d", len(cases), leastCases)
	}
	var services []spiffeid.ID
	for _, c := range cases {
		if !slices.Contains(services, c.Request.Service) {
			services = append(services, c.Request.Service)
		}
	}
	hints := map[spiffeid.ID]string{}
	for _, c := range cases {
		if c.Hint != "" {
			hints[c.Request.Peer] = c.Hint
		}
	}
	f := start(t, documents, services, hints)
	made := map[string]int{}
	service := &backend{}
	for _, p := range f.points(t, services, service) {
		t.Run(p.name, func(t *testing.T) {
			for i := range cases {
				c := &cases[i]
				if !p.takes(c) {
					continue
				}
				made[p.name]++
				got := p.call(t, c)
				reached := service.take()
				switch {
				case got.allowed != c.Allow:
					t.Errorf("%s:%d: %s %q of %s to %s: allowed %t, want %t (%s)", c.File, c.Line, c.Request.Method, c.Request.Path, c.Request.Peer, c.Request.Service, got.allowed, c.Allow, got.what)
				case !c.Allow && len(reached) > 0:
					t.Errorf("%s:%d: denied, and the service was reached by %q", c.File, c.Line, reached)
				case c.Allow && isHTTP(c) && len(reached) > 0 && reached[0] != c.Request.Method+" "+c.Request.Path:
					t.Errorf("%s:%d: %q was judged, and the service saw %q", c.File, c.Line, c.Request.Method+" "+c.Request.Path, reached[0])
				}
			}
			if made[p.name] == 0 {
				t.Error("no case came here")
			}
		})
	}
	t.Logf("decisions by point: %v", made)
}

func (f *fleet) points(t *testing.T, services []spiffeid.ID, service *backend) []point {
	points := []point{{purePoint, func(*policy.TestCase) bool { return true }, func(_ *testing.T, c *policy.TestCase) answer {
		d := f.policies.Policies().Decide(&c.Request)
		return answer{allowed: d.Allowed, what: d.Reason.String()}
	}}}
	points = append(points, f.library(t, services, service)...)
	points = append(points, f.envoy(t)...)
	return append(points, f.proxied(t, services, service)...)
}

// library are the enforcement points of the Go library.
func (f *fleet) library(t *testing.T, services []spiffeid.ID, service *backend) []point {
	log := slog.New(slog.DiscardHandler)
	web, rpc, connections := map[spiffeid.ID]string{}, map[spiffeid.ID]string{}, map[spiffeid.ID]string{}
	for _, id := range services {
		h, err := httpauthz.New(httpauthz.Config{Policies: f.policies, Service: id, JWTBundles: f.tokens, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		server := h.Server(service, f.svids, f.svids)
		server.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
		web[id] = background(t, func(l net.Listener) { server.ServeTLS(l, "", "") }, func() { server.Close() })

		g, err := grpcauthz.New(grpcauthz.Config{Policies: f.policies, Service: id, JWTBundles: f.tokens, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		rpcs := grpc.NewServer(append(g.ServerOptions(f.svids, f.svids), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
			method, _ := grpc.MethodFromServerStream(s)
			service.mu.Lock()
			service.reached = append(service.reached, "POST "+method)
			service.mu.Unlock()
			return s.SendHeader(metadata.Pairs("reached", "yes"))
		}))...)
		rpc[id] = background(t, func(l net.Listener) { rpcs.Serve(l) }, rpcs.Stop)

		config, err := tlsauthz.ServerConfig(tlsauthz.Config{Policies: f.policies, Service: id, Log: log}, f.svids, f.svids)
		if err != nil {
			t.Fatal(err)
		}
		connections[id] = background(t, func(l net.Listener) { greet(tls.NewListener(l, config)) }, func() {})
	}
	return []point{
		{"httpauthz over HTTP/1.1", isHTTP, func(t *testing.T, c *policy.TestCase) answer {
			return http1(t, web[c.Request.Service], f.client(t, c.Request.Peer, "http/1.1"), &c.Request, f.fields(t, c))
		}},
		{"httpauthz over HTTP/2", isHTTP, func(t *testing.T, c *policy.TestCase) answer {
			return http2Call(t, web[c.Request.Service], f.client(t, c.Request.Peer, "h2"), &c.Request, f.fields(t, c))
		}},
		{"grpcauthz", isGRPC, func(t *testing.T, c *policy.TestCase) answer {
			return http2Call(t, rpc[c.Request.Service], f.client(t, c.Request.Peer, "h2"), &c.Request, f.fields(t, c))
		}},
		{"tlsauthz", isTLS, func(t *testing.T, c *policy.TestCase) answer {
			return greeted(connections[c.Request.Service], f.client(t, c.Request.Peer))
		}},
	}
}

const greeting = "reached"

// greeted reports whether a connection gets through: with TLS 1.3 a client learns of a refusal only when it reads.
func greeted(addr string, config *tls.Config) answer {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return answer{what: "handshake: " + err.Error()}
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(within))
	b := make([]byte, len(greeting))
	if _, err := io.ReadFull(conn, b); err != nil {
		return answer{what: "read: " + err.Error()}
	}
	return answer{allowed: string(b) == greeting, what: string(b)}
}
