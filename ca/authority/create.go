package authority

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// maxCommonNameBytes is ub-common-name of RFC 5280 appendix A.1.
const maxCommonNameBytes = 64

// A creation is a new authority whose key exists and whose record is not in the store yet. Whoever asked for it commits
// checks and writes together with what the new authority changes (the index at least). If that commit never happens, the
// key is not lost: a key in this process is forgotten, and one in a key store is found again by the intent that was
// committed before it was made, and used for the next authority of that kind.
type creation struct {
	id     string
	checks []store.Check
	writes []store.Write
}

// create makes an authority of the given use with a new key. The certificate of an X.509 authority is signed by the
// upstream CA if there is one, else by itself.
func (s *Set) create(ctx context.Context, use keys.Use, generation uint64, state State) (creation, error) {
	made, err := s.makeKey(ctx, use, generation)
	if err != nil {
		return creation{}, err
	}
	switch use {
	case keys.UseJWT:
		return s.recordJWT(made, state, s.config.JWTLifetime)
	case keys.UseWIT:
		return s.recordJWT(made, state, s.config.WIT.Lifetime)
	}
	if s.config.Upstream != nil {
		cert, above, err := s.mint(ctx, made.key)
		if err != nil {
			return creation{}, err
		}
		return s.recordX509(made, state, cert.Raw, above)
	}
	der, err := selfSign(made.key, s.config.TrustDomain, s.config.Now(), s.config.X509Lifetime)
	if err != nil {
		return creation{}, err
	}
	return s.recordX509(made, state, der, nil)
}

// A madeKey is a key that was made for the authority of one generation and belongs to no record yet.
type madeKey struct {
	key        *keys.Key
	use        keys.Use
	generation uint64

	// checks and writes are committed with the record of the authority.
	checks []store.Check
	writes []store.Write
}

// stored returns the key in the form in which a record holds it.
func (s *Set) stored(made madeKey, id string) (keys.Stored, error) {
	return made.key.Seal(s.config.Seal, keys.Binding{TrustDomain: s.config.TrustDomain, Use: made.use, AuthorityID: id, Generation: made.generation})
}

// recorded returns what to commit for the record of a new authority, which must not be there yet.
func (made madeKey) recorded(prefix, id string, record any) (creation, error) {
	value, err := json.Marshal(record)
	if err != nil {
		return creation{}, err
	}
	key := prefix + id
	return creation{
		id:     id,
		checks: append([]store.Check{{Key: key}}, made.checks...),
		writes: append([]store.Write{{Key: key, Value: value}}, made.writes...),
	}, nil
}

// recordX509 returns the X.509 authority of a new key and its certificate, which it checks with the path above it.
func (s *Set) recordX509(made madeKey, state State, der []byte, above x509Path) (creation, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return creation{}, fmt.Errorf("reading back the new x509 authority: %w", err)
	}
	if err := checkAuthorityCertificate(cert, above, s.config.TrustDomain); err != nil {
		return creation{}, fmt.Errorf("reading back the new x509 authority: %w", err)
	}
	if public, ok := made.key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(cert.PublicKey) {
		return creation{}, errors.New("the certificate of the new x509 authority is for another key")
	}
	id := hex.EncodeToString(cert.SubjectKeyId)
	stored, err := s.stored(made, id)
	if err != nil {
		return creation{}, err
	}
	r := x509Record{Version: recordVersion, ID: id, Generation: made.generation, State: state, Certificate: der, Key: stored,
		Cross: s.crossSign(cert), life: s.born(made.use, state)}
	for _, c := range above {
		r.Version, r.Above = chainedVersion, append(r.Above, c.Raw)
	}
	return made.recorded(keyX509Prefix, id, r)
}

// born is the life of an authority that is made now, in its first state.
func (s *Set) born(kind Kind, state State) life {
	l := life{PreparedAt: s.config.Now().UTC().Truncate(time.Second)}
	if state == StateActive {
		l.ActivatedAt, l.LongestTTL = l.PreparedAt, seconds(s.LongestTTL(kind))
	}
	return l
}

// recordJWT returns the JWT or WIT authority of a new key.
func (s *Set) recordJWT(made madeKey, state State, lifetime time.Duration) (creation, error) {
	spki, err := x509.MarshalPKIXPublicKey(made.key.Public())
	if err != nil {
		return creation{}, fmt.Errorf("encoding the new %s authority: %w", made.use, err)
	}
	id := jwtKeyID(spki)
	stored, err := s.stored(made, id)
	if err != nil {
		return creation{}, err
	}
	now := s.config.Now().UTC().Truncate(time.Second)
	return made.recorded(tokenPrefix(made.use), id, jwtRecord{
		Version: recordVersion, ID: id, Generation: made.generation, State: state,
		NotBefore: now.Add(-Backdate), NotAfter: now.Add(lifetime), PublicKey: spki, Key: stored, life: s.born(made.use, state),
	})
}

// makeFirst makes the first authorities and commits them together with the index, provided that there is no index yet. A
// crash leaves all of it or nothing, and of two replicas one wins. Losing is no error: the caller lists again.
func (s *Set) makeFirst(ctx context.Context) error {
	const first = 1
	x, err := s.create(ctx, keys.UseX509, first, StateActive)
	if err != nil {
		return err
	}
	j, err := s.create(ctx, keys.UseJWT, first, StateActive)
	if err != nil {
		return err
	}
	index, err := json.Marshal(indexRecord{Version: recordVersion, TrustDomain: s.config.TrustDomain.Name(), X509Generation: first, JWTGeneration: first})
	if err != nil {
		return err
	}
	checks := slices.Concat([]store.Check{{Key: keyIndex}}, x.checks, j.checks)
	writes := slices.Concat([]store.Write{{Key: keyIndex, Value: index}}, x.writes, j.writes)
	_, err = s.config.Store.Commit(ctx, checks, writes)
	var conflict *store.ConflictError
	switch {
	case errors.As(err, &conflict):
		return nil
	case err != nil:
		return fmt.Errorf("writing the first authorities to the store: %w", err)
	}
	s.config.Log.Info("made the first authorities", "trust_domain", s.config.TrustDomain.Name(), "x509_authority", x.id, "jwt_authority", j.id)
	return nil
}

// selfSign returns the certificate of an X.509 authority: an SVID of the trust domain itself (no path), with keyCertSign and
// cRLSign and no other key usage, no extended key usage, no name constraints and no path length. [X509-SVID §3, §4]
func selfSign(key *keys.Key, td spiffeid.TrustDomain, now time.Time, lifetime time.Duration) ([]byte, error) {
	spki, ski, err := encodePublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encoding the new x509 authority: %w", err)
	}
	if _, err := ParsePublicKey(spki); err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber:          serialNumber(newSerial()),
		Subject:               pkix.Name{Organization: []string{"signet"}, CommonName: commonName(td)},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          ski[:],
		// Built by hand: a parser could add a slash, and the ID of a signing certificate has no path. [X509-18]
		URIs: []*url.URL{{Scheme: "spiffe", Host: td.Name()}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("signing the new x509 authority: %w", err)
	}
	return der, nil
}

// commonName is for people who look at a certificate; nothing reads it.
func commonName(td spiffeid.TrustDomain) string {
	const suffix = " X.509 authority"
	name := td.Name()
	if len(name)+len(suffix) > maxCommonNameBytes {
		name = name[:maxCommonNameBytes-len(suffix)-3] + "..."
	}
	return name + suffix
}
