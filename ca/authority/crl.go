package authority

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/signet-id/signet/ca/keys"
)

// CRLIssuers returns the ids of the X.509 authorities for which CRLs are due at now: those that sign, are about to, or signed
// what is still valid.
func (s *Set) CRLIssuers(now time.Time) []string {
	var out []string
	for _, a := range s.current.Load().x509 {
		if _, end := a.validity(); a.state != StateRevoked && now.Before(end) {
			out = append(out, a.id)
		}
	}
	slices.SortFunc(out, strings.Compare)
	return out
}

// SignCRL signs the list of revoked X509-SVIDs of one authority with its own key, also of one that signs SVIDs no more, whose
// key is opened for this alone. The number must be greater than that of every list before. [RFC 5280 §5]
func (s *Set) SignCRL(ctx context.Context, id string, number *big.Int, entries []x509.RevocationListEntry, thisUpdate, nextUpdate time.Time) ([]byte, error) {
	if err := s.stopped.Load(); err != nil {
		return nil, *err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	a := s.current.Load().x509[id]
	if a == nil || a.state == StateRevoked {
		return nil, fmt.Errorf("x509 authority %s: %w", id, ErrUnknownAuthority)
	}
	var signer crypto.Signer
	if a.key != nil {
		signer = a.key
	} else {
		item, err := s.config.Store.Get(ctx, keyX509Prefix+id)
		if err != nil {
			return nil, fmt.Errorf("x509 authority %s: %w", id, err)
		}
		r, cert, _, err := decodeX509(item, s.config.TrustDomain)
		if err != nil {
			return nil, err
		}
		key, err := s.openKey(r.Key, keys.Binding{TrustDomain: s.config.TrustDomain, Use: keys.UseX509, AuthorityID: r.ID, Generation: r.Generation}, cert.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("the key of x509 authority %s, for its CRL: %w", id, err)
		}
		signer = key
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: number, ThisUpdate: thisUpdate, NextUpdate: nextUpdate, RevokedCertificateEntries: entries}, a.certificate, signer)
	if err != nil {
		return nil, fmt.Errorf("signing the CRL of x509 authority %s: %w", id, err)
	}
	return der, nil
}
