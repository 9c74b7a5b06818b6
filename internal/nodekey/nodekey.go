// Package nodekey defines the proof by which an attested node wins back a lost or expired SVID with the key that the
// CA last bound to it. Agent and CA both need it; it knows neither.
package nodekey

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Attestor is the name of this way to attest. The payload is the agent's SPIFFE ID; the CA sends one challenge of
// NonceBytes random bytes and expects the signature.
const Attestor = "signet_node_key"

// NonceBytes is the length of the challenge.
const NonceBytes = 32

// MaxSignatureBytes bounds what a CA reads: RSA 8192 has the longest.
const MaxSignatureBytes = 1024

// message binds the proof to its purpose, the node, the challenge, and the new key that the SVID shall be for: a
// signature for one cannot be used for another.
func message(id spiffeid.ID, nonce, csr []byte) []byte {
	h := sha256.New()
	h.Write([]byte("signet node key v1\x00"))
	h.Write([]byte(id.String()))
	h.Write([]byte{0})
	n := sha256.Sum256(nonce)
	h.Write(n[:])
	c := sha256.Sum256(csr)
	h.Write(c[:])
	return h.Sum(nil)
}

// Sign answers a challenge with the node's present key.
func Sign(key crypto.Signer, id spiffeid.ID, nonce, csr []byte) ([]byte, error) {
	if len(nonce) != NonceBytes {
		return nil, errors.New("the challenge does not have 32 bytes")
	}
	m := message(id, nonce, csr)
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		return key.Sign(rand.Reader, m, crypto.Hash(0))
	}
	return key.Sign(rand.Reader, m, crypto.SHA256)
}

// Verify tells whether signature proves possession of the private key of public.
func Verify(public crypto.PublicKey, id spiffeid.ID, nonce, csr, signature []byte) bool {
	if len(nonce) != NonceBytes || len(signature) > MaxSignatureBytes {
		return false
	}
	m := message(id, nonce, csr)
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, m, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, m, signature) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(k, m, signature)
	}
	return false
}
