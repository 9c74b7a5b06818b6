package template

import "strings"

// A Match is what a pod must be, of which the CA can tell.
type Match struct {
	kind, key, value string
}

// ParseMatch reads the value of a selector of type k8s, such as ns:shop, which the CA can judge by what it knows of a pod.
// All others are for the agent: they are about containers or users. Some kinds are only known here: ns-label:KEY:VALUE.
func ParseMatch(value string) (m Match, ok bool) {
	kind, rest, ok := strings.Cut(value, ":")
	if !ok {
		return Match{}, false
	}
	switch kind {
	case "ns", "sa", "pod-name", "node-name":
		return Match{kind: kind, value: rest}, true
	case "pod-label", "ns-label", "pod-owner":
		key, v, ok := strings.Cut(rest, ":")
		return Match{kind: kind, key: key, value: v}, ok
	}
	return Match{}, false
}

// Holds tells whether a pod is so.
func (m Match) Holds(p *Pod) bool {
	switch m.kind {
	case "ns":
		return p.Namespace == m.value
	case "sa":
		return p.ServiceAccount == m.value
	case "pod-name":
		return p.Name == m.value
	case "node-name":
		return p.Node == m.value
	case "pod-label":
		v, has := p.Labels[m.key]
		return has && v == m.value
	case "ns-label":
		v, has := p.NamespaceLabels[m.key]
		return has && v == m.value
	case "pod-owner":
		for _, o := range p.Owners {
			if o.Kind == m.key && o.Name == m.value {
				return true
			}
		}
	}
	return false
}
