package spiffe

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A witCase is a WIT-SVID in the making: as an issuer would make it, until a test changes it.
type witCase struct {
	header  object
	claims  object
	signKey *ecdsa.PrivateKey
}

func signWIT(t testing.TB, c witCase) string {
	t.Helper()
	return token(t, c.header.text(t), c.claims.text(t), c.signKey)
}

func publicJWK(t testing.TB, key any, alg string) object {
	t.Helper()
	doc, err := jose.JSONWebKey{Key: key, Algorithm: alg}.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var members object
	if err := json.Unmarshal(doc, &members); err != nil {
		t.Fatal(err)
	}
	return members
}

// TestCheckIssuedWITSVID is about what a holder takes from its CA. The rows are those of the format.
func TestCheckIssuedWITSVID(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://example.org/w")
	authority, holder, other := newKey(t, elliptic.P256()), newKey(t, elliptic.P256()), newKey(t, elliptic.P256())
	keys := map[string]crypto.PublicKey{"w1": authority.Public(), "w2": other.Public()}
	for name, test := range map[string]struct {
		change func(*witCase)
		row    string
	}{
		"as issued":                     {func(*witCase) {}, ""},
		"V097 no kid":                   {func(c *witCase) { delete(c.header, "kid") }, "WIT-02"},
		"empty kid":                     {func(c *witCase) { c.header["kid"] = "" }, "WIT-02"},
		"kid in another case":           {func(c *witCase) { c.header["kid"] = "W1" }, "WIT-51"},
		"V098 typ JWT":                  {func(c *witCase) { c.header["typ"] = "JWT" }, "WIT-04"},
		"V099 typ application/wit+jwt":  {func(c *witCase) { c.header["typ"] = "application/wit+jwt" }, "WIT-04"},
		"no typ":                        {func(c *witCase) { delete(c.header, "typ") }, "WIT-04"},
		"alg none":                      {func(c *witCase) { c.header["alg"] = "none" }, "JWT-06"},
		"alg EdDSA":                     {func(c *witCase) { c.header["alg"] = "EdDSA" }, "JWT-06"},
		"alg of another key":            {func(c *witCase) { c.header["alg"] = "ES384" }, "JWT-08"},
		"a header more":                 {func(c *witCase) { c.header["jku"] = "https://x.example" }, "WIT-06"},
		"another ID":                    {func(c *witCase) { c.claims["sub"] = "spiffe://example.org/w2" }, "WIT-08"},
		"no sub":                        {func(c *witCase) { delete(c.claims, "sub") }, "WIT-08"},
		"V100 aud":                      {func(c *witCase) { c.claims["aud"] = "svc" }, "WIT-21"},
		"V100 aud []":                   {func(c *witCase) { c.claims["aud"] = []string{} }, "WIT-21"},
		"aud null":                      {func(c *witCase) { c.claims["aud"] = nil }, "WIT-21"},
		"no exp":                        {func(c *witCase) { delete(c.claims, "exp") }, "WIT-16"},
		"exp is text":                   {func(c *witCase) { c.claims["exp"] = "soon" }, "WIT-16"},
		"expired":                       {func(c *witCase) { c.claims["exp"] = testNow.Unix() }, "WIT-16"},
		"nbf is text":                   {func(c *witCase) { c.claims["nbf"] = "now" }, "WIT-17"},
		"V101 no cnf":                   {func(c *witCase) { delete(c.claims, "cnf") }, "WIT-10"},
		"V101 cnf.kid":                  {func(c *witCase) { c.claims["cnf"] = object{"kid": "x"} }, "WIT-10"},
		"cnf for another key":           {func(c *witCase) { c.claims["cnf"] = object{"jwk": publicJWK(t, other.Public(), "ES256")} }, "WIT-10"},
		"V102 cnf without alg":          {func(c *witCase) { c.claims["cnf"] = object{"jwk": publicJWK(t, holder.Public(), "")} }, "WIT-11"},
		"V104 cnf with alg RS256":       {func(c *witCase) { c.claims["cnf"] = object{"jwk": publicJWK(t, holder.Public(), "RS256")} }, "WIT-12"},
		"V105 cnf with the private key": {func(c *witCase) { c.claims["cnf"] = object{"jwk": publicJWK(t, holder, "ES256")} }, "WIT-13"},
		"signed by another key":         {func(c *witCase) { c.signKey = other }, "WIT-01"},
	} {
		t.Run(name, func(t *testing.T) {
			c := witCase{
				header:  object{"alg": "ES256", "kid": "w1", "typ": "wit+jwt"},
				claims:  object{"sub": id.String(), "exp": testNow.Add(time.Hour).Unix(), "nbf": testNow.Add(-time.Minute).Unix(), "cnf": object{"jwk": publicJWK(t, holder.Public(), "ES256")}},
				signKey: authority,
			}
			test.change(&c)
			token := signWIT(t, c)
			issued, err := CheckIssuedWITSVID(token, id, holder.Public(), keys, testNow)
			wantRow(t, "CheckIssuedWITSVID", err, test.row)
			if err != nil {
				if strings.Contains(err.Error(), token) {
					t.Error("the error repeats the token")
				}
				return
			}
			if issued.KeyID != "w1" || !issued.Expiry.Equal(testNow.Add(time.Hour)) || !issued.NotBefore.Equal(testNow.Add(-time.Minute)) {
				t.Errorf("it says %+v", issued)
			}
		})
	}
}

func TestWAPI_77_MarshalWITJWKS(t *testing.T) {
	none, err := MarshalWITJWKS(nil)
	if err != nil || string(none) != `{"keys":[]}` {
		t.Errorf("no key: %s (%v)", none, err)
	}
	a, b := newKey(t, elliptic.P256()), newKey(t, elliptic.P384())
	doc, err := MarshalWITJWKS(map[string]crypto.PublicKey{"b": b.Public(), "a": a.Public()})
	if err != nil {
		t.Fatal(err)
	}
	parsed, _, err := ParseBundle(exampleOrg, doc)
	if err != nil {
		t.Fatal(err)
	}
	if len(parsed.WITAuthorities()) != 2 || len(parsed.JWTAuthorities()) != 0 {
		t.Errorf("%s holds %d WIT and %d JWT authorities", doc, len(parsed.WITAuthorities()), len(parsed.JWTAuthorities()))
	}
	if _, err := MarshalWITJWKS(map[string]crypto.PublicKey{"a": a}); err == nil {
		t.Error("a private key was written")
	}
	if _, err := MarshalWITKey(b); err == nil {
		t.Error("a key on P-384 was written as one for ES256")
	}
}

func FuzzCheckIssuedWITSVID(f *testing.F) {
	authority, holder := newKey(f, elliptic.P256()), newKey(f, elliptic.P256())
	id := spiffeid.RequireFromString("spiffe://example.org/w")
	keys := map[string]crypto.PublicKey{"w1": authority.Public()}
	c := witCase{
		header: object{"alg": "ES256", "kid": "w1", "typ": "wit+jwt"}, signKey: authority,
		claims: object{"sub": id.String(), "exp": testNow.Add(time.Hour).Unix(), "cnf": object{"jwk": publicJWK(f, holder.Public(), "ES256")}},
	}
	good := signWIT(f, c)
	f.Add(good)
	f.Add("..")
	f.Add("e30.e30.")
	f.Fuzz(func(t *testing.T, token string) {
		if _, err := CheckIssuedWITSVID(token, id, holder.Public(), keys, testNow); err == nil && token != good {
			// Another signature over the same claims is the same token's; nothing else may pass.
			if cut := strings.LastIndexByte(token, '.'); token[:cut] != good[:strings.LastIndexByte(good, '.')] {
				t.Errorf("%q passes", token)
			}
		}
	})
}
