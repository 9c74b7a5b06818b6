package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// testSigners returns a signer of each kind that may have an SVID.
var testSigners = sync.OnceValues(func() (map[string]crypto.Signer, error) {
	signers := map[string]crypto.Signer{}
	for name, curve := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			return nil, err
		}
		signers[name] = key
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	signers["RSA 2048"] = key
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	signers["Ed25519"] = edKey
	return signers, err
})

func signers(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	all, err := testSigners()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func testKeys(t testing.TB) map[string]crypto.PublicKey {
	t.Helper()
	keys := map[string]crypto.PublicKey{}
	for name, signer := range signers(t) {
		keys[name] = signer.Public()
	}
	return keys
}

func marshalKey(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestGoodPublicKeysParse(t *testing.T) {
	for name, key := range testKeys(t) {
		got, err := ParsePublicKey(marshalKey(t, key))
		if err != nil || !key.(interface{ Equal(crypto.PublicKey) bool }).Equal(got) {
			t.Errorf("ParsePublicKey of a key on %s = %v, %v", name, got, err)
		}
		spki, _, err := encodePublicKey(key)
		if err != nil || !bytes.Equal(spki, marshalKey(t, key)) {
			t.Errorf("encodePublicKey of a key on %s = %x, %v; want %x", name, spki, err, marshalKey(t, key))
		}
	}
}

// rsaKey returns a public key with a random odd modulus of that size. Nobody has its private key, and nobody asks for it.
func rsaKey(t testing.TB, bits, e int) *rsa.PublicKey {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
	if err != nil {
		t.Fatal(err)
	}
	return &rsa.PublicKey{N: n.SetBit(n, bits-1, 1).SetBit(n, 0, 1), E: e}
}

func TestX509_28_WeakKeysRefused(t *testing.T) {
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	even := rsaKey(t, 2048, 65537)
	even.N.SetBit(even.N, 0, 0)
	for _, tt := range []struct {
		name string
		key  crypto.PublicKey
		want string
	}{
		{"RSA 1024", rsaKey(t, 1024, 65537), "1024 bits; use 2048 to 8192"},
		{"RSA 2047", rsaKey(t, 2047, 65537), "2047 bits"},
		{"RSA 8193", rsaKey(t, 8193, 65537), "8193 bits"},
		{"RSA with exponent 2", rsaKey(t, 2048, 2), "exponent"},
		{"RSA with exponent 1", rsaKey(t, 2048, 1), "exponent"},
		{"RSA with even modulus", even, "even modulus"},
		{"P-224", p224.Public(), "P-224"},
		{"X25519", x25519.Public(), "ecdh"},
	} {
		if _, err := ParsePublicKey(marshalKey(t, tt.key)); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("ParsePublicKey of %s = %v, want a refusal with %q", tt.name, err, tt.want)
		}
		if _, err := openSet(t).CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: tt.key}); !errors.Is(err, ErrRefused) {
			t.Errorf("CheckX509 of %s = %v, want a refusal", tt.name, err)
		}
	}
	if _, err := ParsePublicKey(marshalKey(t, rsaKey(t, 8192, 65537))); err != nil {
		t.Errorf("ParsePublicKey of RSA 8192 = %v", err)
	}
}

func TestPublicKeyEncodingsRefused(t *testing.T) {
	good := marshalKey(t, newPublicKey(t))
	compressed := bytes.Clone(good[:26+33])
	compressed[1], compressed[24], compressed[26] = 0x39, 0x22, 2+good[len(good)-1]&1
	offCurve := bytes.Clone(good)
	offCurve[len(offCurve)-1] ^= 1
	longForm := slices.Concat([]byte{0x30, 0x81, 0x59}, good[2:])
	for name, der := range map[string][]byte{
		"nothing":              nil,
		"trailing byte":        append(bytes.Clone(good), 0),
		"cut":                  good[:len(good)-1],
		"compressed point":     compressed,
		"point off the curve":  offCurve,
		"long form of length":  longForm,
		"too large":            make([]byte, MaxPublicKeyBytes+1),
		"PEM":                  []byte("-----BEGIN PUBLIC KEY-----\n"),
		"null after Ed25519":   slices.Concat([]byte{0x30, 0x2c, 0x30, 0x07, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x05, 0x00, 0x03, 0x21, 0x00}, make([]byte, 32)),
		"unused bits in point": func() []byte { b := bytes.Clone(good); b[25] = 1; return b }(),
	} {
		if key, err := ParsePublicKey(der); !errors.Is(err, ErrRefused) {
			t.Errorf("ParsePublicKey of %s = %v, %v; want a refusal", name, key, err)
		}
	}
}

func makeCSR(t testing.TB, signer crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, signer)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func parseURLs(t testing.TB, raw ...string) (urls []*url.URL) {
	t.Helper()
	for _, r := range raw {
		u, err := url.Parse(r)
		if err != nil {
			t.Fatal(err)
		}
		urls = append(urls, u)
	}
	return urls
}

func TestCSRsOfEveryKeyPass(t *testing.T) {
	for name, signer := range signers(t) {
		key, err := CheckCSR(makeCSR(t, signer, x509.CertificateRequest{}), spiffeid.ID{})
		if err != nil || !key.(interface{ Equal(crypto.PublicKey) bool }).Equal(signer.Public()) {
			t.Errorf("CheckCSR with %s = %v, %v", name, key, err)
		}
	}
}

func TestX509_02_CSRWithAnotherURIRefused(t *testing.T) {
	web, signer := mustID(t, "/web"), newKey(t)
	for _, tt := range []struct {
		name string
		uris []string
		want string // empty: accepted
	}{
		{"none", nil, ""},
		{"the ID", []string{"spiffe://example.org/web"}, ""},
		{"another ID", []string{"spiffe://example.org/db"}, `"spiffe://example.org/db"`},
		{"another trust domain", []string{"spiffe://example.com/web"}, `"spiffe://example.com/web"`},
		{"not a SPIFFE ID", []string{"https://example.org/web"}, `"https://example.org/web"`},
		{"the ID twice", []string{"spiffe://example.org/web", "spiffe://example.org/web"}, "more than one URI"},
		{"the ID and another", []string{"spiffe://example.org/web", "spiffe://example.org/db"}, "more than one URI"},
	} {
		der := makeCSR(t, signer, x509.CertificateRequest{URIs: parseURLs(t, tt.uris...), DNSNames: []string{"ignored"}})
		_, err := CheckCSR(der, web)
		if (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: CheckCSR = %v, want an error with %q", tt.name, err, tt.want)
		}
		if _, err := CheckCSR(der, spiffeid.ID{}); err != nil {
			t.Errorf("%s: CheckCSR without an ID = %v", tt.name, err)
		}
	}
	// url.URL cannot carry these; the extension is written by hand.
	for _, raw := range []string{"spiffe://example.org/web#", "SPIFFE://example.org/web", "spiffe://example.org/web?"} {
		names, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(raw)}})
		if err != nil {
			t.Fatal(err)
		}
		der := makeCSR(t, signer, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oidSAN, Value: names}}})
		if _, err := CheckCSR(der, web); !errors.Is(err, ErrRefused) {
			t.Errorf("CheckCSR with URI SAN %q = %v, want a refusal", raw, err)
		}
	}
}

func TestX509_09_27_CSRCarriesOnlyAKey(t *testing.T) {
	signer := newKey(t)
	isCA, err := asn1.Marshal(struct{ IsCA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	certSign, err := asn1.Marshal(asn1.BitString{Bytes: []byte{0x06}, BitLength: 7})
	if err != nil {
		t.Fatal(err)
	}
	key, err := CheckCSR(makeCSR(t, signer, x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "root"},
		DNSNames: []string{"evil.example"},
		ExtraExtensions: []pkix.Extension{
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: isCA},
			{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: certSign},
		},
	}), mustID(t, "/web"))
	if err != nil {
		t.Fatal(err)
	}
	leaf := parse(t, issue(t, openSet(t), X509Request{ID: mustID(t, "/web"), PublicKey: key}))
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.DNSNames) != 0 || leaf.Subject.CommonName != "" {
		t.Errorf("what the CSR asked for is in the certificate: %+v", leaf)
	}
	if !signer.PublicKey.Equal(leaf.PublicKey) {
		t.Error("the certificate has another key than the CSR")
	}
}

func TestBadCSRsRefused(t *testing.T) {
	good := makeCSR(t, newKey(t), x509.CertificateRequest{})
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		der  []byte
		want string
	}{
		"nothing":         {nil, "not a DER"},
		"too large":       {make([]byte, MaxCSRBytes+1), "more than"},
		"trailing byte":   {append(bytes.Clone(good), 0), "not a DER"},
		"forged":          {forged, "csr refused"},
		"weak key":        {makeCSR(t, p224, x509.CertificateRequest{}), "P-224"},
		"a public key":    {marshalKey(t, newPublicKey(t)), "not a DER"},
		"stolen identity": {stolenCSR(t), "its signature does not verify"},
	} {
		if _, err := CheckCSR(tt.der, spiffeid.ID{}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("CheckCSR of %s = %v, want a refusal with %q", name, err, tt.want)
		}
	}
}

// stolenCSR returns a CSR with another's public key, put in place of the signer's own.
func stolenCSR(t testing.TB) []byte {
	t.Helper()
	signer := newKey(t)
	return bytes.Replace(makeCSR(t, signer, x509.CertificateRequest{}), marshalKey(t, signer.Public()), marshalKey(t, newPublicKey(t)), 1)
}

// FuzzParsePublicKey holds that what is accepted prints back as it was read, is strong enough and can be issued.
func FuzzParsePublicKey(f *testing.F) {
	for _, key := range testKeys(f) {
		f.Add(marshalKey(f, key))
	}
	f.Add(marshalKey(f, rsaKey(f, 1024, 3)))
	f.Fuzz(func(t *testing.T, der []byte) {
		key, err := ParsePublicKey(der)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("error %v is no refusal", err)
			}
			return
		}
		spki, _, err := encodePublicKey(key)
		if err != nil || !bytes.Equal(spki, der) {
			t.Errorf("%x is encoded as %x, %v", der, spki, err)
		}
		if err := checkKeyStrength(key); err != nil {
			t.Error(err)
		}
	})
}

// FuzzCheckCSR holds that what is accepted was signed by its own key, and asks for no other ID.
func FuzzCheckCSR(f *testing.F) {
	web := mustID(f, "/web")
	for _, signer := range signers(f) {
		f.Add(makeCSR(f, signer, x509.CertificateRequest{URIs: parseURLs(f, web.String())}))
		f.Add(makeCSR(f, signer, x509.CertificateRequest{URIs: parseURLs(f, "spiffe://example.org/db")}))
	}
	f.Add(stolenCSR(f))
	f.Fuzz(func(t *testing.T, der []byte) {
		key, err := CheckCSR(der, web)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("error %v is no refusal", err)
			}
			return
		}
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil || csr.CheckSignature() != nil || checkKeyStrength(key) != nil || len(csr.URIs) > 1 {
			t.Errorf("accepted a CSR with %v, %v", csr, err)
		}
		if len(csr.URIs) == 1 && csr.URIs[0].String() != web.String() {
			t.Errorf("accepted a CSR for %q", csr.URIs[0])
		}
	})
}
