package spiffe

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// testNow is the clock of all tests.
var testNow = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

var exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")

// wantRow fails the test unless err carries row ("" for no error).
func wantRow(t *testing.T, call string, err error, row string) {
	t.Helper()
	if (err == nil) != (row == "") || RowOf(err) != row {
		t.Errorf("%s: error %v with row %q, want row %q", call, err, RowOf(err), row)
	}
}

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var testRSAKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

// issuer is a signing certificate with its key.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// sanExtension encodes a SAN extension with URIs byte for byte, and one name of each other kind if more is set.
func sanExtension(t testing.TB, critical, more bool, uris ...string) pkix.Extension {
	t.Helper()
	var names []asn1.RawValue
	for _, uri := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(uri)})
	}
	if more {
		names = append(names,
			asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte("w.example.org")},
			asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 7, Bytes: net.IPv4(10, 0, 0, 1).To4()},
			asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 1, Bytes: []byte("w@example.org")})
	}
	value, err := asn1.Marshal(names)
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: oidSubjectAltName, Critical: critical, Value: value}
}

// sign issues a certificate for a fresh key. A nil parent makes it self-signed.
func sign(t testing.TB, template *x509.Certificate, parent *issuer) *issuer {
	t.Helper()
	key := newKey(t, elliptic.P256())
	if parent == nil {
		parent = &issuer{cert: template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent.cert, key.Public(), parent.key)
	if err != nil {
		t.Fatalf("issuing: %v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatalf("parsing what was issued: %v", err)
	}
	return &issuer{cert: cert, key: key}
}

var serials struct {
	sync.Mutex
	last int64
}

func nextSerial() *big.Int {
	serials.Lock()
	defer serials.Unlock()
	serials.last++
	return big.NewInt(serials.last)
}

// caTemplate is a signing certificate of a trust domain as the standard wants it.
func caTemplate(t testing.TB, td string, change func(*x509.Certificate)) *x509.Certificate {
	template := &x509.Certificate{
		SerialNumber:          nextSerial(),
		Subject:               pkix.Name{CommonName: "CA of " + td},
		NotBefore:             testNow.Add(-24 * time.Hour),
		NotAfter:              testNow.Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtraExtensions:       []pkix.Extension{sanExtension(t, false, false, "spiffe://"+td)},
	}
	if change != nil {
		change(template)
	}
	return template
}

func newRoot(t testing.TB, td string, change func(*x509.Certificate)) *issuer {
	t.Helper()
	return sign(t, caTemplate(t, td, change), nil)
}

func (i *issuer) intermediate(t testing.TB, td string, change func(*x509.Certificate)) *issuer {
	t.Helper()
	return sign(t, caTemplate(t, td, func(c *x509.Certificate) {
		c.Subject.CommonName = "intermediate of " + td
		if change != nil {
			change(c)
		}
	}), i)
}

// leaf issues a leaf as the standard wants it, except for what change does.
func (i *issuer) leaf(t testing.TB, uri string, change func(*x509.Certificate)) *issuer {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber:          nextSerial(),
		NotBefore:             testNow.Add(-30 * time.Second),
		NotAfter:              testNow.Add(time.Hour),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if uri != "" {
		template.ExtraExtensions = []pkix.Extension{sanExtension(t, true, false, uri)}
	}
	if change != nil {
		change(template)
	}
	return sign(t, template, i)
}

// x509Bundles returns a source with one bundle per trust domain.
func x509Bundles(roots map[string]*issuer) x509bundle.Source {
	set := x509bundle.NewSet()
	for td, root := range roots {
		set.Add(x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString(td), []*x509.Certificate{root.cert}))
	}
	return set
}

func jwtBundles(td string, keys map[string]crypto.PublicKey) jwtbundle.Source {
	return jwtbundle.NewSet(jwtbundle.FromJWTAuthorities(spiffeid.RequireTrustDomainFromString(td), keys))
}

// object is a JSON object of a test.
type object map[string]any

// with returns a copy of o with one member changed; a nil value removes it.
func (o object) with(name string, value any) object {
	out := object{}
	for k, v := range o {
		out[k] = v
	}
	if out[name] = value; value == nil {
		delete(out, name)
	}
	return out
}

func (o object) text(t testing.TB) string {
	t.Helper()
	doc, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return string(doc)
}

// token signs header and payload as they are, so that tests can sign what no library would.
func token(t testing.TB, header, payload string, key crypto.Signer) string {
	t.Helper()
	input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload))
	return input + "." + base64.RawURLEncoding.EncodeToString(signBytes(t, input, key))
}

func signBytes(t testing.TB, input string, key crypto.Signer) []byte {
	t.Helper()
	hash := crypto.SHA256
	ec, isEC := key.(*ecdsa.PrivateKey)
	if isEC && ec.Curve == elliptic.P384() {
		hash = crypto.SHA384
	}
	if isEC && ec.Curve == elliptic.P521() {
		hash = crypto.SHA512
	}
	h := hash.New()
	h.Write([]byte(input))
	if !isEC {
		signature, err := key.Sign(rand.Reader, h.Sum(nil), hash)
		if err != nil {
			t.Fatal(err)
		}
		return signature
	}
	r, s, err := ecdsa.Sign(rand.Reader, ec, h.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	size := (ec.Curve.Params().BitSize + 7) / 8
	return append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
}

// goodHeader and goodClaims make the token of V067.
func goodHeader() object { return object{"alg": "ES256", "kid": "k1", "typ": "JWT"} }

func goodClaims() object {
	return object{"sub": "spiffe://example.org/w", "aud": []string{"svc"}, "exp": testNow.Unix() + 300}
}

// entry returns the JWK of a key as a JSON object.
func entry(t testing.TB, use, kid string, key crypto.PublicKey, certs ...*x509.Certificate) object {
	t.Helper()
	doc, err := jose.JSONWebKey{Key: key, KeyID: kid, Use: use, Certificates: certs}.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var out object
	if err := json.Unmarshal(doc, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func document(t testing.TB, entries ...any) []byte {
	t.Helper()
	doc, err := json.Marshal(object{"keys": append([]any{}, entries...)})
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func long(prefix string, total int) string {
	return prefix + strings.Repeat("a", total-len(prefix))
}
