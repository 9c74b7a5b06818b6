package authority

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

// An organisation is a CA hierarchy of its own, which signs for real: a root, a CA below it, and what is asked of it.
type organisation struct {
	t       testing.TB
	now     func() time.Time
	root    *signer
	issuing *signer
	ttl     time.Duration // of what it signs; zero: what is asked
	err     error

	// change alters the certificate to be signed, answer what is returned.
	change func(*x509.Certificate)
	answer func(chain, roots []*x509.Certificate) (_, _ []*x509.Certificate)
	minted int
}

type signer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// sign returns a certificate of template for public by parent; nil signs itself.
func (s *signer) sign(t testing.TB, template *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
	t.Helper()
	parent := s.cert
	if parent == nil {
		parent = template
	}
	if template.SerialNumber == nil {
		template.SerialNumber = serialNumber(newSerial())
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, s.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newSigner(t testing.TB, parent *signer, template *x509.Certificate) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &signer{key: key}
	if parent == nil {
		parent = &signer{key: key}
	}
	s.cert = parent.sign(t, template, key.Public())
	return s
}

func caTemplate(name string, now time.Time, life time.Duration) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(life), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
}

func newOrganisation(t testing.TB, now func() time.Time) *organisation {
	o := &organisation{t: t, now: now}
	o.root = newSigner(t, nil, caTemplate("organisation root", now(), 10*365*24*time.Hour))
	o.issuing = newSigner(t, o.root, caTemplate("organisation issuing CA", now(), 365*24*time.Hour))
	return o
}

func (o *organisation) Name() string { return "the organisation" }

func (o *organisation) Mint(_ context.Context, der []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error) {
	if o.err != nil {
		return nil, nil, o.err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, nil, err
	}
	if o.ttl != 0 {
		ttl = o.ttl
	}
	o.minted++
	template := caTemplate("", o.now(), ttl)
	template.Subject, template.URIs = csr.Subject, csr.URIs
	if o.change != nil {
		o.change(template)
	}
	chain, roots = []*x509.Certificate{o.issuing.sign(o.t, template, csr.PublicKey), o.issuing.cert}, []*x509.Certificate{o.root.cert}
	if o.answer != nil {
		chain, roots = o.answer(chain, roots)
	}
	return chain, roots, nil
}

// openBelow opens a Set below a new organisation, at a clock that can be moved.
func openBelow(t *testing.T, change func(*Config)) (*follower, *organisation, *clock) {
	t.Helper()
	at := newClock(testNow)
	org := newOrganisation(t, at.now)
	f := &follower{t: t}
	c := testConfig(t)
	c.Now, c.Upstream = at.now, org
	if change != nil {
		change(&c)
	}
	f.store = c.Store
	var err error
	if f.set, err = Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	feed(t, f.set)
	return f, org, at
}

func (f *follower) issue(path string) *X509SVID {
	f.t.Helper()
	p, err := f.set.CheckX509(X509Request{ID: spiffeid.RequireFromPath(testTD, path), PublicKey: newKey(f.t).Public()})
	f.must(err)
	svid, err := f.set.SignX509(f.t.Context(), p)
	f.must(err)
	return svid
}

// verify verifies an SVID as a peer does who has nothing but the bundle.
func (f *follower) verify(svid *X509SVID) error {
	f.t.Helper()
	var chain []*x509.Certificate
	for _, der := range svid.Chain {
		cert, err := x509.ParseCertificate(der)
		f.must(err)
		chain = append(chain, cert)
	}
	_, _, err := spiffe.VerifyX509SVID(chain, f.set.Bundle().SPIFFE(), spiffe.X509Options{Now: f.set.config.Now()})
	return err
}
