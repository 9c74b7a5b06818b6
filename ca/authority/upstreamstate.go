package authority

import (
	"cmp"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// Limits of JWT keys that other CAs of the trust domain sign with.
const (
	// MaxUpstreamJWTKeys is the most JWT keys that are taken over from the upstream CA.
	MaxUpstreamJWTKeys = 64

	// MaxKeyIDBytes bounds the id of a foreign JWT key.
	MaxKeyIDBytes = 255
)

// OriginUpstream is the JWTAuthority.Origin of keys that came from the upstream CA.
const OriginUpstream = "upstream"

// A ForeignJWTKey is a JWT authority of another CA of the same trust domain: tokens signed with it are good here too.
type ForeignJWTKey struct {
	KeyID     string
	PublicKey []byte // SPKI in DER
	ExpiresAt time.Time
	Tainted   bool
}

// check refuses a key that validators would refuse, or that could not be told from another.
func (k ForeignJWTKey) check() (crypto.PublicKey, error) {
	switch {
	case k.KeyID == "":
		return nil, fmt.Errorf("jwt key %w: it has no key id", ErrRefused)
	case len(k.KeyID) > MaxKeyIDBytes:
		return nil, fmt.Errorf("jwt key %w: its key id has %d bytes, more than %d", ErrRefused, len(k.KeyID), MaxKeyIDBytes)
	case !utf8.ValidString(k.KeyID):
		return nil, fmt.Errorf("jwt key %w: its key id %q is not UTF-8", ErrRefused, k.KeyID)
	case k.ExpiresAt.IsZero():
		return nil, fmt.Errorf("jwt key %w: %q has no expiry; a key of another CA is published until it expires", ErrRefused, k.KeyID)
	}
	public, err := ParsePublicKey(k.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("jwt key %q: %w", k.KeyID, err)
	}
	if _, err := jwtAlgorithm(public); err != nil {
		return nil, fmt.Errorf("jwt key %w: %q: %w", ErrRefused, k.KeyID, err)
	}
	return public, nil
}

// upstreamRecord is what is published of the upstream CA besides the roots that authorities lead to.
type upstreamRecord struct {
	Version int          `json:"v"`
	Roots   []rootRecord `json:"roots,omitempty"`
	Keys    []keyRecord  `json:"jwt_keys,omitempty"`
	Gone    []string     `json:"revoked_roots,omitempty"` // SHA-256 in hexadecimal; not taken over again
}

type rootRecord struct {
	Certificate []byte `json:"certificate"` // DER
	Tainted     bool   `json:"tainted,omitempty"`
}

type keyRecord struct {
	Version   int       `json:"v,omitempty"`
	KeyID     string    `json:"kid"`
	PublicKey []byte    `json:"public_key"` // SPKI
	ExpiresAt time.Time `json:"expires_at"`
	Tainted   bool      `json:"tainted,omitempty"`
	Origin    string    `json:"origin,omitempty"` // the SPIFFE ID of the downstream CA that published it
}

// An upstreamState is an upstreamRecord, read.
type upstreamState struct {
	record upstreamRecord
	roots  []*x509.Certificate // in the order of record.Roots
	keys   []*foreignKey
}

// A foreignItem is a foreignKey as an edit finds it in the store.
type foreignItem struct {
	*foreignKey
	modified store.Revision
}

// A foreignKey is a JWT key of another CA of the trust domain.
type foreignKey struct {
	record keyRecord
	public crypto.PublicKey
}

func decodeUpstream(item store.Item) (upstreamState, error) {
	var u upstreamState
	if err := decode(item, &u.record); err != nil {
		return u, err
	}
	if n := len(u.record.Roots); n > MaxUpstreamRoots {
		return u, fmt.Errorf("record %q has %d roots, more than %d", item.Key, n, MaxUpstreamRoots)
	}
	if n := len(u.record.Keys); n > MaxUpstreamJWTKeys {
		return u, fmt.Errorf("record %q has %d jwt keys, more than %d", item.Key, n, MaxUpstreamJWTKeys)
	}
	for i, r := range u.record.Roots {
		root, err := x509.ParseCertificate(r.Certificate)
		if err == nil {
			err = checkRoot(root)
		}
		if err != nil {
			return u, fmt.Errorf("record %q: root %d: %w", item.Key, i, err)
		}
		u.roots = append(u.roots, root)
	}
	for _, k := range u.record.Keys {
		key, err := k.read()
		if err != nil {
			return u, fmt.Errorf("record %q: %w", item.Key, err)
		}
		u.keys = append(u.keys, key)
	}
	return u, nil
}

func (k keyRecord) read() (*foreignKey, error) {
	public, err := ForeignJWTKey{KeyID: k.KeyID, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt}.check()
	return &foreignKey{record: k, public: public}, err
}

// decodeForeign reads the record of a JWT key that a downstream CA published.
func decodeForeign(item store.Item) (*foreignKey, error) {
	var r keyRecord
	if err := decode(item, &r); err != nil {
		return nil, err
	}
	if item.Key != foreignRecordKey(r.KeyID) {
		return nil, fmt.Errorf("record %q says that it is jwt key %q", item.Key, r.KeyID)
	}
	if _, err := spiffe.ParseWorkloadID(r.Origin); err != nil {
		return nil, fmt.Errorf("record %q: origin: %w", item.Key, err)
	}
	key, err := r.read()
	if err != nil {
		return nil, fmt.Errorf("record %q: %w", item.Key, err)
	}
	return key, nil
}

// foreignRecordKey is where the key of a downstream CA is stored. A kid is any text, so that its hash names the record; of
// two downstream CAs that use one kid, the second meets the first here.
func foreignRecordKey(kid string) string {
	sum := sha256.Sum256([]byte(kid))
	return keyForeignPrefix + hex.EncodeToString(sum[:16])
}

func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// roots returns the X.509 authorities to be published: those of the authorities, oldest first, and then what the upstream
// CA publishes beyond them, so that everybody holds a new root of it before anything is signed below that. Each is there
// once, however many authorities lead to it. [X509-63, SVID-06]
func (n *snapshot) roots() []X509Authority {
	var out []X509Authority
	at := map[string]int{}
	add := func(a X509Authority) {
		key := fingerprint(a.Certificate)
		i, known := at[key]
		if !known {
			at[key] = len(out)
			out = append(out, a)
			return
		}
		// A root is as alive as the most alive authority below it. That an operator tainted it comes last, and wins.
		if a.State == StateTainted && a.Upstream || out[i].State != StateTainted && liveliness(a.State) > liveliness(out[i].State) {
			out[i].State = a.State
		}
	}
	for _, a := range slices.SortedFunc(maps.Values(n.x509), func(a, b *x509Authority) int {
		return cmp.Or(cmp.Compare(a.generation, b.generation), cmp.Compare(a.id, b.id))
	}) {
		switch {
		case !a.state.published():
		case len(a.above) == 0:
			add(X509Authority{ID: a.id, Certificate: a.certificate, State: a.state})
		case !slices.Contains(n.upstream.record.Gone, fingerprint(a.root())):
			state := a.state
			if state == StateTainted { // the intermediate is; its root is not
				state = StateOld
			}
			add(X509Authority{ID: rootID(a.root()), Certificate: a.root(), State: state, Upstream: true})
		}
	}
	for i, root := range n.upstream.roots {
		state := StatePrepared
		if n.upstream.record.Roots[i].Tainted {
			state = StateTainted
		}
		add(X509Authority{ID: rootID(root), Certificate: root, State: state, Upstream: true})
	}
	return out
}

// liveliness orders states by how much a root with an authority in that state is in use.
func liveliness(s State) int {
	switch s {
	case StateActive:
		return 3
	case StatePrepared:
		return 2
	case StateOld:
		return 1
	default:
		return 0
	}
}

// foreignJWT adds the JWT keys of the upstream and downstream CAs. One whose id or key is there already is left out: what
// this CA signs with can never be displaced by what another one says.
func (n *snapshot) foreignJWT(out []JWTAuthority) []JWTAuthority {
	known := map[string]bool{}
	for _, a := range out {
		known[a.KeyID] = true
	}
	for _, a := range n.jwt { // revoked ones as well
		known[a.id] = true
	}
	add := func(k *foreignKey, origin string) {
		if known[k.record.KeyID] {
			return
		}
		known[k.record.KeyID] = true
		state := StateActive
		if k.record.Tainted {
			state = StateTainted
		}
		out = append(out, JWTAuthority{KeyID: k.record.KeyID, PublicKey: k.public, ExpiresAt: k.record.ExpiresAt, State: state, Origin: origin})
	}
	for _, k := range n.upstream.keys { // before those below: who is below must not displace who is above
		add(k, OriginUpstream)
	}
	for _, id := range slices.Sorted(maps.Keys(n.foreign)) {
		add(n.foreign[id], n.foreign[id].record.Origin)
	}
	return out
}

// encode returns the record of a key.
func (k keyRecord) encode() ([]byte, error) { k.Version = recordVersion; return json.Marshal(k) }
