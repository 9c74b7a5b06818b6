package grpcauthz_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/grpcauthz"
	"github.com/signet-id/signet/policy/internal/testca"
)

// A stream that would be denied by now ends with PermissionDenied and its decision, although its handler waits for a message
// that never comes; others go on; and a peer that is revoked loses its connection.
func TestStreamsEndWhenTheyWouldBeDenied(t *testing.T) {
	ca := testca.New(t, "example.org")
	svid := ca.SVID(t, "/docs", time.Hour)
	source := &testca.Changing{}
	source.Set(testca.Policies(t, documents))
	var mu sync.Mutex
	told := make(map[string]policy.Judgement)
	a, err := grpcauthz.New(grpcauthz.Config{Policies: source, Service: svid.ID, Log: slog.New(slog.DiscardHandler), OnDecision: func(j policy.Judgement) {
		mu.Lock()
		defer mu.Unlock()
		told[j.ID] = j
	}})
	if err != nil {
		t.Fatal(err)
	}
	handlers := make(chan error, 8)
	server := grpc.NewServer(append(a.ServerOptions(svid, ca.X509()), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		if err := s.SendMsg(&emptypb.Empty{}); err != nil {
			return err
		}
		err := s.RecvMsg(&emptypb.Empty{})
		handlers <- err
		return err
	}))...)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-done })
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(
		tlsconfig.MTLSClientConfig(ca.SVID(t, "/web", time.Hour), ca.X509(), tlsconfig.AuthorizeID(svid.ID)))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	begin := func(method string) grpc.ClientStream {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		t.Cleanup(cancel)
		s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&emptypb.Empty{}); err != nil {
			t.Fatalf("%s: %v", method, err)
		}
		return s
	}
	refused := func(s grpc.ClientStream, reason policy.Reason) {
		t.Helper()
		st := status.Convert(s.RecvMsg(&emptypb.Empty{}))
		if st.Code() != codes.PermissionDenied || len(st.Details()) != 1 {
			t.Fatalf("the stream ended with %v", st)
		}
		id := st.Details()[0].(*errdetails.ErrorInfo).GetMetadata()["decision_id"]
		mu.Lock()
		j := told[id]
		mu.Unlock()
		if j.Decision.Reason != reason || j.Peer.Path() != "/web" {
			t.Errorf("decision %q is %+v, want %v", id, j, reason)
		}
		if err := <-handlers; err == nil || err == io.EOF {
			t.Errorf("its handler ended with %v", err)
		}
	}

	ended, other := begin("/p.S/Stream"), begin("/q.T/Open")
	source.Set(testca.Policies(t, "{kind: CallPolicy, name: docs, service: /docs, allow: [{from: [/web], grpc: [q.T/*]}]}"))
	refused(ended, policy.ReasonNoAllow)
	if err := other.SendMsg(&emptypb.Empty{}); err != nil {
		t.Errorf("a stream that is still allowed: %v", err)
	}
	if err := <-handlers; err != nil {
		t.Errorf("a stream that is still allowed: %v", err)
	}
	revoked := begin("/q.T/Open")
	source.Revoke("/web")
	refused(revoked, policy.ReasonRevoked)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for state := conn.GetState(); state == connectivity.Ready; state = conn.GetState() {
		if !conn.WaitForStateChange(ctx, state) {
			t.Fatal("the connection of a revoked peer stays open")
		}
	}
}

// A unary call whose caller is revoked meanwhile gets no answer, and its handler's context ends.
func TestUnaryCallsEndWhenTheyWouldBeDenied(t *testing.T) {
	ca := testca.New(t, "example.org")
	svid := ca.SVID(t, "/docs", time.Hour)
	source := &testca.Changing{}
	source.Set(testca.Policies(t, documents))
	a, err := grpcauthz.New(grpcauthz.Config{Policies: source, Service: svid.ID, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(a.ServerOptions(svid, ca.X509())...)
	server.RegisterService(&grpc.ServiceDesc{ServiceName: "p.S", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{{MethodName: "Unary",
		Handler: func(_ any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			return interceptor(ctx, &emptypb.Empty{}, &grpc.UnaryServerInfo{FullMethod: "/p.S/Unary"}, func(ctx context.Context, _ any) (any, error) {
				source.Revoke("/web")
				<-ctx.Done()
				return &emptypb.Empty{}, nil
			})
		}}}}, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-done })
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(
		tlsconfig.MTLSClientConfig(ca.SVID(t, "/web", time.Hour), ca.X509(), tlsconfig.AuthorizeID(svid.ID)))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := conn.Invoke(ctx, "/p.S/Unary", &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a call whose caller was revoked: %v", err)
	}
}
