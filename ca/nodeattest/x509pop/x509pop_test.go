package x509pop

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/nodeattest"
	wire "github.com/signet-id/signet/internal/x509pop"
)

func chain(t testing.TB) (root *x509.Certificate, leaf []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	if root, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	node := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "n"}, NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{{Scheme: "x509pop", Host: "example.org", Path: "/a/b"}}}
	if leaf, err = x509.CreateCertificate(rand.Reader, node, root, k.Public(), k); err != nil {
		t.Fatal(err)
	}
	return root, leaf
}

var errAsked = errors.New("asked")

// FuzzAttest: whatever a caller sends, it is refused before it is asked for a proof, unless its chain leads to the root; and
// what it is named then is a legal path.
func FuzzAttest(f *testing.F) {
	root, leaf := chain(f)
	_, stranger := chain(f)
	for _, p := range []wire.Payload{{Certificates: [][]byte{leaf}}, {Certificates: [][]byte{stranger}}, {Certificates: [][]byte{leaf, root.Raw, stranger}}} {
		data, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"certificates":[null]}`))
	roots := x509.NewCertPool()
	roots.AddCert(root)
	a, err := New(Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Roots: func() (*x509.CertPool, error) { return roots, nil }})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		_, err := a.Attest(context.Background(), nodeattest.Attempt{Payload: payload, Challenge: func(q []byte) ([]byte, error) {
			if _, err := wire.ParseChallenge(q); err != nil {
				t.Error(err)
			}
			return nil, errAsked
		}})
		if errors.Is(err, errAsked) {
			var p wire.Payload
			if json.Unmarshal(payload, &p) != nil || len(p.Certificates) == 0 {
				t.Fatal("asked for no certificate")
			}
			c, err := x509.ParseCertificate(p.Certificates[0])
			if err != nil || c.CheckSignatureFrom(root) != nil {
				t.Errorf("%q was asked for a proof", payload)
			}
			return
		}
		if r, ok := errors.AsType[*nodeattest.Refusal](err); !ok || r.Text == "" {
			t.Errorf("%q: %v, which is no refusal", payload, err)
		}
	})
}

func TestIssuer(t *testing.T) {
	root, leaf := chain(t)
	roots := x509.NewCertPool()
	roots.AddCert(root)
	for _, own := range []bool{true, false} {
		a, err := New(Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Roots: func() (*x509.CertPool, error) { return roots, nil },
			Issuer: func(c *x509.Certificate) bool { return own && c.Equal(root) }})
		if err != nil {
			t.Fatal(err)
		}
		payload, err := json.Marshal(wire.Payload{Certificates: [][]byte{leaf}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.Attest(t.Context(), nodeattest.Attempt{Payload: payload, Challenge: func([]byte) ([]byte, error) { return nil, errAsked }})
		if errors.Is(err, errAsked) != own {
			t.Errorf("issued here %t: %v", own, err)
		}
	}
}
