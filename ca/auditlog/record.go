package auditlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"time"
	"unicode"
	"unicode/utf8"
)

// formatVersion is the "v" of the lines that this code writes, and the newest that it reads.
const formatVersion = 1

const (
	// MaxRecordBytes is the longest line, its newline included. A SPIFFE ID has at most 2048 bytes, which escaping can
	// make six times as long.
	MaxRecordBytes = 64 << 10

	// maxDepth bounds the nesting of Details.
	maxDepth = 4

	// maxSeq is far beyond what a log can reach. A greater number is damage, and would overflow.
	maxSeq = 1 << 62
)

var (
	// ErrInvalid says that a record can never be written because of what it holds.
	ErrInvalid = errors.New("audit record is not valid")

	// ErrNewerFormat says that a line was written by a newer version of signet.
	ErrNewerFormat = errors.New("audit record was written by a newer version of signet")

	// ErrMalformed says that a line is not a record.
	ErrMalformed = errors.New("line is not an audit record")
)

// A Record is one event: who did what to whom, and with what outcome. It becomes one line of JSON, with the members "v"
// (1), "seq", "time" (RFC 3339, UTC, nanoseconds) and those below in lower case with underscores; empty ones are left out.
// Secrets never belong into it.
type Record struct {
	// Seq numbers the records of one log without gaps, from 1. Append assigns it and ignores what is here.
	Seq uint64

	// Time is when it happened. Zero means the time of Append.
	Time time.Time

	// Event is what happened, such as "x509svid.issued". It must not be empty.
	Event string

	// Actor is who did it, a SPIFFE ID or "uid:0", and ActorKind how it is known: "agent", "admin", "local", "system".
	Actor, ActorKind string

	// Subject is whom or what it concerns, such as the SPIFFE ID issued.
	Subject string

	// Outcome is "ok" or "refused" or "failed".
	Outcome string

	// Details are further facts. Values may be nil, string, bool, any integer, float64, time.Time, time.Duration,
	// json.Number, fmt.Stringer, error, and slices ([]string, []any) and maps (map[string]any) of these up to four levels
	// deep. Any other value is refused with ErrInvalid, so that no struct with a secret in it is printed by accident.
	// What Search returns holds nil, string, bool, json.Number, []any and map[string]any.
	Details map[string]any
}

// appendBody appends the line of r without its beginning, which holds the sequence number: from ,"time" to the newline.
func appendBody(dst []byte, r *Record, now time.Time) ([]byte, error) {
	if r.Event == "" {
		return nil, fmt.Errorf("%w: its event is empty", ErrInvalid)
	}
	at := r.Time
	if at.IsZero() {
		at = now
	}
	if at.IsZero() {
		return nil, fmt.Errorf("%w: it has no time, and neither has the clock", ErrInvalid)
	}
	if y := at.UTC().Year(); y < 1 || y > 9999 {
		return nil, fmt.Errorf("%w: its time is in the year %d", ErrInvalid, y)
	}
	dst = append(dst, `,"time":"`...)
	dst = at.UTC().AppendFormat(dst, time.RFC3339Nano)
	dst = append(dst, `","event":`...)
	dst = appendString(dst, r.Event)
	for _, m := range [...]struct{ name, value string }{
		{`,"actor":`, r.Actor}, {`,"actor_kind":`, r.ActorKind}, {`,"subject":`, r.Subject}, {`,"outcome":`, r.Outcome},
	} {
		if m.value != "" {
			dst = append(dst, m.name...)
			dst = appendString(dst, m.value)
		}
	}
	if len(r.Details) > 0 {
		dst = append(dst, `,"details":`...)
		var err error
		if dst, err = appendMap(dst, r.Details, 1); err != nil {
			return nil, err
		}
	}
	return append(dst, '}', '\n'), nil
}

func appendMap(dst []byte, m map[string]any, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("%w: its details are nested deeper than %d", ErrInvalid, maxDepth)
	}
	// Sorted, so that equal records are equal lines. A small array spares the allocation.
	var room [16]string
	keys := room[:0]
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	dst = append(dst, '{')
	for i, k := range keys {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendString(dst, k)
		dst = append(dst, ':')
		var err error
		if dst, err = appendValue(dst, k, m[k], depth); err != nil {
			return nil, err
		}
	}
	return append(dst, '}'), nil
}

func appendValue(dst []byte, key string, v any, depth int) ([]byte, error) {
	switch v := v.(type) {
	case nil:
		return append(dst, "null"...), nil
	case string:
		return appendString(dst, v), nil
	case bool:
		return strconv.AppendBool(dst, v), nil
	case int:
		return strconv.AppendInt(dst, int64(v), 10), nil
	case int64:
		return strconv.AppendInt(dst, v, 10), nil
	case int32:
		return strconv.AppendInt(dst, int64(v), 10), nil
	case uint64:
		return strconv.AppendUint(dst, v, 10), nil
	case uint32:
		return strconv.AppendUint(dst, uint64(v), 10), nil
	case uint:
		return strconv.AppendUint(dst, uint64(v), 10), nil
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, fmt.Errorf("%w: detail %q is the number %v, which JSON cannot hold", ErrInvalid, key, v)
		}
		return strconv.AppendFloat(dst, v, 'g', -1, 64), nil
	case time.Time:
		dst = append(dst, '"')
		dst = v.UTC().AppendFormat(dst, time.RFC3339Nano)
		return append(dst, '"'), nil
	case time.Duration:
		return appendString(dst, v.String()), nil
	case json.Number:
		if !json.Valid([]byte(v)) || v == "" || v[0] != '-' && (v[0] < '0' || v[0] > '9') {
			return nil, fmt.Errorf("%w: detail %q is %q, which is not a number", ErrInvalid, key, string(v))
		}
		return append(dst, v...), nil
	case []string:
		dst = append(dst, '[')
		for i, s := range v {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendString(dst, s)
		}
		return append(dst, ']'), nil
	case []any:
		if depth >= maxDepth {
			return nil, fmt.Errorf("%w: its details are nested deeper than %d", ErrInvalid, maxDepth)
		}
		dst = append(dst, '[')
		for i, e := range v {
			if i > 0 {
				dst = append(dst, ',')
			}
			var err error
			if dst, err = appendValue(dst, key, e, depth+1); err != nil {
				return nil, err
			}
		}
		return append(dst, ']'), nil
	case map[string]any:
		return appendMap(dst, v, depth+1)
	case error:
		return appendString(dst, v.Error()), nil
	case fmt.Stringer:
		return appendString(dst, v.String()), nil
	}
	return nil, fmt.Errorf("%w: detail %q has the type %T, convert it to a string or number first", ErrInvalid, key, v)
}

const hexDigits = "0123456789abcdef"

// appendString appends s as a JSON string in which everything that is not printable is escaped, so that nothing in it
// moves the cursor or turns the direction of the text where somebody reads the log. What is not UTF-8 becomes U+FFFD.
func appendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= 0x20 && c != '"' && c != '\\' && c != 0x7f {
				i++
				continue
			}
			dst = append(dst, s[start:i]...)
			switch c {
			case '"', '\\':
				dst = append(dst, '\\', c)
			default:
				dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
			i++
			start = i
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 || !unicode.IsPrint(r) {
			dst = append(dst, s[start:i]...)
			dst = appendEscape(dst, r)
			start = i + n
		}
		i += n
	}
	dst = append(dst, s[start:]...)
	return append(dst, '"')
}

func appendEscape(dst []byte, r rune) []byte {
	if r >= 0x10000 {
		r -= 0x10000
		dst = appendEscape(dst, 0xD800|r>>10)
		r = 0xDC00 | r&0x3FF
	}
	return append(dst, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}

// appendHead appends the beginning of a line.
func appendHead(dst []byte, seq uint64) []byte {
	dst = append(dst, `{"v":1,"seq":`...)
	return strconv.AppendUint(dst, seq, 10)
}

// parseRecord returns the record of a line, without its newline.
func parseRecord(line []byte) (Record, error) {
	if len(line) >= MaxRecordBytes {
		return Record{}, fmt.Errorf("%w: it is longer than %d bytes", ErrMalformed, MaxRecordBytes)
	}
	if i := bytes.IndexFunc(line, unicode.IsControl); i >= 0 {
		return Record{}, fmt.Errorf("%w: it has the control character %#02x at byte %d", ErrMalformed, line[i], i)
	}
	var raw map[string]json.RawMessage // not a struct: its members would match in any case
	dec := json.NewDecoder(bytes.NewReader(line))
	if err := dec.Decode(&raw); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Record{}, fmt.Errorf("%w: something follows the record", ErrMalformed)
	}
	var version int
	if err := json.Unmarshal(raw["v"], &version); err != nil || version < 1 {
		return Record{}, fmt.Errorf("%w: its version is %.20q", ErrMalformed, raw["v"])
	}
	if version > formatVersion {
		return Record{}, fmt.Errorf("%w: version %d, this program knows up to %d", ErrNewerFormat, version, formatVersion)
	}
	var r Record
	for name, into := range map[string]any{
		"seq": &r.Seq, "time": &r.Time, "event": &r.Event, "actor": &r.Actor, "actor_kind": &r.ActorKind,
		"subject": &r.Subject, "outcome": &r.Outcome,
	} {
		value, ok := raw[name]
		if !ok {
			continue
		}
		if err := json.Unmarshal(value, into); err != nil || bytes.Equal(value, []byte("null")) {
			return Record{}, fmt.Errorf("%w: its %s is %.40q", ErrMalformed, name, value)
		}
	}
	if r.Seq == 0 || r.Seq > maxSeq || r.Time.IsZero() || r.Event == "" {
		return Record{}, fmt.Errorf("%w: its seq, time or event is missing", ErrMalformed)
	}
	if details, ok := raw["details"]; ok {
		dec := json.NewDecoder(bytes.NewReader(details))
		dec.UseNumber() // serial numbers do not fit into a float64
		if err := dec.Decode(&r.Details); err != nil {
			return Record{}, fmt.Errorf("%w: its details are %.40q", ErrMalformed, details)
		}
	}
	return r, nil
}
