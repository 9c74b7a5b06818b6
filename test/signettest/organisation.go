package signettest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/signet-id/signet/ca"
)

// An Organisation is a CA hierarchy on disk that a signet CA can be below: a root, and an issuing CA below that.
type Organisation struct {
	Root, Issuing *x509.Certificate

	dir string
}

// NewOrganisation makes one, and writes it to files in dir.
func NewOrganisation(dir, name string) (*Organisation, error) {
	o := &Organisation{dir: dir}
	var rootKey, issuingKey *ecdsa.PrivateKey
	var err error
	if o.Root, rootKey, err = newCA(name+" root", 10*365*24*time.Hour, nil, nil); err != nil {
		return nil, err
	}
	if o.Issuing, issuingKey, err = newCA(name+" issuing CA", 365*24*time.Hour, o.Root, rootKey); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(issuingKey)
	if err != nil {
		return nil, err
	}
	for file, block := range map[string]*pem.Block{
		"root.pem": {Type: "CERTIFICATE", Bytes: o.Root.Raw}, "issuing.pem": {Type: "CERTIFICATE", Bytes: o.Issuing.Raw}, "issuing.key": {Type: "PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// Disk is the configuration of a CA below it.
func (o *Organisation) Disk() *ca.UpstreamDisk {
	return &ca.UpstreamDisk{CertificateFile: filepath.Join(o.dir, "issuing.pem"), KeyFile: filepath.Join(o.dir, "issuing.key"), BundleFile: filepath.Join(o.dir, "root.pem")}
}

// newCA makes a CA below parent, or a root.
func newCA(name string, life time.Duration, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	template := &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}
