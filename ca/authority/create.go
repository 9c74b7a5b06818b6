package authority

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// maxCommonNameBytes is ub-common-name of RFC 5280 appendix A.1.
const maxCommonNameBytes = 64

// makeFirst makes the first authorities and commits them together with the index, provided that there is no index yet. A
// crash leaves all of it or nothing, and of two replicas one wins. Losing is no error: the caller lists again.
func (s *Set) makeFirst(ctx context.Context) error {
	const first = 1
	x, err := s.newX509(ctx, first, StateActive)
	if err != nil {
		return err
	}
	j, err := s.newJWT(ctx, first, StateActive)
	if err != nil {
		return err
	}
	index, err := json.Marshal(indexRecord{Version: recordVersion, TrustDomain: s.config.TrustDomain.Name(), X509Generation: first, JWTGeneration: first})
	if err != nil {
		return err
	}
	writes := []store.Write{{Key: keyIndex, Value: index}, x, j}
	var checks []store.Check
	for _, w := range writes {
		checks = append(checks, store.Check{Key: w.Key})
	}
	_, err = s.config.Store.Commit(ctx, checks, writes)
	var conflict *store.ConflictError
	switch {
	case errors.As(err, &conflict):
		return nil
	case err != nil:
		return fmt.Errorf("writing the first authorities to the store: %w", err)
	}
	s.config.Log.Info("made the first authorities", "trust_domain", s.config.TrustDomain.Name(), "x509_authority", x.Key, "jwt_authority", j.Key)
	return nil
}

// newX509 makes a key and a self-signed certificate, and returns the record to be written.
func (s *Set) newX509(ctx context.Context, generation uint64, state State) (store.Write, error) {
	key, err := keys.Generate(ctx)
	if err != nil {
		return store.Write{}, err
	}
	der, err := selfSign(key, s.config.TrustDomain, s.config.Now(), s.config.X509Lifetime)
	if err != nil {
		return store.Write{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return store.Write{}, fmt.Errorf("reading back the new x509 authority: %w", err)
	}
	if err := checkAuthorityCertificate(cert, s.config.TrustDomain); err != nil {
		return store.Write{}, fmt.Errorf("reading back the new x509 authority: %w", err)
	}
	id := hex.EncodeToString(cert.SubjectKeyId)
	stored, err := key.Seal(s.config.Seal, keys.Binding{TrustDomain: s.config.TrustDomain, Use: keys.UseX509, AuthorityID: id, Generation: generation})
	if err != nil {
		return store.Write{}, err
	}
	value, err := json.Marshal(x509Record{Version: recordVersion, ID: id, Generation: generation, State: state, Certificate: der, Key: stored})
	return store.Write{Key: keyX509Prefix + id, Value: value}, err
}

// newJWT makes a key, and returns the record to be written.
func (s *Set) newJWT(ctx context.Context, generation uint64, state State) (store.Write, error) {
	key, err := keys.Generate(ctx)
	if err != nil {
		return store.Write{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return store.Write{}, fmt.Errorf("encoding the new jwt authority: %w", err)
	}
	id := jwtKeyID(spki)
	stored, err := key.Seal(s.config.Seal, keys.Binding{TrustDomain: s.config.TrustDomain, Use: keys.UseJWT, AuthorityID: id, Generation: generation})
	if err != nil {
		return store.Write{}, err
	}
	now := s.config.Now().UTC().Truncate(time.Second)
	value, err := json.Marshal(jwtRecord{
		Version: recordVersion, ID: id, Generation: generation, State: state,
		NotBefore: now.Add(-Backdate), NotAfter: now.Add(s.config.JWTLifetime), PublicKey: spki, Key: stored,
	})
	return store.Write{Key: keyJWTPrefix + id, Value: value}, err
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
