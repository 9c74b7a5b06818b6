// Package tlsauthz enforces call policies in the TLS handshake of servers built with go-spiffe's tlsconfig, for protocols
// that signet does not look into. Only the peer's SPIFFE ID is known there: a peer is allowed by rules without http, grpc
// and jwt, and refused by any deny that names it. For HTTP and gRPC, use httpauthz and grpcauthz.
package tlsauthz

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/enforce"
)

// A Source has the policies of the moment; a source.Source is one. Nil policies deny every call.
type Source interface{ Policies() *policy.Policies }

// Config says for whom and by what connections are decided.
type Config struct {
	// Policies are asked at each handshake. Required.
	Policies Source
	// Service is the ID of this service. Required.
	Service spiffeid.ID
	// Log gets denials and what shadow policies would deny at level info, the rest at debug. Nil means slog.Default.
	Log *slog.Logger
	// OnDecision is called with each decision, for counting. It must not block. Nil means nobody.
	OnDecision func(policy.Judgement)
	// Now is the clock for validity. Nil means time.Now.
	Now func() time.Time
}

// Final returns an authorizer for tlsconfig.MTLSServerConfig that decides each full handshake. Its error is a
// *policy.DeniedError; the peer sees only a TLS alert. Without a source or a service it denies all.
//
// Set SessionTicketsDisabled in that configuration, or take it from ServerConfig. crypto/tls asks nobody about a session
// that is resumed: a peer that is denied since, or whose authority is gone, would get in with an old ticket. It does not close connections either: ServerConfig and Listen do.
func Final(policies Source, service spiffeid.ID) tlsconfig.Authorizer {
	authorize, err := New(Config{Policies: policies, Service: service})
	if err != nil {
		return func(spiffeid.ID, [][]*x509.Certificate) error { return err }
	}
	return authorize
}

// New is Final with a log and a counter, and with the same need of SessionTicketsDisabled. The error names the field that is wrong.
func New(c Config) (tlsconfig.Authorizer, error) {
	point, err := c.point()
	if err != nil {
		return nil, err
	}
	return point.Final(), nil
}

// ServerConfig returns a TLS configuration for a server that identifies itself by svid, verifies its peers against
// bundles by every rule for X509-SVIDs, and decides each connection. Sessions are not resumed.
// A connection is closed when its peer would not be let through any more; Listen forgets those that end by themselves sooner.
func ServerConfig(c Config, svid x509svid.Source, bundles x509bundle.Source) (*tls.Config, error) {
	point, err := c.point()
	if err != nil {
		return nil, err
	}
	return point.FinalTLS(svid, bundles), nil
}

func (c Config) point() (*enforce.Point, error) {
	return enforce.New(enforce.Config{Policies: c.Policies, Service: c.Service, Log: c.Log, OnDecision: c.OnDecision, Now: c.Now, Point: "tls"})
}
