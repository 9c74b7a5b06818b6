package analyse

import (
	"fmt"
	"strings"
)

// String is the remedy for a terminal, in several lines. Foreign text in it is quoted, but for the YAML, whose scalars are.
func (m Remedy) String() string {
	var b strings.Builder
	for i, c := range m.Changes {
		title := "smallest change:"
		if i > 0 {
			title = "or:"
		}
		fmt.Fprintf(&b, "%s\n", title)
		for _, s := range c.Steps {
			fmt.Fprintf(&b, "  %s%s\n", s.place(), strings.Join(s.Edits, ", and "))
			b.WriteString(changed(s.Before, s.After))
		}
		if c.Present != "" {
			fmt.Fprintf(&b, "  and %s\n", c.Present)
		}
		if c.Also != "" {
			fmt.Fprintf(&b, "  this also allows: %s\n", c.Also)
		}
	}
	if m.Why != "" {
		fmt.Fprintf(&b, "smallest change: none: %s\n", m.Why)
	}
	return b.String()
}

func (s Step) place() string {
	switch {
	case s.Rule.Policy == "":
		return ""
	case s.Rule.File == "":
		return fmt.Sprintf("%s %s, line %d: ", s.Rule.Policy, s.Effect, s.Rule.Line)
	}
	return fmt.Sprintf("%s:%d: %s %s: ", printable(s.Rule.File), s.Rule.Line, s.Rule.Policy, s.Effect)
}

// printable is a name as it is, unless a terminal could misread it.
func printable(s string) string {
	if q := fmt.Sprintf("%q", s); q[1:len(q)-1] != s {
		return q
	}
	return s
}

// changed shows the lines that differ between two short texts, with those around them.
func changed(before, after string) string {
	old, fresh := lines(before), lines(after)
	head := 0
	for head < len(old) && head < len(fresh) && old[head] == fresh[head] {
		head++
	}
	tail := 0
	for tail < len(old)-head && tail < len(fresh)-head && old[len(old)-1-tail] == fresh[len(fresh)-1-tail] {
		tail++
	}
	var b strings.Builder
	write := func(sign string, lines []string) {
		for _, line := range lines {
			fmt.Fprintf(&b, "    %s %s\n", sign, line)
		}
	}
	write(" ", old[:head])
	write("-", old[head:len(old)-tail])
	write("+", fresh[head:len(fresh)-tail])
	write(" ", old[len(old)-tail:])
	return b.String()
}

func lines(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(text, "\n"), "\n")
}
