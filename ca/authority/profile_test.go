package authority

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A record with a certificate that verifiers would refuse, or that is not this trust domain's, is not loaded.
func TestAuthorityCertificatesThatAreNotOursRefused(t *testing.T) {
	signer := newKey(t)
	other := newKey(t)
	for _, tt := range []struct {
		name   string
		change func(*x509.Certificate)
		want   string
	}{
		{"ours", func(*x509.Certificate) {}, ""},
		{"without cRLSign", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }, ""},
		{"another trust domain", func(c *x509.Certificate) { c.URIs[0].Host = "example.com" }, `"spiffe://example.com"`},
		{"with a path", func(c *x509.Certificate) { c.URIs[0].Path = "/ca" }, `"spiffe://example.org/ca"`},
		{"with a slash", func(c *x509.Certificate) { c.URIs[0].Path = "/" }, "spiffe://example.org/"},
		{"no ID", func(c *x509.Certificate) { c.URIs = nil }, "URI"},
		{"two IDs", func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, "URI"},
		{"no CA", func(c *x509.Certificate) { c.IsCA = false }, "cA is false"},
		{"no basic constraints", func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = false, false }, "cA is false"},
		{"without keyCertSign", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, "key usage"},
		{"X509-16: digitalSignature too", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }, "key usage"},
		{"keyAgreement too", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement }, "key usage"},
	} {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: testNow, NotAfter: testNow.Add(time.Hour),
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
			URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}}, SubjectKeyId: []byte{1, 2, 3},
		}
		tt.change(template)
		der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := checkAuthorityCertificate(cert, nil, testTD); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if tt.name != "ours" {
			continue
		}
		// The same, but the signature is another key's.
		parent := *cert
		parent.PublicKey = other.Public()
		der, err = x509.CreateCertificate(rand.Reader, template, &parent, signer.Public(), other)
		if err != nil {
			t.Fatal(err)
		}
		if cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		cert.RawIssuer = bytes.Clone(cert.RawSubject)
		if err := checkAuthorityCertificate(cert, nil, testTD); err == nil || !strings.Contains(err.Error(), "its own signature") {
			t.Errorf("signed by another key: %v", err)
		}
	}
}

func TestCommonNameFitsItsBound(t *testing.T) {
	for _, n := range []int{1, 48, 49, 60, 255} {
		s := openSet(t, func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString(strings.Repeat("a", n)) })
		name := s.Bundle().X509[0].Certificate.Subject.CommonName
		if len(name) > maxCommonNameBytes || !strings.HasPrefix(name, strings.Repeat("a", min(n, 40))) {
			t.Errorf("trust domain of %d bytes: common name %q has %d bytes", n, name, len(name))
		}
	}
}
