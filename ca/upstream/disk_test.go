package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/keys"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// request is what a CA of example.org asks an upstream to sign.
func request(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "example.org X.509 authority"}, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// openssl runs the real program in dir.
func openssl(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// opensslPKI makes a root and an issuing CA below it as an organisation would, and returns the directory.
func opensslPKI(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	openssl(t, dir, "ecparam", "-name", "prime256v1", "-genkey", "-out", "root.key")
	openssl(t, dir, "req", "-x509", "-new", "-key", "root.key", "-subj", "/O=Example/CN=Example Root", "-days", "3650", "-out", "root.pem",
		"-addext", "basicConstraints=critical,CA:true", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
	openssl(t, dir, "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", "issuing.key")
	openssl(t, dir, "req", "-new", "-key", "issuing.key", "-subj", "/O=Example/CN=Example Issuing", "-out", "issuing.csr")
	ext := filepath.Join(dir, "ext")
	if err := os.WriteFile(ext, []byte("basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	openssl(t, dir, "x509", "-req", "-in", "issuing.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-days", "365", "-extfile", "ext", "-out", "issuing.pem")
	for _, f := range []string{"root.key", "issuing.key"} {
		if err := os.Chmod(filepath.Join(dir, f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func writePEM(t testing.TB, path string, certs ...*x509.Certificate) {
	t.Helper()
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

// keyFile has the key read from a file as package ca has it.
func keyFile(d Disk, path string) Disk {
	d.KeyName = "key_file " + path
	d.Key = func(context.Context) (crypto.Signer, error) { return keys.LoadKeyFile(path) }
	return d
}

func TestDiskBelowOpenSSL(t *testing.T) {
	dir := opensslPKI(t)
	for _, tt := range []struct {
		name string
		disk Disk
		key  string
	}{
		{"the root itself, with an EC key", Disk{CertificateFile: "root.pem"}, "root.key"},
		{"an issuing CA with an RSA key, and a bundle", Disk{CertificateFile: "issuing.pem", BundleFile: "root.pem"}, "issuing.key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := keyFile(tt.disk, filepath.Join(dir, tt.key))
			for _, f := range []*string{&d.CertificateFile, &d.BundleFile} {
				if *f != "" {
					*f = filepath.Join(dir, *f)
				}
			}
			key := newKey(t)
			chain, roots, err := d.Mint(t.Context(), request(t, key), time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if left := time.Until(chain[0].NotAfter); left > time.Hour || left < 59*time.Minute || chain[0].URIs[0].String() != "spiffe://example.org" {
				t.Errorf("it is valid for %v, with the IDs %v", left, chain[0].URIs)
			}
			// OpenSSL judges the chain as its peers would.
			out := t.TempDir()
			writePEM(t, filepath.Join(out, "cert.pem"), chain[0])
			writePEM(t, filepath.Join(out, "chain.pem"), chain...)
			writePEM(t, filepath.Join(out, "roots.pem"), roots...)
			if text := openssl(t, out, "verify", "-x509_strict", "-CAfile", "roots.pem", "-untrusted", "chain.pem", "cert.pem"); !strings.Contains(text, "OK") {
				t.Error(text)
			}
			again, jwt, err := d.Follow(t.Context())
			if err != nil || len(jwt) != 0 || len(again) != 1 || !again[0].Equal(roots[0]) {
				t.Errorf("Follow: %d roots, %v", len(again), err)
			}
		})
	}
}

// An exchanged file counts at once, and a half-exchanged pair is refused.
func TestDiskFilesAreReadAnew(t *testing.T) {
	dir, next := opensslPKI(t), opensslPKI(t)
	d := keyFile(Disk{CertificateFile: filepath.Join(dir, "root.pem")}, filepath.Join(dir, "root.key"))
	move := func(name string) {
		t.Helper()
		if err := os.Rename(filepath.Join(next, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	csr := request(t, newKey(t))
	_, first, err := d.Mint(t.Context(), csr, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	move("root.pem")
	if _, _, err := d.Mint(t.Context(), csr, time.Hour); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("a certificate with another key's file: %v", err)
	}
	move("root.key")
	if _, second, err := d.Mint(t.Context(), csr, time.Hour); err != nil || second[0].Equal(first[0]) {
		t.Errorf("after both were exchanged: %v, or the old root", err)
	}
}

func TestDiskRefusals(t *testing.T) {
	dir := opensslPKI(t)
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		if err := os.WriteFile(file(name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return file(name)
	}
	openssl(t, dir, "pkcs8", "-topk8", "-in", "root.key", "-passout", "pass:secret", "-out", "encrypted.key")
	os.Chmod(file("encrypted.key"), 0o600)
	rootKey, err := os.ReadFile(file("root.key"))
	if err != nil {
		t.Fatal(err)
	}
	openssl(t, dir, "req", "-x509", "-new", "-key", "root.key", "-subj", "/CN=leaf", "-out", "leaf.pem", "-addext", "basicConstraints=critical,CA:false")
	for _, tt := range []struct {
		name string
		d    Disk
		want string
	}{
		{"no certificate", keyFile(Disk{CertificateFile: file("none")}, file("root.key")), "no such file"},
		{"no key", keyFile(Disk{CertificateFile: file("root.pem")}, file("none")), "no such file"},
		{"another key", keyFile(Disk{CertificateFile: file("root.pem")}, file("issuing.key")), "another key"},
		{"an encrypted key", keyFile(Disk{CertificateFile: file("root.pem")}, file("encrypted.key")), "encrypted"},
		{"a key that all can read", keyFile(Disk{CertificateFile: file("root.pem")}, write("open.key", string(rootKey), 0o644)), "chmod"},
		{"a key as certificate", keyFile(Disk{CertificateFile: file("root.key")}, file("root.key")), "another kind"},
		{"garbage as key", keyFile(Disk{CertificateFile: file("root.pem")}, write("garbage.key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0o600)), "malformed"},
		{"no root", keyFile(Disk{CertificateFile: file("issuing.pem")}, file("issuing.key")), "bundle_file"},
		{"no CA", keyFile(Disk{CertificateFile: file("leaf.pem")}, file("root.key")), "not that of a CA"},
		{"too large", keyFile(Disk{CertificateFile: write("large.pem", strings.Repeat("x", maxPEMBytes+1), 0o600)}, file("root.key")), "more than"},
		{"ended", keyFile(Disk{CertificateFile: file("root.pem"), Now: func() time.Time { return time.Now().Add(20 * 365 * 24 * time.Hour) }}, file("root.key")), "ended at"},
		{"a key store that is gone", Disk{CertificateFile: file("root.pem"), Key: func(context.Context) (crypto.Signer, error) { return nil, errors.New("token is not present") }}, "token is not present"},
	} {
		_, _, err := tt.d.Mint(t.Context(), request(t, newKey(t)), time.Hour)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error with %q", tt.name, err, tt.want)
		}
		if err != nil && bytes.Contains([]byte(err.Error()), rootKey[60:90]) {
			t.Errorf("%s: the error holds a part of the key", tt.name)
		}
	}
}

// FuzzParseCertificates holds that what is taken is within the limits and prints back as it was read.
func FuzzParseCertificates(f *testing.F) {
	dir := opensslPKI(f)
	root, err := os.ReadFile(filepath.Join(dir, "root.pem"))
	if err != nil {
		f.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, "issuing.key"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(root)
	f.Add(append(bytes.Clone(root), root...))
	f.Add(append(bytes.Clone(root), key...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Add(append(bytes.Clone(root), "-----BEGIN CERTIFICATE-----\nAAAA"...))
	f.Fuzz(func(t *testing.T, text []byte) {
		certs, err := ParseCertificates(text, "it")
		if err != nil {
			return
		}
		if len(certs) == 0 || len(certs) > maxCertificates {
			t.Fatalf("%d certificates", len(certs))
		}
		var out []byte
		for _, c := range certs {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
		}
		again, err := ParseCertificates(out, "it")
		if err != nil || len(again) != len(certs) {
			t.Errorf("read back: %d of %d, %v", len(again), len(certs), err)
		}
	})
}

func TestRetryIsBounded(t *testing.T) {
	n := 0
	_, err := retry(t.Context(), func() (int, error) { n++; return 0, errors.New("for good") })
	if n != 1 || err == nil {
		t.Errorf("an error for good: %d calls, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	n = 0
	if _, err = retry(ctx, func() (int, error) { n++; return 0, errTemporary }); n != 1 || !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %d calls, %v", n, err)
	}
}
