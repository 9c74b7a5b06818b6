// Package template is the language in which an Identity says what the SPIFFE ID and the DNS names of a pod are made of. It is
// text with variables, of which each stands for one value of the pod; there are no functions, conditions or loops. The
// registry parses it when a document is applied, and what gives pods their identities expands it. It is pure: what comes out
// depends on the template and the pod alone.
package template

import (
	"fmt"
	"strings"
)

// A Pod is what the variables of a template stand for.
type Pod struct {
	Cluster, Node                   string // node: its name
	Namespace, ServiceAccount, Name string
	Labels, NamespaceLabels         map[string]string
	Owners                          []Owner
}

// An Owner is an owner reference.
type Owner struct {
	APIVersion, Kind, Name string
	Controller             bool
}

// MaxBytes bounds a template.
const MaxBytes = 2048

// A SyntaxError says what is wrong with a template, and after how many bytes of it.
type SyntaxError struct {
	Offset  int
	Problem string
}

func (e *SyntaxError) Error() string { return e.Problem }

func wrong(offset int, format string, args ...any) error {
	return &SyntaxError{offset, fmt.Sprintf(format, args...)}
}

// variable names a value of a pod.
type variable struct {
	name string // such as "ns"
	key  string // of a label
}

// names are all variables; those that are true have a key.
var names = map[string]bool{
	"ns": false, "sa": false, "pod": false, "node": false, "cluster": false,
	"label": true, "nsLabel": true,
	"owner.kind": false, "owner.name": false,
}

// known lists them for messages.
const known = `.k8s.ns, .k8s.sa, .k8s.pod, .k8s.node, .k8s.cluster, .k8s.label["KEY"], .k8s.nsLabel["KEY"], .k8s.owner.kind, .k8s.owner.name`

func (v variable) String() string {
	if v.key != "" {
		return ".k8s." + v.name + `["` + v.key + `"]`
	}
	return ".k8s." + v.name
}

// part is fixed text, or a variable.
type part struct {
	text string
	v    *variable
	at   int // offset in the template
}

// Is tells whether text is a template rather than plain text.
func Is(text string) bool { return strings.Contains(text, "{{") || strings.Contains(text, "}}") }

// parse splits a template into its parts.
func parse(s string) ([]part, error) {
	if len(s) > MaxBytes {
		return nil, wrong(MaxBytes, "a template has at most %d bytes, this has %d", MaxBytes, len(s))
	}
	var parts []part
	for at := 0; at < len(s); {
		open := strings.Index(s[at:], "{{")
		if shut := strings.Index(s[at:], "}}"); shut >= 0 && (open < 0 || shut < open) {
			return nil, wrong(at+shut, "}} without {{ before it")
		}
		if open < 0 {
			return append(parts, part{text: s[at:], at: at}), nil
		}
		if open > 0 {
			parts = append(parts, part{text: s[at : at+open], at: at})
		}
		at += open
		end, v, err := parseVariable(s, at)
		if err != nil {
			return nil, err
		}
		parts = append(parts, part{v: v, at: at})
		at = end
	}
	return parts, nil
}

// parseVariable reads the variable whose {{ is at an offset, and returns where it ends.
func parseVariable(s string, at int) (end int, v *variable, err error) {
	i := at + len("{{")
	blanks := func() {
		for i < len(s) && (s[i] == ' ' || s[i] == '\t') {
			i++
		}
	}
	blanks()
	begin := i
	if !strings.HasPrefix(s[i:], ".k8s.") {
		return 0, nil, wrong(begin, "a variable begins with .k8s. ; there are %s", known)
	}
	i += len(".k8s.")
	from := i
	for i < len(s) && (s[i] == '.' || s[i] >= 'a' && s[i] <= 'z' || s[i] >= 'A' && s[i] <= 'Z' || s[i] >= '0' && s[i] <= '9' || s[i] == '_') {
		i++
	}
	v = &variable{name: s[from:i]}
	keyed, is := names[v.name]
	if !is {
		return 0, nil, wrong(begin, "there is no variable .k8s.%s; there are %s", v.name, known)
	}
	if keyed {
		if v.key, i, err = parseKey(s, i, v.name); err != nil {
			return 0, nil, err
		}
	}
	blanks()
	if !strings.HasPrefix(s[i:], "}}") {
		return 0, nil, wrong(i, "expected }} after %s: a variable stands alone, without functions or operators", v)
	}
	return i + len("}}"), v, nil
}

// parseKey reads ["KEY"].
func parseKey(s string, i int, name string) (key string, end int, err error) {
	if !strings.HasPrefix(s[i:], `["`) {
		return "", 0, wrong(i, `.k8s.%s needs the key of a label: .k8s.%s["app.kubernetes.io/name"]`, name, name)
	}
	i += len(`["`)
	n := strings.IndexByte(s[i:], '"')
	if n < 0 || !strings.HasPrefix(s[i+n:], `"]`) {
		return "", 0, wrong(i, `the key of a label ends with "]`)
	}
	key = s[i : i+n]
	if problem := checkLabelKey(key); problem != "" {
		return "", 0, wrong(i, "%q is no key of a label: %s", key, problem)
	}
	return key, i + n + len(`"]`), nil
}

// checkLabelKey says what is wrong with a key: [prefix/]name as Kubernetes has it, judged by its bytes and length.
func checkLabelKey(key string) string {
	prefix, name, prefixed := strings.Cut(key, "/")
	if !prefixed {
		prefix, name = "", key
	}
	switch {
	case name == "" || len(name) > 63 || len(prefix) > 253 || prefixed && prefix == "":
		return "it is a name of 1 to 63 characters, which may have a DNS name and a slash before it"
	case strings.ContainsFunc(prefix+name, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_')
	}):
		return "it may hold A-Z a-z 0-9 . - _ only, and one slash"
	}
	return ""
}

// value returns what a variable stands for in a pod: exactly one value that is not empty.
func (v *variable) value(p *Pod) (string, error) {
	var s string
	switch v.name {
	case "ns":
		s = p.Namespace
	case "sa":
		s = p.ServiceAccount
	case "pod":
		s = p.Name
	case "node":
		s = p.Node
	case "cluster":
		s = p.Cluster
	case "label":
		s = p.Labels[v.key]
	case "nsLabel":
		s = p.NamespaceLabels[v.key]
	case "owner.kind", "owner.name":
		owner, err := p.controller(v)
		if err != nil {
			return "", err
		}
		if s = owner.Name; v.name == "owner.kind" {
			s = owner.Kind
		}
	}
	if s == "" {
		return "", fmt.Errorf("%s is empty", v)
	}
	return s, nil
}

// controller returns the one owner that controls a pod.
func (p *Pod) controller(v *variable) (*Owner, error) {
	var found *Owner
	for i, o := range p.Owners {
		if !o.Controller {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("%s has several values: the pod has more than one controller", v)
		}
		found = &p.Owners[i]
	}
	if found == nil {
		return nil, fmt.Errorf("%s is empty: the pod has no controller", v)
	}
	return found, nil
}

// expand puts the parts together. check refuses a value where it stands.
func expand(parts []part, p *Pod, check func(value string) string) (string, error) {
	var b strings.Builder
	for _, x := range parts {
		if x.v == nil {
			b.WriteString(x.text)
			continue
		}
		s, err := x.v.value(p)
		if err != nil {
			return "", err
		}
		if problem := check(s); problem != "" {
			return "", fmt.Errorf("%s is %q, %s", x.v, clip(s), problem)
		}
		b.WriteString(s)
	}
	return b.String(), nil
}

func clip(s string) string {
	const most = 128
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

// onePerPiece refuses parts with two variables between two separators.
func onePerPiece(parts []part, sep byte, piece string) error {
	var last *variable
	for _, x := range parts {
		switch {
		case x.v == nil:
			if strings.IndexByte(x.text, sep) >= 0 {
				last = nil
			}
		case last != nil:
			return wrong(x.at, "%s and %s stand in one %s; it may hold one variable, or two pods could be given one name in two ways", last, x.v, piece)
		default:
			last = x.v
		}
	}
	return nil
}
