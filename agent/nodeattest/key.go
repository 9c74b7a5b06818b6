package nodeattest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
)

// MaxKeyBytes bounds the PEM text that ParseKey reads.
const MaxKeyBytes = 4096

// NewKey makes a key for the agent: EC P-256.
func NewKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// CSR returns the PKCS#10 request that carries key's public part to the CA, in DER. SPIRE asks for no URI SAN here: the
// CA decides on the agent's ID.
func CSR(key *ecdsa.PrivateKey) ([]byte, error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		Subject:            pkix.Name{Organization: []string{"signet"}},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("making the agent's certificate request: %w", err)
	}
	return csr, nil
}

// MarshalKey returns key as PKCS#8 in PEM, for a file that only the agent may read.
func MarshalKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the agent's key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParseKey reads what MarshalKey wrote. The error never repeats the text.
func ParseKey(text []byte) (*ecdsa.PrivateKey, error) {
	if len(text) > MaxKeyBytes {
		return nil, fmt.Errorf("the agent's key has %d bytes of PEM, more than the %d allowed", len(text), MaxKeyBytes)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("the agent's key is not a PEM block of type PRIVATE KEY")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("the agent's key is not PKCS#8")
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("the agent's key is not an EC P-256 key")
	}
	return key, nil
}
