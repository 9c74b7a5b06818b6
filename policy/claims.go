package policy

import (
	"encoding/json"
	"errors"
	"math"
	"reflect"
	"strconv"
	"strings"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// claimAdapter turns claims into values of CEL. Lists and maps are turned as they are walked.
type claimAdapter struct{ types.Adapter }

// NativeToValue turns a claim, or what a condition made of one, into a value.
func (a claimAdapter) NativeToValue(value any) ref.Val {
	switch v := value.(type) {
	case string:
		return types.String(v)
	case bool:
		return types.Bool(v)
	case json.Number:
		return numberValue(string(v))
	case []any:
		return types.NewDynamicList(a, v)
	case map[string]any:
		return types.NewStringInterfaceMap(a, v)
	case nil:
		return types.NullValue
	case ref.Val:
		return v
	}
	return a.Adapter.NativeToValue(value)
}

// What a number in a token may look like. A double tells numbers of 15 digits apart, and no more.
const (
	maxNumberBytes  = 64
	maxNumberDigits = 15
	maxExponent     = 300
)

// numberValue returns the value of a JSON number, exactly: a whole number that 64 bits hold is an int or a uint, however
// it is written; a fraction of at most 15 digits is a double. Any other is an error, since what it would be rounded to is
// another number.
func numberValue(s string) ref.Val {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return types.Int(n)
	}
	if len(s) > maxNumberBytes {
		return types.NewErr("a number of %d digits cannot be compared", len(s))
	}
	unsigned, negative := strings.CutPrefix(s, "-")
	mantissa, exp := unsigned, 0
	if i := strings.IndexAny(unsigned, "eE"); i >= 0 {
		var err error
		if exp, err = strconv.Atoi(unsigned[i+1:]); err != nil || exp > maxExponent || exp < -maxExponent {
			return types.NewErr("a number with such an exponent cannot be compared")
		}
		mantissa = unsigned[:i]
	}
	whole, fraction, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimLeft(whole+fraction, "0")
	exp -= len(fraction)
	for strings.HasSuffix(digits, "0") {
		digits, exp = digits[:len(digits)-1], exp+1
	}
	switch {
	case digits == "":
		return types.Int(0)
	case exp >= 0 && len(digits)+exp <= 20:
		digits += strings.Repeat("0", exp)
		if n, err := strconv.ParseUint(digits, 10, 64); err == nil && !negative {
			if n <= math.MaxInt64 {
				return types.Int(n)
			}
			return types.Uint(n)
		}
		if n, err := strconv.ParseInt("-"+digits, 10, 64); err == nil && negative {
			return types.Int(n)
		}
		return types.NewErr("a number of more than 64 bits cannot be compared")
	case exp >= 0:
		return types.NewErr("a number of more than 64 bits cannot be compared")
	case len(digits) > maxNumberDigits:
		return types.NewErr("a fraction of %d digits cannot be compared; a double holds %d", len(digits), maxNumberDigits)
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || f == 0 {
		return types.NewErr("a number of this size cannot be compared")
	}
	return types.Double(f)
}

// headerMap is request.headers: only asked for single headers, never listed.
type headerMap struct{ headers Headers }

// Find returns the one value of a header. It is an error if there is none, there are several, or different readers could
// read different values: one with a comma is a list to some, and space around it may or may not belong to it.
func (h *headerMap) Find(key ref.Val) (ref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return types.NewErr("%s cannot be the name of a header", kindOf(key)), false
	}
	lines := h.lines(string(name))
	switch {
	case len(lines) == 0:
		return types.NewErr("the request has no header %s", name), false
	case len(lines) > 1:
		return types.NewErr("the request has %d lines of header %s", len(lines), name), false
	case strings.IndexByte(lines[0], ',') >= 0:
		return types.NewErr("the header %s has a comma, so it may be several", name), false
	case len(lines[0]) > maxHeaderValue:
		return types.NewErr("the header %s has %d bytes, of which at most %d are compared", name, len(lines[0]), maxHeaderValue), false
	case strings.TrimSpace(lines[0]) != lines[0]:
		return types.NewErr("the header %s begins or ends with space", name), false
	}
	return types.String(lines[0]), true
}

func (h *headerMap) lines(name string) []string {
	if h.headers == nil {
		return nil
	}
	return h.headers.Values(name)
}

// Contains reports whether the request has a header, with whatever value.
func (h *headerMap) Contains(key ref.Val) ref.Val {
	name, ok := key.(types.String)
	if !ok {
		return types.NewErr("%s cannot be the name of a header", kindOf(key))
	}
	return types.Bool(len(h.lines(string(name))) > 0)
}

// Get returns the one value of a header.
func (h *headerMap) Get(key ref.Val) ref.Val {
	value, _ := h.Find(key)
	return value
}

// What follows makes it a map of CEL. Conditions that would use it are refused when they are compiled.

func (h *headerMap) Size() ref.Val { return types.NewErr("headers are not counted") }
func (h *headerMap) Iterator() traits.Iterator {
	return noHeaders{types.NewErr("headers are not listed")}
}
func (h *headerMap) Equal(ref.Val) ref.Val {
	return types.NewErr("headers are not compared as a whole")
}
func (h *headerMap) Type() ref.Type                 { return types.MapType }
func (h *headerMap) Value() any                     { return nil }
func (h *headerMap) ConvertToType(ref.Type) ref.Val { return types.NewErr("headers are not converted") }
func (h *headerMap) ConvertToNative(reflect.Type) (any, error) {
	return nil, errors.New("headers are not converted")
}

// noHeaders is the walk over headers, which ends where it begins.
type noHeaders struct{ ref.Val }

func (noHeaders) HasNext() ref.Val { return types.False }
func (n noHeaders) Next() ref.Val  { return n.Val }
