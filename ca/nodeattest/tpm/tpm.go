// Package tpm judges nodes by their TPM: the endorsement key (EK), which never leaves it, is one that the operator knows or
// that a manufacturer has certified, and the TPM shows that it holds that EK by opening a credential. No TPM is needed here.
package tpm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/google/go-tpm/legacy/tpm2/credactivation"

	"github.com/signet-id/signet/ca/nodeattest"
	wire "github.com/signet-id/signet/internal/tpmwire"
)

const (
	// secretBytes is the length of the secret of one attestation.
	secretBytes = 32
	// aesBytes is the symmetric key of the EK templates of the TCG: AES-128.
	aesBytes   = 16
	minRSABits = 2048
	maxRSABits = 4096
)

// Config says which TPMs are good. One of Known and Roots is needed.
type Config struct {
	// Known says whether the operator knows the TPM whose EK has that hash, in lower-case hex. It is asked for each attestation.
	Known func(pubHash string) bool
	// Roots returns the CAs of manufacturers, with their intermediates. It is asked for each attestation.
	Roots func() (*x509.CertPool, error)
	Now   func() time.Time
}

// An Attestor judges the evidence.
type Attestor struct{ c Config }

// New returns the attestor.
func New(c Config) (*Attestor, error) {
	if c.Known == nil && c.Roots == nil {
		return nil, errors.New("tpm needs known EKs or roots")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Attestor{c}, nil
}

// Type is the attestor's name.
func (*Attestor) Type() string { return wire.Attestor }

// Attest finds out which TPM it is, then has it prove that it is that one.
func (a *Attestor) Attest(_ context.Context, attempt nodeattest.Attempt) (*nodeattest.Evidence, error) {
	p, err := wire.ParsePayload(attempt.Payload)
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "%v", err)
	}
	ek, certificate, err := wire.ParseEK(p.EK)
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "%v", err)
	}
	if err := checkEK(ek); err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "%v", err)
	}
	hash, err := wire.PubHash(ek)
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "the EK: %v", err)
	}
	by, err := a.trust(hash, certificate)
	if err != nil {
		return nil, err
	}
	name, err := checkAK(p.AK)
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Denied, "the AK is not one that a TPM keeps for attestation: %v", err)
	}
	secret := make([]byte, secretBytes)
	rand.Read(secret) // never fails since Go 1.24
	credential, encrypted, err := credactivation.Generate(name, ek, aesBytes, secret)
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "the EK cannot be used for a challenge").Because(err)
	}
	question, err := json.Marshal(wire.Challenge{EC: &wire.Credential{Credential: credential, Secret: encrypted}})
	if err != nil {
		return nil, err
	}
	answer, err := attempt.Challenge(question)
	if err != nil {
		return nil, err
	}
	opened, err := wire.ParseResponse(answer)
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "the answer to the challenge is not tpm's JSON").Because(err)
	}
	if subtle.ConstantTimeCompare(secret, opened) != 1 {
		return nil, nodeattest.Refuse(nodeattest.Denied, "the node does not prove that its TPM holds the EK and the AK")
	}
	return &nodeattest.Evidence{Path: []string{wire.Attestor, hash}, Selectors: []string{"pub_hash:" + hash}, CanReattest: true,
		Facts: map[string]any{"ek": hash, "ek_trusted_by": by}}, nil
}

func checkEK(ek crypto.PublicKey) error {
	switch k := ek.(type) {
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return errors.New("the EK is RSA and has fewer than 2048 or more than 4096 bits")
		}
		return nil
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
	}
	return errors.New("the EK is neither RSA nor EC P-256 or P-384")
}

// trust says why the TPM with that EK is good: by "hash" or by "certificate".
func (a *Attestor) trust(hash string, certificate *x509.Certificate) (string, error) {
	if a.c.Known != nil && a.c.Known(hash) {
		return "hash", nil
	}
	unknown := nodeattest.Refuse(nodeattest.Denied, "the TPM with the EK %s is not known", hash)
	if a.c.Roots == nil {
		return "", unknown
	}
	if certificate == nil {
		return "", nodeattest.Refuse(nodeattest.Denied, "the TPM with the EK %s is not known, and shows no certificate of its manufacturer", hash)
	}
	roots, err := a.c.Roots()
	if err != nil {
		return "", nodeattest.Refuse(nodeattest.Internal, "the CA cannot read its own roots for tpm").Because(err)
	}
	if err := a.verifyEK(certificate, roots); err != nil {
		return "", nodeattest.Refuse(nodeattest.Denied, "the TPM with the EK %s is not known, and its certificate does not verify", hash).Because(err)
	}
	return "certificate", nil
}

var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	// oidEKCertificate is tcg-kp-EKCertificate. [TCG EK Credential Profile §3]
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
)

// verifyEK verifies the certificate of an EK. A manufacturer certifies other keys, too: what says that it is for something
// else is no EK.
func (a *Attestor) verifyEK(certificate *x509.Certificate, roots *x509.CertPool) error {
	c := *certificate
	// The SAN holds a directory name, the TPM's model; crypto/x509 does not read those and calls the critical extension
	// unhandled. It takes no part in the decision.
	c.UnhandledCriticalExtensions = slices.DeleteFunc(slices.Clone(c.UnhandledCriticalExtensions), oidSubjectAltName.Equal)
	if c.IsCA {
		return errors.New("it is a CA's")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 && !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) &&
		!slices.ContainsFunc(c.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return errors.New("its extended key usage is not that of an EK")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("its key usage is that of a CA")
	}
	_, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: a.c.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}
