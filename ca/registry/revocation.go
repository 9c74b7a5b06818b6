package registry

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"math/big"
	"net/url"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/policy"
)

// This file holds what is revoked: one record for each Revocation document, with what it was compiled into when it was
// applied. Every agent holds all of it, so that there is no set per agent, but one list of what changed since when.

const (
	revocationPrefix = "revocation/"
	// MaxRevocations bounds what documents are compiled into: every agent and every enforcement point holds all of it.
	MaxRevocations = 100_000
	// maxRevocationChanges bounds the changes that are remembered for agents to continue from.
	maxRevocationChanges = 10_000
	// revocationShards is into how many parts what is revoked is divided, so that a change does not prepare everything anew.
	revocationShards = 64
)

// A Revocation is one document with what it was compiled into. It is never changed in place.
type Revocation struct {
	Items     []*policyv1.Revocation // names are the document's, and that with /1, /2 and so on behind it
	Target    string                 // in a few words, for people
	Agent     spiffeid.ID            // of a revoked agent
	Expires   time.Time              // zero: never
	Document  Document
	CreatedAt time.Time
	Revision  store.Revision
}

type revocationRecord struct {
	V         int      `json:"v"`
	Document  document `json:"document"`
	Compiled  []byte   `json:"compiled"` // signet.policy.v1.RevocationSet
	Target    string   `json:"target"`
	Agent     string   `json:"agent,omitempty"`
	ExpiresAt int64    `json:"expires_at,omitempty"`
	CreatedAt int64    `json:"created_at"`
}

func (r *Revocation) encode() ([]byte, error) {
	b, err := proto.Marshal(&policyv1.RevocationSet{Revocations: r.Items})
	if err != nil {
		return nil, err
	}
	rec := revocationRecord{V: recordVersion, Document: r.Document.document(), Compiled: b,
		Target: r.Target, ExpiresAt: unix(r.Expires), CreatedAt: unix(r.CreatedAt)}
	if !r.Agent.IsZero() {
		rec.Agent = r.Agent.String()
	}
	return marshal(rec)
}

func decodeRevocation(item store.Item) (*Revocation, error) {
	var rec revocationRecord
	if err := decodeRecord(item, &rec, func() int { return rec.V }); err != nil {
		return nil, err
	}
	var set policyv1.RevocationSet
	if err := proto.Unmarshal(rec.Compiled, &set); err != nil {
		return nil, fmt.Errorf("record %s: %w (is the store damaged?)", item.Key, err)
	}
	r := &Revocation{Items: set.Revocations, Target: rec.Target, Expires: fromUnix(rec.ExpiresAt), Document: rec.Document.domain(),
		CreatedAt: fromUnix(rec.CreatedAt), Revision: item.Modified}
	for _, it := range r.Items {
		it.Revision = int64(item.Modified)
	}
	if rec.Agent != "" {
		id, err := spiffeid.FromString(rec.Agent)
		if err != nil {
			return nil, fmt.Errorf("record %s: %w (is the store damaged?)", item.Key, err)
		}
		r.Agent = id
	}
	return r, nil
}

// revocations are the index of what is revoked. They are written under Registry.mu; what is prepared on demand, for many
// readers at once, is behind atomic pointers.
type revocations struct {
	td        spiffeid.TrustDomain
	documents map[string]*Revocation
	items     map[string]*policyv1.Revocation // by name
	changes   []revocationChange              // in order of revision
	since     store.Revision                  // changes reach back to it
	remember  int                             // how many changes are remembered
	shards    [revocationShards]revocationShard
	sweeping  revocationShard // those whose first path segment is a wildcard
	dated     map[string]*policyv1.Revocation
	floors    atomic.Pointer[floors] // nil: dated changed
}

type revocationChange struct {
	at       store.Revision
	document string
	removed  []string // names of items
}

type revocationShard struct {
	items    map[string]*policyv1.Revocation
	prepared atomic.Pointer[policy.Revocations] // nil: items changed
}

func (s *revocationShard) get(td spiffeid.TrustDomain) *policy.Revocations {
	if len(s.items) == 0 {
		return nil
	}
	if p := s.prepared.Load(); p != nil {
		return p
	}
	set := &policyv1.RevocationSet{}
	for _, it := range s.items {
		set.Revocations = append(set.Revocations, it)
	}
	p := policy.CompileRevocations(set, td)
	s.prepared.Store(p)
	return p
}

func newRevocations() *revocations {
	return &revocations{remember: maxRevocationChanges, documents: map[string]*Revocation{}, items: map[string]*policyv1.Revocation{}, dated: map[string]*policyv1.Revocation{}}
}

func (rs *revocations) shard(it *policyv1.Revocation) *revocationShard {
	if it.GetSpiffeId() != "" && policy.Sweeping(it) {
		return &rs.sweeping
	}
	h := fnv.New32a()
	h.Write([]byte(it.Name))
	return &rs.shards[h.Sum32()%revocationShards]
}

func (ix *index) applyRevocation(td spiffeid.TrustDomain, name string, ev store.Event, ch *changes) error {
	rs := ix.revocations
	rs.td = td
	var now *Revocation
	if !ev.Deleted {
		var err error
		if now, err = decodeRevocation(ev.Item); err != nil {
			return err
		}
	}
	change := revocationChange{at: ev.Modified, document: name}
	if old := rs.documents[name]; old != nil {
		for _, it := range old.Items {
			change.removed = append(change.removed, it.Name)
			delete(rs.items, it.Name)
			s := rs.shard(it)
			delete(s.items, it.Name)
			s.prepared.Store(nil)
			if rs.dated[it.Name] != nil {
				delete(rs.dated, it.Name)
				rs.floors.Store(nil)
			}
		}
		delete(rs.documents, name)
	}
	if now != nil {
		rs.documents[name] = now
		for _, it := range now.Items {
			rs.items[it.Name] = it
			s := rs.shard(it)
			if s.items == nil {
				s.items = map[string]*policyv1.Revocation{}
			}
			s.items[it.Name] = it
			s.prepared.Store(nil)
			if it.IssuedBefore != 0 {
				rs.dated[it.Name] = it
				rs.floors.Store(nil)
			}
		}
	}
	rs.changes = append(rs.changes, change)
	if n := len(rs.changes) - rs.remember; n > rs.remember/4 {
		rs.since = rs.changes[n-1].at
		rs.changes = slices.Clone(rs.changes[n:])
	}
	ch.revocations = true
	return nil
}

// after returns what was revoked, and is not any more, after a revision that the changes reach back to.
func (rs *revocations) after(rev store.Revision) (items []*policyv1.Revocation, removed []string) {
	from := sort.Search(len(rs.changes), func(i int) bool { return rs.changes[i].at > rev })
	seen := map[string]bool{}
	for _, c := range rs.changes[from:] {
		for _, name := range c.removed {
			if rs.items[name] == nil && !seen["/"+name] {
				seen["/"+name] = true
				removed = append(removed, name)
			}
		}
		if d := rs.documents[c.document]; d != nil && !seen[c.document] {
			seen[c.document] = true
			items = append(items, d.Items...)
		}
	}
	return items, removed
}

// all returns everything that is revoked, in order of name.
func (rs *revocations) all() []*policyv1.Revocation {
	out := make([]*policyv1.Revocation, 0, len(rs.items))
	for _, it := range rs.items {
		out = append(out, it)
	}
	slices.SortFunc(out, func(a, b *policyv1.Revocation) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// each calls look for every prepared part until it finds something.
func (rs *revocations) each(sweeping bool, look func(*policy.Revocations) (string, bool)) (string, bool) {
	for i := range rs.shards {
		if p := rs.shards[i].get(rs.td); p != nil {
			if name, found := look(p); found {
				return name, true
			}
		}
	}
	if p := rs.sweeping.get(rs.td); p != nil && sweeping {
		return look(p)
	}
	return "", false
}

// RevokedID reports by which revocation all SVIDs of an ID are revoked: none is issued any more.
func (r *Registry) RevokedID(id spiffeid.ID) (name string, revoked bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.revocations.each(!control(id), func(p *policy.Revocations) (string, bool) { return p.ID(id) })
}

// RevokedX509 reports by which revocation an X509-SVID, which is verified already, is revoked. Of those whose first path
// segment is a wildcard none counts for agents: they would not hear of it.
func (r *Registry) RevokedX509(leaf *x509.Certificate, id spiffeid.ID) (name string, revoked bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.revocations.each(!control(id), func(p *policy.Revocations) (string, bool) { return p.X509SVID(leaf) })
}

// RevokedSerials reports by which revocation one of some X509-SVIDs of the trust domain is revoked by its serial number, in
// decimal.
func (r *Registry) RevokedSerials(serials ...string) (name string, revoked bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, s := range serials {
		n, ok := new(big.Int).SetString(s, 10)
		if !ok {
			continue
		}
		// Any certificate of the trust domain does; its ID is one that nobody can have, and so is its authority.
		leaf := &x509.Certificate{SerialNumber: n, NotBefore: r.c.Now(), URIs: []*url.URL{mustID(r.c.TrustDomain, nodesPathPrefix+"any").URL()},
			Raw: []byte{0}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, AuthorityKeyId: []byte{0}}
		if name, found := r.ix.revocations.each(false, func(p *policy.Revocations) (string, bool) { return p.X509SVID(leaf) }); found {
			return name, true
		}
	}
	return "", false
}

// A RevokedError says that no SVID is issued for an ID.
type RevokedError struct {
	ID         spiffeid.ID
	Revocation string
}

func (e *RevokedError) Error() string {
	return fmt.Sprintf("SPIFFE ID %q is revoked (Revocation %q)", e.ID.String(), e.Revocation)
}

// Terms returns what an SVID that is issued now for id must keep to: how early its validity may begin at the earliest, zero if
// there is no such moment. A *RevokedError means that none is issued. prefix is how the serial number begins, nil if it is
// random.
func (r *Registry) Terms(id spiffeid.ID, prefix []byte) (x509, tokens time.Time, err error) {
	if name, revoked := r.RevokedID(id); revoked {
		name, _, _ = strings.Cut(name, "/")
		return x509, tokens, &RevokedError{id, name}
	}
	x509, tokens = r.Floors(id, prefix)
	return x509, tokens, nil
}

// RevokedItems returns everything that is revoked in the form in which enforcement points get it, and its revision.
func (r *Registry) RevokedItems() ([]*policyv1.Revocation, store.Revision) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.revocations.all(), r.ix.revision
}

// Revocations returns the documents in order of name.
func (r *Registry) Revocations() []*Revocation {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]*Revocation, 0, len(r.ix.revocations.documents))
	for _, d := range r.ix.revocations.documents {
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b *Revocation) int { return strings.Compare(a.Document.Name, b.Document.Name) })
	return out
}

// control tells whether id is the CA's or an agent's.
func control(id spiffeid.ID) bool { return id.Path() == serverPath || IsAgentID(id) }

// expiryGrace is how long after its end a revocation is removed: a clock that is a little ahead un-revokes nothing early.
const expiryGrace = 5 * time.Second

// ExpireRevocations removes the revocations that ended and returns them.
func (r *Registry) ExpireRevocations(ctx context.Context) ([]*Revocation, error) {
	now := r.c.Now().Add(-expiryGrace)
	var ended, gone []*Revocation
	r.mu.RLock()
	for _, d := range r.ix.revocations.documents {
		if !d.Expires.IsZero() && !now.Before(d.Expires) {
			ended = append(ended, d)
		}
	}
	r.mu.RUnlock()
	for chunk := range slices.Chunk(ended, store.MaxWrites) {
		var checks []store.Check
		var writes []store.Write
		for _, d := range chunk {
			key := revocationPrefix + d.Document.Name
			checks = append(checks, store.Check{Key: key, Modified: d.Revision})
			writes = append(writes, store.Write{Key: key, Delete: true})
		}
		_, err := r.commit(ctx, checks, writes)
		switch {
		case err == nil:
			gone = append(gone, chunk...)
		case !errors.Is(err, ErrConflict): // somebody was faster; look again next time
			return gone, err
		}
	}
	return gone, nil
}
