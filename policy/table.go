package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// Tests is a table of calls and what is expected of them, from a document such as
//
//	kind: PolicyTest
//	trustDomain: example.org
//	policies: [documents.yaml]        # files with the documents, relative to this one; absent: those in this file
//	cases:
//	  - name: the web may read
//	    from: /web
//	    to: /documents-service
//	    http: GET /v1/documents/7     # or grpc: documents.v1.Documents/Get, or tls: true
//	    want: allow
//	    rule: documents:12            # optional: the policy that decides, and the line of its rule
//	  - from: /web
//	    to: /documents-service
//	    http: POST /v1/documents
//	    contentType: application/json # optional
//	    methodOverride: true          # optional: the request has a header such as X-HTTP-Method-Override
//	    headers: {x-tenant: blue}     # optional; a list for a header that comes several times
//	    jwt: {audience: [documents], subject: /web, claims: '{"scope": "a b"}'}   # optional; the subject is the caller if it is absent
//	    user: {issuer: "https://login.example", claims: '{"groups": ["editors"]}'}   # optional
//	    hint: internal                # optional: that of the caller's registration entry
//	    want: deny
type Tests struct {
	Name        string
	TrustDomain spiffeid.TrustDomain
	// Policies are the files with the documents to test, as written.
	Policies []string
	Cases    []TestCase
}

// A TestCase is one call and what is expected of it.
type TestCase struct {
	Name    string
	File    string
	Line    int
	Request Request
	// Hint is that of the caller's registration entry; empty: what the policies know.
	Hint string
	// Headers are those of Request, by their names in lower case.
	Headers map[string][]string
	Allow   bool
	// Policy and RuleLine name the rule that is to decide. Empty and 0 mean any.
	Policy   string
	RuleLine uint32
}

type testsDoc struct {
	Kind        text                          `yaml:"kind" enum:"PolicyTest" required:"true" desc:"PolicyTest"`
	Name        text                          `yaml:"name" desc:"Optional name of the table."`
	TrustDomain text                          `yaml:"trustDomain" required:"true" desc:"Trust domain of the services."`
	Policies    texts                         `yaml:"policies" desc:"Files with the documents to test, relative to this one."`
	Cases       []strictyaml.Located[caseDoc] `yaml:"cases" required:"true" desc:"Calls and what is expected of them."`
}

type caseDoc struct {
	Name           string                                                    `yaml:"name" desc:"What the case shows."`
	From           text                                                      `yaml:"from" required:"true" desc:"SPIFFE ID of the caller."`
	To             text                                                      `yaml:"to" required:"true" desc:"SPIFFE ID of the service."`
	HTTP           text                                                      `yaml:"http" desc:"Method and request target, such as GET /v1/documents."`
	GRPC           text                                                      `yaml:"grpc" desc:"gRPC method, such as pkg.Service/Method."`
	TLS            strictyaml.Located[bool]                                  `yaml:"tls" desc:"true: a connection of which only the caller is known."`
	ContentType    text                                                      `yaml:"contentType" desc:"Content type of the HTTP request."`
	MethodOverride bool                                                      `yaml:"methodOverride" desc:"The request has a header that overrides its method."`
	Headers        strictyaml.Located[map[string]strictyaml.OneOrMany[text]] `yaml:"headers" desc:"Headers of the request: a value, or a list of the values of several lines."`
	JWT            strictyaml.Located[caseToken]                             `yaml:"jwt" desc:"The caller's JWT-SVID."`
	User           strictyaml.Located[caseUser]                              `yaml:"user" desc:"The valid token of the user for whom the caller asks."`
	Hint           text                                                      `yaml:"hint" desc:"The hint of the caller's registration entry; absent: what the policies know."`
	Want           text                                                      `yaml:"want" enum:"allow,deny" required:"true" desc:"allow or deny"`
	Rule           text                                                      `yaml:"rule" desc:"The policy that is to decide, or policy:line."`
}

type caseToken struct {
	Audience texts `yaml:"audience" required:"true" desc:"Audiences of the token."`
	Subject  text  `yaml:"subject" desc:"Its subject; absent: the caller."`
	Claims   text  `yaml:"claims" desc:"Its claims beside sub and aud, as a JSON object in a text."`
}

type caseUser struct {
	Issuer text `yaml:"issuer" required:"true" desc:"Who issued the token: its iss."`
	Claims text `yaml:"claims" desc:"Its claims, as a JSON object in a text."`
}

// ParseTests reads a PolicyTest document. The error is of type strictyaml.Errors.
func ParseTests(doc strictyaml.Document) (*Tests, error) {
	var d testsDoc
	p := &parser{file: doc.File}
	p.decode(doc, &d)
	p.kind(d.Kind, KindPolicyTest)
	t := &Tests{Name: d.Name.Value}
	if d.TrustDomain.Line == 0 {
		p.missing("trustDomain", "one such as example.org")
	} else if td, err := spiffe.ParseTrustDomain(d.TrustDomain.Value); err != nil {
		p.fail(d.TrustDomain, "%v", err)
	} else {
		t.TrustDomain, p.td = td, td
	}
	for _, file := range p.filled("policies", d.Policies) {
		t.Policies = append(t.Policies, file.Value)
	}
	if len(d.Cases) == 0 {
		p.missing("cases", "at least one")
	}
	for i, c := range d.Cases {
		t.Cases = append(t.Cases, p.testCase(i, c))
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return t, nil
}

func (p *parser) testCase(i int, doc strictyaml.Located[caseDoc]) TestCase {
	d := doc.Value
	c := TestCase{Name: d.Name, File: p.file, Line: doc.Line, Allow: d.Want.Value == "allow"}
	if c.Name == "" {
		c.Name = "case " + strconv.Itoa(i+1)
	}
	if d.Want.Line == 0 {
		p.at(doc.Line, doc.Column, "want is missing; write allow or deny")
	} else if d.Want.Value != "allow" && d.Want.Value != "deny" {
		p.fail(d.Want, "want is %q; it must be allow or deny", d.Want.Value)
	}
	r := &c.Request
	r.Peer, r.Service = p.workload(doc, "from", d.From), p.workload(doc, "to", d.To)
	given := 0
	if d.TLS.Line != 0 {
		given++
		if !d.TLS.Value {
			p.at(d.TLS.Line, d.TLS.Column, "tls is false; write true, or http or grpc")
		}
	}
	if d.HTTP.Line != 0 {
		given++
		r.Protocol = ProtocolHTTP
		var found bool
		if r.Method, r.Path, found = strings.Cut(d.HTTP.Value, " "); !found || r.Method == "" || r.Path == "" {
			p.fail(d.HTTP, "http is %q; write a method and a request target, such as GET /v1/documents", shorten(d.HTTP.Value))
		}
		if d.ContentType.Line != 0 {
			r.ContentTypes = []string{d.ContentType.Value}
		}
	}
	if d.GRPC.Line != 0 {
		given++
		if pattern, err := parseGRPCMethod(d.GRPC.Value); err != nil || pattern.segments[1] == anySegment {
			p.fail(d.GRPC, "grpc is %q; write one method as pkg.Service/Method", shorten(d.GRPC.Value))
		}
		r.Protocol, r.Method, r.Path, r.ContentTypes = ProtocolHTTP, "POST", "/"+d.GRPC.Value, []string{"application/grpc"}
	}
	if given != 1 {
		p.at(doc.Line, doc.Column, "a case has exactly one of http, grpc and tls: true")
	}
	if d.ContentType.Line != 0 && d.HTTP.Line == 0 {
		p.fail(d.ContentType, "contentType goes with http only")
	}
	r.HasMethodOverride = d.MethodOverride
	if r.Protocol != ProtocolHTTP && (d.Headers.Line != 0 || d.User.Line != 0) {
		p.at(doc.Line, doc.Column, "headers and user go with http and grpc only")
	}
	if d.Headers.Line != 0 {
		c.Headers = p.headers(d.Headers.Value)
		r.Headers = tableHeaders(c.Headers)
	}
	if d.User.Line != 0 {
		if d.User.Value.Issuer.Value == "" {
			p.at(d.User.Line, d.User.Column, "user needs issuer: the iss of the token")
		}
		r.User = &User{Issuer: d.User.Value.Issuer.Value, Claims: p.claims(d.User.Value.Claims)}
	}
	c.Hint = d.Hint.Value
	if d.JWT.Line != 0 {
		r.Token = &Token{ID: r.Peer, Claims: p.claims(d.JWT.Value.Claims)}
		if d.JWT.Value.Subject.Line != 0 {
			r.Token.ID = p.workload(doc, "subject", d.JWT.Value.Subject)
		}
		if d.JWT.Value.Audience.Line == 0 {
			p.at(d.JWT.Line, d.JWT.Column, "jwt needs audience: what the token is for")
		}
		for _, a := range p.filled("audience", d.JWT.Value.Audience) {
			r.Token.Audience = append(r.Token.Audience, a.Value)
		}
		r.Token.Claims = StandardClaims(r.Token)
	}
	if d.Rule.Line != 0 {
		policy, line, found := strings.Cut(d.Rule.Value, ":")
		n, err := strconv.ParseUint(line, 10, 32)
		if policy == "" || found && (err != nil || n == 0) {
			p.fail(d.Rule, "rule is %q; write the name of a policy, or name:line", shorten(d.Rule.Value))
		}
		c.Policy, c.RuleLine = policy, uint32(n)
	}
	return c
}

// tableHeaders are the headers of a case, by their names in lower case.
type tableHeaders map[string][]string

// Values returns all lines of a header.
func (h tableHeaders) Values(name string) []string { return h[strings.ToLower(name)] }

func (p *parser) headers(doc map[string]strictyaml.OneOrMany[text]) tableHeaders {
	h := make(tableHeaders)
	for name, values := range doc {
		for _, v := range values {
			h[strings.ToLower(name)] = append(h[strings.ToLower(name)], v.Value)
		}
	}
	return h
}

func (p *parser) claims(t text) map[string]any {
	if t.Line == 0 {
		return map[string]any{}
	}
	claims, err := ParseClaims(t.Value)
	if err != nil {
		p.fail(t, "%v", err)
	}
	return claims
}

// StandardClaims are the claims of a token that somebody wrote down for trying out, and those that every JWT-SVID has.
func StandardClaims(t *Token) map[string]any {
	audience := make([]any, len(t.Audience))
	for i, a := range t.Audience {
		audience[i] = a
	}
	claims := map[string]any{"sub": t.ID.String(), "aud": audience}
	maps.Copy(claims, t.Claims)
	return claims
}

// maxClaims is the size of a text of claims, in bytes.
const maxClaims = 64 << 10

// ParseClaims reads claims that somebody wrote down for trying out: a JSON object.
func ParseClaims(s string) (map[string]any, error) {
	if len(s) > maxClaims {
		return nil, fmt.Errorf("claims have %d bytes; at most %d are allowed", len(s), maxClaims)
	}
	var claims map[string]any
	d := json.NewDecoder(strings.NewReader(s))
	d.UseNumber()
	if err := d.Decode(&claims); err != nil || claims == nil {
		return nil, fmt.Errorf(`claims are %q; write a JSON object, such as {"scope": "documents.read"}`, shorten(s))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("claims have something behind their JSON object")
	}
	return claims, nil
}

// workload reads the full or relative ID of a workload.
func (p *parser) workload(doc strictyaml.Located[caseDoc], field string, t text) spiffeid.ID {
	if t.Line == 0 {
		p.at(doc.Line, doc.Column, "%s is missing; write a SPIFFE ID, such as /web", field)
		return spiffeid.ID{}
	}
	s := t.Value
	if strings.HasPrefix(s, "/") {
		s = scheme + p.td.Name() + s
	}
	id, err := spiffe.ParseWorkloadID(s)
	if err != nil {
		p.fail(t, "%s: %v", field, err)
	}
	return id
}

// A TestResult is how one case went.
type TestResult struct {
	Case   TestCase
	Passed bool
	// Message says what differs, with the place of the case; empty if it passed.
	Message     string
	Explanation Explanation
}

// RunTests decides every case with p, in their order.
func RunTests(p *Policies, t *Tests) []TestResult {
	results := make([]TestResult, len(t.Cases))
	for i, c := range t.Cases {
		r := &results[i]
		with := p
		if c.Hint != "" {
			with = p.WithPeerHint(c.Request.Peer, c.Hint)
		}
		r.Case, r.Explanation = c, with.Explain(&c.Request)
		d := r.Explanation.Decision
		switch rule := d.Rule; {
		case d.Allowed != c.Allow:
			r.Message = fmt.Sprintf("is %s, want %s: %s", verdict(d.Allowed), verdict(c.Allow), r.Explanation.because(d.Outcome))
		case c.Policy != "" && (rule.Policy != c.Policy || c.RuleLine != 0 && rule.Line != c.RuleLine):
			want := c.Policy
			if c.RuleLine != 0 {
				want += ":" + strconv.Itoa(int(c.RuleLine))
			}
			r.Message = fmt.Sprintf("is %s, but not by rule %s: %s", verdict(d.Allowed), want, r.Explanation.because(d.Outcome))
		default:
			r.Passed = true
			continue
		}
		r.Message = fmt.Sprintf("%s:%d: %q %s", printable(c.File), c.Line, c.Name, r.Message)
	}
	return results
}
