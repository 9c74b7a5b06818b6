package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/spiffe"
)

// mint returns a connection with a minted X509-SVID of id, and its key.
func (h *harness) mint(id string) (*grpc.ClientConn, *ecdsa.PrivateKey) {
	h.t.Helper()
	k := key(h.t)
	minted, err := svidv1.NewSVIDClient(h.admin).MintX509SVID(h.t.Context(), &svidv1.MintX509SVIDRequest{
		Csr: requestFor(h.t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(h.t, id)}})})
	if err != nil {
		h.t.Fatal(err)
	}
	return h.dial(minted.Svid.CertChain, k), k
}

func downstreamEntry(path string) *types.Entry {
	e := entry(path, "unix:uid:7")
	e.Downstream = true
	return e
}

func newDownstreamCA(ctx context.Context, conn *grpc.ClientConn, csr []byte, ttl int32) (*svidv1.NewDownstreamX509CAResponse, error) {
	return svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: ttl})
}

// Only an ID that an operator made a downstream CA's gets a CA certificate, and it gets that and nothing else.
func TestSPIRE10_NewDownstreamX509CA(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.create(downstreamEntry("/nested"), entry("/web", "unix:uid:8"))
	nested, _ := h.mint("spiffe://example.org/nested")
	web, _ := h.mint("spiffe://example.org/web")
	caKey := key(t)
	good := requestFor(t, caKey, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org")}})

	agent := h.agent()
	for name, conn := range map[string]*grpc.ClientConn{"a workload": web, "an agent": agent.conn, "anonymous": h.dial(nil, nil), "the admin socket": h.admin} {
		if _, err := newDownstreamCA(t.Context(), conn, good, 0); code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v, want PermissionDenied", name, err)
		}
		_, err := bundlev1.NewBundleClient(conn).PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{})
		if code(err) != codes.PermissionDenied {
			t.Errorf("%s publishes a JWT key: %v, want PermissionDenied", name, err)
		}
	}
	if _, err := entryv1.NewEntryClient(nested).ListEntries(t.Context(), &entryv1.ListEntriesRequest{}); code(err) != codes.PermissionDenied {
		t.Errorf("a downstream CA lists entries: %v", err)
	}

	broken := append([]byte(nil), good...)
	broken[len(broken)-1] ^= 1
	for _, tt := range []struct {
		name string
		csr  []byte
		ttl  int32
	}{
		{"no CSR", nil, 0},
		{"garbage", []byte{1, 2, 3}, 0},
		{"a bad signature", broken, 0},
		{"a workload's ID", requestFor(t, caKey, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/web")}}), 0},
		{"another trust domain", requestFor(t, caKey, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.com")}}), 0},
		{"a trailing slash", requestFor(t, caKey, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/")}}), 0},
		{"two IDs", requestFor(t, caKey, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org"), uri(t, "spiffe://example.org")}}), 0},
		{"a negative TTL", good, -1},
	} {
		if _, err := newDownstreamCA(t.Context(), nested, tt.csr, tt.ttl); code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", tt.name, err)
		}
	}

	r, err := newDownstreamCA(t.Context(), nested, good, 3600)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(r.CaCertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(r.CaCertChain) != 1 || len(r.X509Authorities) != 1 || !cert.IsCA || time.Until(cert.NotAfter).Round(time.Minute) != time.Hour || !cert.PublicKey.(*ecdsa.PublicKey).Equal(caKey.Public()) {
		t.Errorf("got %d certificates, %d roots, the first %+v", len(r.CaCertChain), len(r.X509Authorities), cert)
	}
	records := h.audit("downstreamca.issued")
	if len(records) != 1 || records[0]["actor"] != "spiffe://example.org/nested" || records[0]["actor_kind"] != "downstream" {
		t.Errorf("audit: %v", records)
	}
	if n := len(h.audit("downstreamca.refused")); n != 8 {
		t.Errorf("%d refusals in the audit log, want 8", n)
	}
	// The right ends with the entry, on the connection that is open.
	id := entryOf(t, h, "/nested")
	if _, err := entryv1.NewEntryClient(h.admin).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}}); err != nil {
		t.Fatal(err)
	}
	if _, err := newDownstreamCA(t.Context(), nested, good, 0); code(err) != codes.PermissionDenied {
		t.Errorf("after its entry is gone: %v, want PermissionDenied", err)
	}
}

func entryOf(t *testing.T, h *harness, path string) string {
	t.Helper()
	r, err := entryv1.NewEntryClient(h.admin).ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: pid(path)}})
	if err != nil || len(r.Entries) != 1 {
		t.Fatal(r, err)
	}
	return r.Entries[0].Id
}

// Who steals the key of a downstream CA can sign any ID of the trust domain; that of an admin, an agent or another
// downstream CA opens no door here.
func TestStolenDownstreamCACannotCommandThisOne(t *testing.T) {
	c := config(t.TempDir())
	c.AdminIDs = []string{"spiffe://example.org/ops"}
	h := start(t, c)
	h.create(downstreamEntry("/nested"))
	agent := h.join()
	own, err := x509.ParseCertificate(agent.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	nested, _ := h.mint("spiffe://example.org/nested")
	caKey := key(t)
	r, err := newDownstreamCA(t.Context(), nested, requestFor(t, caKey, &x509.CertificateRequest{}), 0)
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := x509.ParseCertificate(r.CaCertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(r.X509Authorities[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		id     string
		serial string // of the real one
		call   func(*grpc.ClientConn) error
	}{
		{"spiffe://example.org/ops", "1", func(c *grpc.ClientConn) error {
			_, err := entryv1.NewEntryClient(c).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
			return err
		}},
		{agent.ID.String(), own.SerialNumber.String(), func(c *grpc.ClientConn) error {
			_, err := entryv1.NewEntryClient(c).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
			return err
		}},
		{"spiffe://example.org/nested", "2", func(c *grpc.ClientConn) error {
			_, err := newDownstreamCA(t.Context(), c, requestFor(t, key(t), &x509.CertificateRequest{}), 0)
			return err
		}},
	} {
		k := key(t)
		serial, _ := new(big.Int).SetString(tt.serial, 10)
		forge := func(parent *x509.Certificate) [][]byte {
			der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: serial, URIs: []*url.URL{uri(t, tt.id)}, NotBefore: time.Now().Add(-time.Minute),
				NotAfter: time.Now().Add(time.Minute), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}, parent, k.Public(), caKey)
			if err != nil {
				t.Fatal(err)
			}
			return append([][]byte{der}, r.CaCertChain...)
		}
		// As it is, and with the key id of the CA's own authority in it.
		liar := *issuer
		liar.SubjectKeyId = root.SubjectKeyId
		for name, chain := range map[string][][]byte{"forged": forge(issuer), "with our key id": forge(&liar)} {
			leaf, _ := x509.ParseCertificate(chain[0])
			// Anybody else accepts the first: it is an SVID of the trust domain. The lie is refused by everybody.
			if _, _, err := spiffe.VerifyX509SVID([]*x509.Certificate{leaf, issuer}, h.ca.set, spiffe.X509Options{}); (name == "forged") != (err == nil) {
				t.Fatalf("%s: verified with %v", name, err)
			}
			if err := tt.call(h.dial(chain, k)); err == nil {
				t.Errorf("%s, %s: was let in", tt.id, name)
			} else if status.Code(err) != codes.Unavailable {
				t.Errorf("%s, %s: %v, want the handshake refused", tt.id, name, err)
			}
		}
	}
}

func TestSPIRE10_PublishJWTAuthority(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.create(downstreamEntry("/nested"))
	conn, _ := h.mint("spiffe://example.org/nested")
	client := bundlev1.NewBundleClient(conn)
	spki, err := x509.MarshalPKIXPublicKey(key(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	expires := time.Now().Add(time.Hour).Unix()
	for name, k := range map[string]*types.JWTKey{
		"nothing":          nil,
		"no key id":        {PublicKey: spki, ExpiresAt: expires},
		"no key":           {KeyId: "k", ExpiresAt: expires},
		"garbage":          {KeyId: "k", PublicKey: []byte("garbage"), ExpiresAt: expires},
		"no expiry":        {KeyId: "k", PublicKey: spki},
		"expired":          {KeyId: "k", PublicKey: spki, ExpiresAt: time.Now().Unix() - 1},
		"a negative time":  {KeyId: "k", PublicKey: spki, ExpiresAt: -1},
		"the end of times": {KeyId: "k", PublicKey: spki, ExpiresAt: 1<<63 - 1},
	} {
		if _, err := client.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: k}); code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	r, err := client.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: &types.JWTKey{KeyId: "nested-1", PublicKey: spki, ExpiresAt: expires}})
	if err != nil || len(r.JwtAuthorities) != 2 {
		t.Fatal(r, err)
	}
	b, err := bundlev1.NewBundleClient(h.dial(nil, nil)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil || len(b.JwtAuthorities) != 2 || b.JwtAuthorities[1].KeyId != "nested-1" || b.JwtAuthorities[1].ExpiresAt != expires {
		t.Errorf("the bundle has %v (%v)", b.GetJwtAuthorities(), err)
	}
	if n := len(h.audit("downstreamca.published")); n != 9 { // 8 refusals and this
		t.Errorf("%d audit records, want 9", n)
	}
	// An agent that follows hears of it.
	if f := hello(t, h.agent(), "", 0); f != nil {
		if m := follow(t, f); len(m.Bundles) != 1 || len(m.Bundles[0].JwtAuthorities) != 2 {
			t.Errorf("a follower holds %v", m.Bundles)
		}
	}
	// An operator finds it, with whose it is, and takes it out.
	admin := adminv1.NewAdminClient(h.admin)
	list, err := admin.ListAppendedAuthorities(t.Context(), &adminv1.ListAppendedAuthoritiesRequest{})
	if err != nil || len(list.Authorities) != 1 || list.Authorities[0].AuthorityId != "nested-1" || !strings.Contains(list.Authorities[0].Source, "spiffe://example.org/nested") {
		t.Errorf("listed: %v, %v", list, err)
	}
	if _, err := admin.RevokeAppendedAuthority(t.Context(), &adminv1.RevokeAppendedAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT, AuthorityId: "nested-1"}); err != nil {
		t.Error(err)
	}
	if b := h.ca.set.Bundle(); len(b.JWT) != 1 {
		t.Errorf("after it was removed the bundle has %d JWT keys", len(b.JWT))
	}
	if _, err := admin.RevokeAppendedAuthority(t.Context(), &adminv1.RevokeAppendedAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT, AuthorityId: "nested-1"}); code(err) != codes.NotFound {
		t.Errorf("removing it again: %v", err)
	}
	if _, err := client.PublishWITAuthority(t.Context(), &bundlev1.PublishWITAuthorityRequest{}); code(err) != codes.Unimplemented {
		t.Errorf("WIT: %v", err)
	}
}

func TestDownstreamConfigIsChecked(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"downstream.max_ttl": func(c *Config) { c.Downstream.MaxTTL = time.Second },
		"downstream.depth":   func(c *Config) { c.Downstream.Depth = 5 },
	} {
		c := config(t.TempDir())
		change(&c)
		if err := c.Check(); err == nil {
			t.Errorf("%s: a wrong value is taken", name)
		}
	}
}
