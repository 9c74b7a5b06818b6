// Package testca makes trust domains for the tests of the enforcement points: an authority, X509-SVIDs and JWT-SVIDs that
// real TLS connections and validators accept. It is linked into tests only.
package testca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
)

// A CA is the authority of one trust domain, for X.509 and JWT.
type CA struct {
	TrustDomain spiffeid.TrustDomain
	key         *ecdsa.PrivateKey
	cert        *x509.Certificate
}

// New returns the CA of a new trust domain.
func New(t testing.TB, name string) *CA {
	t.Helper()
	ca := &CA{TrustDomain: spiffeid.RequireTrustDomainFromString(name), key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{ca.TrustDomain.ID().URL()},
	}
	ca.cert = sign(t, template, template, ca.key, ca.key)
	return ca
}

// SVID returns an X509-SVID for the path, valid for ttl from a minute ago.
func (ca *CA) SVID(t testing.TB, path string, ttl time.Duration) *x509svid.SVID {
	t.Helper()
	id := spiffeid.RequireFromPath(ca.TrustDomain, path)
	key := newKey(t)
	leaf := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{id.URL()},
	}, ca.cert, key, ca.key)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

// X509 returns the bundle of the CA.
func (ca *CA) X509() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(ca.TrustDomain, []*x509.Certificate{ca.cert})
}

// JWT returns the JWT bundle of the CA.
func (ca *CA) JWT(t testing.TB) *jwtbundle.Bundle {
	t.Helper()
	b := jwtbundle.New(ca.TrustDomain)
	if err := b.AddJWTAuthority("k", ca.key.Public()); err != nil {
		t.Fatal(err)
	}
	return b
}

// Token returns a JWT-SVID for the path and the audience, valid for five minutes.
func (ca *CA) Token(t testing.TB, path, audience string) string {
	t.Helper()
	return ca.signed(t, jwt.Claims{
		Subject:  spiffeid.RequireFromPath(ca.TrustDomain, path).String(),
		Audience: jwt.Audience{audience},
		Expiry:   jwt.NewNumericDate(time.Now().Add(5 * time.Minute)),
		IssuedAt: jwt.NewNumericDate(time.Now()),
	}, nil)
}

// TokenWith is Token with further claims.
func (ca *CA) TokenWith(t testing.TB, path, audience string, claims map[string]any) string {
	t.Helper()
	return ca.signed(t, jwt.Claims{
		Subject:  spiffeid.RequireFromPath(ca.TrustDomain, path).String(),
		Audience: jwt.Audience{audience},
		Expiry:   jwt.NewNumericDate(time.Now().Add(5 * time.Minute)),
	}, claims)
}

func (ca *CA) signed(t testing.TB, standard jwt.Claims, more map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: ca.key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := jwt.Signed(signer).Claims(standard)
	if more != nil {
		b = b.Claims(more)
	}
	token, err := b.Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// UserIssuer is the CA as an issuer of user tokens with this iss, for the audience docs, in the header x-user-token.
func (ca *CA) UserIssuer(t testing.TB, issuer string) *policyv1.UserIssuer {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(ca.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &policyv1.UserIssuer{Name: "login", Issuer: issuer, Audience: []string{"docs"}, Header: "X-User-Token", Keys: []*policyv1.UserKey{{KeyId: "k", PublicKey: der}}}
}

// UserToken returns a token of a user who is in the groups, valid for five minutes.
func (ca *CA) UserToken(t testing.TB, issuer string, groups ...string) string {
	t.Helper()
	return ca.signed(t, jwt.Claims{Issuer: issuer, Subject: "alice", Audience: jwt.Audience{"docs"}, Expiry: jwt.NewNumericDate(time.Now().Add(5 * time.Minute))},
		map[string]any{"groups": groups})
}

// Policies compiles documents that must be sound, for the trust domain example.org.
func Policies(t testing.TB, documents string) *policy.Policies {
	t.Helper()
	docs, err := strictyaml.Split([]byte(documents), "p.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	set, err := policy.Check(docs, spiffeid.RequireTrustDomainFromString("example.org"))
	if err != nil {
		t.Fatal(err)
	}
	set.Revision = 7
	p, err := policy.Compile(set)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Fixed is a source whose policies never change.
type Fixed struct{ P *policy.Policies }

func (f Fixed) Policies() *policy.Policies { return f.P }

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
