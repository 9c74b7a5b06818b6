// Package grpcauthz enforces call policies in gRPC servers. One constructor gives both halves: the transport credentials,
// which only sort out peers that no rule could allow, and the interceptors that decide each RPC. A stream is decided when it
// begins, and again when policies or revocations change: one that is denied then ends with PermissionDenied.
package grpcauthz

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/enforce"
)

// Domain is the domain of the google.rpc.ErrorInfo in a refusal. Its metadata has the key decision_id.
const Domain = "signet"

// A Source has the policies of the moment; a source.Source is one. Nil policies deny every call.
type Source interface{ Policies() *policy.Policies }

// Config says for whom and by what RPCs are decided.
type Config struct {
	// Policies are asked for each RPC. Required.
	Policies Source
	// Service is the SPIFFE ID of this service. Required.
	Service spiffeid.ID
	// JWTBundles validate the JWT-SVIDs that rules ask for, such as a workloadapi.JWTSource. Nil means that no rule with
	// jwt allows anything.
	JWTBundles jwtbundle.Source
	// Log gets denials and what shadow policies would deny at level info, the rest at debug. Nil means slog.Default.
	Log *slog.Logger
	// OnDecision is called with each decision, for counting. It must not block. Nil means nobody.
	OnDecision func(policy.Judgement)
	// Now is the clock for the validity of SVIDs. Nil means time.Now.
	Now func() time.Time
}

// An Authorizer decides the RPCs to one service. It is safe for concurrent use.
type Authorizer struct{ point *enforce.Point }

// New returns an Authorizer. The error names the field that is wrong.
func New(c Config) (*Authorizer, error) {
	point, err := enforce.New(enforce.Config{Policies: c.Policies, Service: c.Service, JWTBundles: c.JWTBundles, Log: c.Log, OnDecision: c.OnDecision, Now: c.Now, Point: "grpc"})
	if err != nil {
		return nil, fmt.Errorf("grpcauthz: %w", err)
	}
	return &Authorizer{point}, nil
}

// ServerOptions are all that a server needs: credentials and both interceptors. The server identifies itself by svid and
// verifies its peers against bundles.
func (a *Authorizer) ServerOptions(svid x509svid.Source, bundles x509bundle.Source) []grpc.ServerOption {
	return []grpc.ServerOption{grpc.Creds(a.Credentials(svid, bundles)), grpc.ChainUnaryInterceptor(a.Unary), grpc.ChainStreamInterceptor(a.Stream)}
}

// Credentials verify peers by every rule for X509-SVIDs and refuse those that no rule could allow. Alone they decide
// nothing: use them with Unary and Stream, which refuse peers that came by other credentials. A
// connection is closed when no RPC of its peer's would be let through any more.
func (a *Authorizer) Credentials(svid x509svid.Source, bundles x509bundle.Source) credentials.TransportCredentials {
	c := a.point.ServerTLS(svid, bundles)
	c.NextProtos = []string{"h2"}
	return watching{credentials.NewTLS(c)}
}

// Unary is the interceptor for unary RPCs. It comes first, before others that have effects.
func (a *Authorizer) Unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	h, err := a.judge(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	defer h.release()
	response, err := handler(h.ctx, request)
	if ended := h.ended(); ended != nil {
		return nil, ended
	}
	return response, err
}

// Stream is the interceptor for streams. It comes first, before others that have effects.
func (a *Authorizer) Stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	h, err := a.judge(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	defer h.release()
	return h.stream(func() error { return handler(server, &judgedStream{stream, h}) })
}

// judge decides an RPC. The error is a status for the caller.
func (a *Authorizer) judge(ctx context.Context, method string) (*held, error) {
	judgement, request, err := a.decide(ctx, method)
	if err != nil {
		return nil, refusal(judgement)
	}
	return a.hold(context.WithValue(ctx, judgementKey{}, judgement), request)
}

func (a *Authorizer) decide(ctx context.Context, method string) (policy.Judgement, *policy.Request, error) {
	p, _ := peer.FromContext(ctx)
	var info credentials.TLSInfo
	if p != nil {
		info, _ = p.AuthInfo.(credentials.TLSInfo)
	}
	id, err := a.point.Peer(&info.State)
	if err != nil {
		judgement, err := a.point.RefuseSVID(ctx, id, err)
		return judgement, nil, err
	}
	md, _ := metadata.FromIncomingContext(ctx)
	// The wire's method is POST, or grpc would not have come so far.
	request := &policy.Request{Peer: id, Protocol: policy.ProtocolHTTP, Method: "POST", Path: method, ContentTypes: md["content-type"],
		Headers: headers(md), Certificate: info.State.PeerCertificates[0]}
	for name := range md {
		request.HasMethodOverride = request.HasMethodOverride || policy.IsMethodOverride(name)
	}
	judgement, err := a.point.Judge(ctx, request, md["authorization"])
	return judgement, request, err
}

// headers are the metadata of an RPC as policies ask for them.
type headers metadata.MD

// Values returns all values under a name, which is in lower case, as all names of metadata are.
func (h headers) Values(name string) []string { return h[name] }

// refusal is what the caller is told: PermissionDenied with the decision id, and nothing about the rules.
func refusal(j policy.Judgement) error {
	s := status.New(codes.PermissionDenied, "call denied, decision "+j.ID)
	detailed, err := s.WithDetails(&errdetails.ErrorInfo{
		Reason:   strings.ToUpper(j.Decision.Reason.Public()),
		Domain:   Domain,
		Metadata: map[string]string{"decision_id": j.ID},
	})
	if err != nil {
		return s.Err()
	}
	return detailed.Err()
}

type judgementKey struct{}

// JudgementFrom returns the decision that let the RPC of this context through.
func JudgementFrom(ctx context.Context) (policy.Judgement, bool) {
	j, ok := ctx.Value(judgementKey{}).(policy.Judgement)
	return j, ok
}

// PeerID returns the verified SPIFFE ID of the caller, in a handler behind the interceptors.
func PeerID(ctx context.Context) (spiffeid.ID, bool) {
	j, ok := JudgementFrom(ctx)
	return j.Peer, ok
}
