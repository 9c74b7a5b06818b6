package observe

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/policy/grpcauthz"
	"github.com/signet-id/signet/test/signettest"
	"github.com/signet-id/signet/test/spireclient"
)

// now is an observation of a call to a service.
func now(id, of, peer, path string, n uint64) *policyv1.Observation {
	at := time.Now().UnixNano()
	return &policyv1.Observation{DecisionId: id, Count: n, First: at, Last: at, Service: of, Peer: peer, Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Method: "GET", Path: path,
		Allowed: id == "", Reason: map[bool]string{true: "allowed", false: "no_allow"}[id == ""], Point: "http"}
}

// TestGRPC: the id in the status of an RPC that was refused leads to its story.
func TestGRPC(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{})
	authorizer, err := grpcauthz.New(grpcauthz.Config{Policies: w.policies, Service: spiffeid.RequireFromString(service), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(authorizer.ServerOptions(w.svids[service], w.svids[service])...)
	healthpb.RegisterHealthServer(server, healthpb.UnimplementedHealthServer{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-done })
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(
		tlsconfig.MTLSClientConfig(w.svids[reader], w.svids[reader], tlsconfig.AuthorizeID(spiffeid.RequireFromString(service))))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_, err = healthpb.NewHealthClient(conn).Check(w.ctx, &healthpb.HealthCheckRequest{})
	if status.Code(err) != codes.PermissionDenied {
		t.Fatalf("Check: %v", err)
	}
	_, id, found := strings.Cut(status.Convert(err).Message(), "decision ")
	if !found {
		t.Fatalf("no decision id: %v", err)
	}
	w.until("the decision is known", func() error {
		answer, err := w.observations().GetDecision(w.ctx, &adminv1.GetDecisionRequest{DecisionId: id})
		if o := answer.GetObservation(); err == nil && (o.GetProtocol() != policyv1.CallProtocol_CALL_PROTOCOL_GRPC || o.GetPath() != "/grpc.health.v1.Health/Check" || o.GetPoint() != "grpc") {
			t.Fatalf("told as %v", o)
		}
		return err
	})
}

// TestOutageOfTheCA: what is decided while the CA is away is known when it is back, and what was known before still is.
func TestOutageOfTheCA(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{})
	url := w.serve()
	c := w.client(reader)
	_, before := w.call(c, "POST", url+"/v1/before")
	known := func(id string) func() error {
		return func() error {
			conn, err := w.Admin() // the socket is another one after a restart
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = adminv1.NewObservationsClient(conn).GetDecision(w.ctx, &adminv1.GetDecisionRequest{DecisionId: id})
			return err
		}
	}
	w.until("the first decision is known", known(before))
	if err := w.StopCA(); err != nil {
		t.Fatal(err)
	}
	var during []string
	for range 5 {
		_, id := w.call(c, "POST", url+"/v1/during")
		during = append(during, id)
	}
	if err := w.RestartCA(w.ctx); err != nil {
		t.Fatal(err)
	}
	for _, id := range append(during, before) {
		w.until("decision "+id+" is known after the outage", known(id))
	}
}

// TestPathsOff: an agent that keeps no paths tells none, neither to the CA nor on its own socket.
func TestPathsOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{Agent: func(c *agent.Config) { c.Observations.Paths = "off" }})
	_, id := w.call(w.client(reader), "POST", w.serve()+"/patients/jane-doe")
	w.until("the decision is known", func() error {
		answer, err := w.observations().GetDecision(w.ctx, &adminv1.GetDecisionRequest{DecisionId: id})
		if err == nil && answer.GetObservation().GetPath() != "" {
			t.Fatalf("the path is told: %v", answer.GetObservation())
		}
		return err
	})
	for _, args := range [][]string{{"--socket=" + w.CASocket(), id}, {"--agent", "--agent-socket=" + w.AgentAdminSocket(), id}, {"--agent", "--agent-socket=" + w.AgentAdminSocket(), "-o", "json", id}} {
		code, out, errs := run(w.ctx, append([]string{"why-denied"}, args...)...)
		if code != 0 || strings.Contains(out, "jane") || !strings.Contains(out, "not kept") {
			t.Errorf("exit status %d: %s\n%s", code, errs, out)
		}
	}
}

// TestOff: where observations are off a library does not hold them, commands say so, and calls are decided as ever.
func TestOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{CA: func(c *ca.Config) { c.Observations.Disable = true }, Agent: func(c *agent.Config) { c.Observations.Disable = true }})
	if code, id := w.call(w.client(reader), "POST", w.serve()+"/v1/a"); code != 403 || id == "" {
		t.Errorf("POST answers %d, %q", code, id)
	}
	if code, _, errs := run(w.ctx, "policy", "report", "--socket="+w.CASocket()); code != 1 || !strings.Contains(errs, "observations.disable") {
		t.Errorf("report: %d %s", code, errs)
	}
}

// workload is a connection of this process to its agent.
func (w *world) workload() (context.Context, policyapi.PoliciesClient) {
	w.t.Helper()
	conn, err := grpc.NewClient("unix://"+w.AgentSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return metadata.AppendToOutgoingContext(w.ctx, "workload.spiffe.io", "true"), policyapi.NewPoliciesClient(conn)
}

// TestHostileWorkload: a process can tell tales about calls to itself alone, within bounds, and about no time but the past.
func TestHostileWorkload(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{})
	ctx, client := w.workload()
	many := func(n int) (out []*policyv1.Observation) {
		for i := range n {
			out = append(out, now("", service, reader, fmt.Sprint("/", i), 1))
		}
		return out
	}
	future := now("FUTURE", service, reader, "/", 1)
	future.First, future.Last = math.MaxInt64, math.MaxInt64
	for name, tt := range map[string]struct {
		observed []*policyv1.Observation
		want     codes.Code
	}{
		"of another service":         {[]*policyv1.Observation{now("A", service, reader, "/", 1), now("B", "spiffe://example.org/other", reader, "/", 1)}, codes.InvalidArgument},
		"of another trust domain":    {[]*policyv1.Observation{now("C", "spiffe://partner.example/documents", reader, "/", 1)}, codes.InvalidArgument},
		"of no service":              {[]*policyv1.Observation{now("D", "", reader, "/", 1)}, codes.InvalidArgument},
		"too many":                   {many(1001), codes.ResourceExhausted},
		"too long":                   {[]*policyv1.Observation{now("E", service, reader, strings.Repeat("/", 300), 1)}, codes.InvalidArgument},
		"an enormous count":          {[]*policyv1.Observation{now("", service, reader, "/", math.MaxUint64)}, codes.InvalidArgument},
		"a message beyond the bound": {[]*policyv1.Observation{now("F", service, reader, strings.Repeat("/", 1<<20), 1)}, codes.ResourceExhausted},
		"no UTF-8":                   {[]*policyv1.Observation{now("G", service, reader, "/\xff", 1)}, codes.Internal}, // it does not leave this client
		"of the future":              {[]*policyv1.Observation{future}, codes.OK},
	} {
		_, err := client.Report(ctx, &policyapi.ReportRequest{Observations: tt.observed})
		if status.Code(err) != tt.want {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	w.until("what is of the future is known", func() error {
		answer, err := w.observations().GetDecision(w.ctx, &adminv1.GetDecisionRequest{DecisionId: "FUTURE"})
		if err == nil && answer.GetObservation().GetLast() > time.Now().UnixNano() {
			t.Fatalf("it is of the future still: %v", answer.GetObservation())
		}
		return err
	})
	if all, err := w.list(&adminv1.ListObservationsRequest{}); err != nil || len(all) != 1 {
		t.Errorf("the CA knows %v, %v", all, err)
	}
	if _, err := client.Report(w.ctx, &policyapi.ReportRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a report without the security header: %v", err)
	}
	// A flood is turned away, and others still get their SVIDs.
	var wg sync.WaitGroup
	refused := make(chan error, 1)
	for range 4 {
		wg.Go(func() {
			for range 40 {
				if _, err := client.Report(ctx, &policyapi.ReportRequest{Observations: many(100)}); err != nil {
					select {
					case refused <- err:
					default:
					}
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-refused:
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a flood is refused with %v", err)
		}
	default:
		t.Error("a flood of reports is taken")
	}
}

// TestHostileAgent: an agent can tell tales about services that it may serve alone, under its own name, within bounds.
func TestHostileAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{})
	token, err := adminv1.NewAdminClient(w.AdminConn()).CreateJoinToken(w.ctx, &adminv1.CreateJoinTokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	roots, err := w.Roots()
	if err != nil {
		t.Fatal(err)
	}
	stolen, err := spireclient.Server{Addr: w.CAAddr(), TrustDomain: w.TrustDomain(), Bundle: x509bundle.FromX509Authorities(w.TrustDomain(), roots)}.Join(w.ctx, token.GetToken())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stolen.Close() })
	client := nodev1.NewNodeClient(stolen.Conn)
	lie := now("LIE", service, reader, "/", 1)
	lie.AgentId = "spiffe://example.org/spire/agent/another"
	broken := now("BROKEN", service, "nobody", "/", 1)
	elsewhere := now("ELSEWHERE", "spiffe://partner.example/db", reader, "/", 1)
	// Any attested node may serve the Identities of this test. One that no entry stands for it may not.
	nobody := now("NOBODYS", "spiffe://example.org/nobodys", reader, "/", 1)
	if _, err := client.ReportObservations(w.ctx, &nodev1.ReportObservationsRequest{Observations: []*policyv1.Observation{lie, broken, elsewhere, nobody}, Dropped: math.MaxUint64}); err != nil {
		t.Fatal(err)
	}
	all, err := w.list(&adminv1.ListObservationsRequest{})
	if err != nil || len(all) != 1 || all[0].GetDecisionId() != "LIE" || all[0].GetAgentId() != stolen.ID.String() {
		t.Errorf("the CA knows %v, %v; want the one of %s", all, err, stolen.ID)
	}
	many := make([]*policyv1.Observation, 1001)
	for i := range many {
		many[i] = now("", service, reader, fmt.Sprint("/", i), 1)
	}
	if _, err := client.ReportObservations(w.ctx, &nodev1.ReportObservationsRequest{Observations: many}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("1001 at once: %v", err)
	}
	var wg sync.WaitGroup
	var limited atomic.Int32
	for range 40 {
		wg.Go(func() {
			if _, err := client.ReportObservations(w.ctx, &nodev1.ReportObservationsRequest{Observations: many[:1000]}); status.Code(err) == codes.ResourceExhausted {
				limited.Add(1)
			}
		})
	}
	wg.Wait()
	if limited.Load() == 0 {
		t.Error("40,000 observations at once are taken from one agent")
	}
	// Nothing of it keeps the honest agent from reporting.
	_, id := w.call(w.client(reader), "POST", w.serve()+"/v1/a")
	w.until("the honest agent is heard", func() error {
		_, err := w.observations().GetDecision(w.ctx, &adminv1.GetDecisionRequest{DecisionId: id})
		return err
	})
}
