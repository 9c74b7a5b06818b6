package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-tpm/legacy/tpm2"
	"github.com/google/go-tpm/tpmutil"

	"github.com/signet-id/signet/ca/nodeattest"
	wire "github.com/signet-id/signet/internal/tpmwire"
)

// A forger makes the structures of an AK in software, as an attacker may who has no TPM. What it makes passes for an AK
// until it has to open a challenge.
type forger struct {
	rsa *rsa.PrivateKey
	ec  *ecdsa.PrivateKey

	public      tpm2.Public
	attestation tpm2.AttestationData
	createData  []byte
	sign        func(message []byte) []byte
	rename      bool // the attestation names the public area as it is when it is made
}

func forge(t testing.TB, change func(*forger)) *wire.AK {
	t.Helper()
	f := &forger{createData: []byte("creation data"), rename: true}
	var err error
	if f.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	if f.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	f.public = tpm2.Public{Type: tpm2.AlgRSA, NameAlg: tpm2.AlgSHA256, Attributes: akNeeds | tpm2.FlagUserWithAuth, RSAParameters: &tpm2.RSAParams{
		Sign: &tpm2.SigScheme{Alg: tpm2.AlgRSASSA, Hash: tpm2.AlgSHA256}, KeyBits: 2048, ModulusRaw: f.rsa.N.Bytes()}}
	f.attestation = tpm2.AttestationData{Magic: 0xff544347, Type: tpm2.TagAttestCreation, QualifiedSigner: tpm2.Name{Digest: &tpm2.HashValue{Alg: tpm2.AlgSHA256, Value: make([]byte, 32)}},
		AttestedCreationInfo: &tpm2.CreationInfo{}}
	f.sign = f.signRSA
	if change != nil {
		change(f)
	}
	public, err := f.public.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if f.rename {
		if f.attestation.AttestedCreationInfo.Name, err = f.public.Name(); err != nil {
			t.Fatal(err)
		}
	}
	if f.attestation.AttestedCreationInfo.OpaqueDigest == nil {
		sum := sha256.Sum256(f.createData)
		f.attestation.AttestedCreationInfo.OpaqueDigest = sum[:]
	}
	attestation, err := f.attestation.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return &wire.AK{Public: public, CreateData: f.createData, CreateAttestation: attestation, CreateSignature: f.sign(attestation)}
}

func (f *forger) signRSA(message []byte) []byte {
	sum := sha256.Sum256(message)
	sig, err := rsa.SignPKCS1v15(rand.Reader, f.rsa, crypto.SHA256, sum[:])
	if err != nil {
		panic(err)
	}
	out, err := tpmutil.Pack(tpm2.AlgRSASSA, tpm2.AlgSHA256, tpmutil.U16Bytes(sig))
	if err != nil {
		panic(err)
	}
	return out
}

func (f *forger) signEC(message []byte) []byte {
	sum := sha256.Sum256(message)
	r, s, err := ecdsa.Sign(rand.Reader, f.ec, sum[:])
	if err != nil {
		panic(err)
	}
	out, err := tpmutil.Pack(tpm2.AlgECDSA, tpm2.AlgSHA256, tpmutil.U16Bytes(r.Bytes()), tpmutil.U16Bytes(s.Bytes()))
	if err != nil {
		panic(err)
	}
	return out
}

// useEC makes the key an EC key.
func (f *forger) useEC() {
	point, err := f.ec.PublicKey.Bytes() // 4, X, Y
	if err != nil {
		panic(err)
	}
	f.public.Type, f.public.RSAParameters = tpm2.AlgECC, nil
	f.public.ECCParameters = &tpm2.ECCParams{Sign: &tpm2.SigScheme{Alg: tpm2.AlgECDSA, Hash: tpm2.AlgSHA256}, CurveID: tpm2.CurveNISTP256,
		Point: tpm2.ECPoint{XRaw: point[1:33], YRaw: point[33:]}}
	f.sign = f.signEC
}

func TestCheckAK(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*forger)
		want   string // in the error; empty: good
	}{
		{"RSA", nil, ""},
		{"EC", (*forger).useEC, ""},
		{"not restricted", func(f *forger) { f.public.Attributes &^= tpm2.FlagRestricted }, "lacks one of the attributes"},
		{"does not sign", func(f *forger) { f.public.Attributes &^= tpm2.FlagSign; f.public.RSAParameters.Sign = nil }, "lacks one of the attributes"},
		{"not fixedTPM", func(f *forger) { f.public.Attributes &^= tpm2.FlagFixedTPM }, "lacks one of the attributes"},
		{"not fixedParent", func(f *forger) { f.public.Attributes &^= tpm2.FlagFixedParent }, "lacks one of the attributes"},
		{"not made in the TPM", func(f *forger) { f.public.Attributes &^= tpm2.FlagSensitiveDataOrigin }, "lacks one of the attributes"},
		{"decrypts", func(f *forger) {
			f.public.Attributes |= tpm2.FlagDecrypt
			f.public.RSAParameters.Symmetric = &tpm2.SymScheme{Alg: tpm2.AlgAES, KeyBits: 128, Mode: tpm2.AlgCFB}
		}, "decrypt"},
		{"name by SHA-1", func(f *forger) { f.public.NameAlg = tpm2.AlgSHA1 }, "not by SHA-256"},
		{"no scheme", func(f *forger) { f.public.RSAParameters.Sign = nil }, "no signature scheme"},
		{"scheme with SHA-1", func(f *forger) { f.public.RSAParameters.Sign.Hash = tpm2.AlgSHA1 }, "weaker than SHA-256"},
		{"a short modulus", func(f *forger) { f.public.RSAParameters.ModulusRaw = f.rsa.N.Bytes()[:128] }, "RSA modulus has"},
		{"a modulus that is not as long as it says", func(f *forger) { f.public.RSAParameters.KeyBits = 3072 }, "RSA modulus has"},
		{"an exponent of one", func(f *forger) { f.public.RSAParameters.ExponentRaw = 1 }, "RSA exponent is 1"},
		{"no modulus", func(f *forger) { f.public.RSAParameters.ModulusRaw = nil }, "RSA modulus has"},
		{"a point that is not on the curve", func(f *forger) { f.useEC(); f.public.ECCParameters.Point.XRaw[3]++ }, "not on its curve"},
		{"attestation of another key", func(f *forger) {
			f.rename = false
			f.attestation.AttestedCreationInfo.Name = tpm2.Name{Digest: &tpm2.HashValue{Alg: tpm2.AlgSHA256, Value: make([]byte, 32)}}
		}, "of another key"},
		{"attestation of a handle", func(f *forger) {
			handle := tpmutil.Handle(1)
			f.rename, f.attestation.AttestedCreationInfo.Name = false, tpm2.Name{Handle: &handle}
		}, "of another key"},
		{"other creation data", func(f *forger) { f.attestation.AttestedCreationInfo.OpaqueDigest = make([]byte, 32) }, "creation data"},
		{"signed by another key", func(f *forger) {
			other, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				panic(err)
			}
			f.sign = (&forger{rsa: other}).signRSA
		}, "not signed by it"},
		{"an RSA key with an EC signature", func(f *forger) { f.sign = f.signEC }, "not signed by it"},
		{"an EC key with an RSA signature", func(f *forger) { f.useEC(); f.sign = f.signRSA }, "not signed by it"},
		{"a signature that is garbage", func(f *forger) { f.sign = func([]byte) []byte { return []byte("garbage") } }, "signature"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name, err := checkAK(forge(t, tt.change))
			if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) || err == nil && name == nil {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	quote := forge(t, nil)
	quote.CreateAttestation = bytes.Clone(quote.CreateAttestation)
	quote.CreateAttestation[5] = 0x18 // a quote
	if _, err := checkAK(quote); err == nil {
		t.Error("the attestation of something else was taken")
	}
	tail := forge(t, nil)
	tail.Public = append(bytes.Clone(tail.Public), 0)
	if _, err := checkAK(tail); err == nil {
		t.Error("bytes after the public area were taken")
	}
}

// TestForgedAKOpensNothing: structures made in software pass every check there is without a TPM, and still let nobody in.
func TestForgedAKOpensNothing(t *testing.T) {
	ek, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := wire.EncodeEK(ek.Public(), nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := New(Config{Known: func(string) bool { return true }})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(wire.Payload{EK: pem, AK: forge(t, nil)})
	if err != nil {
		t.Fatal(err)
	}
	for _, answer := range []string{`{"Secret":""}`, `{"Secret":null}`, `{}`, `{"Secret":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`} {
		asked := false
		_, err = a.Attest(t.Context(), nodeattest.Attempt{Payload: payload, Challenge: func(q []byte) ([]byte, error) {
			asked = true
			return []byte(answer), nil
		}})
		if r, ok := errors.AsType[*nodeattest.Refusal](err); !asked || !ok || r.Kind != nodeattest.Denied {
			t.Errorf("asked %t; the answer %s gave %v", asked, answer, err)
		}
	}
}

func FuzzAK(f *testing.F) {
	good := forge(f, nil)
	ec := forge(f, (*forger).useEC)
	for _, ak := range []*wire.AK{good, ec} {
		f.Add(ak.Public, ak.CreateData, ak.CreateAttestation, ak.CreateSignature)
	}
	f.Add(good.Public, good.CreateData, good.CreateAttestation, ec.CreateSignature)
	f.Fuzz(func(t *testing.T, public, data, attestation, signature []byte) {
		name, err := checkAK(&wire.AK{Public: public, CreateData: data, CreateAttestation: attestation, CreateSignature: signature})
		if err != nil {
			return
		}
		sum := sha256.Sum256(public)
		if name.Alg != tpm2.AlgSHA256 || !bytes.Equal(name.Value, sum[:]) {
			t.Error("the name is not the hash of the public area")
		}
	})
}
