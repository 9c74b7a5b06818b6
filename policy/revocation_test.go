package policy

import (
	"crypto/sha256"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

func TestRevocations(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Unix(1_800_000_000, 0)
	leaf := func(id string, serial int64, issued time.Time, authority ...byte) *x509.Certificate {
		uri, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		return &x509.Certificate{Raw: []byte{0}, URIs: []*url.URL{uri}, SerialNumber: big.NewInt(serial), NotBefore: issued, AuthorityKeyId: authority,
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}
	}
	id := func(pattern string) *policyv1.Revocation {
		return &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_SpiffeId{SpiffeId: pattern}}
	}
	jti := sha256.Sum256([]byte("one"))
	prefix := make([]byte, 18)
	prefix[17] = 7
	tests := []struct {
		name       string
		revocation *policyv1.Revocation
		id         string
		serial     int64
		issued     time.Time
		authority  []byte
		jti        string
		x509, jwt  bool
	}{
		{name: "an ID", revocation: id("spiffe://example.org/web"), id: "spiffe://example.org/web", serial: 5, issued: now, x509: true, jwt: true},
		{name: "another ID", revocation: id("spiffe://example.org/web"), id: "spiffe://example.org/web2", serial: 5, issued: now},
		{name: "an ID of another trust domain", revocation: id("spiffe://partner.example/web"), id: "spiffe://partner.example/web", serial: 5, issued: now, x509: true, jwt: true},
		{name: "a pattern covers its root", revocation: id("spiffe://example.org/web/**"), id: "spiffe://example.org/web", serial: 5, issued: now, x509: true, jwt: true},
		{name: "a star", revocation: id("spiffe://example.org/*/db"), id: "spiffe://example.org/a/db", serial: 5, issued: now, x509: true, jwt: true},
		{name: "a serial number", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_Serial{Serial: []byte{1, 0}}}, id: "spiffe://example.org/web", serial: 256, issued: now, x509: true},
		{name: "a serial number of another trust domain", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_Serial{Serial: []byte{1, 0}}}, id: "spiffe://partner.example/web", serial: 256, issued: now},
		{name: "a longer serial number", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_Serial{Serial: []byte{1, 0}}}, id: "spiffe://example.org/web", serial: 65536, issued: now},
		{name: "a prefix", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_SerialPrefix{SerialPrefix: prefix}}, id: "spiffe://example.org/web", serial: 7<<16 + 9, issued: now, x509: true},
		{name: "another prefix", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_SerialPrefix{SerialPrefix: prefix}}, id: "spiffe://example.org/web", serial: 8<<16 + 7, issued: now},
		{name: "a jti", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_JtiHash{JtiHash: jti[:]}}, id: "spiffe://example.org/web", serial: 5, issued: now, jti: "one", jwt: true},
		{name: "another jti", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_JtiHash{JtiHash: jti[:]}}, id: "spiffe://example.org/web", serial: 5, issued: now, jti: "two"},
		{name: "an authority", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_AuthorityId{AuthorityId: "0a"}}, id: "spiffe://example.org/web", serial: 5, issued: now, authority: []byte{10}, x509: true},
		{name: "an authority that is left out", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_AuthorityId{AuthorityId: "0a"}}, id: "spiffe://example.org/web", serial: 5, issued: now, x509: true},
		{name: "an authority that is left out, of another trust domain", revocation: &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_AuthorityId{AuthorityId: "0a"}}, id: "spiffe://other.example/web", serial: 5, issued: now},
		{name: "issued before", revocation: &policyv1.Revocation{Name: "r", IssuedBefore: now.Unix(), Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/web"}}, id: "spiffe://example.org/web", serial: 5, issued: now.Add(-time.Second), x509: true, jwt: true},
		{name: "issued after", revocation: &policyv1.Revocation{Name: "r", IssuedBefore: now.Unix(), Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/web"}}, id: "spiffe://example.org/web", serial: 5, issued: now},
		{name: "tokens only", revocation: &policyv1.Revocation{Name: "r", TokensOnly: true, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/web"}}, id: "spiffe://example.org/web", serial: 5, issued: now, jwt: true},
		{name: "a target of the future", revocation: &policyv1.Revocation{Name: "r"}, id: "spiffe://example.org/web", serial: 5, issued: now, x509: true, jwt: true},
		{name: "a malformed pattern", revocation: id("spiffe://*/web"), id: "spiffe://example.org/web", serial: 5, issued: now, x509: true, jwt: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := CompileRevocations(&policyv1.RevocationSet{Revision: 3, Revocations: []*policyv1.Revocation{tt.revocation}}, td)
			if name, found := r.X509SVID(leaf(tt.id, tt.serial, tt.issued, tt.authority...)); found != tt.x509 || found && name != "r" {
				t.Errorf("X509SVID = %q, %t; want %t", name, found, tt.x509)
			}
			if name, found := r.JWTSVID(spiffeid.RequireFromString(tt.id), tt.jti, tt.issued); found != tt.jwt || found && name != "r" {
				t.Errorf("JWTSVID = %q, %t; want %t", name, found, tt.jwt)
			}
		})
	}
}

// TestDecideRevoked: no rule lets a revoked peer through, and no mode of the defaults.
func TestDecideRevoked(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	p, err := Compile(&policyv1.PolicySet{Format: Format, TrustDomain: "example.org", Defaults: policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW})
	if err != nil {
		t.Fatal(err)
	}
	r := &Request{Service: spiffeid.RequireFromString("spiffe://example.org/db"), Peer: spiffeid.RequireFromString("spiffe://example.org/web")}
	if d := p.Decide(r); !d.Allowed {
		t.Fatalf("Decide = %+v; the test proves nothing", d)
	}
	p = p.WithRevocations(CompileRevocations(&policyv1.RevocationSet{Revocations: []*policyv1.Revocation{
		{Name: "web", Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/web"}},
	}}, td))
	if d := p.Decide(r); d.Allowed || d.Reason != ReasonRevoked || d.Revocation != "web" {
		t.Errorf("Decide = %+v; want a denial by the revocation web", d)
	}
	if d := p.MightAllow(r.Service, r.Peer); d.Allowed || d.Reason != ReasonRevoked {
		t.Errorf("MightAllow = %+v; want a denial by the revocation web", d)
	}
}
