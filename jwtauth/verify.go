package jwtauth

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

// VerifierConfig says which tokens a service takes.
type VerifierConfig struct {
	// Audience are the names of this service, of which a token must have one. Required.
	Audience []string
	// JWTBundles verify tokens, such as a workloadapi.JWTSource. Required.
	JWTBundles jwtbundle.Source
	// X509Bundles verify the X509-SVID of the TLS peer, whose ID must be the subject of the token. Required, unless
	// AllowAnySubject is set.
	X509Bundles x509bundle.Source
	// AllowAnySubject takes tokens of any subject, whoever the TLS peer is and whether there is one or not: whoever gets hold
	// of a token can use it then.
	AllowAnySubject bool
	// Policies know what is revoked, such as a source.Source; while it has none, every token is refused. Nil: nothing is.
	Policies interface{ Policies() *policy.Policies }
	// Authorize refuses tokens that are valid and nevertheless not wanted. Nil: none.
	Authorize func(*spiffe.JWTSVID) error
	// Log gets refusals at level info. Nil means slog.Default.
	Log *slog.Logger
	// Now is the clock. Nil means time.Now.
	Now func() time.Time
}

// A Verifier checks the JWT-SVIDs of calls. It is safe for concurrent use.
type Verifier struct{ c VerifierConfig }

// NewVerifier returns a Verifier. The error names the field that is wrong.
func NewVerifier(c VerifierConfig) (*Verifier, error) {
	switch {
	case len(c.Audience) == 0 || slices.Contains(c.Audience, ""):
		return nil, errors.New("jwtauth: config field Audience is empty or has an empty name; say under which names this service takes tokens")
	case c.JWTBundles == nil:
		return nil, errors.New("jwtauth: config field JWTBundles is nil; use a workloadapi.JWTSource")
	case c.X509Bundles == nil && !c.AllowAnySubject:
		return nil, errors.New("jwtauth: config field X509Bundles is nil, so that the subject of a token cannot be compared with the TLS peer; use a workloadapi.X509Source, or set AllowAnySubject")
	}
	c.Audience = slices.Clone(c.Audience)
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Verifier{c}, nil
}

// Verify checks the Authorization of one call, all its lines, that came over the TLS connection of state, or nil. The error
// is for the service's own eyes. It never holds the token.
func (v *Verifier) Verify(authorization []string, state *tls.ConnectionState) (*spiffe.JWTSVID, error) {
	switch {
	case len(authorization) == 0:
		return nil, errors.New("the call has no Authorization")
	case len(authorization) > 1:
		return nil, fmt.Errorf("the call has %d lines of Authorization", len(authorization))
	}
	kind, token, _ := strings.Cut(authorization[0], " ")
	if !strings.EqualFold(kind, "Bearer") {
		return nil, errors.New("the Authorization is not of the kind Bearer")
	}
	now := v.c.Now()
	// Who is connected is cheaper to find out than whether a token is valid, and a stranger's token costs nothing then.
	var caller spiffeid.ID
	if !v.c.AllowAnySubject {
		var err error
		if caller, err = v.peer(state, now); err != nil {
			return nil, err
		}
	}
	svid, err := spiffe.ValidateJWTSVID(token, v.c.JWTBundles, v.c.Audience, spiffe.JWTOptions{Now: now})
	if err != nil {
		return nil, err
	}
	if !v.c.AllowAnySubject && svid.ID != caller {
		return nil, fmt.Errorf("the token's subject is %q, and the TLS peer is %q", svid.ID, caller)
	}
	if v.c.Policies != nil {
		policies := v.c.Policies.Policies()
		if policies == nil {
			return nil, errors.New("it is not known yet what is revoked")
		}
		if name, found := policies.Revocations().JWTSVID(svid.ID, svid.JTI, svid.IssuedAt); found {
			return nil, fmt.Errorf("the token is revoked by %q", name)
		}
		if !v.c.AllowAnySubject {
			if name, found := policies.Revocations().X509SVID(state.PeerCertificates[0]); found {
				return nil, fmt.Errorf("the X509-SVID of the TLS peer is revoked by %q", name)
			}
		}
	}
	if v.c.Authorize != nil {
		if err := v.c.Authorize(svid); err != nil {
			return nil, err
		}
	}
	return svid, nil
}

// peer returns the ID of the TLS peer. Its certificate is verified here: many servers ask for one and verify nothing.
func (v *Verifier) peer(state *tls.ConnectionState, now time.Time) (spiffeid.ID, error) {
	if state == nil || len(state.PeerCertificates) == 0 {
		return spiffeid.ID{}, errors.New("the caller showed no X509-SVID, with which its token could be compared")
	}
	id, _, err := spiffe.VerifyX509SVID(state.PeerCertificates, v.c.X509Bundles, spiffe.X509Options{Now: now})
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("the X509-SVID of the TLS peer: %w", err)
	}
	return id, nil
}

type svidKey struct{}

// SVIDFrom returns the JWT-SVID of the call of this context, in a handler behind a Verifier.
func SVIDFrom(ctx context.Context) (*spiffe.JWTSVID, bool) {
	svid, ok := ctx.Value(svidKey{}).(*spiffe.JWTSVID)
	return svid, ok
}

// Middleware returns a handler that hands on to next what comes with a valid token. The rest is answered with status 401, and
// is told nothing of the reason, which is in the log.
func (v *Verifier) Middleware(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		svid, err := v.Verify(r.Header["Authorization"], r.TLS)
		if err != nil {
			v.c.Log.InfoContext(r.Context(), "call without a valid JWT-SVID refused", "err", err)
			w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
			http.Error(w, "a valid JWT-SVID is needed", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), svidKey{}, svid)))
	})
}

// Unary is the interceptor for unary RPCs. It comes before others that have effects. A refused RPC ends with Unauthenticated.
func (v *Verifier) Unary(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := v.rpc(ctx)
	if err != nil {
		return nil, err
	}
	return handler(ctx, request)
}

// Stream is the interceptor for streams, which are judged once, when they begin.
func (v *Verifier) Stream(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := v.rpc(stream.Context())
	if err != nil {
		return err
	}
	return handler(server, &verifiedStream{stream, ctx})
}

type verifiedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *verifiedStream) Context() context.Context { return s.ctx }

func (v *Verifier) rpc(ctx context.Context) (context.Context, error) {
	var state *tls.ConnectionState
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			state = &info.State
		}
	}
	md, _ := metadata.FromIncomingContext(ctx)
	svid, err := v.Verify(md["authorization"], state)
	if err != nil {
		v.c.Log.InfoContext(ctx, "RPC without a valid JWT-SVID refused", "err", err)
		return nil, status.Error(codes.Unauthenticated, "a valid JWT-SVID is needed")
	}
	return context.WithValue(ctx, svidKey{}, svid), nil
}
