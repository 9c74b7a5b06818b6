package authority

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// Appended authorities are of the same trust domain, but their keys are somebody else's: of the SPIRE server that the trust
// domain is moving away from, or of a downstream server. They are published, so that what they sign is good everywhere;
// nothing is ever signed with them here, and the CA's own port believes no SVID of theirs. They have records of their own,
// which know nothing of generations, keys and activation. [docs/decisions]
const (
	keyAppendedPrefix     = keyPrefix + "appended/"
	keyAppendedX509Prefix = keyAppendedPrefix + "x509/" // and the SHA-256 of the certificate
	keyAppendedJWTPrefix  = keyAppendedPrefix + "jwt/"  // and the SHA-256 of the key id

	// MaxAppended is the most authorities that can be appended.
	MaxAppended = 64

	maxCertificateBytes = 16 << 10
	maxKeyIDBytes       = 255
	maxSourceBytes      = 2100 // a SPIFFE ID with a word before it

	// appendedGrace is how long an authority that ended is kept: a clock that jumped forward and is set right again shall
	// not have destroyed anything.
	appendedGrace = 24 * time.Hour

	appendAttempts = 5
)

// ErrUnknown means that no authority with that ID was appended.
var ErrUnknown = errors.New("no such authority was appended")

// An Appended is an authority of the trust domain whose key is somebody else's. Either Certificate or PublicKey is set.
type Appended struct {
	// ID is the subject key id of the certificate in lower-case hexadecimal, or the key id of a JWT authority.
	ID          string
	Certificate *x509.Certificate
	PublicKey   crypto.PublicKey
	// ExpiresAt is the end of the certificate, or of the JWT authority as its owner told it. Zero: not told.
	ExpiresAt time.Time
	Tainted   bool
	// Source says who appended it.
	Source     string
	AppendedAt time.Time

	key string // in the store
}

// X509 tells an X.509 authority from a JWT authority.
func (a *Appended) X509() bool { return a.Certificate != nil }

func (a *Appended) state() State {
	if a.Tainted {
		return StateTainted
	}
	return StateOld // published, signs nothing here, what it signed is good
}

// A JWTKey is a JWT authority to be appended.
type JWTKey struct {
	KeyID     string
	PublicKey []byte    // DER SubjectPublicKeyInfo
	ExpiresAt time.Time // zero: not known
}

type appendedRecord struct {
	Version     int    `json:"v"`
	ID          string `json:"id"`
	Certificate []byte `json:"certificate,omitempty"` // DER
	PublicKey   []byte `json:"public_key,omitempty"`  // SPKI
	ExpiresAt   int64  `json:"expires_at,omitempty"`  // JWT authorities; Unix seconds
	Tainted     bool   `json:"tainted,omitempty"`
	Source      string `json:"source"`
	AppendedAt  int64  `json:"appended_at"`
}

func (a *Appended) encode() ([]byte, error) {
	r := appendedRecord{Version: recordVersion, ID: a.ID, Tainted: a.Tainted, Source: a.Source, AppendedAt: a.AppendedAt.Unix()}
	if a.X509() {
		r.Certificate = a.Certificate.Raw
		return json.Marshal(r)
	}
	if !a.ExpiresAt.IsZero() {
		r.ExpiresAt = a.ExpiresAt.Unix()
	}
	var err error
	if r.PublicKey, err = x509.MarshalPKIXPublicKey(a.PublicKey); err != nil {
		return nil, err
	}
	return json.Marshal(r)
}

// decodeAppended reads a record and checks it like what is appended, except that it may have ended meanwhile.
func decodeAppended(item store.Item, td spiffeid.TrustDomain) (*Appended, error) {
	var r appendedRecord
	if err := decode(item, &r); err != nil {
		return nil, err
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("record %q has format version %d, this program understands %d; use the signet release that wrote it", item.Key, r.Version, recordVersion)
	}
	var a *Appended
	var err error
	if strings.HasPrefix(item.Key, keyAppendedX509Prefix) {
		a, err = checkAppendedX509(r.Certificate, td)
	} else {
		k := JWTKey{KeyID: r.ID, PublicKey: r.PublicKey}
		if r.ExpiresAt != 0 {
			k.ExpiresAt = time.Unix(r.ExpiresAt, 0).UTC()
		}
		a, err = checkAppendedJWT(k)
	}
	if err != nil {
		return nil, fmt.Errorf("record %q: %w", item.Key, err)
	}
	if a.key != item.Key || a.ID != r.ID {
		return nil, fmt.Errorf("record %q holds the authority %q of key %q", item.Key, a.ID, a.key)
	}
	a.Tainted, a.Source, a.AppendedAt = r.Tainted, r.Source, time.Unix(r.AppendedAt, 0).UTC()
	return a, nil
}

// checkAppendedX509 reads a certificate that shall be trusted like our own.
func checkAppendedX509(der []byte, td spiffeid.TrustDomain) (*Appended, error) {
	if len(der) > maxCertificateBytes {
		return nil, fmt.Errorf("x509_authorities %w: a certificate has %d bytes, more than %d", ErrRefused, len(der), maxCertificateBytes)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("x509_authorities %w: %w", ErrRefused, err)
	}
	refuse := func(format string, args ...any) (*Appended, error) {
		return nil, fmt.Errorf("x509_authorities %w: certificate %q %s", ErrRefused, cert.Subject.String(), fmt.Sprintf(format, args...))
	}
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA || cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return refuse("is no CA certificate with keyCertSign [X509-68]")
	case len(cert.SubjectKeyId) == 0:
		return refuse("has no subject key id, by which agents recognise what it signed")
	case len(cert.SubjectKeyId) > 64:
		return refuse("has a subject key id of %d bytes, more than 64", len(cert.SubjectKeyId))
	case !cert.NotAfter.After(cert.NotBefore):
		return refuse("ends before it begins")
	}
	// A root above the trust domain has no SPIFFE ID. One that has another trust domain's is a mistake, and a bad one.
	if len(cert.URIs) > 0 {
		id, err := spiffe.IDFromCertificate(cert)
		if err != nil {
			return refuse("%v", err)
		}
		if id.TrustDomain() != td {
			return refuse("is of trust domain %q; set the bundle of another trust domain with `signet bundle set`", id.TrustDomain().Name())
		}
	}
	if err := checkKeyStrength(cert.PublicKey); err != nil {
		return nil, fmt.Errorf("x509_authorities: certificate %q: %w", cert.Subject.String(), err)
	}
	sum := sha256.Sum256(cert.Raw)
	return &Appended{ID: hex.EncodeToString(cert.SubjectKeyId), Certificate: cert, ExpiresAt: cert.NotAfter, key: keyAppendedX509Prefix + hex.EncodeToString(sum[:])}, nil
}

func checkAppendedJWT(k JWTKey) (*Appended, error) {
	refuse := func(format string, args ...any) (*Appended, error) {
		return nil, fmt.Errorf("jwt_authorities %w: %s", ErrRefused, fmt.Sprintf(format, args...))
	}
	switch {
	case k.KeyID == "":
		return refuse("a key has no key_id [JWT-27]")
	case len(k.KeyID) > maxKeyIDBytes || !utf8.ValidString(k.KeyID):
		return refuse("a key_id has more than %d bytes or is not UTF-8", maxKeyIDBytes)
	}
	public, err := ParsePublicKey(k.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("jwt_authorities: key %q: %w", k.KeyID, err)
	}
	// What cannot be published, such as Ed25519, is refused here and not when the bundle is written. [JWT-08]
	if _, err := spiffe.MarshalJWKS(map[string]crypto.PublicKey{k.KeyID: public}); err != nil {
		return refuse("key %q: %v", k.KeyID, err)
	}
	sum := sha256.Sum256([]byte(k.KeyID))
	return &Appended{ID: k.KeyID, PublicKey: public, ExpiresAt: k.ExpiresAt.UTC(), key: keyAppendedJWTPrefix + hex.EncodeToString(sum[:])}, nil
}

// Append publishes authorities of the trust domain whose keys are somebody else's, in one commit, and returns those that
// were not published before with the commit's revision. What is known already is passed over. Errors wrap ErrRefused, and
// say which authority cannot be appended and why; then none is.
func (s *Set) Append(ctx context.Context, certificates [][]byte, keys []JWTKey, source string) ([]*Appended, store.Revision, error) {
	if len(certificates)+len(keys) == 0 {
		return nil, 0, fmt.Errorf("x509_authorities and jwt_authorities %w: there is nothing to append", ErrRefused)
	}
	if n := len(certificates) + len(keys); n > MaxAppended {
		return nil, 0, fmt.Errorf("x509_authorities and jwt_authorities %w: %d in one call, at most %d can be appended", ErrRefused, n, MaxAppended)
	}
	now := s.config.Now().UTC().Truncate(time.Second)
	var all []*Appended
	for _, der := range certificates {
		a, err := checkAppendedX509(der, s.config.TrustDomain)
		if err != nil {
			return nil, 0, err
		}
		all = append(all, a)
	}
	for _, k := range keys {
		a, err := checkAppendedJWT(k)
		if err != nil {
			return nil, 0, err
		}
		all = append(all, a)
	}
	for _, a := range all {
		if a.Source, a.AppendedAt = source, now; len(source) > maxSourceBytes {
			a.Source = strings.ToValidUTF8(source[:maxSourceBytes], "")
		}
		if !a.ExpiresAt.IsZero() && !now.Before(a.ExpiresAt) {
			return nil, 0, fmt.Errorf("authority %q %w: it ended at %s", a.ID, ErrRefused, a.ExpiresAt.UTC().Format(time.RFC3339))
		}
	}
	var added []*Appended
	rev, err := s.changeAppended(ctx, func(have map[string]*Appended) ([]store.Write, error) {
		added = nil
		var writes []store.Write
		for _, a := range all {
			isNew, err := s.fits(a, have)
			if err != nil {
				return nil, err
			}
			if !isNew {
				continue
			}
			value, err := a.encode()
			if err != nil {
				return nil, err
			}
			have[a.key] = a
			added = append(added, a)
			writes = append(writes, store.Write{Key: a.key, Value: value})
		}
		if len(have) > MaxAppended {
			return nil, fmt.Errorf("x509_authorities and jwt_authorities %w: with these, %d authorities would be appended, at most %d can be; revoke old ones first", ErrRefused, len(have), MaxAppended)
		}
		return writes, nil
	})
	if err != nil {
		return nil, 0, err
	}
	return added, rev, nil
}

// fits tells whether an authority is new, and refuses one that would be mistaken for another. A key of our own comes in by no
// second door, least of all one that was revoked.
func (s *Set) fits(a *Appended, have map[string]*Appended) (isNew bool, err error) {
	n := s.current.Load()
	if a.X509() {
		for _, own := range n.x509 {
			switch {
			case own.state.published() && own.certificate.Equal(a.Certificate):
				return false, nil
			case bytes.Equal(own.certificate.SubjectKeyId, a.Certificate.SubjectKeyId) || equalKeys(own.certificate.PublicKey, a.Certificate.PublicKey):
				return false, fmt.Errorf("x509_authorities %w: certificate %q has the key or the subject key id of this CA's own authority %s", ErrRefused, a.Certificate.Subject.String(), own.id)
			}
		}
		for _, x := range n.bundle.X509 { // roots of the upstream CA
			if !x.Appended && x.Certificate.Equal(a.Certificate) {
				return false, nil
			}
		}
		return have[a.key] == nil, nil
	}
	for _, j := range n.bundle.JWT { // keys of upstream and downstream CAs
		if !j.Appended && j.KeyID == a.ID && n.jwt[a.ID] == nil {
			if !equalKeys(j.PublicKey, a.PublicKey) {
				return false, fmt.Errorf("jwt_authorities %w: key_id %q is that of another key in the bundle", ErrRefused, a.ID)
			}
			return false, nil
		}
	}
	for _, own := range n.jwt {
		switch same := equalKeys(own.public, a.PublicKey); {
		case same && own.id == a.ID && own.state.published():
			return false, nil
		case same || own.id == a.ID:
			return false, fmt.Errorf("jwt_authorities %w: key_id %q has the key or the key id of this CA's own authority %s", ErrRefused, a.ID, own.id)
		}
	}
	if known := have[a.key]; known != nil {
		if !equalKeys(known.PublicKey, a.PublicKey) {
			return false, fmt.Errorf("jwt_authorities %w: key_id %q was appended with another key; revoke that one first", ErrRefused, a.ID)
		}
		return false, nil
	}
	return true, nil
}

func equalKeys(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// Appended returns the appended authorities, the oldest first.
func (s *Set) Appended() []*Appended {
	return s.current.Load().appendedInOrder()
}

// TaintAppended marks appended authorities: everybody renews what they signed. RevokeAppended takes them out of the bundle.
// x509 says which kind id is of. ErrUnknown if there is none of that id.
func (s *Set) TaintAppended(ctx context.Context, x509 bool, id string) (store.Revision, error) {
	return s.changeAppendedByID(ctx, x509, id, func(a *Appended) (store.Write, error) {
		if a.Tainted {
			return store.Write{}, nil
		}
		a.Tainted = true
		value, err := a.encode()
		return store.Write{Key: a.key, Value: value}, err
	})
}

// RevokeAppended takes appended authorities out of the bundle: nothing that they signed is good from then on. They can be
// appended again.
func (s *Set) RevokeAppended(ctx context.Context, x509 bool, id string) (store.Revision, error) {
	return s.changeAppendedByID(ctx, x509, id, func(a *Appended) (store.Write, error) { return store.Write{Key: a.key, Delete: true}, nil })
}

func (s *Set) changeAppendedByID(ctx context.Context, x509 bool, id string, change func(*Appended) (store.Write, error)) (store.Revision, error) {
	return s.changeAppended(ctx, func(have map[string]*Appended) ([]store.Write, error) {
		var writes []store.Write
		found := false
		for _, key := range slices.Sorted(maps.Keys(have)) { // several certificates can have one key
			if a := have[key]; a.ID == id && a.X509() == x509 {
				found = true
				w, err := change(a)
				if err != nil {
					return nil, err
				}
				if w.Key != "" {
					writes = append(writes, w)
				}
			}
		}
		if !found {
			return nil, ErrUnknown
		}
		return writes, nil
	})
}

// SweepAppended forgets appended authorities that ended a day ago, and returns them.
func (s *Set) SweepAppended(ctx context.Context) ([]*Appended, error) {
	end := s.config.Now().Add(-appendedGrace)
	ended := func(a *Appended) bool { return !a.ExpiresAt.IsZero() && a.ExpiresAt.Before(end) }
	if !slices.ContainsFunc(s.Appended(), ended) {
		return nil, nil
	}
	var gone []*Appended
	revision, err := s.changeAppended(ctx, func(have map[string]*Appended) ([]store.Write, error) {
		gone = nil
		var writes []store.Write
		for _, key := range slices.Sorted(maps.Keys(have)) {
			if a := have[key]; ended(a) {
				gone = append(gone, a)
				writes = append(writes, store.Write{Key: key, Delete: true})
			}
		}
		return writes, nil
	})
	if err != nil {
		return nil, err
	}
	return gone, s.WaitFor(ctx, revision)
}

// changeAppended commits what change makes of the appended authorities in the store. The index is written with it: two
// replicas meet in its check, and the bundle's sequence, which comes from the newest record, never goes back when a record
// is deleted.
func (s *Set) changeAppended(ctx context.Context, change func(map[string]*Appended) ([]store.Write, error)) (store.Revision, error) {
	for range appendAttempts {
		index, err := s.config.Store.Get(ctx, keyIndex)
		if err != nil {
			return 0, fmt.Errorf("reading the index of the authorities: %w", err)
		}
		have := map[string]*Appended{}
		if _, err := s.config.Store.List(ctx, keyAppendedPrefix, 0, func(item store.Item) error {
			a, err := decodeAppended(item, s.config.TrustDomain)
			if err == nil {
				have[item.Key] = a
			}
			return err
		}); err != nil {
			return 0, fmt.Errorf("reading the appended authorities: %w", err)
		}
		writes, err := change(have)
		if err != nil {
			return 0, err
		}
		if len(writes) == 0 {
			return s.current.Load().revision, nil
		}
		writes = append(writes, store.Write{Key: keyIndex, Value: index.Value})
		rev, err := s.config.Store.Commit(ctx, []store.Check{{Key: keyIndex, Modified: index.Modified}}, writes)
		if conflict := (*store.ConflictError)(nil); errors.As(err, &conflict) {
			continue
		}
		return rev, err
	}
	return 0, errors.New("the authorities change all the time; try again")
}

func (n *snapshot) appendedInOrder() []*Appended {
	return slices.SortedFunc(maps.Values(n.appended), func(a, b *Appended) int {
		return cmp.Or(a.AppendedAt.Compare(b.AppendedAt), cmp.Compare(a.key, b.key))
	})
}

// addAppended puts the appended authorities behind all others. One that is there by now, or has a key id that is, is left
// out: what this CA or its upstream says is never displaced.
func (n *snapshot) addAppended(b *Bundle) {
	for _, a := range n.appendedInOrder() {
		switch {
		case a.X509():
			if !slices.ContainsFunc(b.X509, func(x X509Authority) bool { return x.Certificate.Equal(a.Certificate) }) {
				b.X509 = append(b.X509, X509Authority{ID: a.ID, Certificate: a.Certificate, State: a.state(), Appended: true})
			}
		case n.jwt[a.ID] == nil && !slices.ContainsFunc(b.JWT, func(j JWTAuthority) bool { return j.KeyID == a.ID }):
			b.JWT = append(b.JWT, JWTAuthority{KeyID: a.ID, PublicKey: a.PublicKey, ExpiresAt: a.ExpiresAt, State: a.state(), Appended: true})
		}
	}
}

// HasAppendedX509 tells whether Own has fewer authorities than the bundle.
func (s *Set) HasAppendedX509() bool {
	return slices.ContainsFunc(s.current.Load().bundle.X509, func(a X509Authority) bool { return a.Appended })
}

// Own returns the X.509 authorities of the trust domain without the appended ones, as a bundle source: what the CA's own
// port believes of callers. An appended authority vouches for workloads to workloads, not for agents and admins to the CA.
func (s *Set) Own() x509bundle.Source { return ownSource{s} }

type ownSource struct{ s *Set }

func (o ownSource) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != o.s.config.TrustDomain {
		return nil, fmt.Errorf("no X.509 bundle for trust domain %q", td.Name())
	}
	out := x509bundle.New(td)
	for _, a := range o.s.current.Load().bundle.X509 {
		if !a.Appended {
			out.AddX509Authority(a.Certificate)
		}
	}
	return out, nil
}
