// Package spireclient calls a CA as SPIRE's agents do: the same calls in the same order, over its real port with the
// SDK's clients, and with their way of taking the answers. Tests use it that are written from SPIRE's protocol and not
// from our code; it imports nothing of the CA.
package spireclient

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-id/signet/spiffe"
)

// A Server says where the CA is and what its callers know of it.
type Server struct {
	// Addr is its port, host:port.
	Addr        string
	TrustDomain spiffeid.TrustDomain
	// Bundle is what its certificate must chain to. Nil is SPIRE's insecure_bootstrap: only the ID is compared, until the
	// bundle has been fetched.
	Bundle *x509bundle.Bundle
	// Source is the local IP address to call from, such as 127.0.0.7; empty: any.
	Source string
	// Now tells the time by which certificates are judged. Nil: time.Now.
	Now func() time.Time
}

// Dial connects with a client certificate, or without if chain is nil. The server must be the trust domain's CA.
func (s Server) Dial(chain [][]byte, key crypto.PrivateKey, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	now := s.Now
	if now == nil {
		now = time.Now
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}, InsecureSkipVerify: true, Time: now,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error { return s.verify(raw, now) }}
	if chain != nil {
		c.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
	}
	dialer := &net.Dialer{}
	if s.Source != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(s.Source)}
	}
	options = append([]grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(c)), grpc.WithDisableServiceConfig(),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) })}, options...)
	return grpc.NewClient("passthrough:///"+s.Addr, options...)
}

func (s Server) verify(raw [][]byte, now func() time.Time) error {
	want := "spiffe://" + s.TrustDomain.Name() + "/spire/server"
	if s.Bundle == nil {
		leaf, err := x509.ParseCertificate(raw[0])
		if err != nil {
			return err
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
			return fmt.Errorf("the server is %v, not %s", leaf.URIs, want)
		}
		return nil
	}
	return spiffe.VerifyPeer(s.Bundle, now, func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		if id.String() != want {
			return fmt.Errorf("the server is %s, not %s", id, want)
		}
		return nil
	})(raw, nil)
}

// An Agent is an attested agent with its connection. Close it.
type Agent struct {
	Server Server
	ID     spiffeid.ID
	Key    *ecdsa.PrivateKey
	Chain  [][]byte
	// Expires is when its SVID ends, as the CA says.
	Expires      time.Time
	Reattestable bool
	// Bundle is the trust domain's as of the last time it was fetched.
	Bundle *types.Bundle
	// Entries are what it may serve as of the last Sync, by entry ID.
	Entries map[string]*types.Entry
	// Conn is the connection with its SVID.
	Conn *grpc.ClientConn
}

// NewKey makes an EC P-256 key, the kind that SPIRE's agents make.
func NewKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// CSR makes a certificate request as SPIRE's agents do: for themselves without an ID, for a workload with its own.
func CSR(key crypto.Signer, id string) ([]byte, error) {
	template := &x509.CertificateRequest{Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			return nil, err
		}
		template.URIs = []*url.URL{u}
	}
	return x509.CreateCertificateRequest(rand.Reader, template, key)
}

// Evidence is what a node shows of itself.
type Evidence struct {
	Type    string
	Payload []byte
	// Answer answers the CA's challenges; nil if there are none.
	Answer func(challenge []byte) ([]byte, error)
}

// Attest calls AttestAgent on a connection without an SVID.
func Attest(ctx context.Context, conn *grpc.ClientConn, e Evidence, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	// A failed Send says only that the stream has ended; why, says Recv.
	_ = s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: e.Type, Payload: e.Payload}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}})
	for {
		r, err := s.Recv()
		if err != nil {
			return nil, err
		}
		// SPIRE's agents tell a challenge from a result by whether the bytes are nil.
		challenge := r.GetChallenge()
		if challenge == nil {
			if r.GetResult().GetSvid() == nil {
				return nil, errors.New("neither a challenge nor a result came")
			}
			return r.GetResult(), nil
		}
		if e.Answer == nil {
			return nil, errors.New("there was a challenge where none is expected")
		}
		answer, err := e.Answer(challenge)
		if err != nil {
			return nil, err
		}
		_ = s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}})
	}
}

// Join attests by a join token.
func (s Server) Join(ctx context.Context, token string) (*Agent, error) {
	return s.Bootstrap(ctx, Evidence{Type: "join_token", Payload: []byte(token)})
}

// Bootstrap does what a SPIRE agent does at its first start: it attests, fetches the bundle over the same connection,
// and connects with its SVID.
func (s Server) Bootstrap(ctx context.Context, e Evidence) (*Agent, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := CSR(key, "")
	if err != nil {
		return nil, err
	}
	conn, err := s.Dial(nil, nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r, err := Attest(ctx, conn, e, csr)
	if err != nil {
		return nil, err
	}
	id, err := spiffeid.FromPath(s.TrustDomain, r.Svid.GetId().GetPath())
	if err != nil {
		return nil, fmt.Errorf("the agent's ID: %w", err)
	}
	a := &Agent{Server: s, ID: id, Key: key, Chain: r.Svid.CertChain, Expires: time.Unix(r.Svid.ExpiresAt, 0), Reattestable: r.Reattestable, Entries: map[string]*types.Entry{}}
	if err := a.fetchBundle(ctx, conn); err != nil {
		return nil, fmt.Errorf("the bundle, over the connection that attested: %w", err)
	}
	a.Conn, err = a.Server.Dial(a.Chain, a.Key)
	return a, err
}

// Close closes the connection.
func (a *Agent) Close() error { return a.Conn.Close() }

// FetchBundle calls GetBundle with the SVID, and trusts what it brings from the next connection on.
func (a *Agent) FetchBundle(ctx context.Context) error { return a.fetchBundle(ctx, a.Conn) }

func (a *Agent) fetchBundle(ctx context.Context, conn *grpc.ClientConn) error {
	b, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return err
	}
	trusted := x509bundle.New(a.Server.TrustDomain)
	for i, x := range b.X509Authorities {
		cert, err := x509.ParseCertificate(x.Asn1)
		if err != nil {
			return fmt.Errorf("x509_authorities[%d]: %w", i, err)
		}
		if len(cert.SubjectKeyId) == 0 {
			return fmt.Errorf("x509_authorities[%d] has no subject key ID, by which agents know what chains to it", i)
		}
		trusted.AddX509Authority(cert)
	}
	for i, j := range b.JwtAuthorities {
		if j.KeyId == "" {
			return fmt.Errorf("jwt_authorities[%d] has no key ID: agents reject the whole bundle", i)
		}
		if _, err := x509.ParsePKIXPublicKey(j.PublicKey); err != nil {
			return fmt.Errorf("jwt_authorities[%d]: %w", i, err)
		}
	}
	a.Bundle, a.Server.Bundle = b, trusted
	return nil
}

// Renew calls RenewAgent, drops the connection and connects with the new SVID. The former agent, with the SVID that was
// good until now, is returned with a connection of its own, for tests of what it may still do; close it.
func (a *Agent) Renew(ctx context.Context) (former *Agent, err error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := CSR(key, "")
	if err != nil {
		return nil, err
	}
	r, err := agentv1.NewAgentClient(a.Conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	if err != nil {
		return nil, err
	}
	old := *a
	a.Key, a.Chain, a.Expires = key, r.GetSvid().GetCertChain(), time.Unix(r.GetSvid().GetExpiresAt(), 0)
	a.Conn, err = a.Server.Dial(a.Chain, a.Key)
	return &old, err
}

// X509SVIDs asks for an X509-SVID of each entry, by a key each, in one call, as its workloads' entries say.
func (a *Agent) X509SVIDs(ctx context.Context, entryIDs ...string) ([]*svidv1.BatchNewX509SVIDResponse_Result, error) {
	req := &svidv1.BatchNewX509SVIDRequest{}
	for _, id := range entryIDs {
		key, err := NewKey()
		if err != nil {
			return nil, err
		}
		want := ""
		if e := a.Entries[id]; e != nil {
			want = "spiffe://" + e.SpiffeId.TrustDomain + e.SpiffeId.Path
		}
		csr, err := CSR(key, want)
		if err != nil {
			return nil, err
		}
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
	}
	r, err := svidv1.NewSVIDClient(a.Conn).BatchNewX509SVID(ctx, req)
	if err != nil {
		return nil, err
	}
	if len(r.Results) != len(entryIDs) {
		return nil, fmt.Errorf("%d results for %d entries", len(r.Results), len(entryIDs))
	}
	for i, x := range r.Results {
		if x.Status == nil {
			return nil, fmt.Errorf("result %d has no status: that crashes SPIRE's agents", i)
		}
	}
	return r.Results, nil
}

// EntryAPI is the SDK's client on the connection with the SVID.
func (a *Agent) EntryAPI() entryv1.EntryClient { return entryv1.NewEntryClient(a.Conn) }

// SVIDAPI is the SDK's client on the connection with the SVID.
func (a *Agent) SVIDAPI() svidv1.SVIDClient { return svidv1.NewSVIDClient(a.Conn) }

// AgentAPI is the SDK's client on the connection with the SVID.
func (a *Agent) AgentAPI() agentv1.AgentClient { return agentv1.NewAgentClient(a.Conn) }
