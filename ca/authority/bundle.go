package authority

import (
	"cmp"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Bundle is what the trust domain publishes: its authorities in every state but revoked, oldest first.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	X509        []X509Authority
	JWT         []JWTAuthority
	WIT         []JWTAuthority // none unless WIT-SVIDs are enabled [WIT-52]

	// Sequence rises with each change of the content. It is the store's revision of the newest authority record.
	Sequence uint64

	// RefreshHint is how often consumers should fetch the bundle.
	RefreshHint time.Duration
}

// An X509Authority is a published X.509 authority.
type X509Authority struct {
	// ID is the subject key id of the certificate, in lower-case hexadecimal.
	ID          string
	Certificate *x509.Certificate
	State       State
	// Upstream tells that it is a root of the upstream CA, not a certificate of our own.
	Upstream bool
	// Appended: its key is not this CA's. See Appended.
	Appended bool
}

// A JWTAuthority is a published JWT authority.
type JWTAuthority struct {
	// KeyID is the kid of the tokens that it signs.
	KeyID     string
	PublicKey crypto.PublicKey
	// ExpiresAt is zero for an appended authority of which it is not known.
	ExpiresAt time.Time
	State     State
	// Origin is empty for an authority of this CA, "upstream" for one of the upstream CA, and the SPIFFE ID of the
	// downstream CA that published it otherwise.
	Origin   string
	Appended bool
}

// Bundle returns the bundle as of the newest record that the Set was shown. The slices are the caller's own; the certificates
// and keys in them are shared and must not be changed.
func (s *Set) Bundle() Bundle {
	b := s.current.Load().bundle
	b.X509, b.JWT, b.WIT = slices.Clone(b.X509), slices.Clone(b.JWT), slices.Clone(b.WIT)
	return b
}

// SPIFFE returns the bundle as a new go-spiffe value, for marshaling and for verifying. Only public members are in it.
// [SPIFFE Trust Domain and Bundle §4]
func (b Bundle) SPIFFE() *spiffebundle.Bundle {
	out := spiffebundle.New(b.TrustDomain)
	for _, a := range b.X509 {
		out.AddX509Authority(a.Certificate)
	}
	for _, a := range b.JWT {
		// The only error is an empty key id, and records with one are refused.
		_ = out.AddJWTAuthority(a.KeyID, a.PublicKey)
	}
	for _, a := range b.WIT {
		_ = out.AddWITAuthority(a.KeyID, a.PublicKey)
	}
	out.SetSequenceNumber(b.Sequence)
	out.SetRefreshHint(b.RefreshHint)
	return out
}

// GetX509BundleForTrustDomain returns the X.509 authorities of the Set's own trust domain, and an error for any other. It
// makes the Set an x509bundle.Source.
func (s *Set) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != s.config.TrustDomain {
		return nil, fmt.Errorf("no X.509 bundle for trust domain %q", td.Name())
	}
	return s.current.Load().bundle.SPIFFE().X509Bundle(), nil
}

// Trusts tells whether a chain, as it was verified earlier, still leads from an SVID to an authority in the bundle, and
// through none that was revoked.
func (s *Set) Trusts(chain []*x509.Certificate) bool {
	n := s.current.Load()
	for _, cert := range chain[1:] {
		if a := n.x509[hex.EncodeToString(cert.SubjectKeyId)]; a != nil && a.state == StateRevoked {
			return false
		}
	}
	return slices.ContainsFunc(n.bundle.X509, func(a X509Authority) bool { return a.Certificate.Equal(chain[len(chain)-1]) })
}

// KnownX509 returns the X.509 authorities of the bundle and those that were revoked: not to trust what they signed, but to
// tell its holder what became of it.
func (s *Set) KnownX509() *x509bundle.Bundle {
	n := s.current.Load()
	b := x509bundle.New(s.config.TrustDomain)
	for _, a := range n.bundle.X509 {
		b.AddX509Authority(a.Certificate)
	}
	for _, a := range n.x509 {
		b.AddX509Authority(a.root())
	}
	return b
}

// GetJWTBundleForTrustDomain returns the JWT authorities of the Set's own trust domain, and an error for any other. It makes
// the Set a jwtbundle.Source.
func (s *Set) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	if td != s.config.TrustDomain {
		return nil, fmt.Errorf("no JWT bundle for trust domain %q", td.Name())
	}
	return s.current.Load().bundle.SPIFFE().JWTBundle(), nil
}

// Pin returns the SHA-256 of the active X.509 authority's SubjectPublicKeyInfo in lower-case hexadecimal, by which an agent
// recognises the CA on its first connection. Below an upstream CA it is that of the root, which outlives many
// intermediates; the CA sends the whole chain in its handshakes. It is empty if no authority is active.
func (s *Set) Pin() string {
	a := s.current.Load().activeX509
	if a == nil {
		return ""
	}
	return pin(a.root())
}

// Pins returns the pins of all published X.509 authorities of this CA, in the order of the bundle.
func (s *Set) Pins() []string {
	var pins []string
	for _, a := range s.current.Load().bundle.X509 {
		if !a.Appended {
			pins = append(pins, pin(a.Certificate))
		}
	}
	return pins
}

func pin(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

func (n *snapshot) makeBundle(c Config) Bundle {
	b := Bundle{TrustDomain: c.TrustDomain, Sequence: uint64(n.revision), RefreshHint: c.RefreshHint}
	b.X509 = n.roots()
	for _, a := range slices.SortedFunc(maps.Values(n.jwt), func(a, b *jwtAuthority) int {
		return cmp.Or(cmp.Compare(a.generation, b.generation), cmp.Compare(a.id, b.id))
	}) {
		if a.state.published() {
			b.JWT = append(b.JWT, JWTAuthority{KeyID: a.id, PublicKey: a.public, ExpiresAt: a.expiresAt, State: a.state})
		}
	}
	b.JWT = n.foreignJWT(b.JWT)
	n.addAppended(&b)
	if n.index.WITPublished {
		n.addWIT(&b)
	}
	return b
}
