package template

import (
	"fmt"
	"strings"
)

// A Path is the template of the path of a SPIFFE ID.
type Path struct {
	source string
	parts  []part
}

func (p Path) String() string { return p.source }

// ParsePath reads the template of a path. Its first segment is fixed, so that whoever reads a policy knows whose IDs begin so;
// of the others each may hold one variable. Errors are *SyntaxErrors.
func ParsePath(s string) (Path, error) {
	if !strings.HasPrefix(s, "/") {
		return Path{}, wrong(0, "a path begins with /")
	}
	parts, err := parse(s)
	if err != nil {
		return Path{}, err
	}
	if err := onePerPiece(parts, '/', "path segment"); err != nil {
		return Path{}, err
	}
	first, _, more := strings.Cut(s[1:], "/")
	if v := strings.Index(s, "{{"); v >= 0 && (!more || v <= len(first)) {
		return Path{}, wrong(v, "the first path segment must be fixed text, such as /ns/{{ .k8s.ns }}: otherwise a pod could name the beginning of any ID")
	}
	if first == "spire" {
		return Path{}, wrong(1, "everything at and below /spire is reserved")
	}
	for _, x := range parts {
		if i := strings.IndexFunc(x.text, func(c rune) bool { return c != '/' && !isSegmentRune(c) }); i >= 0 {
			return Path{}, wrong(x.at+i, "a path of a SPIFFE ID may hold A-Z a-z 0-9 . - _ and / only")
		}
	}
	p := Path{s, parts}
	// Whatever the values are, what is around them must be a path: no empty segment, none that is . or .., no slash at its end.
	if problem := checkPath(p.with("x")); problem != "" {
		return Path{}, wrong(0, "%s", problem)
	}
	return p, nil
}

// with returns the path with one value in all places.
func (p Path) with(value string) string {
	var b strings.Builder
	for _, x := range p.parts {
		if x.v != nil {
			b.WriteString(value)
		}
		b.WriteString(x.text)
	}
	return b.String()
}

func isSegmentRune(c rune) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_'
}

// checkPath says what is wrong with a path.
func checkPath(path string) string {
	for seg := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		switch {
		case seg == "":
			return "a path segment is empty"
		case seg == "." || seg == "..":
			return "a path segment is . or .."
		}
	}
	return ""
}

// A Segment is one of a path's: the fixed text in it, and the name of the variable in it, such as "ns", if it has one.
type Segment struct{ Text, Variable string }

// Segments returns the segments of the path. A slash in the key of a label is none between segments.
func (p Path) Segments() []Segment {
	var out []Segment
	for _, x := range p.parts {
		if x.v != nil {
			out[len(out)-1].Variable = x.v.name // a path begins with a slash
			continue
		}
		first, rest, more := strings.Cut(x.text, "/")
		if first != "" {
			out[len(out)-1].Text += first
		}
		if more {
			for text := range strings.SplitSeq(rest, "/") {
				out = append(out, Segment{Text: text})
			}
		}
	}
	return out
}

// Expand returns the path for a pod, or why it has none: a variable is empty, has several values, or has one that is no part
// of a SPIFFE ID.
func (p Path) Expand(pod *Pod) (string, error) {
	path, err := expand(p.parts, pod, func(v string) string {
		if strings.ContainsFunc(v, func(c rune) bool { return !isSegmentRune(c) }) {
			return "which cannot be in a SPIFFE ID: it may hold A-Z a-z 0-9 . - _ only"
		}
		return ""
	})
	if err != nil {
		return "", err
	}
	if problem := checkPath(path); problem != "" {
		return "", fmt.Errorf("%q is no path of a SPIFFE ID: %s", clip(path), problem)
	}
	return path, nil
}
