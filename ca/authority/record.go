package authority

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// Where the records are in the store. The index is written with every change of any record, so that changes by two
// replicas meet in its check, and there is only one first set.
const (
	keyPrefix     = "authority/"
	keyIndex      = keyPrefix + "index"
	keyX509Prefix = keyPrefix + "x509/"
	keyJWTPrefix  = keyPrefix + "jwt/"
	keyWITPrefix  = keyPrefix + "wit/"

	keyUpstream      = keyPrefix + "upstream"
	keyForeignPrefix = keyPrefix + "downstream/jwt/"
)

// The version of the records, and their limits.
const (
	recordVersion  = 1 // written
	chainedVersion = 2 // written for authorities that an upstream CA signed: older programs would take them for self-signed
	maxRecordBytes = 64 << 10
	maxRecords     = 1000
)

// A State is where an authority is in its life. It only ever moves forward, in the order of the constants; steps may be
// left out.
type State string

const (
	// StatePrepared: published, signs nothing yet.
	StatePrepared State = "prepared"
	// StateActive: the one that signs.
	StateActive State = "active"
	// StateOld: signs nothing any more; what it signed is still good.
	StateOld State = "old"
	// StateTainted: as old, and all that it signed is re-issued.
	StateTainted State = "tainted"
	// StateRevoked: no longer published; nothing it signed is good.
	StateRevoked State = "revoked"
)

// rank orders the states; zero is unknown.
func (s State) rank() int {
	switch s {
	case StatePrepared:
		return 1
	case StateActive:
		return 2
	case StateOld:
		return 3
	case StateTainted:
		return 4
	case StateRevoked:
		return 5
	default:
		return 0
	}
}

// published reports whether an authority in this state is in the bundle. A prepared one is, so that everybody knows it
// before it signs. [JWT-32]
func (s State) published() bool { return s != StateRevoked }

// signs reports whether the key of an authority in this state is needed, now or next.
func (s State) signs() bool { return s == StatePrepared || s == StateActive }

// indexRecord counts the authorities that were ever made, and says whose they are.
type indexRecord struct {
	Version        int    `json:"v"`
	TrustDomain    string `json:"trust_domain"`
	X509Generation uint64 `json:"x509_generation"`
	JWTGeneration  uint64 `json:"jwt_generation"`
	WITGeneration  uint64 `json:"wit_generation,omitempty"` // 0: none was ever made
	// WITPublished is here so that the bundle's sequence rises when WIT-SVIDs are switched on or off. [TDB-05]
	WITPublished bool `json:"wit_published,omitempty"`
}

type x509Record struct {
	Version     int         `json:"v"`
	ID          string      `json:"id"`
	Generation  uint64      `json:"generation"`
	State       State       `json:"state"`
	Certificate []byte      `json:"certificate"` // DER
	Key         keys.Stored `json:"key"`

	// Above holds what is above Certificate in DER, its issuer first and the upstream CA's root last. A self-signed
	// authority has none.
	Above [][]byte `json:"above,omitempty"`

	// Cross is the same authority signed by the one that was active when it was prepared, DER. It may be absent.
	Cross []byte `json:"cross_certificate,omitempty"`

	life
}

// A jwtRecord is the record of a JWT or WIT authority.
type jwtRecord struct {
	Version    int         `json:"v"`
	ID         string      `json:"id"`
	Generation uint64      `json:"generation"`
	State      State       `json:"state"`
	NotBefore  time.Time   `json:"not_before"`
	NotAfter   time.Time   `json:"not_after"`
	PublicKey  []byte      `json:"public_key"` // SPKI
	Key        keys.Stored `json:"key"`

	life
}

// decode reads one record. A version newer than understood is refused before anything else is looked at: its meaning may
// have changed.
func decode(item store.Item, into any) error {
	if len(item.Value) > maxRecordBytes {
		return fmt.Errorf("record %q has %d bytes, more than %d", item.Key, len(item.Value), maxRecordBytes)
	}
	var head struct {
		Version int `json:"v"`
	}
	if err := json.Unmarshal(item.Value, &head); err != nil {
		return fmt.Errorf("record %q: %w", item.Key, err)
	}
	if head.Version < recordVersion || head.Version > chainedVersion {
		return fmt.Errorf("record %q has format version %d, this program understands up to %d; use the signet release that wrote it", item.Key, head.Version, chainedVersion)
	}
	if err := json.Unmarshal(item.Value, into); err != nil {
		return fmt.Errorf("record %q: %w", item.Key, err)
	}
	return nil
}

func decodeIndex(item store.Item, td spiffeid.TrustDomain) (indexRecord, error) {
	var r indexRecord
	if err := decode(item, &r); err != nil {
		return r, err
	}
	if r.TrustDomain != td.Name() {
		return r, fmt.Errorf("the store belongs to trust domain %q, but trust_domain is %q; a trust domain cannot be renamed: use another data directory or store prefix", r.TrustDomain, td.Name())
	}
	if r.X509Generation == 0 || r.JWTGeneration == 0 {
		return r, fmt.Errorf("record %q has no generation", item.Key)
	}
	return r, nil
}

// decodeX509 reads the record of an X.509 authority and checks that its parts belong together.
func decodeX509(item store.Item, td spiffeid.TrustDomain) (r x509Record, cert *x509.Certificate, above x509Path, err error) {
	fail := func(err error) (x509Record, *x509.Certificate, x509Path, error) { return r, nil, nil, err }
	if err := decode(item, &r); err != nil {
		return fail(err)
	}
	if err := checkHead(item.Key, keyX509Prefix, r.ID, r.Generation, r.State); err != nil {
		return fail(err)
	}
	if cert, err = x509.ParseCertificate(r.Certificate); err != nil {
		return fail(fmt.Errorf("record %q: certificate: %w", item.Key, err))
	}
	if id := hex.EncodeToString(cert.SubjectKeyId); id != r.ID {
		return fail(fmt.Errorf("record %q holds the certificate of authority %q", item.Key, id))
	}
	for i, der := range r.Above {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fail(fmt.Errorf("record %q: certificate %d above: %w", item.Key, i, err))
		}
		above = append(above, c)
	}
	if err := checkAuthorityCertificate(cert, above, td); err != nil {
		return fail(fmt.Errorf("record %q: certificate: %w", item.Key, err))
	}
	return r, cert, above, nil
}

// tokenPrefix is where the records of JWT or WIT authorities are.
func tokenPrefix(use keys.Use) string {
	if use == keys.UseWIT {
		return keyWITPrefix
	}
	return keyJWTPrefix
}

// decodeJWT reads the record of a JWT or WIT authority and checks that its parts belong together.
func decodeJWT(item store.Item, prefix string) (jwtRecord, crypto.PublicKey, error) {
	var r jwtRecord
	if err := decode(item, &r); err != nil {
		return r, nil, err
	}
	if err := checkHead(item.Key, prefix, r.ID, r.Generation, r.State); err != nil {
		return r, nil, err
	}
	public, err := ParsePublicKey(r.PublicKey)
	if err != nil {
		return r, nil, fmt.Errorf("record %q: public_key: %w", item.Key, err)
	}
	if id := jwtKeyID(r.PublicKey); id != r.ID {
		return r, nil, fmt.Errorf("record %q holds the public key of authority %q", item.Key, id)
	}
	if !r.NotAfter.After(r.NotBefore) {
		return r, nil, fmt.Errorf("record %q ends at %v, not after its begin %v", item.Key, r.NotAfter, r.NotBefore)
	}
	return r, public, nil
}

func checkHead(key, prefix, id string, generation uint64, state State) error {
	switch {
	case id == "" || strings.TrimPrefix(key, prefix) != id:
		return fmt.Errorf("record %q says that it is authority %q", key, id)
	case generation == 0:
		return fmt.Errorf("record %q has no generation", key)
	case state.rank() == 0:
		return fmt.Errorf("record %q has the unknown state %q", key, string(state))
	}
	return nil
}

// checkAuthorityCertificate refuses an authority that is not this trust domain's, or that verifiers would refuse: a
// self-signed one, or one below an upstream CA, above which is the path to that CA's root.
func checkAuthorityCertificate(cert *x509.Certificate, above x509Path, td spiffeid.TrustDomain) error {
	if len(above) > 0 {
		return checkIntermediate(cert, above, td)
	}
	if err := checkSigningProfile(cert, td); err != nil {
		return err
	}
	if !bytes.Equal(cert.RawIssuer, cert.RawSubject) {
		return errors.New("it is not self-signed")
	}
	if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		return fmt.Errorf("its own signature: %w", err)
	}
	return nil
}

// jwtKeyID derives the kid of a JWT authority from its public key, so that a kid never names two keys.
func jwtKeyID(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:16])
}
