// Package httpauthz enforces call policies in net/http servers. One constructor gives both halves: the authorizer for the
// TLS handshake, which only sorts out peers that no rule could allow, and the middleware that decides each request.
//
// Put the middleware outside of everything that changes the request. It judges the request target as it was received, so
// a mux behind it may route by the decoded path without opening a gap.
package httpauthz

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/enforce"
)

// DecisionHeader is the header of a refusal that holds the decision id.
const DecisionHeader = "Signet-Decision-Id"

// A Source has the policies of the moment; a source.Source is one. Nil policies deny every call.
type Source interface{ Policies() *policy.Policies }

// Config says for whom and by what requests are decided.
type Config struct {
	// Policies are asked for each request. Required.
	Policies Source
	// Service is the ID of this service. Required.
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
	// Point is what judgements call this enforcement point. Empty means http.
	Point string
	// Refuse answers a refused request. Nil means as Middleware says.
	Refuse func(http.ResponseWriter, *http.Request, policy.Judgement)
}

// An Authorizer decides the requests to one service. It is safe for concurrent use.
type Authorizer struct {
	point  *enforce.Point
	refuse func(http.ResponseWriter, *http.Request, policy.Judgement)
}

// New returns an Authorizer. The error names the field that is wrong.
func New(c Config) (*Authorizer, error) {
	point, err := enforce.New(c.common())
	if err != nil {
		return nil, fmt.Errorf("httpauthz: %w", err)
	}
	if c.Refuse == nil {
		c.Refuse = refuse
	}
	return &Authorizer{point, c.Refuse}, nil
}

func (c Config) common() enforce.Config {
	return enforce.Config{Policies: c.Policies, Service: c.Service, JWTBundles: c.JWTBundles, Log: c.Log, OnDecision: c.OnDecision, Now: c.Now, Point: cmp.Or(c.Point, "http")}
}

// TLSConfig returns a TLS configuration for the server: it identifies itself by svid, verifies its peers against bundles
// by every rule for X509-SVIDs and refuses those that no rule could allow. Sessions are not resumed.
func (a *Authorizer) TLSConfig(svid x509svid.Source, bundles x509bundle.Source) *tls.Config {
	c := a.point.ServerTLS(svid, bundles)
	c.NextProtos = []string{"h2", "http/1.1"}
	return c
}

// Server returns a server whose every request is decided before it reaches next, for ServeTLS(listener, "", ""). It is the
// shortest way to get all parts right.
func (a *Authorizer) Server(next http.Handler, svid x509svid.Source, bundles x509bundle.Source) *http.Server {
	server := &http.Server{Handler: next, ReadHeaderTimeout: 10 * time.Second, DisableGeneralOptionsHandler: true}
	a.Protect(server, svid, bundles)
	return server
}

// Prefilter returns the authorizer for a tlsconfig.MTLSServerConfig of one's own. It admits every peer that some rule
// might allow: alone it decides nothing. The middleware refuses peers that it has not seen, and so those whose TLS session
// was resumed: set SessionTicketsDisabled in that configuration, as TLSConfig does.
func (a *Authorizer) Prefilter() tlsconfig.Authorizer { return a.point.Prefilter() }

// Middleware returns a handler that hands on to next what the policies allow. A refused request is answered with status
// 403, the decision id in DecisionHeader and a JSON body {"decision_id", "reason"}, which says nothing about the rules.
//
// net/http answers "OPTIONS *" before any handler, unless http.Server.DisableGeneralOptionsHandler is set.
func (a *Authorizer) Middleware(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		judgement, request, err := a.judge(r)
		if err != nil {
			a.refuse(w, r, judgement)
			return
		}
		a.serve(w, r, request, judgement, next)
	})
}

func (a *Authorizer) judge(r *http.Request) (policy.Judgement, *policy.Request, error) {
	peer, err := a.point.Peer(r.TLS)
	if err != nil {
		judgement, err := a.point.RefuseSVID(r.Context(), peer, err)
		return judgement, nil, err
	}
	request := &policy.Request{
		Peer:         peer,
		Protocol:     policy.ProtocolHTTP,
		Method:       r.Method,
		Path:         r.RequestURI,
		ContentTypes: r.Header["Content-Type"],
		Headers:      r.Header,
		Certificate:  r.TLS.PeerCertificates[0],
	}
	if r.Method == http.MethodConnect && r.URL.Path == "" {
		// Over HTTP/2 RequestURI is the authority, which may begin with a slash: it is no path for all that.
		request.Path = ""
	}
	for name := range r.Header {
		request.HasMethodOverride = request.HasMethodOverride || policy.IsMethodOverride(name)
	}
	judgement, err := a.point.Judge(r.Context(), request, r.Header["Authorization"])
	return judgement, request, err
}

func refuse(w http.ResponseWriter, _ *http.Request, j policy.Judgement) {
	body, err := json.Marshal(struct {
		DecisionID string `json:"decision_id"`
		Reason     string `json:"reason"`
	}{j.ID, j.Decision.Reason.Public()})
	if err != nil { // two strings always have a JSON form
		body = nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set(DecisionHeader, j.ID)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(http.StatusForbidden)
	_, _ = w.Write(append(body, '\n')) // a caller that is gone needs no answer
}

type judgementKey struct{}

// JudgementFrom returns the decision that let the request of this context through.
func JudgementFrom(ctx context.Context) (policy.Judgement, bool) {
	j, ok := ctx.Value(judgementKey{}).(policy.Judgement)
	return j, ok
}

// PeerID returns the verified SPIFFE ID of the caller, in a handler behind the middleware.
func PeerID(ctx context.Context) (spiffeid.ID, bool) {
	j, ok := JudgementFrom(ctx)
	return j.Peer, ok
}
