package authority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
)

// Defaults and limits of downstream CAs.
const (
	// DefaultDownstreamTTL is the validity of a downstream CA's certificate if none was asked for.
	DefaultDownstreamTTL = 24 * time.Hour

	// DefaultMaxDownstreamTTL is the longest validity that a downstream CA gets. Its certificate cannot be revoked without
	// revoking the authority that signed it.
	DefaultMaxDownstreamTTL = 3 * 24 * time.Hour

	// MaxDownstreamJWTKeys is the most JWT keys that one downstream CA may have in the bundle at a time: the one that signs,
	// the next one, and some that expire.
	MaxDownstreamJWTKeys = 16

	// maxForeignKeys is the most JWT keys that all downstream CAs may have there. Everybody in the trust domain holds them.
	maxForeignKeys = 256

	// maxForeignKeyLife bounds how long a JWT key of a downstream CA stays: a year, as for an own X.509 authority.
	maxForeignKeyLife = 366 * 24 * time.Hour
)

// ErrTooManyKeys is returned when a downstream CA, or all together, have as many JWT keys in the bundle as they may.
var ErrTooManyKeys = errors.New("the bundle holds as many JWT keys of downstream CAs as it may")

// DownstreamRequest says which CA below this one gets a certificate.
type DownstreamRequest struct {
	// PublicKey is the downstream CA's, from CheckCSR.
	PublicKey crypto.PublicKey

	// TTL is the validity asked for. Zero means DefaultDownstreamTTL. More than MaxTTL, or than the own authority has left,
	// is cut.
	TTL, MaxTTL time.Duration

	// Depth is how many levels of CAs may be below this one, at least 1: with 1 the downstream CA may sign SVIDs and no CAs.
	Depth int
}

// DownstreamCA is the certificate of a downstream CA.
type DownstreamCA struct {
	// Chain is its certificate and the intermediates above it, without the root, each in DER.
	Chain        [][]byte
	SerialNumber string // decimal
	NotAfter     time.Time
	AuthorityID  string // of the X.509 authority that signed
	PathLen      int
}

// SignDownstream signs the certificate of a downstream CA of the same trust domain. Its profile is fixed: the ID of the
// trust domain, keyCertSign and cRLSign, no extended key usage, and a path length that leaves it no more CAs below it
// than Depth says. It never outlives the CAs above it. [X509-18, X509-20, X509-21, X509-24]
//
// The caller of the CA's API can sign any SVID of the trust domain with it: whether it may is decided before.
func (s *Set) SignDownstream(ctx context.Context, r DownstreamRequest) (*DownstreamCA, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	now := s.config.Now()
	a, err := s.activeX509(now)
	if err != nil {
		return nil, err
	}
	if r.TTL < 0 {
		return nil, fmt.Errorf("downstream CA %w: ttl %v is negative", ErrRefused, r.TTL)
	}
	if err := checkKeyStrength(r.PublicKey); err != nil {
		return nil, err
	}
	pathLen, err := a.pathLenBelow(r.Depth)
	if err != nil {
		return nil, fmt.Errorf("downstream CA %w: %w", ErrRefused, err)
	}
	if key, ok := r.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); ok && s.ownKey(key.Equal) {
		return nil, fmt.Errorf("downstream CA %w: the key is that of an authority of this CA", ErrRefused)
	}
	spki, ski, err := encodePublicKey(r.PublicKey)
	if err != nil {
		return nil, err
	}
	if _, err := ParsePublicKey(spki); err != nil {
		return nil, err
	}
	ttl := r.TTL
	if ttl == 0 {
		ttl = DefaultDownstreamTTL
	}
	if most := positive(r.MaxTTL, DefaultMaxDownstreamTTL); ttl > most {
		ttl = most
	}
	notBefore, notAfter := validity(now, ttl, a)
	template := &x509.Certificate{
		SerialNumber:          serialNumber(newSerial()),
		Subject:               pkix.Name{Organization: []string{"signet"}, CommonName: commonName(s.config.TrustDomain), SerialNumber: fmt.Sprintf("%x", ski[:8])},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            pathLen,
		MaxPathLenZero:        pathLen == 0,
		SubjectKeyId:          ski[:],
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: s.config.TrustDomain.Name()}}, // no path: X509-18
	}
	if err := s.noteReach(ctx, a, now, notAfter); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, r.PublicKey, a.key) // verifies its own signature
	if err != nil {
		return nil, fmt.Errorf("signing the certificate of a downstream CA: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err == nil {
		err = checkIntermediate(cert, append([]*x509.Certificate{a.certificate}, a.above...), s.config.TrustDomain)
	}
	if err != nil {
		return nil, fmt.Errorf("self-check of a downstream CA's certificate, signed by authority %s: %w", a.id, err)
	}
	out := &DownstreamCA{Chain: [][]byte{der}, SerialNumber: cert.SerialNumber.String(), NotAfter: cert.NotAfter, AuthorityID: a.id, PathLen: pathLen}
	for _, c := range a.intermediates() {
		out.Chain = append(out.Chain, c.Raw)
	}
	return out, nil
}

// pathLenBelow returns the path length of a CA that a signs: as many CAs below it as depth leaves, and no more than every
// CA above allows.
func (a *x509Authority) pathLenBelow(depth int) (int, error) {
	left := max(depth, 1) - 1
	for i, c := range append([]*x509.Certificate{a.certificate}, a.above...) {
		if c.MaxPathLen < 0 {
			continue
		}
		allowed := c.MaxPathLen - i - 1 // CAs below the new one
		if allowed < 0 {
			return 0, fmt.Errorf("pathLenConstraint %d of %q leaves no room for a CA below this one", c.MaxPathLen, clipName(c))
		}
		left = min(left, allowed)
	}
	return left, nil
}

// ownKey tells whether a key is that of an X.509 or JWT authority of this CA, in any state.
func (s *Set) ownKey(equal func(crypto.PublicKey) bool) bool {
	n := s.current.Load()
	for _, a := range n.x509 {
		if equal(a.certificate.PublicKey) {
			return true
		}
	}
	for _, a := range n.jwt {
		if equal(a.public) {
			return true
		}
	}
	return false
}

// OwnIssuer tells whether an issuer's certificate has the key of an X.509 authority of this CA, in whatever state: who comes
// with an SVID of a revoked one is told so by Trusts. What else verifies against the bundle was signed by an upstream or
// downstream CA.
func (s *Set) OwnIssuer(cert *x509.Certificate) bool {
	for _, a := range s.current.Load().x509 {
		if bytes.Equal(a.certificate.RawSubjectPublicKeyInfo, cert.RawSubjectPublicKeyInfo) {
			return true
		}
	}
	return false
}

// PublishJWTKey puts a JWT key of the downstream CA with the given ID into the bundle, until it expires. It is refused if
// its id or key is that of another CA, so that no CA can pose as another one. A key that is there already stays as it is.
func (s *Set) PublishJWTKey(ctx context.Context, downstream spiffeid.ID, key ForeignJWTKey) (changed bool, err error) {
	public, err := key.check()
	if err != nil {
		return false, err
	}
	refused := func(format string, args ...any) (string, error) {
		return "", fmt.Errorf("jwt key %w: "+format, append([]any{ErrRefused}, args...)...)
	}
	now := s.config.Now()
	if !now.Before(key.ExpiresAt) || key.ExpiresAt.Sub(now) > maxForeignKeyLife {
		_, err := refused("%q expires at %s; it must be in the future, and within %v", key.KeyID, key.ExpiresAt.UTC().Format(time.RFC3339), maxForeignKeyLife)
		return false, err
	}
	if equal, ok := public.(interface{ Equal(crypto.PublicKey) bool }); !ok || s.ownKey(equal.Equal) {
		_, err := refused("%q is the key of an authority of this CA", key.KeyID)
		return false, err
	}
	step, err := s.change(ctx, KindJWT, func(e *edit) (string, error) {
		if e.records[key.KeyID] != nil {
			return refused("key id %q is that of an authority of this CA", key.KeyID)
		}
		if slices.ContainsFunc(e.upstream.Keys, func(k keyRecord) bool { return k.KeyID == key.KeyID }) {
			return refused("key id %q is that of an authority of the upstream CA", key.KeyID)
		}
		for _, a := range e.appended { // an appended authority gives way to what is in the bundle otherwise
			switch same := equalKeys(public, a.PublicKey); {
			case a.ID == key.KeyID && !same:
				return refused("key id %q is that of an appended authority", key.KeyID)
			case a.ID != key.KeyID && same:
				return refused("the key of %q is that of an appended authority with another id", key.KeyID)
			}
		}
		own := 0
		for _, k := range e.foreign {
			if k.record.Origin == downstream.String() {
				own++
			}
			same := bytes.Equal(k.record.PublicKey, key.PublicKey)
			switch {
			case k.record.KeyID == key.KeyID && same && k.record.Origin == downstream.String():
				return "", nil
			case k.record.KeyID == key.KeyID:
				return refused("key id %q is published already, with another key or by another CA", key.KeyID)
			case same:
				return refused("the key of %q is published already under another id", key.KeyID)
			}
		}
		switch {
		case own >= MaxDownstreamJWTKeys:
			return "", fmt.Errorf("%s has %d: %w", downstream, own, ErrTooManyKeys)
		case len(e.foreign) >= maxForeignKeys:
			return "", fmt.Errorf("all together have %d: %w", len(e.foreign), ErrTooManyKeys)
		}
		value, err := (keyRecord{KeyID: key.KeyID, PublicKey: key.PublicKey, ExpiresAt: key.ExpiresAt.UTC(), Origin: downstream.String()}).encode()
		if err != nil {
			return "", err
		}
		at := foreignRecordKey(key.KeyID)
		e.checks = append(e.checks, store.Check{Key: at})
		e.writes = append(e.writes, store.Write{Key: at, Value: value})
		return "", nil
	})
	return step.Changed, err
}

// RemoveJWTKey takes a JWT key that a downstream CA has published out of the bundle: no token signed with it is good any
// more. It returns whose it was. An id that no downstream CA has published gives ErrUnknownAuthority.
func (s *Set) RemoveJWTKey(ctx context.Context, kid string) (downstream string, err error) {
	_, err = s.change(ctx, KindJWT, func(e *edit) (string, error) {
		at := foreignRecordKey(kid)
		k, ok := e.foreign[at]
		if !ok {
			return "", fmt.Errorf("jwt authority %.64q: %w", kid, ErrUnknownAuthority)
		}
		downstream = k.record.Origin
		e.checks = append(e.checks, store.Check{Key: at, Modified: k.modified})
		e.writes = append(e.writes, store.Write{Key: at, Delete: true})
		return "", nil
	})
	return downstream, err
}
