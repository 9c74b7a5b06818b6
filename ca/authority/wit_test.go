package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/spiffe"
)

// withWIT switches WIT-SVIDs on, at the time of the machine, which go-spiffe goes by.
func withWIT(c *Config) { c.WIT.Enabled, c.Now = true, time.Now }

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// witToken signs a WIT-SVID for key, lets go-spiffe verify it, and returns header and claims.
func witToken(t *testing.T, s *Set, r WITRequest) (svid *WITSVID, header, claims map[string]any) {
	t.Helper()
	svid, err := s.SignWIT(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := witsvid.ParseAndValidate(svid.Token, s.Bundle().SPIFFE().WITBundle())
	if err != nil || got.ID != r.ID || !got.Expiry.Equal(svid.Expiry) {
		t.Errorf("go-spiffe validates the WIT-SVID of %q as %v, %v", r.ID, got, err)
	}
	parts := strings.Split(svid.Token, ".")
	if len(parts) != 3 {
		t.Fatalf("the token has %d parts, want 3", len(parts))
	}
	for i, into := range []*map[string]any{&header, &claims} {
		raw, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(raw, into); err != nil {
			t.Fatal(err)
		}
	}
	return svid, header, claims
}

func webWIT(t *testing.T, key crypto.PublicKey, alg string) WITRequest {
	return WITRequest{ID: mustID(t, "/web"), PublicKey: key, Algorithm: alg}
}

func TestWIT_01_02_04_05_06_HeaderIsAlgKidTyp(t *testing.T) {
	s := openSet(t, withWIT)
	svid, header, _ := witToken(t, s, webWIT(t, ecKey(t, elliptic.P256()).Public(), "ES256"))
	if want := (map[string]any{"alg": "ES256", "kid": svid.KeyID, "typ": "wit+jwt"}); !maps.Equal(header, want) {
		t.Errorf("header %v, want %v", header, want)
	}
	if b := s.Bundle(); len(b.WIT) != 1 || b.WIT[0].KeyID != svid.KeyID {
		t.Errorf("kid %q is not that of the WIT authority in the bundle, %v", svid.KeyID, b.WIT)
	}
}

func TestWIT_08_09_10_14_16_21_Claims(t *testing.T) {
	s := openSet(t, withWIT)
	key := ecKey(t, elliptic.P256())
	svid, _, claims := witToken(t, s, webWIT(t, key.Public(), "ES256"))
	if got := slices.Sorted(maps.Keys(claims)); !slices.Equal(got, []string{"cnf", "exp", "iat", "jti", "nbf", "sub"}) {
		t.Errorf("claims %v, want no aud and no iss", got)
	}
	if claims["sub"] != "spiffe://example.org/web" || claims["exp"] != float64(svid.Expiry.Unix()) || claims["iat"] != float64(svid.IssuedAt.Unix()) {
		t.Errorf("claims %v, SVID says %v to %v", claims, svid.IssuedAt, svid.Expiry)
	}
	if jti, _ := claims["jti"].(string); len(jti) != 32 || jti != svid.JTI {
		t.Errorf("jti %q, want 128 bits in hexadecimal and the %q that is returned", jti, svid.JTI)
	}
	again, _, _ := witToken(t, s, webWIT(t, key.Public(), "ES256"))
	if again.JTI == svid.JTI {
		t.Errorf("two WIT-SVIDs have the jti %s", again.JTI)
	}
}

func TestWIT_11_12_13_ConfirmationKeyIsPublicAndNamesItsAlgorithm(t *testing.T) {
	s := openSet(t, withWIT)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		key  crypto.Signer
		algs []string
		want []string
	}{
		{ecKey(t, elliptic.P256()), []string{"ES256"}, []string{"alg", "crv", "kty", "x", "y"}},
		{ecKey(t, elliptic.P384()), []string{"ES384"}, []string{"alg", "crv", "kty", "x", "y"}},
		{ecKey(t, elliptic.P521()), []string{"ES512"}, []string{"alg", "crv", "kty", "x", "y"}},
		{rsaKey, []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}, []string{"alg", "e", "kty", "n"}},
	} {
		for _, alg := range []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "none", "", "es256"} {
			r := webWIT(t, tt.key.Public(), alg)
			if !slices.Contains(tt.algs, alg) {
				if _, err := s.SignWIT(t.Context(), r); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "signing_algorithm") {
					t.Errorf("%T with algorithm %q: %v, want a refusal that names signing_algorithm", tt.key, alg, err)
				}
				continue
			}
			_, _, claims := witToken(t, s, r)
			cnf, _ := claims["cnf"].(map[string]any)
			jwk, _ := cnf["jwk"].(map[string]any)
			if len(cnf) != 1 || jwk["alg"] != alg || !slices.Equal(slices.Sorted(maps.Keys(jwk)), tt.want) {
				t.Errorf("%T with %s: cnf %v, want a jwk with %v and nothing else", tt.key, alg, cnf, tt.want)
			}
		}
	}
}

func TestWITIsRefused(t *testing.T) {
	s := openSet(t, withWIT)
	good := ecKey(t, elliptic.P256()).Public()
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*WITRequest)
	}{
		{"no ID", func(r *WITRequest) { r.ID = WITRequest{}.ID }},
		{"the trust domain's own ID", func(r *WITRequest) { r.ID = s.config.TrustDomain.ID() }},
		{"an agent's ID", func(r *WITRequest) { r.ID = mustID(t, "/spire/agent/x") }},
		{"no key", func(r *WITRequest) { r.PublicKey = nil }},
		{"a weak key", func(r *WITRequest) { r.PublicKey = ecKey(t, elliptic.P224()).Public() }},
		{"an Ed25519 key", func(r *WITRequest) { r.PublicKey, r.Algorithm = edwards, "EdDSA" }},
		{"a private key", func(r *WITRequest) { r.PublicKey = ecKey(t, elliptic.P256()) }},
		{"a negative TTL", func(r *WITRequest) { r.TTL = -time.Second }},
	} {
		r := webWIT(t, good, "ES256")
		tt.change(&r)
		if _, err := s.SignWIT(t.Context(), r); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: SignWIT = %v, want a refusal", tt.name, err)
		}
	}
}

func TestWITValidityIsBounded(t *testing.T) {
	s := openSet(t, withWIT, func(c *Config) { c.WIT.DefaultTTL, c.WIT.MaxTTL, c.WIT.Lifetime = time.Hour, 2*time.Hour, 3*time.Hour })
	key := ecKey(t, elliptic.P256()).Public()
	now := s.config.Now()
	for _, tt := range []struct{ ttl, want time.Duration }{{0, time.Hour}, {time.Minute, time.Minute}, {5 * time.Hour, 2 * time.Hour}} {
		r := webWIT(t, key, "ES256")
		r.TTL = tt.ttl
		svid, err := s.SignWIT(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if got := svid.Expiry.Sub(now); got > tt.want || got < tt.want-2*time.Second {
			t.Errorf("a TTL of %v gives %v, want %v", tt.ttl, got, tt.want)
		}
	}
	if err := s.CheckWITTTL(3 * time.Hour); err == nil || !strings.Contains(err.Error(), "longer than the maximum") {
		t.Errorf("CheckWITTTL of more than the maximum = %v", err)
	}
}

func TestWIT_20_IssuerForDiscoveryRefused(t *testing.T) {
	for _, issuer := range []string{"https://id.example.org", "HTTPS://id.example.org"} {
		if err := (WITConfig{Enabled: true, Issuer: issuer}).Check(); err == nil || !strings.Contains(err.Error(), "wit.issuer") {
			t.Errorf("issuer %q: %v, want a refusal", issuer, err)
		}
	}
	s := openSet(t, withWIT, func(c *Config) { c.WIT.Issuer = "urn:example:workloads" })
	if _, _, claims := witToken(t, s, webWIT(t, ecKey(t, elliptic.P256()).Public(), "ES256")); claims["iss"] != "urn:example:workloads" {
		t.Errorf("iss is %v", claims["iss"])
	}
}

func TestWIT_03_50_53_OwnKeysInTheBundle(t *testing.T) {
	s := openSet(t, withWIT)
	doc, err := spiffe.MarshalBundle(s.Bundle().SPIFFE())
	if err != nil {
		t.Fatal(err)
	}
	var parsed struct {
		Keys []struct {
			Use, Kid, Kty, X, Y string
		}
	}
	if err := json.Unmarshal(doc, &parsed); err != nil {
		t.Fatal(err)
	}
	uses, kids, points := map[string]int{}, map[string]bool{}, map[string]bool{}
	for _, k := range parsed.Keys {
		uses[k.Use]++
		if points[k.X+k.Y] {
			t.Errorf("the key of %q is used twice", k.Kid)
		}
		points[k.X+k.Y] = true
		if k.Use != "x509-svid" {
			if k.Kid == "" || kids[k.Kid] || k.Kty != "EC" {
				t.Errorf("entry %+v, want a kty and a kid of its own", k)
			}
			kids[k.Kid] = true
		}
	}
	if uses["x509-svid"] != 1 || uses["jwt-svid"] != 1 || uses["wit-svid"] != 1 {
		t.Errorf("the bundle has the uses %v, want one of each", uses)
	}
	// A WIT-SVID is no JWT-SVID: neither by its type nor by its key.
	svid, _, _ := witToken(t, s, webWIT(t, ecKey(t, elliptic.P256()).Public(), "ES256"))
	if _, err := spiffe.ValidateJWTSVID(svid.Token, s, []string{"x"}, spiffe.JWTOptions{Now: s.config.Now()}); err == nil {
		t.Error("a WIT-SVID passes for a JWT-SVID")
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Token, s, []string{"x"}); err == nil {
		t.Error("go-spiffe takes a WIT-SVID for a JWT-SVID")
	}
}

// TestWIT_52_SwitchedOnAndOff opens one store again and again: what the bundle says changes with the switch, and so does its
// sequence, which never stays when the content changes. [TDB-05]
func TestWIT_52_SwitchedOnAndOff(t *testing.T) {
	dir := t.TempDir()
	now, seal := time.Now(), testSealKey(t)
	open := func(enabled bool) (*Set, store.Store) {
		st, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(t.Context(), Config{TrustDomain: testTD, Store: st, Seal: seal, Now: func() time.Time { return now }, WIT: WITConfig{Enabled: enabled}})
		if err != nil {
			t.Fatal(err)
		}
		return s, st
	}
	var sequence uint64
	var kid string
	for i, enabled := range []bool{false, false, true, true, false, true} {
		s, st := open(enabled)
		b := s.Bundle()
		if (len(b.WIT) == 1) != enabled || len(b.WIT) > 1 {
			t.Errorf("opening %d: %d WIT authorities are published, enabled is %t", i, len(b.WIT), enabled)
		}
		switched := i == 0 || i == 2 || i == 4 || i == 5
		if switched == (b.Sequence == sequence) || b.Sequence < sequence {
			t.Errorf("opening %d: sequence %d after %d", i, b.Sequence, sequence)
		}
		sequence = b.Sequence
		if enabled {
			if kid != "" && b.WIT[0].KeyID != kid {
				t.Errorf("opening %d: another WIT authority, %s after %s", i, b.WIT[0].KeyID, kid)
			}
			kid = b.WIT[0].KeyID
		}
		_, err := s.SignWIT(t.Context(), webWIT(t, ecKey(t, elliptic.P256()).Public(), "ES256"))
		if enabled != (err == nil) || !enabled && !errors.Is(err, ErrNoWIT) {
			t.Errorf("opening %d: SignWIT = %v, enabled is %t", i, err, enabled)
		}
		if !enabled {
			if _, err := s.Prepare(t.Context(), KindWIT); !errors.Is(err, ErrNoWIT) {
				t.Errorf("opening %d: Prepare = %v, want ErrNoWIT", i, err)
			}
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
	now = now.Add(DefaultWITLifetime + time.Hour)
	s, st := open(true)
	defer st.Close()
	if b := s.Bundle(); b.WIT[len(b.WIT)-1].KeyID == kid {
		t.Error("after the end of its only WIT authority the CA has made no new one")
	}
}

// TestWIT_03_ForeignKeyIDsGiveWay: a JWT authority that is not our own may carry any key id, also that of our WIT authority.
// It must not make the bundle unreadable, which a kid with two keys would.
func TestWIT_03_ForeignKeyIDsGiveWay(t *testing.T) {
	s := openSet(t, withWIT)
	wit := s.Bundle().WIT[0].KeyID
	other := newPublicKey(t)
	n := *s.current.Load()
	b := Bundle{TrustDomain: testTD, JWT: []JWTAuthority{{KeyID: wit, PublicKey: other, State: StateActive}, {KeyID: "fine", PublicKey: other, State: StateActive}}}
	n.addWIT(&b)
	if len(b.WIT) != 1 || len(b.JWT) != 1 || b.JWT[0].KeyID != "fine" {
		t.Errorf("JWT authorities %v, WIT authorities %v", b.JWT, b.WIT)
	}
	if _, err := spiffe.MarshalBundle(b.SPIFFE()); err != nil {
		t.Error(err)
	}
}
