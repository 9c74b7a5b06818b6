package proxy

import (
	"context"
	"net"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/policy/grpcauthz"
)

// TestGRPC: unary calls and streams of a real gRPC client reach a real gRPC server in the clear, with the caller's ID; a denial is a
// gRPC status with the decision id.
func TestGRPC(t *testing.T) {
	w := newWorld(t, "kind: CallPolicy\nname: p\nservice: /service\nmode: enforce\nallow:\n- from: [/caller]\n  grpc: [grpc.health.v1.Health/Check, grpc.health.v1.Health/Watch]\n")
	l, err := net.Listen("unix", socketPath(t))
	if err != nil {
		t.Fatal(err)
	}
	peers := make(chan string, 10)
	server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		for _, id := range md["signet-peer-id"] {
			peers <- id
		}
		if len(md["fail"]) > 0 {
			return nil, status.Error(codes.ResourceExhausted, "as you wish")
		}
		return h(ctx, r)
	}))
	serving := health.NewServer()
	healthpb.RegisterHealthServer(server, serving)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-served })

	c := inboundConfig("http", "unix://"+l.Addr().String())
	c.Inbound[0].HTTP = HTTP{BackendProtocol: "h2c", PeerIDHeader: "Signet-Peer-Id"}
	p := w.start(t, c)
	client := func(path string) healthpb.HealthClient {
		conn, err := grpc.NewClient("passthrough:///"+p.in(), grpc.WithTransportCredentials(credentials.NewTLS(w.caller(t, path))))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return healthpb.NewHealthClient(conn)
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "signet-peer-id", "spiffe://example.org/root"), patience)
	defer cancel()

	allowed := client("/caller")
	if _, err := allowed.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	if id := <-peers; id != "spiffe://example.org/caller" || len(peers) > 0 {
		t.Errorf("the server was told of %q, and %d more", id, len(peers))
	}
	if _, err := allowed.Check(metadata.AppendToOutgoingContext(ctx, "fail", "1"), &healthpb.HealthCheckRequest{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the server's own status came as %v", err)
	}
	stream, err := allowed.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		got, err := stream.Recv() // each comes while the stream is open
		if err != nil || got.Status != want {
			t.Fatalf("%v, %v; want %v", got, err, want)
		}
		serving.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	}

	_, err = allowed.List(ctx, &healthpb.HealthListRequest{})
	s := status.Convert(err)
	if s.Code() != codes.PermissionDenied || len(s.Details()) != 1 {
		t.Fatalf("%v with %d details", err, len(s.Details()))
	}
	info, ok := s.Details()[0].(*errdetails.ErrorInfo)
	if !ok || info.Domain != grpcauthz.Domain || info.Reason != "DENIED" || info.Metadata["decision_id"] == "" {
		t.Errorf("detail %v", s.Details()[0])
	}

	server.Stop()
	if _, err := allowed.Check(ctx, &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("without its server: %v", err)
	}
}
