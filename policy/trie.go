package policy

import "strings"

// A trie finds the patterns that match a path, segment by segment. Every node is reached in one way only, so a walk
// costs at most as many steps as the path has matching prefixes, whatever the number of patterns.
type trie[T any] struct {
	children map[string]*trie[T]
	star     *trie[T]
	here     *T // patterns that end here
	rest     *T // patterns that end here with "**"
}

// at returns the place of a pattern, and makes it if need be.
func (t *trie[T]) at(segments []string, rest bool) *T {
	for _, segment := range segments {
		if segment == star {
			if t.star == nil {
				t.star = new(trie[T])
			}
			t = t.star
			continue
		}
		if t.children == nil {
			t.children = make(map[string]*trie[T])
		}
		child := t.children[segment]
		if child == nil {
			child = new(trie[T])
			t.children[segment] = child
		}
		t = child
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

// cut splits a path that begins with a slash into its first segment and what follows, which is empty or begins with a
// slash.
func cut(path string) (segment, rest string) {
	path = path[1:]
	if i := strings.IndexByte(path, '/'); i >= 0 {
		return path[:i], path[i:]
	}
	return path, ""
}

// decoded is children[segment] for a segment with escapes. It is apart from its caller so that only such segments pay
// for the buffer.
//
//go:noinline
func (t *trie[T]) decoded(segment string) *trie[T] {
	var buf [maxPath]byte
	return t.children[string(unescape(buf[:0], segment))]
}
