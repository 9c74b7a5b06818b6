package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"time"
)

// A Disk is an upstream CA whose certificate is in a file, and whose key is in another or in a key store. The files are read
// anew each time, so that an exchanged one counts at once. The key's bytes are none of its business: package keys has them.
type Disk struct {
	// CertificateFile holds the CA's certificate in PEM, and those above it if it is not self-signed.
	CertificateFile string
	// BundleFile holds the root or roots in PEM. Empty if CertificateFile ends with the root.
	BundleFile string
	// Key returns the CA's private key as it is now. It is asked for each signature.
	Key func(context.Context) (crypto.Signer, error)
	// KeyName says where Key has it from, for errors.
	KeyName string
	// Now tells the time. Nil means time.Now.
	Now func() time.Time
}

// backdate is how far before its issuance an intermediate begins to be valid.
const backdate = 30 * time.Second

// Name implements authority.Upstream.
func (d *Disk) Name() string { return "disk " + d.CertificateFile }

// Mint signs the request with the CA's key. The certificate does not outlive those above it.
func (d *Disk) Mint(ctx context.Context, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error) {
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, nil, err
	}
	if err := request.CheckSignature(); err != nil {
		return nil, nil, err
	}
	above, roots, err := d.read()
	if err != nil {
		return nil, nil, err
	}
	parent := above[0]
	key, err := d.key(ctx, parent.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	now := time.Now
	if d.Now != nil {
		now = d.Now
	}
	at := now().UTC().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber: newSerial(), Subject: request.Subject, URIs: request.URIs, NotBefore: at.Add(-backdate), NotAfter: at.Add(ttl),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	for _, c := range slices.Concat(above, roots) {
		if template.NotBefore.Before(c.NotBefore) {
			template.NotBefore = c.NotBefore
		}
		if template.NotAfter.After(c.NotAfter) {
			template.NotAfter = c.NotAfter
		}
	}
	if !template.NotAfter.After(at) {
		return nil, nil, fmt.Errorf("a certificate of %s or above it ended at %s; put a new one in its place", d.CertificateFile, template.NotAfter.Format(time.RFC3339))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, request.PublicKey, key)
	if err != nil {
		return nil, nil, fmt.Errorf("signing with the key of %s: %w", d.CertificateFile, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	return append([]*x509.Certificate{cert}, above...), roots, nil
}

// Follow returns the roots as they are in the files now.
func (d *Disk) Follow(context.Context) ([]*x509.Certificate, []JWTKey, error) {
	_, roots, err := d.read()
	return roots, nil, err
}

// Close implements Driver. A Disk holds nothing open.
func (d *Disk) Close() error { return nil }

// read returns the CA's certificate with those above it, without roots, and the roots.
func (d *Disk) read() (above, roots []*x509.Certificate, err error) {
	text, err := readFile(d.CertificateFile, maxPEMBytes)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate_file: %w", err)
	}
	certs, err := ParseCertificates(text, "certificate_file "+d.CertificateFile)
	if err != nil {
		return nil, nil, err
	}
	if d.BundleFile != "" {
		text, err := readFile(d.BundleFile, maxPEMBytes)
		if err != nil {
			return nil, nil, fmt.Errorf("bundle_file: %w", err)
		}
		if roots, err = ParseCertificates(text, "bundle_file "+d.BundleFile); err != nil {
			return nil, nil, err
		}
	} else {
		last := certs[len(certs)-1]
		if !bytes.Equal(last.RawIssuer, last.RawSubject) {
			return nil, nil, fmt.Errorf("certificate_file %s does not end with a root: append the certificates above, or name the root with bundle_file", d.CertificateFile)
		}
		roots = certs[len(certs)-1:]
	}
	if !certs[0].IsCA {
		return nil, nil, fmt.Errorf("certificate_file %s: its first certificate is not that of a CA", d.CertificateFile)
	}
	above = certs[:1:1]
	for _, c := range certs[1:] {
		if !slices.ContainsFunc(roots, c.Equal) {
			above = append(above, c)
		}
	}
	return above, roots, nil
}

// key returns the CA's key, if it is that of its certificate.
func (d *Disk) key(ctx context.Context, public crypto.PublicKey) (crypto.Signer, error) {
	key, err := d.Key(ctx)
	if err != nil {
		return nil, err
	}
	if own, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !own.Equal(public) {
		return nil, fmt.Errorf("%s is another key than that of certificate_file %s; while both are exchanged this passes by itself", d.KeyName, d.CertificateFile)
	}
	return key, nil
}

// newSerial returns a positive number of 128 random bits after a one.
func newSerial() *big.Int {
	serial := make([]byte, 17)
	serial[0] = 1
	rand.Read(serial[1:])
	return new(big.Int).SetBytes(serial)
}
