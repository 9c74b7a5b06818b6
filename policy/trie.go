package policy

import "strings"

// A trie finds the patterns that match a path, segment by segment. Every node is reached in one way only, so a walk
// costs at most as many steps as the path has matching prefixes: one for each way in which patterns put "*" in the place
// of its segments, whatever the number of patterns.
type trie[T any] struct {
	// Most nodes have one child, and a long pattern has many nodes: the first child needs no map.
	segment string
	child   *trie[T]
	more    map[string]*trie[T]
	star    *trie[T]
	here    *T // patterns that end here
	rest    *T // patterns that end here with "**"
}

// at returns the place of a pattern, and makes it if need be.
func (t *trie[T]) at(segments []string, rest bool) *T {
	for _, segment := range segments {
		next := t.star
		if segment != anySegment {
			next = t.next(segment)
		}
		if next == nil {
			next = t.grow(segment)
		}
		t = next
	}
	place := &t.here
	if rest {
		place = &t.rest
	}
	if *place == nil {
		*place = new(T)
	}
	return *place
}

func (t *trie[T]) grow(segment string) *trie[T] {
	next := new(trie[T])
	switch {
	case segment == anySegment:
		t.star = next
	case t.child == nil:
		t.segment, t.child = segment, next
	default:
		if t.more == nil {
			t.more = make(map[string]*trie[T])
		}
		t.more[segment] = next
	}
	return next
}

// next returns the node for a segment that patterns write out, or nil.
func (t *trie[T]) next(segment string) *trie[T] {
	if t.child != nil && t.segment == segment {
		return t.child
	}
	return t.more[segment]
}

// cut splits a path that begins with a slash into its first segment and what follows, which is empty or begins with a
// slash.
func cut(path string) (segment, rest string) {
	path = path[1:]
	if i := strings.IndexByte(path, '/'); i >= 0 {
		return path[:i], path[i:]
	}
	return path, ""
}

// decoded is next(segment) for a segment with escapes. It is apart from its caller so that only such segments pay
// for the buffer.
//
//go:noinline
func (t *trie[T]) decoded(segment string) *trie[T] {
	var buf [maxPath]byte
	name := unescape(buf[:0], segment)
	if t.child != nil && t.segment == string(name) {
		return t.child
	}
	return t.more[string(name)]
}
