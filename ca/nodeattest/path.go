package nodeattest

import (
	"fmt"
	"slices"
	"strings"
)

// A PathTemplate makes the path of an agent's SPIFFE ID, below /spire/agent, of what its evidence says. It is written as
// SPIRE's agent_path_template is: text with variables such as {{ .Fingerprint }}. Functions and conditions are not
// understood.
type PathTemplate struct {
	parts []pathPart
}

// A pathPart is text or a variable.
type pathPart struct{ text, variable string }

// maxPathBytes bounds templates; a SPIFFE ID has at most 2048 bytes.
const maxPathBytes = 2048

// ParsePath reads a template. known are the variables that there are; one that ends in a dot stands for a group of which the
// node decides the names, such as "Tags.".
func ParsePath(text string, known ...string) (*PathTemplate, error) {
	if len(text) > maxPathBytes {
		return nil, fmt.Errorf("%d bytes are more than the %d allowed", len(text), maxPathBytes)
	}
	t := &PathTemplate{}
	for rest := strings.TrimPrefix(text, "/"); rest != ""; {
		before, after, found := strings.Cut(rest, "{{")
		if before != "" {
			t.parts = append(t.parts, pathPart{text: before})
		}
		if !found {
			break
		}
		inner, after, closed := strings.Cut(after, "}}")
		if !closed {
			return nil, fmt.Errorf("%q has a {{ without }}", text)
		}
		name, isField := strings.CutPrefix(strings.TrimSpace(inner), ".")
		if !isField || !slices.ContainsFunc(known, func(k string) bool {
			if strings.HasSuffix(k, ".") {
				return strings.HasPrefix(name, k) && len(name) > len(k)
			}
			return k == name
		}) {
			return nil, fmt.Errorf("%q has {{%s}}, which is not one of the variables .%s; functions are not understood", text, inner, strings.Join(known, ", ."))
		}
		t.parts = append(t.parts, pathPart{variable: name})
		rest = after
	}
	if len(t.parts) == 0 || t.parts[0].variable != "" && t.parts[0].variable != "PluginName" || !strings.Contains(text[1:], "/") {
		return nil, fmt.Errorf("%q must begin with a fixed segment, such as /%s", text, "{{ .PluginName }}/{{ .Fingerprint }}")
	}
	return t, nil
}

// A Variable is what a template fills in. Only one with Segments set may hold slashes.
type Variable struct {
	Value    string
	Segments bool
}

// Path returns the segments. It fails if a variable that the template names is missing or empty, or holds a slash that it may
// not: the names in evidence are the node's, and must not reach into the paths of others.
func (t *PathTemplate) Path(variables map[string]Variable) ([]string, error) {
	var b strings.Builder
	for _, p := range t.parts {
		if p.variable == "" {
			b.WriteString(p.text)
			continue
		}
		v, ok := variables[p.variable]
		switch {
		case !ok || v.Value == "":
			return nil, fmt.Errorf("agent_path_template: .%s is empty", p.variable)
		case !v.Segments && strings.Contains(v.Value, "/"):
			return nil, fmt.Errorf("agent_path_template: .%s is %q, which has a slash", p.variable, v.Value)
		}
		b.WriteString(v.Value)
		if b.Len() > maxPathBytes {
			return nil, fmt.Errorf("agent_path_template: the path has more than %d bytes", maxPathBytes)
		}
	}
	return strings.Split(b.String(), "/"), nil
}
