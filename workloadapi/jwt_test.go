package workloadapi_test

import (
	"crypto"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	spiffeapi "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/workloadapi"
)

func TestWAPI_11_WAPI_41_V140_EmptyAudience(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	client := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})).client(t)
	for _, audience := range [][]string{nil, {""}, {"a", ""}, {strings.Repeat("x", 3000)}, make([]string, 33)} {
		_, err := client.FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: audience})
		wantCode(t, err, codes.InvalidArgument, "audience")
	}
}

func TestWAPI_42_WAPI_43_WAPI_46_FetchJWTSVID(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	client := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/one")}, entry{match: everyone, identity: a.identity(t, "/two")})).client(t)
	audience := []string{"b", "a", "spiffe://example.org/x"}
	resp, err := client.FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: audience})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Svids) != 2 {
		t.Fatalf("%d tokens for two identities", len(resp.Svids))
	}
	for i, want := range []string{"spiffe://example.org/one", "spiffe://example.org/two"} {
		token, err := jwt.ParseSigned(resp.Svids[i].Svid, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		var claims jwt.Claims
		if err := token.Claims(&a.jwtKey.PublicKey, &claims); err != nil {
			t.Fatal(err)
		}
		if resp.Svids[i].SpiffeId != want || claims.Subject != want || !slices.Equal(claims.Audience, audience) {
			t.Errorf("token %d: spiffe_id %q, sub %q, aud %q; want %q for %q", i, resp.Svids[i].SpiffeId, claims.Subject, claims.Audience, want, audience)
		}
	}
	resp, err = client.FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: audience, SpiffeId: "spiffe://example.org/two"})
	if err != nil || len(resp.Svids) != 1 || resp.Svids[0].SpiffeId != "spiffe://example.org/two" {
		t.Errorf("asked for one: %v, %v", resp, err)
	}
}

func TestWAPI_44_V141_AnotherWorkloadsID(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}, entry{match: having("unix:uid:4294967000"), identity: a.identity(t, "/db")})
	client := serve(t, src).client(t)
	var texts []string
	for _, id := range []string{"spiffe://example.org/db", "spiffe://example.org/nobody", "spiffe://other.example/web"} {
		_, err := client.FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: id})
		wantCode(t, err, codes.PermissionDenied)
		texts = append(texts, err.Error())
	}
	if texts[0] != texts[1] || texts[1] != texts[2] {
		t.Errorf("the answers tell what exists: %q", texts)
	}
}

func TestWAPI_45_MalformedID(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	client := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})).client(t)
	for _, id := range []string{"spiffe://example.org/", "spiffe://example.org", "example.org/web", "spiffe://example.org/web/", "SPIFFE://example.org/web"} {
		_, err := client.FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: id})
		wantCode(t, err, codes.InvalidArgument, "spiffe_id")
	}
}

func TestJWTSourceOutOfReachIsUnavailable(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	src.jwtErr = workloadapi.ErrUnavailable
	_, err := serve(t, src).client(t).FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: []string{"a"}})
	wantCode(t, err, codes.Unavailable, "out of reach", "or refuses", "agent's log")
}

func TestJWTSourceTooManyIsResourceExhausted(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	src.jwtErr = fmt.Errorf("%w: uid 0 asks for more", workloadapi.ErrTooMany)
	_, err := serve(t, src).client(t).FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: []string{"a"}})
	wantCode(t, err, codes.ResourceExhausted, "too many new JWT-SVIDs", "until it expires")
}

func TestWAPI_47_WAPI_48_WAPI_49_JWTBundles(t *testing.T) {
	a, partner := newAuthority(t, "example.org", "k1"), newAuthority(t, "partner.example", "p1")
	identity := a.identity(t, "/web")
	identity.FederatesWith = []spiffeid.TrustDomain{partner.td}
	src := newMemory(a, entry{match: everyone, identity: identity})
	src.trust(partner)
	src.jwt[a.td][""] = &partner.jwtKey.PublicKey // a key that nobody could name
	e := serve(t, src)
	stream, err := e.client(t).FetchJWTBundles(spiffeCtx(t), &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	bundles := recv(t, stream).Bundles
	if len(bundles) != 2 {
		t.Errorf("%d bundles, want 2", len(bundles))
	}
	for td, kid := range map[string]string{"spiffe://example.org": "k1", "spiffe://partner.example": "p1"} {
		var doc map[string][]map[string]any
		if err := json.Unmarshal(bundles[td], &doc); err != nil {
			t.Fatalf("%s: %v in %s", td, err, bundles[td])
		}
		if len(doc) != 1 || len(doc["keys"]) != 1 || doc["keys"][0]["kid"] != kid || doc["keys"][0]["use"] != nil || doc["keys"][0]["d"] != nil {
			t.Errorf("%s: %s, want the public key %s alone, without use", td, bundles[td], kid)
		}
	}
	if _, err := spiffeapi.FetchJWTBundles(t.Context(), spiffeapi.WithAddr(e.Addr())); err != nil {
		t.Errorf("go-spiffe: %v", err)
	}
	src.change(func() { src.jwt[a.td] = map[string]crypto.PublicKey{} })
	if got := string(recv(t, stream).Bundles["spiffe://example.org"]); !strings.Contains(got, `"keys":[]`) {
		t.Errorf("an empty bundle is %s, want keys to be []", got)
	}
}

func TestWAPI_51_WAPI_52_WAPI_53_ValidateJWTSVID(t *testing.T) {
	a, partner, stranger := newAuthority(t, "example.org", "k1"), newAuthority(t, "partner.example", "k1"), newAuthority(t, "stranger.example", "k1")
	identity := a.identity(t, "/web")
	identity.FederatesWith = []spiffeid.TrustDomain{partner.td}
	src := newMemory(a, entry{match: everyone, identity: identity})
	src.trust(partner)
	src.trust(stranger)
	client := serve(t, src).client(t)
	year2100 := time.Date(2100, 1, 1, 0, 0, 1, 0, time.UTC).Unix()
	claims := func(sub string, change map[string]any) map[string]any {
		c := map[string]any{"sub": sub, "aud": []string{"me", "you"}, "exp": year2100, "iat": time.Now().Unix(), "role": "admin", "nested": map[string]any{"a": []any{1, true, nil, "x"}}}
		for k, v := range change {
			if v == nil {
				delete(c, k)
			} else {
				c[k] = v
			}
		}
		return c
	}
	for _, tt := range []struct {
		name    string
		signer  *authority
		claims  map[string]any
		want    string // SPIFFE ID, or empty if refused
		private bool
	}{
		{"own", a, claims("spiffe://example.org/db", nil), "spiffe://example.org/db", true},
		{"federated: private claims are filtered", partner, claims("spiffe://partner.example/db", nil), "spiffe://partner.example/db", false},
		{"not federated with", stranger, claims("spiffe://stranger.example/db", nil), "", false},
		{"another domain's key under the same kid", partner, claims("spiffe://example.org/db", nil), "", false},
		{"expired", a, claims("spiffe://example.org/db", map[string]any{"exp": time.Now().Add(-61 * time.Second).Unix()}), "", false},
		{"within leeway", a, claims("spiffe://example.org/db", map[string]any{"exp": time.Now().Add(-5 * time.Second).Unix()}), "spiffe://example.org/db", true},
		{"not yet", a, claims("spiffe://example.org/db", map[string]any{"nbf": time.Now().Add(2 * time.Minute).Unix()}), "", false},
		{"no exp", a, claims("spiffe://example.org/db", map[string]any{"exp": nil}), "", false},
		{"other audience", a, claims("spiffe://example.org/db", map[string]any{"aud": "ME"}), "", false},
		{"no audience", a, claims("spiffe://example.org/db", map[string]any{"aud": nil}), "", false},
		{"pathless", a, claims("spiffe://example.org", nil), "", false},
		{"not a SPIFFE ID", a, claims("someone", nil), "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			token, err := tt.signer.token(tt.claims)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Audience: "me", Svid: token})
			if tt.want == "" {
				wantCode(t, err, codes.InvalidArgument, "svid") // WAPI-54
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if resp.SpiffeId != tt.want {
				t.Errorf("spiffe_id %q, want %q", resp.SpiffeId, tt.want)
			}
			got := resp.Claims.AsMap()
			if got["sub"] != tt.want || got["aud"] == nil || got["exp"] == nil {
				t.Errorf("claims %v lack sub, aud or exp", got)
			}
			if tt.claims["exp"] == year2100 && int64(got["exp"].(float64)) != year2100 {
				t.Errorf("exp %v, want %d exactly", got["exp"], year2100)
			}
			if _, ok := got["role"]; ok != tt.private {
				t.Errorf("private claims returned: %t, want %t", ok, tt.private)
			}
		})
	}
	token, err := partner.token(claims("spiffe://partner.example/db", nil))
	if err != nil {
		t.Fatal(err)
	}
	open := serve(t, src, func(c *workloadapi.Config) { c.AllowForeignPrivateClaims = true })
	resp, err := open.client(t).ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Audience: "me", Svid: token})
	if err != nil || resp.Claims.AsMap()["role"] != "admin" {
		t.Errorf("with the option: %v, %v", resp, err)
	}
	svid, err := spiffeapi.ValidateJWTSVID(t.Context(), token, "me", spiffeapi.WithAddr(open.Addr()))
	if err != nil || svid.ID.String() != "spiffe://partner.example/db" {
		t.Errorf("go-spiffe: %v, %v", svid, err)
	}
}

func TestWAPI_54_ValidateWithoutIdentity(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	token, err := a.token(map[string]any{"sub": "spiffe://example.org/db", "aud": "me", "exp": time.Now().Add(time.Minute).Unix()})
	if err != nil {
		t.Fatal(err)
	}
	_, err = serve(t, newMemory(a)).client(t).ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Audience: "me", Svid: token})
	wantCode(t, err, codes.PermissionDenied)
}

func TestWAPI_61_V142_EmptyArguments(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	client := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})).client(t)
	_, err := client.ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Audience: "me"})
	wantCode(t, err, codes.InvalidArgument, "svid is empty")
	_, err = client.ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Svid: "x"})
	wantCode(t, err, codes.InvalidArgument, "audience is empty")
}

func TestWAPI_01_GoSpiffeJWT(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}))
	source, err := spiffeapi.NewJWTSource(t.Context(), spiffeapi.WithClientOptions(spiffeapi.WithAddr(e.Addr())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "me"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"me"}); err != nil {
		t.Error(err)
	}
	if _, err := spiffeapi.FetchX509Bundles(t.Context(), spiffeapi.WithAddr(e.Addr())); err != nil {
		t.Error(err)
	}
}
