package spiffe

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	// MaxSelectorTypeBytes is the longest type of a selector in bytes.
	MaxSelectorTypeBytes = 64
	// MaxSelectorValueBytes is the longest value of a selector in bytes.
	MaxSelectorValueBytes = 4096
)

// A Selector is one property of a node or a process that attestation found, such as type "unix" with value "uid:1000".
// Two selectors are the same if they are equal byte for byte. One that did not come from [ParseSelector] may be invalid.
type Selector struct {
	// Type says which attestor speaks: printable ASCII without a colon.
	Type string
	// Value is the property. It is not empty, is UTF-8, and may hold colons.
	Value string
}

// ParseSelector parses a selector of the form "type:value". The first colon ends the type.
func ParseSelector(s string) (Selector, error) {
	typ, value, found := strings.Cut(s, ":")
	if !found {
		return Selector{}, fmt.Errorf("selector %q is not of the form type:value, such as unix:uid:1000", excerpt(s))
	}
	selector := Selector{Type: typ, Value: value}
	if err := selector.Check(); err != nil {
		return Selector{}, err
	}
	return selector, nil
}

// Check says whether the selector is one that [ParseSelector] could have returned. Selectors that arrive in two fields
// are checked with it.
func (s Selector) Check() error {
	switch {
	case s.Type == "":
		return fmt.Errorf("selector %q has no type, write it as type:value, such as unix:uid:1000", excerpt(s.String()))
	case len(s.Type) > MaxSelectorTypeBytes:
		return fmt.Errorf("selector type %q has %d bytes, at most %d are allowed", excerpt(s.Type), len(s.Type), MaxSelectorTypeBytes)
	case s.Value == "":
		return fmt.Errorf("selector %q has no value, write it as type:value, such as unix:uid:1000", excerpt(s.String()))
	case len(s.Value) > MaxSelectorValueBytes:
		return fmt.Errorf("selector value %q has %d bytes, at most %d are allowed", excerpt(s.Value), len(s.Value), MaxSelectorValueBytes)
	case !utf8.ValidString(s.Value):
		return fmt.Errorf("selector value %q is not valid UTF-8", excerpt(s.Value))
	}
	for i := range len(s.Type) {
		if c := s.Type[i]; c <= ' ' || c > '~' || c == ':' {
			return fmt.Errorf("selector type %q has the byte %q, allowed are printable ASCII characters without space and colon", excerpt(s.Type), s.Type[i:i+1])
		}
	}
	return nil
}

// String returns the selector as type:value, as [ParseSelector] reads it. The value is not escaped: print it with %q
// where it meets a terminal.
func (s Selector) String() string { return s.Type + ":" + s.Value }
