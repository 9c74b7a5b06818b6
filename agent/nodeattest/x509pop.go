package nodeattest

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/internal/x509pop"
)

// maxPEMBytes bounds the files of X509POP.
const maxPEMBytes = 256 << 10

// An X509POP proves that this node holds the private key of a certificate that the organisation gave it. The CA has an
// attestor of that name that says which certificates are good.
type X509POP struct {
	// CertificatePath is a PEM file: the node's certificate first, then intermediates. PrivateKeyPath is its key in PEM, which
	// only the agent's user may read. IntermediatesPath holds further intermediates; it may be empty.
	CertificatePath, PrivateKeyPath, IntermediatesPath string
	// EndpointSocket is the address of a Workload API whose X509-SVID is shown instead of files.
	EndpointSocket string
}

// Type is SPIRE's name of this node attestor.
func (X509POP) Type() string { return x509pop.Attestor }

// Begin reads the certificate and the key.
func (x X509POP) Begin(ctx context.Context) (Evidence, error) {
	e := &x509popEvidence{}
	if x.EndpointSocket != "" {
		svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(x.EndpointSocket))
		if err != nil {
			return nil, fmt.Errorf("x509pop.spiffe_endpoint_socket: %w", err)
		}
		e.key = svid.PrivateKey
		for _, c := range svid.Certificates {
			e.chain = append(e.chain, c.Raw)
		}
		return e, nil
	}
	certificates, err := durable.ReadFile(x.CertificatePath, maxPEMBytes)
	if err != nil {
		return nil, fmt.Errorf("x509pop.certificate_path: %w", err)
	}
	key, err := durable.ReadSecret(x.PrivateKeyPath, maxPEMBytes)
	if errors.Is(err, durable.ErrExposed) {
		return nil, fmt.Errorf("x509pop.private_key_path: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("x509pop.private_key_path: %w", err)
	}
	if e.chain, e.key, err = parsePair(certificates, key); err != nil {
		return nil, fmt.Errorf("x509pop.certificate_path %s and private_key_path %s: %w", x.CertificatePath, x.PrivateKeyPath, err)
	}
	if x.IntermediatesPath != "" {
		data, err := durable.ReadFile(x.IntermediatesPath, maxPEMBytes)
		if err != nil {
			return nil, fmt.Errorf("x509pop.intermediates_path: %w", err)
		}
		more, err := parseCertificates(data)
		if err != nil {
			return nil, fmt.Errorf("x509pop.intermediates_path %s: %w", x.IntermediatesPath, err)
		}
		e.chain = append(e.chain, more...)
	}
	return e, nil
}

// parsePair reads a chain and the key of its leaf. The error never repeats the key.
func parsePair(certificates, key []byte) ([][]byte, crypto.Signer, error) {
	pair, err := tls.X509KeyPair(certificates, key)
	if err != nil {
		return nil, nil, err
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil, errors.New("the key cannot sign")
	}
	return pair.Certificate, signer, nil
}

// parseCertificates returns the certificates of a PEM file as DER.
func parseCertificates(data []byte) ([][]byte, error) {
	var out [][]byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %d is of type %q, not CERTIFICATE", len(out), block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out), err)
		}
		out = append(out, block.Bytes)
	}
	if len(out) == 0 {
		return nil, errors.New("it has no PEM certificate")
	}
	return out, nil
}

type x509popEvidence struct {
	chain [][]byte
	key   crypto.Signer
}

func (*x509popEvidence) Type() string { return x509pop.Attestor }

func (e *x509popEvidence) Payload(context.Context) ([]byte, error) {
	return json.Marshal(x509pop.Payload{Certificates: e.chain})
}

func (e *x509popEvidence) Respond(_ context.Context, challenge []byte) ([]byte, error) {
	if len(challenge) > MaxChallengeBytes {
		return nil, fmt.Errorf("the challenge has %d bytes, more than the %d allowed", len(challenge), MaxChallengeBytes)
	}
	c, err := x509pop.ParseChallenge(challenge)
	if err != nil {
		return nil, err
	}
	r, err := x509pop.Respond(e.key, c)
	if err != nil {
		return nil, err
	}
	return json.Marshal(r)
}
