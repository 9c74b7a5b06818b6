package pods

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/template"
	"github.com/signet-id/signet/internal/nearmiss"
	"github.com/signet-id/signet/spiffe"
)

// A Difference is one thing that a rule asks of a pod and that the pod is not.
type Difference struct {
	// Want is what is asked for, such as k8s:sa:web.
	Want string
	Kind nearmiss.Kind
	// Have is what the pod is in its place, the likeliest first.
	Have []string
}

// An Explainer is a rule that can say what keeps it from concerning a pod. A rule without the method is not compared.
type Explainer interface {
	// Differences returns nothing if the rule concerns the pod. Like Expand it asks nobody.
	Differences(*Subject) []Difference
}

// A Subject is a pod that rules are compared with.
type Subject struct {
	Pod       *Pod
	selectors *nearmiss.Subject
}

// NewSubject prepares comparing.
func NewSubject(p *Pod) *Subject {
	var have []spiffe.Selector
	add := func(parts ...string) {
		have = append(have, spiffe.Selector{Type: "k8s", Value: strings.Join(parts, ":")})
	}
	add("ns", p.Namespace)
	add("sa", p.ServiceAccount)
	add("pod-name", p.Name)
	add("node-name", p.NodeName)
	labels := func(kind string, of map[string]string) {
		for k, v := range of {
			add(kind, k, v)
		}
	}
	labels("pod-label", p.Labels)
	labels("ns-label", p.NamespaceLabels)
	for _, o := range p.Owners {
		add("pod-owner", o.Kind, o.Name)
	}
	slices.SortFunc(have, func(a, b spiffe.Selector) int { return strings.Compare(a.Value, b.Value) })
	return &Subject{p, nearmiss.NewSubject(have, []string{"k8s"}, nearmiss.Host{})}
}

// Compare compares with selectors, of which the CA can judge all.
func (s *Subject) Compare(want []spiffe.Selector) []Difference {
	var out []Difference
	for _, d := range s.selectors.Compare(want).Differences {
		x := Difference{Want: d.Want.String(), Kind: d.Kind}
		for _, h := range d.Have {
			x.Have = append(x.Have, h.String())
		}
		out = append(out, x)
	}
	return out
}

// Differences implements Explainer: what of `match` the CA judges, and the clusters that `on` names.
func (r identity) Differences(s *Subject) []Difference {
	var want []spiffe.Selector
	for _, m := range r.e.Selectors {
		if _, ours := template.ParseMatch(m.Value); ours && m.Type == "k8s" {
			want = append(want, m)
		}
	}
	out := s.Compare(want)
	for _, on := range r.e.On {
		c, ok := strings.CutPrefix(on.String(), "k8s_psat:cluster:")
		if ok && c != s.Pod.Cluster {
			out = append(out, Difference{on.String(), nearmiss.Value, []string{"k8s_psat:cluster:" + s.Pod.Cluster}})
		}
	}
	return out
}

// An Explanation is what the rules make of a pod.
type Explanation struct {
	Pod *Pod
	// Verdicts are those on the pod: what it is given, then what it is refused, then what has ended, then the rules that come nearest.
	Verdicts []Verdict
	// More is how many are left out.
	More int
}

// A Verdict is what one rule makes of a pod: one of the fields but Rule.
type Verdict struct {
	Rule string
	// Entry is what the pod stands for.
	Entry *registry.Entry
	// Refused is why it does not get what the rule would give it, as in the Event.
	Refused string
	// Ended tells that the rule would be for the pod if its end had not come.
	Ended bool
	// Differences are what keeps the rule from concerning it.
	Differences []Difference
}

func (v *Verdict) cost() (n int) {
	for _, d := range v.Differences {
		n += d.Kind.Cost()
	}
	return n
}

// Bounds of an explanation.
const (
	maxGiven = 100 // entries and refusals
	maxNear  = 10  // rules that do not concern the pod
)

// Find returns the UIDs of the pods of that name: one, or more while the watch has not heard of the end of a former one.
func (x *Expander) Find(cluster, namespace, name string) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []string
	for k, s := range x.pods {
		if k.cluster == cluster && s.pod.Name == name && s.pod.Namespace == namespace {
			out = append(out, k.uid)
		}
	}
	slices.Sort(out)
	return out
}

// Explain says what the rules make of a pod, nil if it is not known. It is for operators: it may look at every rule.
func (x *Expander) Explain(ctx context.Context, cluster, uid string) (*Explanation, error) {
	x.mu.Lock()
	s := x.pods[podKey{cluster, uid}]
	if s == nil {
		x.mu.Unlock()
		return nil, nil
	}
	out := &Explanation{Pod: s.pod}
	var rules []*ranked
	for _, r := range x.rules {
		if r.cluster == "" || r.cluster == cluster {
			rules = append(rules, r)
		}
	}
	held := slices.DeleteFunc(slices.Clone(s.entries), func(d *derivation) bool { return !d.held })
	slices.SortStableFunc(held, func(a, b *derivation) int { return a.rule.compare(b.rule) })
	refused := map[*ranked]string{}
	for r, why := range s.refused {
		refused[r] = why
	}
	x.mu.Unlock()

	concerned := map[*ranked]bool{}
	var given, not []Verdict
	for _, d := range held {
		concerned[d.rule] = true
		if by := x.c.Registry.TakenBy(d.entry); by != nil {
			not = append(not, Verdict{Rule: d.rule.Name(), Refused: takenReason(d.entry, by)})
			continue
		}
		given = append(given, Verdict{Rule: d.rule.Name(), Entry: d.entry})
	}
	for _, r := range rules { // in their order
		if why, is := refused[r]; is {
			concerned[r] = true
			not = append(not, Verdict{Rule: r.Name(), Refused: why})
		}
	}
	out.Verdicts = append(given, not...)
	if n := len(out.Verdicts); n > maxGiven {
		out.Verdicts, out.More = out.Verdicts[:maxGiven], n-maxGiven
	}
	if !out.Pod.eligible() {
		return out, nil
	}

	subject := NewSubject(out.Pod)
	var near []Verdict
	for _, r := range rules {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		e, can := r.Rule.(Explainer)
		if !can || concerned[r] {
			continue
		}
		v := Verdict{Rule: r.Name(), Differences: e.Differences(subject)}
		if len(v.Differences) == 0 {
			continue // it has nothing to say, or has come between
		}
		i, _ := slices.BinarySearchFunc(near, v, func(a, b Verdict) int {
			return cmp.Or(cmp.Compare(a.cost(), b.cost()), -1) // the earlier rule stays before one that is as near
		})
		if out.More++; i < maxNear {
			near = slices.Insert(near, i, v)
			near = near[:min(len(near), maxNear)]
		}
	}
	out.More -= len(near)
	ended, err := x.ended(ctx, subject)
	out.Verdicts = append(append(out.Verdicts, ended...), near...)
	return out, err
}

// ended are the Identities that would be for a pod if they had not ended.
func (x *Expander) ended(ctx context.Context, s *Subject) (out []Verdict, err error) {
	for _, e := range x.c.Registry.EndedTemplates() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if r := (identity{e: e}); len(out) < maxNear && len(r.Differences(s)) == 0 {
			out = append(out, Verdict{Rule: r.Name(), Ended: true})
		}
	}
	return out, nil
}

// A Count is what a rule makes of all pods at present.
type Count struct {
	// Pods are given something by it, Refused are refused what it would give them.
	Pods, Refused int
}

// Counts returns what the rules of an origin make of all pods, by the name of the rule. It looks at all pods.
func (x *Expander) Counts(origin string) map[string]Count {
	taken := map[registry.EntryID]bool{}
	for _, t := range x.c.Registry.TakenPodEntries() {
		taken[t.Entry.ID] = true
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	out := map[string]Count{}
	type of struct{ given, refused bool }
	one := map[*ranked]of{}
	for _, s := range x.pods {
		clear(one)
		for r := range s.refused {
			one[r] = of{refused: true}
		}
		for _, d := range s.entries {
			c := one[d.rule]
			c.given = c.given || d.held && !taken[d.entry.ID]
			c.refused = c.refused || d.held && taken[d.entry.ID]
			one[d.rule] = c
		}
		for r, c := range one {
			if r.origin != origin {
				continue
			}
			n := out[r.Name()]
			if c.given {
				n.Pods++
			}
			if c.refused {
				n.Refused++
			}
			out[r.Name()] = n
		}
	}
	return out
}
