package caclient

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-id/signet/spiffe"
)

// ServerID is the ID that a CA of td has, in SPIRE's way of naming.
func ServerID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "spire", "server")
}

// clientTLS verifies the CA against the bundle and its exact ID; host names play no part (X509-50). There are no session
// tickets on either side, so that each connection judges the chain against the present bundle (X509-55). failed, if not
// nil, is told when the CA does not verify.
func clientTLS(td spiffeid.TrustDomain, svid *x509svid.SVID, bundles x509bundle.Source, now func() time.Time, failed func(error)) grpc.DialOption {
	verify := spiffe.VerifyConnection(bundles, now, isServer(td))
	config := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		Time:                   now,
		InsecureSkipVerify:     true, // VerifyConnection verifies, by SPIFFE's rules instead of by host name
		VerifyConnection: func(cs tls.ConnectionState) error {
			err := verify(cs)
			if err != nil && failed != nil {
				failed(err)
			}
			return err
		},
	}
	if svid != nil {
		cert := &tls.Certificate{PrivateKey: svid.PrivateKey}
		for _, c := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(config))
}

func isServer(td spiffeid.TrustDomain) func(spiffeid.ID, [][]*x509.Certificate) error {
	want := ServerID(td)
	return func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		if id != want {
			return fmt.Errorf("the server at server_address is %q, not %q", id, want)
		}
		return nil
	}
}

// pinnedTLS verifies the CA on an agent's first connection by the authority that the join token pins: among the
// certificates that the CA presents there must be the pinned authority, and the CA's X509-SVID must verify against that
// authority alone.
func pinnedTLS(td spiffeid.TrustDomain, pin func(*x509.Certificate) bool, now func() time.Time, found func(*x509.Certificate)) grpc.DialOption {
	config := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		Time:                   now,
		InsecureSkipVerify:     true, // VerifyConnection verifies, by the pin and SPIFFE's rules
		VerifyConnection: func(cs tls.ConnectionState) error {
			authority, err := pinned(cs.PeerCertificates, pin)
			if err != nil {
				return err
			}
			bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{authority})
			if err := spiffe.VerifyConnection(bundle, now, isServer(td))(withoutAuthority(cs, authority)); err != nil {
				return err
			}
			found(authority)
			return nil
		},
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(config))
}

func pinned(chain []*x509.Certificate, pin func(*x509.Certificate) bool) (*x509.Certificate, error) {
	if len(chain) > 0 {
		for _, c := range chain[1:] {
			if c.IsCA && pin(c) {
				return c, nil
			}
		}
	}
	return nil, errors.New("the CA did not present the authority that the join token pins: either the token was made by another CA, " +
		"or its authority has been rotated; make a new token, or set trust_bundle_path")
}

// withoutAuthority leaves out of the peer's chain the trust anchor itself, which no SVID's chain contains.
func withoutAuthority(cs tls.ConnectionState, authority *x509.Certificate) tls.ConnectionState {
	chain := make([]*x509.Certificate, 0, len(cs.PeerCertificates))
	for _, c := range cs.PeerCertificates {
		if !c.Equal(authority) {
			chain = append(chain, c)
		}
	}
	cs.PeerCertificates = chain
	return cs
}
