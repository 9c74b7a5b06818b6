// Package enforce is what the enforcement points for Go programs have in common: who the peer is, which token it brought,
// what the policies say, and telling the operator about it. Package tlsauthz, httpauthz and grpcauthz call it; it is
// internal because its TLS authorizer admits peers that only a look at their requests can judge.
package enforce

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/live"
	"github.com/signet-id/signet/spiffe"
)

// A Source has the policies of the moment. Nil policies deny every call. It is called for each decision, by many
// goroutines.
type Source interface{ Policies() *policy.Policies }

// Config is what every enforcement point needs.
type Config struct {
	Policies   Source
	Service    spiffeid.ID
	JWTBundles jwtbundle.Source
	Log        *slog.Logger
	OnDecision func(policy.Judgement)
	Now        func() time.Time
	// Point is the kind of enforcement point, for judgements: tls, http, grpc, ext_authz or proxy.
	Point string
}

// A Point decides calls to one service. It is safe for concurrent use.
type Point struct {
	config      Config
	verified    leaves
	table       *live.Table
	connections sync.Map // of net.Conn below TLS to *Connection
}

// New returns a Point, or says which field of c is wrong.
func New(c Config) (*Point, error) {
	switch {
	case c.Policies == nil:
		return nil, errors.New("config field Policies is nil; use a source.Source")
	case c.Service.Path() == "":
		return nil, fmt.Errorf("config field Service is %q; it must be the SPIFFE ID of this service", c.Service)
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Point{config: c, table: live.New(live.Config{Policies: c.Policies, Now: c.Now})}, nil
}

// Prefilter returns an authorizer that admits the peers that some rule might allow, and notes their SVIDs as verified.
func (p *Point) Prefilter() tlsconfig.Authorizer {
	return func(id spiffeid.ID, chains [][]*x509.Certificate) error {
		policies := p.config.Policies.Policies()
		d := policies.MightAllow(p.config.Service, id)
		if !d.Allowed {
			return p.Tell(context.Background(), id, d, slog.String("call", "TLS handshake"))
		}
		if len(chains) == 0 || len(chains[0]) == 0 {
			return errors.New("the TLS configuration handed on no verified chain of the peer")
		}
		if name, found := policies.Revocations().X509SVID(chains[0][0]); found {
			d.Outcome, d.Revocation = policy.Outcome{Reason: policy.ReasonRevoked}, name
			return p.Tell(context.Background(), id, d, slog.String("call", "TLS handshake"))
		}
		p.verified.add(chains[0][0], p.config.Now())
		return nil
	}
}

// Final returns an authorizer that decides by the peer's ID alone.
func (p *Point) Final() tlsconfig.Authorizer {
	return func(id spiffeid.ID, chains [][]*x509.Certificate) error {
		if len(chains) == 0 || len(chains[0]) == 0 {
			return errors.New("the TLS configuration handed on no verified chain of the peer")
		}
		d := p.config.Policies.Policies().Decide(&policy.Request{Service: p.config.Service, Peer: id, Certificate: chains[0][0]})
		return p.Tell(context.Background(), id, d, slog.String("call", "TLS handshake"))
	}
}

// ServerTLS returns a TLS configuration that verifies peers strictly and asks authorize about them. Sessions are not
// resumed, so that a removed authority takes effect with the next connection.
func ServerTLS(svid x509svid.Source, bundles x509bundle.Source, authorize tlsconfig.Authorizer, now func() time.Time) *tls.Config {
	c := tlsconfig.MTLSServerConfig(svid, bundles, authorize)
	c.VerifyPeerCertificate = nil
	c.VerifyConnection = spiffe.VerifyConnection(bundles, now, authorize)
	c.SessionTicketsDisabled = true
	return c
}

// ServerTLS is the function ServerTLS with the prefilter, whose connections end when nothing of their peers' would be let
// through any more.
func (p *Point) ServerTLS(svid x509svid.Source, bundles x509bundle.Source) *tls.Config {
	return p.watchConnections(ServerTLS(svid, bundles, p.Prefilter(), p.config.Now), live.Prefiltered, p.config.Point == "grpc")
}

// Peer returns the ID of the peer of a connection whose SVID passed the prefilter in its handshake and is still valid.
//
// Without the prefilter the certificate may be anybody's: go-spiffe's configurations switch the checks of crypto/tls off,
// and so a server that was built without them has certificates as well.
func (p *Point) Peer(state *tls.ConnectionState) (spiffeid.ID, error) {
	switch {
	case state == nil:
		return spiffeid.ID{}, errors.New("the call did not come over TLS")
	case len(state.PeerCertificates) == 0:
		return spiffeid.ID{}, errors.New("the peer sent no X509-SVID")
	case state.DidResume:
		// go-spiffe's configurations verify in VerifyPeerCertificate, which crypto/tls does not call then: an authority may
		// be gone since.
		return spiffeid.ID{}, errors.New("the TLS session was resumed, so that the X509-SVID was not verified again; set SessionTicketsDisabled in the server's TLS configuration")
	}
	leaf := state.PeerCertificates[0]
	id, err := spiffe.CheckX509SVIDLeaf(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	now := p.config.Now()
	switch {
	case now.After(leaf.NotAfter):
		return id, fmt.Errorf("the X509-SVID expired at %s, while the connection was open", leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return id, fmt.Errorf("the X509-SVID is not valid before %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	case !p.verified.has(leaf):
		return id, errors.New("the X509-SVID was not verified by the authorizer of this enforcement point; use it in the server's TLS configuration")
	}
	return id, nil
}

// Judge decides a request and tells about it. The request's service is set here, its peer by the caller. authorization
// holds all lines of the header; they are looked at only if a rule asks for a token.
func (p *Point) Judge(ctx context.Context, r *policy.Request, authorization []string) (policy.Judgement, error) {
	policies := p.config.Policies.Policies()
	r.Service = p.config.Service
	call := policy.CallOf(r)
	attrs := []slog.Attr{slog.String("method", excerpt(r.Method)), slog.String("path", excerpt(r.Path))}
	if audiences := policies.Audiences(r.Service, r.Peer); len(audiences) > 0 {
		var err error
		if r.Token, err = p.token(policies.Revocations(), authorization, audiences); err != nil {
			attrs = append(attrs, slog.String("token", err.Error()))
			call = call.WithToken(err)
		}
	}
	var err error
	if r.User, err = policies.User(r, p.config.Now()); err != nil {
		attrs = append(attrs, slog.String("user_token", err.Error()))
		if call.Token == "" {
			call = call.WithToken(fmt.Errorf("user token: %w", err))
		}
	}
	return p.tell(ctx, r.Peer, call, policies.Decide(r), attrs...)
}

// RefuseSVID is the judgement on a call whose peer is not known for sure.
func (p *Point) RefuseSVID(ctx context.Context, id spiffeid.ID, why error) (policy.Judgement, error) {
	epoch, revision := p.config.Policies.Policies().Revision()
	d := policy.Decision{Outcome: policy.Outcome{Reason: policy.ReasonInvalidSVID}, Epoch: epoch, Revision: revision}
	return p.tell(ctx, id, policy.Call{}, d, slog.Any("err", why))
}

// Tell is tell for those that need only the error.
func (p *Point) Tell(ctx context.Context, peer spiffeid.ID, d policy.Decision, attrs ...slog.Attr) error {
	_, err := p.tell(ctx, peer, policy.Call{}, d, attrs...)
	return err
}

// tell gives a decision its id, logs it and reports it. The error is a *policy.DeniedError if it is a denial.
func (p *Point) tell(ctx context.Context, peer spiffeid.ID, call policy.Call, d policy.Decision, attrs ...slog.Attr) (policy.Judgement, error) {
	j := policy.Judgement{ID: rand.Text(), Time: p.config.Now(), Service: p.config.Service, Peer: peer, Decision: d, Point: p.config.Point, Call: call}
	if o, ok := p.config.Policies.(policy.Observer); ok {
		o.Observe(j)
	}
	if p.config.OnDecision != nil {
		p.config.OnDecision(j)
	}
	level, message := slog.LevelDebug, "call allowed"
	switch {
	case !d.Allowed:
		level, message = slog.LevelInfo, "call denied"
	case d.ShadowDiffers():
		level, message = slog.LevelInfo, "call allowed, would be denied"
	}
	if p.config.Log.Enabled(ctx, level) {
		attrs = append([]slog.Attr{slog.String("decision_id", j.ID), slog.String("spiffe_id", peer.String()),
			slog.String("service", j.Service.String()), slog.Any("decision", d)}, attrs...)
		p.config.Log.LogAttrs(ctx, level, message, attrs...)
	}
	if !d.Allowed {
		return j, &policy.DeniedError{Judgement: j}
	}
	return j, nil
}

// token validates the bearer token of a request.
func (p *Point) token(revocations *policy.Revocations, authorization, audiences []string) (*policy.Token, error) {
	switch {
	case len(authorization) == 0:
		return nil, errors.New("none")
	case len(authorization) > 1:
		return nil, fmt.Errorf("%d Authorization headers", len(authorization))
	case p.config.JWTBundles == nil:
		return nil, errors.New("config field JWTBundles is nil, so no JWT-SVID can be validated")
	}
	kind, token, _ := strings.Cut(authorization[0], " ")
	if !strings.EqualFold(kind, "Bearer") {
		return nil, errors.New("the Authorization header is not of the kind Bearer")
	}
	svid, err := spiffe.ValidateJWTSVID(token, p.config.JWTBundles, audiences, spiffe.JWTOptions{Now: p.config.Now()})
	if err != nil {
		return nil, err
	}
	if name, found := revocations.JWTSVID(svid.ID, svid.JTI, svid.IssuedAt); found {
		return nil, fmt.Errorf("the JWT-SVID is revoked by %q", name)
	}
	return &policy.Token{ID: svid.ID, Audience: svid.Audience, Claims: svid.Claims}, nil
}

func excerpt(s string) string {
	const limit = 256
	if len(s) > limit {
		return s[:limit] + "..."
	}
	return s
}

// maxLeaves is how many verified SVIDs are remembered. A peer whose SVID had to make way must connect again.
const maxLeaves = 1 << 16

// leaves remembers which SVIDs were verified, until they expire.
type leaves struct {
	mu   sync.RWMutex
	ends map[[sha256.Size]byte]time.Time
}

func (l *leaves) add(leaf *x509.Certificate, now time.Time) {
	key := sha256.Sum256(leaf.Raw)
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, found := l.ends[key]; found {
		return
	}
	if l.ends == nil {
		l.ends = make(map[[sha256.Size]byte]time.Time)
	}
	// Each addition pays for looking at a few others, so that expired ones go without a sweep over all.
	looked := 0
	for k, end := range l.ends {
		if now.After(end) || len(l.ends) >= maxLeaves {
			delete(l.ends, k)
		}
		if looked++; looked == 4 {
			break
		}
	}
	l.ends[key] = leaf.NotAfter
}

func (l *leaves) has(leaf *x509.Certificate) bool {
	key := sha256.Sum256(leaf.Raw)
	l.mu.RLock()
	defer l.mu.RUnlock()
	_, found := l.ends[key]
	return found
}
