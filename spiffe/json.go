package spiffe

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// jsonLimits bounds what readJSON takes from a peer.
type jsonLimits struct {
	bytes  int // of the whole document
	depth  int // of nested objects and arrays
	values int // objects, arrays, strings, numbers, booleans, nulls in all
}

// readJSON reads exactly one JSON value. Unlike json.Unmarshal into a struct it matches member names by their bytes,
// refuses a name that occurs twice in one object at any depth, and keeps numbers as they were written. Values are
// map[string]any, []any, string, json.Number, bool and nil.
//
// A name that occurs twice is the attack this is about: two readers that pick different ones see different documents
// under one signature. The error is a [RowError] of duplicateRow for that, else of syntaxRow.
func readJSON(doc []byte, limits jsonLimits, syntaxRow, duplicateRow string) (any, error) {
	switch {
	case len(doc) > limits.bytes:
		return nil, broken(syntaxRow, "JSON document has %d bytes, at most %d are allowed", len(doc), limits.bytes)
	case bytes.HasPrefix(doc, []byte("\ufeff")):
		return nil, broken("DEC-19", "JSON document begins with a byte order mark, remove it")
	case !utf8.Valid(doc):
		return nil, broken(syntaxRow, "JSON document is not valid UTF-8")
	}
	// The scanner of json.Valid is the judge of the grammar, including data after the value; the walk below then only
	// has to look at what the grammar allows.
	if !json.Valid(doc) {
		var value any
		return nil, broken(syntaxRow, "JSON document is malformed: %w", json.Unmarshal(doc, &value))
	}
	if err := checkSurrogates(doc); err != nil {
		return nil, &RowError{Row: syntaxRow, Err: err}
	}
	decoder := json.NewDecoder(bytes.NewReader(doc))
	decoder.UseNumber()
	walk := jsonWalk{decoder: decoder, limits: limits, syntaxRow: syntaxRow, duplicateRow: duplicateRow}
	return walk.value(0)
}

// readJSONObject is readJSON for documents whose top level must be an object.
func readJSONObject(doc []byte, limits jsonLimits, syntaxRow, duplicateRow string) (map[string]any, error) {
	value, err := readJSON(doc, limits, syntaxRow, duplicateRow)
	if err != nil {
		return nil, err
	}
	object, ok := value.(map[string]any)
	if !ok {
		return nil, broken(syntaxRow, "JSON document is %s, it must be an object", jsonKind(value))
	}
	return object, nil
}

type jsonWalk struct {
	decoder                 *json.Decoder
	limits                  jsonLimits
	values                  int
	syntaxRow, duplicateRow string
}

func (w *jsonWalk) token() (json.Token, error) {
	token, err := w.decoder.Token()
	if err != nil {
		return nil, broken(w.syntaxRow, "JSON document is malformed: %w", err)
	}
	return token, nil
}

// value reads one value below depth open objects and arrays.
func (w *jsonWalk) value(depth int) (any, error) {
	if w.values++; w.values > w.limits.values {
		return nil, broken(w.syntaxRow, "JSON document has more than %d values", w.limits.values)
	}
	token, err := w.token()
	if err != nil {
		return nil, err
	}
	delimiter, nested := token.(json.Delim)
	if !nested {
		return token, nil
	}
	if depth == w.limits.depth {
		return nil, broken(w.syntaxRow, "JSON document is nested more than %d levels deep", w.limits.depth)
	}
	if delimiter == '[' {
		return w.array(depth + 1)
	}
	return w.object(depth + 1)
}

func (w *jsonWalk) array(depth int) ([]any, error) {
	array := []any{}
	for w.decoder.More() {
		element, err := w.value(depth)
		if err != nil {
			return nil, err
		}
		array = append(array, element)
	}
	_, err := w.token()
	return array, err
}

func (w *jsonWalk) object(depth int) (map[string]any, error) {
	object := map[string]any{}
	for w.decoder.More() {
		token, err := w.token()
		if err != nil {
			return nil, err
		}
		name, ok := token.(string)
		if !ok {
			return nil, broken(w.syntaxRow, "JSON document has a member name that is no string")
		}
		if _, twice := object[name]; twice {
			return nil, broken(w.duplicateRow, "JSON member %q occurs twice in one object, keep one of them", excerpt(name))
		}
		if object[name], err = w.value(depth); err != nil {
			return nil, err
		}
	}
	_, err := w.token()
	return object, err
}

// checkSurrogates refuses \u escapes that are half of a surrogate pair. The standard library replaces them by U+FFFD, so
// that two different strings would become one.
func checkSurrogates(doc []byte) error {
	for i := 0; i < len(doc); i++ {
		if doc[i] != '\\' {
			continue
		}
		unit, ok := escapedUnit(doc[i:])
		switch {
		case !ok:
			i++ // skips the escaped character, which may be a backslash itself
		case unit < 0xd800 || unit > 0xdfff:
			i += 5
		default:
			low, ok := escapedUnit(doc[i+6:])
			if unit > 0xdbff || !ok || low < 0xdc00 || low > 0xdfff {
				return fmt.Errorf("JSON document has the escape %q, which is half of a surrogate pair", doc[i:i+6])
			}
			i += 11
		}
	}
	return nil
}

// escapedUnit returns the UTF-16 unit of the \uXXXX with which b begins.
func escapedUnit(b []byte) (uint64, bool) {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0, false
	}
	unit, err := strconv.ParseUint(string(b[2:6]), 16, 16)
	return unit, err == nil
}

// jsonKind names the kind of a value for an error message.
func jsonKind(value any) string {
	switch value.(type) {
	case nil:
		return "null"
	case bool:
		return "a boolean"
	case string:
		return "a string"
	case json.Number:
		return "a number"
	case []any:
		return "an array"
	default:
		return "an object"
	}
}
