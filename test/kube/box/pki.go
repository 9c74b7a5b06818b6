package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// A pki issues the cluster's certificates, as NAME.crt and NAME.key in dir.
type pki struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
}

func newPKI(dir string) (*pki, error) {
	p := &pki{dir: dir}
	key, err := p.newKey("ca")
	if err != nil {
		return nil, err
	}
	t := template(pkix.Name{CommonName: "kubebox"})
	t.IsCA = true
	t.BasicConstraintsValid = true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	p.cert, p.key = t, key
	der, err := p.sign("ca", t, key)
	if err != nil {
		return nil, err
	}
	p.cert, err = x509.ParseCertificate(der)
	return p, err
}

// openPKI opens one that newPKI has made.
func openPKI(dir string) (*pki, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"))
	if err != nil {
		return nil, err
	}
	return &pki{dir: dir, cert: pair.Leaf, key: pair.PrivateKey.(crypto.Signer)}, nil
}

// in is the same authority for another directory.
func (p *pki) in(dir string) (*pki, error) {
	if dir == p.dir {
		return p, nil
	}
	other := &pki{dir, p.cert, p.key}
	return other, errors.Join(other.writeKey("ca", p.key), other.write("ca.crt", "CERTIFICATE", p.cert.Raw, 0o644))
}

// node issues the kubelet's certificates.
func (p *pki) node(name, ip string) error {
	return errors.Join(
		p.server("kubelet", []string{"127.0.0.1", ip}, name, "localhost"),
		p.client("node", "system:node:"+name, "system:nodes"))
}

// server issues a serving certificate.
func (p *pki) server(name string, ips []string, dns ...string) error {
	t := template(pkix.Name{CommonName: name})
	t.DNSNames = dns
	for _, ip := range ips {
		t.IPAddresses = append(t.IPAddresses, net.ParseIP(ip))
	}
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	return p.leaf(name, t)
}

// client issues a certificate for a Kubernetes user and its groups.
func (p *pki) client(name, user string, groups ...string) error {
	t := template(pkix.Name{CommonName: user, Organization: groups})
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return p.leaf(name, t)
}

func (p *pki) leaf(name string, t *x509.Certificate) error {
	t.KeyUsage = x509.KeyUsageDigitalSignature
	key, err := p.newKey(name)
	if err != nil {
		return err
	}
	_, err = p.sign(name, t, key)
	return err
}

func (p *pki) sign(name string, t *x509.Certificate, key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, p.cert, key.Public(), p.key)
	if err != nil {
		return nil, err
	}
	return der, p.write(name+".crt", "CERTIFICATE", der, 0o644)
}

// newKey makes a key and writes it to NAME.key.
func (p *pki) newKey(name string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return key, p.writeKey(name, key)
}

func (p *pki) writeKey(name string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return p.write(name+".key", "PRIVATE KEY", der, 0o600)
}

// tokenKey makes the key that signs service account tokens, and writes its
// public half to NAME.pub. It is an RSA key, as in most clusters.
func (p *pki) tokenKey(name string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return errors.Join(p.writeKey(name, key), p.write(name+".pub", "PUBLIC KEY", der, 0o644))
}

func (p *pki) write(file, kind string, der []byte, mode os.FileMode) error {
	b := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	return os.WriteFile(filepath.Join(p.dir, file), b, mode)
}

func template(subject pkix.Name) *x509.Certificate {
	var serial [15]byte
	rand.Read(serial[:]) // never fails since Go 1.24
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]),
		Subject:      subject,
		NotBefore:    now.Add(-time.Minute),
		NotAfter:     now.Add(30 * 24 * time.Hour),
	}
}
