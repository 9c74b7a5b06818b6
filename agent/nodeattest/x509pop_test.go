package nodeattest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/internal/x509pop"
)

// popFiles writes a certificate and its key, each encoded as some CA's tools do.
func popFiles(t *testing.T, key crypto.Signer, typ string, keyDER []byte) X509POP {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "n"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	x := X509POP{CertificatePath: filepath.Join(dir, "node.pem"), PrivateKeyPath: filepath.Join(dir, "node.key")}
	write(t, x.CertificatePath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, x.PrivateKeyPath, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: keyDER}))
	return x
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestX509POPReadsKeysAsToolsWriteThem(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		typ string
		key crypto.Signer
		der []byte
	}{{"EC PRIVATE KEY", ec, sec1}, {"RSA PRIVATE KEY", r, x509.MarshalPKCS1PrivateKey(r)}, {"PRIVATE KEY", r, pkcs8}} {
		x := popFiles(t, tt.key, tt.typ, tt.der)
		x.IntermediatesPath = x.CertificatePath
		e, err := x.Begin(t.Context())
		if err != nil {
			t.Errorf("%s: %v", tt.typ, err)
			continue
		}
		payload, err := e.Payload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var p x509pop.Payload
		if err := json.Unmarshal(payload, &p); err != nil || len(p.Certificates) != 2 {
			t.Errorf("%s: payload %s, %v", tt.typ, payload, err)
		}
		c, err := x509pop.NewChallenge(tt.key.Public())
		if err != nil {
			t.Fatal(err)
		}
		question, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := e.Respond(t.Context(), question)
		if err != nil {
			t.Fatal(err)
		}
		response, err := x509pop.ParseResponse(answer)
		if err != nil {
			t.Fatal(err)
		}
		if err := x509pop.Verify(tt.key.Public(), c, response); err != nil {
			t.Errorf("%s: %v", tt.typ, err)
		}
		for name, q := range map[string]string{"garbage": "{", "nothing": "{}", "both": `{"rsa_signature":{},"ecdsa_signature":{}}`, "short": `{"rsa_signature":{"nonce":"AQ=="}}`, "huge": strings.Repeat("x", MaxChallengeBytes+1)} {
			if _, err := e.Respond(t.Context(), []byte(q)); err == nil {
				t.Errorf("%s: a challenge that is %s was answered", tt.typ, name)
			}
		}
	}
}

func TestX509POPNamesTheFileThatIsWrong(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	otherDER, err := x509.MarshalECPrivateKey(other)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(*testing.T, *X509POP)
		want   string
	}{
		"no certificate": {func(t *testing.T, x *X509POP) { x.CertificatePath += ".none" }, "x509pop.certificate_path: "},
		"no key":         {func(t *testing.T, x *X509POP) { x.PrivateKeyPath += ".none" }, "x509pop.private_key_path: "},
		"an exposed key": {func(t *testing.T, x *X509POP) { os.Chmod(x.PrivateKeyPath, 0o644) }, "chmod go="},
		"another's key": {func(t *testing.T, x *X509POP) {
			write(t, x.PrivateKeyPath, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: otherDER}))
		}, "private_key_path"},
		"a garbage key":            {func(t *testing.T, x *X509POP) { write(t, x.PrivateKeyPath, []byte("verysecret")) }, "private_key_path"},
		"large":                    {func(t *testing.T, x *X509POP) { write(t, x.CertificatePath, make([]byte, maxPEMBytes+1)) }, "x509pop.certificate_path: "},
		"no intermediate":          {func(t *testing.T, x *X509POP) { x.IntermediatesPath = x.CertificatePath + ".none" }, "x509pop.intermediates_path: "},
		"a key as an intermediate": {func(t *testing.T, x *X509POP) { x.IntermediatesPath = x.PrivateKeyPath }, "x509pop.intermediates_path"},
	} {
		x := popFiles(t, ec, "EC PRIVATE KEY", der)
		tt.change(t, &x)
		_, err := x.Begin(t.Context())
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "verysecret") {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func FuzzX509POPFiles(f *testing.F) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, ec.Public(), ec)
	if err != nil {
		f.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		f.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	f.Add(cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	f.Add(cert, cert)
	f.Fuzz(func(t *testing.T, certificates, key []byte) {
		chain, signer, err := parsePair(certificates, key)
		if err == nil {
			leaf, err := x509.ParseCertificate(chain[0])
			if public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); err != nil || !ok || !public.Equal(leaf.PublicKey) {
				t.Errorf("the key is not that of the certificate: %v", err)
			}
		}
		if more, err := parseCertificates(certificates); err == nil && len(more) == 0 {
			t.Error("no certificates and no error")
		}
	})
}
