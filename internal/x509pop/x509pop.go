// Package x509pop defines how a node proves that it holds the private key of a certificate that it was given outside of
// signet: the messages of the node attestor x509pop, as SPIRE's agents and servers speak them, and the signature in them.
// Agent and CA both need it; it knows neither. [SPIRE-PROTOCOL §3.2]
package x509pop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
)

// Attestor is the name of this way to attest.
const Attestor = "x509pop"

const (
	// NonceBytes is the length of both nonces.
	NonceBytes = 32
	// maxSignatureBytes bounds signatures and their halves: RSA with 16384 bits has the longest.
	maxSignatureBytes = 2048
)

// A Payload is what the agent sends first.
type Payload struct {
	// Certificates are DER, the leaf first, without the root.
	Certificates [][]byte `json:"certificates"`
}

// A Challenge is what the CA asks. Exactly one member is set, by the kind of the leaf's key.
type Challenge struct {
	RSA   *Nonce `json:"rsa_signature"`
	ECDSA *Nonce `json:"ecdsa_signature"`
}

// A Nonce is what the CA has drawn for one attestation.
type Nonce struct {
	Nonce []byte `json:"nonce"`
}

// A Response is the agent's answer.
type Response struct {
	RSA   *RSAResponse   `json:"rsa_signature"`
	ECDSA *ECDSAResponse `json:"ecdsa_signature"`
}

// An RSAResponse holds the agent's nonce and a PSS signature over both.
type RSAResponse struct {
	Nonce     []byte `json:"nonce"`
	Signature []byte `json:"signature"`
}

// An ECDSAResponse holds the agent's nonce and the signature's two numbers, big-endian.
type ECDSAResponse struct {
	Nonce []byte `json:"nonce"`
	R     []byte `json:"r"`
	S     []byte `json:"s"`
}

// NewChallenge draws a challenge for the holder of the private key of public.
func NewChallenge(public crypto.PublicKey) (*Challenge, error) {
	nonce := make([]byte, NonceBytes)
	rand.Read(nonce) // never fails since Go 1.24
	switch public.(type) {
	case *rsa.PublicKey:
		return &Challenge{RSA: &Nonce{nonce}}, nil
	case *ecdsa.PublicKey:
		return &Challenge{ECDSA: &Nonce{nonce}}, nil
	}
	return nil, fmt.Errorf("x509pop works with RSA and EC keys, not with %T", public)
}

// ParseChallenge reads what a CA asks.
func ParseChallenge(data []byte) (*Challenge, error) {
	var c Challenge
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("the challenge is not x509pop's JSON: %w", err)
	}
	if (c.RSA == nil) == (c.ECDSA == nil) {
		return nil, errors.New("the challenge asks neither for an RSA nor for an ECDSA signature, or for both")
	}
	return &c, nil
}

// Respond answers a challenge with key.
func Respond(key crypto.Signer, c *Challenge) (*Response, error) {
	nonce := make([]byte, NonceBytes)
	rand.Read(nonce)
	switch key.Public().(type) {
	case *rsa.PublicKey:
		if c.RSA == nil {
			return nil, errors.New("the CA asks for an ECDSA signature, and the node's key is RSA")
		}
		d, err := digest(c.RSA.Nonce, nonce)
		if err != nil {
			return nil, err
		}
		sig, err := key.Sign(rand.Reader, d, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto, Hash: crypto.SHA256})
		if err != nil {
			return nil, fmt.Errorf("signing the challenge: %w", err)
		}
		return &Response{RSA: &RSAResponse{nonce, sig}}, nil
	case *ecdsa.PublicKey:
		if c.ECDSA == nil {
			return nil, errors.New("the CA asks for an RSA signature, and the node's key is EC")
		}
		d, err := digest(c.ECDSA.Nonce, nonce)
		if err != nil {
			return nil, err
		}
		der, err := key.Sign(rand.Reader, d, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("signing the challenge: %w", err)
		}
		var sig struct{ R, S *big.Int }
		if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) != 0 {
			return nil, errors.New("signing the challenge: the key's signature is not DER")
		}
		return &Response{ECDSA: &ECDSAResponse{nonce, sig.R.Bytes(), sig.S.Bytes()}}, nil
	}
	return nil, fmt.Errorf("x509pop works with RSA and EC keys, not with %T", key.Public())
}

// ParseResponse reads what an agent answers.
func ParseResponse(data []byte) (*Response, error) {
	var r Response
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("the answer is not x509pop's JSON: %w", err)
	}
	return &r, nil
}

// Verify says whether the response proves possession of the private key of public, for this challenge.
func Verify(public crypto.PublicKey, c *Challenge, r *Response) error {
	switch k := public.(type) {
	case *rsa.PublicKey:
		if c.RSA == nil || r.RSA == nil {
			return errors.New("there is no RSA signature")
		}
		if len(r.RSA.Signature) > maxSignatureBytes {
			return errors.New("the signature is too long")
		}
		d, err := digest(c.RSA.Nonce, r.RSA.Nonce)
		if err != nil {
			return err
		}
		if rsa.VerifyPSS(k, crypto.SHA256, d, r.RSA.Signature, nil) != nil {
			return errors.New("the RSA signature is not that of the certificate's key over the nonces")
		}
		return nil
	case *ecdsa.PublicKey:
		if c.ECDSA == nil || r.ECDSA == nil {
			return errors.New("there is no ECDSA signature")
		}
		if len(r.ECDSA.R) > maxSignatureBytes || len(r.ECDSA.S) > maxSignatureBytes {
			return errors.New("the signature is too long")
		}
		d, err := digest(c.ECDSA.Nonce, r.ECDSA.Nonce)
		if err != nil {
			return err
		}
		if !ecdsa.Verify(k, d, new(big.Int).SetBytes(r.ECDSA.R), new(big.Int).SetBytes(r.ECDSA.S)) {
			return errors.New("the ECDSA signature is not that of the certificate's key over the nonces")
		}
		return nil
	}
	return fmt.Errorf("x509pop works with RSA and EC keys, not with %T", public)
}

// digest is what is signed. The lengths are fixed, so that no two pairs of nonces give the same bytes.
func digest(challenge, response []byte) ([]byte, error) {
	if len(challenge) != NonceBytes || len(response) != NonceBytes {
		return nil, fmt.Errorf("the nonces have %d and %d bytes, not %d", len(challenge), len(response), NonceBytes)
	}
	h := sha256.New()
	h.Write(challenge)
	h.Write(response)
	return h.Sum(nil), nil
}
