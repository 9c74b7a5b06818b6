package spiffe

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Levels of a [Finding].
const (
	// LevelError marks a broken rule for which the validators of this package refuse the SVID.
	LevelError = "error"
	// LevelWarning marks a rule that an issuer has broken, but that validators let pass.
	LevelWarning = "warning"
)

// A Finding is one rule that an SVID breaks.
type Finding struct {
	// Row is the id of the rule in the conformance checklist.
	Row string
	// Level is LevelError or LevelWarning.
	Level string
	// Message says what is wrong. Foreign strings in it are quoted.
	Message string
}

type findings []Finding

// refuse adds errors of the validators.
func (f *findings) refuse(errs ...error) {
	for _, err := range errs {
		var row *RowError
		if errors.As(err, &row) {
			*f = append(*f, Finding{Row: row.Row, Level: LevelError, Message: row.Err.Error()})
		}
	}
}

func (f *findings) warn(row, format string, args ...any) {
	*f = append(*f, Finding{Row: row, Level: LevelWarning, Message: fmt.Sprintf(format, args...)})
}

// InspectX509SVID returns every rule that an X509-SVID breaks, as far as it can be said without a bundle: the leaf first,
// then its intermediates; with a trust anchor at the end, that one too. It includes rules for issuers that
// [VerifyX509SVID] does not ask for. None means that the SVID is as it should be, not that anyone should trust it.
func InspectX509SVID(chain []*x509.Certificate, now time.Time) []Finding {
	var f findings
	if len(chain) == 0 || slices.Contains(chain, nil) {
		f.refuse(broken("X509-40", "there is no certificate, or one of them is nil"))
		return f
	}
	if len(chain) > maxChainCertificates {
		f.refuse(broken("X509-40", "there are %d certificates, at most %d are allowed", len(chain), maxChainCertificates))
		return f
	}
	id, errs := leafErrors(chain[0])
	f.refuse(errs...)
	if uris, err := uriSANs(chain[0]); err == nil && len(uris) == 1 {
		f.furtherFaults(uris[0])
	}
	f.leaf(chain[0])
	for i, cert := range chain {
		f.validity(i, cert, now)
		if i > 0 {
			f.intermediate(i, cert, chain[i-1], id.TrustDomain())
		}
	}
	return f
}

// InspectX509Authority returns every rule that the certificate of an X.509 authority of the trust domain td breaks. All
// findings are warnings, since validators take what the bundle says.
func InspectX509Authority(cert *x509.Certificate, td spiffeid.TrustDomain) []Finding {
	var f findings
	if cert == nil {
		f.refuse(broken("X509-14", "certificate is nil"))
		return f
	}
	f.authority("authority", cert, td)
	return f
}

// leaf adds the issuance rules of a leaf. [X509-SVID §4]
func (f *findings) leaf(leaf *x509.Certificate) {
	if len(leaf.RawSubject) <= len(emptyName) && !isCritical(leaf, oidSubjectAltName) {
		f.warn("X509-04", "leaf has an empty subject, so its SAN extension must be critical")
	}
	if leaf.KeyUsage != 0 && !isCritical(leaf, oidKeyUsage) {
		f.warn("X509-06", "key usage extension of the leaf is not critical")
	}
	server, client := slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth), slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	switch {
	case len(leaf.ExtKeyUsage) == 0 && len(leaf.UnknownExtKeyUsage) == 0:
		f.warn("X509-11", "leaf has no extended key usage, it should have serverAuth and clientAuth")
	case !server || !client:
		f.warn("X509-12", "extended key usage of the leaf lacks serverAuth or clientAuth, it must have both")
	}
	f.serialAndKey("leaf", leaf)
}

// intermediate adds the rules of certificate i of a chain, which must have issued child.
func (f *findings) intermediate(i int, cert, child *x509.Certificate, td spiffeid.TrustDomain) {
	name := fmt.Sprintf("certificate %d", i)
	if !isAuthority(cert, false) {
		f.refuse(broken("X509-53", "%s is no CA with keyCertSign, so it cannot be an intermediate", name))
		return
	}
	f.authority(name, cert, td)
	if err := child.CheckSignatureFrom(cert); err != nil || !bytes.Equal(child.RawIssuer, cert.RawSubject) {
		f.refuse(broken("X509-40", "%s did not issue the certificate before it", name))
		return
	}
	if child.NotBefore.Before(cert.NotBefore) || child.NotAfter.After(cert.NotAfter) {
		f.warn("X509-24", "validity of the certificate before it is not within that of %s", name)
	}
	if len(child.AuthorityKeyId) == 0 || !bytes.Equal(child.AuthorityKeyId, cert.SubjectKeyId) {
		f.warn("X509-26", "authority key id of the certificate before it is not the subject key id of %s", name)
	}
}

// furtherFaults adds what else is wrong with an ID whose first fault stands already.
func (f *findings) furtherFaults(id string) {
	if faults := idFaults(id); len(faults) > 1 {
		f.refuse(faults[1:]...)
	}
}

// authority adds the issuance rules of a signing certificate. [X509-SVID §4]
func (f *findings) authority(name string, cert *x509.Certificate, td spiffeid.TrustDomain) {
	if !isAuthority(cert, false) {
		f.warn("X509-14", "%s is no CA with keyCertSign", name)
	}
	if cert.KeyUsage == 0 || !isCritical(cert, oidKeyUsage) {
		f.warn("X509-06", "%s has no critical key usage extension", name)
	}
	if cert.KeyUsage&(x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement) != 0 {
		f.warn("X509-16", "key usage of %s has bits that belong to leaves, it must be keyCertSign and at most cRLSign", name)
	}
	if len(cert.SubjectKeyId) == 0 {
		f.warn("X509-26", "%s has no subject key id", name)
	}
	id, err := IDFromCertificate(cert)
	switch {
	case err != nil:
		f.warn("X509-17", "%s has no SPIFFE ID of its own: %v", name, err)
	case id.Path() != "":
		f.warn("X509-18", "%s has the SPIFFE ID %q, a signing certificate has no path", name, id)
	case !td.IsZero() && id.TrustDomain() != td:
		f.warn("X509-19", "%s is of trust domain %q, what it signs is of %q", name, id.TrustDomain(), td)
	}
	f.serialAndKey(name, cert)
}

// validity adds the rules of time of certificate i.
func (f *findings) validity(i int, cert *x509.Certificate, now time.Time) {
	switch {
	case now.Before(cert.NotBefore):
		f.refuse(broken("X509-40", "certificate %d is valid from %s on, it is now %s", i, cert.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)))
	case now.After(cert.NotAfter):
		f.refuse(broken("X509-40", "certificate %d expired at %s, it is now %s", i, cert.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)))
	}
	if len(cert.UnhandledCriticalExtensions) > 0 {
		f.refuse(broken("X509-40", "certificate %d has the unknown critical extension %v", i, cert.UnhandledCriticalExtensions[0]))
	}
}

// maxSerialBytes is the longest serial number. [RFC 5280 §4.1.2.2]
const maxSerialBytes = 20

func (f *findings) serialAndKey(name string, cert *x509.Certificate) {
	if serial := cert.SerialNumber; serial == nil || serial.Sign() <= 0 || serial.BitLen() > 8*maxSerialBytes-1 {
		f.warn("X509-25", "serial number of %s is not positive, or longer than %d octets", name, maxSerialBytes)
	}
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		if key.N.BitLen() < minRSABits {
			f.warn("X509-28", "RSA key of %s has %d bits, at least %d are required", name, key.N.BitLen(), minRSABits)
		}
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P224() {
			f.warn("X509-28", "EC key of %s is on P-224, at least P-256 is required", name)
		}
	}
}

var oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}

// emptyName is a distinguished name without any part.
var emptyName = []byte{0x30, 0x00}

func isCritical(cert *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	return slices.ContainsFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Critical && e.Id.Equal(oid) })
}

// InspectJWTSVID returns header and claims of a token, with numbers as json.Number, and every rule that it breaks, as
// far as it can be said without a bundle and without knowing for whom it is. The signature is not checked, so nothing
// here is to be trusted. The error is a [RowError], for a token that cannot be read at all; what could be read is returned
// with it.
func InspectJWTSVID(token string, now time.Time) (header, claims map[string]any, _ []Finding, err error) {
	var f findings
	parts, err := splitToken(token, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	h, err := parseHeader(parts[0])
	if h.members == nil {
		return nil, nil, nil, err
	}
	f.refuse(err)
	f.refuse(h.check(false)...)
	if !h.hasKid {
		f.warn("JWT-10", "token has no kid, so some validators refuse it")
	}
	_, claims, err = parseClaims(parts[1])
	if err != nil {
		return h.members, nil, f, err
	}
	svid, errs := readClaims(claims, false)
	f.refuse(errs...)
	if sub, ok := claims["sub"].(string); ok {
		f.furtherFaults(sub)
	}
	for _, err := range svid.checkTime(now, DefaultJWTLeeway) {
		if RowOf(err) == "JWT-18" && svid.Expiry.IsZero() {
			continue // exp is missing or malformed, which is a finding already
		}
		f.refuse(err)
	}
	if len(svid.Audience) > 1 {
		f.warn("JWT-16", "token is for %d audiences, it should be for one", len(svid.Audience))
	}
	if svid.IssuedAt.After(now) {
		f.warn("JWT-21", "token was issued in the future, at %s, so some validators refuse it", svid.IssuedAt.Format(time.RFC3339))
	}
	if signature, err := decodePart("signature", parts[2]); err != nil {
		f.refuse(err)
	} else if len(signature) == 0 {
		f.refuse(broken("JWT-25", "token has no signature"))
	}
	return h.members, claims, f, nil
}
