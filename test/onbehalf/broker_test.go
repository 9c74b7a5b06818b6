package onbehalf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/spiffe"
)

func pidRef(t testing.TB, pid int32) *brokerpb.WorkloadReference {
	t.Helper()
	packed, err := anypb.New(&brokerpb.WorkloadPIDReference{Pid: pid})
	if err != nil {
		t.Fatal(err)
	}
	return &brokerpb.WorkloadReference{Reference: packed}
}

// TestBrokerSpeaksForAProcess: a broker with an SVID of its own, which it got as any workload does, gets those of a
// process; the server shows the agent's SVID; and when the process ends, the stream does.
func TestBrokerSpeaksForAProcess(t *testing.T) {
	w := newWorld(t, func(w *world, c *agent.Config) {
		c.Broker = agent.Broker{SocketPath: filepath.Join(w.dir, "broker", "b.sock"), Brokers: []agent.BrokerClient{{ID: "/speaker", References: []string{"pid"}}}}
	})
	own := w.own()
	conn, err := grpc.NewClient("unix:"+filepath.Join(w.dir, "broker", "b.sock"),
		grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(own, own, tlsconfig.AuthorizeID(w.Agent().Status().ID))))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := brokerpb.NewAPIClient(conn)
	ctx := metadata.AppendToOutgoingContext(w.ctx, "broker.spiffe.io", "true")

	pid, kill := w.start()
	stream, err := c.SubscribeToX509SVID(ctx, &brokerpb.SubscribeToX509SVIDRequest{Reference: pidRef(t, pid)})
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Svids) != 1 || m.Svids[0].SpiffeId != "spiffe://example.org/w" {
		t.Fatalf("the broker gets %d SVIDs: %v", len(m.Svids), m.Svids)
	}
	tokens, err := c.FetchJWTSVID(ctx, &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, pid), Audience: []string{"a"}})
	if err != nil || len(tokens.Svids) != 1 {
		t.Fatalf("JWT-SVIDs: %v, %v", tokens, err)
	}
	bundles, err := own.GetX509BundleForTrustDomain(w.TrustDomain())
	if err != nil {
		t.Fatal(err)
	}
	if string(m.Svids[0].Bundle) != string(bundles.X509Authorities()[0].Raw) {
		t.Error("the bundle is not the trust domain's")
	}

	// An operator ends the workload's entry, and registers it anew: the stream ends and a new one works.
	w.Delete("Identity", "w")
	wantCode(t, ended(stream), codes.PermissionDenied)
	w.identity("w", "/again", w.program)
	if stream, err = c.SubscribeToX509SVID(ctx, &brokerpb.SubscribeToX509SVIDRequest{Reference: pidRef(t, pid)}); err == nil {
		m, err = stream.Recv()
	}
	if err != nil || m.Svids[0].SpiffeId != "spiffe://example.org/again" {
		t.Fatalf("after it was registered anew: %v, %v", m, err)
	}
	kill()
	wantCode(t, ended(stream), codes.NotFound)

	for _, part := range []string{`msg="X509-SVIDs handed to a broker" broker=spiffe://example.org/speaker spiffe_id=spiffe://example.org/w`, `msg="JWT-SVIDs handed to a broker"`} {
		if !strings.Contains(w.log.String(), part) {
			t.Errorf("the agent's log does not say %s", part)
		}
	}
}

// TestBEP_01_OwnDirectory: brokers alone reach the socket, which is not where workloads look.
func TestBEP_01_OwnDirectory(t *testing.T) {
	w := newWorld(t, func(w *world, c *agent.Config) {
		c.Broker = agent.Broker{SocketPath: filepath.Join(w.dir, "broker", "b.sock"), Brokers: []agent.BrokerClient{{ID: "/speaker", References: []string{"pid"}}}}
	})
	for path, want := range map[string]os.FileMode{"broker": 0o750, "broker/b.sock": 0o660} {
		st, err := os.Stat(filepath.Join(w.dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, st.Mode().Perm(), want)
		}
	}
	if dir := filepath.Dir(w.AgentSocket()); dir == filepath.Join(w.dir, "broker") {
		t.Errorf("the Workload API's socket is in %s, too", dir)
	}
}

// TestServerIDIsTheAgents: what a broker has to expect of the endpoint is the ID that the agent's status shows.
func TestServerIDIsTheAgents(t *testing.T) {
	w := newWorld(t, func(w *world, c *agent.Config) {
		c.Broker = agent.Broker{Listen: "127.0.0.1:0", Brokers: []agent.BrokerClient{{ID: "/speaker", References: []string{"pid"}, PIDOverLoopback: true}}}
	})
	own := w.own()
	pid, _ := w.start()
	for name, tt := range map[string]struct {
		authorize tlsconfig.Authorizer
		want      codes.Code
	}{
		"the agent's ID":            {tlsconfig.AuthorizeID(w.Agent().Status().ID), codes.OK},
		"the CA's ID":               {tlsconfig.AuthorizeID(w.ID("/spire/server")), codes.Unavailable},
		"the workload's ID":         {tlsconfig.AuthorizeID(w.ID("/w")), codes.Unavailable},
		"another agent of the CA's": {tlsconfig.AuthorizeID(w.ID(w.Agent().Status().ID.Path() + "0")), codes.Unavailable},
	} {
		conn, err := grpc.NewClient(w.Agent().BrokerAddr().String(), grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(own, own, tt.authorize)))
		if err != nil {
			t.Fatal(err)
		}
		_, err = brokerpb.NewAPIClient(conn).FetchJWTSVID(metadata.AppendToOutgoingContext(w.ctx, "broker.spiffe.io", "true"),
			&brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, pid), Audience: []string{"a"}})
		conn.Close()
		if statusOf(err) != tt.want {
			t.Errorf("expecting %s: %v, want %v", name, err, tt.want)
		}
	}
	if _, err := spiffe.ParseWorkloadID(w.Agent().Status().ID.String()); err != nil {
		t.Errorf("the agent's ID: %v", err)
	}
}
