package spiffe

import (
	"errors"
	"strings"
)

// idFaults returns every rule that s breaks as a SPIFFE ID, for people who inspect one. ParseID stops at the first; here
// the fault is mended in a copy, and what is left is parsed again.
func idFaults(s string) []error {
	var faults []error
	seen := map[string]bool{}
	const rules = 20 // there are fewer, and each is met once
	for range rules {
		_, err := ParseID(s)
		row := innermostRow(err)
		if err == nil || seen[row] {
			return faults
		}
		seen[row] = true
		faults = append(faults, err)
		mended, ok := mendID(s, row)
		if !ok {
			return faults
		}
		s = mended
	}
	return faults
}

// innermostRow returns the row that says most precisely what is wrong.
func innermostRow(err error) (row string) {
	var r *RowError
	for errors.As(err, &r) {
		row, err = r.Row, r.Err
	}
	return row
}

// mendID removes from s whatever breaks a row. It reports false for what cannot be mended, such as another scheme.
func mendID(s, row string) (string, bool) {
	if row == "DEC-02" {
		return strings.TrimSuffix(s[:MaxIDBytes], "/"), true
	}
	if row == "DEC-01" {
		return idScheme + s[len(idScheme):], true
	}
	rest, found := strings.CutPrefix(s, idScheme)
	if !found {
		return "", false
	}
	name, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		name, path = rest[:i], rest[i:]
	}
	switch row {
	case "ID-03", "ID-04":
		return idScheme + rest[:strings.IndexAny(rest, "?#")], true
	case "ID-02":
		name = "x"
	case "ID-11":
		name = name[:MaxTrustDomainBytes]
	case "ID-05":
		name = name[strings.LastIndexByte(name, '@')+1:]
	case "ID-06":
		name, _, _ = strings.Cut(name, ":")
	case "ID-07":
		name = strings.ToLower(name)
	case "ID-08", "ID-09", "ID-10":
		name = keep(name, func(c byte) bool { return lowerNameByte(c) || c == ':' || c == '@' || 'A' <= c && c <= 'Z' })
	case "ID-13":
		path = keep(path, func(c byte) bool { return c != '%' })
	case "ID-17":
		path = keep(path, func(c byte) bool { return lowerNameByte(c) || 'A' <= c && c <= 'Z' || c == '/' || c == '%' })
	case "ID-14", "ID-15", "ID-16":
		var segments []string
		for _, segment := range strings.Split(path, "/")[1:] {
			if row == "ID-15" && (segment == "." || segment == "..") {
				segment = "x"
			}
			segments = append(segments, segment)
		}
		if row == "ID-16" {
			for len(segments) > 0 && segments[len(segments)-1] == "" {
				segments = segments[:len(segments)-1]
			}
		}
		if row == "ID-14" {
			for i := range len(segments) - 1 {
				if segments[i] == "" {
					segments[i] = "x"
				}
			}
		}
		path = ""
		if len(segments) > 0 {
			path = "/" + strings.Join(segments, "/")
		}
	default:
		return "", false
	}
	return idScheme + name + path, true
}

func lowerNameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '.' || c == '-' || c == '_'
}

// keep replaces what ok does not allow by an x, so that no segment becomes empty by it.
func keep(s string, ok func(byte) bool) string {
	b := []byte(s)
	for i, c := range b {
		if !ok(c) {
			b[i] = 'x'
		}
	}
	return string(b)
}
