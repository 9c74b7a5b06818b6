package awsiid

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/smallstep/pkcs7"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/test/cloudtest"
)

const (
	account  = "123456789012"
	region   = "eu-central-1"
	instance = "i-078517ca8a70a1dde"
)

var launched = time.Now().Add(-time.Hour).Truncate(time.Second)

func newAttestor(t testing.TB, change func(*Config), keys ...*cloudtest.AWS) *Attestor {
	t.Helper()
	c := Config{Accounts: []string{account}, Certificates: map[string]string{region: cloudtest.File(t, keys...)}}
	if change != nil {
		change(&c)
	}
	a, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func attest(a *Attestor, payload []byte) (*nodeattest.Evidence, error) {
	return a.Attest(context.Background(), nodeattest.Attempt{Payload: payload})
}

func TestAttest(t *testing.T) {
	aws, next := cloudtest.NewAWS(t), cloudtest.NewAWS(t)
	document := cloudtest.Document(account, region, instance, launched)
	want := &nodeattest.Evidence{
		Path:      []string{"aws_iid", account, region, instance},
		Selectors: []string{"account_id:" + account, "az:eu-central-1a", "image:id:ami-0fa9e1f64142cde17", "instance:id:" + instance, "region:eu-central-1"},
		Facts:     map[string]any{"account": account, "region": region, "instance": instance, "launched": launched.Unix()},
	}
	a := newAttestor(t, nil, aws, next)
	for name, signature := range map[string]string{
		"as AWS writes it":       aws.Sign(t, document),
		"by the next key":        next.Sign(t, document),
		"in DER, in one line":    base64.StdEncoding.EncodeToString(aws.SignDER(t, document, pkcs7.OIDDigestAlgorithmSHA256)),
		"with SHA-512":           cloudtest.Lines(aws.SignDER(t, document, pkcs7.OIDDigestAlgorithmSHA512)),
		"with Windows line ends": strings.ReplaceAll(aws.Sign(t, document), "\n", "\r\n"),
	} {
		got, err := attest(a, cloudtest.Payload(t, document, signature))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: evidence (-want +got):\n%s", name, diff)
		}
	}
	if _, err := want.Check(Type); err != nil {
		t.Errorf("evidence: %v", err)
	}
	got, err := attest(newAttestor(t, func(c *Config) { c.AllowReattestation = true }, aws), cloudtest.Payload(t, document, aws.Sign(t, document)))
	if err != nil || !got.CanReattest {
		t.Errorf("with allow_reattestation: %+v, %v", got, err)
	}
}

func TestAttestRefusals(t *testing.T) {
	aws, other := cloudtest.NewAWS(t), cloudtest.NewAWS(t)
	ended := cloudtest.NewAWSKey(t, 2048, time.Now().AddDate(-2, 0, 0), time.Now().Add(-time.Minute))
	a := newAttestor(t, func(c *Config) { c.MaxInstanceAge = 2 * time.Hour }, aws, ended)
	good := cloudtest.Document(account, region, instance, launched)
	signed := aws.Sign(t, good)
	payload := func(document, signature string) []byte { return cloudtest.Payload(t, document, signature) }
	signedPayload := func(document string) []byte { return payload(document, aws.Sign(t, document)) }
	replace := func(from, to string) string {
		if !strings.Contains(good, from) {
			t.Fatalf("the document has no %q", from)
		}
		return strings.Replace(good, from, to, 1)
	}
	old := func() []byte { // the signature by the short key, which SPIRE's servers still believe
		sum := sha256.Sum256([]byte(good))
		signature, err := rsa.SignPKCS1v15(rand.Reader, aws.Key, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		out, err := json.Marshal(map[string]string{"document": good, "signature": base64.StdEncoding.EncodeToString(signature)})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	twoSigners := func() string {
		s, err := pkcs7.NewSignedData([]byte(good))
		if err != nil {
			t.Fatal(err)
		}
		s.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
		for _, k := range []*cloudtest.AWS{aws, other} {
			if err := s.AddSigner(k.Certificate, k.Key, pkcs7.SignerInfoConfig{}); err != nil {
				t.Fatal(err)
			}
		}
		der, err := s.Finish()
		if err != nil {
			t.Fatal(err)
		}
		return cloudtest.Lines(der)
	}
	noSigner := func() string {
		s, err := pkcs7.NewSignedData([]byte(good))
		if err != nil {
			t.Fatal(err)
		}
		s.AddCertificate(aws.Certificate)
		der, err := s.Finish()
		if err != nil {
			t.Fatal(err)
		}
		return cloudtest.Lines(der)
	}
	flipped := func() string {
		der, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(signed, "\n", ""))
		if err != nil {
			t.Fatal(err)
		}
		der[len(der)-20] ^= 1
		return cloudtest.Lines(der)
	}
	tests := []struct {
		name    string
		payload []byte
		kind    nodeattest.Kind
		want    string
	}{
		{"not JSON", []byte("document"), nodeattest.Malformed, "not a JSON object"},
		{"the document twice", bytes.Replace(payload(good, signed), []byte(`"document":`), []byte(`"document":"{}","document":`), 1), nodeattest.Malformed, "each once"},
		{"no document", []byte(`{"rsa2048":"eA=="}`), nodeattest.Malformed, "missing document"},
		{"no signature", []byte(`{"document":"{}"}`), nodeattest.Malformed, "signature is required"},
		{"only the signature by a short key", old(), nodeattest.Malformed, "1024 bits is not accepted"},
		{"huge document", payload(good+strings.Repeat(" ", maxDocumentBytes), signed), nodeattest.Malformed, "at most"},
		{"huge signature", payload(good, signed+strings.Repeat("\n", maxSignatureBytes)), nodeattest.Malformed, "at most"},
		{"document that is none", signedPayload(`["x"]`), nodeattest.Malformed, "not an instance identity document"},
		{"signed document with a member twice", signedPayload(replace(`"version"`, `"accountId" : "210987654321", "version"`)), nodeattest.Malformed, "occurs twice"},
		{"other case of a member", signedPayload(replace(`"accountId"`, `"accountid"`)), nodeattest.Malformed, "accountId"},
		{"instance that leads elsewhere", signedPayload(replace(instance, "../../x509pop/a")), nodeattest.Malformed, "instanceId"},
		{"no launch time", signedPayload(replace(`"pendingTime"`, `"x"`)), nodeattest.Malformed, "pendingTime"},
		{"launch time that is none", signedPayload(replace(`"pendingTime" : "2`, `"pendingTime" : "x2`)), nodeattest.Malformed, "not an instance identity document"},

		{"other account", signedPayload(replace(account, "210987654321")), nodeattest.Denied, `account "210987654321"`},
		{"other region", signedPayload(strings.ReplaceAll(good, region, "us-east-1")), nodeattest.Denied, "no certificate for region"},
		{"launched too long ago", signedPayload(cloudtest.Document(account, region, instance, time.Now().Add(-3*time.Hour))), nodeattest.Denied, "more than 2h"},
		{"launched tomorrow", signedPayload(cloudtest.Document(account, region, instance, time.Now().Add(24*time.Hour))), nodeattest.Denied, "future"},

		{"not base64", payload(good, "%%%"), nodeattest.Malformed, "not base64"},
		{"not PKCS #7", payload(good, base64.StdEncoding.EncodeToString([]byte("hello, world"))), nodeattest.Malformed, "not PKCS #7"},
		{"a bomb of nested lengths", payload(good, base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0x30, 0x80}, 4000))), nodeattest.Malformed, "not PKCS #7"},
		{"a document that was changed", payload(replace(instance, "i-00000000000000000"), signed), nodeattest.Malformed, "not the one that the signature is for"},
		{"the signature of another document", payload(good, aws.Sign(t, replace(instance, "i-00000000000000000"))), nodeattest.Malformed, "not the one that the signature is for"},
		{"a signature with one bit changed", payload(good, flipped()), nodeattest.Malformed, "failed verification"},
		{"signed by somebody else, whose certificate is in it", payload(good, cloudtest.Lines(other.SignDER(t, good, pkcs7.OIDDigestAlgorithmSHA256))), nodeattest.Malformed, "none of the region's"},
		{"signed by somebody who calls himself AWS", payload(good, forged(t, aws, other, good)), nodeattest.Malformed, "failed verification"},
		{"with SHA-1", payload(good, cloudtest.Lines(aws.SignDER(t, good, pkcs7.OIDDigestAlgorithmSHA1))), nodeattest.Malformed, "digest algorithm"},
		{"two signers", payload(good, twoSigners()), nodeattest.Malformed, "2 signers"},
		{"no signer", payload(good, noSigner()), nodeattest.Malformed, "0 signers"},
		{"by a certificate that has ended", payload(good, ended.Sign(t, good)), nodeattest.Malformed, "valid from"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := attest(a, tt.payload)
			if err == nil {
				t.Fatalf("let in as %v", got.Path)
			}
			r, ok := errors.AsType[*nodeattest.Refusal](err)
			if !ok || r.Kind != tt.kind || !strings.Contains(r.Error(), tt.want) {
				t.Errorf("error %v, want a refusal of kind %d with %q", err, tt.kind, tt.want)
			}
		})
	}
}

// forged is signed with the key of other, and says that it was signed by aws.
func forged(t *testing.T, aws, other *cloudtest.AWS, document string) string {
	t.Helper()
	der := other.SignDER(t, document, pkcs7.OIDDigestAlgorithmSHA256)
	from, to := other.Certificate.SerialNumber.Bytes(), aws.Certificate.SerialNumber.Bytes()
	out := bytes.ReplaceAll(der, from, to)
	if len(from) != len(to) || bytes.Equal(out, der) {
		t.Fatalf("serial number %x was not replaced by %x", from, to)
	}
	return cloudtest.Lines(out)
}

func TestConfig(t *testing.T) {
	aws := cloudtest.NewAWS(t)
	dir := t.TempDir()
	file := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", aws.PEM())
	key := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: []byte("s3cret")})
	tests := []struct {
		name   string
		config Config
		want   string // told by Check or New; empty: nothing
	}{
		{"good", Config{Accounts: []string{account}, Certificates: map[string]string{region: good}}, ""},
		{"nobody", Config{Certificates: map[string]string{region: good}}, "accounts: missing"},
		{"an account that lost its zeros", Config{Accounts: []string{"12345"}, Certificates: map[string]string{region: good}}, "12 digits"},
		{"no certificates", Config{Accounts: []string{account}}, "certificates: missing"},
		{"a region that is none", Config{Accounts: []string{account}, Certificates: map[string]string{"EU": good}}, "name of a region"},
		{"relative", Config{Accounts: []string{account}, Certificates: map[string]string{region: "x"}}, "absolute"},
		{"negative", Config{Accounts: []string{account}, Certificates: map[string]string{region: good}, MaxInstanceAge: -1}, "negative"},
		{"no file", Config{Accounts: []string{account}, Certificates: map[string]string{region: filepath.Join(dir, "absent")}}, "no such file"},
		{"no certificate in it", Config{Accounts: []string{account}, Certificates: map[string]string{region: file("empty", []byte("hello"))}}, "no certificate"},
		{"a key in it", Config{Accounts: []string{account}, Certificates: map[string]string{region: file("key", key)}}, "only certificates"},
		{"a broken one", Config{Accounts: []string{account}, Certificates: map[string]string{region: file("broken", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}))}}, "certificate 1"},
		{"the short key", Config{Accounts: []string{account}, Certificates: map[string]string{region: file("short", cloudtest.NewAWSKey(t, 1024, time.Now(), time.Now().Add(time.Hour)).PEM())}}, "2048 bits"},
		{"too many", Config{Accounts: []string{account}, Certificates: map[string]string{region: file("many", bytes.Repeat(aws.PEM(), maxCertificates+1))}}, "more than"},
		{"too large", Config{Accounts: []string{account}, Certificates: map[string]string{region: file("large", make([]byte, maxFileBytes+1))}}, "too large"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var told []string
			tt.config.Check(func(field, format string, args ...any) { told = append(told, field+": "+fmt.Sprintf(format, args...)) })
			if len(told) == 0 {
				if _, err := New(tt.config); err != nil {
					told = append(told, err.Error())
				}
			}
			got := strings.Join(told, "\n")
			if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) || strings.Contains(got, "s3cret") {
				t.Errorf("told %q, want %q", got, tt.want)
			}
		})
	}
}

// What is let in was signed by AWS byte for byte, and its name can stand in a SPIFFE ID.
func FuzzAttest(f *testing.F) {
	aws := cloudtest.NewAWS(f)
	document := cloudtest.Document(account, region, instance, launched)
	a := newAttestor(f, nil, aws)
	f.Add(cloudtest.Payload(f, document, aws.Sign(f, document)))
	f.Add(cloudtest.Payload(f, document, base64.StdEncoding.EncodeToString(aws.SignDER(f, document, pkcs7.OIDDigestAlgorithmSHA256))))
	f.Add([]byte(`{"document":"{}","rsa2048":"MIAG"}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := attest(a, payload)
		if err != nil {
			if _, ok := errors.AsType[*nodeattest.Refusal](err); !ok {
				t.Fatalf("Attest(%q): %v is no refusal", payload, err)
			}
			return
		}
		if !slices.Equal(e.Path, []string{Type, account, region, instance}) {
			t.Fatalf("Attest(%q): let in as %v", payload, e.Path)
		}
	})
}

// A signature in any encoding speaks for no document but its own.
func FuzzSignature(f *testing.F) {
	aws := cloudtest.NewAWS(f)
	document := cloudtest.Document(account, region, instance, launched)
	for _, s := range []string{aws.Sign(f, document), base64.StdEncoding.EncodeToString(aws.SignDER(f, document, pkcs7.OIDDigestAlgorithmSHA256))} {
		der, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(s, "\n", ""))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der, []byte(document))
	}
	a := newAttestor(f, nil, aws)
	f.Fuzz(func(t *testing.T, der, doc []byte) {
		if len(der) > maxSignatureBytes {
			return
		}
		err := verify(doc, base64.StdEncoding.EncodeToString(der), a.certificates[region], time.Now())
		if errors.Is(err, errParser) {
			t.Fatalf("the parser panics over %x", der)
		}
		if err == nil && string(doc) != document {
			t.Fatalf("the signature %x speaks for %q", der, doc)
		}
	})
}
