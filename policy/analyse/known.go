package analyse

import (
	"iter"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Known is who there is: the IDs that Identities and registration entries issue, and the foreign trust domains whose bundles
// are there. It is immutable and safe for concurrent use.
type Known struct {
	td        string
	layers    []*names
	count     int
	foreign   map[string]bool
	templates []pattern
	unseen    bool // whom the templates stand for at present is not known
}

// names holds IDs segment by segment.
type names struct {
	below map[string]*names
	here  bool
}

// NewKnown gathers IDs of the trust domain td; others are left out. Foreign are the trust domains whose SVIDs can be verified.
func NewKnown(td spiffeid.TrustDomain, ids iter.Seq[spiffeid.ID], foreign []spiffeid.TrustDomain) *Known {
	k := &Known{td: td.Name(), foreign: make(map[string]bool)}
	for _, f := range foreign {
		k.foreign[f.Name()] = true
	}
	return k.With(ids)
}

// With returns who there is with further IDs.
func (k *Known) With(ids iter.Seq[spiffeid.ID]) *Known {
	with := *k
	layer := new(names)
	added := 0
	for id := range ids {
		if id.TrustDomain().Name() == k.td && id.Path() != "" && !k.Has(id) && layer.add(id.Path()) {
			added++
		}
	}
	if added > 0 {
		with.layers = append(slices.Clone(k.layers), layer)
		with.count += added
	}
	return &with
}

// WithTemplates returns who there is with what templated Identities stand for, as patterns: IDs of pods, which come and go. Unseen
// says that it is not known which pods there are; else those that are there are among the IDs.
func (k *Known) WithTemplates(patterns []string, unseen bool) *Known {
	with := *k
	with.templates = slices.Clone(k.templates)
	for _, s := range patterns {
		if p, ok := idPattern(s); ok && p.td == k.td {
			with.templates = append(with.templates, p)
		}
	}
	with.unseen = unseen && len(with.templates) > 0
	return &with
}

// may reports whether a pod could have an ID that the pattern matches.
func (k *Known) may(p pattern, wide bool) bool {
	return slices.ContainsFunc(k.templates, func(t pattern) bool {
		return t.meets(p) || wide && p.rest && t.meets(pattern{td: p.td, segments: p.segments})
	})
}

// unseenExample is an ID for a pattern of which no ID is known, and cannot be, since it is not known which pods there are.
func (k *Known) unseenExample(p pattern) (spiffeid.ID, bool) {
	if !k.unseen || !k.may(p, false) || k.any(p, false) {
		return spiffeid.ID{}, false
	}
	return p.example()
}

// Count is how many IDs there are.
func (k *Known) Count() int { return k.count }

func (n *names) add(path string) bool {
	for segment := range strings.SplitSeq(path[1:], "/") {
		next := n.below[segment]
		if next == nil {
			if n.below == nil {
				n.below = make(map[string]*names)
			}
			next = new(names)
			n.below[segment] = next
		}
		n = next
	}
	fresh := !n.here
	n.here = true
	return fresh
}

// Has reports whether the ID is issued.
func (k *Known) Has(id spiffeid.ID) bool {
	if id.TrustDomain().Name() != k.td || id.Path() == "" {
		return false
	}
	for _, n := range k.layers {
		for segment := range strings.SplitSeq(id.Path()[1:], "/") {
			if n = n.below[segment]; n == nil {
				break
			}
		}
		if n != nil && n.here {
			return true
		}
	}
	return false
}

// All returns every ID, in no order.
func (k *Known) All() iter.Seq[spiffeid.ID] { return k.matching(pattern{td: k.td, rest: true}, true) }

// matching returns the IDs that a pattern matches, in no order.
func (k *Known) matching(p pattern, wide bool) iter.Seq[spiffeid.ID] {
	return func(yield func(spiffeid.ID) bool) {
		if p.td != k.td {
			return
		}
		td, err := spiffeid.TrustDomainFromString(k.td)
		if err != nil {
			return
		}
		say := func(path []string) bool {
			id, err := spiffeid.FromSegments(td, path...)
			return err != nil || yield(id)
		}
		for _, n := range k.layers {
			if !n.walk(p, 0, wide, nil, say) {
				return
			}
		}
	}
}

func (n *names) walk(p pattern, at int, wide bool, path []string, say func([]string) bool) bool {
	if at == len(p.segments) {
		if n.here && (!p.rest || wide) && len(path) > 0 && !say(path) {
			return false
		}
		return !p.rest || n.each(at == 0 && !wide, path, say)
	}
	if segment := p.segments[at]; segment != star {
		next := n.below[segment]
		return next == nil || next.walk(p, at+1, wide, append(path, segment), say)
	}
	for segment, next := range n.below {
		if at == 0 && !wide && segment == reserved {
			continue
		}
		if !next.walk(p, at+1, wide, append(path, segment), say) {
			return false
		}
	}
	return true
}

// each says all IDs below n.
func (n *names) each(first bool, path []string, say func([]string) bool) bool {
	for segment, next := range n.below {
		if first && segment == reserved {
			continue
		}
		below := append(path, segment)
		if next.here && !say(below) || !next.each(false, below, say) {
			return false
		}
	}
	return true
}

// any reports whether there is an ID that the pattern matches.
func (k *Known) any(p pattern, wide bool) bool {
	for range k.matching(p, wide) {
		return true
	}
	return false
}
