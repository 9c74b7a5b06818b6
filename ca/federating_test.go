package ca

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/spiffe"
)

// A partner is a foreign trust domain with a bundle endpoint.
type partner struct {
	t    *testing.T
	name string
	root *spireRoot
	doc  atomic.Pointer[[]byte]
}

func newPartner(t *testing.T, name string) *partner {
	p := &partner{t: t, name: name, root: newSPIRERoot(t, func(c *x509.Certificate) { c.URIs[0].Host = name })}
	p.publish(1)
	return p
}

func (p *partner) publish(sequence uint64, more ...*x509.Certificate) {
	p.t.Helper()
	b := spiffebundle.New(spiffeid.RequireTrustDomainFromString(p.name))
	for _, c := range append(more, p.root.cert) {
		b.AddX509Authority(c)
	}
	b.SetSequenceNumber(sequence)
	b.SetRefreshHint(time.Hour)
	doc, err := spiffe.MarshalBundle(b)
	if err != nil {
		p.t.Fatal(err)
	}
	p.doc.Store(&doc)
}

// proto is the partner's bundle as an operator gives it.
func (p *partner) proto() *types.Bundle {
	return &types.Bundle{TrustDomain: p.name, X509Authorities: []*types.X509Certificate{{Asn1: p.root.cert.Raw}}}
}

// serve runs an endpoint that serves the bundle of shown and proves itself with a certificate of p's root: an SVID if id is
// given, one for 127.0.0.1 otherwise.
func (p *partner) serve(id string, shown *partner) string {
	p.t.Helper()
	k := key(p.t)
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}
	if id == "" {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	} else {
		u, err := url.Parse(id)
		if err != nil {
			p.t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.root.cert, k.Public(), p.root.key)
	if err != nil {
		p.t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(*shown.doc.Load()) }))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: k}}}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	p.t.Cleanup(s.Close)
	return s.URL
}

func (h *harness) federatedBundle(name string) *types.Bundle {
	h.t.Helper()
	b, err := bundlev1.NewBundleClient(h.admin).GetFederatedBundle(h.t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: name})
	if code(err) == codes.NotFound {
		return nil
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return b
}

func webRelationship(name, url string) *types.FederationRelationship {
	return &types.FederationRelationship{TrustDomain: name, BundleEndpointUrl: url, BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}}
}

func spiffeRelationship(name, url, id string, bundle *types.Bundle) *types.FederationRelationship {
	return &types.FederationRelationship{TrustDomain: name, BundleEndpointUrl: url, TrustDomainBundle: bundle,
		BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: id}}}
}

func create(t *testing.T, api trustdomainv1.TrustDomainClient, rels ...*types.FederationRelationship) []*types.Status {
	t.Helper()
	r, err := api.BatchCreateFederationRelationship(t.Context(), &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: rels})
	if err != nil {
		t.Fatal(err)
	}
	var out []*types.Status
	for _, x := range r.Results {
		out = append(out, x.Status)
	}
	return out
}

func wantCodes(t *testing.T, what string, got []*types.Status, want ...codes.Code) {
	t.Helper()
	var have []codes.Code
	for _, s := range got {
		have = append(have, codes.Code(s.Code))
	}
	if !slices.Equal(have, want) {
		t.Errorf("%s: %v (%v), want %v", what, have, got, want)
	}
}

// FED-12, FED-56: both profiles, from creation to the end, with what workloads' agents are told on the way; kept over a restart.
func TestFED_12_FederationByBothProfiles(t *testing.T) {
	dir := t.TempDir()
	byWeb, bySPIFFE, served := newPartner(t, "web.example"), newPartner(t, "self.example"), newPartner(t, "served.example")
	roots := filepath.Join(dir, "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: byWeb.root.cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config(dir)
	c.Federation.WebRoots = roots
	h := start(t, c)
	api := trustdomainv1.NewTrustDomainClient(h.admin)
	selfURL := bySPIFFE.serve("spiffe://self.example/bundle", bySPIFFE)
	servedURL := bySPIFFE.serve("spiffe://self.example/for-others", served)
	wantCodes(t, "create", create(t, api, webRelationship("web.example", byWeb.serve("", byWeb)), spiffeRelationship("self.example", selfURL, "spiffe://self.example/bundle", bySPIFFE.proto()),
		spiffeRelationship("served.example", servedURL, "spiffe://self.example/for-others", nil)), codes.OK, codes.OK, codes.OK)
	until(t, "the Web partner's bundle is fetched", func() bool { return h.federatedBundle("web.example") != nil })
	if b := h.federatedBundle("web.example"); len(b.X509Authorities) != 1 || string(b.X509Authorities[0].Asn1) != string(byWeb.root.cert.Raw) || b.SequenceNumber != 1 || b.RefreshHint != 3600 {
		t.Errorf("fetched: %v", b)
	}
	// FED-11: what one endpoint serves for another trust domain is kept under that one's name.
	until(t, "the served partner's bundle is fetched", func() bool { return h.federatedBundle("served.example") != nil })
	for _, p := range []*partner{bySPIFFE, served} {
		if b := h.federatedBundle(p.name); len(b.X509Authorities) != 1 || string(b.X509Authorities[0].Asn1) != string(p.root.cert.Raw) {
			t.Errorf("bundle of %s: %v", p.name, b)
		}
	}
	// RefreshBundle answers when the new bundle is there.
	second := newSPIRERoot(t, func(c *x509.Certificate) { c.URIs[0].Host = "web.example" })
	byWeb.publish(2, second.cert)
	if _, err := api.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "web.example"}); err != nil {
		t.Fatal(err)
	}
	got, err := api.GetFederationRelationship(t.Context(), &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "web.example"})
	if err != nil || len(got.TrustDomainBundle.GetX509Authorities()) != 2 || got.TrustDomainBundle.SequenceNumber != 2 || got.GetHttpsWeb() == nil {
		t.Errorf("after RefreshBundle: %v %v", got, err)
	}
	// An agent that serves an entry which federates is told, and of the end too. [FED-29]
	ag := h.agent()
	e := entry("/fed", "unix:uid:1")
	e.ParentId = &types.SPIFFEID{TrustDomain: "example.org", Path: ag.id.Path()}
	e.FederatesWith = []string{"web.example"}
	if r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}}); err != nil || r.Results[0].Status.Code != 0 {
		t.Fatal(r, err)
	}
	s := hello(t, ag, "", 0)
	if m := follow(t, s); len(m.Bundles) != 2 {
		t.Errorf("the agent is told %v", m.Bundles)
	}
	h.close()

	h = start(t, c)
	api = trustdomainv1.NewTrustDomainClient(h.admin)
	if b := h.federatedBundle("web.example"); b == nil || b.SequenceNumber != 2 {
		t.Errorf("after a restart [FED-07]: %v", b)
	}
	if r, err := api.ListFederationRelationships(t.Context(), &trustdomainv1.ListFederationRelationshipsRequest{}); err != nil || len(r.FederationRelationships) != 3 {
		t.Errorf("after a restart: %v %v", r, err)
	}
	del, err := api.BatchDeleteFederationRelationship(t.Context(), &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"web.example", "web.example", "example.org"}})
	if err != nil {
		t.Fatal(err)
	}
	wantCodes(t, "delete", []*types.Status{del.Results[0].Status, del.Results[1].Status, del.Results[2].Status}, codes.OK, codes.NotFound, codes.InvalidArgument)
	if b := h.federatedBundle("web.example"); b != nil {
		t.Errorf("after the end [FED-29]: %v", b)
	}
	for _, event := range []string{"federation.create", "federation.fetched", "federation.delete"} {
		if len(h.audit(event)) == 0 {
			t.Errorf("no audit record of %s", event)
		}
	}
	if rec := h.audit("federation.fetched")[0]["details"]; !strings.Contains(fmt.Sprint(rec), "sha256") || !strings.Contains(fmt.Sprint(rec), "url") { // FED-31
		t.Errorf("audit record of a fetch: %v", rec)
	}
}

// FED-15, FED-17, FED-18, FED-50, FED-51, FED-52, FED-57, V149: what is no relationship is refused, each with its own status.
func TestFED_15_WhatIsNoRelationshipIsRefused(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := trustdomainv1.NewTrustDomainClient(h.admin)
	p := newPartner(t, "partner.example")
	web := func(url string) *types.FederationRelationship { return webRelationship("partner.example", url) }
	own := p.proto()
	own.X509Authorities = h.bundle().X509Authorities
	ownJWT := p.proto()
	ownJWT.JwtAuthorities = h.bundle().JwtAuthorities
	other := p.proto()
	other.TrustDomain = "other.example"
	tainted := p.proto()
	tainted.X509Authorities[0].Tainted = true
	garbage := &types.Bundle{TrustDomain: "partner.example", X509Authorities: []*types.X509Certificate{{Asn1: []byte("x")}}}
	with := func(b *types.Bundle) *types.FederationRelationship {
		f := web("https://h/")
		f.TrustDomainBundle = b
		return f
	}
	const id = "spiffe://partner.example/bundle"
	for _, tt := range []struct {
		name string
		rel  *types.FederationRelationship
		text string
	}{
		{"nothing", nil, "trust_domain"},
		{"no trust domain", webRelationship("", "https://h/"), "trust_domain"},
		{"our own trust domain [ID-24]", webRelationship("example.org", "https://h/"), "itself"},
		{"a SPIFFE ID", webRelationship("spiffe://partner.example/x", "https://h/"), "trust_domain"},
		{"no URL", web(""), "missing"},
		{"http [V149]", web("http://h/b"), "https"},
		{"HTTP", web("HTTP://h/b"), "https"},
		{"no scheme", web("h/b"), "https"},
		{"a user [V149]", web("https://u@h/b"), "FED-18"},
		{"an empty user", web("https://@h/b"), "FED-18"},
		{"no host", web("https:///b"), "host"},
		{"opaque", web("https:h"), "host"},
		{"port 0", web("https://h:0/"), "port"},
		{"port 65536", web("https://h:65536/"), "port"},
		{"a port that is none", web("https://h:/"), "port"},
		{"a fragment", web("https://h/#x"), "fragment"},
		{"garbage", web("https://h/%zz"), "URL"},
		{"a URL of 2049 bytes", web("https://h/" + strings.Repeat("a", 2039)), "2048"},
		{"no profile", &types.FederationRelationship{TrustDomain: "partner.example", BundleEndpointUrl: "https://h/"}, "bundle_endpoint_profile"},
		{"an endpoint ID without a path", spiffeRelationship("partner.example", "https://h/", "spiffe://partner.example", p.proto()), "path"},
		{"no endpoint ID", spiffeRelationship("partner.example", "https://h/", "", p.proto()), "endpoint_spiffe_id"},
		{"no bundle to begin with", spiffeRelationship("partner.example", "https://h/", id, nil), "not known"},
		{"an endpoint of an unknown trust domain", spiffeRelationship("partner.example", "https://h/", "spiffe://unknown.example/b", p.proto()), "not known"},
		{"a bundle of another trust domain", with(other), "another trust domain"},
		{"a bundle with one of our keys [TDB-01]", with(own), "TDB-01"},
		{"a bundle with one of our JWT keys [TDB-01]", with(ownJWT), "TDB-01"},
		{"a bundle with a tainted authority", with(tainted), "tainted"},
		{"a bundle that is none", with(garbage), "x509_authorities"},
	} {
		st := create(t, api, tt.rel)[0]
		if codes.Code(st.Code) != codes.InvalidArgument || !strings.Contains(st.Message, tt.text) {
			t.Errorf("%s: %v %q; want InvalidArgument with %q", tt.name, codes.Code(st.Code), st.Message, tt.text)
		}
	}
	if st := create(t, api, web("http://user:pa55word@h/"))[0]; strings.Contains(st.Message, "pa55word") {
		t.Errorf("the password is repeated: %s", st.Message)
	}
	if r, err := api.ListFederationRelationships(t.Context(), &trustdomainv1.ListFederationRelationshipsRequest{}); err != nil || len(r.FederationRelationships) != 0 || len(h.ca.reg.Bundles()) != 0 {
		t.Errorf("after refusals: %v %v", r, err)
	}
	// A circle in which nobody's bundle is known cannot begin; the first half alone is refused already. With a bundle it can.
	a := spiffeRelationship("a.example", "https://127.0.0.1:1/", "spiffe://b.example/x", nil)
	b := spiffeRelationship("b.example", "https://127.0.0.1:1/", "spiffe://a.example/x", newPartner(t, "b.example").proto())
	wantCodes(t, "half a circle", create(t, api, a), codes.InvalidArgument)
	wantCodes(t, "a circle with a bundle", create(t, api, spiffeRelationship("a.example", "https://127.0.0.1:1/", "spiffe://a.example/x", newPartner(t, "a.example").proto()), b), codes.OK, codes.OK)
	wantCodes(t, "once more", create(t, api, b), codes.AlreadyExists)
	if _, err := api.BatchCreateFederationRelationship(t.Context(), &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: slices.Repeat([]*types.FederationRelationship{a}, 251)}); code(err) != codes.ResourceExhausted {
		t.Errorf("251 in one call: %v", err)
	}
	if _, err := api.BatchDeleteFederationRelationship(t.Context(), &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: slices.Repeat([]string{"a.example"}, 10_000)}); code(err) != codes.ResourceExhausted {
		t.Errorf("10,000 in one call: %v", err)
	}
	for name, err := range map[string]error{
		"get unknown": func() error {
			_, err := api.GetFederationRelationship(t.Context(), &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "no.example"})
			return err
		}(),
		"refresh unknown": func() error {
			_, err := api.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "no.example"})
			return err
		}(),
	} {
		if code(err) != codes.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := api.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "example.org"}); code(err) != codes.InvalidArgument {
		t.Errorf("refresh our own: %v", err)
	}
	if _, err := api.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "a.example"}); code(err) != codes.Internal || !strings.Contains(err.Error(), "refused") {
		t.Errorf("refresh from where nobody listens: %v", err)
	}
	st, err := adminv1.NewAdminClient(h.admin).ListFederationStatus(t.Context(), &adminv1.ListFederationStatusRequest{})
	if err != nil || len(st.Statuses) != 2 || !strings.Contains(st.Statuses[0].Error, "refused") || st.Statuses[0].SucceededAt != nil || st.Statuses[0].NextAt == nil {
		t.Errorf("status: %v %v", st, err)
	}
}

// Masks, updates and paging of relationships.
func TestFederationMasksUpdatesAndPages(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := trustdomainv1.NewTrustDomainClient(h.admin)
	var all []*types.FederationRelationship
	for i := range 25 {
		name := fmt.Sprintf("td-%02d.example", i)
		all = append(all, spiffeRelationship(name, "https://127.0.0.1:1/", "spiffe://"+name+"/b", newPartner(t, name).proto()))
	}
	for _, st := range create(t, api, all...) {
		if st.Code != 0 {
			t.Fatal(st)
		}
	}
	var names []string
	for token := ""; ; {
		r, err := api.ListFederationRelationships(t.Context(), &trustdomainv1.ListFederationRelationshipsRequest{PageSize: 10, PageToken: token, OutputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true}})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range r.FederationRelationships {
			if f.BundleEndpointUrl == "" || f.BundleEndpointProfile != nil || f.TrustDomainBundle != nil {
				t.Errorf("mask: %v", f)
			}
			names = append(names, f.TrustDomain)
		}
		if token = r.NextPageToken; token == "" {
			break
		}
		if len(names) == 10 { // what goes between pages takes nobody else along
			api.BatchDeleteFederationRelationship(t.Context(), &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"td-09.example", "td-24.example"}})
		}
	}
	if len(names) != 24 || !slices.IsSorted(names) {
		t.Errorf("pages hold %v", names)
	}
	other, err := bundlev1.NewBundleClient(h.admin).ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: 1})
	if err != nil || other.NextPageToken == "" {
		t.Fatal(other, err)
	}
	for name, req := range map[string]*trustdomainv1.ListFederationRelationshipsRequest{"forged": {PageToken: "AAAA"}, "of another list": {PageToken: other.NextPageToken}, "negative size": {PageSize: -1},
		"huge token": {PageToken: strings.Repeat("A", 5000)}} {
		if _, err := api.ListFederationRelationships(t.Context(), req); code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	up := func(m *types.FederationRelationshipMask, f *types.FederationRelationship) *trustdomainv1.BatchUpdateFederationRelationshipResponse_Result {
		t.Helper()
		r, err := api.BatchUpdateFederationRelationship(t.Context(), &trustdomainv1.BatchUpdateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{f}, InputMask: m})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0]
	}
	const name = "td-03.example"
	if r := up(&types.FederationRelationshipMask{BundleEndpointUrl: true}, &types.FederationRelationship{TrustDomain: name, BundleEndpointUrl: "https://127.0.0.1:2/"}); r.Status.Code != 0 ||
		r.FederationRelationship.BundleEndpointUrl != "https://127.0.0.1:2/" || r.FederationRelationship.GetHttpsSpiffe().GetEndpointSpiffeId() != "spiffe://"+name+"/b" || len(r.FederationRelationship.TrustDomainBundle.X509Authorities) != 1 {
		t.Errorf("update of the URL: %v", r)
	}
	fresh := newPartner(t, name)
	if r := up(&types.FederationRelationshipMask{TrustDomainBundle: true}, &types.FederationRelationship{TrustDomain: name, TrustDomainBundle: fresh.proto()}); r.Status.Code != 0 ||
		string(r.FederationRelationship.TrustDomainBundle.X509Authorities[0].Asn1) != string(fresh.root.cert.Raw) || r.FederationRelationship.BundleEndpointUrl != "https://127.0.0.1:2/" {
		t.Errorf("update of the bundle: %v", r)
	}
	if r := up(nil, webRelationship(name, "https://127.0.0.1:3/")); r.Status.Code != 0 || r.FederationRelationship.GetHttpsWeb() == nil {
		t.Errorf("update of all: %v", r)
	}
	for what, r := range map[string]*trustdomainv1.BatchUpdateFederationRelationshipResponse_Result{
		"all, with no URL":     up(nil, webRelationship(name, "")),
		"the profile to none":  up(&types.FederationRelationshipMask{BundleEndpointProfile: true}, &types.FederationRelationship{TrustDomain: name}),
		"the URL to http":      up(&types.FederationRelationshipMask{BundleEndpointUrl: true}, webRelationship(name, "http://h/")),
		"of another's bundle":  up(&types.FederationRelationshipMask{TrustDomainBundle: true}, &types.FederationRelationship{TrustDomain: name, TrustDomainBundle: newPartner(t, "x.example").proto()}),
		"our own trust domain": up(nil, webRelationship("example.org", "https://h/")),
	} {
		if codes.Code(r.Status.Code) != codes.InvalidArgument || r.FederationRelationship != nil {
			t.Errorf("update: %s: %v", what, r)
		}
	}
	if r := up(nil, webRelationship("no.example", "https://h/")); codes.Code(r.Status.Code) != codes.NotFound {
		t.Errorf("update of an unknown one: %v", r)
	}
}

// Nobody but operators may touch relationships.
func TestFederationIsForOperators(t *testing.T) {
	h := start(t, config(t.TempDir()))
	for name, conn := range map[string]*grpc.ClientConn{"anyone": h.dial(nil, nil), "an agent": h.agent().conn} {
		api := trustdomainv1.NewTrustDomainClient(conn)
		for rpc, err := range map[string]error{
			"list": func() error {
				_, err := api.ListFederationRelationships(t.Context(), &trustdomainv1.ListFederationRelationshipsRequest{})
				return err
			}(),
			"create": func() error {
				_, err := api.BatchCreateFederationRelationship(t.Context(), &trustdomainv1.BatchCreateFederationRelationshipRequest{})
				return err
			}(),
			"refresh": func() error {
				_, err := api.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "x.example"})
				return err
			}(),
		} {
			if code(err) != codes.PermissionDenied {
				t.Errorf("%s by %s: %v", rpc, name, err)
			}
		}
	}
}

// FED-28: what fails, and since when, is in the metrics.
func TestFED_28_FailingFederationShowsInTheMetrics(t *testing.T) {
	c := config(t.TempDir())
	c.Metrics.Listen = "127.0.0.1:0"
	h := start(t, c)
	wantCodes(t, "create", create(t, trustdomainv1.NewTrustDomainClient(h.admin), webRelationship("partner.example", "https://127.0.0.1:1/")), codes.OK)
	metrics := func() string {
		t.Helper()
		resp, err := http.Get("http://" + h.ca.MetricsAddr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	defer http.DefaultClient.CloseIdleConnections()
	until(t, "the failure shows", func() bool { return strings.Contains(metrics(), "\nsignet_ca_federations_failing 1\n") })
	if text := metrics(); !strings.Contains(text, "\nsignet_ca_federations 1\n") || !strings.Contains(text, "\nsignet_ca_federation_age_seconds ") || strings.Contains(text, "partner.example") {
		t.Errorf("metrics:\n%s", text)
	}
}

// TestWebRootsAreAbsolute: a daemon's working directory is not the operator's.
func TestWebRootsAreAbsolute(t *testing.T) {
	_, err := ReadConfig([]byte(keysConfigBase+"seal: {key_file: /k}\nfederation: {web_roots: roots.pem}\n"), "ca.yaml")
	if err == nil || !strings.Contains(err.Error(), `federation.web_roots: "roots.pem" must be absolute`) {
		t.Errorf("ReadConfig = %v", err)
	}
}
