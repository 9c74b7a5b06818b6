package svidcache

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
)

// maxBundleAuthorities bounds the authorities of each kind in one bundle.
const maxBundleAuthorities = 1000

// A bundle is one trust domain's, ready to be handed out. It never changes.
type bundle struct {
	trustDomain spiffeid.TrustDomain
	revision    int64
	x509        []*x509.Certificate
	x509DER     []byte // concatenated
	jwt         map[string]crypto.PublicKey
	wit         map[string]crypto.PublicKey
	digest      [sha256.Size]byte // of what callers see

	// The following are known for the own trust domain only.
	ids      []string            // X.509 authority ids, JWT and WIT key ids
	signers  map[string]struct{} // SKIs of X.509 authorities that are not tainted
	tainted  map[string]struct{} // SKIs of those that are
	reissue  time.Duration       // over which what those signed is renewed
	jwtKnown map[string]struct{} // key ids of JWT authorities that are not tainted
	witKnown map[string]struct{} // the same of WIT authorities
}

// errTooBig says that a bundle has more authorities than are taken.
var errTooBig = errors.New("too many authorities")

// readBundle checks what the CA sent. A broken authority is left out and told of (DEC-08); the rest of the bundle stands.
func readBundle(m *nodev1.Bundle) (b *bundle, skipped []error, err error) {
	td, err := spiffe.ParseTrustDomain(m.GetTrustDomain())
	if err != nil {
		return nil, nil, err
	}
	if n := max(len(m.GetX509Authorities()), len(m.GetJwtAuthorities()), len(m.GetWitAuthorities())); n > maxBundleAuthorities {
		return nil, nil, fmt.Errorf("the bundle of %q has %d authorities of a kind, more than the %d allowed: %w", td.Name(), n, maxBundleAuthorities, errTooBig)
	}
	b = &bundle{
		trustDomain: td, revision: m.GetRevision(), signers: make(map[string]struct{}), tainted: make(map[string]struct{}),
		reissue: time.Duration(min(max(m.GetReissueSeconds(), 0), int64(maxWave/time.Second))) * time.Second,
	}
	for i, a := range m.GetX509Authorities() {
		cert, err := x509.ParseCertificate(a.GetCertificate())
		if err == nil && !cert.IsCA {
			err = errors.New("it is not a CA certificate")
		}
		if err != nil {
			skipped = append(skipped, fmt.Errorf("X.509 authority %d of %q: %w", i, td.Name(), err))
			continue
		}
		b.x509 = append(b.x509, cert)
		if id := a.GetAuthorityId(); id != "" {
			b.ids = append(b.ids, id)
		}
		if a.GetState() != nodev1.AuthorityState_AUTHORITY_STATE_TAINTED {
			b.signers[string(cert.SubjectKeyId)] = struct{}{}
		} else {
			b.tainted[string(cert.SubjectKeyId)] = struct{}{}
		}
	}
	b.jwt, b.jwtKnown = b.takeKeys("JWT", m.GetJwtAuthorities(), nil, &skipped)
	b.wit, b.witKnown = b.takeKeys("WIT", m.GetWitAuthorities(), b.jwt, &skipped)
	slices.Sort(b.ids)
	b.ids = slices.Compact(b.ids)
	if err := b.seal(); err != nil {
		return nil, nil, err
	}
	return b, skipped, nil
}

// takeKeys reads the keys that verify tokens of one kind, and which of them are not tainted. A key id that another kind has
// is not taken (WIT-03).
func (b *bundle) takeKeys(kind string, all []*nodev1.JWTAuthority, others map[string]crypto.PublicKey, skipped *[]error) (keys map[string]crypto.PublicKey, known map[string]struct{}) {
	keys, known = make(map[string]crypto.PublicKey, len(all)), make(map[string]struct{}, len(all))
	for i, a := range all {
		key, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		switch key.(type) {
		case nil, *ecdsa.PublicKey, *rsa.PublicKey:
		default:
			err = fmt.Errorf("a %T signs no %s-SVIDs", key, kind) // [JWT-SVID §2.1]
		}
		switch {
		case err == nil && a.GetKeyId() == "":
			err = errors.New("it has no key id")
		case err == nil && (keys[a.GetKeyId()] != nil || others[a.GetKeyId()] != nil):
			err = fmt.Errorf("the key id %q is already taken", a.GetKeyId()) // DEC-09
		}
		if err != nil {
			*skipped = append(*skipped, fmt.Errorf("%s authority %d of %q: %w", kind, i, b.trustDomain.Name(), err))
			continue
		}
		keys[a.GetKeyId()] = key
		b.ids = append(b.ids, a.GetKeyId())
		if a.GetState() != nodev1.AuthorityState_AUTHORITY_STATE_TAINTED {
			known[a.GetKeyId()] = struct{}{}
		}
	}
	return keys, known
}

// seal computes the forms that are handed out. The order of X.509 authorities is that of the CA.
func (b *bundle) seal() error {
	h := sha256.New()
	part := func(p []byte) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	for _, c := range b.x509 {
		b.x509DER = append(b.x509DER, c.Raw...)
	}
	part(b.x509DER)
	for _, keys := range []map[string]crypto.PublicKey{b.jwt, b.wit} {
		for _, id := range slices.Sorted(maps.Keys(keys)) {
			der, err := x509.MarshalPKIXPublicKey(keys[id])
			if err != nil {
				return fmt.Errorf("authority %q of %q: %w", id, b.trustDomain.Name(), err)
			}
			part([]byte(id))
			part(der)
		}
		part(nil)
	}
	h.Sum(b.digest[:0])
	return nil
}
