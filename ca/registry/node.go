package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// A Node is an attested agent. A Node in the registry is never changed in place.
type Node struct {
	ID          spiffeid.ID
	Attestation string // name of the attestor, such as join_token
	Selectors   []spiffe.Selector

	// Serial is the decimal serial number of the SVID the agent may use; empty while it is banned. NewSerial is one
	// that was handed out by a renewal and takes over at its first use. [SPIRE-PROTOCOL §4]
	Serial, NewSerial       string
	ExpiresAt, NewExpiresAt time.Time
	// Key and NewKey are the public keys of those SVIDs, PKIX DER: with the private one the node can win back an SVID
	// that it lost or that expired.
	Key, NewKey []byte

	// Former and FormerKey are what the current SVID replaced, and Places the hosts from which the change was asked for and
	// first used: whoever uses what was replaced from somewhere else has stolen one or the other. NewPlace is the host that asked for NewSerial.
	Former    string
	FormerKey []byte
	Places    []string
	NewPlace  string

	// Active is set by the first call that the agent makes with its SVID. Until then a reply that was lost can be had
	// again with the same key.
	Active      bool
	Banned      bool
	CanReattest bool
	Version     string
	// Follows is set once the agent has opened Follow: its acknowledgements come over it alone.
	Follows   bool
	CreatedAt time.Time

	Revision store.Revision
}

type nodeRecord struct {
	V            int      `json:"v"`
	Attestation  string   `json:"attestation"`
	Selectors    []string `json:"selectors,omitempty"`
	Serial       string   `json:"serial,omitempty"`
	NewSerial    string   `json:"new_serial,omitempty"`
	ExpiresAt    int64    `json:"expires_at"`
	NewExpiresAt int64    `json:"new_expires_at,omitempty"`
	Key          []byte   `json:"key,omitempty"`
	NewKey       []byte   `json:"new_key,omitempty"`
	Former       string   `json:"former,omitempty"`
	FormerKey    []byte   `json:"former_key,omitempty"`
	Places       []string `json:"places,omitempty"`
	NewPlace     string   `json:"new_place,omitempty"`
	Active       bool     `json:"active,omitempty"`
	Banned       bool     `json:"banned,omitempty"`
	CanReattest  bool     `json:"can_reattest,omitempty"`
	Version      string   `json:"version,omitempty"`
	Follows      bool     `json:"follows,omitempty"`
	CreatedAt    int64    `json:"created_at"`
}

func (n *Node) encode() ([]byte, error) {
	return marshal(nodeRecord{
		V: recordVersion, Attestation: n.Attestation, Selectors: selectorStrings(n.Selectors),
		Serial: n.Serial, NewSerial: n.NewSerial, ExpiresAt: unix(n.ExpiresAt), NewExpiresAt: unix(n.NewExpiresAt), Key: n.Key, NewKey: n.NewKey,
		Former: n.Former, FormerKey: n.FormerKey, Places: n.Places, NewPlace: n.NewPlace,
		Active: n.Active, Banned: n.Banned, CanReattest: n.CanReattest, Version: n.Version, Follows: n.Follows, CreatedAt: unix(n.CreatedAt),
	})
}

func decodeNode(id spiffeid.ID, item store.Item) (*Node, error) {
	var r nodeRecord
	if err := decodeRecord(item, &r, func() int { return r.V }); err != nil {
		return nil, err
	}
	n := &Node{
		ID: id, Attestation: r.Attestation, Serial: r.Serial, NewSerial: r.NewSerial,
		ExpiresAt: fromUnix(r.ExpiresAt), NewExpiresAt: fromUnix(r.NewExpiresAt), Key: r.Key, NewKey: r.NewKey,
		Former: r.Former, FormerKey: r.FormerKey, Places: r.Places, NewPlace: r.NewPlace,
		Active: r.Active, Banned: r.Banned, CanReattest: r.CanReattest, Version: r.Version, Follows: r.Follows,
		CreatedAt: fromUnix(r.CreatedAt), Revision: item.Modified,
	}
	var err error
	if n.Selectors, err = parseSelectors(r.Selectors); err != nil {
		return nil, fmt.Errorf("record %s: %w", item.Key, err)
	}
	return n, nil
}

// Promote makes the SVID that was handed out last the one that the agent uses, since it was used from place.
func (n *Node) Promote(place string) {
	n.Former, n.FormerKey = n.Serial, nil
	if !bytes.Equal(n.Key, n.NewKey) {
		n.FormerKey = n.Key
	}
	n.Places = n.Places[:0:0]
	for _, p := range []string{n.NewPlace, place} {
		if p != "" && !slices.Contains(n.Places, p) {
			n.Places = append(n.Places, p)
		}
	}
	n.Serial, n.ExpiresAt, n.Key = n.NewSerial, n.NewExpiresAt, n.NewKey
	n.NewSerial, n.NewExpiresAt, n.NewKey, n.NewPlace = "", time.Time{}, nil, ""
}

// Knows tells whether the agent was at place when its SVID was last replaced. A node that does not say where it was, since it
// is from an older version, was everywhere.
func (n *Node) Knows(place string) bool {
	return len(n.Places) == 0 || place == n.NewPlace || slices.Contains(n.Places, place)
}

// A JoinToken lets one node attest once. It prints as "[join token]" with every verb, so that it cannot reach a log
// by accident.
type JoinToken struct{ id, secret, pin string }

func (JoinToken) Format(f fmt.State, _ rune) { io.WriteString(f, "[join token]") }

// ID is the public part, which becomes the last segment of the agent's SPIFFE ID.
func (t JoinToken) ID() string { return t.id }

// Pin is the lower-case hex SHA-256 of the SPKI of the authority that the node shall trust, or empty.
func (t JoinToken) Pin() string { return t.pin }

// Reveal returns the token itself, for handing it to the operator who asked for it and nowhere else.
func (t JoinToken) Reveal() string { return t.id + "." + t.secret + "." + t.pin }

const (
	tokenIDBytes     = 8
	tokenSecretBytes = 20
	maxTokenBytes    = 512
)

var tokenEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// NewJoinToken makes a token that pins the authority with the given SPKI hash.
func NewJoinToken(pin string) JoinToken {
	b := make([]byte, tokenIDBytes+tokenSecretBytes)
	rand.Read(b) // never fails since Go 1.24
	return JoinToken{id: tokenEncoding.EncodeToString(b[:tokenIDBytes]), secret: tokenEncoding.EncodeToString(b[tokenIDBytes:]), pin: pin}
}

// ParseJoinToken reads <id>.<secret> or <id>.<secret>.<pin>. Its error never repeats what it was given.
func ParseJoinToken(s string) (JoinToken, error) {
	bad := fmt.Errorf("join token: not of the form <id>.<secret>.<pin>; create one with `signet token create`")
	if len(s) > maxTokenBytes {
		return JoinToken{}, bad
	}
	parts := strings.Split(s, ".")
	if len(parts) != 2 && len(parts) != 3 {
		return JoinToken{}, bad
	}
	t := JoinToken{id: parts[0], secret: parts[1]}
	if b, err := tokenEncoding.DecodeString(t.id); err != nil || len(b) != tokenIDBytes {
		return JoinToken{}, bad
	}
	if b, err := tokenEncoding.DecodeString(t.secret); err != nil || len(b) != tokenSecretBytes {
		return JoinToken{}, bad
	}
	if len(parts) == 3 {
		t.pin = parts[2]
		if b, err := hex.DecodeString(t.pin); err != nil || len(b) != sha256.Size || strings.ToLower(t.pin) != t.pin {
			return JoinToken{}, bad
		}
	}
	return t, nil
}

// NormaliseAgentID maps the ID that an operator's script makes by appending a whole join token to the ID that the
// agent really gets, which ends in the token's public part. Other IDs come back as they are.
func NormaliseAgentID(id spiffeid.ID) spiffeid.ID {
	const prefix = agentPathPrefix + "join_token/"
	rest, ok := strings.CutPrefix(id.Path(), prefix)
	if !ok {
		return id
	}
	t, err := ParseJoinToken(rest)
	if err != nil {
		return id
	}
	return mustID(id.TrustDomain(), prefix+t.id)
}

// A Token is what the CA keeps of a join token: no secret.
type Token struct {
	ID         string
	SecretHash []byte // SHA-256 of the secret, which has 160 random bits
	ExpiresAt  time.Time
	Groups     []string
	// UsedBy is the SHA-256 of the SPKI of the key that attested with it; nil if unused.
	UsedBy []byte

	Revision store.Revision
}

// Matches compares the secret in constant time.
func (t *Token) Matches(given JoinToken) bool {
	h := sha256.Sum256([]byte(given.secret))
	return subtle.ConstantTimeCompare(h[:], t.SecretHash) == 1
}

type tokenRecord struct {
	V          int      `json:"v"`
	SecretHash []byte   `json:"secret_hash"`
	ExpiresAt  int64    `json:"expires_at"`
	Groups     []string `json:"groups,omitempty"`
	UsedBy     []byte   `json:"used_by,omitempty"`
}

func (t *Token) encode() ([]byte, error) {
	return marshal(tokenRecord{recordVersion, t.SecretHash, unix(t.ExpiresAt), t.Groups, t.UsedBy})
}

func decodeToken(id string, item store.Item) (*Token, error) {
	var r tokenRecord
	if err := decodeRecord(item, &r, func() int { return r.V }); err != nil {
		return nil, err
	}
	return &Token{id, r.SecretHash, fromUnix(r.ExpiresAt), r.Groups, r.UsedBy, item.Modified}, nil
}

// NoteVersion stores what version an attested agent says it is. It is a write per upgrade. ErrNotFound if the agent was
// evicted meanwhile.
func (r *Registry) NoteVersion(ctx context.Context, id spiffeid.ID, version string) error {
	n, err := r.Node(id)
	for range maxAttempts {
		if err != nil {
			return err
		}
		if n.Version == version {
			return nil
		}
		changed := *n
		changed.Version = version
		if err = r.PutNode(ctx, &changed, nil); !errors.Is(err, ErrConflict) {
			return err
		}
		n, err = r.NodeNow(ctx, id) // its SVID was renewed or it was banned meanwhile
	}
	return ErrConflict
}
