// Package nearmiss compares what a registration entry asks of a process with what the process is, and says of each
// selector that does not hold in which way: a typing error, another spelling of the same file or image, another value, or
// nothing of the kind. It is pure; what only the machine knows, such as symbolic links, it asks of a Host. The agent
// compares with the entries it holds, the command line with those of the CA.
package nearmiss

import (
	"cmp"
	"slices"
	"strings"
	"unicode"

	"github.com/signet-id/signet/spiffe"
)

// A Kind is in which way a selector does not hold.
type Kind string

// The kinds, from the nearest to the farthest.
const (
	Case          Kind = "case"            // upper and lower case apart, it is the same
	Space         Kind = "space"           // white space apart, it is the same
	PathAlias     Kind = "path_alias"      // another name of the same file
	ImageForm     Kind = "image_form"      // the same image, with or without registry, tag or digest
	NameForNumber Kind = "name_for_number" // a name where a number belongs, or the other way round
	Supplementary Kind = "supplementary"   // a supplementary group where a primary one is asked for, or the other way round
	Typo          Kind = "typo"            // a letter or two apart
	Hash          Kind = "hash"            // another content
	Value         Kind = "value"           // another value
	Absent        Kind = "absent"          // the process has nothing of this kind
	TypeAbsent    Kind = "type_absent"     // nothing attests selectors of this type
	Contradiction Kind = "contradiction"   // the entry asks for two values of which a process has only one
)

// costs say how far each kind is from holding.
var costs = map[Kind]int{Case: 1, Space: 1, PathAlias: 1, ImageForm: 1, NameForNumber: 1, Supplementary: 1, Typo: 2, Contradiction: 3, Hash: 3, Value: 5, Absent: 6, TypeAbsent: 6}

// Cost is how far from holding it is.
func (k Kind) Cost() int { return costs[k] }

// Near says whether the kind is a likely mistake by itself.
func (k Kind) Near() bool { return costs[k] < costs[Value] }

// A Difference is one selector that does not hold.
type Difference struct {
	Want spiffe.Selector
	Kind Kind
	// Have are the values of the process in its place, the likeliest first.
	Have []spiffe.Selector
}

// A Host knows what only the machine does. A nil function knows nothing.
type Host struct {
	// SamePath says whether both are names of one file.
	SamePath func(a, b string) bool
}

// A Result is how an entry and a process compare.
type Result struct {
	// Held counts the selectors that hold.
	Held        int
	Differences []Difference
	// Cost is how far the entry is from matching: 0 if it does.
	Cost int
}

// Near says whether the entry is likely to be meant for the process: something holds, or is nearly the same.
func (r Result) Near() bool {
	return r.Held > 0 || slices.ContainsFunc(r.Differences, func(d Difference) bool { return d.Kind.Near() })
}

// Order sorts the nearest first.
func (r Result) Order(o Result) int {
	return cmp.Or(cmp.Compare(r.Cost, o.Cost), cmp.Compare(o.Held, r.Held))
}

// A Subject is a process as attestation sees it.
type Subject struct {
	has   map[spiffe.Selector]struct{}
	byKey map[string][]spiffe.Selector
	types map[string]bool
	host  Host
}

// NewSubject prepares comparing. types are those of selectors that are attested here at all.
func NewSubject(selectors []spiffe.Selector, types []string, host Host) *Subject {
	s := &Subject{has: map[spiffe.Selector]struct{}{}, byKey: map[string][]spiffe.Selector{}, types: map[string]bool{}, host: host}
	for _, t := range types {
		s.types[t] = true
	}
	for _, sel := range selectors {
		s.has[sel] = struct{}{}
		key := keyOf(sel)
		s.byKey[key] = append(s.byKey[key], sel)
	}
	return s
}

// Compare says which of an entry's selectors hold, and why the others do not.
func (s *Subject) Compare(want []spiffe.Selector) Result {
	var r Result
	contradicted := contradictions(want)
	for _, w := range want {
		if _, ok := s.has[w]; ok {
			r.Held++
			continue
		}
		d := s.difference(w)
		if contradicted[keyOf(w)] {
			d.Kind = Contradiction
		}
		r.Differences = append(r.Differences, d)
		r.Cost += costs[d.Kind]
	}
	return r
}

// keyed are the kinds of selectors whose value has a name of its own in front, such as pod-label:app:web.
var keyed = map[string]bool{"pod-label": true, "ns-label": true, "node-label": true, "label": true, "env": true, "pod-owner": true}

// keyOf names what a selector is about: its type, its kind, and for labels the label.
func keyOf(s spiffe.Selector) string {
	kind, rest, ok := strings.Cut(s.Value, ":")
	if !ok {
		return s.Type
	}
	if keyed[kind] {
		name, _, _ := strings.Cut(rest, ":")
		return s.Type + ":" + kind + ":" + name
	}
	return s.Type + ":" + kind
}

// valueOf is what comes after the key.
func valueOf(s spiffe.Selector) string {
	return strings.TrimPrefix(strings.TrimPrefix(s.String(), keyOf(s)), ":")
}

// single are the kinds of which a process has one value at most.
var single = map[string]bool{
	"unix:uid": true, "unix:user": true, "unix:gid": true, "unix:group": true, "unix:path": true, "unix:sha256": true,
	"k8s:ns": true, "k8s:sa": true, "k8s:pod-name": true, "k8s:pod-uid": true, "k8s:container-name": true, "k8s:node-name": true,
	"systemd:id": true, "systemd:fragment_path": true, "systemd:slice": true,
}

// contradictions are the keys of which an entry asks for more values than a process can have.
func contradictions(want []spiffe.Selector) map[string]bool {
	seen, twice := map[string]string{}, map[string]bool{}
	for _, w := range want {
		key := keyOf(w)
		if !single[key] && !strings.Contains(key, "-label:") && !strings.HasPrefix(key, "docker:label:") {
			continue
		}
		if before, ok := seen[key]; ok && before != w.Value {
			twice[key] = true
		}
		seen[key] = w.Value
	}
	return twice
}

// difference says in which way w does not hold.
func (s *Subject) difference(w spiffe.Selector) Difference {
	if !s.types[w.Type] {
		lower := spiffe.Selector{Type: strings.ToLower(w.Type), Value: w.Value}
		if slices.Contains(s.byKey[keyOf(lower)], lower) {
			return Difference{Want: w, Kind: Case, Have: []spiffe.Selector{lower}}
		}
		return Difference{Want: w, Kind: TypeAbsent}
	}
	key := keyOf(w)
	have := slices.Clone(s.byKey[key])
	if d, ok := s.byNumber(w, key); ok {
		return d
	}
	if other, ok := groups[key]; ok {
		for _, h := range s.byKey[other] {
			if valueOf(h) == valueOf(w) {
				return Difference{Want: w, Kind: Supplementary, Have: []spiffe.Selector{h}}
			}
		}
	}
	if len(have) == 0 {
		return s.elsewhere(w, key)
	}
	kinds := make(map[spiffe.Selector]Kind, len(have))
	for _, h := range have {
		kinds[h] = s.kind(key, valueOf(w), valueOf(h))
	}
	slices.SortStableFunc(have, func(a, b spiffe.Selector) int { return cmp.Compare(costs[kinds[a]], costs[kinds[b]]) })
	return Difference{Want: w, Kind: kinds[have[0]], Have: have}
}

// elsewhere looks for the same value under another name: that of a label with a typing error.
func (s *Subject) elsewhere(w spiffe.Selector, key string) Difference {
	d := Difference{Want: w, Kind: Absent}
	for other, have := range s.byKey {
		typ, _, _ := strings.Cut(other, ":")
		if typ != w.Type {
			continue
		}
		if strings.EqualFold(other, key) || nearly(other, key) && distance(other, key) <= 2 {
			for _, h := range have {
				if valueOf(h) == valueOf(w) {
					kind := Typo
					if strings.EqualFold(other, key) {
						kind = Case
					}
					return Difference{Want: w, Kind: kind, Have: []spiffe.Selector{h}}
				}
			}
		}
	}
	return d
}

// numbers are the kinds that are numbers, with the kinds that are names of the same.
var numbers = map[string]string{"unix:uid": "unix:user", "unix:gid": "unix:group", "unix:supplementary_gid": "unix:supplementary_group"}

// groups are the kinds of groups, with those that look the same and are not.
var groups = map[string]string{
	"unix:gid": "unix:supplementary_gid", "unix:supplementary_gid": "unix:gid",
	"unix:group": "unix:supplementary_group", "unix:supplementary_group": "unix:group",
}

// byNumber finds a name where a number belongs, such as uid:web, and a number where a name belongs.
func (s *Subject) byNumber(w spiffe.Selector, key string) (Difference, bool) {
	value := valueOf(w)
	for number, name := range numbers {
		other := ""
		switch {
		case key == number && !digits(value):
			other = name
		case key == name && digits(value):
			other = number
		default:
			continue
		}
		for _, h := range s.byKey[other] {
			if valueOf(h) == value {
				return Difference{Want: w, Kind: NameForNumber, Have: []spiffe.Selector{h}}, true
			}
		}
	}
	return Difference{}, false
}

func digits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// kind compares two values of one key.
func (s *Subject) kind(key, want, have string) Kind {
	switch {
	case strings.EqualFold(want, have):
		return Case
	case squeeze(want) == squeeze(have):
		return Space
	case key == "unix:path" && s.samePath(want, have):
		return PathAlias
	case strings.Contains(key, "image") && sameImage(want, have):
		return ImageForm
	case strings.HasSuffix(key, ":sha256"), strings.Contains(key, "digest"):
		return Hash
	case digits(want) || digits(have): // of two numbers, one is no slip of the other
		return Value
	case nearly(want, have), key == "unix:path" && nearly(cleaned(want), cleaned(have)):
		return Typo
	}
	return Value
}

func squeeze(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return r
	}, strings.TrimRight(s, "/"))
}

func (s *Subject) samePath(want, have string) bool {
	if cleaned(want) == cleaned(have) {
		return true
	}
	return s.host.SamePath != nil && s.host.SamePath(want, have)
}

// cleaned leaves out what makes no difference on a system where /bin is /usr/bin.
func cleaned(path string) string {
	var parts []string
	for p := range strings.SplitSeq(path, "/") {
		if p != "" && p != "." {
			parts = append(parts, p)
		}
	}
	if len(parts) > 1 && parts[0] == "usr" && (parts[1] == "bin" || parts[1] == "sbin" || strings.HasPrefix(parts[1], "lib")) {
		parts = parts[1:]
	}
	return strings.Join(parts, "/")
}

// sameImage says whether two references may name the same image: the registry and library that Docker adds, a tag or a
// digest that only one of them has, or another tag.
func sameImage(a, b string) bool { return repository(a) == repository(b) && repository(a) != "" }

func repository(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref = ref[:i]
	}
	for _, registry := range []string{"docker.io/", "index.docker.io/", "registry-1.docker.io/"} {
		ref = strings.TrimPrefix(ref, registry)
	}
	return strings.TrimPrefix(ref, "library/")
}

// maxTyped bounds the values in which typing errors are looked for; the comparison takes their product.
const maxTyped = 256

// nearly says whether two values are a slip or two apart, by their length.
func nearly(a, b string) bool {
	if len(a) > maxTyped || len(b) > maxTyped {
		return false
	}
	allowed := 2
	if min(len(a), len(b)) < 5 {
		allowed = 1
	}
	if min(len(a), len(b)) < 2 {
		return false
	}
	return distance(a, b) <= allowed
}

// distance counts the insertions, deletions, replacements and swaps of neighbours that make a into b.
func distance(a, b string) int {
	ra, rb := []rune(a), []rune(b)
	before, last, row := make([]int, len(rb)+1), make([]int, len(rb)+1), make([]int, len(rb)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(ra); i++ {
		row[0] = i
		for j := 1; j <= len(rb); j++ {
			same := 1
			if ra[i-1] == rb[j-1] {
				same = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+same)
			if i > 1 && j > 1 && ra[i-1] == rb[j-2] && ra[i-2] == rb[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(rb)]
}
