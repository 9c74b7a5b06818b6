package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-id/signet/spiffe"
)

// What operators' tools for SPIRE do with entries, over the real admin socket. [SPIRE-PROTOCOL §12, §14]

func (h *harness) createOne(e *types.Entry) *entryv1.BatchCreateEntryResponse_Result {
	h.t.Helper()
	r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(h.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil || len(r.Results) != 1 || r.Results[0].Status == nil {
		h.t.Fatal(r, err)
	}
	return r.Results[0]
}

func TestSPIREEntryRules(t *testing.T) {
	h := start(t, config(t.TempDir()))
	n := 0
	with := func(change func(*types.Entry)) *types.Entry {
		n++
		e := entry(fmt.Sprint("/rule/", n), "unix:uid:1", "unix:gid:2")
		change(e)
		return e
	}
	attributes := &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
	for _, tt := range []struct {
		name  string
		entry *types.Entry
		want  codes.Code
		text  string
	}{
		{"an ID of 255 characters", with(func(e *types.Entry) { e.Id = strings.Repeat("a", 250) + "-._9Z" }), codes.OK, ""},
		{"an ID of 256", with(func(e *types.Entry) { e.Id = strings.Repeat("a", 256) }), codes.InvalidArgument, "id"},
		{"an ID with a slash", with(func(e *types.Entry) { e.Id = "a/b" }), codes.InvalidArgument, "id"},
		{"an ID with a null byte", with(func(e *types.Entry) { e.Id = "a\x00" }), codes.InvalidArgument, "id"},
		{"store_svid", with(func(e *types.Entry) { e.StoreSvid = true }), codes.OK, ""},
		{"store_svid with selectors of two types", with(func(e *types.Entry) { e.StoreSvid = true; e.Selectors[0].Type = "k8s" }), codes.InvalidArgument, "store_svid"},
		{"store_svid without prefetch", with(func(e *types.Entry) { e.StoreSvid = true; e.AdditionalAttributes = attributes }), codes.InvalidArgument, "store_svid"},
		{"additional attributes", with(func(e *types.Entry) { e.AdditionalAttributes = attributes }), codes.OK, ""},
		{"negative X.509 TTL", with(func(e *types.Entry) { e.X509SvidTtl = -1 }), codes.InvalidArgument, "x509_svid_ttl"},
		{"negative JWT TTL", with(func(e *types.Entry) { e.JwtSvidTtl = -1 }), codes.InvalidArgument, "jwt_svid_ttl"},
		{"JWT TTL too long", with(func(e *types.Entry) { e.JwtSvidTtl = 1 << 30 }), codes.InvalidArgument, "ttl"},
		{"negative end", with(func(e *types.Entry) { e.ExpiresAt = -1 }), codes.InvalidArgument, "expires_at"},
		{"hint of 1024 bytes", with(func(e *types.Entry) { e.Hint = strings.Repeat("h", 1024) }), codes.OK, ""},
		{"hint of 1025 bytes", with(func(e *types.Entry) { e.Hint = strings.Repeat("h", 1025) }), codes.InvalidArgument, "hint"},
		{"hint that moves the cursor", with(func(e *types.Entry) { e.Hint = "\x1b[2J" }), codes.InvalidArgument, "hint"},
		{"DNS names", with(func(e *types.Entry) { e.DnsNames = []string{"a.example", "*.example", "A_b.example"} }), codes.OK, ""},
		{"DNS name twice", with(func(e *types.Entry) { e.DnsNames = []string{"a.example", "a.example"} }), codes.InvalidArgument, "dns_names"},
		{"DNS name that is an address", with(func(e *types.Entry) { e.DnsNames = []string{"10.0.0.1"} }), codes.InvalidArgument, "dns_names"},
		{"DNS name with an empty label", with(func(e *types.Entry) { e.DnsNames = []string{"a..b"} }), codes.InvalidArgument, "dns_names"},
		{"DNS name with a line end", with(func(e *types.Entry) { e.DnsNames = []string{"a\n.b"} }), codes.InvalidArgument, "dns_names"},
		{"no parent", with(func(e *types.Entry) { e.ParentId = nil }), codes.InvalidArgument, "parent_id"},
		{"foreign parent", with(func(e *types.Entry) { e.ParentId = &types.SPIFFEID{TrustDomain: "other.org", Path: "/x"} }), codes.InvalidArgument, "parent_id"},
		{"an agent's ID as parent", with(func(e *types.Entry) { e.ParentId = pid("/spire/agent/x509pop/a") }), codes.OK, ""},
		{"the server's ID as parent: a node alias", with(func(e *types.Entry) { e.ParentId = pid("/spire/server") }), codes.OK, ""},
		{"no selector value", with(func(e *types.Entry) { e.Selectors[0].Value = "" }), codes.InvalidArgument, "selectors"},
		{"no selector type", with(func(e *types.Entry) { e.Selectors[0].Type = "" }), codes.InvalidArgument, "selectors"},
		{"a selector that is null", with(func(e *types.Entry) { e.Selectors = append(e.Selectors, nil) }), codes.InvalidArgument, "selectors"},
		{"too many selectors", with(func(e *types.Entry) {
			for i := range 65 {
				e.Selectors = append(e.Selectors, sels(fmt.Sprint("unix:uid:", i))...)
			}
		}), codes.InvalidArgument, "selectors"},
		{"a trust domain as SPIRE's command line writes it", with(func(e *types.Entry) { e.FederatesWith = []string{"spiffe://partner.example"} }), codes.OK, ""},
		{"a trust domain with a path", with(func(e *types.Entry) { e.FederatesWith = []string{"spiffe://partner.example/x"} }), codes.InvalidArgument, "federates_with"},
		{"no trust domain", with(func(e *types.Entry) { e.FederatesWith = []string{""} }), codes.InvalidArgument, "federates_with"},
	} {
		r := h.createOne(tt.entry)
		if codes.Code(r.Status.Code) != tt.want || !strings.Contains(r.Status.Message, tt.text) || (tt.want == codes.OK) != (r.Entry != nil) {
			t.Errorf("%s: %v, entry %v; want %v with %q", tt.name, r.Status, r.Entry, tt.want, tt.text)
		}
		if r.Entry == nil {
			continue
		}
		got, err := entryv1.NewEntryClient(h.admin).GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: r.Entry.Id})
		if err != nil || !proto.Equal(got, r.Entry) {
			t.Errorf("%s: is then %v (%v), not %v", tt.name, got, err, r.Entry)
		}
		if !proto.Equal(got.AdditionalAttributes, tt.entry.AdditionalAttributes) || got.Hint != tt.entry.Hint || !slices.Equal(got.DnsNames, tt.entry.DnsNames) || got.StoreSvid != tt.entry.StoreSvid {
			t.Errorf("%s: %v is not what was asked for, %v", tt.name, got, tt.entry)
		}
	}
}

// TestSPIRESimilarEntries: what stands in the way is shown, by the mask that was asked for.
func TestSPIRESimilarEntries(t *testing.T) {
	h := start(t, config(t.TempDir()))
	first := entry("/web", "unix:uid:1", "unix:gid:2")
	first.Hint = "first"
	made := h.createOne(first).Entry
	same := entry("/web", "unix:gid:2", "unix:uid:1", "unix:uid:1")
	same.Hint, same.Id = "second", "second"
	r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{same}, OutputMask: &types.EntryMask{Hint: true}})
	if err != nil || codes.Code(r.Results[0].Status.Code) != codes.AlreadyExists || !proto.Equal(r.Results[0].Entry, &types.Entry{Id: made.Id, Hint: "first"}) {
		t.Errorf("%v %v; want AlreadyExists and the ID and hint of %s", r, err, made.Id)
	}
	for _, change := range []func(*types.Entry){func(e *types.Entry) { e.ParentId = pid("/other") }, func(e *types.Entry) { e.Selectors = e.Selectors[:1] }, func(e *types.Entry) { e.SpiffeId = pid("/web2") }} {
		e := entry("/web", "unix:uid:1", "unix:gid:2")
		change(e)
		if r := h.createOne(e); r.Status.Code != 0 {
			t.Errorf("%v is not similar: %v", e, r.Status)
		}
	}
	// Two of one batch.
	r, err = entryv1.NewEntryClient(h.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{entry("/twin", "unix:uid:1"), entry("/twin", "unix:uid:1")}})
	if err != nil || r.Results[0].Status.Code != 0 || codes.Code(r.Results[1].Status.Code) != codes.AlreadyExists || r.Results[1].Entry.GetId() != r.Results[0].Entry.GetId() {
		t.Errorf("twins in one batch: %v %v", r, err)
	}
	// An update into the place of another one.
	up, err := entryv1.NewEntryClient(h.admin).BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: r.Results[0].Entry.Id, SpiffeId: pid("/web"), Selectors: first.Selectors}},
		InputMask: &types.EntryMask{SpiffeId: true, Selectors: true}})
	if err != nil || codes.Code(up.Results[0].Status.Code) != codes.AlreadyExists {
		t.Errorf("an update into the place of another one: %v %v", up, err)
	}
}

// TestSPIREFilters: list and count agree on every filter and its way of matching.
func TestSPIREFilters(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := entryv1.NewEntryClient(h.admin)
	for i, e := range []*types.Entry{
		{SpiffeId: pid("/1"), ParentId: pid("/node"), Selectors: sels("a:1", "b:2", "c:3"), FederatesWith: []string{"td1", "td2", "td3"}, Hint: "x"},
		{SpiffeId: pid("/2"), ParentId: pid("/node"), Selectors: sels("a:1", "b:2"), FederatesWith: []string{"td1", "td2"}, Downstream: true},
		{SpiffeId: pid("/3"), ParentId: pid("/other"), Selectors: sels("a:1"), FederatesWith: []string{"td1"}, Hint: "y"},
		{SpiffeId: pid("/3"), ParentId: pid("/node"), Selectors: sels("z:9")},
	} {
		e.Id = fmt.Sprint("e", i+1)
		h.create(e)
	}
	by := func(m types.SelectorMatch_MatchBehavior, ss ...string) *entryv1.ListEntriesRequest_Filter {
		return &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: sels(ss...), Match: m}}
	}
	fed := func(m types.FederatesWithMatch_MatchBehavior, tds ...string) *entryv1.ListEntriesRequest_Filter {
		return &entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: tds, Match: m}}
	}
	const sExact, sSubset, sSuperset, sAny = types.SelectorMatch_MATCH_EXACT, types.SelectorMatch_MATCH_SUBSET, types.SelectorMatch_MATCH_SUPERSET, types.SelectorMatch_MATCH_ANY
	const fExact, fSubset, fSuperset, fAny = types.FederatesWithMatch_MATCH_EXACT, types.FederatesWithMatch_MATCH_SUBSET, types.FederatesWithMatch_MATCH_SUPERSET, types.FederatesWithMatch_MATCH_ANY
	for i, tt := range []struct {
		f    *entryv1.ListEntriesRequest_Filter
		want string
	}{
		{nil, "e1 e2 e3 e4"},
		{&entryv1.ListEntriesRequest_Filter{}, "e1 e2 e3 e4"},
		{by(sExact, "b:2", "a:1"), "e2"},
		{by(sExact, "a:1", "a:1"), "e3"},
		{by(sSubset, "a:1"), "e3"},
		{by(sSubset, "a:1", "b:2", "x:y"), "e2 e3"},
		{by(sSuperset, "a:1", "b:2"), "e1 e2"},
		{by(sAny, "c:3", "z:9"), "e1 e4"},
		{by(sAny, "n:o"), ""},
		{fed(fExact, "td2", "td1"), "e2"},
		{fed(fExact, "td1", "td1", "spiffe://td1"), "e3"},
		{fed(fSubset, "td1", "td2"), "e2 e3"}, // and not e4, which federates with none
		{fed(fSuperset, "td1", "td2"), "e1 e2"},
		{fed(fAny, "td3", "td4"), "e1"},
		{&entryv1.ListEntriesRequest_Filter{BySpiffeId: pid("/3")}, "e3 e4"},
		{&entryv1.ListEntriesRequest_Filter{ByParentId: pid("/node")}, "e1 e2 e4"},
		{&entryv1.ListEntriesRequest_Filter{BySpiffeId: pid("/3"), ByParentId: pid("/node")}, "e4"},
		{&entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("x")}, "e1"},
		{&entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("")}, "e2 e4"},
		{&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true)}, "e2"},
		{&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true), ByHint: wrapperspb.String("x")}, ""},
	} {
		var got []string
		for token, pages := "", 0; pages == 0 || token != ""; pages++ { // one a page, which no filter may disturb
			r, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: tt.f, PageSize: 1, PageToken: token, OutputMask: &types.EntryMask{}})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range r.Entries {
				if !proto.Equal(e, &types.Entry{Id: e.Id}) {
					t.Errorf("an empty mask shows %v", e)
				}
				got = append(got, e.Id)
			}
			token = r.NextPageToken
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("filter %d, %v: %v, want %s", i, tt.f, got, tt.want)
		}
		var cf *entryv1.CountEntriesRequest_Filter
		if f := tt.f; f != nil {
			cf = &entryv1.CountEntriesRequest_Filter{BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors, ByFederatesWith: f.ByFederatesWith, ByHint: f.ByHint, ByDownstream: f.ByDownstream}
		}
		if n := countEntries(t, api, cf); int(n) != len(got) {
			t.Errorf("filter %d, %v: counts %d, lists %d", i, tt.f, n, len(got))
		}
	}
	foreign := &types.SPIFFEID{TrustDomain: "other.org", Path: "/x"}
	for i, f := range []*entryv1.ListEntriesRequest_Filter{
		by(sExact), fed(fAny), by(77, "a:1"), fed(-1, "td1"), by(sAny, "a:"), fed(sAnyTD, "Bad"), fed(fAny, ""), fed(fAny, slices.Repeat([]string{"td1"}, 10_000)...),
		by(sAny, slices.Repeat([]string{"a:1"}, 10_000)...), {BySpiffeId: foreign}, {ByParentId: foreign}, {BySpiffeId: &types.SPIFFEID{}}, {ByParentId: pid("no-slash")},
		{BySpiffeId: pid("/a/../b")}, {BySelectors: &types.SelectorMatch{Selectors: []*types.Selector{nil}}},
	} {
		if _, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: f}); code(err) != codes.InvalidArgument {
			t.Errorf("hostile filter %d: %v", i, err)
		}
	}
}

const sAnyTD = types.FederatesWithMatch_MATCH_ANY

func TestSPIREForgedPageTokens(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := entryv1.NewEntryClient(h.admin)
	for i := range 4 {
		h.create(under("/node", fmt.Sprint("e", i), fmt.Sprint("/w/", i), "unix:uid:1"))
	}
	page, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 2})
	if err != nil || page.NextPageToken == "" {
		t.Fatal(page, err)
	}
	good := page.NextPageToken
	raw := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	for _, token := range []string{"x", "%%%", good + "=", good + "\n", good[:1], raw("1:"), raw("2:e1"), raw("1:" + strings.Repeat("a", 256)), raw("1:a/b"), raw("1:\x00"), raw("1:e1' OR '1'='1"),
		raw("1:spiffe://example.org/spire/agent/x"), strings.Repeat("A", 1<<20), "../../etc/passwd"} {
		if r, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 2, PageToken: token}); code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "page_token") {
			t.Errorf("token %.40q: %v %v", token, r, err)
		}
	}
	// One that was made up well begins somewhere, and shows nothing that is not shown anyway; the filter holds.
	r, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 10, PageToken: raw("1:e0"), Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: pid("/w/3")}})
	if err != nil || len(r.Entries) != 1 || r.Entries[0].Id != "e3" || r.NextPageToken != "" {
		t.Errorf("%v %v", r, err)
	}
	if r, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 10, PageToken: raw("1:zzz")}); err != nil || len(r.Entries) != 0 {
		t.Errorf("behind the end: %v %v", r, err)
	}
}

func TestSPIREBatchesOfTenThousand(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := entryv1.NewEntryClient(h.admin)
	const n = 10_000
	before := h.ca.reg.Revision()
	_, err := api.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: slices.Repeat([]*types.Entry{entry("/w", "unix:uid:1")}, n)})
	if code(err) != codes.ResourceExhausted {
		t.Errorf("create: %v", err)
	}
	if _, err := api.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: slices.Repeat([]*types.Entry{{Id: "x"}}, n)}); code(err) != codes.ResourceExhausted {
		t.Errorf("update: %v", err)
	}
	if _, err := api.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: slices.Repeat([]string{"x"}, n)}); code(err) != codes.ResourceExhausted {
		t.Errorf("delete: %v", err)
	}
	if h.ca.reg.Revision() != before {
		t.Error("something was written")
	}
	for name, st := range map[string]func() (*types.Status, error){
		"update": func() (*types.Status, error) {
			r, err := api.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{}}})
			return r.GetResults()[0].GetStatus(), err
		},
		"delete": func() (*types.Status, error) {
			r, err := api.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{""}})
			return r.GetResults()[0].GetStatus(), err
		},
	} {
		if st, err := st(); err != nil || codes.Code(st.Code) != codes.InvalidArgument {
			t.Errorf("%s without an ID: %v %v", name, st, err)
		}
	}
	if _, err := api.GetEntry(t.Context(), &entryv1.GetEntryRequest{}); code(err) != codes.InvalidArgument {
		t.Errorf("get without an ID: %v", err)
	}
	if r, err := api.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: "nobody"}}}); err != nil || codes.Code(r.Results[0].Status.Code) != codes.NotFound {
		t.Errorf("update of an unknown one: %v %v", r, err)
	}
}

func TestSPIREMint(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := svidv1.NewSVIDClient(h.admin)
	k := key(t)
	weak, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	web := []*url.URL{uri(t, "spiffe://example.org/web")}
	bad := requestFor(t, k, &x509.CertificateRequest{URIs: web})
	bad[len(bad)-1] ^= 1
	for name, tt := range map[string]struct {
		csr  []byte
		ttl  int32
		want codes.Code
	}{
		"no CSR":           {nil, 0, codes.InvalidArgument},
		"nonsense":         {[]byte("x"), 0, codes.InvalidArgument},
		"no ID":            {requestFor(t, k, &x509.CertificateRequest{}), 0, codes.InvalidArgument},
		"two IDs":          {requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{web[0], uri(t, "spiffe://example.org/x")}}), 0, codes.InvalidArgument},
		"foreign":          {requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://other.org/web")}}), 0, codes.InvalidArgument},
		"the CA's own ID":  {requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/spire/server")}}), 0, codes.InvalidArgument},
		"an agent's ID":    {requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/spire/agent/x/y")}}), 0, codes.InvalidArgument},
		"no path":          {requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org")}}), 0, codes.InvalidArgument},
		"bad signature":    {bad, 0, codes.InvalidArgument},
		"weak key":         {requestFor(t, weak, &x509.CertificateRequest{URIs: web}), 0, codes.InvalidArgument},
		"bad DNS name":     {requestFor(t, k, &x509.CertificateRequest{URIs: web, DNSNames: []string{"-"}}), 0, codes.InvalidArgument},
		"negative TTL":     {requestFor(t, k, &x509.CertificateRequest{URIs: web}), -1, codes.InvalidArgument},
		"TTL that is cut":  {requestFor(t, k, &x509.CertificateRequest{URIs: web}), 1 << 30, codes.InvalidArgument},
		"good":             {requestFor(t, k, &x509.CertificateRequest{URIs: web, DNSNames: []string{"web.internal"}}), 120, codes.OK},
		"good, by default": {requestFor(t, k, &x509.CertificateRequest{URIs: web}), 0, codes.OK},
	} {
		r, err := api.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: tt.csr, Ttl: tt.ttl})
		if code(err) != tt.want {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		if err != nil {
			continue
		}
		leaf, perr := x509.ParseCertificate(r.Svid.CertChain[0])
		if perr != nil {
			t.Fatal(perr)
		}
		want := time.Hour
		if tt.ttl > 0 {
			want = time.Duration(tt.ttl) * time.Second
		}
		if id, err := spiffe.CheckX509SVIDLeaf(leaf); err != nil || id.Path() != "/web" || r.Svid.Id.Path != "/web" || r.Svid.ExpiresAt != leaf.NotAfter.Unix() || time.Until(leaf.NotAfter).Round(10*time.Second) != want {
			t.Errorf("%s: %v (%v), ends %v", name, id, err, leaf.NotAfter)
		}
		if tt.ttl > 0 && !slices.Equal(leaf.DNSNames, []string{"web.internal"}) {
			t.Errorf("%s: DNS names %v", name, leaf.DNSNames)
		}
	}
	for name, tt := range map[string]struct {
		req  *svidv1.MintJWTSVIDRequest
		want codes.Code
	}{
		"no ID":           {&svidv1.MintJWTSVIDRequest{Audience: []string{"a"}}, codes.InvalidArgument},
		"no audience":     {&svidv1.MintJWTSVIDRequest{Id: pid("/web")}, codes.InvalidArgument},
		"empty audience":  {&svidv1.MintJWTSVIDRequest{Id: pid("/web"), Audience: []string{""}}, codes.InvalidArgument},
		"no path":         {&svidv1.MintJWTSVIDRequest{Id: pid(""), Audience: []string{"a"}}, codes.InvalidArgument},
		"negative TTL":    {&svidv1.MintJWTSVIDRequest{Id: pid("/web"), Audience: []string{"a"}, Ttl: -1}, codes.InvalidArgument},
		"TTL that is cut": {&svidv1.MintJWTSVIDRequest{Id: pid("/web"), Audience: []string{"a"}, Ttl: 1 << 30}, codes.InvalidArgument},
		"good":            {&svidv1.MintJWTSVIDRequest{Id: pid("/web"), Audience: []string{"a", "b"}, Ttl: 60}, codes.OK},
	} {
		r, err := api.MintJWTSVID(t.Context(), tt.req)
		if code(err) != tt.want {
			t.Errorf("JWT, %s: %v, want %v", name, err, tt.want)
		}
		if err != nil {
			continue
		}
		_, claims := jwtParts(t, r.Svid.Token)
		if claims["sub"] != "spiffe://example.org/web" || fmt.Sprint(claims["aud"]) != "[a b]" || claims["exp"] != float64(r.Svid.ExpiresAt) || r.Svid.IssuedAt == 0 || r.Svid.Id.Path != "/web" {
			t.Errorf("JWT: %v beside %v", claims, r.Svid.Id)
		}
	}
	if n := len(h.audit("x509svid.mint", "jwtsvid.mint")); n != 15+7 {
		t.Errorf("%d audit records of 22 attempts", n)
	}
}
