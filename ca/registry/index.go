package registry

import (
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// index is the store in memory. It is written by one goroutine under Registry.mu.
type index struct {
	revision store.Revision
	// asOf is the moment as of which it is judged whether what an entry with an end claims for itself is its own still: NoteEnds moves it.
	asOf     time.Time
	entries  map[EntryID]*Entry
	order    entryOrder
	byParent map[spiffeid.ID]map[EntryID]*Entry
	byID     map[spiffeid.ID]map[EntryID]*Entry
	similar  map[string]EntryID
	ending   map[EntryID]*Entry         // entries with an end
	ended    map[EntryID]bool           // those of them whose end the followers know of
	below    map[EntryID]*Entry         // entries of downstream CAs
	groups   map[spiffeid.ID]*nodeGroup // groups of nodes named by Identities
	nodes    map[spiffeid.ID]*Node
	acks     map[spiffeid.ID]*Ack
	tokens   map[string]*Token
	policies map[string]*Policy
	services policyIndex
	defaults *Defaults
	bundles  map[spiffeid.TrustDomain]*Bundle
	who      int // grows whenever other IDs are issued or other trust domains are known

	federations map[spiffeid.TrustDomain]*Federation
	revocations *revocations
	crls        map[string]*CRL // by authority
	issuers     userIssuers
	rollouts    rollouts
	hints       hints

	templates        templates // which services a namespace may speak for
	templatesChanged int
	derived          *derived

	templated   map[EntryID]*Entry // templated Identities
	templatedAt store.Revision     // of their last change

	terms map[string]store.Revision // of leaders, by their key
}

type nodeGroup struct {
	on      []spiffe.Selector
	entries int
}

func newIndex() *index {
	return &index{
		entries: map[EntryID]*Entry{}, byParent: map[spiffeid.ID]map[EntryID]*Entry{}, byID: map[spiffeid.ID]map[EntryID]*Entry{},
		similar: map[string]EntryID{}, ending: map[EntryID]*Entry{}, ended: map[EntryID]bool{}, below: map[EntryID]*Entry{}, groups: map[spiffeid.ID]*nodeGroup{}, nodes: map[spiffeid.ID]*Node{}, acks: map[spiffeid.ID]*Ack{},
		tokens: map[string]*Token{}, policies: map[string]*Policy{}, services: newPolicyIndex(), bundles: map[spiffeid.TrustDomain]*Bundle{}, federations: map[spiffeid.TrustDomain]*Federation{},
		revocations: newRevocations(), crls: map[string]*CRL{},
		issuers: newUserIssuers(), rollouts: newRollouts(), hints: newHints(), templates: templates{}, derived: newDerived(), templated: map[EntryID]*Entry{},
		terms: map[string]store.Revision{},
	}
}

// changes collects what a batch changed, for the followers.
type changes struct {
	entries     []entryChange
	policies    []policyChange
	bundles     []spiffeid.TrustDomain
	nodes       []spiffeid.ID
	defaults    bool
	federations bool
	revocations bool
	crls        bool
	issuers     bool          // documents of UserIssuers
	policySide  bool          // what goes with policies: hints, keys of issuers, roll-outs
	podNodes    []spiffeid.ID // places of pods whose nodes must look again which roots they have
	templated   bool          // templated Identities
	namespaces  bool          // which services a namespace may speak for changed, though no revision moved
	taken       bool          // SPIFFE IDs of pods' entries are, or were, those of registered ones
	roots       bool          // aliases or groups changed: which node has which roots must be worked out again
}

type entryChange struct{ old, new *Entry }
type policyChange struct{ old, new *Policy }

// apply brings one event into the index. ch may be nil.
func (ix *index) apply(td spiffeid.TrustDomain, ev store.Event, ch *changes) error {
	if ch == nil {
		ch = &changes{}
	}
	if name, ok := strings.CutPrefix(ev.Key, entryPrefix); ok {
		if err := ix.applyEntry(EntryID(name), ev, ch); err != nil {
			return err
		}
		ix.noteTemplate(EntryID(name))
		return nil
	}
	if name, ok := strings.CutPrefix(ev.Key, nodePrefix); ok {
		return ix.applyNode(td, name, ev, ch)
	}
	if name, ok := strings.CutPrefix(ev.Key, ackPrefix); ok {
		return ix.applyAck(td, name, ev)
	}
	if name, ok := strings.CutPrefix(ev.Key, tokenPrefix); ok {
		if ev.Deleted {
			delete(ix.tokens, name)
			return nil
		}
		t, err := decodeToken(name, ev.Item)
		if err != nil {
			return err
		}
		ix.tokens[name] = t
		return nil
	}
	if name, ok := strings.CutPrefix(ev.Key, policyPrefix); ok {
		return ix.applyPolicy(name, ev, ch)
	}
	if id, ok := strings.CutPrefix(ev.Key, crlPrefix); ok {
		return ix.applyCRL(id, ev, ch)
	}
	if name, ok := strings.CutPrefix(ev.Key, revocationPrefix); ok {
		return ix.applyRevocation(td, name, ev, ch)
	}
	if name, ok := strings.CutPrefix(ev.Key, bundlePrefix); ok {
		return ix.applyBundle(name, ev, ch)
	}
	if name, ok := strings.CutPrefix(ev.Key, federationPrefix); ok {
		return ix.applyFederation(td, name, ev, ch)
	}
	if name, ok := strings.CutPrefix(ev.Key, userIssuerPrefix); ok {
		ch.issuers, ch.policySide = true, true
		return ix.issuers.apply(name, ev)
	}
	if name, ok := strings.CutPrefix(ev.Key, userKeysPrefix); ok {
		ch.policySide = true
		return ix.issuers.applyKeys(name, ev)
	}
	if name, ok := strings.CutPrefix(ev.Key, rolloutPrefix); ok {
		ch.policySide = true
		return ix.rollouts.apply(name, ev)
	}
	if strings.HasPrefix(ev.Key, termPrefix) {
		ix.terms[ev.Key] = ev.Modified
		return nil
	}
	if ev.Key == rolloutGuard {
		ix.rollouts.guard = ev.Modified
		return nil
	}
	if ev.Key == defaultsKey {
		ch.defaults = true
		ix.defaults = nil
		if ev.Deleted {
			return nil
		}
		var rec policyRecord
		if err := decodeRecord(ev.Item, &rec, func() int { return rec.V }); err != nil {
			return err
		}
		ix.defaults = &Defaults{policyv1.DefaultsMode(rec.Mode), rec.Document.domain(), fromUnix(rec.CreatedAt), ev.Modified}
	}
	return nil // other prefixes belong to others
}

func (ix *index) applyEntry(id EntryID, ev store.Event, ch *changes) error {
	var new *Entry
	if !ev.Deleted {
		var err error
		if new, err = decodeEntry(id, ev.Item); err != nil {
			return err
		}
	}
	ix.dropTemplated(id, ev.Modified, ch)
	if new != nil && new.Template != nil {
		ix.changeEntry(id, ix.entries[id], nil, ch)
		ix.addTemplated(new, ev.Modified, ch)
	} else {
		ix.changeEntry(id, ix.entries[id], new, ch)
	}
	return nil
}

// changeEntry puts a registered entry in the place of another; either may be nil.
func (ix *index) changeEntry(id EntryID, old, new *Entry, ch *changes) {
	if old == nil && new == nil {
		return
	}
	if old == nil || new == nil || old.SPIFFEID != new.SPIFFEID {
		ix.who++
	}
	if old != nil {
		drop(ix.byParent, old.ParentID, id)
		drop(ix.byID, old.SPIFFEID, id)
		if ix.similar[old.similar()] == id {
			delete(ix.similar, old.similar())
		}
		ch.roots = ch.roots || old.alias()
		if g := ix.groups[old.ParentID]; g != nil {
			if g.entries--; g.entries == 0 {
				delete(ix.groups, old.ParentID)
			}
		}
	}
	delete(ix.ending, id)
	delete(ix.ended, id)
	delete(ix.below, id)
	if new == nil {
		delete(ix.entries, id)
		ix.order.remove(id)
	} else {
		if old == nil {
			ix.order.add(id)
		}
		ix.entries[id] = new
		put(ix.byParent, new.ParentID, id, new)
		put(ix.byID, new.SPIFFEID, id, new)
		ix.similar[new.similar()] = id
		if !new.ExpiresAt.IsZero() {
			ix.ending[id] = new
		}
		if new.Downstream {
			ix.below[id] = new
		}
		ch.roots = ch.roots || new.alias()
		if new.OnNodes {
			g := ix.groups[new.ParentID]
			if g == nil {
				g = &nodeGroup{on: new.On}
				ix.groups[new.ParentID] = g
				ch.roots = true
			}
			g.entries++
		}
	}
	for _, e := range []*Entry{old, new} {
		if e != nil && ix.noteHint(e.SPIFFEID) {
			ch.policySide = true
		}
	}
	ch.entries = append(ch.entries, entryChange{old, new})
	ix.retake(old, new, ch)
	ix.noteRegistered(old, new)
}

func put[K, I comparable, V any](m map[K]map[I]V, k K, id I, v V) {
	inner := m[k]
	if inner == nil {
		inner = map[I]V{}
		m[k] = inner
	}
	inner[id] = v
}

func drop[K, I comparable, V any](m map[K]map[I]V, k K, id I) {
	inner := m[k]
	delete(inner, id)
	if len(inner) == 0 {
		delete(m, k)
	}
}

func (ix *index) applyNode(td spiffeid.TrustDomain, name string, ev store.Event, ch *changes) error {
	id, err := spiffeid.FromPath(td, agentPathPrefix+name)
	if err != nil {
		return fmt.Errorf("record %s: %w", ev.Key, err)
	}
	ch.nodes = append(ch.nodes, id)
	if ev.Deleted {
		delete(ix.nodes, id)
		return nil
	}
	n, err := decodeNode(id, ev.Item)
	if err != nil {
		return err
	}
	ix.nodes[id] = n
	return nil
}
