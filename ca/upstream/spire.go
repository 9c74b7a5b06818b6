package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/spiffe"
)

const (
	maxSPIREAnswerBytes = 1 << 20
	maxJWTKeys          = 256
	sourceWait          = 10 * time.Second
)

// SPIREConfig says how a SPIRE or signet server is reached.
type SPIREConfig struct {
	// TrustDomain is that of both CAs.
	TrustDomain spiffeid.TrustDomain
	// ServerAddress is host:port of the upstream server.
	ServerAddress string
	// AgentSocket is the Workload API of the agent on this machine that is attested to the upstream server, as
	// unix:///path. It gives this CA the X509-SVID of its downstream entry.
	AgentSocket string
	// ID chooses among several X509-SVIDs. Zero: the first.
	ID spiffeid.ID
	// Now tells the time. Nil means time.Now.
	Now func() time.Time
	Log *slog.Logger
}

// A SPIRE is a SPIRE or signet server above this CA.
type SPIRE struct {
	c SPIREConfig

	mu     sync.Mutex // held while the source or the connection is made
	source *workloadapi.X509Source
	conn   *grpc.ClientConn
	closed bool

	tainted atomic.Pointer[[]*x509.Certificate] // by the last answer
}

// NewSPIRE returns a SPIRE. It connects when it is first asked.
func NewSPIRE(c SPIREConfig) *SPIRE {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return &SPIRE{c: c}
}

// Name implements authority.Upstream.
func (s *SPIRE) Name() string { return "SPIFFE server " + s.c.ServerAddress }

// Close lets go of the connections.
func (s *SPIRE) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	var errs []error
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
	}
	if s.source != nil {
		errs = append(errs, s.source.Close())
	}
	return errors.Join(errs...)
}

// connect returns the connection to the server, with this CA's X509-SVID as it is at each handshake.
func (s *SPIRE) connect(ctx context.Context) (*grpc.ClientConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the CA is shutting down")
	}
	if s.conn != nil {
		return s.conn, nil
	}
	if s.source == nil {
		wait, cancel := context.WithTimeout(ctx, sourceWait)
		defer cancel()
		options := []workloadapi.X509SourceOption{workloadapi.WithClientOptions(workloadapi.WithAddr(s.c.AgentSocket))}
		if !s.c.ID.IsZero() {
			options = append(options, workloadapi.WithDefaultX509SVIDPicker(s.pick))
		}
		source, err := workloadapi.NewX509Source(wait, options...)
		if err != nil {
			return nil, fmt.Errorf("the agent at %s gave no X509-SVID: %w (is the agent up, and is there an entry with downstream: true for this process?)", s.c.AgentSocket, err)
		}
		s.source = source
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true, Time: s.c.Now,
		InsecureSkipVerify: true, // VerifyConnection verifies, by SPIFFE's rules
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			svid, err := s.svid()
			if err != nil {
				return nil, err
			}
			cert := &tls.Certificate{PrivateKey: svid.PrivateKey}
			for _, c := range svid.Certificates {
				cert.Certificate = append(cert.Certificate, c.Raw)
			}
			return cert, nil
		},
		VerifyConnection: spiffe.VerifyConnection(s.source, s.c.Now, func(id spiffeid.ID, _ [][]*x509.Certificate) error {
			if want := s.c.TrustDomain.IDString() + "/spire/server"; id.String() != want {
				return fmt.Errorf("it is %s, not %s", id, want)
			}
			return nil
		}),
	}
	conn, err := grpc.NewClient("passthrough:///"+s.c.ServerAddress, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxSPIREAnswerBytes)), grpc.WithDisableServiceConfig())
	if err != nil {
		return nil, err
	}
	s.conn = conn
	return conn, nil
}

// pick chooses the configured X509-SVID.
func (s *SPIRE) pick(svids []*x509svid.SVID) *x509svid.SVID {
	for _, svid := range svids {
		if svid.ID == s.c.ID {
			return svid
		}
	}
	return nil
}

func (s *SPIRE) svid() (*x509svid.SVID, error) {
	svid, err := s.source.GetX509SVID()
	switch {
	case err != nil:
		return nil, fmt.Errorf("this CA's X509-SVID: %w", err)
	case svid == nil:
		return nil, fmt.Errorf("the agent at %s has no X509-SVID of %s for this process", s.c.AgentSocket, s.c.ID)
	case svid.ID.TrustDomain() != s.c.TrustDomain:
		return nil, fmt.Errorf("the agent's X509-SVID is %s, but both CAs must be of trust domain %s", svid.ID, s.c.TrustDomain.Name())
	}
	return svid, nil
}

// call makes one RPC, and says what is wrong in a way that can be acted on.
func call[T any](ctx context.Context, s *SPIRE, what string, f func(*grpc.ClientConn) (T, error)) (T, error) {
	var none T
	conn, err := s.connect(ctx)
	if err != nil {
		return none, err
	}
	if _, err := s.svid(); err != nil {
		return none, err
	}
	v, err := f(conn)
	if err != nil {
		return none, fmt.Errorf("%s at %s: %s: %.300q", what, s.c.ServerAddress, status.Code(err), status.Convert(err).Message())
	}
	return v, nil
}

// Mint asks for a downstream CA certificate.
func (s *SPIRE) Mint(ctx context.Context, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error) {
	seconds := int32(min(ttl/time.Second, math.MaxInt32))
	r, err := call(ctx, s, "NewDownstreamX509CA", func(conn *grpc.ClientConn) (*svidv1.NewDownstreamX509CAResponse, error) {
		return svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: seconds})
	})
	if err != nil {
		return nil, nil, err
	}
	if chain, err = parseDER(r.GetCaCertChain(), "ca_cert_chain"); err != nil {
		return nil, nil, err
	}
	roots, err = parseDER(r.GetX509Authorities(), "x509_authorities")
	return chain, roots, err
}

// Follow returns what the server publishes now.
func (s *SPIRE) Follow(ctx context.Context) ([]*x509.Certificate, []JWTKey, error) {
	b, err := call(ctx, s, "GetBundle", func(conn *grpc.ClientConn) (*types.Bundle, error) {
		return bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	})
	if err != nil {
		return nil, nil, err
	}
	if got := b.GetTrustDomain(); got != s.c.TrustDomain.Name() {
		return nil, nil, fmt.Errorf("its bundle is of trust domain %.100q, not %q", got, s.c.TrustDomain.Name())
	}
	var ders, bad [][]byte
	for _, a := range b.GetX509Authorities() {
		if a.GetTainted() { // as good as gone: what is below it is to be signed anew
			bad = append(bad, a.GetAsn1())
		} else {
			ders = append(ders, a.GetAsn1())
		}
	}
	roots, err := parseDER(ders, "the bundle")
	if err != nil {
		return nil, nil, err
	}
	tainted, err := parseDER(bad, "the bundle")
	if err != nil {
		return nil, nil, err
	}
	s.tainted.Store(&tainted)
	keys, err := jwtKeys(b.GetJwtAuthorities())
	return roots, keys, err
}

// Tainted returns the roots that the server had tainted when Follow last answered.
func (s *SPIRE) Tainted() []*x509.Certificate {
	if t := s.tainted.Load(); t != nil {
		return *t
	}
	return nil
}

// PublishJWTKey has the server publish a JWT key of this CA, or of one below it, to the whole trust domain.
func (s *SPIRE) PublishJWTKey(ctx context.Context, key JWTKey) error {
	_, err := call(ctx, s, "PublishJWTAuthority", func(conn *grpc.ClientConn) (*bundlev1.PublishJWTAuthorityResponse, error) {
		return bundlev1.NewBundleClient(conn).PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{
			JwtAuthority: &types.JWTKey{KeyId: key.KeyID, PublicKey: key.PublicKey, ExpiresAt: key.ExpiresAt.Unix()}})
	})
	return err
}

// jwtKeys converts the JWT keys of a bundle.
func jwtKeys(in []*types.JWTKey) ([]JWTKey, error) {
	if len(in) > maxJWTKeys {
		return nil, fmt.Errorf("the bundle has %d jwt keys, more than %d", len(in), maxJWTKeys)
	}
	var out []JWTKey
	for _, k := range in {
		const end = 7_258_118_399 // of the year 2199
		if k.GetExpiresAt() <= 0 || k.GetExpiresAt() > end {
			return nil, fmt.Errorf("the bundle's jwt key %.64q expires at %d, which is no time in this century", k.GetKeyId(), k.GetExpiresAt())
		}
		out = append(out, JWTKey{KeyID: k.GetKeyId(), PublicKey: k.GetPublicKey(), ExpiresAt: time.Unix(k.GetExpiresAt(), 0), Tainted: k.GetTainted()})
	}
	return out, nil
}
