package policy

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// maxSerial is how many bytes a serial number has at most. [RFC 5280 §4.1.2.2]
const maxSerial = 20

// Revocations say which SVIDs are revoked. They are immutable and safe for concurrent use; a nil *Revocations revokes
// nothing. They hold no clock: whoever has them removes what has ended.
type Revocations struct {
	set         *policyv1.RevocationSet
	revision    int64
	td          string
	unknown     string                             // the name of one that is not understood; empty: all are
	ids         map[string]*trie[[]*revoked]       // by trust domain
	serials     map[string]*policyv1.Revocation    // by serial number without leading zeros
	prefixes    [maxSerial + 1]map[string]*revoked // by length and bytes
	tokens      map[[sha256.Size]byte]*policyv1.Revocation
	authorities map[string]*policyv1.Revocation
}

// revoked is one revocation of a kind whose moment counts.
type revoked struct {
	spec   *policyv1.Revocation
	before time.Time // zero: whenever issued
}

func (r *revoked) covers(issued time.Time) bool { return r.before.IsZero() || issued.Before(r.before) }

// CompileRevocations prepares revocations for the members of trust domain td. It keeps set, which nobody may change then. One that is malformed, or whose target this
// program does not know, revokes everything: it is unknown what it is meant to withdraw.
func CompileRevocations(set *policyv1.RevocationSet, td spiffeid.TrustDomain) *Revocations {
	r := &Revocations{
		set: set, revision: set.GetRevision(), td: td.Name(), ids: make(map[string]*trie[[]*revoked]), serials: make(map[string]*policyv1.Revocation),
		tokens: make(map[[sha256.Size]byte]*policyv1.Revocation), authorities: make(map[string]*policyv1.Revocation),
	}
	for _, spec := range set.GetRevocations() {
		if err := r.add(spec); err != nil && r.unknown == "" {
			if r.unknown = spec.GetName(); r.unknown == "" {
				r.unknown = "a revocation without a name"
			}
		}
	}
	return r
}

// CheckRevocation says what is wrong with a revocation.
func CheckRevocation(spec *policyv1.Revocation) error {
	return (&Revocations{
		ids: make(map[string]*trie[[]*revoked]), serials: make(map[string]*policyv1.Revocation),
		tokens: make(map[[sha256.Size]byte]*policyv1.Revocation), authorities: make(map[string]*policyv1.Revocation),
	}).add(spec)
}

func (r *Revocations) add(spec *policyv1.Revocation) error {
	entry := &revoked{spec: spec}
	if spec.GetIssuedBefore() != 0 {
		entry.before = time.Unix(spec.GetIssuedBefore(), 0)
	}
	switch target := spec.GetTarget().(type) {
	case *policyv1.Revocation_SpiffeId:
		pattern, err := parseIDPattern(target.SpiffeId)
		if err != nil {
			return err
		}
		t := r.ids[pattern.trustDomain]
		if t == nil {
			t = new(trie[[]*revoked])
			r.ids[pattern.trustDomain] = t
		}
		place := t.at(pattern.segments, pattern.rest)
		*place = append(*place, entry)
		return nil
	case *policyv1.Revocation_Serial:
		if n := len(target.Serial); n == 0 || n > maxSerial || target.Serial[0] == 0 {
			return fmt.Errorf("the serial number has %d bytes or a leading zero; it has 1 to %d bytes", n, maxSerial)
		}
		r.serials[string(target.Serial)] = spec
	case *policyv1.Revocation_SerialPrefix:
		n := len(target.SerialPrefix)
		if n == 0 || n > maxSerial {
			return fmt.Errorf("the prefix of serial numbers has %d bytes; it has 1 to %d", n, maxSerial)
		}
		if r.prefixes[n] == nil {
			r.prefixes[n] = make(map[string]*revoked)
		}
		if old := r.prefixes[n][string(target.SerialPrefix)]; old == nil || !old.before.IsZero() && (entry.before.IsZero() || entry.before.After(old.before)) {
			r.prefixes[n][string(target.SerialPrefix)] = entry
		}
		return nil
	case *policyv1.Revocation_JtiHash:
		if len(target.JtiHash) != sha256.Size {
			return fmt.Errorf("the hash of a jti has %d bytes; it has %d", len(target.JtiHash), sha256.Size)
		}
		r.tokens[[sha256.Size]byte(target.JtiHash)] = spec
	case *policyv1.Revocation_AuthorityId:
		if target.AuthorityId == "" {
			return fmt.Errorf("the authority id is empty")
		}
		r.authorities[target.AuthorityId] = spec
	default:
		return fmt.Errorf("its target is not known to this program; upgrade it")
	}
	if spec.GetIssuedBefore() != 0 || spec.GetTokensOnly() {
		return fmt.Errorf("issued_before and tokens_only go with IDs, and issued_before with prefixes of serial numbers")
	}
	return nil
}

// Understood returns the revocations without the consequence of those that this program does not understand. It is for who
// hands out SVIDs, which whoever verifies them refuses all the same: to hand out none would stop what no revocation means.
func (r *Revocations) Understood() *Revocations {
	if r == nil || r.unknown == "" {
		return r
	}
	understood := *r
	understood.unknown = ""
	return &understood
}

// Unknown is the name of a revocation that this program does not understand, which revokes everything; empty if there is none.
func (r *Revocations) Unknown() string {
	if r == nil {
		return ""
	}
	return r.unknown
}

// Set returns what was compiled, which nobody changes. It is empty for a nil *Revocations.
func (r *Revocations) Set() *policyv1.RevocationSet {
	if r == nil {
		return &policyv1.RevocationSet{}
	}
	return r.set
}

// Revision is that of the set. It is zero for a nil *Revocations.
func (r *Revocations) Revision() int64 {
	if r == nil {
		return 0
	}
	return r.revision
}

// ID reports by which revocation every SVID of an ID is revoked, whenever it was issued.
func (r *Revocations) ID(id spiffeid.ID) (name string, found bool) {
	if r == nil {
		return "", false
	}
	if r.unknown != "" {
		return r.unknown, true
	}
	return r.byID(id, func(e *revoked) bool { return e.before.IsZero() && !e.spec.GetTokensOnly() })
}

// X509SVID reports by which revocation an X509-SVID is revoked. It does not verify the certificate.
func (r *Revocations) X509SVID(leaf *x509.Certificate) (name string, found bool) {
	if r == nil {
		return "", false
	}
	if r.unknown != "" {
		return r.unknown, true
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return "", false // no X509-SVID, which is refused without us
	}
	if name, found := r.byID(id, func(e *revoked) bool { return !e.spec.GetTokensOnly() && e.covers(leaf.NotBefore) }); found {
		return name, true
	}
	if spec := r.authorities[hex.EncodeToString(leaf.AuthorityKeyId)]; len(leaf.AuthorityKeyId) > 0 && spec != nil {
		return spec.GetName(), true
	}
	if len(leaf.AuthorityKeyId) == 0 && id.TrustDomain().Name() == r.td {
		for _, spec := range r.authorities { // who stole an authority's key can leave its identifier out; CAs never do
			return spec.GetName(), true
		}
	}
	if id.TrustDomain().Name() != r.td || leaf.SerialNumber == nil || leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() > 8*maxSerial {
		return "", false
	}
	var buf [maxSerial]byte
	leaf.SerialNumber.FillBytes(buf[:])
	if spec := r.serials[string(buf[maxSerial-(leaf.SerialNumber.BitLen()+7)/8:])]; spec != nil {
		return spec.GetName(), true
	}
	for n, byPrefix := range r.prefixes {
		if e := byPrefix[string(buf[:n])]; e != nil && e.covers(leaf.NotBefore) {
			return e.spec.GetName(), true
		}
	}
	return "", false
}

// JWTSVID reports by which revocation a JWT-SVID is revoked. jti may be empty and issued zero if the token does not say
// them; a token that does not say when it was issued counts as issued before any moment.
func (r *Revocations) JWTSVID(id spiffeid.ID, jti string, issued time.Time) (name string, found bool) {
	if r == nil {
		return "", false
	}
	if r.unknown != "" {
		return r.unknown, true
	}
	if jti != "" {
		if spec := r.tokens[sha256.Sum256([]byte(jti))]; spec != nil {
			return spec.GetName(), true
		}
	}
	return r.byID(id, func(e *revoked) bool { return e.covers(issued) })
}

func (r *Revocations) byID(id spiffeid.ID, covers func(*revoked) bool) (string, bool) {
	t := r.ids[id.TrustDomain().Name()]
	if t == nil {
		return "", false
	}
	steps := 0
	return revokedBy(t, id.Path(), covers, &steps)
}

// revokedBy looks for a pattern that covers path, read wide: "**" may stand for nothing. A search that takes too many
// steps finds the call revoked.
func revokedBy(t *trie[[]*revoked], path string, covers func(*revoked) bool, steps *int) (string, bool) {
	if *steps++; *steps > maxSteps {
		return "too many patterns", true
	}
	places := [2]*[]*revoked{t.rest}
	if path == "" {
		places[1] = t.here
	}
	for _, place := range places {
		if place == nil {
			continue
		}
		for _, e := range *place {
			if covers(e) {
				return e.spec.GetName(), true
			}
		}
	}
	if path == "" {
		return "", false
	}
	segment, rest := cut(path)
	if t.star != nil {
		if name, found := revokedBy(t.star, rest, covers, steps); found {
			return name, true
		}
	}
	if next := t.next(segment); next != nil {
		return revokedBy(next, rest, covers, steps)
	}
	return "", false
}

// WithRevocations returns the same policies with other revocations. Decisions about revoked peers are denials.
func (p *Policies) WithRevocations(r *Revocations) *Policies {
	if p == nil {
		return nil
	}
	with := *p
	with.revocations = r
	return &with
}

// Revocations are those that the policies deny by; nil if there are none.
func (p *Policies) Revocations() *Revocations {
	if p == nil {
		return nil
	}
	return p.revocations
}

// revoked reports by which revocation the peer of a request is revoked, as far as the request says who it is.
func (p *Policies) revoked(r *Request) (string, bool) {
	if p.revocations == nil {
		return "", false
	}
	if r.Certificate != nil {
		if name, found := p.revocations.X509SVID(r.Certificate); found {
			return name, true
		}
	}
	return p.revocations.ID(r.Peer)
}

// DecideCallee decides whether a client may speak with a server whose verified X509-SVID is leaf. Rules do not come into
// it, as they are about callers: what is denied is a revoked server, and every one where the policies, and so the
// revocations, are not known or too old to be relied on.
func (p *Policies) DecideCallee(leaf *x509.Certificate) Decision {
	if p == nil {
		return Decision{Outcome: Outcome{Reason: ReasonUnknownPolicy}}
	}
	d := Decision{Epoch: p.set.GetEpoch(), Revision: p.set.GetRevision(), Outcome: Outcome{Allowed: true, Reason: ReasonAllowed}}
	if p.stale {
		d.Outcome = Outcome{Reason: ReasonStalePolicy}
	} else if name, found := p.revocations.X509SVID(leaf); found {
		d.Outcome, d.Revocation = Outcome{Reason: ReasonRevoked}, name
	}
	return d
}
