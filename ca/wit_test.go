package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

func publicKeyOn(t *testing.T, curve elliptic.Curve) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestWIT_02_50_WPT_07_SVIDsByEntry lets a SPIRE agent ask for WIT-SVIDs over the real port, and verifies them with what GetBundle says.
func TestWIT_02_50_WPT_07_SVIDsByEntry(t *testing.T) {
	c := config(t.TempDir())
	c.WIT = WIT{Enabled: true, TTL: 10 * time.Minute}
	h := start(t, c)
	a, b := h.join(), h.join()
	web := under(a.ID.Path(), "web", "/web", "unix:uid:1")
	web.Hint = "internal"
	h.create(web, under(b.ID.Path(), "foreign", "/foreign", "unix:uid:2"))
	good := publicKeyOn(t, elliptic.P256())
	items := []struct {
		params *svidv1.NewWITSVIDParams
		want   codes.Code
		text   string
	}{
		{&svidv1.NewWITSVIDParams{EntryId: "web", PublicKey: good, SigningAlgorithm: "ES256"}, codes.OK, "OK"},
		{&svidv1.NewWITSVIDParams{PublicKey: good, SigningAlgorithm: "ES256"}, codes.InvalidArgument, "missing entry ID"},
		{&svidv1.NewWITSVIDParams{EntryId: "web", SigningAlgorithm: "ES256"}, codes.InvalidArgument, "missing public key"},
		{&svidv1.NewWITSVIDParams{EntryId: "web", PublicKey: good}, codes.InvalidArgument, "signing_algorithm"},
		{&svidv1.NewWITSVIDParams{EntryId: "web", PublicKey: good, SigningAlgorithm: "ES384"}, codes.InvalidArgument, "signing_algorithm"},
		{&svidv1.NewWITSVIDParams{EntryId: "web", PublicKey: good[1:], SigningAlgorithm: "ES256"}, codes.InvalidArgument, "key"},
		{&svidv1.NewWITSVIDParams{EntryId: "web", PublicKey: publicKeyOn(t, elliptic.P224()), SigningAlgorithm: "ES256"}, codes.InvalidArgument, "key"},
		{&svidv1.NewWITSVIDParams{EntryId: "foreign", PublicKey: good, SigningAlgorithm: "ES256"}, codes.NotFound, "not found or not authorized"},
	}
	req := &svidv1.BatchNewWITSVIDRequest{}
	for _, it := range items {
		req.Params = append(req.Params, it.params)
	}
	r, err := a.SVIDAPI().BatchNewWITSVID(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, it := range items {
		x := r.Results[i]
		if x.Status == nil || codes.Code(x.Status.Code) != it.want || !strings.Contains(x.Status.Message, it.text) || (x.Svid != nil) != (it.want == codes.OK) {
			t.Errorf("item %d: %v, want %v with %q", i, x, it.want, it.text)
		}
	}
	bundle, err := bundlev1.NewBundleClient(h.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{WitAuthorities: true}})
	if err != nil || len(bundle.WitAuthorities) != 1 || len(bundle.JwtAuthorities) != 0 {
		t.Fatalf("GetBundle: %v, %v; want one WIT authority alone", bundle, err)
	}
	keys := witbundle.New(td)
	for _, k := range bundle.WitAuthorities {
		public, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil || k.ExpiresAt == 0 {
			t.Fatalf("authority %v: %v", k, err)
		}
		if err := keys.AddWITAuthority(k.KeyId, public); err != nil {
			t.Fatal(err)
		}
	}
	svid := r.Results[0].Svid
	got, err := witsvid.ParseAndValidate(svid.Token, keys)
	if err != nil || got.ID.String() != "spiffe://example.org/web" || svid.Id.Path != "/web" || svid.Hint != "internal" {
		t.Errorf("WIT-SVID %v: %v, %v", svid.Id, got, err)
	}
	if left := time.Until(time.Unix(svid.ExpiresAt, 0)); left > 10*time.Minute || left < 9*time.Minute || svid.IssuedAt == 0 {
		t.Errorf("issued %d, valid for %v, want wit.ttl", svid.IssuedAt, left)
	}
	for _, n := range []struct {
		items int
		want  codes.Code
	}{{0, codes.InvalidArgument}, {501, codes.ResourceExhausted}} {
		many := &svidv1.BatchNewWITSVIDRequest{Params: slices.Repeat(req.Params[:1], n.items)}
		if _, err := a.SVIDAPI().BatchNewWITSVID(t.Context(), many); code(err) != n.want {
			t.Errorf("%d items: %v, want %v", n.items, err, n.want)
		}
	}
	issued := h.audit("witsvid.issued")
	if len(issued) != 1 || issued[0]["subject"] != "spiffe://example.org/web" || len(h.audit("witsvid.refused")) != len(items)-1 {
		t.Errorf("audit: issued %v, refused %v", issued, h.audit("witsvid.refused"))
	}
}

func TestMintWITSVID(t *testing.T) {
	c := config(t.TempDir())
	c.WIT.Enabled = true
	h := start(t, c)
	id, good := &types.SPIFFEID{TrustDomain: "example.org", Path: "/people/alice"}, publicKeyOn(t, elliptic.P256())
	mint := func(r *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
		return svidv1.NewSVIDClient(h.admin).MintWITSVID(t.Context(), r)
	}
	r, err := mint(&svidv1.MintWITSVIDRequest{Id: id, PublicKey: good, SigningAlgorithm: "ES256", Ttl: 60})
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(time.Unix(r.Svid.ExpiresAt, 0)); left > time.Minute {
		t.Errorf("valid for %v, want a minute", left)
	}
	for _, tt := range []struct {
		name string
		req  *svidv1.MintWITSVIDRequest
		text string
	}{
		{"no id", &svidv1.MintWITSVIDRequest{PublicKey: good, SigningAlgorithm: "ES256"}, "id"},
		{"foreign id", &svidv1.MintWITSVIDRequest{Id: &types.SPIFFEID{TrustDomain: "other.example", Path: "/x"}, PublicKey: good, SigningAlgorithm: "ES256"}, "example.org"},
		{"reserved id", &svidv1.MintWITSVIDRequest{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/server"}, PublicKey: good, SigningAlgorithm: "ES256"}, "reserved"},
		{"no key", &svidv1.MintWITSVIDRequest{Id: id, SigningAlgorithm: "ES256"}, "public_key"},
		{"wrong algorithm", &svidv1.MintWITSVIDRequest{Id: id, PublicKey: good, SigningAlgorithm: "EdDSA"}, "signing_algorithm"},
		{"negative TTL", &svidv1.MintWITSVIDRequest{Id: id, PublicKey: good, SigningAlgorithm: "ES256", Ttl: -1}, "ttl"},
		{"TTL over the maximum", &svidv1.MintWITSVIDRequest{Id: id, PublicKey: good, SigningAlgorithm: "ES256", Ttl: 48 * 3600}, "ttl"},
	} {
		if _, err := mint(tt.req); code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, want InvalidArgument with %q", tt.name, err, tt.text)
		}
	}
	for _, record := range h.audit("witsvid.mint") {
		for _, v := range record {
			if s, ok := v.(string); ok && strings.Contains(s, r.Svid.Token) {
				t.Error("the token is in the audit log")
			}
		}
	}
}

// TestWITAuthoritiesRotate takes a WIT authority through its life by SPIRE's API, with a SPIRE agent that acknowledges by
// fetching the bundle and one of our own that says that it has handed it on.
func TestWITAuthoritiesRotate(t *testing.T) {
	c := config(t.TempDir())
	c.WIT.Enabled, c.Authorities.Rotate = true, rotateManual
	h := start(t, c)
	own := h.agent()
	following := h.follows(own)
	a := h.join()
	web := under(a.ID.Path(), "web", "/web", "unix:uid:1")
	h.create(web)
	api := localauthorityv1.NewLocalAuthorityClient(h.admin)
	signer := func() string {
		r, err := a.SVIDAPI().BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: []*svidv1.NewWITSVIDParams{
			{EntryId: "web", PublicKey: publicKeyOn(t, elliptic.P256()), SigningAlgorithm: "ES256"}}})
		if err != nil {
			t.Fatal(err)
		}
		header, _ := jwtParts(t, r.Results[0].GetSvid().GetToken())
		kid, _ := header["kid"].(string)
		return kid
	}
	published := func() (kids []string) {
		b, err := bundlev1.NewBundleClient(a.Conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}) // by which the agent acknowledges
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range b.WitAuthorities {
			kids = append(kids, k.KeyId)
		}
		return kids
	}
	first := signer()
	prepared, err := api.PrepareWITAuthority(t.Context(), &localauthorityv1.PrepareWITAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := prepared.PreparedAuthority.AuthorityId
	if got := published(); !slices.Equal(got, []string{first, next}) || signer() != first {
		t.Errorf("published %v, want %s and %s, of which the first signs", got, first, next)
	}
	if _, err := api.ActivateWITAuthority(t.Context(), &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: next}); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), own.id.String()) {
		t.Errorf("with a laggard: %v, want FailedPrecondition that names %s", err, own.id)
	}
	following.until(next, nodev1.AuthorityState_AUTHORITY_STATE_PREPARED)
	following.ack(next)
	until(t, "our agent's acknowledgement", func() bool { return h.ca.reg.Ack(own.id).Has(next) })
	if _, err := api.ActivateWITAuthority(t.Context(), &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: next}); err != nil {
		t.Fatal(err)
	}
	if got := signer(); got != next {
		t.Errorf("%s signs, want %s", got, next)
	}
	if _, err := api.TaintWITAuthority(t.Context(), &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: first}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.RevokeWITAuthority(t.Context(), &localauthorityv1.RevokeWITAuthorityRequest{AuthorityId: first}); err != nil {
		t.Fatal(err)
	}
	if got := published(); !slices.Equal(got, []string{next}) {
		t.Errorf("published %v, want %s alone", got, next)
	}
	st, err := api.GetWITAuthorityState(t.Context(), &localauthorityv1.GetWITAuthorityStateRequest{})
	if err != nil || st.Active.GetAuthorityId() != next || st.Prepared != nil || st.Old != nil {
		t.Errorf("GetWITAuthorityState = %v, %v", st, err)
	}
}
