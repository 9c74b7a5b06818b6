package spiffe

import (
	"crypto"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var b64 = base64.RawURLEncoding.EncodeToString

func TestJWTSVIDVectors(t *testing.T) {
	key, p384, p521, stranger := newKey(t, elliptic.P256()), newKey(t, elliptic.P384()), newKey(t, elliptic.P521()), newKey(t, elliptic.P256())
	rsaKey := testRSAKey()
	edPublic, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	exampleOrgKeys := map[string]crypto.PublicKey{
		"k1": key.Public(), "p384": p384.Public(), "p521": p521.Public(), "rsa": rsaKey.Public(), "ed": edPublic, "hmac": []byte("secret"),
	}
	bundles := jwtbundle.NewSet(
		jwtbundle.FromJWTAuthorities(exampleOrg, exampleOrgKeys),
		jwtbundle.FromJWTAuthorities(spiffeid.RequireTrustDomainFromString("other.org"), map[string]crypto.PublicKey{"other": stranger.Public(), "k1": stranger.Public()}),
		jwtbundle.New(spiffeid.RequireTrustDomainFromString("empty.org")),
	)

	h, c := goodHeader(), goodClaims()
	with := func(header, claims object) string { return token(t, header.text(t), claims.text(t), key) }
	good := with(h, c)
	parts := strings.Split(good, ".")
	header := func(name string, value any) string { return with(h.with(name, value), c) }
	claim := func(name string, value any) string { return with(h, c.with(name, value)) }
	raw := func(payload string) string { return token(t, h.text(t), payload, key) }
	now := testNow.Unix()

	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must(x509.MarshalPKIXPublicKey(key.Public()))})
	hs256 := func() string {
		input := b64([]byte(h.with("alg", "HS256").text(t))) + "." + parts[1]
		mac := hmac.New(sha256.New, publicPEM)
		mac.Write([]byte(input))
		return input + "." + b64(mac.Sum(nil))
	}()
	embedded := func() string {
		attacker := newKey(t, elliptic.P256())
		return token(t, h.with("jwk", entry(t, "", "k1", attacker.Public())).text(t), c.text(t), attacker)
	}()
	flattened := fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2])

	for _, v := range []struct {
		name, token string
		row         string // empty: valid
	}{
		{"V067", good, ""},
		{"V068", claim("aud", "svc"), ""},
		{"V069 absent", header("typ", nil), ""},
		{"V069 JOSE", header("typ", "JOSE"), ""},
		{"V070", header("typ", "jwt"), "JWT-11"},
		{"V071", header("typ", "wit+jwt"), "JWT-11"},
		{"V072", header("kid", nil), ""},
		{"V073", token(t, h.with("kid", "other").text(t), c.text(t), stranger), "JWT-26"},
		{"V073 same kid", token(t, h.text(t), c.text(t), stranger), "JWT-25"},
		{"V074", b64([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".", "JWT-06"},
		{"V075", hs256, "JWT-06"},
		{"V076", func() string {
			input := b64([]byte(h.with("alg", "EdDSA").with("kid", "ed").text(t))) + "." + parts[1]
			return input + "." + b64(ed25519.Sign(edKey, []byte(input)))
		}(), "JWT-06"},
		{"V077", header("alg", "ES384"), "JWT-08"},
		{"V078", embedded, "JWT-04"},
		{"V079", header("cty", "JWT"), "JWT-04"},
		{"V080", header("crit", []string{"exp"}), "JWT-04"},
		{"V081", claim("aud", nil), "JWT-13"},
		{"V082", claim("aud", []string{}), "JWT-13"},
		{"V083", claim("aud", []string{"SVC"}), "JWT-14"},
		{"V084", claim("aud", []string{"x", "svc"}), ""},
		{"V085", claim("exp", nil), "JWT-17"},
		{"V086", claim("exp", "1999999999"), "JWT-17"},
		{"V087", claim("exp", now-120), "JWT-18"},
		{"V088", claim("nbf", now+120), "JWT-20"},
		{"V089", claim("sub", webID+"/"), "JWT-12"},
		{"V090", claim("sub", "alice"), "JWT-12"},
		{"V091", raw(`{"sub":"` + webID + `","aud":"svc","exp":` + fmt.Sprint(now+300) + `,"aud":"svc"}`), "JWT-24"},
		{"V092", flattened, "JWT-01"},
		{"V093", good + ".AAAA.AAAA", "JWT-03"},
		{"V094", good + "==", "JWT-25"},

		{"JWT-01 general serialization", `{"payload":"` + parts[1] + `","signatures":[]}`, "JWT-01"},
		{"JWT-01 two parts", parts[0] + "." + parts[1], "JWT-01"},
		{"JWT-01 empty", "", "JWT-01"},
		{"JWT-01 too long", good + strings.Repeat("A", DefaultMaxJWTBytes), "JWT-01"},
		{"JWT-04 private name", header("foo", 1), "JWT-04"},
		{"JWT-04 b64", header("b64", false), "JWT-04"},
		{"JWT-04 zip", header("zip", "DEF"), "JWT-04"},
		{"JWT-04 jku", header("jku", "https://evil.example/"), "JWT-04"},
		{"JWT-04 x5c", header("x5c", []string{"AAAA"}), "JWT-04"},
		{"JWT-06 None", header("alg", "None"), "JWT-06"},
		{"JWT-06 ES256K", header("alg", "ES256K"), "JWT-06"},
		{"JWT-06 RSA-OAEP", header("alg", "RSA-OAEP"), "JWT-06"},
		{"JWT-06 lower case", header("alg", "es256"), "JWT-06"},
		{"JWT-06 empty", header("alg", ""), "JWT-06"},
		{"JWT-06 missing", header("alg", nil), "JWT-06"},
		{"JWT-06 number", header("alg", 1), "JWT-06"},
		{"JWT-25 byte outside the alphabet", b64([]byte(`{"alg":"HS256","crit":1}`)) + ".!", "JWT-25"},
		{"JWT-07 alg before broken payload", b64([]byte(`{"alg":"HS256","crit":1}`)) + ".AAAAA.A", "JWT-06"},
		{"JWT-08 RSA alg on EC key", header("alg", "RS256"), "JWT-08"},
		{"JWT-08 EC alg on RSA key", token(t, h.with("kid", "rsa").text(t), c.text(t), rsaKey), "JWT-08"},
		{"JWT-08 P-384", token(t, h.with("kid", "p384").with("alg", "ES384").text(t), c.text(t), p384), ""},
		{"JWT-08 P-521", token(t, h.with("kid", "p521").with("alg", "ES512").text(t), c.text(t), p521), ""},
		{"JWT-08 RSA", token(t, h.with("kid", "rsa").with("alg", "RS256").text(t), c.text(t), rsaKey), ""},
		{"JWT-08 wrong RSA padding", token(t, h.with("kid", "rsa").with("alg", "PS256").text(t), c.text(t), rsaKey), "JWT-25"},
		{"JWT-08 ed key by kid", token(t, h.with("kid", "ed").text(t), c.text(t), key), "JWT-08"},
		{"JWT-08 symmetric key by kid", token(t, h.with("kid", "hmac").text(t), c.text(t), key), "JWT-08"},
		{"JWT-09 kid is a number", header("kid", 1), "JWT-09"},
		{"JWT-10 no kid, RSA", token(t, `{"alg":"RS256"}`, c.text(t), rsaKey), ""},
		{"JWT-10 no kid, stranger's signature", token(t, `{"alg":"ES256"}`, c.text(t), stranger), "JWT-25"},
		{"JWT-11 empty", header("typ", ""), "JWT-11"},
		{"JWT-11 number", header("typ", 1), "JWT-11"},
		{"JWT-11 null", token(t, `{"alg":"ES256","kid":"k1","typ":null}`, c.text(t), key), "JWT-11"},
		{"JWT-11 at+jwt", header("typ", "at+jwt"), "JWT-11"},
		{"JWT-12 missing", claim("sub", nil), "JWT-12"},
		{"JWT-12 array", claim("sub", []string{webID}), "JWT-12"},
		{"JWT-12 empty", claim("sub", ""), "JWT-12"},
		{"JWT-12 longest", claim("sub", long("spiffe://example.org/", MaxIDBytes)), ""},
		{"JWT-12 too long", claim("sub", long("spiffe://example.org/", MaxIDBytes+1)), "JWT-12"},
		{"DEC-06 path-less", claim("sub", "spiffe://example.org"), "DEC-06"},
		{"JWT-13 empty string", claim("aud", ""), "JWT-13"},
		{"JWT-13 null", raw(`{"sub":"` + webID + `","aud":null,"exp":` + fmt.Sprint(now+300) + `}`), "JWT-13"},
		{"JWT-13 number", claim("aud", 1), "JWT-13"},
		{"JWT-13 number among strings", claim("aud", []any{"svc", 1}), "JWT-13"},
		{"JWT-14 prefix", claim("aud", "svc2"), "JWT-14"},
		{"JWT-14 slash", claim("aud", "svc/"), "JWT-14"},
		{"JWT-17 null", raw(`{"sub":"` + webID + `","aud":"svc","exp":null}`), "JWT-17"},
		{"JWT-17 fraction", claim("exp", json.Number(fmt.Sprintf("%d.5", now+300))), ""},
		{"JWT-17 exponent", claim("exp", json.Number("4e9")), ""},
		{"JWT-17 year 2100", claim("exp", 4102444800), ""},
		{"JWT-17 far too late", claim("exp", json.Number("1e400")), "JWT-17"},
		{"JWT-17 year 10000", claim("exp", maxNumericDate+1), "JWT-17"},
		{"JWT-17 negative", claim("exp", -1), "JWT-17"},
		{"JWT-18 now-61s", claim("exp", now-61), "JWT-18"},
		{"JWT-18 now-30s", claim("exp", now-30), "JWT-18"},
		{"JWT-18 now-29s", claim("exp", now-29), ""},
		{"JWT-18 now-5s", claim("exp", now-5), ""},
		{"JWT-20 within leeway", claim("nbf", now+30), ""},
		{"JWT-20 just outside", claim("nbf", now+31), "JWT-20"},
		{"JWT-20 string", claim("nbf", "1"), "JWT-20"},
		{"JWT-21 iat is no bound", claim("iat", now+600), ""},
		{"JWT-21 iat is a string", claim("iat", "1"), "JWT-21"},
		{"JWT-22 jti", claim("jti", "a"), ""},
		{"JWT-22 jti is a number", claim("jti", 1), "JWT-22"},
		{"JWT-23 private claim", claim("https://example.org/x", object{"a": []int{1}}), ""},
		{"JWT-24 header member twice", token(t, `{"alg":"ES256","kid":"k1","alg":"ES256"}`, c.text(t), key), "JWT-24"},
		{"JWT-24 nested claim twice", raw(`{"x":{"y":1,"y":2},"sub":"` + webID + `","aud":"svc","exp":` + fmt.Sprint(now+300) + `}`), "JWT-24"},
		{"JWT-24 twice by escape", raw(`{"aud":"x","\u0061ud":"svc","sub":"` + webID + `","exp":` + fmt.Sprint(now+300) + `}`), "JWT-24"},
		{"JWT-25 line break", parts[0] + ".\n" + parts[1] + "." + parts[2], "JWT-25"},
		{"JWT-25 leading space", " " + good, "JWT-25"},
		{"JWT-25 standard alphabet", parts[0] + "." + parts[1] + ".+" + parts[2][1:], "JWT-25"},
		{"JWT-25 other spelling of the signature", parts[0] + "." + parts[1] + "." + parts[2][:len(parts[2])-1] + nextSpelling(parts[2]), "JWT-25"},
		{"JWT-25 no signature", parts[0] + "." + parts[1] + ".", "JWT-25"},
		{"JWT-25 other payload", parts[0] + "." + b64([]byte(c.with("sub", "spiffe://example.org/admin").text(t))) + "." + parts[2], "JWT-25"},
		{"JWT-25 payload is no object", raw(`["a"]`), "JWT-25"},
		{"JWT-25 payload is two values", raw(c.text(t) + `{}`), "JWT-25"},
		{"JWT-25 payload is not UTF-8", raw("{\"x\":\"\xff\"}"), "JWT-25"},
		{"JWT-26 domain without bundle", claim("sub", "spiffe://unknown.org/w"), "JWT-26"},
		{"JWT-26 key of the wrong domain", claim("sub", "spiffe://other.org/w"), "JWT-25"},
		{"JWT-29 domain without keys", token(t, `{"alg":"ES256"}`, c.with("sub", "spiffe://empty.org/w").text(t), key), "JWT-29"},
		{"JWT-34 Exp", with(h, c.with("exp", nil).with("Exp", now+300)), "JWT-17"},
		{"JWT-34 AUD", with(h, c.with("aud", nil).with("AUD", "svc")), "JWT-13"},
		{"JWT-34 Alg", token(t, `{"Alg":"ES256","kid":"k1"}`, c.text(t), key), "JWT-06"},
		{"TDB-21 deep", raw(`{"x":` + strings.Repeat("[", 20) + strings.Repeat("]", 20) + `}`), "JWT-25"},
	} {
		t.Run(v.name, func(t *testing.T) {
			svid, err := ValidateJWTSVID(v.token, bundles, []string{"svc"}, JWTOptions{Now: testNow})
			wantRow(t, "ValidateJWTSVID", err, v.row)
			if (svid == nil) != (err != nil) {
				t.Fatalf("ValidateJWTSVID returned %+v and %v", svid, err)
			}
			if err == nil && (!svid.ID.MemberOf(exampleOrg) || svid.KeyID == "" || svid.Expiry.IsZero()) {
				t.Errorf("ValidateJWTSVID returned %+v", svid)
			}
		})
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// nextSpelling returns a last character that a lenient decoder reads like the one of s.
func nextSpelling(s string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return alphabet[strings.IndexByte(alphabet, s[len(s)-1])+1:][:1]
}

func TestJWTSVIDFields(t *testing.T) {
	key := newKey(t, elliptic.P256())
	now := testNow.Unix()
	claims := goodClaims().with("aud", []string{"a", "svc"}).with("iat", now-10).with("jti", "one").with("big", json.Number("9007199254740993"))
	signed := token(t, goodHeader().with("kid", nil).text(t), claims.text(t), key)
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"k1": key.Public()})
	for range 2 { // JWT-22: jti is not for replay protection
		svid, err := ValidateJWTSVID(signed, bundles, []string{"x", "svc"}, JWTOptions{Now: testNow})
		if err != nil {
			t.Fatal(err)
		}
		if svid.ID.String() != webID || !slices.Equal(svid.Audience, []string{"a", "svc"}) || svid.KeyID != "k1" || svid.JTI != "one" ||
			!svid.Expiry.Equal(time.Unix(now+300, 0)) || !svid.IssuedAt.Equal(time.Unix(now-10, 0)) || svid.Claims["big"] != json.Number("9007199254740993") {
			t.Errorf("ValidateJWTSVID = %+v", svid)
		}
	}
}

func TestJWT_15_NoAudienceNoValidation(t *testing.T) {
	key := newKey(t, elliptic.P256())
	signed := token(t, goodHeader().text(t), goodClaims().text(t), key)
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"k1": key.Public()})
	for _, audience := range [][]string{nil, {}, {""}, {"svc", ""}} {
		_, err := ValidateJWTSVID(signed, bundles, audience, JWTOptions{Now: testNow})
		wantRow(t, fmt.Sprintf("audience %q", audience), err, "JWT-15")
	}
	_, err := ValidateJWTSVID(signed, nil, []string{"svc"}, JWTOptions{Now: testNow})
	wantRow(t, "no bundles", err, "JWT-26")
}

func TestDEC_17_Leeway(t *testing.T) {
	key := newKey(t, elliptic.P256())
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"k1": key.Public()})
	signed := token(t, goodHeader().text(t), goodClaims().with("exp", testNow.Unix()-45).text(t), key)
	for leeway, row := range map[time.Duration]string{
		0: "JWT-18", 30 * time.Second: "JWT-18", 60 * time.Second: "", 61 * time.Second: "DEC-17", -time.Second: "DEC-17",
	} {
		_, err := ValidateJWTSVID(signed, bundles, []string{"svc"}, JWTOptions{Now: testNow, Leeway: leeway})
		wantRow(t, fmt.Sprintf("leeway %v", leeway), err, row)
	}
}

func TestDEC_05_AllowUnknownHeaders(t *testing.T) {
	key := newKey(t, elliptic.P256())
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"k1": key.Public()})
	for name, row := range map[string]string{
		"foo": "", "cty": "", "x5t": "", "b64": "JWT-04", "crit": "JWT-04", "jku": "JWT-04", "jwk": "JWT-04", "x5c": "JWT-04", "x5u": "JWT-04",
	} {
		signed := token(t, goodHeader().with(name, "x").text(t), goodClaims().text(t), key)
		_, err := ValidateJWTSVID(signed, bundles, []string{"svc"}, JWTOptions{Now: testNow, AllowUnknownHeaders: true})
		wantRow(t, "header "+name, err, row)
	}
}

func TestDEC_06_AllowPathless(t *testing.T) {
	key := newKey(t, elliptic.P256())
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"k1": key.Public()})
	signed := token(t, goodHeader().text(t), goodClaims().with("sub", "spiffe://example.org").text(t), key)
	svid, err := ValidateJWTSVID(signed, bundles, []string{"svc"}, JWTOptions{Now: testNow, AllowPathless: true})
	if err != nil || svid.ID != exampleOrg.ID() {
		t.Errorf("path-less subject, allowed: %+v, %v", svid, err)
	}
}

func TestJWTMaxBytes(t *testing.T) {
	key := newKey(t, elliptic.P256())
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"k1": key.Public()})
	signed := token(t, goodHeader().text(t), goodClaims().text(t), key)
	for maxBytes, row := range map[int]string{len(signed): "", len(signed) - 1: "JWT-01"} {
		_, err := ValidateJWTSVID(signed, bundles, []string{"svc"}, JWTOptions{Now: testNow, MaxBytes: maxBytes})
		wantRow(t, fmt.Sprintf("limit %d for %d bytes", maxBytes, len(signed)), err, row)
	}
}

func TestJWT_08_RSAKeySizes(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0")
	small := must(rsa.GenerateKey(rand.Reader, 1024))
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"small": small.Public()})
	for header, row := range map[string]string{`{"alg":"RS256","kid":"small"}`: "JWT-08", `{"alg":"RS256"}`: "JWT-08"} {
		_, err := ValidateJWTSVID(token(t, header, goodClaims().text(t), small), bundles, []string{"svc"}, JWTOptions{Now: testNow})
		wantRow(t, header, err, row)
	}
}

// A token without kid must not make a validator check a thousand signatures.
func TestJWT_10_KeysTriedAreBounded(t *testing.T) {
	key := newKey(t, elliptic.P256())
	keys := map[string]crypto.PublicKey{"last": key.Public()}
	for i := range maxKeysTried - 1 {
		keys[fmt.Sprint(i)] = newKey(t, elliptic.P256()).Public()
	}
	signed := token(t, `{"alg":"ES256"}`, goodClaims().text(t), key)
	svid, err := ValidateJWTSVID(signed, jwtBundles("example.org", keys), []string{"svc"}, JWTOptions{Now: testNow})
	if err != nil || svid.KeyID != "last" {
		t.Errorf("with %d keys: %+v, %v", len(keys), svid, err)
	}
	keys = maps.Clone(keys)
	keys["one too many"] = newKey(t, elliptic.P256()).Public()
	_, err = ValidateJWTSVID(signed, jwtBundles("example.org", keys), []string{"svc"}, JWTOptions{Now: testNow})
	wantRow(t, fmt.Sprintf("with %d keys", len(keys)), err, "JWT-10")
}

// All nine algorithms, signed by go-jose.
func TestJWT_05_AllAlgorithms(t *testing.T) {
	keys := map[string]crypto.Signer{"R": testRSAKey(), "P": testRSAKey(), "ES256": newKey(t, elliptic.P256()), "ES384": newKey(t, elliptic.P384()), "ES512": newKey(t, elliptic.P521())}
	for _, alg := range jwtAlgorithms {
		key, found := keys[alg]
		if !found {
			key = keys[alg[:1]]
		}
		signer := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil))
		signed := must(must(signer.Sign([]byte(goodClaims().text(t)))).CompactSerialize())
		_, err := ValidateJWTSVID(signed, jwtBundles("example.org", map[string]crypto.PublicKey{"k": key.Public()}), []string{"svc"}, JWTOptions{Now: testNow})
		wantRow(t, alg, err, "")
	}
}

// Nothing without a good signature is accepted: the fuzzer has no key, so whatever passes must be the one token that we
// signed, byte for byte.
func FuzzValidateJWTSVID(f *testing.F) {
	key := newKey(f, elliptic.P256())
	good := token(f, goodHeader().text(f), goodClaims().text(f), key)
	parts := strings.Split(good, ".")
	bundles := jwtBundles("example.org", map[string]crypto.PublicKey{"k1": key.Public(), "rsa": testRSAKey().Public()})
	f.Add(good)
	f.Add(b64([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".")
	f.Add(b64([]byte(`{"alg":"ES256"}`)) + "." + parts[1] + "." + parts[2])
	f.Add(good + "\n")
	f.Fuzz(func(t *testing.T, s string) {
		for _, candidate := range []string{s, b64([]byte(s)) + "." + parts[1] + "." + parts[2], parts[0] + "." + b64([]byte(s)) + "." + parts[2]} {
			svid, err := ValidateJWTSVID(candidate, bundles, []string{"svc"}, JWTOptions{Now: testNow, AllowUnknownHeaders: true})
			if err == nil && candidate != good {
				t.Errorf("accepted %q as %+v", candidate, svid)
			}
			if err != nil && RowOf(err) == "" {
				t.Errorf("error %v has no row", err)
			}
			InspectJWTSVID(candidate, testNow)
		}
	})
}
