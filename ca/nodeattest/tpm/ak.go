package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/google/go-tpm/legacy/tpm2"

	wire "github.com/signet-id/signet/internal/tpmwire"
)

const (
	// akNeeds are the attributes of a key that signs only what its own TPM says, was made in it and cannot leave it.
	akNeeds = tpm2.FlagRestricted | tpm2.FlagSign | tpm2.FlagFixedTPM | tpm2.FlagFixedParent | tpm2.FlagSensitiveDataOrigin
	// akMustNot: a key that also decrypts is a storage key.
	akMustNot = tpm2.FlagDecrypt
)

// checkAK checks that the structures describe a restricted signing key that a TPM made, and that it says so itself. It
// returns the key's name, to which the challenge is bound: the TPM opens a challenge only for a loaded key of that name, and
// the name is a hash over all attributes that are checked here. Every structure comes from a stranger.
func checkAK(ak *wire.AK) (*tpm2.HashValue, error) {
	public, err := tpm2.DecodePublic(ak.Public)
	if err != nil {
		return nil, fmt.Errorf("its public area cannot be read: %w", err)
	}
	if again, err := public.Encode(); err != nil || !bytes.Equal(again, ak.Public) {
		return nil, errors.New("its public area is not in canonical form")
	}
	if public.NameAlg != tpm2.AlgSHA256 {
		return nil, errors.New("its name is not by SHA-256")
	}
	switch {
	case public.Attributes&akNeeds != akNeeds:
		return nil, errors.New("it lacks one of the attributes restricted, sign, fixedTPM, fixedParent and sensitiveDataOrigin")
	case public.Attributes&akMustNot != 0:
		return nil, errors.New("it has the attribute decrypt")
	}
	key, hash, err := akKey(&public)
	if err != nil {
		return nil, err
	}
	name, err := public.Name()
	if err != nil || name.Digest == nil {
		return nil, errors.New("its name cannot be computed")
	}
	attestation, err := tpm2.DecodeAttestationData(ak.CreateAttestation)
	if err != nil {
		return nil, fmt.Errorf("its creation attestation cannot be read: %w", err)
	}
	info := attestation.AttestedCreationInfo
	if attestation.Type != tpm2.TagAttestCreation || info == nil {
		return nil, errors.New("its attestation is not one of a creation")
	}
	if d := info.Name.Digest; d == nil || d.Alg != name.Digest.Alg || !bytes.Equal(d.Value, name.Digest.Value) {
		return nil, errors.New("its creation attestation is of another key")
	}
	if sum := sha256.Sum256(ak.CreateData); !bytes.Equal(info.OpaqueDigest, sum[:]) {
		return nil, errors.New("its creation data are not those of the attestation")
	}
	if err := checkSignature(key, hash, ak.CreateAttestation, ak.CreateSignature); err != nil {
		return nil, err
	}
	return name.Digest, nil
}

// akKey returns the public key and the hash that it signs with.
func akKey(public *tpm2.Public) (crypto.PublicKey, crypto.Hash, error) {
	var scheme *tpm2.SigScheme
	var key crypto.PublicKey
	switch {
	case public.Type == tpm2.AlgRSA && public.RSAParameters != nil:
		scheme = public.RSAParameters.Sign
		n := public.RSAParameters.Modulus()
		if bits := n.BitLen(); bits < minRSABits || bits > maxRSABits || bits != int(public.RSAParameters.KeyBits) {
			return nil, 0, fmt.Errorf("its RSA modulus has %d bits", bits)
		}
		if e := public.RSAParameters.Exponent(); e != 65537 {
			return nil, 0, fmt.Errorf("its RSA exponent is %d", e)
		}
		key = &rsa.PublicKey{N: n, E: 65537}
	case public.Type == tpm2.AlgECC && public.ECCParameters != nil:
		scheme = public.ECCParameters.Sign
		k, err := public.Key()
		if err != nil {
			return nil, 0, err
		}
		ec, ok := k.(*ecdsa.PublicKey)
		if !ok || ec.Curve.Params().BitSize < 256 {
			return nil, 0, errors.New("its curve is too weak")
		}
		if _, err := ec.ECDH(); err != nil {
			return nil, 0, errors.New("its point is not on its curve")
		}
		key = ec
	default:
		return nil, 0, errors.New("it is neither RSA nor EC")
	}
	if scheme == nil {
		return nil, 0, errors.New("it has no signature scheme")
	}
	hash, err := scheme.Hash.Hash()
	if err != nil || hash.Size() < sha256.Size {
		return nil, 0, errors.New("its signature scheme has a hash weaker than SHA-256")
	}
	return key, hash, nil
}

func checkSignature(key crypto.PublicKey, hash crypto.Hash, message, signature []byte) error {
	sig, err := tpm2.DecodeSignature(bytes.NewBuffer(signature))
	if err != nil {
		return fmt.Errorf("its signature cannot be read: %w", err)
	}
	h := hash.New()
	h.Write(message)
	digest := h.Sum(nil)
	good := false
	switch k := key.(type) {
	case *rsa.PublicKey:
		switch {
		case sig.RSA == nil:
		case sig.Alg == tpm2.AlgRSASSA:
			good = rsa.VerifyPKCS1v15(k, hash, digest, sig.RSA.Signature) == nil
		case sig.Alg == tpm2.AlgRSAPSS:
			good = rsa.VerifyPSS(k, hash, digest, sig.RSA.Signature, nil) == nil
		}
	case *ecdsa.PublicKey:
		good = sig.ECC != nil && sig.ECC.R != nil && sig.ECC.S != nil && ecdsa.Verify(k, digest, sig.ECC.R, sig.ECC.S)
	}
	if !good {
		return errors.New("its creation attestation is not signed by it")
	}
	return nil
}
