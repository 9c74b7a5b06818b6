package strictyaml

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// A Located is a value that remembers where it was written. A Line of 0 means that the document does not have it.
type Located[T any] struct {
	Value T
	// Line and Column count in the file, from 1.
	Line, Column int
}

func (l *Located[T]) locate(line, column int) (value any) {
	l.Line, l.Column = line, column
	return &l.Value
}

type locator interface{ locate(line, column int) any }

// A OneOrMany is a list that may also be written as its only element.
type OneOrMany[T any] []T

func (l *OneOrMany[T]) list() any { return (*[]T)(l) }

type lister interface{ list() any }

// Decode reads doc into the struct that into points to. Fields are named by their yaml tags, as in package yaml, with
// the option inline for embedded structs; a field without a tag is not read. Strings, booleans, decimal numbers,
// time.Duration ("90s"), slices, maps with string keys, pointers, structs, Located, OneOrMany and types with UnmarshalText are
// understood. A key that no field has, a null and a value of another type are mistakes. The error is of type Errors and
// holds all of them; what could be read has been read even then.
func Decode(doc Document, into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("decoding %s: the destination is %T, not a pointer to a struct", doc.File, into)
	}
	errs := &collector{file: doc.File}
	if doc.Node == nil {
		errs.add(max(doc.Line, 1), 1, "the document is empty")
		return errs.err()
	}
	d := decoder{errs}
	d.value(doc.Node, v.Elem(), "the document")
	return errs.err()
}

type decoder struct{ *collector }

var (
	durationType        = reflect.TypeFor[time.Duration]()
	textUnmarshalerType = reflect.TypeFor[encoding.TextUnmarshaler]()
	locatorType         = reflect.TypeFor[locator]()
	listerType          = reflect.TypeFor[lister]()
)

// value reads n into v; name is what messages call it.
func (d decoder) value(n *yaml.Node, v reflect.Value, name string) {
	if d.full() {
		return
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		if v.CanAddr() && v.Addr().Type().Implements(locatorType) {
			v.Addr().Interface().(locator).locate(n.Line, n.Column) // it is there, although it cannot be read
		}
		d.add(n.Line, n.Column, "%s is empty (null); give it a value or remove it", name)
		return
	}
	if v.CanAddr() && v.Addr().Type().Implements(locatorType) {
		d.value(n, reflect.ValueOf(v.Addr().Interface().(locator).locate(n.Line, n.Column)).Elem(), name)
		return
	}
	if v.CanAddr() && v.Addr().Type().Implements(listerType) {
		list := reflect.ValueOf(v.Addr().Interface().(lister).list()).Elem()
		if n.Kind != yaml.SequenceNode {
			list.Set(reflect.MakeSlice(list.Type(), 1, 1))
			d.value(n, list.Index(0), name)
			return
		}
		d.value(n, list, name)
		return
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		d.value(n, v.Elem(), name)
		return
	}
	if v.CanAddr() && v.Addr().Type().Implements(textUnmarshalerType) {
		if s, ok := d.str(n, name); ok {
			if err := v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(s)); err != nil {
				d.add(n.Line, n.Column, "%s: %v", name, err)
			}
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.structure(n, v, name)
	case reflect.Slice:
		d.slice(n, v, name)
	case reflect.Map:
		d.mapping(n, v, name)
	default:
		d.scalar(n, v, name)
	}
}

func (d decoder) structure(n *yaml.Node, v reflect.Value, name string) {
	if n.Kind != yaml.MappingNode {
		d.mismatch(n, name, "a mapping")
		return
	}
	fields := make(map[string]reflect.Value)
	var known []string
	collect(v, fields, &known)
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		f, ok := fields[k.Value]
		if !ok {
			d.add(k.Line, k.Column, "unknown field %s in %s; known are %s", printable(k.Value), name, strings.Join(known, ", "))
			continue
		}
		d.value(n.Content[i+1], f, k.Value)
	}
}

// collect finds the fields of v by their names in documents.
func collect(v reflect.Value, fields map[string]reflect.Value, known *[]string) {
	t := v.Type()
	for i := range t.NumField() {
		tag, options, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		switch {
		case !t.Field(i).IsExported():
		case slices.Contains(strings.Split(options, ","), "inline"):
			collect(v.Field(i), fields, known)
		case tag != "" && tag != "-":
			fields[tag] = v.Field(i)
			*known = append(*known, tag)
		}
	}
}

func (d decoder) slice(n *yaml.Node, v reflect.Value, name string) {
	if n.Kind != yaml.SequenceNode {
		d.mismatch(n, name, "a list, such as [a, b]")
		return
	}
	list := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, c := range n.Content {
		d.value(c, list.Index(i), fmt.Sprintf("%s[%d]", name, i))
	}
	v.Set(list)
}

func (d decoder) mapping(n *yaml.Node, v reflect.Value, name string) {
	if n.Kind != yaml.MappingNode || v.Type().Key().Kind() != reflect.String {
		d.mismatch(n, name, "a mapping")
		return
	}
	m := reflect.MakeMapWithSize(v.Type(), len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		e := reflect.New(v.Type().Elem()).Elem()
		d.value(n.Content[i+1], e, name+"."+n.Content[i].Value)
		m.SetMapIndex(reflect.ValueOf(n.Content[i].Value).Convert(v.Type().Key()), e)
	}
	v.Set(m)
}

var decimal = regexp.MustCompile(`^-?(0|[1-9][0-9]*)$`)

func (d decoder) scalar(n *yaml.Node, v reflect.Value, name string) {
	switch {
	case v.Type() == durationType:
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
			hint := ""
			if n.Kind == yaml.ScalarNode && decimal.MatchString(n.Value) {
				hint = fmt.Sprintf(" (%ss for seconds)", n.Value)
			}
			d.mismatch(n, name, "a duration with its unit, such as 90s or 1h"+hint)
			return
		}
		x, err := time.ParseDuration(n.Value)
		if err != nil {
			d.add(n.Line, n.Column, "%s is %s; it must be a duration with its unit, such as 90s or 1h", name, printable(n.Value))
			return
		}
		v.SetInt(int64(x))
	case v.Kind() == reflect.String:
		if s, ok := d.str(n, name); ok {
			v.SetString(s)
		}
	case v.Kind() == reflect.Bool:
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" || n.Value != "true" && n.Value != "false" {
			d.mismatch(n, name, "true or false")
			return
		}
		v.SetBool(n.Value == "true")
	case v.CanInt(), v.CanUint():
		d.integer(n, v, name)
	case v.CanFloat():
		x, err := strconv.ParseFloat(n.Value, 64)
		if n.Kind != yaml.ScalarNode || kindName(n) != "number" || err != nil || math.IsInf(x, 0) || math.IsNaN(x) || v.OverflowFloat(x) {
			d.mismatch(n, name, "a number")
			return
		}
		v.SetFloat(x)
	default:
		d.add(n.Line, n.Column, "%s cannot be set from a document", name)
	}
}

func (d decoder) str(n *yaml.Node, name string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		want := "a string"
		if n.Kind == yaml.ScalarNode {
			want = "a string; write it in quotes"
		}
		d.mismatch(n, name, want)
		return "", false
	}
	return n.Value, true
}

func (d decoder) integer(n *yaml.Node, v reflect.Value, name string) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || !decimal.MatchString(n.Value) {
		d.mismatch(n, name, "a whole number in decimal")
		return
	}
	if v.CanInt() {
		x, err := strconv.ParseInt(n.Value, 10, v.Type().Bits())
		if err != nil {
			d.add(n.Line, n.Column, "%s is %s, which does not fit in %d bits", name, printable(n.Value), v.Type().Bits())
			return
		}
		v.SetInt(x)
		return
	}
	x, err := strconv.ParseUint(n.Value, 10, v.Type().Bits())
	if err != nil {
		d.add(n.Line, n.Column, "%s is %s; it must be from 0 to %d", name, printable(n.Value), uint64(math.MaxUint64)>>(64-v.Type().Bits()))
		return
	}
	v.SetUint(x)
}

// mismatch reports a value of another type than is wanted.
func (d decoder) mismatch(n *yaml.Node, name, want string) {
	what := kindName(n)
	if n.Kind == yaml.ScalarNode {
		what += " " + printable(n.Value)
	}
	d.add(n.Line, n.Column, "%s is the %s; it must be %s", name, what, want)
}
