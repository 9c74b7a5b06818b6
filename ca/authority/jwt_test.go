package authority

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/signet-id/signet/spiffe"
)

// token signs, holds what is true of every JWT-SVID, and returns header and claims.
func token(t *testing.T, s *Set, r JWTRequest) (svid *JWTSVID, header, payload map[string]any) {
	t.Helper()
	svid, err := s.SignJWT(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := spiffe.ValidateJWTSVID(svid.Token, s, r.Audience[:1], spiffe.JWTOptions{Now: s.config.Now()})
	if err != nil || got.ID != r.ID {
		t.Errorf("signet validates the token of %q as %v, %v", r.ID, got, err)
	}
	parts := strings.Split(svid.Token, ".")
	if len(parts) != 3 {
		t.Fatalf("the token has %d parts, want 3", len(parts))
	}
	for i, into := range []*map[string]any{&header, &payload} {
		raw, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(raw, into); err != nil {
			t.Fatal(err)
		}
	}
	if float64(svid.Expiry.Unix()) != payload["exp"] || float64(svid.IssuedAt.Unix()) != payload["iat"] {
		t.Errorf("SVID says %v to %v, token says %v to %v", svid.IssuedAt, svid.Expiry, payload["iat"], payload["exp"])
	}
	return svid, header, payload
}

func webToken(t *testing.T) JWTRequest {
	return JWTRequest{ID: mustID(t, "/web"), Audience: []string{"db"}}
}

func TestJWT_01_02_03_CompactSerialization(t *testing.T) {
	svid, _, _ := token(t, openSet(t), webToken(t))
	if strings.Count(svid.Token, ".") != 2 || strings.ContainsAny(svid.Token, "{}=\n ") {
		t.Errorf("token %q is not a JWS in compact serialization", svid.Token)
	}
}

func TestJWT_04_05_10_11_HeaderIsAlgKidTyp(t *testing.T) {
	s := openSet(t)
	svid, header, _ := token(t, s, webToken(t))
	want := map[string]any{"alg": "ES256", "kid": svid.KeyID, "typ": "JWT"}
	if !maps.Equal(header, want) {
		t.Errorf("header %v, want %v", header, want)
	}
	if s.Bundle().JWT[0].KeyID != svid.KeyID {
		t.Errorf("kid %q is not in the bundle", svid.KeyID)
	}
}

func TestJWT_12_SubjectIsTheID(t *testing.T) {
	s := openSet(t)
	_, _, claims := token(t, s, webToken(t))
	if claims["sub"] != "spiffe://example.org/web" {
		t.Errorf("sub is %v", claims["sub"])
	}
	token(t, s, JWTRequest{ID: mustID(t, "/"+strings.Repeat("a", spiffe.MaxIDBytes-len("spiffe://example.org/"))), Audience: []string{"db"}})
}

func TestJWT_13_16_AudienceIsRequiredAndBounded(t *testing.T) {
	s := openSet(t, func(c *Config) { c.MaxAudiences = 5 })
	for _, tt := range []struct {
		name     string
		audience []string
		want     string
	}{
		{"none", nil, "no audience"},
		{"empty", []string{""}, "empty audience"},
		{"one empty", []string{"db", ""}, "empty audience"},
		{"too many", []string{"a", "b", "c", "d", "e", "f"}, "max_audiences, 5"},
		{"too long", []string{strings.Repeat("a", maxAudienceBytes+1)}, "2049 bytes"},
		{"too long together", slices.Repeat([]string{strings.Repeat("a", maxAudienceBytes)}, 5), "10240 bytes together"},
		{"not UTF-8", []string{"a\xff"}, "not UTF-8"},
	} {
		r := webToken(t)
		r.Audience = tt.audience
		if _, err := s.SignJWT(t.Context(), r); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: SignJWT = %v, want a refusal with %q", tt.name, err, tt.want)
		}
	}
	for _, audience := range [][]string{{"db"}, {"a", "b"}, {"<&>\u2028\"\\\n"}, {"Datenbank-ü"}} {
		r := webToken(t)
		r.Audience = audience
		_, _, claims := token(t, s, r)
		got, ok := claims["aud"].([]any)
		if !ok || !slices.EqualFunc(got, audience, func(a any, b string) bool { return a == b }) {
			t.Errorf("aud is %q, want the array %q", claims["aud"], audience)
		}
	}
}

func TestJWT_17_19_ExpiryIsSetAndCapped(t *testing.T) {
	at := newClock(testNow)
	s := openSet(t, func(c *Config) { c.Now = at.now })
	end := s.Bundle().JWT[0].ExpiresAt
	for _, tt := range []struct {
		name string
		at   time.Time
		ttl  time.Duration
		want time.Time
	}{
		{"default", testNow, 0, testNow.Add(5 * time.Minute)},
		{"asked", testNow, 90 * time.Second, testNow.Add(90 * time.Second)},
		{"below a second", testNow, time.Nanosecond, testNow.Add(time.Second)},
		{"over the maximum", testNow, 100 * time.Hour, testNow.Add(time.Hour)},
		{"over the key", end.Add(-time.Minute), time.Hour, end},
	} {
		at.set(tt.at)
		r := webToken(t)
		r.TTL = tt.ttl
		svid, _, _ := token(t, s, r)
		if !svid.Expiry.Equal(tt.want.Truncate(time.Second)) {
			t.Errorf("%s: exp %v, want %v", tt.name, svid.Expiry, tt.want)
		}
	}
	at.set(end)
	if _, err := s.SignJWT(t.Context(), webToken(t)); !errors.Is(err, ErrExpired) {
		t.Errorf("SignJWT at the key's end = %v, want ErrExpired", err)
	}
	at.set(testNow)
	for ttl, want := range map[time.Duration]string{0: "", time.Hour: "", time.Hour + 1: "longer than the maximum", -1: "negative"} {
		if err := s.CheckJWTTTL(ttl); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("CheckJWTTTL(%v) = %v, want %q", ttl, err, want)
		}
	}
}

func TestJWT_21_ValidatorWithALateClockAccepts(t *testing.T) {
	s := openSet(t)
	svid, _, claims := token(t, s, webToken(t))
	for _, claim := range []string{"iat", "nbf"} {
		if claims[claim] != float64(testNow.Add(-jwtBackdate).Unix()) {
			t.Errorf("%s is %v, want %v before the issuance", claim, claims[claim], jwtBackdate)
		}
	}
	parsed, err := jwt.ParseSigned(svid.Token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	var standard jwt.Claims
	if err := parsed.Claims(s.Bundle().JWT[0].PublicKey, &standard); err != nil {
		t.Fatal(err)
	}
	if err := standard.ValidateWithLeeway(jwt.Expected{Time: testNow.Add(-4 * time.Second)}, 0); err != nil {
		t.Errorf("a validator 4 seconds late, without leeway: %v", err)
	}
}

func TestJWT_22_JTIOnRequest(t *testing.T) {
	s := openSet(t)
	svid, _, claims := token(t, s, webToken(t))
	if _, there := claims["jti"]; there || svid.JTI != "" {
		t.Errorf("jti %v is there and nobody asked", claims["jti"])
	}
	r := webToken(t)
	r.IncludeJTI = true
	a, _, claims := token(t, s, r)
	b, _, _ := token(t, s, r)
	if len(a.JTI) != 32 || a.JTI == b.JTI || claims["jti"] != a.JTI {
		t.Errorf("jti %q and %q, in the token %v; want two different of 32 digits", a.JTI, b.JTI, claims["jti"])
	}
}

func TestJWTIssuerIsConfigured(t *testing.T) {
	_, _, claims := token(t, openSet(t), webToken(t))
	if _, there := claims["iss"]; there {
		t.Errorf("iss is %v and none is configured", claims["iss"])
	}
	_, _, claims = token(t, openSet(t, func(c *Config) { c.Issuer = "https://oidc.example.org" }), webToken(t))
	if claims["iss"] != "https://oidc.example.org" {
		t.Errorf("iss is %v", claims["iss"])
	}
}

func TestJWTRequestsAreRefused(t *testing.T) {
	s := openSet(t)
	for _, tt := range []struct {
		name   string
		change func(*JWTRequest)
		want   string
	}{
		{"no ID", func(r *JWTRequest) { r.ID = spiffeid.ID{} }, "no SPIFFE ID"},
		{"no path", func(r *JWTRequest) { r.ID = testTD.ID() }, "has no path"},
		{"foreign", func(r *JWTRequest) { r.ID = spiffeid.RequireFromString("spiffe://example.com/web") }, "not in trust domain"},
		{"reserved", func(r *JWTRequest) { r.ID = mustID(t, "/spire/server") }, "reserved"},
		{"negative TTL", func(r *JWTRequest) { r.TTL = -time.Second }, "negative"},
	} {
		r := webToken(t)
		tt.change(&r)
		if _, err := s.SignJWT(t.Context(), r); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: SignJWT = %v, want a refusal with %q", tt.name, err, tt.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.SignJWT(ctx, webToken(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("SignJWT with an ended context = %v", err)
	}
}

func TestJWT_32_KeyIsPublishedBeforeItSignsAndAfterwards(t *testing.T) {
	f := follow(t)
	first := f.jwtKey()
	inBundle := func(kid string) bool {
		return slices.ContainsFunc(f.set.Bundle().JWT, func(a JWTAuthority) bool { return a.KeyID == kid })
	}
	early, _, _ := token(t, f.set, webToken(t))
	writes, second := f.newJWT()
	f.must(f.commit(writes...))
	if !inBundle(strings.TrimPrefix(second, keyJWTPrefix)) {
		t.Error("a prepared JWT authority is not in the bundle")
	}
	if svid, _, _ := token(t, f.set, webToken(t)); keyJWTPrefix+svid.KeyID != first {
		t.Error("a prepared JWT authority signs")
	}
	f.must(f.commit(f.moved(first, StateOld), f.moved(second, StateActive)))
	if svid, _, _ := token(t, f.set, webToken(t)); keyJWTPrefix+svid.KeyID != second {
		t.Error("an active JWT authority does not sign")
	}
	valid := func() error {
		_, err := spiffe.ValidateJWTSVID(early.Token, f.set, []string{"db"}, spiffe.JWTOptions{Now: testNow})
		return err
	}
	if err := valid(); err != nil || !inBundle(early.KeyID) {
		t.Errorf("a token of an old authority does not verify: %v", err)
	}
	f.must(f.commit(f.moved(first, StateTainted)))
	if err := valid(); err != nil {
		t.Errorf("a token of a tainted authority does not verify: %v", err)
	}
	f.must(f.commit(f.moved(first, StateRevoked)))
	if err := valid(); err == nil || inBundle(early.KeyID) {
		t.Error("a token of a revoked authority verifies")
	}
}

func TestGoSPIFFEValidatesTokens(t *testing.T) {
	s := openSet(t, func(c *Config) { c.Now = time.Now }) // go-spiffe has no clock to set
	svid, err := s.SignJWT(t.Context(), webToken(t))
	if err != nil {
		t.Fatal(err)
	}
	got, err := jwtsvid.ParseAndValidate(svid.Token, s, []string{"db"})
	if err != nil || got.ID != mustID(t, "/web") {
		t.Errorf("go-spiffe validates the token as %v, %v", got, err)
	}
}
