package policy

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

const (
	star     = "*"
	starStar = "**"
	scheme   = "spiffe://"
	// anySegment stands for "*" in parsed patterns. It is nothing that a segment can be, decoded ones included: "%2A" in a
	// path is a literal asterisk.
	anySegment = "/"
	// reserved is the first path segment of the IDs of the CA and its agents. No wildcard of an allow covers it.
	reserved = "spire"
)

// An idPattern is a parsed pattern for SPIFFE IDs.
type idPattern struct {
	trustDomain string
	segments    []string // without a final "**"; anySegment for "*"
	rest        bool     // the pattern ends in "**"
}

// parseIDPattern parses a full pattern, such as spiffe://example.org/ns/*/sa/web.
func parseIDPattern(s string) (idPattern, error) {
	if len(s) > spiffe.MaxIDBytes {
		return idPattern{}, fmt.Errorf("the pattern has %d bytes; at most %d are allowed", len(s), spiffe.MaxIDBytes)
	}
	name, found := strings.CutPrefix(s, scheme)
	if !found {
		return idPattern{}, fmt.Errorf("%q is not a SPIFFE ID; write spiffe://trust-domain/path, or /path in the own trust domain", s)
	}
	name, path, _ := strings.Cut(name, "/")
	if strings.Contains(name, star) {
		return idPattern{}, fmt.Errorf("%q has a wildcard in its trust domain; name the trust domain", s)
	}
	td, err := spiffe.ParseTrustDomain(name)
	if err != nil {
		return idPattern{}, err
	}
	if path == "" {
		return idPattern{}, fmt.Errorf("%q has no path; write %s%s/** for every workload of the trust domain", s, scheme, name)
	}
	segments, rest, err := splitPattern(path)
	if err != nil {
		return idPattern{}, fmt.Errorf("%q: %w", s, err)
	}
	for _, segment := range segments {
		if segment == anySegment {
			continue
		}
		if _, err := spiffe.ParseID(scheme + td.Name() + "/" + segment); err != nil {
			return idPattern{}, err
		}
	}
	return idPattern{trustDomain: td.Name(), segments: segments, rest: rest}, nil
}

// splitPattern cuts the part of a pattern behind its first slash into segments, takes a final "**" off and writes
// anySegment for "*".
func splitPattern(path string) (segments []string, rest bool, err error) {
	segments = strings.Split(path, "/")
	for i, segment := range segments {
		switch {
		case segment == starStar && i < len(segments)-1:
			return nil, false, fmt.Errorf("%q can only be the last segment", starStar)
		case segment == starStar:
			return segments[:i], true, nil
		case segment == star:
			segments[i] = anySegment
		case strings.Contains(segment, star):
			return nil, false, fmt.Errorf("segment %q mixes a wildcard with text; a wildcard is a whole segment", segment)
		}
	}
	return segments, false, nil
}

// literal reports whether the pattern matches exactly one ID.
func (p idPattern) literal() bool {
	if p.rest {
		return false
	}
	for _, segment := range p.segments {
		if segment == anySegment {
			return false
		}
	}
	return true
}

// matches is the slow form of what the tries of Policies do; Explain and ServiceMatches use it.
func (p idPattern) matches(id spiffeid.ID, wide bool) bool {
	if id.TrustDomain().Name() != p.trustDomain || id.Path() == "" {
		return false
	}
	segments := strings.Split(id.Path()[1:], "/")
	if !wide && segments[0] == reserved && (len(p.segments) == 0 || p.segments[0] == anySegment) {
		return false
	}
	switch least := len(p.segments); {
	case !p.rest && len(segments) != least, p.rest && wide && len(segments) < least, p.rest && !wide && len(segments) <= least:
		return false
	}
	for i, segment := range p.segments {
		if segment != anySegment && segment != segments[i] {
			return false
		}
	}
	return true
}

// ServiceMatches reports whether the full pattern of a policy's service covers id. It reads narrow: /a/** does not cover
// /a, and no wildcard in the first segment covers /spire. A malformed pattern covers nothing.
func ServiceMatches(pattern string, id spiffeid.ID) bool {
	p, err := parseIDPattern(pattern)
	return err == nil && p.matches(id, false)
}

// CheckIDPattern says what is wrong with a full pattern of SPIFFE IDs, such as spiffe://example.org/ns/*/sa/web.
func CheckIDPattern(pattern string) error {
	_, err := parseIDPattern(pattern)
	return err
}
