package policy

import (
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// KindRevocation is the kind of document that withdraws SVIDs before they expire.
const KindRevocation = "Revocation"

// Bounds of a Revocation document.
const (
	maxReason = 1024
	maxJTI    = 1024
	// authorityIDBytes is the length of an X.509 authority's key identifier: a SHA-1, or a SHA-256 cut to its length.
	minAuthorityIDBytes, maxAuthorityIDBytes = 8, 64
)

type revocationDoc struct {
	Kind         text `yaml:"kind" enum:"Revocation" required:"true" desc:"Revocation"`
	Name         text `yaml:"name" required:"true" desc:"Name of the revocation, unique among Revocations."`
	ID           text `yaml:"id" one:"target" desc:"SPIFFE ID or pattern, full or relative to the trust domain, read as wide as in a deny: SVIDs of any kind, and none is issued any more."`
	Serial       text `yaml:"serial" one:"target" desc:"Serial number of an X509-SVID of this trust domain, in quotes: decimal, or hexadecimal with 0x or colons as openssl prints it."`
	Agent        text `yaml:"agent" one:"target" desc:"SPIFFE ID of an agent: it is banned, and all SVIDs that it obtained are revoked."`
	JTI          text `yaml:"jti" one:"target" desc:"The jti claim of a JWT-SVID."`
	Authority    text `yaml:"authority" one:"target" desc:"Id of an X.509 authority, in hexadecimal: all X509-SVIDs that it signed."`
	IssuedBefore text `yaml:"issuedBefore" desc:"With id only: SVIDs that were issued before this moment, in RFC 3339. Later ones are good, so that workloads get new ones at once."`
	Reason       text `yaml:"reason" desc:"Why, for people."`
	Expires      text `yaml:"expires" desc:"When the revocation ends by itself, in RFC 3339. Absent: never."`
}

// A RevocationDocument is a Revocation as an operator wrote it. Of ID, Serial, Agent, JTI and Authority exactly one is set.
type RevocationDocument struct {
	Name string
	// ID is a full SPIFFE ID or pattern.
	ID string
	// Serial is big endian without leading zero bytes.
	Serial []byte
	Agent  spiffeid.ID
	JTI    string
	// Authority is in lower-case hexadecimal.
	Authority string
	// IssuedBefore is zero if all are meant, and Expires if it does not end.
	IssuedBefore, Expires time.Time
	Reason                string
}

// Target says in a few words what a revocation is about.
func (d *RevocationDocument) Target() string {
	switch {
	case d.ID != "" && !d.IssuedBefore.IsZero():
		return fmt.Sprintf("id %s, issued before %s", d.ID, d.IssuedBefore.UTC().Format(time.RFC3339))
	case d.ID != "":
		return "id " + d.ID
	case d.Serial != nil:
		return "serial " + new(big.Int).SetBytes(d.Serial).String()
	case !d.Agent.IsZero():
		return "agent " + d.Agent.String()
	case d.JTI != "":
		return fmt.Sprintf("jti %q", d.JTI)
	}
	return "authority " + d.Authority
}

// Sweeping tells whether the first path segment of a revocation's ID is a wildcard. Such a revocation is meant for workloads:
// whoever verifies an agent's SVID refuses it, but the CA goes on talking to its agents, which would not hear of it otherwise.
func Sweeping(r *policyv1.Revocation) bool {
	pattern, err := parseIDPattern(r.GetSpiffeId())
	return err == nil && sweeping(pattern)
}

func sweeping(p idPattern) bool { return len(p.segments) == 0 || p.segments[0] == anySegment }

// RevocationCovers tells whether a full ID or pattern of a revocation covers id.
func RevocationCovers(pattern string, id spiffeid.ID) bool {
	p, err := parseIDPattern(pattern)
	return err == nil && p.matches(id, true)
}

// ParseRevocation reads a Revocation document. IDs that are relative become full ones in td. The error is of type
// strictyaml.Errors: all mistakes of the document with line and column.
func ParseRevocation(doc strictyaml.Document, td spiffeid.TrustDomain) (*RevocationDocument, error) {
	var d revocationDoc
	p := &parser{file: doc.File, td: td}
	p.decode(doc, &d)
	p.kind(d.Kind, KindRevocation)
	out := &RevocationDocument{Name: p.name(d.Name), Reason: d.Reason.Value}
	var targets []text
	for _, t := range []text{d.ID, d.Serial, d.Agent, d.JTI, d.Authority} {
		if t.Line != 0 {
			targets = append(targets, t)
		}
	}
	const one = "exactly one of id, serial, agent, jti and authority says what is revoked"
	switch len(targets) {
	case 0:
		p.missing("the target", "one of id, serial, agent, jti and authority")
	case 1:
	default:
		p.fail(targets[1], "this is a second target; %s", one)
	}
	for _, f := range []struct {
		t    text
		read func(text)
	}{{d.ID, func(t text) { p.revokedID(t, out) }}, {d.Serial, func(t text) { p.revokedSerial(t, out) }}, {d.Agent, func(t text) { p.revokedAgent(t, out) }},
		{d.JTI, func(t text) { p.revokedJTI(t, out) }}, {d.Authority, func(t text) { p.revokedAuthority(t, out) }}} {
		if f.t.Line != 0 {
			f.read(f.t)
		}
	}
	if len(out.Reason) > maxReason || !utf8.ValidString(out.Reason) {
		p.fail(d.Reason, "reason has %d bytes; at most %d of UTF-8 are kept", len(out.Reason), maxReason)
	}
	out.Expires = p.moment("expires", d.Expires)
	out.IssuedBefore = p.moment("issuedBefore", d.IssuedBefore)
	if d.IssuedBefore.Line != 0 && d.ID.Line == 0 {
		p.fail(d.IssuedBefore, "issuedBefore goes with id only")
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return out, nil
}

func (p *parser) moment(field string, t text) time.Time {
	if t.Line == 0 {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339, t.Value)
	if err != nil || at.Unix() <= 0 || at.Year() > 9999 {
		p.fail(t, "%s is %q; it must be a moment such as 2027-01-31T00:00:00Z", field, shorten(t.Value))
		return time.Time{}
	}
	return at.UTC().Truncate(time.Second)
}

func (p *parser) revokedID(t text, out *RevocationDocument) {
	s, pattern, ok := p.full(t)
	if !ok {
		return
	}
	if server, err := spiffeid.FromPath(p.td, "/spire/server"); err == nil && !sweeping(pattern) && pattern.matches(server, true) {
		p.fail(t, "id %q covers the CA itself, without which no agent hears of anything; revoke its authority instead", s)
	}
	out.ID = s
}

func (p *parser) revokedSerial(t text, out *RevocationDocument) {
	serial, err := ParseSerial(t.Value)
	if err != nil {
		p.fail(t, "%v", err)
		return
	}
	out.Serial = serial
}

func (p *parser) revokedAgent(t text, out *RevocationDocument) {
	s := t.Value
	if strings.HasPrefix(s, "/") {
		s = scheme + p.td.Name() + s
	}
	id, err := spiffe.ParseWorkloadID(s)
	switch {
	case err != nil:
		p.fail(t, "agent: %v", err)
	case id.TrustDomain() != p.td || !strings.HasPrefix(id.Path(), "/spire/agent/"):
		p.fail(t, "agent %q is not an agent's ID, which begins with %s%s/spire/agent/; `signet agent list` shows them", shorten(s), scheme, p.td.Name())
	}
	out.Agent = id
}

func (p *parser) revokedJTI(t text, out *RevocationDocument) {
	if t.Value == "" || len(t.Value) > maxJTI {
		p.fail(t, "jti has %d bytes; it has 1 to %d", len(t.Value), maxJTI)
	}
	out.JTI = t.Value
}

func (p *parser) revokedAuthority(t text, out *RevocationDocument) {
	id, err := ParseAuthorityID(t.Value)
	if err != nil {
		p.fail(t, "%v", err)
	}
	out.Authority = id
}

// ParseAuthorityID reads the id of an X.509 authority: its key identifier in hexadecimal, with colons or without. It returns
// it as `signet authority list` prints it.
func ParseAuthorityID(s string) (string, error) {
	bad := fmt.Errorf("authority is %q; it must be an X.509 authority's id in hexadecimal, as `signet authority list` prints it", shorten(s))
	if len(s) > 3*maxAuthorityIDBytes {
		return "", bad
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, ":", ""))
	if err != nil || len(b) < minAuthorityIDBytes || len(b) > maxAuthorityIDBytes {
		return "", bad
	}
	return hex.EncodeToString(b), nil
}

// maxSerialText is longer than any spelling of a serial number of 20 bytes.
const maxSerialText = 128

// ParseSerial reads a serial number as people have it at hand: decimal; hexadecimal after 0x; hexadecimal in bytes with
// colons, as `openssl x509 -text` prints it; or as `openssl x509 -serial` prints it, after "serial=". Hexadecimal without any
// of these is understood if it holds a letter. It returns the number big endian without leading zero bytes.
func ParseSerial(s string) ([]byte, error) {
	bad := fmt.Errorf("serial is %q; it must be a positive number of at most %d bytes, in decimal, or in hexadecimal after 0x or in bytes with colons", shorten(s), maxSerial)
	if len(s) > maxSerialText {
		return nil, bad
	}
	t := strings.ToLower(strings.TrimSpace(s))
	t, hexadecimal := strings.CutPrefix(t, "serial=")
	if rest, ok := strings.CutPrefix(t, "0x"); ok {
		t, hexadecimal = rest, true
	}
	if strings.Contains(t, ":") {
		hexadecimal = true
		for _, octet := range strings.Split(t, ":") {
			if len(octet) != 2 {
				return nil, bad
			}
		}
		t = strings.ReplaceAll(t, ":", "")
	}
	hexadecimal = hexadecimal || strings.ContainsAny(t, "abcdef")
	base, digits := 10, "0123456789"
	if hexadecimal {
		base, digits = 16, "0123456789abcdef"
	}
	if t == "" || strings.Trim(t, digits) != "" {
		return nil, bad
	}
	n, ok := new(big.Int).SetString(t, base)
	if !ok || n.Sign() <= 0 || n.BitLen() > 8*maxSerial-1 {
		return nil, bad
	}
	return n.Bytes(), nil
}
