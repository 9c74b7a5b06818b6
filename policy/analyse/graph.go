package analyse

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// maxEdges is from how many edges on a Graph groups IDs by their first segments.
const maxEdges = 400

// An EdgeKind says how what may be and what is differ.
type EdgeKind string

const (
	EdgeBoth   EdgeKind = "used"   // may call, and does
	EdgeMay    EdgeKind = "unused" // may call, and was not seen to
	EdgeDenied EdgeKind = "denied" // was seen to call, and would be denied
)

// A Graph says who may call whom, who does, and the difference.
type Graph struct {
	Edges []Edge
	// Grouped is how many segments of each ID are left; 0: all.
	Grouped int
	// Seen says that calls were looked at; without them every edge is unused.
	Seen bool
	// Complete is false if there were so many that not all are in it.
	Complete bool
}

// An Edge is calls from one ID, pattern or group to another.
type Edge struct {
	From, To string
	Kind     EdgeKind
	Calls    uint64
}

// NewGraph makes the graph of a set and of allowed calls that were seen; nil: none were looked at. Service, if not empty,
// leaves only the edges to and from this ID.
func NewGraph(set *policyv1.PolicySet, known *Known, seen []*policyv1.Observation, service string) (*Graph, error) {
	g := &Graph{Seen: seen != nil, Complete: true}
	j, err := newJudge(set, conditionsOf(set))
	if err != nil {
		return nil, err
	}
	type pair struct{ from, to string }
	edges := map[pair]*Edge{}
	td := set.GetTrustDomain()
	left := maxDecisions
	may := func(from, to named) {
		if left -= 2; left <= 0 {
			g.Complete = false
			return
		}
		if service != "" && from.name != service && to.name != service || from.name == to.name {
			return
		}
		for _, p := range j.views[:min(len(j.views), 2)] {
			if p.MightAllow(to.id, from.id).Allowed {
				key := pair{relative(from.name, td), relative(to.name, td)}
				edges[key] = &Edge{From: key.from, To: key.to, Kind: EdgeMay}
				return
			}
		}
	}
	ids := func(s string) []named {
		p, ok := idPattern(s)
		if !ok {
			return nil
		}
		var out []named
		for id := range known.matching(p, false) {
			if out = append(out, named{id.String(), id}); len(out) > 10_000 {
				break
			}
		}
		if id, ok := p.example(); ok && len(out) == 0 {
			out = append(out, named{s, id})
		}
		return out
	}
	for _, p := range set.GetPolicies() {
		for _, to := range p.GetServices() {
			for _, t := range ids(to) {
				for _, r := range p.GetRules() {
					for i := 0; !isDeny(r) && i < len(r.GetFrom()) && left > 0; i++ {
						for _, f := range ids(r.GetFrom()[i]) {
							may(f, t)
						}
					}
				}
			}
		}
	}
	replay := &Replay{j}
	for _, o := range seen {
		if !o.GetAllowed() || service != "" && o.GetPeer() != service && o.GetService() != service {
			continue
		}
		if _, err := spiffeid.FromString(o.GetPeer()); err != nil {
			continue
		}
		key := pair{relative(o.GetPeer(), td), relative(o.GetService(), td)}
		e := edges[key]
		if e == nil {
			e = &Edge{From: key.from, To: key.to, Kind: EdgeBoth}
			edges[key] = e
		}
		if e.Calls += max(o.GetCount(), 1); e.Kind == EdgeMay {
			e.Kind = EdgeBoth
		}
		if d := replay.Decide(o); d.After == VerdictDeny {
			e.Kind = EdgeDenied
		}
	}
	for _, e := range edges {
		g.Edges = append(g.Edges, *e)
	}
	g.sort()
	for keep := 3; len(g.Edges) > maxEdges && keep > 0; keep-- {
		g.group(keep)
	}
	if len(g.Edges) > maxEdges {
		g.Edges, g.Complete = g.Edges[:maxEdges], false
	}
	return g, nil
}

func (g *Graph) sort() {
	slices.SortFunc(g.Edges, func(a, b Edge) int { return cmp.Or(strings.Compare(a.From, b.From), strings.Compare(a.To, b.To)) })
}

// group cuts every ID to its first segments.
func (g *Graph) group(keep int) {
	g.Grouped = keep
	cut := func(s string) string {
		path, head := s, ""
		if rest, found := strings.CutPrefix(s, scheme); found {
			td, below, _ := strings.Cut(rest, "/")
			head, path = scheme+td, "/"+below
		}
		segments := strings.Split(path[1:], "/")
		if len(segments) <= keep {
			return s
		}
		return head + "/" + strings.Join(segments[:keep], "/") + "/..."
	}
	merged := map[[2]string]*Edge{}
	worse := map[EdgeKind]int{EdgeMay: 0, EdgeBoth: 1, EdgeDenied: 2}
	for _, e := range g.Edges {
		key := [2]string{cut(e.From), cut(e.To)}
		m := merged[key]
		if m == nil {
			m = &Edge{From: key[0], To: key[1], Kind: e.Kind}
			merged[key] = m
		}
		m.Calls += e.Calls
		if worse[e.Kind] > worse[m.Kind] {
			m.Kind = e.Kind
		}
	}
	g.Edges = nil
	for _, e := range merged {
		g.Edges = append(g.Edges, *e)
	}
	g.sort()
}

func (g *Graph) nodes() []string {
	seen := map[string]bool{}
	for _, e := range g.Edges {
		seen[e.From], seen[e.To] = true, true
	}
	return slices.Sorted(maps.Keys(seen))
}

func (e Edge) label() string {
	if e.Calls == 0 {
		return ""
	}
	return fmt.Sprintf("%d calls", e.Calls)
}

// DOT writes the graph for Graphviz.
func (g *Graph) DOT() string {
	var b strings.Builder
	b.WriteString("digraph calls {\n  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\"];\n")
	quote := func(s string) string { return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(plain(s)) + `"` }
	styles := map[EdgeKind]string{EdgeBoth: "color=black", EdgeMay: "color=gray50, style=dashed", EdgeDenied: "color=red, penwidth=2"}
	for _, n := range g.nodes() {
		fmt.Fprintf(&b, "  %s;\n", quote(n))
	}
	for _, e := range g.Edges {
		fmt.Fprintf(&b, "  %s -> %s [%s, tooltip=%s, label=%s];\n", quote(e.From), quote(e.To), styles[e.Kind], quote(string(e.Kind)), quote(e.label()))
	}
	b.WriteString("}\n")
	return b.String()
}

// Mermaid writes the graph for Mermaid.
func (g *Graph) Mermaid() string {
	var b strings.Builder
	b.WriteString("flowchart LR\n")
	quote := func(s string) string {
		return `"` + strings.NewReplacer("#", "#35;", `"`, "#quot;", "<", "#lt;", ">", "#gt;", "&", "#amp;").Replace(plain(s)) + `"`
	}
	index := map[string]int{}
	for i, n := range g.nodes() {
		index[n] = i
		fmt.Fprintf(&b, "  n%d[%s]\n", i, quote(n))
	}
	arrows := map[EdgeKind]string{EdgeBoth: "-->", EdgeMay: "-.->", EdgeDenied: "==>"}
	var denied []string
	for i, e := range g.Edges {
		label := ""
		if text := e.label(); text != "" {
			label = "|" + quote(text) + "|"
		}
		fmt.Fprintf(&b, "  n%d %s%s n%d\n", index[e.From], arrows[e.Kind], label, index[e.To])
		if e.Kind == EdgeDenied {
			denied = append(denied, fmt.Sprint(i))
		}
	}
	if len(denied) > 0 {
		fmt.Fprintf(&b, "  linkStyle %s stroke:red\n", strings.Join(denied, ","))
	}
	return b.String()
}

// plain replaces what a reader or a terminal could take for something else than text.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return '?'
		}
		return r
	}, s)
}

// layers puts each node one to the right of those that call it, as far as there is no circle.
func (g *Graph) layers(nodes []string) map[string]int {
	callers := map[string][]string{}
	for _, e := range g.Edges {
		if e.From != e.To {
			callers[e.To] = append(callers[e.To], e.From)
		}
	}
	layer, state := map[string]int{}, map[string]int{}
	var depth func(n string) int
	depth = func(n string) int {
		if state[n] == 2 {
			return layer[n]
		}
		state[n] = 1
		most := 0
		for _, c := range callers[n] {
			if state[c] != 1 { // not in a circle
				most = max(most, depth(c)+1)
			}
		}
		layer[n], state[n] = most, 2
		return most
	}
	for _, n := range nodes {
		depth(n)
	}
	return layer
}

// SVG draws the graph: callers left of those they call.
func (g *Graph) SVG() string {
	const width, height, gapX, gapY, margin, letters = 260, 28, 120, 14, 30, 34
	text := func(s string) string {
		var b strings.Builder
		_ = xml.EscapeText(&b, []byte(plain(s)))
		return b.String()
	}
	nodes := g.nodes()
	layer := g.layers(nodes)
	rows := map[int]int{}
	type point struct{ x, y int }
	at := map[string]point{}
	w, h := 0, 0
	for _, n := range nodes {
		l := layer[n]
		at[n] = point{margin + l*(width+gapX), margin + 60 + rows[l]*(height+gapY)}
		rows[l]++
		w, h = max(w, at[n].x+width+margin), max(h, at[n].y+height+margin)
	}
	w, h = max(w, 620), max(h, 120)
	count := map[EdgeKind]int{}
	for _, e := range g.Edges {
		count[e.Kind]++
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" aria-labelledby="title desc">`+"\n", w, h, w, h)
	fmt.Fprintf(&b, "<title id=\"title\">Who may call whom, and who does</title>\n<desc id=\"desc\">%d callers and services; %d used, %d allowed but never seen, %d seen but to be denied.</desc>\n", len(nodes), count[EdgeBoth], count[EdgeMay], count[EdgeDenied])
	b.WriteString("<style>text{font:12px sans-serif}rect{fill:#fff;stroke:#333}path{fill:none}.used{stroke:#222}.unused{stroke:#888;stroke-dasharray:5 4}.denied{stroke:#c00;stroke-width:2.5}</style>\n")
	fmt.Fprintf(&b, "<rect x=\"0\" y=\"0\" width=\"%d\" height=\"%d\" style=\"stroke:none\"/>\n", w, h)
	b.WriteString("<defs><marker id=\"a\" viewBox=\"0 0 10 10\" refX=\"10\" refY=\"5\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0L10 5L0 10z\" style=\"fill:#444\"/></marker></defs>\n")
	for i, k := range []struct {
		kind EdgeKind
		text string
	}{{EdgeBoth, "may and does"}, {EdgeMay, "may, never seen"}, {EdgeDenied, "does, would be denied"}} {
		fmt.Fprintf(&b, "<path class=\"%s\" d=\"M%d 25h40\"/><text x=\"%d\" y=\"29\">%s</text>\n", k.kind, margin+i*190, margin+i*190+48, k.text)
	}
	for _, e := range g.Edges {
		f, t := at[e.From], at[e.To]
		x1, y1, x2, y2 := f.x+width, f.y+height/2, t.x, t.y+height/2
		if x2 <= x1 { // backwards, or in the same layer
			x2 = t.x + width
		}
		fmt.Fprintf(&b, "<path class=\"%s\" marker-end=\"url(#a)\" d=\"M%d %dC%d %d %d %d %d %d\"><title>%s to %s: %s %s</title></path>\n", e.Kind, x1, y1, x1+gapX/2, y1, x2+(gapX/2)*sign(t.x-f.x-width), y2, x2, y2,
			text(e.From), text(e.To), e.Kind, e.label())
	}
	for _, n := range nodes {
		p := at[n]
		label := n
		if len(label) > letters {
			label = "..." + label[len(label)-letters+3:]
		}
		fmt.Fprintf(&b, "<g><title>%s</title><rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" rx=\"4\"/><text x=\"%d\" y=\"%d\">%s</text></g>\n", text(n), p.x, p.y, width, height, p.x+8, p.y+18, text(label))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// sign is -1 for an edge that enters its node from the left, else 1.
func sign(ahead int) int {
	if ahead > 0 {
		return -1
	}
	return 1
}
