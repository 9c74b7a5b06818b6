package spiffe

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxChainCertificates bounds what a peer may send: the leaf and its intermediates.
const maxChainCertificates = 16

// X509Options changes how X509-SVIDs are verified. The zero value is the strict way, at the present time.
type X509Options struct {
	// Now is the time at which the certificates must be valid. Zero means time.Now. There is no leeway, issuers
	// backdate NotBefore instead (DEC-17).
	Now time.Time

	// AllowMissingKeyUsage accepts a leaf without digitalSignature or without a key usage extension (DEC-07). Such a
	// leaf breaks X509-06 or X509-08, but the standard does not ask validators to look.
	AllowMissingKeyUsage bool
}

// CheckX509SVIDLeaf says everything that a validator can say of a leaf without a bundle and without a clock: exactly one
// URI SAN that is a SPIFFE ID with a path, no CA, no right to sign certificates or CRLs, digitalSignature set. It
// returns the ID. What only an issuer must keep is in [InspectX509SVID]. The error is a [RowError].
// [X509-SVID §4, §5.2]
func CheckX509SVIDLeaf(leaf *x509.Certificate) (spiffeid.ID, error) {
	return checkLeaf(leaf, X509Options{})
}

func checkLeaf(leaf *x509.Certificate, o X509Options) (spiffeid.ID, error) {
	id, errs := leafErrors(leaf)
	for _, err := range errs {
		if RowOf(err) == "X509-52" && o.AllowMissingKeyUsage {
			continue
		}
		return spiffeid.ID{}, err
	}
	return id, nil
}

// leafErrors returns the ID of a leaf, and a RowError for each rule that makes a validator refuse it.
func leafErrors(leaf *x509.Certificate) (spiffeid.ID, []error) {
	var errs []error
	id, err := IDFromCertificate(leaf)
	if err != nil {
		errs = append(errs, err)
	}
	if leaf == nil {
		return spiffeid.ID{}, errs
	}
	if leaf.IsCA {
		errs = append(errs, broken("X509-44", "certificate is a CA, a leaf X509-SVID has cA false"))
	}
	if leaf.KeyUsage&x509.KeyUsageCertSign != 0 {
		errs = append(errs, broken("X509-45", "certificate has the key usage keyCertSign, a leaf X509-SVID must not"))
	}
	if leaf.KeyUsage&x509.KeyUsageCRLSign != 0 {
		errs = append(errs, broken("X509-45", "certificate has the key usage cRLSign, a leaf X509-SVID must not"))
	}
	if err == nil && id.Path() == "" {
		errs = append(errs, broken("X509-47", "certificate has the SPIFFE ID %q, which names a trust domain, a leaf X509-SVID has a path", id))
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		errs = append(errs, broken("X509-52", "certificate has no key usage digitalSignature, a leaf X509-SVID must"))
	}
	return id, errs
}

// isAuthority reports whether a certificate may sign others: it is a CA, and its key usage does not forbid it. A trust
// anchor may lack the key usage extension; what a peer sends may not.
func isAuthority(cert *x509.Certificate, anchor bool) bool {
	if !cert.BasicConstraintsValid || !cert.IsCA {
		return false
	}
	return cert.KeyUsage&x509.KeyUsageCertSign != 0 || anchor && cert.KeyUsage == 0
}

// VerifyX509SVID verifies an X509-SVID: the leaf first, then the intermediates that the peer sent. It returns the ID and
// the chains from the leaf to an authority, of which there is at least one.
//
// Only authorities of the leaf's own trust domain count, whatever else bundles holds. DNS names, IP addresses and the
// subject never matter. The error is a [RowError]. [X509-SVID §5]
func VerifyX509SVID(chain []*x509.Certificate, bundles x509bundle.Source, o X509Options) (spiffeid.ID, [][]*x509.Certificate, error) {
	fail := func(err error) (spiffeid.ID, [][]*x509.Certificate, error) { return spiffeid.ID{}, nil, err }

	if len(chain) == 0 {
		return fail(broken("X509-40", "peer sent no certificate"))
	}
	if len(chain) > maxChainCertificates {
		return fail(broken("X509-40", "peer sent %d certificates, at most %d are allowed", len(chain), maxChainCertificates))
	}
	if bundles == nil {
		return fail(broken("X509-41", "no bundle source given"))
	}
	leaf := chain[0]
	id, err := checkLeaf(leaf, o)
	if err != nil {
		return fail(err)
	}
	intermediates := x509.NewCertPool()
	for i, cert := range chain[1:] {
		if cert == nil || !isAuthority(cert, false) {
			return fail(broken("X509-53", "certificate %d of the chain of %q is no CA with keyCertSign, so it cannot be an intermediate", i+1, id))
		}
		intermediates.AddCert(cert)
	}
	roots, err := rootsFor(id.TrustDomain(), bundles)
	if err != nil {
		return fail(err)
	}
	now := o.Now
	if now.IsZero() {
		now = time.Now()
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // X509-51: the EKU of a leaf is not judged
	})
	if err != nil {
		row := "X509-40"
		if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
			row = "SVID-01"
		}
		return fail(broken(row, "X509-SVID of %q: %w", id, err))
	}
	// Revocations of an authority go by the identifier in what it signed: whoever stole its key must not write another one there.
	for _, c := range chains {
		if len(c) > 1 && len(leaf.AuthorityKeyId) > 0 && len(c[1].SubjectKeyId) > 0 && !bytes.Equal(leaf.AuthorityKeyId, c[1].SubjectKeyId) {
			return fail(broken("X509-40", "X509-SVID of %q says that authority %x signed it, but %x did", id, leaf.AuthorityKeyId, c[1].SubjectKeyId))
		}
	}
	return id, chains, nil
}

// rootsFor returns the authorities of one trust domain. Those that are no CA are left out: crypto/x509 would take a leaf
// that stands among the roots for its own authority.
func rootsFor(td spiffeid.TrustDomain, bundles x509bundle.Source) (*x509.CertPool, error) {
	bundle, err := bundles.GetX509BundleForTrustDomain(td)
	if err != nil {
		return nil, broken("X509-41", "no X.509 bundle for trust domain %q: %w", td, err)
	}
	if bundle == nil || bundle.TrustDomain() != td {
		return nil, broken("X509-41", "no X.509 bundle for trust domain %q: the source returned another one", td)
	}
	roots, usable := x509.NewCertPool(), 0
	for _, authority := range bundle.X509Authorities() {
		if isAuthority(authority, true) {
			roots.AddCert(authority)
			usable++
		}
	}
	if usable == 0 {
		return nil, broken("TDB-11", "the X.509 bundle of trust domain %q has no authority, so none of its X509-SVIDs is trusted", td)
	}
	return roots, nil
}

// VerifyPeer returns a function for tls.Config.VerifyPeerCertificate that verifies the peer's X509-SVID and then asks
// authorize, which is required. A nil now means time.Now. The tls.Config needs InsecureSkipVerify at a client, or
// ClientAuth RequireAnyClientCert at a server, because the peer's host name must not matter (X509-50).
//
// crypto/tls does not call VerifyPeerCertificate when a session is resumed, so that a removed authority would stay
// trusted: disable session tickets, or use [VerifyConnection] instead (X509-55).
func VerifyPeer(bundles x509bundle.Source, now func() time.Time, authorize func(spiffeid.ID, [][]*x509.Certificate) error) func(raw [][]byte, _ [][]*x509.Certificate) error {
	return func(raw [][]byte, _ [][]*x509.Certificate) error {
		if len(raw) > maxChainCertificates {
			return broken("X509-40", "peer sent %d certificates, at most %d are allowed", len(raw), maxChainCertificates)
		}
		chain := make([]*x509.Certificate, len(raw))
		for i, der := range raw {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return broken("X509-40", "certificate %d of the peer is malformed: %w", i, err)
			}
			chain[i] = cert
		}
		return verifyAndAuthorize(chain, bundles, now, authorize)
	}
}

// VerifyConnection is [VerifyPeer] for tls.Config.VerifyConnection. It is called for resumed sessions too, and verifies
// them against the bundles and the time of the resumption (X509-55).
func VerifyConnection(bundles x509bundle.Source, now func() time.Time, authorize func(spiffeid.ID, [][]*x509.Certificate) error) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		return verifyAndAuthorize(state.PeerCertificates, bundles, now, authorize)
	}
}

func verifyAndAuthorize(chain []*x509.Certificate, bundles x509bundle.Source, now func() time.Time, authorize func(spiffeid.ID, [][]*x509.Certificate) error) error {
	if authorize == nil {
		return errors.New("no authorizer given, a verified peer is not yet an allowed one")
	}
	if now == nil {
		now = time.Now
	}
	id, chains, err := VerifyX509SVID(chain, bundles, X509Options{Now: now()})
	if err != nil {
		return err
	}
	return authorize(id, chains)
}
