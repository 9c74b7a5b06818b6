package policy

import (
	"crypto/x509"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// A Protocol says how much an enforcement point knows of a call.
type Protocol uint8

const (
	// ProtocolTLS is a connection of which only the peer's ID is known. It is allowed only by rules without http, grpc,
	// jwt and when, and refused by any deny whose callers match.
	ProtocolTLS Protocol = iota
	// ProtocolHTTP is one HTTP request, gRPC calls included.
	ProtocolHTTP
)

// A Request is a call to be decided: the raw facts, as they came over the wire. What they mean is Decide's to say.
type Request struct {
	// Service is the ID of the service that is called, Peer the verified ID of the TLS peer.
	Service, Peer spiffeid.ID

	Protocol Protocol
	// Method is the HTTP method; POST for gRPC.
	Method string
	// Path is the request target exactly as received, with its query, never cleaned or decoded.
	Path string
	// ContentTypes are all lines of the header Content-Type.
	ContentTypes []string
	// Headers has the headers of the request, for conditions; an http.Header is one. Nil: none.
	Headers Headers
	// HasMethodOverride says that X-HTTP-Method-Override, X-HTTP-Method or X-Method-Override is present; see
	// IsMethodOverride.
	HasMethodOverride bool

	// PeerSVID is the kind of SVID by which the peer identified itself.
	PeerSVID SVIDKind
	// Certificate is the peer's X509-SVID, verified, so that a revocation of it is seen. Nil: only the ID is known.
	Certificate *x509.Certificate
	// Token is the caller's JWT-SVID, validated for an audience of Policies.Audiences. Nil if there is none or it is
	// not valid.
	Token *Token
	// User is the validated token of the user for whom the caller asks. Nil if there is none or it is not valid.
	User *User
}

// An SVIDKind is a kind of SVID.
type SVIDKind uint8

// The kinds of SVIDs. The zero SVIDKind is that of TLS peers.
const (
	SVIDX509 SVIDKind = iota
	SVIDJWT
	SVIDWIT
)

// String returns the kind as conditions name it and bundles do: x509-svid, jwt-svid or wit-svid.
func (k SVIDKind) String() string {
	switch k {
	case SVIDX509:
		return "x509-svid"
	case SVIDJWT:
		return "jwt-svid"
	case SVIDWIT:
		return "wit-svid"
	}
	return "unknown"
}

// Headers are those of a request.
type Headers interface {
	// Values returns all lines of a header; its name is in lower case and found whatever the case on the wire.
	Values(name string) []string
}

// A Token is what a validated JWT-SVID says.
type Token struct {
	// ID is its subject.
	ID spiffeid.ID
	// Audience are all its audiences.
	Audience []string
	// Claims are all its claims, numbers as json.Number.
	Claims map[string]any
}

// A User is what a validated user token says.
type User struct {
	// Issuer is its iss, the one of a UserIssuer of the policies.
	Issuer string
	// Claims are all its claims, numbers as json.Number.
	Claims map[string]any
}

// IsMethodOverride reports whether a header of this name asks an application to take another method for the request's.
func IsMethodOverride(header string) bool {
	return strings.EqualFold(header, "X-HTTP-Method-Override") || strings.EqualFold(header, "X-HTTP-Method") ||
		strings.EqualFold(header, "X-Method-Override")
}

// Decide decides a call. It allocates nothing, keeps nothing of r, and takes about as long for 100,000 rules as for ten.
// What costs time is how many patterns fit at once: those that put "*" in different places, of which it looks at a bounded
// number and then denies, and rules of one caller pattern and one path pattern that differ in their methods or tokens only.
// A condition is evaluated where all else of its rule fits. That allocates for some conditions, and a bounded number is evaluated for a call.
func (p *Policies) Decide(r *Request) Decision {
	s := newScan(r)
	d := p.decide(&s)
	p.compare(&d, r, false)
	return d
}

// MightAllow reports whether some request of peer to service could be allowed: whether there is an allow for the peer,
// whatever that asks for besides, and no deny that covers all its requests. It is no decision about a call.
func (p *Policies) MightAllow(service, peer spiffeid.ID) Decision {
	r := &Request{Service: service, Peer: peer}
	s := scan{r: r, might: true}
	d := p.decide(&s)
	p.compare(&d, r, true)
	return d
}

func (p *Policies) decide(s *scan) Decision {
	if p == nil {
		return Decision{Outcome: Outcome{Reason: ReasonUnknownPolicy}}
	}
	d := Decision{Epoch: p.set.GetEpoch(), Revision: p.set.GetRevision()}
	switch {
	case p.stale:
		d.Reason = ReasonStalePolicy
		return d
	case s.r.Service.Path() == "" || s.r.Service.TrustDomain().Name() != p.td:
		d.Reason = ReasonForeignService
		return d
	case s.r.Peer.Path() == "":
		d.Reason = ReasonInvalidPeer
		return d
	}
	if name, found := p.revoked(s.r); found {
		d.Reason, d.Revocation = ReasonRevoked, name
		return d
	}
	s.hints, s.home = p.hints, p.home
	p.find(s.r.Service, s)
	d.Outcome = s.outcome(0, s.named)
	if s.shadowed {
		d.Shadow = s.outcome(1, true)
	}
	if !s.named && s.unknown == nil && s.steps <= maxSteps && p.defaults == policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW {
		if !s.shadowed {
			d.Shadow = d.Outcome
		}
		d.Outcome = Outcome{Allowed: true, Reason: ReasonDefaultShadow}
	}
	return d
}

// find shows s what the policies of a service say, first for exactly this service, then for patterns that cover it.
func (p *Policies) find(service spiffeid.ID, s *scan) {
	s.group(p.exact[service.String()])
	if p.patterns != nil {
		findGroups(p.patterns, service.Path(), true, s)
	}
}

func findGroups(t *trie[group], path string, first bool, s *scan) {
	if s.tooFar() {
		return
	}
	if path == "" {
		s.group(t.here)
		return
	}
	segment, rest := cut(path)
	if !first || segment != reserved {
		s.group(t.rest)
		if t.star != nil {
			findGroups(t.star, rest, false, s)
		}
	}
	if next := t.next(segment); next != nil {
		findGroups(next, rest, false, s)
	}
}

// Audiences returns, sorted, the audiences of the JWT-SVIDs that some rule for calls from peer to service asks for. An
// enforcement point looks for a token only if there are any, and validates it for them.
func (p *Policies) Audiences(service, peer spiffeid.ID) []string {
	audiences, _ := p.tokens(service, peer)
	return audiences
}

// UserIssuers returns, sorted, the issuers of user tokens that some rule for calls from peer to service asks for.
func (p *Policies) UserIssuers(service, peer spiffeid.ID) []string {
	_, issuers := p.tokens(service, peer)
	return issuers
}

func (p *Policies) tokens(service, peer spiffeid.ID) (audiences, issuers []string) {
	if p == nil || p.stale || service.TrustDomain().Name() != p.td {
		return nil, nil
	}
	s := scan{r: &Request{Service: service, Peer: peer}, tokens: true}
	p.find(service, &s)
	for i := range p.former { // else a denial could not be compared with what held before
		p.former[i].policies.find(service, &s)
	}
	slices.Sort(s.audiences)
	slices.Sort(s.issuers)
	return slices.Compact(s.audiences), slices.Compact(s.issuers)
}
