package ca

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"testing"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// spire-controller-manager's calls, in the shapes that it makes them (read at commit 430567c): it pages by 200, creates and
// updates by 50, deletes by 200, never sends a mask, and looks only at the codes of the items.
func TestCallsOfSPIREControllerManager(t *testing.T) {
	h := start(t, config(t.TempDir()))
	for name, conn := range map[string]*grpc.ClientConn{"admin socket": h.admin, "port": h.adminConn("/controller-manager")} {
		t.Run(name, func(t *testing.T) {
			t.Run("entries", func(t *testing.T) { controllerEntries(t, entryv1.NewEntryClient(conn)) })
			t.Run("federation", func(t *testing.T) { controllerFederation(t, trustdomainv1.NewTrustDomainClient(conn)) })
			// Its webhook's certificate.
			k := key(t)
			minted, err := svidv1.NewSVIDClient(conn).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Ttl: 3600, Csr: requestFor(t, k, &x509.CertificateRequest{
				URIs: []*url.URL{uri(t, "spiffe://example.org/spire-controller-manager-webhook")}, DNSNames: []string{"webhook.spire.svc"}})})
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(minted.Svid.CertChain[0])
			if err != nil || minted.Svid.Id.GetPath() != "/spire-controller-manager-webhook" || len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != "webhook.spire.svc" {
				t.Errorf("minted: %v %v %v", minted.Svid.Id, leaf.DNSNames, err)
			}
			own, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			if err != nil || own.TrustDomain != "example.org" || len(own.X509Authorities) == 0 || own.RefreshHint == 0 || own.SequenceNumber == 0 {
				t.Errorf("GetBundle: %v %v", own, err)
			}
		})
	}
}

// An entry that is its own parent, as the probe is, concerns no agent.
func TestEntryThatIsItsOwnParentIsNobodys(t *testing.T) {
	h := start(t, config(t.TempDir()))
	own := entry("/loop", "unix:uid:1")
	own.ParentId = pid("/loop")
	a := h.agent()
	below := entry("/web", "unix:uid:2")
	below.ParentId = pid(a.id.Path())
	h.create(own, below)
	r, err := entryv1.NewEntryClient(a.conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil || len(r.Entries) != 1 || r.Entries[0].SpiffeId.Path != "/web" {
		t.Errorf("the agent gets %v, %v", r, err)
	}
	below.ParentId, below.SpiffeId = pid("/loop"), pid("/below-loop")
	h.create(below)
	if m := follow(t, hello(t, a, "", 0)); len(m.Entries) != 1 {
		t.Errorf("the agent that follows gets %v", m.Entries)
	}
}

// everyEntry lists as the controller manager does.
func everyEntry(t *testing.T, api entryv1.EntryClient) (all []*types.Entry) {
	t.Helper()
	for token := ""; ; {
		r, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 200, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r.Entries...)
		if token = r.NextPageToken; token == "" {
			return all
		}
	}
}

func controllerEntries(t *testing.T, api entryv1.EntryClient) {
	before := len(everyEntry(t, api))
	// It finds out what the server can do by an entry with everything in it, twice over.
	probe := &types.Entry{ParentId: pid("/spire-controller-manager/unsupported-fields-test"), SpiffeId: pid("/spire-controller-manager/unsupported-fields-test"), Selectors: sels("a:1"),
		X509SvidTtl: 60, JwtSvidTtl: 60, StoreSvid: true, Hint: "hint"}
	var id string
	for _, want := range []codes.Code{codes.OK, codes.AlreadyExists} {
		r, err := api.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{probe}})
		if err != nil || len(r.Results) != 1 || codes.Code(r.Results[0].Status.Code) != want {
			t.Fatalf("the probe: %v %v, want %v", r, err, want)
		}
		e := r.Results[0].Entry
		if e.GetId() == "" || e.JwtSvidTtl != 60 || e.Hint != "hint" || !e.StoreSvid {
			t.Errorf("the probe shows %v", e)
		}
		id = e.Id
	}
	if r, err := api.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}}); err != nil || r.Results[0].Status.Code != 0 {
		t.Errorf("deleting the probe: %v %v", r, err)
	}
	var ids []string
	const n = 450
	for from := 0; from < n; from += 50 {
		req := &entryv1.BatchCreateEntryRequest{}
		for i := from; i < from+50; i++ {
			req.Entries = append(req.Entries, &types.Entry{ParentId: pid(fmt.Sprint("/spire/agent/k8s_psat/prod/", i%7)), SpiffeId: pid(fmt.Sprint("/ns/x/sa/y", i)), Selectors: sels(fmt.Sprint("k8s:pod-uid:", i)),
				X509SvidTtl: 3600, DnsNames: []string{"y.x.svc"}, Hint: "h"})
		}
		r, err := api.BatchCreateEntry(t.Context(), req)
		if err != nil || len(r.Results) != 50 {
			t.Fatal(r, err)
		}
		for _, x := range r.Results {
			if x.Status.Code != 0 || x.Entry.GetId() == "" {
				t.Fatal(x)
			}
			ids = append(ids, x.Entry.Id)
		}
	}
	all := everyEntry(t, api)
	if len(all) != before+n {
		t.Errorf("%d entries are listed, want %d", len(all), before+n)
	}
	// It sends the entry whole, with no mask.
	var update []*types.Entry
	for _, e := range all {
		if len(update) < 50 && e.Hint == "h" {
			update = append(update, &types.Entry{Id: e.Id, ParentId: e.ParentId, SpiffeId: e.SpiffeId, Selectors: e.Selectors, X509SvidTtl: 1800, Hint: "new"})
		}
	}
	r, err := api.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: update})
	if err != nil || len(r.Results) != 50 {
		t.Fatal(r, err)
	}
	for _, x := range r.Results {
		if x.Status.Code != 0 || x.Entry.Hint != "new" || x.Entry.X509SvidTtl != 1800 || len(x.Entry.DnsNames) != 0 {
			t.Fatalf("update: %v", x)
		}
	}
	for from := 0; from < n; from += 200 {
		r, err := api.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids[from:min(n, from+200)]})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range r.Results {
			if x.Status.Code != 0 {
				t.Fatal(x)
			}
		}
	}
	if got := len(everyEntry(t, api)); got != before {
		t.Errorf("%d entries are left, want %d", got, before)
	}
}

func controllerFederation(t *testing.T, api trustdomainv1.TrustDomainClient) {
	const n = 120
	name := func(i int) string { return fmt.Sprintf("td%03d.example", i) }
	p := newPartner(t, "shared.example")
	rel := func(i int, url string) *types.FederationRelationship {
		if i%2 == 0 {
			return webRelationship(name(i), url)
		}
		b := p.proto()
		b.TrustDomain = name(i)
		return spiffeRelationship(name(i), url, "spiffe://"+name(i)+"/spire/server", b)
	}
	list := func() (all []*types.FederationRelationship) {
		t.Helper()
		for token := ""; ; {
			r, err := api.ListFederationRelationships(t.Context(), &trustdomainv1.ListFederationRelationshipsRequest{PageSize: 200, PageToken: token})
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, r.FederationRelationships...)
			if token = r.NextPageToken; token == "" {
				return all
			}
		}
	}
	for from := 0; from < n; from += 50 {
		var rels []*types.FederationRelationship
		for i := from; i < min(n, from+50); i++ {
			rels = append(rels, rel(i, "https://127.0.0.1:1/"))
		}
		for _, st := range create(t, api, rels...) {
			if st.Code != 0 {
				t.Fatal(st)
			}
		}
	}
	all := list()
	if len(all) != n {
		t.Fatalf("%d are listed, want %d", len(all), n)
	}
	for i, f := range all { // what it reads back must be what it would write: it compares, and updates what differs
		if want := rel(i, "https://127.0.0.1:1/"); f.TrustDomain != want.TrustDomain || f.BundleEndpointUrl != want.BundleEndpointUrl || f.GetHttpsSpiffe().GetEndpointSpiffeId() != want.GetHttpsSpiffe().GetEndpointSpiffeId() ||
			(f.GetHttpsWeb() == nil) != (want.GetHttpsWeb() == nil) {
			t.Errorf("listed %v, want %v", f, want)
		}
	}
	// An update comes whole as well, without a bundle.
	up, err := api.BatchUpdateFederationRelationship(t.Context(), &trustdomainv1.BatchUpdateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{
		webRelationship(name(0), "https://127.0.0.1:2/"), {TrustDomain: name(1), BundleEndpointUrl: "https://127.0.0.1:2/", BundleEndpointProfile: rel(1, "").BundleEndpointProfile}}})
	if err != nil || up.Results[0].Status.Code != 0 || up.Results[1].Status.Code != 0 || len(up.Results[1].FederationRelationship.TrustDomainBundle.GetX509Authorities()) != 1 {
		t.Errorf("update: %v %v", up, err)
	}
	var names []string
	for i := range n {
		names = append(names, name(i))
	}
	for from := 0; from < n; from += 200 {
		r, err := api.BatchDeleteFederationRelationship(t.Context(), &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: names[from:min(n, from+200)]})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range r.Results {
			if x.Status.Code != 0 {
				t.Fatal(x)
			}
		}
	}
	if left := list(); len(left) != 0 {
		t.Errorf("%d are left", len(left))
	}
}
