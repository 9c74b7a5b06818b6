package registry

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

// entryOrder keeps entry IDs in order for paging. Additions and removals are buffered and merged when a page is asked
// for, so that a burst of writes costs nothing here.
type entryOrder struct {
	sorted  []EntryID
	added   map[EntryID]struct{}
	removed map[EntryID]struct{}
}

func (o *entryOrder) add(id EntryID) {
	if _, ok := o.removed[id]; ok {
		delete(o.removed, id)
		return
	}
	if o.added == nil {
		o.added = map[EntryID]struct{}{}
	}
	o.added[id] = struct{}{}
}

func (o *entryOrder) remove(id EntryID) {
	if _, ok := o.added[id]; ok {
		delete(o.added, id)
		return
	}
	if o.removed == nil {
		o.removed = map[EntryID]struct{}{}
	}
	o.removed[id] = struct{}{}
}

func (o *entryOrder) merged() []EntryID {
	if len(o.added)+len(o.removed) == 0 {
		return o.sorted
	}
	fresh := make([]EntryID, 0, len(o.added))
	for id := range o.added {
		fresh = append(fresh, id)
	}
	slices.Sort(fresh)
	out := make([]EntryID, 0, len(o.sorted)+len(fresh)) // a new slice: pages of the old one may still be read
	for _, id := range o.sorted {
		if _, gone := o.removed[id]; gone {
			continue
		}
		for len(fresh) > 0 && fresh[0] < id {
			out = append(out, fresh[0])
			fresh = fresh[1:]
		}
		out = append(out, id)
	}
	o.sorted, o.added, o.removed = append(out, fresh...), nil, nil
	return o.sorted
}

// MatchKind is how a set of selectors or trust domains in a filter relates to an entry's.
type MatchKind int

// The kinds of SPIRE's SelectorMatch.
const (
	MatchExact    MatchKind = iota // the same set
	MatchSubset                    // the entry's set is a subset of the filter's, and not empty
	MatchSuperset                  // the entry's set is a superset of the filter's
	MatchAny                       // they have something in common
)

func matches[T comparable](kind MatchKind, have, want []T) bool {
	n := 0
	for _, h := range have {
		if slices.Contains(want, h) {
			n++
		}
	}
	switch kind {
	case MatchExact:
		return n == len(have) && n == len(want)
	case MatchSubset:
		return n == len(have) && n > 0
	case MatchSuperset:
		return n == len(want)
	}
	return n > 0
}

// An EntryFilter selects entries; the zero value selects all.
type EntryFilter struct {
	SPIFFEID, ParentID spiffeid.ID
	Selectors          []spiffe.Selector
	SelectorMatch      MatchKind
	FederatesWith      []spiffeid.TrustDomain
	FederatesMatch     MatchKind
	Hint               *string
	Downstream         *bool
}

func (f *EntryFilter) match(e *Entry) bool {
	switch {
	case !f.SPIFFEID.IsZero() && e.SPIFFEID != f.SPIFFEID,
		!f.ParentID.IsZero() && e.ParentID != f.ParentID,
		len(f.Selectors) > 0 && !matches(f.SelectorMatch, e.Selectors, f.Selectors),
		len(f.FederatesWith) > 0 && !matches(f.FederatesMatch, e.FederatesWith, f.FederatesWith),
		f.Hint != nil && e.Hint != *f.Hint,
		f.Downstream != nil && e.Downstream != *f.Downstream:
		return false
	}
	return true
}

// Entry returns one entry. ErrNotFound if there is none.
func (r *Registry) Entry(id EntryID) (*Entry, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if e := r.ix.entries[id]; e != nil {
		return e, nil
	}
	return nil, ErrNotFound
}

// AnyEntry returns a registered entry, one of a pod, or what stands for a templated Identity. ErrNotFound if there is none.
func (r *Registry) AnyEntry(id EntryID) (*Entry, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if e := r.ix.templated[id]; e != nil {
		return e, nil
	}
	if e := r.ix.entry(id); e != nil {
		return e, nil
	}
	return nil, ErrNotFound
}

// ListEntries returns up to limit matching registered entries whose IDs come after the given one, in order of ID, and whether
// there are more.
func (r *Registry) ListEntries(f EntryFilter, after EntryID, limit int) (page []*Entry, more bool) {
	f.Selectors = sortedSelectors(f.Selectors)
	f.FederatesWith = sortedTrustDomains(f.FederatesWith)
	f.ParentID = NormaliseAgentID(f.ParentID)
	candidates, byID := r.candidates(&f)
	at, found := slices.BinarySearch(candidates, after)
	if found {
		at++
	}
	for _, id := range candidates[at:] {
		e := byID(id)
		if e == nil || !f.match(e) {
			continue
		}
		if len(page) == limit {
			return page, true
		}
		page = append(page, e)
	}
	return page, false
}

// CountEntries counts matching entries.
func (r *Registry) CountEntries(f EntryFilter) int {
	page, _ := r.ListEntries(f, "", int(^uint(0)>>1))
	return len(page)
}

// candidates returns the sorted IDs of the smallest set that holds all matches.
func (r *Registry) candidates(f *EntryFilter) ([]EntryID, func(EntryID) *Entry) {
	r.mu.Lock() // merged changes the order's buffers
	defer r.mu.Unlock()
	ix := r.ix
	lookup := func(id EntryID) *Entry {
		r.mu.RLock()
		defer r.mu.RUnlock()
		return ix.entries[id]
	}
	var set map[EntryID]*Entry
	switch {
	case !f.SPIFFEID.IsZero():
		set = ix.byID[f.SPIFFEID]
	case !f.ParentID.IsZero():
		set = ix.byParent[f.ParentID]
	default:
		return ix.order.merged(), lookup
	}
	ids := make([]EntryID, 0, len(set))
	for id := range set {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, lookup
}

// Node returns one attested node from memory. ErrNotFound if there is none.
func (r *Registry) Node(id spiffeid.ID) (*Node, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if n := r.ix.nodes[id]; n != nil {
		return n, nil
	}
	return nil, ErrNotFound
}

// ListNodes returns up to limit nodes that keep accepts, in order of ID, after the given ID, and whether there are more.
func (r *Registry) ListNodes(keep func(*Node) bool, after string, limit int) (page []*Node, more bool) {
	r.mu.RLock()
	all := make([]*Node, 0, len(r.ix.nodes))
	for _, n := range r.ix.nodes {
		if n.ID.String() > after && keep(n) {
			all = append(all, n)
		}
	}
	r.mu.RUnlock()
	slices.SortFunc(all, func(a, b *Node) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	if len(all) > limit {
		return all[:limit], true
	}
	return all, false
}

// Bundle returns a foreign bundle. ErrNotFound if there is none.
func (r *Registry) Bundle(td spiffeid.TrustDomain) (*Bundle, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if b := r.ix.bundles[td]; b != nil {
		return b, nil
	}
	return nil, ErrNotFound
}

// Bundles returns all foreign bundles in order of trust domain.
func (r *Registry) Bundles() []*Bundle {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]*Bundle, 0, len(r.ix.bundles))
	for _, b := range r.ix.bundles {
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b *Bundle) int { return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name()) })
	return out
}

// IsAdmin tells whether an entry that has not ended gives id the rights of an admin.
func (r *Registry) IsAdmin(id spiffeid.ID) bool {
	return r.anyEntry(id, func(e *Entry) bool { return e.Admin })
}

// IsCanary tells whether id is one that nobody should ever hold or use.
func (r *Registry) IsCanary(id spiffeid.ID) bool {
	return r.anyEntry(id, func(e *Entry) bool { return e.Canary })
}

// IsDownstream tells whether an entry that has not ended gives id the rights of a downstream CA.
func (r *Registry) IsDownstream(id spiffeid.ID) bool {
	return r.anyEntry(id, func(e *Entry) bool { return e.Downstream })
}

// HasDownstream tells whether an entry that has not ended makes anybody a downstream CA.
func (r *Registry) HasDownstream() bool {
	now := r.c.Now()
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, e := range r.ix.below {
		if !e.Expired(now) {
			return true
		}
	}
	return false
}

func (r *Registry) anyEntry(id spiffeid.ID, has func(*Entry) bool) bool {
	now := r.c.Now()
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, e := range r.ix.byID[id] {
		if has(e) && !e.Expired(now) {
			return true
		}
	}
	return false
}

// Counts returns how many entries, nodes and policies there are.
func (r *Registry) Counts() (entries, nodes, policies int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.ix.entries), len(r.ix.nodes), len(r.ix.policies)
}

// MatchSelectors tells whether have relates to want as kind says.
func MatchSelectors(kind MatchKind, have, want []spiffe.Selector) bool {
	return matches(kind, have, want)
}
