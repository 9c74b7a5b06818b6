// Package strictyaml reads the YAML and JSON that operators write: config files and documents. It accepts a small,
// unambiguous part of YAML and says file, line and column of everything else, all mistakes of a document at once. The
// daemons, the command line and package policy call it; it never guesses a type and never ignores a key.
//
// JSON is read as the YAML it is; of its escapes, \/ and pairs of surrogates are not known there and refused.
package strictyaml

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

const (
	// MaxDocument is the size in bytes above which a document is refused.
	MaxDocument = 1 << 20
	// MaxFile is the size in bytes above which a file of several documents is refused.
	MaxFile = 64 << 20
	// MaxDepth is how deep lists and mappings may be nested.
	MaxDepth = 32
	// MaxErrors is how many mistakes of one document are reported.
	MaxErrors = 20
)

// A Document is one YAML or JSON document and where it came from.
type Document struct {
	// Node is the root of the document: a mapping, unless the document is malformed in a way Decode reports. The lines of
	// its nodes count in the file, from 1.
	Node *yaml.Node
	// File is the name for messages, as the operator gave it.
	File string
	// Line is the line of the file at which Content begins, from 1.
	Line int
	// Content is the document as it was written, with its comments and without the separator lines around it. Split reads
	// it again to the same document.
	Content []byte
}

// Split reads the documents in data, which came from file and begins at line firstLine of it (from 1; 0 means 1).
// Documents that are empty or hold only comments are left out. The error is of type Errors.
func Split(data []byte, file string, firstLine int) ([]Document, error) {
	firstLine = max(firstLine, 1)
	errs := &collector{file: file}
	if len(data) > MaxFile {
		errs.add(firstLine, 1, "the file has %d bytes; at most %d are read", len(data), MaxFile)
		return nil, errs.err()
	}
	if checkText(data, firstLine, errs); !errs.empty() {
		return nil, errs.err()
	}
	var docs []Document
	for _, c := range chunks(data, firstLine) {
		if len(c.Content) > MaxDocument {
			errs.add(c.Line, 1, "the document has %d bytes; at most %d are read", len(c.Content), MaxDocument)
			continue
		}
		c.File = file
		if parse(&c, errs); c.Node != nil {
			docs = append(docs, c)
		}
	}
	if err := errs.err(); err != nil {
		return nil, err
	}
	return docs, nil
}

// Unmarshal reads the one document in data, which came from file, into the struct that into points to. An empty file
// leaves it as it is. The error is of type Errors.
func Unmarshal(data []byte, file string, into any) error {
	docs, err := Split(data, file, 1)
	if err != nil {
		return err
	}
	switch len(docs) {
	case 0:
		return nil
	case 1:
		return Decode(docs[0], into)
	default:
		errs := &collector{file: file}
		errs.add(docs[1].Line, 1, "a second document begins here; this file holds exactly one")
		return errs.err()
	}
}

// Field returns the text of a scalar at the top of the document, such as its kind, with its position. It reports false
// if the document has no such key or its value is not a scalar.
func (d Document) Field(name string) (value string, line, column int, ok bool) {
	if d.Node == nil || d.Node.Kind != yaml.MappingNode {
		return "", 0, 0, false
	}
	for i := 0; i+1 < len(d.Node.Content); i += 2 {
		if k, v := d.Node.Content[i], d.Node.Content[i+1]; k.Value == name && v.Kind == yaml.ScalarNode {
			return v.Value, v.Line, v.Column, true
		}
	}
	return "", 0, 0, false
}

// checkText refuses what makes two readers see different lines or different text: bytes that are not UTF-8, control
// characters, tabs, byte order marks and the line separators that YAML knows and editors do not.
func checkText(data []byte, line int, errs *collector) {
	column := 1
	for i := 0; i < len(data) && !errs.full(); {
		r, size := rune(data[i]), 1
		if r >= utf8.RuneSelf {
			r, size = utf8.DecodeRune(data[i:])
		}
		switch {
		case r == '\n':
			line, column = line+1, 0
		case r == '\r' && i+1 < len(data) && data[i+1] == '\n':
		case r == '\t':
			errs.add(line, column, "tab; use spaces")
		case r == 0:
			errs.add(line, column, "NUL byte")
		case r == utf8.RuneError && size == 1:
			errs.add(line, column, "byte %#02x is not UTF-8", data[i])
		case r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0:
			errs.add(line, column, "control character %U", r)
		case r == 0x2028 || r == 0x2029 || r == 0xfeff || r == 0xfffe || r == 0xffff:
			errs.add(line, column, "character %U; remove it", r)
		}
		i += size
		column++
	}
}

// chunks cuts data at its document markers. A marker at the start of a line ends a document in every context of YAML,
// so no parsing is needed.
func chunks(data []byte, firstLine int) []Document {
	var docs []Document
	start, startLine := 0, firstLine
	flush := func(end int) {
		if c := data[start:end]; !blank(c) {
			docs = append(docs, Document{Line: startLine, Content: c})
		}
	}
	line := firstLine
	for i := 0; i < len(data); line++ {
		next := len(data)
		if n := bytes.IndexByte(data[i:], '\n'); n >= 0 {
			next = i + n + 1
		}
		if marker, rest := isMarker(data[i:next]); marker {
			flush(i)
			if start, startLine = next, line+1; !blank(rest) {
				start, startLine = i, line // "--- {kind: ...}": the document begins on the marker's line
			}
		}
		i = next
	}
	flush(len(data))
	return docs
}

func isMarker(line []byte) (marker bool, rest []byte) {
	if len(line) < 3 || string(line[:3]) != "---" && string(line[:3]) != "..." {
		return false, nil
	}
	rest = line[3:]
	return len(rest) == 0 || rest[0] == ' ' || rest[0] == '\n' || rest[0] == '\r', rest
}

// blank reports whether c holds nothing but space and comments.
func blank(c []byte) bool {
	for line := range bytes.Lines(c) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return false
		}
	}
	return true
}

// parse fills doc.Node, or reports why it cannot.
func parse(doc *Document, errs *collector) {
	for line := range bytes.Lines(doc.Content) {
		if t := bytes.TrimSpace(line); len(t) > 0 && t[0] != '#' {
			if line[0] == '%' {
				errs.add(doc.Line, 1, "YAML directives are not allowed")
				return
			}
			break
		}
	}
	dec := yaml.NewDecoder(bytes.NewReader(doc.Content))
	var root yaml.Node
	if err := dec.Decode(&root); err != nil {
		errs.syntax(doc.Line, err)
		return
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		errs.add(doc.Line, 1, "the document does not end where its text ends")
		return
	}
	if root.Kind != yaml.DocumentNode || len(root.Content) != 1 {
		errs.add(doc.Line, 1, "the document is empty")
		return
	}
	node := root.Content[0]
	before := len(errs.list)
	checkNode(node, doc.Line-1, 1, errs)
	if len(errs.list) == before {
		doc.Node = node
	}
}

// checkNode refuses the parts of YAML that are not read here, and makes the lines of n count in the file.
func checkNode(n *yaml.Node, shift, depth int, errs *collector) {
	n.Line += shift
	switch {
	case errs.full():
		return
	case depth > MaxDepth:
		errs.add(n.Line, n.Column, "nested deeper than %d levels", MaxDepth)
		return
	case n.Kind == yaml.AliasNode:
		errs.add(n.Line, n.Column, "alias %q: aliases are not allowed; write the value again", "*"+n.Value)
		return
	case n.Anchor != "":
		errs.add(n.Line, n.Column, "anchor %q: anchors are not allowed", "&"+n.Anchor)
	case n.Style&yaml.TaggedStyle != 0:
		errs.add(n.Line, n.Column, "tag %q: tags are not allowed", n.Tag)
	}
	if n.Kind == yaml.MappingNode {
		checkKeys(n, shift, errs)
	}
	for _, c := range n.Content {
		checkNode(c, shift, depth+1, errs)
	}
}

// checkKeys is called before the lines of n's children are shifted.
func checkKeys(n *yaml.Node, shift int, errs *collector) {
	seen := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		line := k.Line + shift
		switch {
		case k.Kind == yaml.AliasNode: // reported with its value
		case k.Kind == yaml.ScalarNode && k.ShortTag() == "!!merge":
			errs.add(line, k.Column, "merge keys are not allowed")
		case k.Kind != yaml.ScalarNode:
			errs.add(line, k.Column, "a key must be a string, not a %s", kindName(k))
		case k.ShortTag() != "!!str":
			errs.add(line, k.Column, "key %s is a %s; write it in quotes", printable(k.Value), kindName(k))
		case seen[k.Value] != 0:
			errs.add(line, k.Column, "duplicate key %q, first on line %d", k.Value, seen[k.Value])
		default:
			seen[k.Value] = line
		}
	}
}

// kindName says what n is, in the words of an operator.
func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "mapping"
	case yaml.SequenceNode:
		return "list"
	}
	switch n.ShortTag() {
	case "!!str":
		return "string"
	case "!!int", "!!float":
		return "number"
	case "!!bool":
		return "boolean"
	case "!!null":
		return "null"
	case "!!timestamp":
		return "timestamp"
	}
	return "scalar"
}

// printable quotes a foreign value for a message and keeps it short.
func printable(s string) string {
	const limit = 80
	if len(s) > limit {
		cut := limit
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		return strconv.Quote(s[:cut]) + "..."
	}
	return strconv.Quote(s)
}

var yamlSyntaxError = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// syntax reports an error of the YAML parser, which knows the line at most.
func (c *collector) syntax(docLine int, err error) {
	line, message := docLine, err.Error()
	if m := yamlSyntaxError.FindStringSubmatch(strings.SplitN(message, "\n", 2)[0]); m != nil {
		message = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil && n > 0 {
			line = docLine + n - 1
		}
	}
	c.add(line, 1, "not valid YAML: %s", message)
}

// An Error is one mistake in a document.
type Error struct {
	File string
	// Line and Column count from 1, Column in characters.
	Line, Column int
	Message      string
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

// Errors are the mistakes of a file or document in the order in which they were found, at most MaxErrors of a document.
type Errors []*Error

// Error has one line for each mistake.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.As find the single mistakes.
func (e Errors) Unwrap() []error {
	list := make([]error, len(e))
	for i, err := range e {
		list[i] = err
	}
	return list
}

// Sorted returns err, if it is of type Errors, in the order of lines and cut to MaxErrors; any other error as it is.
func Sorted(err error) error {
	var list Errors
	if !errors.As(err, &list) {
		return err
	}
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return list[:min(len(list), MaxErrors)]
}

// collector gathers the mistakes of one file or document up to MaxErrors.
type collector struct {
	file string
	list Errors
}

func (c *collector) add(line, column int, format string, args ...any) {
	if !c.full() {
		c.list = append(c.list, &Error{c.file, line, max(column, 1), fmt.Sprintf(format, args...)})
	}
}

func (c *collector) full() bool  { return len(c.list) >= MaxErrors }
func (c *collector) empty() bool { return len(c.list) == 0 }

func (c *collector) err() error {
	if c.empty() {
		return nil
	}
	return c.list
}
