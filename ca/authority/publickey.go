package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of what is read from others.
const (
	// MaxPublicKeyBytes bounds a public key. RSA 8192, the largest that is taken, has about 1,060 bytes.
	MaxPublicKeyBytes = 2 << 10

	// MaxCSRBytes bounds a CSR: room for an RSA 8192 key and signature, an ID of 2048 bytes and some names.
	MaxCSRBytes = 16 << 10

	minRSABits = 2048
	maxRSABits = 8192
)

// DER of everything before the key bytes of the usual public keys.
var (
	spkiP256    = []byte{0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00}
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}
	errSANShape = errors.New("the subject alternative name extension of the CSR is malformed")
)

// ParsePublicKey reads the public key of a workload or agent: a DER SubjectPublicKeyInfo with a key on P-256, P-384 or P-521,
// an RSA key of 2048 to 8192 bits, or an Ed25519 key. Anything else is refused, and so is an encoding other than the one
// canonical DER. Errors wrap ErrRefused. [X509-28]
func ParsePublicKey(der []byte) (crypto.PublicKey, error) {
	if len(der) > MaxPublicKeyBytes {
		return nil, fmt.Errorf("public key %w: it has %d bytes, more than %d", ErrRefused, len(der), MaxPublicKeyBytes)
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("public key %w: it is not a DER SubjectPublicKeyInfo of a known kind: %w", ErrRefused, err)
	}
	if err := checkKeyStrength(key); err != nil {
		return nil, err
	}
	canonical, err := x509.MarshalPKIXPublicKey(key)
	if err != nil || !bytes.Equal(canonical, der) {
		return nil, fmt.Errorf("public key %w: its encoding is not canonical DER", ErrRefused)
	}
	return key, nil
}

// CheckCSR verifies the signature of a DER certificate request and returns its public key, judged as by ParsePublicKey.
// A CSR is only the carrier of a key and the proof of its possession: whatever else it asks for is ignored. If wantID is not
// zero, a URI SAN other than wantID, or more than one, is refused, since its sender expects another SVID than it would get.
// Errors wrap ErrRefused. [X509-02, X509-27]
func CheckCSR(der []byte, wantID spiffeid.ID) (crypto.PublicKey, error) {
	if len(der) > MaxCSRBytes {
		return nil, fmt.Errorf("csr %w: it has %d bytes, more than %d", ErrRefused, len(der), MaxCSRBytes)
	}
	if !wantID.IsZero() {
		if csr, ok := readUsualCSR(der, wantID.String()); ok {
			if !csr.verifies() {
				return nil, fmt.Errorf("csr %w: its signature does not verify with its own key", ErrRefused)
			}
			return csr.key, nil
		}
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("csr %w: it is not a DER PKCS #10 certificate request: %.256v", ErrRefused, err) // it may repeat all of it
	}
	// The key comes before the signature: verifying with a key of absurd size is work for an attacker.
	if err := checkKeyStrength(csr.PublicKey); err != nil {
		return nil, err
	}
	if !wantID.IsZero() {
		if err := checkCSRURIs(csr, wantID); err != nil {
			return nil, fmt.Errorf("csr %w: %w", ErrRefused, err)
		}
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr %w: its signature does not verify with its own key: %w", ErrRefused, err)
	}
	return csr.PublicKey, nil
}

// checkCSRURIs looks at the raw bytes of the URI SANs: a parsed and printed URL has lost an empty fragment.
func checkCSRURIs(csr *x509.CertificateRequest, wantID spiffeid.ID) error {
	uris := 0
	for _, ext := range csr.Extensions {
		if !ext.Id.Equal(oidSAN) {
			continue
		}
		var names asn1.RawValue
		rest, err := asn1.Unmarshal(ext.Value, &names)
		if err != nil || len(rest) > 0 || names.Class != asn1.ClassUniversal || names.Tag != asn1.TagSequence || !names.IsCompound {
			return errSANShape
		}
		for rest := names.Bytes; len(rest) > 0; {
			var name asn1.RawValue
			if rest, err = asn1.Unmarshal(rest, &name); err != nil {
				return errSANShape
			}
			if name.Class != asn1.ClassContextSpecific || name.Tag != tagURI {
				continue
			}
			if uris++; uris > 1 {
				return errors.New("it asks for more than one URI SAN; ask for exactly one SPIFFE ID")
			}
			if string(name.Bytes) != wantID.String() {
				return fmt.Errorf("it asks for URI SAN %.256q, not %q; leave the URI out or use the ID of the registration entry", name.Bytes, wantID.String())
			}
		}
	}
	return nil
}

// checkKeyStrength refuses kinds and sizes of keys that no SVID may have.
func checkKeyStrength(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		}
		name := "(none)"
		if key.Curve != nil {
			name = key.Curve.Params().Name
		}
		return fmt.Errorf("public key %w: curve %s is too weak or unknown; use P-256, P-384 or P-521", ErrRefused, name)
	case *rsa.PublicKey:
		if key.N == nil {
			return fmt.Errorf("public key %w: RSA without a modulus", ErrRefused)
		}
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("public key %w: RSA with %d bits; use %d to %d bits, or better EC P-256", ErrRefused, bits, minRSABits, maxRSABits)
		}
		if key.E < 3 || key.E&1 == 0 || key.N.Bit(0) == 0 {
			return fmt.Errorf("public key %w: RSA with an even modulus or a public exponent that is even or below 3", ErrRefused)
		}
		return nil
	case ed25519.PublicKey:
		if len(key) != ed25519.PublicKeySize {
			return fmt.Errorf("public key %w: Ed25519 with %d bytes, not %d", ErrRefused, len(key), ed25519.PublicKeySize)
		}
		return nil
	default:
		return fmt.Errorf("public key %w: its kind is %T; use EC P-256, P-384, P-521, RSA or Ed25519", ErrRefused, key)
	}
}

// encodePublicKey returns the SubjectPublicKeyInfo and the subject key id: the first 20 bytes of the SHA-256 of the key bits.
// [RFC 7093 §2 method 1]
func encodePublicKey(key crypto.PublicKey) (spki []byte, ski [20]byte, err error) {
	var bits []byte
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if bits, err = k.Bytes(); err != nil {
			return nil, ski, fmt.Errorf("public key %w: %w", ErrRefused, err)
		}
		if k.Curve == elliptic.P256() { // the usual one, without reflection
			spki = append(append(make([]byte, 0, len(spkiP256)+len(bits)), spkiP256...), bits...)
		}
	case *rsa.PublicKey:
		bits = x509.MarshalPKCS1PublicKey(k)
	case ed25519.PublicKey:
		bits = k
	}
	if spki == nil {
		if spki, err = x509.MarshalPKIXPublicKey(key); err != nil {
			return nil, ski, fmt.Errorf("public key %w: %w", ErrRefused, err)
		}
	}
	sum := sha256.Sum256(bits)
	return spki, [20]byte(sum[:20]), nil
}
