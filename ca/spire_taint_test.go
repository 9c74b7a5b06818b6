package ca

import (
	"crypto/x509"
	"testing"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
)

// TestSPIREAgentLeavesATaintedAuthority: what a SPIRE agent needs to renew every SVID of a tainted authority within one
// sync: the bundle says which is tainted, by the subject key ID that its SVIDs name, and what is signed then is another's.
// [SPIRE-PROTOCOL §8, §17.6]
func TestSPIREAgentLeavesATaintedAuthority(t *testing.T) {
	h := start(t, quiet(t.TempDir()))
	a := h.join()
	h.create(under(a.ID.Path(), "web", "/web", "unix:uid:1"), under(a.ID.Path(), "db", "/db", "unix:uid:2"))
	mustSync(t, a)
	issuers := func() (out []string) {
		t.Helper()
		results, err := a.X509SVIDs(t.Context(), "web", "db")
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if r.Status.Code != 0 {
				t.Fatal(r.Status)
			}
			leaf, err := x509.ParseCertificate(r.Svid.CertChain[0])
			if err != nil {
				t.Fatal(err)
			}
			pool := x509.NewCertPool()
			for _, root := range a.Server.Bundle.X509Authorities() {
				pool.AddCert(root)
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				t.Error(err)
			}
			out = append(out, string(leaf.AuthorityKeyId))
		}
		return out
	}
	before := issuers()
	local := localauthorityv1.NewLocalAuthorityClient(h.admin)
	state, err := local.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := local.PrepareX509Authority(t.Context(), &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.FetchBundle(t.Context()); err != nil { // by which the agent acknowledges it
		t.Fatal(err)
	}
	if _, err := local.ActivateX509Authority(t.Context(), &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: prepared.PreparedAuthority.AuthorityId}); err != nil {
		t.Fatal(err)
	}
	if _, err := local.TaintX509Authority(t.Context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: state.Active.AuthorityId}); err != nil {
		t.Fatal(err)
	}
	// The next sync: entries are as they were, the bundle is not.
	if s := mustSync(t, a); len(s.Dropped) != 0 || len(a.Entries) != 2 {
		t.Errorf("the sync after the taint: %+v", s)
	}
	sequence := a.Bundle.SequenceNumber
	if err := a.FetchBundle(t.Context()); err != nil {
		t.Fatal(err)
	}
	tainted := map[string]bool{}
	for _, x := range a.Bundle.X509Authorities {
		root, err := x509.ParseCertificate(x.Asn1)
		if err != nil {
			t.Fatal(err)
		}
		tainted[string(root.SubjectKeyId)] = x.Tainted
	}
	if len(tainted) != 2 || a.Bundle.SequenceNumber <= sequence {
		t.Errorf("%d authorities in the bundle, sequence number %d after %d", len(tainted), a.Bundle.SequenceNumber, sequence)
	}
	for i, now := range issuers() {
		if was := before[i]; !tainted[was] || now == was || tainted[now] {
			t.Errorf("SVID %d: of %x before (tainted: %t), of %x now (tainted: %t)", i, was, tainted[was], now, tainted[now])
		}
	}
	if _, err := a.SVIDAPI().NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "web", Audience: []string{"db"}}); err != nil {
		t.Errorf("JWT-SVIDs have authorities of their own: %v", err)
	}
}
