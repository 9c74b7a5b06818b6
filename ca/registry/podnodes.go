package registry

import (
	"slices"
	"strings"
)

// NodesOfPods returns the attested agents that have shown to be on one node of a cluster, which are those that get the
// entries of its pods, in order of ID.
func (r *Registry) NodesOfPods(cluster, nodeUID string) []*Node {
	want := podNodeKey{cluster, nodeUID}
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []*Node
	for _, n := range r.ix.nodes {
		if k, ok := podNode(n); ok && k == want {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b *Node) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return out
}

// EndedTemplates returns the templated Identities whose end has come, in order of name.
func (r *Registry) EndedTemplates() []*Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []*Entry
	for _, e := range r.ix.templated {
		if e.Expired(r.ix.asOf) {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b *Entry) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return out
}
