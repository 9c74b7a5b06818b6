package spiffe

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

func jwk(t testing.TB, key any, kid, more string) string {
	t.Helper()
	doc, err := (&jose.JSONWebKey{Key: key, KeyID: kid}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(string(doc), "}") + more + "}"
}

func jwks(keys ...string) []byte { return []byte(`{"keys":[` + strings.Join(keys, ",") + `]}`) }

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func rsaKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestParseUserKeys(t *testing.T) {
	p256, p384, r2048 := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P384()), rsaKey(t, 2048)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	good := jwk(t, p256.Public(), "a", "")
	for _, tt := range []struct {
		name    string
		doc     []byte
		kids    string
		skipped int
		wantErr string
	}{
		{name: "keys of each kind", doc: jwks(good, jwk(t, p384.Public(), "b", `,"use":"sig","alg":"ES384"`), jwk(t, r2048.Public(), "c", `,"alg":"PS256","key_ops":["verify"]`)), kids: "a b c"},
		{name: "members nobody knows", doc: jwks(jwk(t, p256.Public(), "a", `,"x5t":"q","issued":5`)), kids: "a"},
		{name: "a key to encrypt with", doc: jwks(good, jwk(t, r2048.Public(), "e", `,"use":"enc"`)), kids: "a", skipped: 1},
		{name: "a key to wrap with", doc: jwks(good, jwk(t, r2048.Public(), "e", `,"key_ops":["wrapKey"]`)), kids: "a", skipped: 1},
		{name: "an algorithm of another key", doc: jwks(good, jwk(t, p384.Public(), "e", `,"alg":"ES256"`)), kids: "a", skipped: 1},
		{name: "a symmetric algorithm", doc: jwks(good, jwk(t, r2048.Public(), "e", `,"alg":"HS256"`)), kids: "a", skipped: 1},
		{name: "a key without id", doc: jwks(good, jwk(t, p384.Public(), "", "")), kids: "a", skipped: 1},
		{name: "Ed25519", doc: jwks(good, jwk(t, ed.Public(), "e", "")), kids: "a", skipped: 1},
		{name: "a kind nobody knows", doc: jwks(good, `{"kty":"LMS","kid":"e"}`), kids: "a", skipped: 1},
		{name: "a short RSA key", doc: jwks(good, jwk(t, rsaKey(t, 1024).Public(), "e", "")), kids: "a", skipped: 1},
		{name: "a point off the curve", doc: jwks(good, `{"kty":"EC","kid":"e","crv":"P-256","x":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE","y":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"}`), kids: "a", skipped: 1},

		{name: "nothing usable", doc: jwks(jwk(t, r2048.Public(), "e", `,"use":"enc"`)), skipped: 1, wantErr: "no key that can verify"},
		{name: "no key", doc: jwks(), wantErr: "no key that can verify"},
		{name: "a private key", doc: jwks(good, jwk(t, p384, "b", "")), wantErr: `private member "d"`},
		{name: "a private RSA key", doc: jwks(good, jwk(t, r2048, "b", "")), wantErr: "private member"},
		{name: "a symmetric key", doc: jwks(good, `{"kty":"oct","kid":"s","k":"c2VjcmV0"}`), wantErr: "symmetric"},
		{name: "one id twice", doc: jwks(good, jwk(t, p384.Public(), "a", "")), wantErr: `two keys with the kid "a"`},
		{name: "one member twice", doc: jwks(strings.Replace(good, `"kid":"a"`, `"kid":"a","kid":"b"`, 1)), wantErr: "twice"},
		{name: "a key that is no object", doc: jwks(good, "5"), wantErr: "must be an object"},
		{name: "no JSON", doc: []byte("keys"), wantErr: "malformed"},
		{name: "an array", doc: []byte("[]"), wantErr: "must be an object"},
		{name: "keys that are none", doc: []byte(`{"keys":{}}`), wantErr: "no array"},
		{name: "more after it", doc: append(jwks(good), jwks(good)...), wantErr: "malformed"},
		{name: "too many keys", doc: jwks(slicesOf(good, MaxUserKeys+1)...), wantErr: "at most 100"},
		{name: "too long", doc: append(jwks(good), bytes.Repeat([]byte(" "), MaxUserKeysBytes)...), wantErr: "at most 262144"},
		{name: "too deep", doc: []byte(strings.Repeat(`{"keys":`, 20) + "1" + strings.Repeat("}", 20)), wantErr: "deep"},
	} {
		keys, skipped, err := ParseUserKeys(tt.doc)
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) || keys != nil {
				t.Errorf("%s: got %v, %v; want an error with %q", tt.name, keys, err, tt.wantErr)
			}
			continue
		}
		var kids []string
		for _, kid := range []string{"a", "b", "c", "e", ""} {
			if keys[kid] != nil {
				kids = append(kids, kid)
			}
		}
		if err != nil || strings.Join(kids, " ") != tt.kids || len(skipped) != tt.skipped {
			t.Errorf("%s: keys %v, %v, %v; want %s and %d left out", tt.name, kids, skipped, err, tt.kids, tt.skipped)
		}
	}
}

func slicesOf(s string, n int) (out []string) {
	for range n {
		out = append(out, s)
	}
	return out
}

// FuzzParseUserKeys: whatever is accepted is public, strong enough, and reads the same once it is written.
func FuzzParseUserKeys(f *testing.F) {
	f.Add(jwks(jwk(f, ecKey(f, elliptic.P256()).Public(), "a", "")))
	f.Add(jwks(jwk(f, rsaKey(f, 2048).Public(), "a", `,"use":"sig"`)))
	f.Add(jwks(jwk(f, ecKey(f, elliptic.P384()), "a", "")))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AA"}]}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		keys, _, err := ParseUserKeys(doc)
		if err != nil {
			return
		}
		if len(keys) == 0 || len(keys) > MaxUserKeys {
			t.Fatalf("%d keys", len(keys))
		}
		written, err := MarshalJWKS(keys)
		if err != nil {
			t.Fatal(err)
		}
		again, skipped, err := ParseUserKeys(written)
		if err != nil || len(skipped) > 0 || len(again) != len(keys) {
			t.Fatalf("read back as %v, %v, %v", again, skipped, err)
		}
		for kid, key := range keys {
			if !key.(interface{ Equal(crypto.PublicKey) bool }).Equal(again[kid]) {
				t.Fatalf("key %q is another one when it is read back", kid)
			}
		}
	})
}
