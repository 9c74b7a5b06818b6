package authority

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
)

// This file is for nodes that were away while authorities changed: what leads them from the authority that they know to the one that signs now.

// crossSign returns a certificate of the new authority cert that the active one has signed, so that who knows only the
// active one, because it was away, can verify what the new one signs. It is nil if there is none to sign it.
func (s *Set) crossSign(cert *x509.Certificate) []byte {
	known := s.current.Load()
	if known == nil || known.activeX509 == nil || known.activeX509.key == nil || !bytes.Equal(cert.RawIssuer, cert.RawSubject) {
		return nil
	}
	by := known.activeX509
	template := &x509.Certificate{
		SerialNumber: serialNumber(newSerial()), Subject: cert.Subject, RawSubject: cert.RawSubject, NotBefore: cert.NotBefore, NotAfter: cert.NotAfter,
		KeyUsage: cert.KeyUsage, BasicConstraintsValid: true, IsCA: true, SubjectKeyId: cert.SubjectKeyId,
		AuthorityKeyId: by.certificate.SubjectKeyId, // both have the same name, so that crypto/x509 would leave it out
		URIs:           cert.URIs,
	}
	if template.NotAfter.After(by.certificate.NotAfter) {
		template.NotAfter = by.certificate.NotAfter
	}
	if !template.NotAfter.After(template.NotBefore) {
		return nil
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.certificate, cert.PublicKey, by.key)
	if err != nil {
		s.config.Log.Warn("the new authority was not signed by the active one; nodes that are away while it takes over must attest again", "authority_id", by.id, "err", err)
		return nil
	}
	return der
}

// Introduction returns what the CA presents besides its own X509-SVID, for nodes that do not hold the newest bundle: the
// active authority, which a join token's pin names, and certificates that lead from it back to those before it, as long as
// they are valid.
func (s *Set) Introduction() [][]byte {
	const most = 4
	n, now := s.current.Load(), s.config.Now()
	var out [][]byte
	a := n.activeX509
	for a != nil && len(out) < 2*most-1 {
		if a != n.activeX509 { // its SVIDs' chains hold those of the active one
			for _, c := range a.intermediates() {
				out = append(out, c.Raw)
			}
		}
		out = append(out, a.root().Raw)
		if a.cross == nil || !now.Before(a.cross.NotAfter) {
			break
		}
		out = append(out, a.cross.Raw)
		var before *x509Authority
		for _, b := range n.x509 {
			if bytes.Equal(b.certificate.SubjectKeyId, a.cross.AuthorityKeyId) && b.state != StateRevoked {
				before = b
			}
		}
		a = before
	}
	return out
}
