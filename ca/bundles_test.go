package ca

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
)

// full is a bundle with one of everything.
func (p *partner) full() *types.Bundle {
	b := p.proto()
	b.JwtAuthorities = []*types.JWTKey{{KeyId: "j", PublicKey: spki(p.t, key(p.t).Public())}}
	b.WitAuthorities = []*types.WITKey{{KeyId: "w", PublicKey: spki(p.t, key(p.t).Public())}}
	b.RefreshHint, b.SequenceNumber = 60, 7
	return b
}

func createBundles(t *testing.T, api bundlev1.BundleClient, bundles ...*types.Bundle) (states []*types.Status) {
	t.Helper()
	r, err := api.BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: bundles})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range r.Results {
		states = append(states, x.Status)
	}
	return states
}

func TestBundleMasks(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := bundlev1.NewBundleClient(h.admin)
	p := newPartner(t, "partner.example")
	wantCodes(t, "create", createBundles(t, api, p.full()), codes.OK)
	for name, m := range map[string]*types.BundleMask{"nothing": {}, "x509": {X509Authorities: true}, "jwt": {JwtAuthorities: true}, "hint": {RefreshHint: true}, "sequence": {SequenceNumber: true}, "wit": {WitAuthorities: true}, "all": nil} {
		own, err := api.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: m})
		if err != nil {
			t.Fatal(err)
		}
		got, err := api.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "partner.example", OutputMask: m})
		if err != nil {
			t.Fatal(err)
		}
		list, err := api.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{OutputMask: m})
		if err != nil || len(list.Bundles) != 1 {
			t.Fatal(list, err)
		}
		for of, b := range map[string]*types.Bundle{"own": own, "foreign": got, "listed": list.Bundles[0]} {
			shown := []bool{len(b.X509Authorities) > 0, len(b.JwtAuthorities) > 0, b.RefreshHint > 0, b.SequenceNumber > 0, len(b.WitAuthorities) > 0}
			want := []bool{m == nil || m.X509Authorities, m == nil || m.JwtAuthorities, m == nil || m.RefreshHint, m == nil || m.SequenceNumber, (m == nil || m.WitAuthorities) && of != "own"}
			if !slices.Equal(shown, want) || b.TrustDomain == "" {
				t.Errorf("mask %s of the %s bundle: shows %v, want %v", name, of, shown, want)
			}
		}
	}
}

func TestFederatedBundlesPerItemStatus(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := bundlev1.NewBundleClient(h.admin)
	p := newPartner(t, "partner.example")
	bad := func(change func(*types.Bundle)) *types.Bundle {
		b := newPartner(t, "bad.example").full()
		change(b)
		return b
	}
	many := bad(func(b *types.Bundle) { b.X509Authorities = slices.Repeat(b.X509Authorities, 1001) })
	ours := h.bundle()
	wantCodes(t, "create", createBundles(t, api, p.full(), p.full(), nil, bad(func(b *types.Bundle) { b.TrustDomain = "example.org" }), bad(func(b *types.Bundle) { b.TrustDomain = "Bad.example" }),
		bad(func(b *types.Bundle) { b.X509Authorities[0].Asn1 = []byte("x") }), bad(func(b *types.Bundle) { b.X509Authorities[0].Tainted = true }), bad(func(b *types.Bundle) { b.JwtAuthorities[0].KeyId = "" }),
		bad(func(b *types.Bundle) { b.JwtAuthorities[0].PublicKey = nil }), bad(func(b *types.Bundle) { b.JwtAuthorities = slices.Repeat(b.JwtAuthorities, 2) }), bad(func(b *types.Bundle) { b.WitAuthorities[0].KeyId = "j" }),
		bad(func(b *types.Bundle) { b.RefreshHint = -1 }), bad(func(b *types.Bundle) { b.X509Authorities = ours.X509Authorities }), many),
		codes.OK, codes.AlreadyExists, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument,
		codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument)
	if n, err := api.CountBundles(t.Context(), &bundlev1.CountBundlesRequest{}); err != nil || n.Count != 2 {
		t.Errorf("count: %v %v, want our own and one", n, err)
	}
	// An update takes only what its mask names, and makes nothing new.
	fresh := newPartner(t, "partner.example").full()
	fresh.RefreshHint, fresh.SequenceNumber, fresh.JwtAuthorities[0].KeyId = 120, 8, "fresh"
	up := func(b *types.Bundle, in, out *types.BundleMask) *bundlev1.BatchUpdateFederatedBundleResponse_Result {
		r, err := api.BatchUpdateFederatedBundle(t.Context(), &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: []*types.Bundle{b}, InputMask: in, OutputMask: out})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0]
	}
	if r := up(fresh, &types.BundleMask{JwtAuthorities: true, RefreshHint: true}, nil); r.Status.Code != 0 || r.Bundle.RefreshHint != 120 || r.Bundle.SequenceNumber != 7 ||
		r.Bundle.JwtAuthorities[0].KeyId != "fresh" || string(r.Bundle.X509Authorities[0].Asn1) != string(p.root.cert.Raw) {
		t.Errorf("update of two fields: %v", r)
	}
	if r := up(fresh, nil, &types.BundleMask{X509Authorities: true}); r.Status.Code != 0 || string(r.Bundle.X509Authorities[0].Asn1) != string(fresh.X509Authorities[0].Asn1) || r.Bundle.RefreshHint != 0 {
		t.Errorf("update of all: %v", r)
	}
	if r := up(&types.Bundle{TrustDomain: "partner.example"}, &types.BundleMask{RefreshHint: true, SequenceNumber: true}, nil); r.Status.Code != 0 || r.Bundle.RefreshHint != 0 || r.Bundle.SequenceNumber != 0 || len(r.Bundle.X509Authorities) != 1 {
		t.Errorf("update to no hint: %v", r)
	}
	if r := up(newPartner(t, "no.example").full(), nil, nil); codes.Code(r.Status.Code) != codes.NotFound {
		t.Errorf("update of an unknown one: %v", r)
	}
	set, err := api.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{p.full(), newPartner(t, "new.example").full(), {TrustDomain: "empty.example"}}, OutputMask: &types.BundleMask{SequenceNumber: true}})
	if err != nil || set.Results[0].Status.Code != 0 || set.Results[1].Status.Code != 0 || set.Results[2].Status.Code != 0 || set.Results[1].Bundle.SequenceNumber != 7 || set.Results[1].Bundle.X509Authorities != nil {
		t.Errorf("set: %v %v", set, err)
	}
	if _, err := api.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: slices.Repeat([]*types.Bundle{p.full()}, 251)}); code(err) != codes.ResourceExhausted {
		t.Errorf("251 in one call: %v", err)
	}
	for name, td := range map[string]struct {
		name string
		want codes.Code
	}{"our own": {"example.org", codes.InvalidArgument}, "unknown": {"no.example", codes.NotFound}, "none": {"", codes.InvalidArgument}} {
		for who, c := range map[string]bundlev1.BundleClient{"an admin": api, "an agent": bundlev1.NewBundleClient(h.agent().conn)} {
			if _, err := c.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: td.name}); code(err) != td.want {
				t.Errorf("GetFederatedBundle of %s by %s: %v, want %v", name, who, err, td.want)
			}
		}
	}
	if b, err := bundlev1.NewBundleClient(h.agent().conn).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "new.example"}); err != nil || len(b.X509Authorities) != 1 {
		t.Errorf("GetFederatedBundle by an agent: %v %v", b, err)
	}
	if _, err := bundlev1.NewBundleClient(h.dial(nil, nil)).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "new.example"}); code(err) != codes.PermissionDenied {
		t.Errorf("GetFederatedBundle by anyone: %v", err)
	}
}

func TestFederatedBundlesPages(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := bundlev1.NewBundleClient(h.admin)
	p := newPartner(t, "partner.example")
	var all []*types.Bundle
	for i := range 25 {
		b := p.proto()
		b.TrustDomain = fmt.Sprintf("td-%02d.example", i)
		all = append(all, b)
	}
	for _, st := range createBundles(t, api, all...) {
		if st.Code != 0 {
			t.Fatal(st)
		}
	}
	var names []string
	var tokens []string
	for token := ""; ; {
		r, err := api.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: 10, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range r.Bundles {
			names = append(names, b.TrustDomain)
		}
		if token = r.NextPageToken; token == "" {
			break
		}
		tokens = append(tokens, token)
	}
	if len(names) != 25 || !slices.IsSorted(names) || len(tokens) != 2 {
		t.Errorf("%d pages hold %v", len(tokens)+1, names)
	}
	for name, req := range map[string]*bundlev1.ListFederatedBundlesRequest{"forged": {PageToken: "MTp4"}, "cut": {PageToken: tokens[0][:6]}, "changed": {PageToken: "B" + tokens[0][1:]}, "huge": {PageToken: strings.Repeat("A", 1<<20)}, "negative": {PageSize: -1}} {
		if _, err := api.ListFederatedBundles(t.Context(), req); code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Each mode does to entries what it says, in as many commits as it takes; Identities are changed by their documents only.
func TestDeletingABundleThatEntriesFederateWith(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api, entries := bundlev1.NewBundleClient(h.admin), entryv1.NewEntryClient(h.admin)
	p := newPartner(t, "partner.example")
	const n = 230 // more than two commits hold
	setUp := func() {
		t.Helper()
		b := p.proto()
		other := p.proto()
		other.TrustDomain = "other.example"
		if _, err := api.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b, other}}); err != nil {
			t.Fatal(err)
		}
		req := &entryv1.BatchCreateEntryRequest{}
		for i := range n {
			e := entry(fmt.Sprint("/f/", i), "unix:uid:1")
			e.FederatesWith = []string{"partner.example", "other.example"}
			req.Entries = append(req.Entries, e)
		}
		r, err := entries.BatchCreateEntry(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range r.Results {
			if x.Status.Code != 0 && codes.Code(x.Status.Code) != codes.AlreadyExists {
				t.Fatal(x.Status)
			}
		}
	}
	federating := func(td string) int32 {
		return countEntries(t, entries, &entryv1.CountEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{td}, Match: types.FederatesWithMatch_MATCH_ANY}})
	}
	del := func(mode bundlev1.BatchDeleteFederatedBundleRequest_Mode, names ...string) (out []*types.Status) {
		t.Helper()
		r, err := api.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: names, Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		for i, x := range r.Results {
			if x.TrustDomain != names[i] {
				t.Errorf("result %d is of %q", i, x.TrustDomain)
			}
			out = append(out, x.Status)
		}
		return out
	}
	const restrict, remove, dissociate = bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT, bundlev1.BatchDeleteFederatedBundleRequest_DELETE, bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE
	setUp()
	wantCodes(t, "restrict", del(restrict, "partner.example", "no.example", "example.org", ""), codes.FailedPrecondition, codes.NotFound, codes.NotFound, codes.InvalidArgument)
	if h.federatedBundle("partner.example") == nil || federating("partner.example") != n {
		t.Error("a refused deletion changed something")
	}
	wantCodes(t, "dissociate", del(dissociate, "partner.example"), codes.OK)
	if h.federatedBundle("partner.example") != nil || federating("partner.example") != 0 || federating("other.example") != n {
		t.Errorf("dissociated: bundle %v, %d entries federate with it, %d with the other", h.federatedBundle("partner.example"), federating("partner.example"), federating("other.example"))
	}
	if got := len(h.audit("entry.update")); got != n {
		t.Errorf("%d audit records of entry.update, want %d", got, n)
	}
	wantCodes(t, "delete", del(remove, "other.example"), codes.OK)
	if got := countEntries(t, entries, nil); got != 0 || len(h.audit("entry.delete")) != n {
		t.Errorf("%d entries left, %d audit records of entry.delete", got, len(h.audit("entry.delete")))
	}
	if _, err := api.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{Mode: 9, TrustDomains: []string{"x.example"}}); code(err) != codes.InvalidArgument {
		t.Errorf("an unknown mode: %v", err)
	}
	wantCodes(t, "set up", createBundles(t, api, p.proto()), codes.OK)
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\nfederatesWith: [partner.example]\n")
	for _, mode := range []bundlev1.BatchDeleteFederatedBundleRequest_Mode{restrict, remove, dissociate} {
		if st := del(mode, "partner.example")[0]; codes.Code(st.Code) != codes.FailedPrecondition || mode != restrict && !strings.Contains(st.Message, `Identity "web"`) {
			t.Errorf("%v with an Identity: %v", mode, st)
		}
	}
}
