package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// A format is a value of -o.
type format string

const (
	formatTable format = "table"
	formatWide  format = "wide"
	formatJSON  format = "json"
	formatYAML  format = "yaml"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "FORMAT" }

// Set implements pflag.Value; a wrong format is thereby a usage error.
func (f *format) Set(s string) error {
	switch v := format(s); v {
	case formatTable, formatWide, formatJSON, formatYAML:
		*f = v
		return nil
	}
	return fmt.Errorf("not one of table, wide, json, yaml")
}

// outputFlag adds -o to a command that lists or shows.
func outputFlag(cmd *cobra.Command) *format {
	f := new(format)
	*f = formatTable
	cmd.Flags().VarP(f, "output", "o", "how to print: table, wide, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "wide", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	return f
}

// A column of a table over T. Wide columns show with -o wide only.
type column[T any] struct {
	name  string
	wide  bool
	value func(T) string
	color func(T) string // an SGR parameter or empty; nil: none
}

// A lister prints items page by page, so that a list of a million entries needs the memory of one page. JSON and YAML
// are one array over all pages.
type lister[T any] struct {
	app     *app
	format  format
	columns []column[T]
	none    string // what to say on stderr about an empty list
	count   int
	widths  []int
}

// add prints one page.
func (l *lister[T]) add(items []T) error {
	if len(items) == 0 {
		return nil
	}
	defer func() { l.count += len(items) }()
	switch l.format {
	case formatJSON:
		for i, item := range items {
			text, err := encodeJSON(item, "  ")
			if err != nil {
				return err
			}
			lead := ",\n  "
			if l.count+i == 0 {
				lead = "[\n  "
			}
			if _, err := io.WriteString(l.app.stdout, lead+text); err != nil {
				return err
			}
		}
		return nil
	case formatYAML:
		text, err := encodeYAML(items)
		if err != nil {
			return err
		}
		_, err = io.WriteString(l.app.stdout, text)
		return err
	}
	return l.table(items)
}

func (l *lister[T]) table(items []T) error {
	var shown []column[T]
	for _, c := range l.columns {
		if !c.wide || l.format == formatWide {
			shown = append(shown, c)
		}
	}
	first := l.widths == nil
	if first {
		l.widths = make([]int, len(shown))
		for i, c := range shown {
			l.widths[i] = len(c.name)
		}
	}
	cells := make([][]string, len(items))
	for n, item := range items {
		cells[n] = make([]string, len(shown))
		for i, c := range shown {
			text := escape(c.value(item))
			if text == "" {
				text = "-"
			}
			cells[n][i] = text
			l.widths[i] = max(l.widths[i], displayWidth(text))
		}
	}
	var b strings.Builder
	line := func(cell func(i int) (text, color string)) {
		for i := range shown {
			text, color := cell(i)
			b.WriteString(paint(l.app.color, color, text))
			if i < len(shown)-1 {
				b.WriteString(strings.Repeat(" ", l.widths[i]-displayWidth(text)+2))
			}
		}
		b.WriteByte('\n')
	}
	if first {
		line(func(i int) (string, string) { return shown[i].name, bold })
	}
	for n, item := range items {
		line(func(i int) (string, string) {
			if shown[i].color == nil {
				return cells[n][i], ""
			}
			return cells[n][i], shown[i].color(item)
		})
	}
	_, err := io.WriteString(l.app.stdout, b.String())
	return err
}

// close ends the list.
func (l *lister[T]) close() error {
	var end string
	switch {
	case l.format == formatJSON && l.count == 0, l.format == formatYAML && l.count == 0:
		end = "[]\n"
	case l.format == formatJSON:
		end = "\n]\n"
	case l.count == 0 && l.none != "":
		l.app.note("%s", l.none)
	}
	_, err := io.WriteString(l.app.stdout, end)
	return err
}

// list prints items that are all at hand.
func list[T any](a *app, f format, none string, columns []column[T], items []T) error {
	l := &lister[T]{app: a, format: f, columns: columns, none: none}
	if err := l.add(items); err != nil {
		return err
	}
	return l.close()
}

// A field is one line of a thing that is shown alone.
type field struct {
	name, value string
	color       string
}

// show prints one thing: fields for people, value for machines. Fields without a value are left out.
func (a *app) show(f format, value any, fields []field) error {
	switch f {
	case formatJSON:
		text, err := encodeJSON(value, "")
		if err != nil {
			return err
		}
		_, err = io.WriteString(a.stdout, text+"\n")
		return err
	case formatYAML:
		text, err := encodeYAML(value)
		if err != nil {
			return err
		}
		_, err = io.WriteString(a.stdout, text)
		return err
	}
	width := 0
	for _, fd := range fields {
		if fd.value != "" {
			width = max(width, len(fd.name))
		}
	}
	var b strings.Builder
	for _, fd := range fields {
		if fd.value == "" {
			continue
		}
		fmt.Fprintf(&b, "%s%s %s\n", paint(a.color, bold, fd.name+":"), strings.Repeat(" ", width-len(fd.name)), paint(a.color, fd.color, escape(fd.value)))
	}
	_, err := io.WriteString(a.stdout, b.String())
	return err
}

// manyFields makes one line per value, the name on the first only.
func manyFields(name string, values []string) []field {
	out := make([]field, 0, len(values))
	for _, v := range values {
		out = append(out, field{name: name, value: v})
	}
	return out
}

func encodeJSON(v any, prefix string) (string, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent(prefix, "  ")
	if err := enc.Encode(v); err != nil {
		return "", fmt.Errorf("encoding as JSON: %w", err)
	}
	return escapeEncoded(strings.TrimSuffix(b.String(), "\n"), false), nil
}

// encodeYAML goes by way of JSON, so that both formats have the same names in the same order.
func encodeYAML(v any) (string, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("encoding as JSON: %w", err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal([]byte(escapeEncoded(string(text), true)), &doc); err != nil {
		return "", fmt.Errorf("encoding as YAML: %w", err)
	}
	blockStyle(&doc)
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return "", fmt.Errorf("encoding as YAML: %w", err)
	}
	if err := enc.Close(); err != nil {
		return "", fmt.Errorf("encoding as YAML: %w", err)
	}
	return escapeEncoded(b.String(), true), nil
}

// yaml11 holds the words that are strings in YAML 1.2 and something else in 1.1, which many parsers still read.
var yaml11 = map[string]bool{"y": true, "yes": true, "on": true, "n": true, "no": true, "off": true, "=": true}

// base60 tells whether YAML 1.1 reads s as a number such as 1:30, which is 90 there.
func base60(s string) bool {
	return strings.Contains(s, ":") && strings.Trim(s, "0123456789:._+-") == ""
}

func blockStyle(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle | yaml.DoubleQuotedStyle
	if n.Kind == yaml.ScalarNode && n.Tag == "!!str" && (yaml11[strings.ToLower(n.Value)] || base60(n.Value) || strings.ContainsFunc(n.Value, func(r rune) bool { return !unicode.IsPrint(r) })) {
		n.Style |= yaml.DoubleQuotedStyle
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// displayWidth counts the columns of text that is already escaped: marks that combine with the rune before take none.
func displayWidth(s string) int {
	n := 0
	for _, r := range s {
		if !unicode.Is(unicode.Mn, r) && !unicode.Is(unicode.Me, r) {
			n++
		}
	}
	if n == 0 {
		return utf8.RuneCountInString(s)
	}
	return n
}

// stamp writes a moment for machines: RFC 3339 in UTC, empty for none.
func stamp(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// unixTime converts the seconds of the wire, where 0 means none.
func unixTime(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0)
}

// left says how far off end is: "59m left", "expired 3h ago".
func left(end, now time.Time) string {
	if end.IsZero() {
		return ""
	}
	if d := end.Sub(now); d >= 0 {
		return approximate(d) + " left"
	}
	return "expired " + approximate(now.Sub(end)) + " ago"
}

// approximate writes d with its two largest units of d, h, m, s.
func approximate(d time.Duration) string {
	d = d.Round(time.Second)
	days, h, m, s := int(d.Hours())/24, int(d.Hours())%24, int(d.Minutes())%60, int(d.Seconds())%60
	pair := func(a int, ua string, b int, ub string) string {
		if b == 0 {
			return fmt.Sprintf("%d%s", a, ua)
		}
		return fmt.Sprintf("%d%s%d%s", a, ua, b, ub)
	}
	switch {
	case days > 0:
		return pair(days, "d", h, "h")
	case h > 0:
		return pair(h, "h", m, "m")
	case m > 0:
		return pair(m, "m", s, "s")
	}
	return fmt.Sprintf("%ds", s)
}
