// Package cloudtest stands in, in tests, for the clouds whose signatures the CA believes: it has keys of its own and signs
// with them what AWS and Google sign. It is for tests only.
package cloudtest

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"
)

// AWS stands in for the key with which AWS signs the documents of one region.
type AWS struct {
	Key         *rsa.PrivateKey
	Certificate *x509.Certificate
}

// NewAWS makes a key and a certificate as AWS's are: self-signed, for nearly two centuries.
func NewAWS(t testing.TB) *AWS {
	t.Helper()
	return NewAWSKey(t, 2048, time.Now().AddDate(-1, 0, 0), time.Now().AddDate(170, 0, 0))
}

// NewAWSKey is NewAWS with another size of key and another validity.
func NewAWSKey(t testing.TB, bits int, notBefore, notAfter time.Time) *AWS {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	const top = 1 << 62
	serial, err := rand.Int(rand.Reader, big.NewInt(top))
	if err != nil {
		t.Fatal(err)
	}
	serial.Add(serial, big.NewInt(top)) // all have 8 bytes
	template := &x509.Certificate{
		SerialNumber: serial, NotBefore: notBefore, NotAfter: notAfter, SignatureAlgorithm: x509.SHA256WithRSA,
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"Amazon Web Services LLC"}, Province: []string{"Washington State"}, Locality: []string{"Seattle"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &AWS{Key: key, Certificate: certificate}
}

// PEM is the certificate as AWS publishes it.
func (a *AWS) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Raw})
}

// File writes the certificates of all to a file, and returns its path.
func File(t testing.TB, all ...*AWS) string {
	t.Helper()
	var text []byte
	for _, a := range all {
		text = append(text, a.PEM()...)
	}
	path := filepath.Join(t.TempDir(), "aws.pem")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Document is an instance identity document, laid out as AWS does it.
func Document(account, region, instance string, launched time.Time) string {
	return fmt.Sprintf(`{
  "accountId" : %q,
  "architecture" : "x86_64",
  "availabilityZone" : "%sa",
  "billingProducts" : null,
  "devpayProductCodes" : null,
  "marketplaceProductCodes" : null,
  "imageId" : "ami-0fa9e1f64142cde17",
  "instanceId" : %q,
  "instanceType" : "t2.medium",
  "kernelId" : null,
  "pendingTime" : %q,
  "privateIp" : "10.0.0.209",
  "ramdiskId" : null,
  "region" : %q,
  "version" : "2017-09-30"
}`, account, region, instance, launched.UTC().Format(time.RFC3339), region)
}

// Sign signs a document with SHA-256 and returns what AWS serves under instance-identity/rsa2048: a PKCS #7 message with
// the document in it and no certificate, in BER with indefinite lengths, as base64 in lines.
func (a *AWS) Sign(t testing.TB, document string) string {
	t.Helper()
	return Lines(indefinite(t, a.SignDER(t, document, pkcs7.OIDDigestAlgorithmSHA256)))
}

// SignDER signs a document with a digest of choice and returns the PKCS #7 message in DER, with the certificate.
func (a *AWS) SignDER(t testing.TB, document string, digest asn1.ObjectIdentifier) []byte {
	t.Helper()
	signed, err := pkcs7.NewSignedData([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	signed.SetDigestAlgorithm(digest)
	if err := signed.AddSigner(a.Certificate, a.Key, pkcs7.SignerInfoConfig{}); err != nil {
		t.Fatal(err)
	}
	der, err := signed.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// Lines is base64 in lines of 76 characters.
func Lines(data []byte) string {
	text := base64.StdEncoding.EncodeToString(data)
	var b bytes.Buffer
	for len(text) > 76 {
		b.WriteString(text[:76] + "\n")
		text = text[76:]
	}
	b.WriteString(text)
	return b.String()
}

// Payload is what an agent sends.
func Payload(t testing.TB, document, rsa2048 string) []byte {
	t.Helper()
	payload, err := json.Marshal(map[string]string{"document": document, "signature": "b2xk", "rsa2048": rsa2048})
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

// indefinite writes a PKCS #7 message as AWS does.
func indefinite(t testing.TB, der []byte) []byte {
	t.Helper()
	var outer struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"explicit,tag:0"`
	}
	var inner struct {
		Version     int
		Digests     asn1.RawValue `asn1:"set"`
		ContentInfo struct {
			Type    asn1.ObjectIdentifier
			Content []byte `asn1:"explicit,tag:0"`
		}
		Certificates asn1.RawValue `asn1:"optional,tag:0"`
		Signers      asn1.RawValue `asn1:"set"`
	}
	if _, err := asn1.Unmarshal(der, &outer); err != nil {
		t.Fatal(err)
	}
	if _, err := asn1.Unmarshal(outer.Content.Bytes, &inner); err != nil {
		t.Fatal(err)
	}
	must := func(v any) []byte {
		out, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	end := []byte{0, 0}
	return bytes.Join([][]byte{
		{0x30, 0x80}, must(outer.Type), {0xa0, 0x80},
		{0x30, 0x80}, must(inner.Version), inner.Digests.FullBytes,
		{0x30, 0x80}, must(inner.ContentInfo.Type), {0xa0, 0x80}, {0x24, 0x80}, must(inner.ContentInfo.Content), end, end, end,
		inner.Signers.FullBytes, end, end, end,
	}, nil)
}
