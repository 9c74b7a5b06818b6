package caclient

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

const (
	// maxAuthorities bounds the authorities of one bundle that the agent takes over at its attestation.
	maxAuthorities = 1000
	// maxChallenges bounds the questions that the CA may ask in one attestation.
	maxChallenges = 16
)

// Evidence proves what this node is. The join token of package nodeattest is one.
type Evidence interface {
	// Type is the node attestor's name.
	Type() string
	// Payload is what the agent sends first.
	Payload(context.Context) ([]byte, error)
	// Respond answers a challenge of the CA.
	Respond(ctx context.Context, challenge []byte) ([]byte, error)
}

// An Attestation asks the CA for the agent's X509-SVID, on a connection of its own that needs none.
type Attestation struct {
	// Address is the CA's host:port; TrustDomain is the agent's.
	Address     string
	TrustDomain spiffeid.TrustDomain

	Evidence Evidence
	// CSR carries the agent's public key, PKCS#10 DER.
	CSR []byte

	// Bundle verifies the CA. If it is nil, Pin does.
	Bundle *x509bundle.Bundle
	// Pin says whether a certificate is the authority that the operator has named. The CA's chain must end in it, and
	// the bundle that the CA hands out must contain it.
	Pin func(*x509.Certificate) bool

	// Now is the wall clock. Nil means time.Now.
	Now func() time.Time
}

// Attested is what an attestation brought.
type Attested struct {
	// Chain is the agent's X509-SVID, leaf first, each DER.
	Chain [][]byte
	// Reattestable says that the agent renews its SVID by attesting again.
	Reattestable bool
	// Authorities are the trust domain's X.509 authorities that are not tainted.
	Authorities []*x509.Certificate
}

// Attest attests this node. The SVID and the bundle come over the same connection, so that a bundle never comes from
// somebody who was not verified. A *DeniedError says that the CA refuses this agent for good.
func Attest(ctx context.Context, a Attestation) (*Attested, error) {
	if a.Now == nil {
		a.Now = time.Now
	}
	var pinned atomic.Pointer[x509.Certificate]
	creds := clientTLS(a.TrustDomain, nil, a.Bundle, a.Now, nil)
	if a.Bundle == nil {
		if a.Pin == nil {
			return nil, errors.New("nothing verifies the CA: set trust_bundle_path, or use a join token with an authority pin")
		}
		creds = pinnedTLS(a.TrustDomain, a.Pin, a.Now, func(c *x509.Certificate) { pinned.Store(c) })
	}
	conn, err := dial(a.Address, creds)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }() // nothing is lost with it
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()

	result, err := attest(ctx, agentv1.NewAgentClient(conn), a)
	if err != nil {
		return nil, fmt.Errorf("attesting this node at %s: %w", a.Address, fromStatus(err))
	}
	bundle, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, fmt.Errorf("fetching the bundle from %s: %w", a.Address, fromStatus(err))
	}
	authorities, err := readAuthorities(a.TrustDomain, bundle)
	if err != nil {
		return nil, fmt.Errorf("the bundle from %s: %w", a.Address, err)
	}
	if p := pinned.Load(); a.Bundle == nil && !contains(authorities, p) {
		return nil, fmt.Errorf("the bundle from %s does not contain the authority that the join token pins; make a new token", a.Address)
	}
	return &Attested{
		Chain:        result.GetSvid().GetCertChain(),
		Reattestable: result.GetReattestable(),
		Authorities:  authorities,
	}, nil
}

func attest(ctx context.Context, client agentv1.AgentClient, a Attestation) (*agentv1.AttestAgentResponse_Result, error) {
	payload, err := a.Evidence.Payload(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	next := &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: a.Evidence.Type(), Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: a.CSR},
	}}}
	for range maxChallenges {
		if err := stream.Send(next); err != nil && !errors.Is(err, io.EOF) { // EOF: Recv knows the reason
			return nil, err
		}
		m, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if r := m.GetResult(); r != nil {
			if len(r.GetSvid().GetCertChain()) == 0 {
				return nil, errors.New("the CA answered without an SVID")
			}
			return r, nil
		}
		response, err := a.Evidence.Respond(ctx, m.GetChallenge())
		if err != nil {
			return nil, err
		}
		next = &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: response}}
	}
	return nil, fmt.Errorf("the CA asked more than %d challenges", maxChallenges)
}

// readAuthorities returns the authorities of b that may be trusted. A broken one is left out (DEC-08); none at all is an
// error.
func readAuthorities(td spiffeid.TrustDomain, b *types.Bundle) ([]*x509.Certificate, error) {
	if got := b.GetTrustDomain(); got != td.Name() {
		return nil, fmt.Errorf("it is of trust domain %q, not %q; see trust_domain in the configuration", got, td.Name())
	}
	if n := len(b.GetX509Authorities()); n > maxAuthorities {
		return nil, fmt.Errorf("it has %d X.509 authorities, more than the %d allowed", n, maxAuthorities)
	}
	var authorities []*x509.Certificate
	for _, a := range b.GetX509Authorities() {
		c, err := x509.ParseCertificate(a.GetAsn1())
		if err == nil && c.IsCA && !a.GetTainted() {
			authorities = append(authorities, c)
		}
	}
	if len(authorities) == 0 {
		return nil, errors.New("it has no usable X.509 authority")
	}
	return authorities, nil
}

func contains(certs []*x509.Certificate, c *x509.Certificate) bool {
	if c == nil {
		return false
	}
	for _, have := range certs {
		if have.Equal(c) {
			return true
		}
	}
	return false
}
