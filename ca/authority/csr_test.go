package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func requestBy(t testing.TB, k crypto.Signer, id string, subject pkix.Name) []byte {
	t.Helper()
	template := &x509.CertificateRequest{Subject: subject}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

var spireSubject = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}

func TestUsualCSRsAreReadHere(t *testing.T) {
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	other, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	id := "spiffe://example.org/web"
	long := "spiffe://example.org/" + strings.Repeat("a", 2048-len("spiffe://example.org/"))
	for name, tt := range map[string]struct {
		der  []byte
		id   string
		want bool
	}{
		"SPIRE's":         {requestBy(t, k, id, spireSubject), id, true},
		"without subject": {requestBy(t, k, id, pkix.Name{}), id, true},
		"without ID":      {requestBy(t, k, "", spireSubject), id, true},
		"with nothing":    {requestBy(t, k, "", pkix.Name{}), id, true},
		"longest ID":      {requestBy(t, k, long, spireSubject), long, true},
		"another ID":      {requestBy(t, k, "spiffe://example.org/other", spireSubject), id, false},
		"another subject": {requestBy(t, k, id, pkix.Name{CommonName: "x"}), id, false},
		"another curve":   {requestBy(t, other, id, spireSubject), id, false},
		"empty":           {nil, id, false},
	} {
		r, ok := readUsualCSR(tt.der, tt.id)
		if ok != tt.want || ok && (!r.key.Equal(k.Public()) || !r.verifies()) {
			t.Errorf("%s: %t, want %t", name, ok, tt.want)
		}
	}
	// Each of its bytes counts.
	good := requestBy(t, k, id, spireSubject)
	want := spiffeid.RequireFromString(id)
	if _, err := CheckCSR(good, want); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		for _, bit := range []byte{1, 0x80} {
			bad := bytes.Clone(good)
			bad[i] ^= bit
			if key, err := CheckCSR(bad, want); err == nil {
				t.Errorf("byte %d of %d changed: taken, with the key %v", i, len(good), key)
			}
		}
	}
	for i := range good {
		if _, err := CheckCSR(good[:i], want); err == nil {
			t.Errorf("cut after %d of %d bytes: taken", i, len(good))
		}
	}
}

// FuzzUsualCSR: what is read here, crypto/x509 reads as the same.
func FuzzUsualCSR(f *testing.F) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	id := "spiffe://example.org/web"
	for _, der := range [][]byte{requestBy(f, k, id, spireSubject), requestBy(f, k, id, pkix.Name{}), requestBy(f, k, "", spireSubject), requestBy(f, k, "", pkix.Name{})} {
		f.Add(der, id)
		f.Add(append(bytes.Clone(der), 0), id)
	}
	f.Fuzz(func(t *testing.T, der []byte, text string) {
		want, err := spiffeid.FromString(text)
		if err != nil {
			return
		}
		r, ok := readUsualCSR(der, want.String())
		if !ok {
			return
		}
		std, err := x509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatalf("crypto/x509 does not read what was read here: %v", err)
		}
		if !bytes.Equal(std.RawTBSCertificateRequest, r.tbs) || !bytes.Equal(std.Signature, r.signature) || !r.key.Equal(std.PublicKey) ||
			std.SignatureAlgorithm != x509.ECDSAWithSHA256 || checkCSRURIs(std, want) != nil {
			t.Error("crypto/x509 reads it as something else")
		}
		if (std.CheckSignature() == nil) != r.verifies() {
			t.Error("crypto/x509 judges the signature otherwise")
		}
	})
}
