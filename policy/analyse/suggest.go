package analyse

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

const (
	// maxSuggested bounds how many different calls a suggestion is made of.
	maxSuggested = 1 << 20
	// manyPaths is from how many paths on below one prefix a suggestion covers them by "**", for review.
	manyPaths = 40
)

// A Suggestion gathers calls that were allowed and writes the least policies that allow them.
type Suggestion struct {
	td       string
	services map[string]map[string]*wants // by service and caller
	left     int
	refused  map[string]map[string]uint64 // by service and why
	// Dropped counts the records that no policy can be made of.
	Dropped uint64
}

// wants is what one caller asked of one service.
type wants struct {
	tls  uint64
	http map[[2]string]uint64 // by method and path
	grpc map[string]uint64
}

// NewSuggestion begins one for services of a trust domain.
func NewSuggestion(td spiffeid.TrustDomain) *Suggestion {
	return &Suggestion{td: td.Name(), services: map[string]map[string]*wants{}, refused: map[string]map[string]uint64{}, left: maxSuggested}
}

// Add adds a record. Denied calls, and what a document cannot say exactly, are left out and counted.
func (s *Suggestion) Add(o *policyv1.Observation) {
	n := max(o.GetCount(), 1)
	service, err := spiffeid.FromString(o.GetService())
	if !o.GetAllowed() || err != nil || service.TrustDomain().Name() != s.td || service.Path() == "" {
		if err != nil || o.GetAllowed() {
			s.Dropped += n
		}
		return
	}
	refuse := func(why string) {
		by := s.refused[service.String()]
		if by == nil {
			by = map[string]uint64{}
			s.refused[service.String()] = by
		}
		by[why] += n
		s.Dropped += n
	}
	r, why := request(o)
	switch {
	case why != "":
		refuse(why)
		return
	case r.Peer.Path() == "":
		refuse("the caller has no path")
		return
	case s.left == 0:
		refuse("there are too many different calls")
		return
	case r.Protocol == policy.ProtocolHTTP && !suggestible(o, service, r):
		refuse("the path or the method is one that a policy cannot name exactly, or that is refused whatever the rules say")
		return
	}
	callers := s.services[service.String()]
	if callers == nil {
		callers = map[string]*wants{}
		s.services[service.String()] = callers
	}
	w := callers[r.Peer.String()]
	if w == nil {
		w = &wants{http: map[[2]string]uint64{}, grpc: map[string]uint64{}}
		callers[r.Peer.String()] = w
	}
	s.left--
	switch {
	case r.Protocol != policy.ProtocolHTTP:
		w.tls += n
	case len(r.ContentTypes) > 0:
		w.grpc[r.Path[1:]] += n
	default:
		w.http[[2]string{r.Method, generalised(r.Path)}] += n
	}
}

// suggestible reports whether a rule can say exactly this request: such a rule allows it, and it has no asterisk.
func suggestible(o *policyv1.Observation, service spiffeid.ID, r *policy.Request) bool {
	if !writable(r.Path) || !methodWritable(r.Method) || !strings.HasPrefix(r.Path, "/") {
		return false
	}
	rule := &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{o.GetPeer()}}
	if len(r.ContentTypes) > 0 {
		rule.Grpc, rule.Requires = []string{r.Path[1:]}, []string{"grpc"}
	} else {
		rule.Http, rule.Requires = []*policyv1.HTTPMatch{{Methods: []string{r.Method}, Paths: []string{r.Path}}}, []string{"http"}
	}
	p, err := policy.Compile(&policyv1.PolicySet{Format: policy.Format, TrustDomain: service.TrustDomain().Name(), Policies: []*policyv1.Policy{{
		Name: "x", Mode: policyv1.Mode_MODE_ENFORCE, Services: []string{service.String()}, Rules: []*policyv1.Rule{rule}}}})
	asked := *r
	asked.HasMethodOverride = false
	return err == nil && p.Decide(&asked).Allowed
}

// generalised writes "*" in the place of segments that look like the name of one thing among many.
func generalised(path string) string {
	segments := strings.Split(path[1:], "/")
	for i, s := range segments {
		if i > 0 && isIdentifier(s) {
			segments[i] = star
		}
	}
	return "/" + strings.Join(segments, "/")
}

// isIdentifier reports whether a segment is a number, a UUID, or a long word of digits and letters as programs make them.
func isIdentifier(s string) bool {
	digits, hex, letters, dashes := 0, 0, 0, 0
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			digits++
		case 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
			hex++
		case 'g' <= c && c <= 'z', 'G' <= c && c <= 'Z':
			letters++
		case c == '-':
			dashes++
		default:
			return false
		}
	}
	switch {
	case digits == 0:
		return false
	case digits == len(s):
		return true
	case letters == 0 && dashes == 4 && len(s) == 36: // a UUID
		return true
	case letters == 0 && dashes == 0 && len(s) >= 8: // a hash
		return true
	}
	return len(s) >= 20 && digits >= 4 && dashes <= 1
}

// Write writes the policies as YAML documents with comments for review. If service is not empty, only that of this service.
func (s *Suggestion) Write(w io.Writer, service string) error {
	var b strings.Builder
	names := map[string]bool{}
	first := true
	for _, id := range slices.Sorted(maps.Keys(s.services)) {
		if service != "" && id != service {
			continue
		}
		if !first {
			b.WriteString("---\n")
		}
		first = false
		path := strings.TrimPrefix(id, scheme+s.td)
		name := policyName(path, func(n string) bool { return names[n] })
		names[name] = true
		b.WriteString("# Made of calls that were seen and allowed. Remove what should not be, then try it out: signet policy replay.\n")
		for _, why := range slices.Sorted(maps.Keys(s.refused[id])) {
			fmt.Fprintf(&b, "# Not in here: %d calls: %s.\n", s.refused[id][why], why)
		}
		fmt.Fprintf(&b, "kind: CallPolicy\nname: %s\nservice: %s\nallow:\n", scalar(name), scalar(path))
		s.rules(&b, s.services[id])
		if _, err := io.WriteString(w, b.String()); err != nil {
			return err
		}
		b.Reset()
	}
	return nil
}

// A part is rules with the callers that they are for.
type part struct {
	callers []string
	calls   uint64
	text    string
}

// rules writes a rule for each set of calls, with all callers that made exactly these.
func (s *Suggestion) rules(b *strings.Builder, callers map[string]*wants) {
	parts := map[string]*part{}
	for _, caller := range slices.Sorted(maps.Keys(callers)) {
		w := callers[caller]
		var texts []string
		var counts []uint64
		if w.tls > 0 {
			texts, counts = append(texts, "    # REVIEW: of a connection only the caller is known, so this allows any request of it.\n"), append(counts, w.tls)
		}
		if len(w.http) > 0 {
			text, n := httpText(w.http)
			texts, counts = append(texts, text), append(counts, n)
		}
		if len(w.grpc) > 0 {
			n := uint64(0)
			for _, c := range w.grpc {
				n += c
			}
			methods := slices.Sorted(maps.Keys(w.grpc))
			texts, counts = append(texts, "    grpc: "+flow(methods, len(methods))+"\n"), append(counts, n)
		}
		for i, text := range texts {
			p := parts[text]
			if p == nil {
				p = &part{text: text}
				parts[text] = p
			}
			p.callers = append(p.callers, relative(caller, s.td))
			p.calls += counts[i]
		}
	}
	list := slices.Collect(maps.Values(parts))
	slices.SortFunc(list, func(a, b *part) int {
		return cmp.Or(strings.Compare(a.callers[0], b.callers[0]), strings.Compare(a.text, b.text))
	})
	for _, p := range list {
		fmt.Fprintf(b, "  - from: %s # %d calls\n%s", flow(p.callers, len(p.callers)), p.calls, p.text)
	}
}

// httpText groups paths by the methods that were seen on them.
func httpText(seen map[[2]string]uint64) (text string, calls uint64) {
	methods := map[string][]string{} // by path
	for key, n := range seen {
		methods[key[1]] = append(methods[key[1]], key[0])
		calls += n
	}
	byMethods := map[string][]string{}
	for path, list := range methods {
		slices.Sort(list)
		byMethods[strings.Join(list, " ")] = append(byMethods[strings.Join(list, " ")], path)
	}
	var b strings.Builder
	b.WriteString("    http:\n")
	for _, list := range slices.Sorted(maps.Keys(byMethods)) {
		paths := byMethods[list]
		slices.Sort(paths)
		words := strings.Fields(list)
		fmt.Fprintf(&b, "      - methods: %s\n        paths:\n", flow(words, len(words)))
		for _, g := range gathered(paths) {
			switch {
			case g.n > 1:
				fmt.Fprintf(&b, "          - %s # REVIEW: stands for %d paths that were seen\n", scalar(g.path), g.n)
			case strings.Contains(g.path, star):
				fmt.Fprintf(&b, "          - %s # REVIEW: * stands for numbers or identifiers that were seen\n", scalar(g.path))
			default:
				fmt.Fprintf(&b, "          - %s\n", scalar(g.path))
			}
		}
	}
	return b.String(), calls
}

type gatheredPath struct {
	path string
	n    int
}

// gathered puts prefix/** in the place of many paths below one parent. The root is never such a prefix.
func gathered(paths []string) []gatheredPath {
	parents := map[string]int{}
	parent := func(path string) string {
		p := path[:strings.LastIndexByte(path, '/')]
		if strings.HasSuffix(path, "/") {
			return "" // "/a/**" does not match "/a/"
		}
		return p
	}
	for _, p := range paths {
		if q := parent(p); q != "" {
			parents[q]++
		}
	}
	var out []gatheredPath
	done := map[string]bool{}
	for _, p := range paths {
		q := parent(p)
		switch {
		case q == "" || parents[q] < manyPaths:
			out = append(out, gatheredPath{p, 1})
		case !done[q]:
			done[q] = true
			out = append(out, gatheredPath{q + "/" + starStar, parents[q]})
		}
	}
	return out
}
