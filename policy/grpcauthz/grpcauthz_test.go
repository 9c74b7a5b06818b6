package grpcauthz_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/grpcauthz"
	"github.com/signet-id/signet/policy/internal/testca"
)

const documents = `
kind: CallPolicy
name: docs
service: /docs
allow:
  - from: [/web]
    grpc: [p.S/Unary, p.S/Stream, q.T/*]
  - from: [/tokens]
    grpc: [p.S/*]
    jwt: {audience: [docs]}
deny:
  - from: [/web]
    grpc: [q.T/Secret]
`

// A fixture is a gRPC server of /docs with the services p.S and q.T, which notes what reaches it.
type fixture struct {
	ca     *testca.CA
	server *x509svid.SVID
	addr   string

	mu      sync.Mutex
	now     time.Time
	reached []string
	judged  []policy.Judgement
}

func (f *fixture) Now() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now.IsZero() {
		return time.Now()
	}
	return f.now
}

func (f *fixture) reach(ctx context.Context, what string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reached = append(f.reached, what)
	if id, ok := grpcauthz.PeerID(ctx); !ok || id.IsZero() {
		return errors.New("the handler does not know its peer")
	}
	return nil
}

func (f *fixture) take() (reached []string, judged []policy.Judgement) {
	f.mu.Lock()
	defer f.mu.Unlock()
	reached, judged = f.reached, f.judged
	f.reached, f.judged = nil, nil
	return reached, judged
}

// unary is the handler of a method without a generated service.
func (f *fixture) unary(name string) grpc.MethodDesc {
	short := name[strings.LastIndex(name, "/")+1:]
	return grpc.MethodDesc{MethodName: short, Handler: func(_ any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		in := &emptypb.Empty{}
		if err := dec(in); err != nil {
			return nil, err
		}
		return interceptor(ctx, in, &grpc.UnaryServerInfo{FullMethod: "/" + name}, func(ctx context.Context, _ any) (any, error) {
			return in, f.reach(ctx, name)
		})
	}}
}

func start(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{ca: testca.New(t, "example.org")}
	f.server = f.ca.SVID(t, "/docs", time.Hour)
	a, err := grpcauthz.New(grpcauthz.Config{
		Policies: testca.Fixed{P: testca.Policies(t, documents)}, Service: f.server.ID, JWTBundles: f.ca.JWT(t), Now: f.Now,
		Log: slog.New(slog.DiscardHandler),
		OnDecision: func(j policy.Judgement) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.judged = append(f.judged, j)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(append(a.ServerOptions(f.server, f.ca.X509()), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(s)
		return f.reach(s.Context(), "unknown "+method)
	}))...)
	server.RegisterService(&grpc.ServiceDesc{ServiceName: "p.S", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{f.unary("p.S/Unary"), f.unary("p.S/Other")},
		Streams: []grpc.StreamDesc{{StreamName: "Stream", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
			return f.reach(s.Context(), "p.S/Stream")
		}}}}, nil)
	server.RegisterService(&grpc.ServiceDesc{ServiceName: "q.T", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{f.unary("q.T/Open"), f.unary("q.T/Secret")}}, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.addr = l.Addr().String()
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-done })
	return f
}

func (f *fixture) tls(t testing.TB, path string) *tls.Config {
	return tlsconfig.MTLSClientConfig(f.ca.SVID(t, path, time.Hour), f.ca.X509(), tlsconfig.AuthorizeID(f.server.ID))
}

func (f *fixture) dial(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(f.addr, grpc.WithTransportCredentials(credentials.NewTLS(f.tls(t, path))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestUnaryAndStream(t *testing.T) {
	f := start(t)
	conn := f.dial(t, "/web")
	for method, allowed := range map[string]bool{"p.S/Unary": true, "p.S/Other": false, "q.T/Open": true, "q.T/Secret": false, "x.Y/Z": false} {
		err := conn.Invoke(t.Context(), "/"+method, &emptypb.Empty{}, &emptypb.Empty{})
		f.check(t, method, allowed, err)
	}
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/p.S/Stream")
	if err != nil {
		t.Fatal(err)
	}
	if err = stream.RecvMsg(&emptypb.Empty{}); errors.Is(err, io.EOF) {
		err = nil
	}
	f.check(t, "p.S/Stream", true, err)
	stream, err = conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/no.Such/Stream")
	if err != nil {
		t.Fatal(err)
	}
	f.check(t, "no.Such/Stream", false, stream.RecvMsg(&emptypb.Empty{}))
}

// check holds the outcome of one RPC against what the server saw.
func (f *fixture) check(t *testing.T, method string, allowed bool, err error) {
	t.Helper()
	reached, judged := f.take()
	if len(judged) != 1 || judged[0].Decision.Allowed != allowed {
		t.Fatalf("%s: reported %+v, want one decision, allowed %t", method, judged, allowed)
	}
	if allowed {
		if err != nil || len(reached) != 1 || reached[0] != method {
			t.Errorf("%s: %v, reached %q", method, err, reached)
		}
		return
	}
	s := status.Convert(err)
	if s.Code() != codes.PermissionDenied || len(reached) != 0 || len(s.Details()) != 1 {
		t.Fatalf("%s: %v with %d details, reached %q", method, err, len(s.Details()), reached)
	}
	info, ok := s.Details()[0].(*errdetails.ErrorInfo)
	if !ok || info.Reason != "DENIED" || info.Domain != grpcauthz.Domain || len(info.Metadata) != 1 || info.Metadata["decision_id"] != judged[0].ID {
		t.Errorf("%s: details %v", method, s.Details())
	}
	if strings.Contains(s.Message(), "docs") {
		t.Errorf("%s: the message tells about rules: %s", method, s.Message())
	}
}

func TestMethodOverride(t *testing.T) {
	f := start(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-http-method-override", "DELETE")
	err := f.dial(t, "/web").Invoke(ctx, "/p.S/Unary", &emptypb.Empty{}, &emptypb.Empty{})
	reached, judged := f.take()
	if status.Code(err) != codes.PermissionDenied || len(reached) != 0 || len(judged) != 1 || judged[0].Decision.Reason != policy.ReasonMethodOverride {
		t.Errorf("%v, reached %q, %+v", err, reached, judged)
	}
}

func TestToken(t *testing.T) {
	f := start(t)
	conn := f.dial(t, "/tokens")
	for _, tt := range []struct {
		token string
		want  codes.Code
	}{
		{"", codes.PermissionDenied},
		{f.ca.Token(t, "/tokens", "other"), codes.PermissionDenied},
		{f.ca.Token(t, "/web", "docs"), codes.PermissionDenied},
		{f.ca.Token(t, "/tokens", "docs"), codes.OK},
	} {
		ctx := t.Context()
		if tt.token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+tt.token)
		}
		if err := conn.Invoke(ctx, "/p.S/Other", &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != tt.want {
			t.Errorf("token %.10q...: %v, want %v", tt.token, err, tt.want)
		}
	}
}

func TestExpiryOnTheConnection(t *testing.T) {
	f := start(t)
	conn := f.dial(t, "/web")
	if err := conn.Invoke(t.Context(), "/p.S/Unary", &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	f.take()
	f.mu.Lock()
	f.now = time.Now().Add(2 * time.Hour)
	f.mu.Unlock()
	err := conn.Invoke(t.Context(), "/p.S/Unary", &emptypb.Empty{}, &emptypb.Empty{})
	if _, judged := f.take(); status.Code(err) != codes.PermissionDenied || len(judged) != 1 || judged[0].Decision.Reason != policy.ReasonInvalidSVID {
		t.Errorf("%v, %+v", err, judged)
	}
}

func TestCredentialsRefuseStrangers(t *testing.T) {
	f := start(t)
	err := f.dial(t, "/nobody").Invoke(t.Context(), "/p.S/Unary", &emptypb.Empty{}, &emptypb.Empty{})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a peer that no rule allows: %v", err)
	}
	if reached, judged := f.take(); len(reached) != 0 || len(judged) == 0 || judged[0].Decision.Allowed {
		t.Errorf("reached %q, reported %+v", reached, judged)
	}
}

// permitted says for the policies of documents what /web may reach.
func permitted(method string) bool {
	switch method {
	case "p.S/Unary", "p.S/Stream", "q.T/Open":
		return true
	}
	rest, found := strings.CutPrefix(method, "unknown /q.T/")
	return found && rest != "" && rest != "Secret" && !strings.Contains(rest, "/")
}

// FuzzRouting holds that whatever path is sent, grpc-go never hands an RPC to a method that the policies do not allow.
func FuzzRouting(f *testing.F) {
	fx := start(f)
	transport := &http.Transport{TLSClientConfig: fx.tls(f, "/web"), ForceAttemptHTTP2: true}
	f.Cleanup(transport.CloseIdleConnections)
	for _, path := range []string{"/p.S/Unary", "/q.T/Secret", "/q.T/Secret/", "/q.T/%53ecret", "/q.T//Secret", "/q.T/./Secret", "/q.T/Secret?x", "/p.S/Other#", "/q.T/x", "//q.T/Secret", "/p.S/Unary/../Other"} {
		f.Add(path, "application/grpc")
	}
	f.Add("/q.T/Secret", "application/grpc-web")
	f.Add("/q.T/Secret", "application/grpc;x")
	f.Fuzz(func(t *testing.T, path, contentType string) {
		if !strings.HasPrefix(path, "/") {
			return // net/http would not send it
		}
		request := &http.Request{Method: "POST", URL: &url.URL{Scheme: "https", Host: fx.addr, Opaque: path}, Header: http.Header{"Content-Type": {contentType}, "Te": {"trailers"}},
			Body: io.NopCloser(strings.NewReader("\x00\x00\x00\x00\x00"))}
		response, err := transport.RoundTrip(request.WithContext(t.Context()))
		if err == nil {
			_, _ = io.Copy(io.Discard, response.Body)
			response.Body.Close()
		}
		reached, _ := fx.take()
		for _, method := range reached {
			if !permitted(method) {
				t.Fatalf("path %q, content type %q reached %q", path, contentType, method)
			}
		}
	})
}

func TestFuzzReachesItsServer(t *testing.T) {
	f := start(t)
	transport := &http.Transport{TLSClientConfig: f.tls(t, "/web"), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	request := &http.Request{Method: "POST", URL: &url.URL{Scheme: "https", Host: f.addr, Opaque: "/q.T/Open"}, Header: http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}},
		Body: io.NopCloser(strings.NewReader("\x00\x00\x00\x00\x00"))}
	response, err := transport.RoundTrip(request.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, response.Body)
	response.Body.Close()
	if reached, judged := f.take(); len(reached) != 1 || reached[0] != "q.T/Open" {
		t.Errorf("status %s %v, reached %q, judged %+v", response.Status, response.Trailer, reached, judged)
	}
}
