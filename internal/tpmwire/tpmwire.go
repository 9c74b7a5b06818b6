// Package tpmwire defines the messages of the node attestor tpm, by which a node proves that it holds a TPM: those of the
// plugin of that name that SPIRE's users know, so that nodes which attest with it can move. Agent and CA both need it; it
// knows neither, and no TPM.
package tpmwire

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
)

// Attestor is the name of this way to attest.
const Attestor = "tpm"

const (
	// maxEKBytes bounds the endorsement key with its certificate, in PEM; maxPartBytes each structure of a TPM.
	maxEKBytes   = 32 << 10
	maxPartBytes = 8 << 10
)

// A Payload is what the agent sends first.
type Payload struct {
	// EK is the endorsement key in PEM: its certificate if the TPM has one, and the public key.
	EK []byte
	// AK is an attestation key that the TPM has made.
	AK *AK
}

// An AK describes an attestation key by structures of its TPM, which are binary.
type AK struct {
	Public            []byte // TPMT_PUBLIC
	CreateData        []byte // TPMS_CREATION_DATA
	CreateAttestation []byte // TPMS_ATTEST
	CreateSignature   []byte // TPMT_SIGNATURE
}

// A Challenge is a secret that only the TPM with the EK opens, and only for the AK.
type Challenge struct {
	EC *Credential
}

// A Credential is made by TPM2_MakeCredential or its equal in software.
type Credential struct {
	Credential []byte // TPM2B_ID_OBJECT
	Secret     []byte // TPM2B_ENCRYPTED_SECRET
}

// A Response holds the secret.
type Response struct {
	Secret []byte
}

// ParsePayload reads a payload within its bounds.
func ParsePayload(data []byte) (*Payload, error) {
	var p Payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("the payload is not tpm's JSON: %w", err)
	}
	if len(p.EK) == 0 || p.AK == nil {
		return nil, errors.New("the payload has no EK or no AK")
	}
	if len(p.EK) > maxEKBytes {
		return nil, fmt.Errorf("the EK has %d bytes, at most %d are allowed", len(p.EK), maxEKBytes)
	}
	for _, part := range [][]byte{p.AK.Public, p.AK.CreateData, p.AK.CreateAttestation, p.AK.CreateSignature} {
		if len(part) == 0 || len(part) > maxPartBytes {
			return nil, fmt.Errorf("a structure of the AK has %d bytes, 1 to %d are allowed", len(part), maxPartBytes)
		}
	}
	return &p, nil
}

// ParseChallenge reads a challenge within its bounds.
func ParseChallenge(data []byte) (*Credential, error) {
	var c Challenge
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("the challenge is not tpm's JSON: %w", err)
	}
	if c.EC == nil || len(c.EC.Credential) == 0 || len(c.EC.Secret) == 0 || len(c.EC.Credential) > maxPartBytes || len(c.EC.Secret) > maxPartBytes {
		return nil, errors.New("the challenge has no credential, or one that no TPM would take")
	}
	return c.EC, nil
}

// ParseResponse reads the answer to a challenge.
func ParseResponse(data []byte) ([]byte, error) {
	var r Response
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("the answer is not tpm's JSON: %w", err)
	}
	return r.Secret, nil
}

// EncodeEK writes an endorsement key as a Payload carries it. The certificate may be nil.
func EncodeEK(public crypto.PublicKey, certificate *x509.Certificate) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if certificate != nil {
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw}); err != nil {
			return nil, err
		}
	}
	err = pem.Encode(&out, &pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return out.Bytes(), err
}

// ParseEK reads what EncodeEK writes. If there is a certificate and a key, the certificate is for that key: otherwise the
// certificate of somebody else's TPM would vouch for it.
func ParseEK(data []byte) (public crypto.PublicKey, certificate *x509.Certificate, err error) {
	var spki []byte
	for range 2 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		switch {
		case block.Type == "CERTIFICATE" && certificate == nil:
			if certificate, err = x509.ParseCertificate(block.Bytes); err != nil {
				return nil, nil, fmt.Errorf("the EK's certificate: %w", err)
			}
		case block.Type == "PUBLIC KEY" && public == nil:
			if public, err = x509.ParsePKIXPublicKey(block.Bytes); err != nil {
				return nil, nil, fmt.Errorf("the EK: %w", err)
			}
			spki = block.Bytes
		default:
			return nil, nil, fmt.Errorf("the EK has an unexpected PEM block of type %.40q", block.Type)
		}
	}
	if certificate == nil && public == nil {
		return nil, nil, errors.New("the EK has neither a certificate nor a public key in PEM")
	}
	if certificate == nil {
		return public, nil, nil
	}
	if certificate.PublicKey == nil {
		return nil, nil, errors.New("the EK's certificate has a key of an unknown kind")
	}
	if public != nil {
		canonical, err := x509.MarshalPKIXPublicKey(certificate.PublicKey)
		if err != nil {
			return nil, nil, fmt.Errorf("the EK's certificate: %w", err)
		}
		if !bytes.Equal(canonical, spki) {
			return nil, nil, errors.New("the EK's certificate is for another key")
		}
	}
	return certificate.PublicKey, certificate, nil
}

// PubHash names a TPM: the SHA-256 of its EK as PKIX DER, in lower-case hex.
func PubHash(ek crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(ek)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
