package registry

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/policy"
)

// What concerns an agent: the entries that descend from it, from a node alias whose selectors it has, or from a group
// of nodes that it belongs to; the policies of those entries' IDs, cut down to these IDs; the bundles that those
// entries federate with; and the bundle of the trust domain. Nothing else ever leaves for it. [DESIGN §4]

// roots returns the IDs whose descendants the node may serve: its own, its aliases', its groups'. nil if it is not
// attested or banned.
func (ix *index) roots(td spiffeid.TrustDomain, agent spiffeid.ID, now time.Time) map[spiffeid.ID]bool {
	n := ix.nodes[agent]
	if n == nil || n.Banned {
		return nil
	}
	return ix.rootsOf(td, n, now)
}

// rootsOf returns what would be the roots of a node if it were not banned.
func (ix *index) rootsOf(td spiffeid.TrustDomain, n *Node, now time.Time) map[spiffeid.ID]bool {
	roots := map[spiffeid.ID]bool{n.ID: true}
	for _, e := range ix.byParent[ServerID(td)] {
		if e.alias() && !e.Expired(now) && matches(MatchSuperset, n.Selectors, e.Selectors) {
			roots[e.SPIFFEID] = true
		}
	}
	for id, g := range ix.groups {
		if matches(MatchSuperset, n.Selectors, g.on) {
			roots[id] = true
		}
	}
	ix.podRoots(td, n, roots)
	return roots
}

// descend calls visit for each entry that descends from roots, once.
func (ix *index) descend(roots map[spiffeid.ID]bool, now time.Time, visit func(*Entry)) {
	seen := make(map[spiffeid.ID]bool, len(roots))
	queue := make([]spiffeid.ID, 0, len(roots))
	for id := range roots {
		seen[id] = true
		queue = append(queue, id)
		for _, e := range ix.derived.byRoot[id] {
			if ix.holds(e, now) {
				visit(e)
			}
		}
	}
	for len(queue) > 0 {
		parent := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		for _, e := range ix.byParent[parent] {
			if e.alias() || e.Expired(now) {
				continue
			}
			visit(e)
			if !seen[e.SPIFFEID] {
				seen[e.SPIFFEID] = true
				queue = append(queue, e.SPIFFEID)
			}
		}
	}
}

// ascend returns every ID that e descends from.
func (ix *index) ascend(e *Entry, now time.Time) map[spiffeid.ID]bool {
	up := map[spiffeid.ID]bool{e.ParentID: true}
	queue := []spiffeid.ID{e.ParentID}
	for len(queue) > 0 {
		id := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		for _, p := range ix.byID[id] {
			if p.alias() || p.Expired(now) || up[p.ParentID] {
				continue
			}
			up[p.ParentID] = true
			queue = append(queue, p.ParentID)
		}
	}
	return up
}

// Scope returns all entries that the agent may serve now, in order of ID, as of one revision. It is nil, and attested
// false, if the index knows no such node or knows that it is banned.
func (r *Registry) Scope(agent spiffeid.ID) (entries []*Entry, attested bool) {
	now := r.c.Now()
	r.mu.RLock()
	roots := r.ix.roots(r.c.TrustDomain, agent, now)
	if roots != nil {
		attested = true
		r.ix.descend(roots, now, func(e *Entry) { entries = append(entries, e) })
	}
	r.mu.RUnlock()
	slices.SortFunc(entries, func(a, b *Entry) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return entries, attested
}

// AuthorizedEntry returns the entry if the agent may serve it now. ErrNotFound otherwise, whether it exists or not.
func (r *Registry) AuthorizedEntry(agent spiffeid.ID, id EntryID) (*Entry, error) {
	if e := r.AuthorizedEntries(agent, []EntryID{id})[0]; e != nil {
		return e, nil
	}
	return nil, ErrNotFound
}

// AuthorizedEntries is AuthorizedEntry for many: positional, nil for those that the agent may not serve.
func (r *Registry) AuthorizedEntries(agent spiffeid.ID, ids []EntryID) []*Entry {
	now := r.c.Now()
	out := make([]*Entry, len(ids))
	r.mu.RLock()
	defer r.mu.RUnlock()
	roots := r.ix.roots(r.c.TrustDomain, agent, now)
	for i, id := range ids {
		if e := r.ix.entry(id); e != nil && r.ix.serves(roots, e, now) {
			out[i] = e
		}
	}
	return out
}

// Serves says of each SPIFFE ID whether the agent may serve it now.
func (r *Registry) Serves(agent spiffeid.ID, ids []spiffeid.ID) []bool {
	now := r.c.Now()
	out := make([]bool, len(ids))
	r.mu.RLock()
	defer r.mu.RUnlock()
	roots := r.ix.roots(r.c.TrustDomain, agent, now)
	for i, id := range ids {
		for e := range r.ix.holders(id) {
			if r.ix.serves(roots, e, now) {
				out[i] = true
				break
			}
		}
	}
	return out
}

// serves says whether e descends from one of roots.
func (ix *index) serves(roots map[spiffeid.ID]bool, e *Entry, now time.Time) bool {
	if e.alias() || e.Expired(now) || len(roots) == 0 {
		return false
	}
	if e.Pod != nil {
		return roots[e.ParentID] && ix.takenBy(e) == nil
	}
	if roots[e.ParentID] {
		return true
	}
	for up := range ix.ascend(e, now) {
		if roots[up] {
			return true
		}
	}
	return false
}

// servicesOf returns those of a policy's services that name one of ids, and nil if none does.
func servicesOf(p *Policy, ids map[spiffeid.ID]int) []string {
	var out []string
	for _, s := range p.Compiled.Services {
		if _, wild := beforeWildcard(s); !wild {
			if id, err := spiffeid.FromString(s); err == nil && ids[id] != 0 && policy.ServiceMatches(s, id) {
				out = append(out, s)
			}
			continue
		}
		for id := range ids {
			if policy.ServiceMatches(s, id) {
				out = append(out, s)
				break
			}
		}
	}
	return out
}
