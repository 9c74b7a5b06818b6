// Package brokertest gives tests of the Broker API and of its client a trust domain in memory: an authority, a Source and
// an Attestor, workloads that are real processes, and pods. The endpoint, its sockets and its TLS are the real ones.
package brokertest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// An Authority signs for one trust domain.
type Authority struct {
	TD      spiffeid.TrustDomain
	Root    *x509.Certificate
	key     *ecdsa.PrivateKey
	JWTKey  *ecdsa.PrivateKey
	JWTName string
}

// NewAuthority makes the authority of a trust domain.
func NewAuthority(t testing.TB, td string) *Authority {
	t.Helper()
	a := &Authority{TD: spiffeid.RequireTrustDomainFromString(td), key: newKey(t), JWTKey: newKey(t), JWTName: "key-of-" + td}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: td}, URIs: []*url.URL{a.TD.ID().URL()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a.Root = a.sign(t, tmpl, tmpl, &a.key.PublicKey)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (a *Authority) sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// SVID issues an X509-SVID for the path that is valid for ttl.
func (a *Authority) SVID(t testing.TB, path string, ttl time.Duration) *x509svid.SVID {
	t.Helper()
	id := spiffeid.RequireFromPath(a.TD, path)
	key := newKey(t)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<60))
	if err != nil {
		t.Fatal(err)
	}
	leaf := a.sign(t, &x509.Certificate{
		SerialNumber: serial, URIs: []*url.URL{id.URL()}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}, a.Root, &key.PublicKey)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

// Identity issues an identity for the path.
func (a *Authority) Identity(t testing.TB, path string) workloadapi.Identity {
	t.Helper()
	svid := a.SVID(t, path, time.Hour)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return workloadapi.Identity{ID: svid.ID, EntryID: path, Chain: svid.Certificates[0].Raw, Key: pkcs8, NotAfter: svid.Certificates[0].NotAfter}
}

// Bundle is the X.509 bundle of the trust domain.
func (a *Authority) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.TD, []*x509.Certificate{a.Root})
}

func (a *Authority) token(sub spiffeid.ID, audience []string) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.JWTKey, KeyID: a.JWTName}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	now := time.Now()
	return jwt.Signed(signer).Claims(map[string]any{"sub": sub.String(), "aud": audience, "iat": now.Unix(), "exp": now.Add(time.Minute).Unix()}).Serialize()
}

// An Entry gives its identity to whoever has the selector.
type Entry struct {
	Selector string
	Identity workloadapi.Identity
}

// A Source keeps everything in plain maps. It is a workloadapi.Source and an Acknowledger.
type Source struct {
	Own *Authority

	mu       sync.Mutex
	changed  chan struct{} // closed at each change
	Entries  []Entry
	Bundles  map[spiffeid.TrustDomain]*Authority
	Seen     []workloadapi.Caller // whom Watch and FetchJWTSVIDs were asked about
	Watching int
}

// NewSource has a Source of own's trust domain.
func NewSource(own *Authority, entries ...Entry) *Source {
	return &Source{Own: own, changed: make(chan struct{}), Entries: entries, Bundles: map[spiffeid.TrustDomain]*Authority{own.TD: own}}
}

// Change makes a change of the exported fields that all watchers see as one.
func (s *Source) Change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// Look reads the exported fields.
func (s *Source) Look(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *Source) state(c workloadapi.Caller) (workloadapi.Update, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := workloadapi.Update{TrustDomain: s.Own.TD, X509Bundles: map[spiffeid.TrustDomain][]byte{}, JWTBundles: map[spiffeid.TrustDomain]map[string]crypto.PublicKey{}}
	for td, a := range s.Bundles {
		u.X509Bundles[td] = a.Root.Raw
		u.JWTBundles[td] = map[string]crypto.PublicKey{a.JWTName: &a.JWTKey.PublicKey}
	}
	for _, e := range s.Entries {
		for _, have := range c.Selectors {
			if have.String() == e.Selector {
				u.Entitled = true
				u.Identities = append(u.Identities, e.Identity)
			}
		}
	}
	return u, s.changed
}

// Watch is workloadapi.Source's.
func (s *Source) Watch(ctx context.Context, c workloadapi.Caller) (<-chan workloadapi.Update, error) {
	u, changed := s.state(c)
	s.Look(func() { s.Watching++; s.Seen = append(s.Seen, c) })
	updates := make(chan workloadapi.Update)
	go func() {
		defer close(updates)
		defer s.Look(func() { s.Watching-- })
		out := updates
		for {
			select {
			case out <- u:
				out = nil // the reader has the newest
			case <-changed:
				u, changed = s.state(c)
				out = updates
			case <-ctx.Done():
				return
			}
		}
	}()
	return updates, nil
}

// FetchJWTSVIDs is workloadapi.Source's.
func (s *Source) FetchJWTSVIDs(_ context.Context, c workloadapi.Caller, id spiffeid.ID, audience []string) ([]workloadapi.JWTSVID, error) {
	u, _ := s.state(c)
	s.Look(func() { s.Seen = append(s.Seen, c) })
	var svids []workloadapi.JWTSVID
	for _, i := range u.Identities {
		if !id.IsZero() && i.ID != id {
			continue
		}
		token, err := s.Own.token(i.ID, audience)
		if err != nil {
			return nil, err
		}
		svids = append(svids, workloadapi.JWTSVID{ID: i.ID, Token: token, Hint: i.Hint, Privileged: i.Privileged})
	}
	if len(svids) == 0 {
		return nil, workloadapi.ErrNoIdentity
	}
	return svids, nil
}

// ByPID attests a process by its id and its effective user: "test:pid:N" and "test:uid:N".
type ByPID struct{}

// Attest is workloadapi.Attestor's.
func (ByPID) Attest(_ context.Context, p *peer.Process) (workloadapi.Caller, error) {
	s, err := p.Snapshot()
	if err != nil {
		return workloadapi.Caller{}, err
	}
	return workloadapi.Caller{PID: p.PID, UID: s.EffectiveUID, GID: s.EffectiveGID, State: s, Selectors: []spiffe.Selector{
		{Type: "test", Value: fmt.Sprintf("pid:%d", p.PID)}, {Type: "test", Value: fmt.Sprintf("uid:%d", s.EffectiveUID)},
		{Type: "test", Value: fmt.Sprintf("inode:%d", s.Executable.Inode)},
	}}, nil
}
