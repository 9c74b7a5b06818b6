package analyse

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

const (
	star     = "*"
	starStar = "**"
	scheme   = "spiffe://"
	reserved = "spire" // the first segment that no wildcard of an allow covers
)

// A pattern is one that package policy has accepted, cut into segments. Those for paths have no trust domain.
type pattern struct {
	td       string
	segments []string // without a final "**"
	rest     bool
}

// idPattern cuts a full pattern for SPIFFE IDs. It reports false for what is none.
func idPattern(s string) (pattern, bool) {
	name, found := strings.CutPrefix(s, scheme)
	td, path, slash := strings.Cut(name, "/")
	if !found || !slash || td == "" || path == "" {
		return pattern{}, false
	}
	p := cutPattern(path)
	p.td = td
	return p, true
}

// pathPattern cuts a pattern for HTTP paths; one of gRPC methods is one with a slash before it.
func pathPattern(s string) pattern { return cutPattern(strings.TrimPrefix(s, "/")) }

func cutPattern(path string) pattern {
	segments := strings.Split(path, "/")
	if last := len(segments) - 1; segments[last] == starStar {
		return pattern{segments: segments[:last], rest: true}
	}
	return pattern{segments: segments}
}

func (p pattern) String() string {
	segments := p.segments
	if p.rest {
		segments = append(slices.Clone(segments), starStar)
	}
	path := "/" + strings.Join(segments, "/")
	if p.td == "" {
		return path
	}
	return scheme + p.td + path
}

// literal reports whether the pattern matches one thing only.
func (p pattern) literal() bool { return !p.rest && !slices.Contains(p.segments, star) }

// wildFirst reports whether the first segment is a wildcard.
func (p pattern) wildFirst() bool { return len(p.segments) == 0 || p.segments[0] == star }

// covers reports whether p matches all that q, read narrow, matches. Wide says to read p as a deny does.
func (p pattern) covers(q pattern, wide bool) bool {
	if p.td != q.td {
		return false
	}
	if p.td != "" && !wide && p.wildFirst() && !q.wildFirst() && q.segments[0] == reserved {
		return false
	}
	if p.td == "" && wide {
		p, q = p.widened(), q.widened()
	}
	more := len(q.segments) - len(p.segments)
	if more < 0 {
		return false
	}
	for i, segment := range p.segments {
		if have := q.segments[i]; segment != have && (segment != star || have == "") {
			return false
		}
	}
	switch {
	case !p.rest:
		return more == 0 && !q.rest
	case wide:
		return true
	case more == 0:
		return q.rest
	}
	return q.segments[len(p.segments)] != ""
}

// widened is a path pattern as a deny reads it: decoded and without a trailing slash.
func (p pattern) widened() pattern {
	w := pattern{rest: p.rest, segments: make([]string, 0, len(p.segments))}
	for i, segment := range p.segments {
		if segment == "" && i == len(p.segments)-1 {
			break
		}
		w.segments = append(w.segments, decoded(segment))
	}
	return w
}

// decoded undoes the escapes of a segment. An escaped asterisk stays escaped, for it is no wildcard.
func decoded(segment string) string {
	if !strings.Contains(segment, "%") {
		return segment
	}
	var b strings.Builder
	for i := 0; i < len(segment); i++ {
		c := segment[i]
		if c == '%' && i+2 < len(segment) {
			if d := unhex(segment[i+1])<<4 | unhex(segment[i+2]); d != '*' {
				b.WriteByte(d)
				i += 2
				continue
			}
			b.WriteString("%2A")
			i += 2
			continue
		}
		b.WriteByte(c)
	}
	return b.String()
}

func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 0
}

// matchesID reports whether the pattern matches an ID.
func (p pattern) matchesID(id spiffeid.ID, wide bool) bool {
	if id.Path() == "" {
		return false
	}
	return p.covers(pattern{td: id.TrustDomain().Name(), segments: strings.Split(id.Path()[1:], "/")}, wide)
}

// matchesPath reports whether the pattern matches the path of a request, without its query.
func (p pattern) matchesPath(path string, wide bool) bool {
	if path == "" || path[0] != '/' {
		return false
	}
	segments := strings.Split(path[1:], "/")
	for i, segment := range segments { // an asterisk of a request is no wildcard
		if segment == star || segment == starStar {
			segments[i] = strings.ReplaceAll(segment, star, "%2A")
			if !wide {
				segments[i] = "\x00"
			}
		}
	}
	return p.covers(pattern{segments: segments}, wide)
}

// relative writes an ID or pattern as documents of the trust domain td would.
func relative(s, td string) string {
	if path, found := strings.CutPrefix(s, scheme+td+"/"); found {
		return "/" + path
	}
	return s
}

func serves(p *policyv1.Policy, service spiffeid.ID) bool {
	for _, s := range p.GetServices() {
		if pattern, ok := idPattern(s); ok && pattern.matchesID(service, false) {
			return true
		}
	}
	return false
}

func isDeny(r *policyv1.Rule) bool { return r.GetEffect() != policyv1.Effect_EFFECT_ALLOW }

func open(r *policyv1.Rule) bool { return len(r.GetHttp())+len(r.GetGrpc()) == 0 }

func conditional(r *policyv1.Rule) bool { return r.GetJwt() != nil || r.GetWhen() != "" }
