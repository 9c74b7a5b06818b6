package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"

	"go.step.sm/crypto/kms/apiv1"
)

// An Algorithm is a kind and size of authority key. The zero value is EC P-256.
type Algorithm string

// The algorithms of authority keys. P-256 is the default: every verifier knows it, and its signatures are small and fast.
// RSA is for verifiers that know nothing else.
const (
	ECP256  Algorithm = "EC-P256"
	ECP384  Algorithm = "EC-P384"
	RSA2048 Algorithm = "RSA-2048"
	RSA3072 Algorithm = "RSA-3072"
	RSA4096 Algorithm = "RSA-4096"
)

// ParseAlgorithm reads an algorithm. Empty is EC-P256.
func ParseAlgorithm(text string) (Algorithm, error) {
	switch a := Algorithm(text); a {
	case "":
		return ECP256, nil
	case ECP256, ECP384, RSA2048, RSA3072, RSA4096:
		return a, nil
	}
	return "", fmt.Errorf("%q is not EC-P256 (the default), EC-P384, RSA-2048, RSA-3072 or RSA-4096", text)
}

// request fills in the driver's words for the algorithm.
func (a Algorithm) request(r *apiv1.CreateKeyRequest) {
	switch a {
	case ECP384:
		r.SignatureAlgorithm = apiv1.ECDSAWithSHA384
	case RSA2048:
		r.SignatureAlgorithm, r.Bits = apiv1.SHA256WithRSA, 2048
	case RSA3072:
		r.SignatureAlgorithm, r.Bits = apiv1.SHA256WithRSA, 3072
	case RSA4096:
		r.SignatureAlgorithm, r.Bits = apiv1.SHA256WithRSA, 4096
	default:
		r.SignatureAlgorithm = apiv1.ECDSAWithSHA256
	}
}

// check refuses a public key that is not of the algorithm: a key store that makes other keys than it was asked for.
func (a Algorithm) check(public crypto.PublicKey) error {
	is := fmt.Sprintf("a %T", public)
	switch public := public.(type) {
	case *ecdsa.PublicKey:
		switch public.Curve {
		case elliptic.P256():
			is = string(ECP256)
		case elliptic.P384():
			is = string(ECP384)
		default:
			is = "a key on another curve"
		}
	case *rsa.PublicKey:
		is = fmt.Sprintf("RSA-%d", public.N.BitLen())
	}
	want := a
	if want == "" {
		want = ECP256
	}
	if is != string(want) {
		return fmt.Errorf("the key is %s, not %s", is, want)
	}
	return nil
}
