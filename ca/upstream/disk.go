package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

const maxKeyFileBytes = 64 << 10

// A Disk is an upstream CA whose certificate is in a file, and whose key is in another or in a key store. The files are read
// anew each time, so that an exchanged one counts at once.
type Disk struct {
	// CertificateFile holds the CA's certificate in PEM, and those above it if it is not self-signed.
	CertificateFile string
	// KeyFile holds its private key in PEM, unencrypted. Empty if Signer is set.
	KeyFile string
	// BundleFile holds the root or roots in PEM. Empty if CertificateFile ends with the root.
	BundleFile string
	// Signer returns the CA's key in a key store, for the public key in its certificate. Nil if KeyFile is set.
	Signer func(public crypto.PublicKey) (crypto.Signer, error)
	// Now tells the time. Nil means time.Now.
	Now func() time.Time
}

// backdate is how far before its issuance an intermediate begins to be valid.
const backdate = 30 * time.Second

// Name implements authority.Upstream.
func (d *Disk) Name() string { return "disk " + d.CertificateFile }

// Mint signs the request with the CA's key. The certificate does not outlive those above it.
func (d *Disk) Mint(_ context.Context, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error) {
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
	key, err := d.key(parent.PublicKey)
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

func (d *Disk) key(public crypto.PublicKey) (crypto.Signer, error) {
	if d.Signer != nil {
		return d.Signer(public)
	}
	text, err := readSecret(d.KeyFile, maxKeyFileBytes)
	if err != nil {
		return nil, fmt.Errorf("key_file: %w", err)
	}
	defer clear(text)
	key, err := parseKey(text)
	if err != nil {
		return nil, fmt.Errorf("key_file %s %w", d.KeyFile, err)
	}
	if own, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !own.Equal(public) {
		return nil, fmt.Errorf("key_file %s holds another key than that of certificate_file %s; while both are exchanged this passes by itself", d.KeyFile, d.CertificateFile)
	}
	return key, nil
}

// parseKey reads a private key in PEM. Its errors say nothing of what it read.
func parseKey(text []byte) (crypto.Signer, error) {
	block, rest := pem.Decode(text)
	if block == nil {
		return nil, errors.New("holds no PEM private key")
	}
	defer clear(block.Bytes)
	for block.Type == "EC PARAMETERS" { // openssl ecparam -genkey puts them in front
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("holds no PEM private key")
		}
		defer clear(block.Bytes)
	}
	var key any
	var err error
	switch {
	case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "":
		return nil, errors.New("holds an encrypted key; decrypt it, or use a key store (kms)")
	case block.Type == "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case block.Type == "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case block.Type == "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, errors.New("holds no PEM private key (PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY)")
	}
	if err != nil {
		return nil, errors.New("holds a malformed private key")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("holds a %T, which cannot sign", key)
	}
	return signer, nil
}

// newSerial returns a positive number of 128 random bits after a one.
func newSerial() *big.Int {
	serial := make([]byte, 17)
	serial[0] = 1
	rand.Read(serial[1:])
	return new(big.Int).SetBytes(serial)
}
