package policy

import (
	"errors"
	"fmt"
	"strings"
)

// maxPath is the longest HTTP path that is judged, in bytes, without the query.
const maxPath = 8 << 10

// A pathFault is why a path is refused whatever the rules say. Each is a way in which two programs could understand one
// path differently.
type pathFault uint8

const (
	pathSound pathFault = iota
	pathTooLong
	pathNotOrigin
	pathBadByte
	pathBadEscape
	pathEscapedPlain
	pathEmptySegment
	pathDotSegment
)

func (f pathFault) String() string {
	switch f {
	case pathSound:
		return "sound"
	case pathTooLong:
		return fmt.Sprintf("is longer than %d bytes", maxPath)
	case pathNotOrigin:
		return `is not in origin form: it must begin with "/"`
	case pathBadByte:
		return `has a byte outside of 0x21 to 0x7E, or a raw backslash, ";" or "#"`
	case pathBadEscape:
		return `has a "%" without two hexadecimal digits`
	case pathEscapedPlain:
		return `escapes a letter, digit, "-", ".", "_", "~", "/", "\", ";", "%", "#", "?" or a control byte`
	case pathEmptySegment:
		return `has an empty segment ("//")`
	case pathDotSegment:
		return `has a "." or ".." segment`
	}
	return "refused"
}

// checkPath judges the path of a request target, without its query.
func checkPath(path string) pathFault {
	switch {
	case len(path) > maxPath:
		return pathTooLong
	case path == "" || path[0] != '/':
		return pathNotOrigin
	}
	segment := 1 // where the present segment begins
	for i := 1; i < len(path); i++ {
		switch c := path[i]; {
		case c == '/':
			if fault := checkSegment(path[segment:i]); fault != pathSound {
				return fault
			}
			segment = i + 1
		case c < 0x21 || c > 0x7e || c == '\\' || c == ';' || c == '#':
			return pathBadByte
		case c == '%':
			if i+2 >= len(path) || !isHex(path[i+1]) || !isHex(path[i+2]) {
				return pathBadEscape
			}
			if escapedPlain(unhex(path[i+1])<<4 | unhex(path[i+2])) {
				return pathEscapedPlain
			}
			i += 2
		}
	}
	if last := path[segment:]; last != "" { // a trailing slash is no empty segment
		return checkSegment(last)
	}
	return pathSound
}

func checkSegment(segment string) pathFault {
	switch segment {
	case "":
		return pathEmptySegment
	case ".", "..":
		return pathDotSegment
	}
	return pathSound
}

// escapedPlain reports whether c must not be written as an escape.
func escapedPlain(c byte) bool {
	switch {
	case c < 0x20, c == 0x7f:
		return true
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	switch c {
	case '-', '.', '_', '~', '/', '\\', ';', '%', '#', '?':
		return true
	}
	return false
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'F':
		return c - 'A' + 10
	default:
		return c - 'a' + 10
	}
}

// unescape appends the decoded segment to buf. The segment is part of a path that checkPath found sound.
func unescape(buf []byte, segment string) []byte {
	for i := 0; i < len(segment); i++ {
		if segment[i] != '%' {
			buf = append(buf, segment[i])
			continue
		}
		buf = append(buf, unhex(segment[i+1])<<4|unhex(segment[i+2]))
		i += 2
	}
	return buf
}

// A pathPattern is a parsed pattern for HTTP paths.
type pathPattern struct {
	segments []string // without a final "**"; anySegment for "*"; a last empty one is a trailing slash
	rest     bool
}

// parsePathPattern parses a pattern such as /v1/documents/**. A pattern that no sound path could match is an error.
func parsePathPattern(s string) (pathPattern, error) {
	if s == star {
		return pathPattern{}, errors.New(`"*" (OPTIONS *) is covered only by rules without paths; remove paths`)
	}
	if strings.Contains(s, "?") {
		return pathPattern{}, fmt.Errorf("path %q has a query; queries are not judged, remove everything from the \"?\" on", s)
	}
	if fault := checkPath(s); fault != pathSound {
		return pathPattern{}, fmt.Errorf("path %q can never match: such a path is refused, because it %s", shorten(s), fault)
	}
	segments, rest, err := splitPattern(s[1:])
	if err != nil {
		return pathPattern{}, fmt.Errorf("path %q: %w", s, err)
	}
	return pathPattern{segments, rest}, nil
}

// widened returns the pattern as a deny reads it: decoded, and without a trailing slash.
func (p pathPattern) widened() pathPattern {
	wide := pathPattern{rest: p.rest}
	for i, segment := range p.segments {
		if segment != "" || i < len(p.segments)-1 {
			wide.segments = append(wide.segments, string(unescape(nil, segment)))
		}
	}
	return wide
}

// parseGRPCMethod parses pkg.Service/Method or pkg.Service/* to the pattern of its path on the wire.
func parseGRPCMethod(s string) (pathPattern, error) {
	service, method, found := strings.Cut(s, "/")
	switch {
	case !found && s != "", strings.Contains(method, "/"), service == "" && found:
		return pathPattern{}, fmt.Errorf("gRPC method %q is not of the form pkg.Service/Method or pkg.Service/*, without a slash before it", s)
	case !isProtoName(service, true):
		return pathPattern{}, fmt.Errorf("gRPC method %q: %q is not the full name of a service, such as documents.v1.Documents", s, service)
	case method != star && !isProtoName(method, false):
		return pathPattern{}, fmt.Errorf("gRPC method %q: %q is not the name of a method; write a name or *", s, method)
	}
	if method == star {
		method = anySegment
	}
	return pathPattern{segments: []string{service, method}}, nil
}

// isProtoName reports whether s is an identifier of protobuf, or with dots a full name.
func isProtoName(s string, dots bool) bool {
	if s == "" || len(s) > 512 {
		return false
	}
	start := true
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_':
			start = false
		case '0' <= c && c <= '9' && !start:
		case c == '.' && dots && !start:
			start = true
		default:
			return false
		}
	}
	return !start
}

func shorten(s string) string {
	const limit = 100
	if len(s) > limit {
		return s[:limit] + "..."
	}
	return s
}
