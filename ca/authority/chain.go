package authority

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

// Limits of what an upstream CA answers. They hold for its answers and for what is stored of them.
const (
	// MaxUpstreamIntermediates is the most certificates of a chain, without the root. A verifier takes no more than 16 with
	// the leaf, and intermediates of downstream CAs come on top.
	MaxUpstreamIntermediates = 8

	// MaxUpstreamRoots is the most roots that an upstream CA may have at a time.
	MaxUpstreamRoots = 20

	// MaxUpstreamCertificateBytes bounds one certificate in DER.
	MaxUpstreamCertificateBytes = 8 << 10

	minSubjectKeyIDBytes = 1
	maxSubjectKeyIDBytes = 64
)

// checkIntermediate refuses the certificate of an X.509 authority that an upstream CA signed, unless everybody who holds
// the root will accept what the authority signs. above leads from its issuer to the root, which is the last. Validity is
// not judged, since an authority in the store may be past its end; checkUpstreamAnswer does. [X509-18, X509-21, X509-22,
// X509-53, SVID-06]
func checkIntermediate(cert *x509.Certificate, above []*x509.Certificate, td spiffeid.TrustDomain) error {
	if err := checkSigningProfile(cert, td); err != nil {
		return err
	}
	switch n := len(above); {
	case n == 0:
		return errors.New("its root is missing")
	case n > MaxUpstreamIntermediates:
		return fmt.Errorf("its chain has %d certificates, more than %d", n, MaxUpstreamIntermediates)
	}
	child, at := cert, "it"
	for i, parent := range above {
		name := fmt.Sprintf("certificate %d above it, %q,", i+1, clipName(parent))
		if err := checkIssuer(parent, i+1, i == len(above)-1); err != nil {
			return fmt.Errorf("%s %w", name, err)
		}
		if err := child.CheckSignatureFrom(parent); err != nil {
			return fmt.Errorf("%s is not signed by %s which should be its issuer: %w", at, name, err)
		}
		child, at = parent, name
	}
	return checkRoot(above[len(above)-1])
}

// checkSigningProfile refuses a signing certificate that is not this trust domain's, or that verifiers would refuse.
func checkSigningProfile(cert *x509.Certificate, td spiffeid.TrustDomain) error {
	id, err := spiffe.IDFromCertificate(cert)
	if err != nil {
		return err
	}
	switch {
	case len(cert.Raw) > MaxUpstreamCertificateBytes:
		return fmt.Errorf("it has %d bytes, more than %d", len(cert.Raw), MaxUpstreamCertificateBytes)
	case id != td.ID():
		return fmt.Errorf("its ID is %q, not %q", id.String(), td.IDString())
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("it is not a signing certificate (cA is false)")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0 || cert.KeyUsage&^(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("its key usage is not keyCertSign, optionally with cRLSign")
	}
	if n := len(cert.SubjectKeyId); n < minSubjectKeyIDBytes || n > maxSubjectKeyIDBytes {
		return fmt.Errorf("its subject key identifier has %d bytes; it needs one of %d to %d", n, minSubjectKeyIDBytes, maxSubjectKeyIDBytes)
	}
	if err := checkIssuerEKU(cert); err != nil {
		return err
	}
	return checkKeyStrength(cert.PublicKey)
}

// checkIssuer refuses a certificate that may not sign what is below it: depth CA certificates, and the SVIDs. Only a root may
// lack the key usage extension. [X509-53]
func checkIssuer(cert *x509.Certificate, depth int, root bool) error {
	switch {
	case len(cert.Raw) > MaxUpstreamCertificateBytes:
		return fmt.Errorf("has %d bytes, more than %d", len(cert.Raw), MaxUpstreamCertificateBytes)
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("is not a CA (cA is false)")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0 && (cert.KeyUsage != 0 || !root):
		return errors.New("lacks the key usage keyCertSign")
	case cert.MaxPathLen >= 0 && cert.MaxPathLen < depth:
		return fmt.Errorf("has pathLenConstraint %d, but %d CA certificates are below it; have it issued again without the constraint or with a larger one", cert.MaxPathLen, depth)
	}
	if err := checkIssuerEKU(cert); err != nil {
		return err
	}
	return checkKeyStrength(cert.PublicKey)
}

// checkIssuerEKU refuses a CA whose extended key usage leaves out what every X509-SVID has: libraries differ in how they
// read it, and some refuse the whole chain. [X509-23]
func checkIssuerEKU(cert *x509.Certificate) error {
	if len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) == 0 || slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return nil
	}
	if slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return nil
	}
	return errors.New("has an extended key usage without serverAuth and clientAuth, which SVIDs need; have it issued without any")
}

// checkRoot refuses a root that cannot be published: agents match SVIDs to roots by the subject key identifier.
// [X509-63, SPIRE-PROTOCOL §8]
func checkRoot(root *x509.Certificate) error {
	if err := checkIssuer(root, 1, true); err != nil {
		return fmt.Errorf("root %q %w", clipName(root), err)
	}
	if n := len(root.SubjectKeyId); n < minSubjectKeyIDBytes || n > maxSubjectKeyIDBytes {
		return fmt.Errorf("root %q has no subject key identifier of %d to %d bytes, by which agents know what it signed", clipName(root), minSubjectKeyIDBytes, maxSubjectKeyIDBytes)
	}
	if !bytes.Equal(root.RawIssuer, root.RawSubject) {
		return fmt.Errorf("root %q is not self-signed, but issued by %.100q; give the certificate at the top of the chain", clipName(root), root.Issuer.String())
	}
	if err := root.CheckSignature(root.SignatureAlgorithm, root.RawTBSCertificate, root.Signature); err != nil {
		return fmt.Errorf("root %q: its own signature: %w", clipName(root), err)
	}
	return nil
}

// clipName names a foreign certificate in an error. Quoted with %q it cannot move a cursor.
func clipName(cert *x509.Certificate) string {
	const most = 100
	name := cert.Subject.String()
	if name == "" {
		name = "serial " + cert.SerialNumber.String()
	}
	return name[:min(len(name), most)]
}

// An UpstreamError is what came of asking the upstream CA, with the way it is configured.
type UpstreamError struct {
	// Upstream names the CA that was asked.
	Upstream string
	Err      error
}

// Error implements error.
func (e *UpstreamError) Error() string { return fmt.Sprintf("upstream %s: %v", e.Upstream, e.Err) }

// Unwrap returns the cause.
func (e *UpstreamError) Unwrap() error { return e.Err }

// Is makes it an ErrUnavailable.
func (e *UpstreamError) Is(target error) bool { return target == ErrUnavailable }

// checkUpstreamAnswer judges what the upstream answered to a request for an intermediate of key, at now and for ttl, and
// returns the path above the intermediate, the root last. Nothing of the answer is used before it has passed: it is the
// only thing between an upstream that errs, or that is not who it was, and a trust domain whose every handshake fails.
func checkUpstreamAnswer(chain, roots []*x509.Certificate, public crypto.PublicKey, td spiffeid.TrustDomain, now time.Time, ttl time.Duration) (cert *x509.Certificate, above []*x509.Certificate, err error) {
	switch {
	case len(chain) == 0 || slices.Contains(chain, nil):
		return nil, nil, errors.New("it answered without a certificate")
	case len(chain) > MaxUpstreamIntermediates:
		return nil, nil, fmt.Errorf("its chain has %d certificates, more than %d", len(chain), MaxUpstreamIntermediates)
	case len(roots) == 0 || slices.Contains(roots, nil):
		return nil, nil, errors.New("it answered without a root")
	case len(roots) > MaxUpstreamRoots:
		return nil, nil, fmt.Errorf("it has %d roots, more than %d", len(roots), MaxUpstreamRoots)
	}
	cert = chain[0]
	if key, ok := public.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(cert.PublicKey) {
		return nil, nil, errors.New("the certificate is for another key than the one it was asked to sign")
	}
	if err := checkUpstreamTTL(cert, now, ttl); err != nil {
		return nil, nil, err
	}
	above, err = pathToRoot(chain, roots, now)
	if err != nil {
		return nil, nil, err
	}
	if err := checkIntermediate(cert, above, td); err != nil {
		return nil, nil, fmt.Errorf("the certificate: %w", err)
	}
	return cert, above, nil
}

// Bounds of what an upstream may answer to a wanted TTL.
const (
	// minUpstreamTTL is the shortest life with which an intermediate is of use.
	minUpstreamTTL = time.Minute
	// maxUpstreamTTL is the longest that is taken if less was asked: an intermediate for decades is a mistake, and the key
	// below it would outlive everything that watches it.
	maxUpstreamTTL = 366 * 24 * time.Hour
)

func checkUpstreamTTL(cert *x509.Certificate, now time.Time, ttl time.Duration) error {
	stamp := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	switch {
	case now.Before(cert.NotBefore):
		return fmt.Errorf("the certificate is valid from %s, but here it is %s; compare the clocks", stamp(cert.NotBefore), stamp(now))
	case cert.NotAfter.Sub(now) < minUpstreamTTL:
		return fmt.Errorf("the certificate ends at %s, and here it is %s; it must last %v at least: compare the clocks, and see what limits the TTL there", stamp(cert.NotAfter), stamp(now), minUpstreamTTL)
	case cert.NotAfter.Sub(now) > max(ttl+time.Hour, maxUpstreamTTL):
		return fmt.Errorf("the certificate ends at %s, but %v were asked for; limit the TTL there", stamp(cert.NotAfter), ttl)
	}
	return nil
}

// pathToRoot finds the way from chain[0] to one of the roots through the rest of chain. Certificates of the answer that
// are not on it are left out: each would be sent in every handshake.
func pathToRoot(chain, roots []*x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	anchors, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots {
		anchors.AddCert(root)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	paths, err := chain[0].Verify(x509.VerifyOptions{Roots: anchors, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, fmt.Errorf("the certificate does not verify against the root(s) of the upstream: %w", err)
	}
	// The shortest; of equal ones the one whose root lasts longest.
	best := slices.MinFunc(paths, func(a, b []*x509.Certificate) int {
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		return b[len(b)-1].NotAfter.Compare(a[len(a)-1].NotAfter)
	})
	if len(best) < 2 {
		return nil, errors.New("it answered with a root instead of an intermediate")
	}
	return best[1:], nil
}

// An x509Path is what is above the certificate of an authority; nil for a self-signed one.
type x509Path []*x509.Certificate

// root returns the certificate that is published for an authority.
func (a *x509Authority) root() *x509.Certificate {
	if len(a.above) == 0 {
		return a.certificate
	}
	return a.above[len(a.above)-1]
}

// intermediates returns what goes along with each SVID: the authority's certificate and those above it, without the root.
func (a *x509Authority) intermediates() []*x509.Certificate {
	if len(a.above) == 0 {
		return nil
	}
	return append([]*x509.Certificate{a.certificate}, a.above[:len(a.above)-1]...)
}

// validity returns the time in which the whole chain is valid. [X509-24]
func (a *x509Authority) validity() (notBefore, notAfter time.Time) {
	notBefore, notAfter = a.certificate.NotBefore, a.certificate.NotAfter
	for _, c := range a.above {
		if c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}

// rootID names a root in the bundle, as SPIRE does for authorities of an upstream: its subject key id in hexadecimal.
func rootID(root *x509.Certificate) string { return hex.EncodeToString(root.SubjectKeyId) }

// permits returns an error for a DNS name that the name constraints of the chain exclude: whoever verified such an SVID
// would refuse it. [X509-22]
func (a *x509Authority) permits(dnsNames []string) error {
	for _, c := range append([]*x509.Certificate{a.certificate}, a.above...) {
		for _, name := range dnsNames {
			within := func(constraint string) bool { return withinDomain(name, constraint) }
			if slices.ContainsFunc(c.ExcludedDNSDomains, within) || len(c.PermittedDNSDomains) > 0 && !slices.ContainsFunc(c.PermittedDNSDomains, within) {
				return fmt.Errorf("DNS name %q is outside the name constraints of the CA %q", name, clipName(c))
			}
		}
	}
	return nil
}

// withinDomain tells whether a DNS name is one, or below one, that a constraint names. [RFC 5280 §4.2.1.10]
func withinDomain(name, constraint string) bool {
	name, constraint = strings.ToLower(name), strings.ToLower(strings.TrimPrefix(constraint, "."))
	return constraint == "" || name == constraint || strings.HasSuffix(name, "."+constraint)
}
