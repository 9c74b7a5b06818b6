package registry

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/policy"
)

// This file says what a Revocation document is compiled into when it is applied, and whom it hits.

const (
	// agentTagBytes is how much of a serial number names the agent that obtained the X509-SVID.
	agentTagBytes = 8
	// taggedSerial begins the serial numbers that have an agent's tag. [docs/decisions/0026]
	taggedSerial = 0x01
	// maxTokenIDs bounds the IDs whose tokens are revoked one by one with an agent; with more, all tokens of the trust domain
	// are issued anew.
	maxTokenIDs = 1000

	saltKey   = "agent_tag_salt"
	saltBytes = 16
)

// ErrTooManyRevocations means that there is no room for what a plan revokes.
var ErrTooManyRevocations = fmt.Errorf("more than %d revocations would be held; delete some, or revoke by a pattern of IDs", MaxRevocations)

type saltRecord struct {
	V    int    `json:"v"`
	Salt []byte `json:"salt"`
}

// openSalt reads the salt of the agents' tags, or makes it. It belongs to the store's content: a restored store has the same
// tags, so that SVIDs from before are found.
func (r *Registry) openSalt(ctx context.Context) error {
	for range maxAttempts {
		it, err := r.c.Store.Get(ctx, saltKey)
		if err == nil {
			var rec saltRecord
			if err := decodeRecord(it, &rec, func() int { return rec.V }); err != nil {
				return err
			}
			if len(rec.Salt) != saltBytes {
				return fmt.Errorf("record %s: the salt has %d bytes, not %d (is the store damaged?)", saltKey, len(rec.Salt), saltBytes)
			}
			r.salt = rec.Salt
			return nil
		}
		if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		salt := make([]byte, saltBytes)
		rand.Read(salt) // never fails since Go 1.24
		b, err := marshal(saltRecord{recordVersion, salt})
		if err != nil {
			return err
		}
		_, err = r.c.Store.Commit(ctx, []store.Check{{Key: saltKey}}, []store.Write{{Key: saltKey, Value: b}})
		if _, lost := errors.AsType[*store.ConflictError](err); err != nil && !lost {
			return err
		}
	}
	return ErrConflict
}

// SerialPrefix returns how the serial numbers of all X509-SVIDs begin that an agent obtains, for itself and for its workloads,
// so that they can be revoked together, whichever replica issued them. Without the salt nobody can tell the agent from it.
func (r *Registry) SerialPrefix(agent spiffeid.ID) []byte {
	h := sha256.New()
	h.Write([]byte("signet agent tag v1\x00"))
	h.Write(r.salt)
	h.Write([]byte(agent.String()))
	return append([]byte{taggedSerial}, h.Sum(nil)[:agentTagBytes]...)
}

// floors are the moments before which SVIDs that were issued are revoked: SVIDs issued now must not seem older.
type floors struct {
	exact    map[string]floor // by SPIFFE ID
	prefixes map[string]int64 // by prefix of serial numbers
	patterns []datedPattern
}

// A floor is in Unix seconds.
type floor struct{ x509, tokens int64 }

func (f *floor) raise(it *policyv1.Revocation) {
	f.tokens = max(f.tokens, it.IssuedBefore)
	if !it.TokensOnly {
		f.x509 = max(f.x509, it.IssuedBefore)
	}
}

type datedPattern struct {
	pattern string
	floor   floor
}

func (rs *revocations) getFloors() *floors {
	if f := rs.floors.Load(); f != nil {
		return f
	}
	f := &floors{exact: map[string]floor{}, prefixes: map[string]int64{}}
	for _, it := range rs.dated {
		switch t := it.Target.(type) {
		case *policyv1.Revocation_SerialPrefix:
			f.prefixes[string(t.SerialPrefix)] = max(f.prefixes[string(t.SerialPrefix)], it.IssuedBefore)
		case *policyv1.Revocation_SpiffeId:
			if strings.Contains(t.SpiffeId, "*") {
				d := datedPattern{pattern: t.SpiffeId}
				d.floor.raise(it)
				f.patterns = append(f.patterns, d)
				continue
			}
			one := f.exact[t.SpiffeId]
			one.raise(it)
			f.exact[t.SpiffeId] = one
		}
	}
	rs.floors.Store(f)
	return f
}

// Floors returns the moments before which no SVID for id must seem to be issued, since what was issued before them is revoked.
// Zero: there is none. prefix is how the serial number begins, nil if it is random.
func (r *Registry) Floors(id spiffeid.ID, prefix []byte) (x509, tokens time.Time) {
	r.mu.RLock()
	f := r.ix.revocations.getFloors()
	r.mu.RUnlock()
	if len(f.exact)+len(f.prefixes)+len(f.patterns) == 0 {
		return time.Time{}, time.Time{}
	}
	at := f.exact[id.String()]
	at.x509 = max(at.x509, f.prefixes[string(prefix)])
	for _, p := range f.patterns {
		if policy.RevocationCovers(p.pattern, id) {
			at.x509, at.tokens = max(at.x509, p.floor.x509), max(at.tokens, p.floor.tokens)
		}
	}
	return fromUnix(at.x509), fromUnix(at.tokens)
}

// compileRevocation works out what a document revokes. mu is held.
func (r *Registry) compileRevocation(d *policy.RevocationDocument, doc Document) (*Revocation, error) {
	now := r.c.Now()
	out := &Revocation{Target: d.Target(), Agent: d.Agent, Expires: d.Expires, Document: doc}
	add := func(it *policyv1.Revocation) {
		it.Name, it.Reason, it.ExpiresAt = d.Name, d.Reason, unix(d.Expires)
		if n := len(out.Items); n > 0 {
			it.Name = fmt.Sprintf("%s/%d", d.Name, n)
		}
		out.Items = append(out.Items, it)
	}
	switch {
	case !d.Expires.IsZero() && !d.Expires.After(now):
		return nil, fmt.Errorf("expires: %s is past; such a revocation would revoke nothing", d.Expires.Format(time.RFC3339))
	case d.IssuedBefore.After(now.Add(time.Second)):
		return nil, fmt.Errorf("issuedBefore: %s is not past; leave it out to stop issuance", d.IssuedBefore.Format(time.RFC3339))
	case d.ID != "":
		add(&policyv1.Revocation{Target: &policyv1.Revocation_SpiffeId{SpiffeId: d.ID}, IssuedBefore: unix(d.IssuedBefore)})
	case d.Serial != nil:
		add(&policyv1.Revocation{Target: &policyv1.Revocation_Serial{Serial: d.Serial}})
	case d.JTI != "":
		sum := sha256.Sum256([]byte(d.JTI))
		add(&policyv1.Revocation{Target: &policyv1.Revocation_JtiHash{JtiHash: sum[:]}})
	case d.Authority != "":
		if r.c.CheckRevokedAuthority != nil {
			if err := r.c.CheckRevokedAuthority(d.Authority); err != nil {
				return nil, fmt.Errorf("authority: %w", err)
			}
		}
		add(&policyv1.Revocation{Target: &policyv1.Revocation_AuthorityId{AuthorityId: d.Authority}})
	default:
		r.compileAgent(d.Agent, now, add)
	}
	for _, it := range out.Items {
		if err := policy.CheckRevocation(it); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// compileAgent revokes what a stolen node obtained up to now: the X509-SVIDs by the agent's part of their serial numbers, its
// own by its ID, for one may be older than these, and the tokens of every ID that it may serve. A node that is let in again,
// and the others that serve the same IDs, get SVIDs that are good. mu is held.
func (r *Registry) compileAgent(agent spiffeid.ID, now time.Time, add func(*policyv1.Revocation)) {
	prefix := r.SerialPrefix(agent)
	f := r.ix.revocations.getFloors()
	before := now.Unix()
	if last := max(f.prefixes[string(prefix)], f.exact[agent.String()].x509); last == before {
		before++ // what was issued in this second, after it was revoked the last time, seems as old as that
	}
	add(&policyv1.Revocation{Target: &policyv1.Revocation_SerialPrefix{SerialPrefix: prefix}, IssuedBefore: before})
	add(&policyv1.Revocation{Target: &policyv1.Revocation_SpiffeId{SpiffeId: agent.String()}, IssuedBefore: before})
	ids := map[string]bool{}
	if n := r.ix.nodes[agent]; n != nil {
		r.ix.descend(r.ix.rootsOf(r.c.TrustDomain, n, now), now, func(e *Entry) { ids[e.SPIFFEID.String()] = true })
	}
	if n := r.ix.nodes[agent]; n == nil || len(ids) > maxTokenIDs {
		ids = map[string]bool{r.c.TrustDomain.IDString() + "/**": true}
	}
	for _, id := range sortedNames(ids) {
		add(&policyv1.Revocation{Target: &policyv1.Revocation_SpiffeId{SpiffeId: id}, IssuedBefore: before, TokensOnly: true})
	}
}

func sortedNames(set map[string]bool) []string {
	out := make([]string, 0, len(set))
	for s := range set {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

// A Reach says whom a revocation hits, as far as the registry knows.
type Reach struct {
	// IDs are the registered SPIFFE IDs, in order, and Agents the attested agents.
	IDs    []spiffeid.ID
	Agents []spiffeid.ID
	// Admins are those of them, or of the configuration, who are admins.
	Admins []spiffeid.ID
	// Registered is how many different IDs are registered.
	Registered int
	// Danger says why it needs an explicit yes; empty: it does not.
	Danger string
}

// quietReach is how many registered IDs a revocation may hit without an explicit yes.
const quietReach = 10

// reach works out whom a revocation hits. mu is held.
func (r *Registry) reach(d *policy.RevocationDocument) Reach {
	var out Reach
	for range r.ix.registered() {
		out.Registered++
	}
	now := r.c.Now()
	if !d.Agent.IsZero() {
		if n := r.ix.nodes[d.Agent]; n != nil {
			out.Agents = []spiffeid.ID{d.Agent}
			ids := map[string]bool{}
			r.ix.descend(r.ix.rootsOf(r.c.TrustDomain, n, now), now, func(e *Entry) {
				if !ids[e.SPIFFEID.String()] {
					ids[e.SPIFFEID.String()] = true
					out.IDs = append(out.IDs, e.SPIFFEID)
				}
			})
			sortIDs(out.IDs)
		}
		return out
	}
	if d.ID == "" {
		return out
	}
	admins := map[spiffeid.ID]bool{}
	for id := range r.ix.registered() {
		if !policy.RevocationCovers(d.ID, id) {
			continue
		}
		out.IDs = append(out.IDs, id)
		for _, e := range r.ix.byID[id] {
			admins[id] = admins[id] || e.Admin && !e.Expired(now)
		}
	}
	for id := range r.ix.nodes {
		if policy.RevocationCovers(d.ID, id) {
			out.Agents = append(out.Agents, id)
		}
	}
	if r.c.Admins != nil {
		for _, id := range r.c.Admins() {
			admins[id] = admins[id] || policy.RevocationCovers(d.ID, id)
		}
	}
	for id, is := range admins {
		if is {
			out.Admins = append(out.Admins, id)
		}
	}
	sortIDs(out.IDs)
	sortIDs(out.Agents)
	sortIDs(out.Admins)
	if !d.IssuedBefore.IsZero() {
		return out // whoever is hit gets a new SVID at once
	}
	switch {
	case len(out.Admins) > 0:
		out.Danger = fmt.Sprintf("it locks out the admin %s%s", out.Admins[0], andMore(len(out.Admins)-1))
	case policy.Sweeping(&policyv1.Revocation{Target: &policyv1.Revocation_SpiffeId{SpiffeId: d.ID}}):
		out.Danger = fmt.Sprintf("%s begins with a wildcard: it revokes %d of %d registered IDs", d.ID, len(out.IDs), out.Registered)
	case len(out.IDs) > quietReach:
		out.Danger = fmt.Sprintf("it revokes %d registered IDs", len(out.IDs))
	case len(out.Agents) > quietReach:
		out.Danger = fmt.Sprintf("it revokes %d agents", len(out.Agents))
	}
	return out
}

func andMore(n int) string {
	if n <= 0 {
		return ""
	}
	return fmt.Sprintf(" and %d more", n)
}

func sortIDs(ids []spiffeid.ID) {
	slices.SortFunc(ids, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
}

// CompileRevocation returns what a document would revoke if it were applied now.
func (r *Registry) CompileRevocation(d *policy.RevocationDocument) ([]*policyv1.Revocation, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	v, err := r.compileRevocation(d, Document{Name: d.Name})
	if err != nil {
		return nil, err
	}
	return v.Items, nil
}

// Reach says whom a revocation hits.
func (r *Registry) Reach(d *policy.RevocationDocument) Reach {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.reach(d)
}
