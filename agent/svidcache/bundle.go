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
	"slices"
	"sort"
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
	digest      [sha256.Size]byte // of what callers see

	// The following are known for the own trust domain only.
	ids      []string            // X.509 authority ids and JWT key ids
	signers  map[string]struct{} // SKIs of X.509 authorities that are not tainted
	tainted  map[string]struct{} // SKIs of those that are
	reissue  time.Duration       // over which what those signed is renewed
	jwtKnown map[string]struct{} // key ids of JWT authorities that are not tainted
}

// errTooBig says that a bundle has more authorities than are taken.
var errTooBig = errors.New("too many authorities")

// readBundle checks what the CA sent. A broken authority is left out and told of (DEC-08); the rest of the bundle stands.
func readBundle(m *nodev1.Bundle) (b *bundle, skipped []error, err error) {
	td, err := spiffe.ParseTrustDomain(m.GetTrustDomain())
	if err != nil {
		return nil, nil, err
	}
	if n := max(len(m.GetX509Authorities()), len(m.GetJwtAuthorities())); n > maxBundleAuthorities {
		return nil, nil, fmt.Errorf("the bundle of %q has %d authorities of a kind, more than the %d allowed: %w", td.Name(), n, maxBundleAuthorities, errTooBig)
	}
	b = &bundle{
		trustDomain: td, revision: m.GetRevision(), jwt: make(map[string]crypto.PublicKey),
		signers: make(map[string]struct{}), tainted: make(map[string]struct{}), jwtKnown: make(map[string]struct{}),
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
	for i, a := range m.GetJwtAuthorities() {
		key, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		switch key.(type) {
		case nil, *ecdsa.PublicKey, *rsa.PublicKey:
		default:
			err = fmt.Errorf("a %T signs no JWT-SVIDs", key) // [JWT-SVID §2.1]
		}
		switch {
		case err == nil && a.GetKeyId() == "":
			err = errors.New("it has no key id")
		case err == nil && b.jwt[a.GetKeyId()] != nil:
			err = fmt.Errorf("the key id %q is already taken", a.GetKeyId()) // DEC-09
		}
		if err != nil {
			skipped = append(skipped, fmt.Errorf("JWT authority %d of %q: %w", i, td.Name(), err))
			continue
		}
		b.jwt[a.GetKeyId()] = key
		b.ids = append(b.ids, a.GetKeyId())
		if a.GetState() != nodev1.AuthorityState_AUTHORITY_STATE_TAINTED {
			b.jwtKnown[a.GetKeyId()] = struct{}{}
		}
	}
	slices.Sort(b.ids)
	b.ids = slices.Compact(b.ids)
	if err := b.seal(); err != nil {
		return nil, nil, err
	}
	return b, skipped, nil
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
	ids := make([]string, 0, len(b.jwt))
	for id := range b.jwt {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	for _, id := range ids {
		der, err := x509.MarshalPKIXPublicKey(b.jwt[id])
		if err != nil {
			return fmt.Errorf("JWT authority %q of %q: %w", id, b.trustDomain.Name(), err)
		}
		part([]byte(id))
		part(der)
	}
	h.Sum(b.digest[:0])
	return nil
}
