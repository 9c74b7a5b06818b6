package keys

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var testBinding = Binding{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Use: UseX509, AuthorityID: "a1b2", Generation: 3}

func testSeal(t testing.TB, fill byte) *SealKey {
	t.Helper()
	seal, err := newSealKey(bytes.Repeat([]byte{fill}, SealKeyBytes), "/etc/signet/seal.key")
	if err != nil {
		t.Fatal(err)
	}
	return seal
}

func sealedKey(t testing.TB, seal *SealKey) (*Key, Stored) {
	t.Helper()
	key, err := Generate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stored, err := key.Seal(seal, testBinding)
	if err != nil {
		t.Fatal(err)
	}
	return key, stored
}

func TestSealedKeyOpensAndSigns(t *testing.T) {
	seal := testSeal(t, 1)
	key, stored := sealedKey(t, seal)
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		t.Fatalf("a new key is a %T, want P-256", key.Public())
	}
	opened, err := Open(t.Context(), stored, seal, testBinding)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("to be signed"))
	signature, err := opened.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.VerifyASN1(public, digest[:], signature) {
		t.Error("the opened key signs with another key")
	}
	if opened.External() {
		t.Error("a sealed key says that it is outside this process")
	}
}

func TestSealedKeyHoldsNothingInClear(t *testing.T) {
	key, stored := sealedKey(t, testSeal(t, 1))
	private := key.signer.(*ecdsa.PrivateKey)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := private.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	for name, secret := range map[string][]byte{"PKCS #8": pkcs8, "scalar": scalar, "half the scalar": scalar[:16]} {
		if bytes.Contains(stored.Sealed, secret) {
			t.Errorf("the sealed key holds the %s in clear", name)
		}
	}
	if again, err := key.Seal(testSeal(t, 1), testBinding); err != nil || bytes.Equal(again.Sealed, stored.Sealed) {
		t.Errorf("sealing twice gives the same bytes (err %v): a nonce is used again", err)
	}
}

func TestWrongSealKeySaysSo(t *testing.T) {
	_, stored := sealedKey(t, testSeal(t, 1))
	other := testSeal(t, 2)
	_, err := Open(t.Context(), stored, other, testBinding)
	if !errors.Is(err, ErrWrongSealKey) {
		t.Fatalf("Open with another seal key = %v, want ErrWrongSealKey", err)
	}
	for _, want := range []string{`authority "a1b2"`, "/etc/signet/seal.key", other.ID(), testSeal(t, 1).ID(), "give the CA the seal key"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "message authentication") {
		t.Errorf("error %q speaks of ciphers", err)
	}
}

func TestSealIsBoundToItsAuthority(t *testing.T) {
	seal := testSeal(t, 1)
	_, stored := sealedKey(t, seal)
	for _, tt := range []struct {
		name   string
		change func(*Binding)
	}{
		{"trust domain", func(b *Binding) { b.TrustDomain = spiffeid.RequireTrustDomainFromString("example.com") }},
		{"use", func(b *Binding) { b.Use = UseJWT }},
		{"authority id", func(b *Binding) { b.AuthorityID = "a1b3" }},
		{"generation", func(b *Binding) { b.Generation++ }},
	} {
		binding := testBinding
		tt.change(&binding)
		if _, err := Open(t.Context(), stored, seal, binding); !errors.Is(err, ErrSealBroken) || !strings.Contains(err.Error(), binding.AuthorityID) {
			t.Errorf("Open with another %s = %v, want ErrSealBroken that names the authority", tt.name, err)
		}
	}
	for i := range stored.Sealed {
		damaged := bytes.Clone(stored.Sealed)
		damaged[i] ^= 1
		if _, err := Open(t.Context(), Stored{Kind: KindSoft, Sealed: damaged}, seal, testBinding); err == nil {
			t.Errorf("Open with bit 0 of byte %d turned passes", i)
		}
	}
}

func TestOpenRefusals(t *testing.T) {
	seal := testSeal(t, 1)
	_, stored := sealedKey(t, seal)
	newer := bytes.Clone(stored.Sealed)
	newer[len(sealMagic)] = 2
	notAKey, err := seal.seal(sealUse, []byte("not a key"), testBinding)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		stored Stored
		seal   *SealKey
		want   string
	}{
		{"another kind", Stored{Kind: "pkcs11", Sealed: stored.Sealed}, seal, `"pkcs11"`},
		{"no seal key", stored, nil, "seal.key_file"},
		{"newer version", Stored{Kind: KindSoft, Sealed: newer}, seal, "version 2"},
		{"empty", Stored{Kind: KindSoft}, seal, "not in signet's sealed form"},
		{"too large", Stored{Kind: KindSoft, Sealed: make([]byte, MaxSealedBytes+1)}, seal, "more than"},
		{"not PKCS #8 inside", Stored{Kind: KindSoft, Sealed: notAKey}, seal, "not PKCS #8"},
	} {
		if _, err := Open(t.Context(), tt.stored, tt.seal, testBinding); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), `"a1b2"`) {
			t.Errorf("%s: Open = %v, want an error with %q and the authority", tt.name, err, tt.want)
		}
	}
	key, _ := sealedKey(t, seal)
	for _, b := range []Binding{{}, {TrustDomain: testBinding.TrustDomain, Use: "other", AuthorityID: "a", Generation: 1}, {TrustDomain: testBinding.TrustDomain, Use: UseJWT, Generation: 1}, {TrustDomain: testBinding.TrustDomain, Use: UseJWT, AuthorityID: "a"}} {
		if _, err := key.Seal(seal, b); err == nil {
			t.Errorf("Seal with the incomplete binding %+v passes", b)
		}
	}
	if _, err := key.Seal(nil, testBinding); err == nil {
		t.Error("Seal without a seal key passes")
	}
	if _, err := External(key).Seal(seal, testBinding); err == nil {
		t.Error("Seal of an external key passes")
	}
}

// A brokenSigner signs something else than it is asked to, as failing hardware does.
type brokenSigner struct{ crypto.Signer }

func (b brokenSigner) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	digest = bytes.Clone(digest)
	digest[0] ^= 1
	return b.Signer.Sign(r, digest, opts)
}

func TestExternalSignatureIsVerified(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("to be signed"))
	for _, tt := range []struct {
		name   string
		signer crypto.Signer
		opts   crypto.SignerOpts
	}{
		{"EC", ec, crypto.SHA256},
		{"Ed25519", ed, crypto.Hash(0)},
		{"RSA PKCS #1", rs, crypto.SHA256},
		{"RSA PSS", rs, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}},
	} {
		if !External(tt.signer).External() {
			t.Fatalf("%s: External key does not say so", tt.name)
		}
		if _, err := External(tt.signer).Sign(rand.Reader, digest[:], tt.opts); err != nil {
			t.Errorf("%s: a good signature is refused: %v", tt.name, err)
		}
		if _, err := External(brokenSigner{tt.signer}).Sign(rand.Reader, digest[:], tt.opts); !errors.Is(err, ErrBadSignature) {
			t.Errorf("%s: a bad signature gives %v, want ErrBadSignature", tt.name, err)
		}
	}
}

// FuzzOpen holds that nothing opens but what was sealed: the sealed bytes, overwritten from some place on or cut, are refused
// unless that left them as they were.
func FuzzOpen(f *testing.F) {
	seal := testSeal(f, 1)
	_, stored := sealedKey(f, seal)
	f.Add(uint16(0), []byte(sealMagic), false)
	f.Add(uint16(len(sealMagic)), []byte{sealVersion + 1}, false)
	f.Add(uint16(sealHeader), make([]byte, sealNonceBytes), false)
	f.Add(uint16(20), []byte{}, true)
	f.Add(uint16(400), []byte("more"), false)
	f.Fuzz(func(t *testing.T, at uint16, patch []byte, cut bool) {
		sealed := bytes.Clone(stored.Sealed)
		start := min(int(at), len(sealed))
		tail := sealed[min(start+len(patch), len(sealed)):]
		if cut {
			tail = nil
		}
		sealed = slices.Concat(sealed[:start], patch, tail)
		_, err := Open(t.Context(), Stored{Kind: KindSoft, Sealed: sealed}, seal, testBinding)
		if same := bytes.Equal(sealed, stored.Sealed); (err == nil) != same {
			t.Errorf("Open = %v for bytes that are the sealed ones: %t", err, same)
		}
	})
}
