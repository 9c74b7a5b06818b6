package template

import "strings"

// A DNSName is the template of a DNS name, or plain text.
type DNSName struct {
	source string
	parts  []part
}

func (d DNSName) String() string { return d.source }

// ParseDNSName reads the template of a DNS name. Its last label is fixed, so that no pod can choose the domain that it is
// found in; of the others each may hold one variable. Errors are *SyntaxErrors.
func ParseDNSName(s string) (DNSName, error) {
	parts, err := parse(s)
	if err != nil {
		return DNSName{}, err
	}
	if err := onePerPiece(parts, '.', "label of a DNS name"); err != nil {
		return DNSName{}, err
	}
	for i, x := range parts {
		if x.v != nil && (i+1 == len(parts) || i+2 == len(parts) && !strings.Contains(parts[i+1].text, ".")) {
			return DNSName{}, wrong(x.at, "the last label of a DNS name must be fixed text, such as {{ .k8s.sa }}.internal: otherwise a pod could name any host")
		}
	}
	return DNSName{s, parts}, nil
}

// Expand returns the name for a pod, or why it has none. What is fixed in it is not judged here.
func (d DNSName) Expand(pod *Pod) (string, error) {
	return expand(d.parts, pod, func(v string) string {
		if strings.ContainsFunc(v, func(c rune) bool { return c == '.' || !isSegmentRune(c) }) {
			return "which is no label of a DNS name: it may hold A-Z a-z 0-9 - _ only"
		}
		return ""
	})
}

// Sample returns the name with letters in the place of its variables, to judge what is fixed in it.
func (d DNSName) Sample() string { return Path(d).with("x") }

// Sample returns the path likewise.
func (p Path) Sample() string { return p.with("x") }
