package spiffe

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestAnSVIDNamesTheAuthorityThatSignedIt: who stole the key of an authority that is revoked by its identifier writes another one.
func TestAnSVIDNamesTheAuthorityThatSignedIt(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(template, parent *x509.Certificate) *x509.Certificate {
		t.Helper()
		template.NotBefore, template.NotAfter, template.BasicConstraintsValid = time.Now().Add(-time.Hour), time.Now().Add(time.Hour), true
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte("authority"), URIs: []*url.URL{td.ID().URL()}}
	root := sign(authority, authority)
	bundles := x509bundle.FromX509Authorities(td, []*x509.Certificate{root})
	for name, signer := range map[string][]byte{"authority": []byte("authority"), "another": []byte("another")} {
		issuer := *root
		issuer.SubjectKeyId = signer
		leaf := sign(&x509.Certificate{SerialNumber: big.NewInt(2), KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/web"}}}, &issuer)
		_, _, err := VerifyX509SVID([]*x509.Certificate{leaf}, bundles, X509Options{})
		if forged := name == "another"; forged != (err != nil) || forged && !strings.Contains(err.Error(), "signed it") {
			t.Errorf("the identifier of %s: %v", name, err)
		}
	}
}
