package spiffe

import (
	"cmp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// MaxIDBytes is the longest SPIFFE ID in bytes, scheme and separators included. One of this length works
	// everywhere, a longer one nowhere. [SPIFFE-ID §2.3]
	MaxIDBytes = 2048

	// MaxTrustDomainBytes is the longest trust domain name in bytes. [RFC 3986 §3.2.2]
	MaxTrustDomainBytes = 255

	idScheme = "spiffe://"
)

// ParseID parses a SPIFFE ID. The path may be absent: such an ID names the trust domain itself.
//
// Nothing is folded, decoded or trimmed: what parses is printed back byte for byte, and two IDs are equal only if their
// bytes are. The error is a [RowError]. [SPIFFE-ID §2]
func ParseID(s string) (spiffeid.ID, error) {
	if len(s) > MaxIDBytes {
		return spiffeid.ID{}, broken("DEC-02", "SPIFFE ID %q has %d bytes, at most %d are allowed", excerpt(s), len(s), MaxIDBytes)
	}
	rest, found := strings.CutPrefix(s, idScheme)
	if !found {
		return spiffeid.ID{}, wrongScheme(s)
	}
	if i := strings.IndexAny(rest, "?#"); i >= 0 {
		if rest[i] == '?' {
			return spiffeid.ID{}, broken("ID-03", "SPIFFE ID %q has a query, remove everything from the '?' on", excerpt(s))
		}
		return spiffeid.ID{}, broken("ID-04", "SPIFFE ID %q has a fragment, remove everything from the '#' on", excerpt(s))
	}
	name, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		name, path = rest[:i], rest[i:]
	}
	if err := checkTrustDomainName(name); err != nil {
		return spiffeid.ID{}, err
	}
	if err := checkPath(s, path); err != nil {
		return spiffeid.ID{}, err
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, broken("ID-01", "SPIFFE ID %q: %w", excerpt(s), err)
	}
	return id, nil
}

// ParseWorkloadID parses a SPIFFE ID that names a workload: one with a path. The error is a [RowError], X509-07 if only
// the path is missing.
func ParseWorkloadID(s string) (spiffeid.ID, error) {
	id, err := ParseID(s)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if id.Path() == "" {
		return spiffeid.ID{}, broken("X509-07", "SPIFFE ID %q names a trust domain, not a workload: add a path, such as %s/web", excerpt(s), excerpt(s))
	}
	return id, nil
}

// ParseTrustDomain parses the bare name of a trust domain, such as "example.org". Unlike
// spiffeid.TrustDomainFromString it takes no SPIFFE ID. The error is a [RowError]. [SPIFFE-ID §2.1]
func ParseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	if rest, found := strings.CutPrefix(name, idScheme); found {
		bare, _, _ := strings.Cut(rest, "/")
		return spiffeid.TrustDomain{}, broken("ID-08", "trust domain %q is a SPIFFE ID, write the bare name %q", excerpt(name), excerpt(cmp.Or(bare, "example.org")))
	}
	if err := checkTrustDomainName(name); err != nil {
		return spiffeid.TrustDomain{}, err
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return spiffeid.TrustDomain{}, broken("ID-08", "trust domain %q: %w", excerpt(name), err)
	}
	return td, nil
}

// CheckOwnTrustDomain says whether td may be the trust domain of a signet CA. A name with an empty label is a legal
// trust domain, but no X.509 peer written in Go could read the certificates. The error is a [RowError] for DEC-03.
func CheckOwnTrustDomain(td spiffeid.TrustDomain) error {
	if td.IsZero() {
		return broken("ID-02", "trust domain is empty, write a name such as example.org")
	}
	for label := range strings.SplitSeq(td.Name(), ".") {
		if label == "" {
			return broken("DEC-03", "trust domain %q begins or ends with a dot or has two in a row: X.509 peers written in Go could not read its certificates, choose a name without an empty label", excerpt(td.Name()))
		}
	}
	return nil
}

// wrongScheme explains why s does not begin with "spiffe://".
func wrongScheme(s string) error {
	switch {
	case s == "":
		return broken("ID-01", "SPIFFE ID is empty, write one such as spiffe://example.org/web")
	case len(s) >= len(idScheme) && strings.EqualFold(s[:len(idScheme)], idScheme):
		return broken("DEC-01", "SPIFFE ID %q has an uppercase scheme, write %s in lower case", excerpt(s), idScheme)
	default:
		return broken("ID-01", "SPIFFE ID %q does not begin with %s", excerpt(s), idScheme)
	}
}

// checkTrustDomainName checks the characters and the length of a trust domain name, and says for the likely mistakes
// what they are.
func checkTrustDomainName(name string) error {
	if name == "" {
		return broken("ID-02", "trust domain is empty, write a name such as example.org")
	}
	if len(name) > MaxTrustDomainBytes {
		return broken("ID-11", "trust domain %q has %d bytes, at most %d are allowed", excerpt(name), len(name), MaxTrustDomainBytes)
	}
	if strings.IndexByte(name, '@') >= 0 {
		return broken("ID-05", "trust domain %q has a user part, remove everything up to the '@'", excerpt(name))
	}
	for i := range len(name) {
		c := name[i]
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '.', c == '-', c == '_':
		case c == '[' || c == ']':
			return broken("ID-10", "trust domain %q is an IPv6 literal, '[', ']' and ':' are not allowed in a trust domain", excerpt(name))
		case c == ':':
			return broken("ID-06", "trust domain %q has a port, remove everything from the ':' on", excerpt(name))
		case 'A' <= c && c <= 'Z':
			return broken("ID-07", "trust domain %q has the uppercase letter %q, write it in lower case", excerpt(name), c)
		case c == '%':
			return broken("ID-09", "trust domain %q is percent-encoded, write the characters themselves", excerpt(name))
		default:
			return broken("ID-08", "trust domain %q has the byte %q, allowed are a-z, 0-9, '.', '-' and '_'", excerpt(name), name[i:i+1])
		}
	}
	return nil
}

// checkPath checks the path of the SPIFFE ID s. The path is empty or begins with a slash.
func checkPath(s, path string) error {
	if path == "" {
		return nil
	}
	for i := range len(path) {
		c := path[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '-', c == '_', c == '/':
		case c == '%':
			return broken("ID-13", "SPIFFE ID %q has a percent-encoded path, write the characters themselves", excerpt(s))
		default:
			return broken("ID-17", "SPIFFE ID %q has the byte %q in its path, allowed are a-z, A-Z, 0-9, '.', '-' and '_'", excerpt(s), path[i:i+1])
		}
	}
	segments := path[1:]
	for {
		segment, rest, more := strings.Cut(segments, "/")
		switch {
		case segment == "" && !more:
			return broken("ID-16", "SPIFFE ID %q ends with a slash, remove it", excerpt(s))
		case segment == "":
			return broken("ID-14", "SPIFFE ID %q has an empty path segment, remove the double slash", excerpt(s))
		case segment == "." || segment == "..":
			return broken("ID-15", "SPIFFE ID %q has the path segment %q, name the path without it", excerpt(s), segment)
		case !more:
			return nil
		}
		segments = rest
	}
}
