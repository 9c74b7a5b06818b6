package spireresources

import (
	"strings"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/internal/nearmiss"
	"github.com/signet-id/signet/spiffe"
)

// Differences implements pods.Explainer: what of a ClusterSPIFFEID's selectors does not hold, and whether its namespace is
// passed over. One that selects the pod and gives it nothing, since another one gives the same or it is a fallback, has none.
func (r *rule) Differences(s *pods.Subject) []pods.Difference {
	c := r.set.all[r.at]
	var out []pods.Difference
	if ignored(r.set.c.IgnoreNamespaces, s.Pod.Namespace) {
		out = append(out, pods.Difference{Want: "a namespace that ignore_namespaces does not name", Kind: nearmiss.Value, Have: []string{"k8s:ns:" + s.Pod.Namespace}})
	}
	out = append(out, unmet(s, "namespaceSelector", "ns-label", c.namespaces, s.Pod.NamespaceLabels)...)
	return append(out, unmet(s, "podSelector", "pod-label", c.chosen, s.Pod.Labels)...)
}

// unmet are the requirements of a selector that labels do not meet.
func unmet(s *pods.Subject, field, kind string, want labels.Selector, have map[string]string) []pods.Difference {
	if want == nil {
		return nil
	}
	requirements, selectable := want.Requirements()
	if !selectable {
		return []pods.Difference{{Want: field + ": nothing", Kind: nearmiss.Value}}
	}
	var out []pods.Difference
	for _, q := range requirements {
		if q.Matches(labels.Set(have)) {
			continue
		}
		d := pods.Difference{Want: field + ": " + q.String(), Kind: nearmiss.Value}
		if v, has := have[q.Key()]; has {
			d.Have = []string{"k8s:" + kind + ":" + q.Key() + ":" + v}
		}
		if op := q.Operator(); op == selection.In || op == selection.Equals || op == selection.DoubleEquals {
			d = nearestValue(s, kind, &q, d)
		} else if len(d.Have) == 0 {
			d.Kind = nearmiss.Absent
		}
		out = append(out, d)
	}
	return out
}

// nearestValue compares with each value of a requirement and keeps the nearest. One value is a selector like that of an Identity.
func nearestValue(s *pods.Subject, kind string, q *labels.Requirement, d pods.Difference) pods.Difference {
	values := q.ValuesUnsorted()
	best := d
	best.Kind = ""
	for _, v := range values {
		for _, x := range s.Compare([]spiffe.Selector{{Type: "k8s", Value: strings.Join([]string{kind, q.Key(), v}, ":")}}) {
			if len(values) > 1 {
				x.Want = d.Want
			}
			if best.Kind == "" || x.Kind.Cost() < best.Kind.Cost() {
				best = x
			}
		}
	}
	if best.Kind == "" {
		return d
	}
	return best
}
