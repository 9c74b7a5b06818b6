package spiffe

import (
	"crypto"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
)

// userTokens are an issuer with its key, and the header and the claims of a good token of it.
func userTokens(t testing.TB) (issuer TokenIssuer, sign func(header, claims object) string, h, c object) {
	t.Helper()
	key := newKey(t, elliptic.P256())
	issuer = TokenIssuer{Issuer: "https://login.example", Audience: []string{"documents"}, Keys: map[string]crypto.PublicKey{
		"k1": key.Public(), "p384": newKey(t, elliptic.P384()).Public(), "rsa": testRSAKey().Public()}}
	sign = func(header, claims object) string { return token(t, header.text(t), claims.text(t), key) }
	h = goodHeader()
	c = goodClaims().with("iss", issuer.Issuer).with("aud", "documents").with("sub", "alice").with("groups", []string{"editors"})
	return issuer, sign, h, c
}

func TestValidateToken(t *testing.T) {
	issuer, sign, h, c := userTokens(t)
	now := testNow.Unix()
	good := sign(h, c)
	parts := strings.Split(good, ".")
	stranger := newKey(t, elliptic.P256())
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	hmacked := func() string {
		publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must(x509.MarshalPKIXPublicKey(issuer.Keys["k1"]))})
		input := b64([]byte(h.with("alg", "HS256").text(t))) + "." + parts[1]
		mac := hmac.New(sha256.New, publicPEM)
		mac.Write([]byte(input))
		return input + "." + b64(mac.Sum(nil))
	}()
	for _, tt := range []struct {
		name, token, want string // want empty: valid
	}{
		{"good", good, ""},
		{"one of several audiences", sign(h, c.with("aud", []string{"x", "documents"})), ""},
		{"an access token", sign(h.with("typ", "at+jwt"), c), ""},
		{"a header that providers have", sign(h.with("x5t", "abc"), c), ""},
		{"as late as the leeway allows", sign(h, c.with("exp", now-29)), ""},
		{"the subject is no SPIFFE ID", sign(h, c.with("sub", 5)), ""},

		{"empty", "", "parts"},
		{"too long", good + strings.Repeat("A", DefaultMaxJWTBytes), "bytes"},
		{"padded", good + "==", "the byte"},
		{"five parts", good + ".a.b", "five parts"},
		{"no algorithm", b64([]byte(`{"alg":"none","kid":"k1"}`)) + "." + parts[1] + ".", "algorithm"},
		{"symmetric", hmacked, "algorithm"},
		{"Ed25519", func() string {
			input := b64([]byte(h.with("alg", "EdDSA").text(t))) + "." + parts[1]
			return input + "." + b64(ed25519.Sign(edKey, []byte(input)))
		}(), "algorithm"},
		{"another algorithm than the key's", sign(h.with("alg", "ES384"), c), "key"},
		{"RSA's algorithm for an EC key", sign(h.with("alg", "RS256"), c), "key"},
		{"no kid", sign(h.with("kid", nil), c), "kid"},
		{"kid is a number", sign(h.with("kid", 1), c), "kid"},
		{"an unknown kid", sign(h.with("kid", "other"), c), "key that its issuer"},
		{"the kid of another key", sign(h.with("kid", "p384"), c), "P-384"},
		{"another's signature", token(t, h.text(t), c.text(t), stranger), "signature"},
		{"brings its key", sign(h.with("jwk", map[string]string{"kty": "EC"}), c), `"jwk"`},
		{"crit", sign(h.with("crit", []string{"exp"}), c), `"crit"`},
		{"b64", sign(h.with("b64", false), c), `"b64"`},
		{"x5u", sign(h.with("x5u", "https://evil.example"), c), `"x5u"`},
		{"a WIT", sign(h.with("typ", "wit+jwt"), c), "typ"},
		{"typ is a list", sign(h.with("typ", []string{"JWT"}), c), "typ"},
		{"claims twice", token(t, h.text(t), `{"iss":"a","iss":"b"}`, stranger), "twice"},
		{"no issuer", sign(h, c.with("iss", nil)), "iss"},
		{"another issuer", sign(h, c.with("iss", "https://login.example/")), "iss"},
		{"no audience", sign(h, c.with("aud", nil)), "aud"},
		{"another audience", sign(h, c.with("aud", "Documents")), "not for any"},
		{"no exp", sign(h, c.with("exp", nil)), "exp"},
		{"exp is a text", sign(h, c.with("exp", "1999999999")), "exp"},
		{"exp is huge", sign(h, c.with("exp", json.Number("1e300"))), "exp"},
		{"expired", sign(h, c.with("exp", now-31)), "expired"},
		{"not yet", sign(h, c.with("nbf", now+31)), "valid from"},
		{"nbf is a text", sign(h, c.with("nbf", "0")), "nbf"},
	} {
		got, err := ValidateToken(tt.token, issuer, JWTOptions{Now: testNow})
		switch {
		case tt.want == "" && (err != nil || got["sub"] == nil):
			t.Errorf("%s: %v, %v", tt.name, got, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || got != nil):
			t.Errorf("%s: %v, error %v, want one with %q", tt.name, got, err, tt.want)
		}
		if err != nil && tt.token != "" && (strings.Contains(err.Error(), parts[1]) || strings.Contains(err.Error(), parts[2]) || strings.Contains(err.Error(), "alice")) {
			t.Errorf("%s: the error holds what the token says: %v", tt.name, err)
		}
	}
	if _, err := ValidateToken(good, TokenIssuer{Issuer: issuer.Issuer, Keys: issuer.Keys}, JWTOptions{Now: testNow}); err == nil {
		t.Error("an issuer without an audience validates a token")
	}
	if _, err := ValidateToken(good, issuer, JWTOptions{Now: testNow, Leeway: 2 * time.Minute}); err == nil {
		t.Error("a leeway of two minutes is taken")
	}
}

// FuzzValidateToken holds that only the very bytes that the issuer signed are valid, and that whatever is valid as a user
// token with the issuer's key would be a signed JWT to the validator of JWT-SVIDs, too.
func FuzzValidateToken(f *testing.F) {
	issuer, sign, h, c := userTokens(f)
	good := sign(h, c)
	f.Add(good)
	f.Add(good + "=")
	f.Add("..")
	f.Add(b64([]byte(`{"alg":"ES256","kid":"k1"}`)) + ".e30.")
	bundle := jwtbundle.FromJWTAuthorities(exampleOrg, issuer.Keys)
	f.Fuzz(func(t *testing.T, s string) {
		claims, err := ValidateToken(s, issuer, JWTOptions{Now: testNow})
		if (err == nil) != (claims != nil) {
			t.Fatalf("claims %v, error %v", claims, err)
		}
		if err == nil && strings.Split(s, ".")[1] != strings.Split(good, ".")[1] {
			t.Fatalf("a token that nobody signed is valid: %q", s)
		}
		if err != nil {
			return
		}
		// alice is no SPIFFE ID: the only thing that may be wrong.
		if _, err := ValidateJWTSVID(s, bundle, issuer.Audience, JWTOptions{Now: testNow, AllowUnknownHeaders: true}); RowOf(err) != "JWT-12" {
			t.Fatalf("%q is valid for users, and as a JWT-SVID %v", s, err)
		}
	})
}
