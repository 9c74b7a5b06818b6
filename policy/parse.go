package policy

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

// The kinds of documents that this package reads.
const (
	KindCallPolicy     = "CallPolicy"
	KindPolicyDefaults = "PolicyDefaults"
	KindPolicyTest     = "PolicyTest"
)

// DefaultsName is the name of the one PolicyDefaults.
const DefaultsName = "default"

type text = strictyaml.Located[string]
type texts = strictyaml.Located[[]text]

// callPolicyDoc is a CallPolicy as an operator writes it. The desc tags go into the published schema.
type callPolicyDoc struct {
	Kind    text                                              `yaml:"kind" enum:"CallPolicy" required:"true" desc:"CallPolicy"`
	Name    text                                              `yaml:"name" required:"true" desc:"Name of the policy, unique among CallPolicies."`
	Service strictyaml.OneOrMany[text]                        `yaml:"service" required:"true" desc:"SPIFFE IDs or patterns of the services that the policy governs, full or relative to the trust domain."`
	Mode    text                                              `yaml:"mode" enum:"enforce,shadow" desc:"enforce (default), or shadow: decide and report, never block."`
	Allow   strictyaml.Located[[]strictyaml.Located[ruleDoc]] `yaml:"allow" empty:"ok" desc:"Rules that let calls through. Without one, every call is denied."`
	Deny    strictyaml.Located[[]strictyaml.Located[ruleDoc]] `yaml:"deny" empty:"ok" desc:"Rules that refuse calls. A deny wins over every allow."`
}

type ruleDoc struct {
	From   texts                                             `yaml:"from" required:"true" desc:"SPIFFE IDs or patterns of callers, full or relative to the trust domain."`
	HTTP   strictyaml.Located[[]strictyaml.Located[httpDoc]] `yaml:"http" desc:"HTTP requests that the rule covers. Excludes grpc; without both, the rule covers any protocol."`
	GRPC   texts                                             `yaml:"grpc" desc:"gRPC methods that the rule covers: pkg.Service/Method or pkg.Service/*. Excludes http."`
	JWT    strictyaml.Located[jwtDoc]                        `yaml:"jwt" desc:"A JWT-SVID that the caller must present as well. In a deny only beside a when that reads jwt, for which it says which token that is."`
	Shadow bool                                              `yaml:"shadow" desc:"Report what the rule would do; it grants nothing and takes nothing."`
	When   text                                              `yaml:"when" desc:"A condition in CEL that must hold as well, over peer, request, jwt and user. An error in it is false in an allow and true in a deny."`
}

type httpDoc struct {
	Methods texts `yaml:"methods" desc:"Methods in upper case. Absent: any. HEAD is not implied by GET."`
	Paths   texts `yaml:"paths" desc:"Path patterns in origin form. Absent: any."`
}

type jwtDoc struct {
	Audience texts `yaml:"audience" required:"true" desc:"Audiences, of which the token must carry one."`
	Subject  text  `yaml:"subject" enum:"peer,any" desc:"peer (default): the token's sub is the TLS peer. any: any sub that the service can verify."`
}

type defaultsDoc struct {
	Kind text `yaml:"kind" enum:"PolicyDefaults" required:"true" desc:"PolicyDefaults"`
	Name text `yaml:"name" enum:"default" desc:"Optional; default is the only name."`
	Mode text `yaml:"mode" enum:"deny,shadow" required:"true" desc:"deny, or shadow for migrating a running fleet: what no policy governs is let through and reported."`
}

// ParsePolicy reads a CallPolicy document. IDs that are relative become full ones in td. The error is of type
// strictyaml.Errors: all mistakes of the document with line and column.
func ParsePolicy(doc strictyaml.Document, td spiffeid.TrustDomain) (*policyv1.Policy, error) {
	var d callPolicyDoc
	p := &parser{file: doc.File, td: td, source: doc}
	p.decode(doc, &d)
	p.kind(d.Kind, KindCallPolicy)
	out := &policyv1.Policy{Name: p.name(d.Name), Mode: policyv1.Mode_MODE_ENFORCE, File: doc.File, Line: uint32(max(doc.Line, 1))}
	if doc.Node != nil {
		out.Line = uint32(doc.Node.Line)
	}
	switch {
	case d.Mode.Line == 0, d.Mode.Value == "enforce":
	case d.Mode.Value == "shadow":
		out.Mode = policyv1.Mode_MODE_SHADOW
	default:
		p.fail(d.Mode, "mode is %q; it must be enforce or shadow", d.Mode.Value)
	}
	out.Services = p.services(d.Service)
	for _, r := range d.Allow.Value {
		out.Rules = append(out.Rules, p.rule(r, policyv1.Effect_EFFECT_ALLOW))
	}
	for _, r := range d.Deny.Value {
		out.Rules = append(out.Rules, p.rule(r, policyv1.Effect_EFFECT_DENY))
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return out, nil
}

// ParseDefaults reads a PolicyDefaults document and returns its mode and its name, which is always DefaultsName. The
// error is of type strictyaml.Errors.
func ParseDefaults(doc strictyaml.Document) (policyv1.DefaultsMode, string, error) {
	var d defaultsDoc
	p := &parser{file: doc.File}
	p.decode(doc, &d)
	p.kind(d.Kind, KindPolicyDefaults)
	if d.Name.Line != 0 && d.Name.Value != DefaultsName {
		p.fail(d.Name, "name is %q; the one %s is named %s, or has no name", d.Name.Value, KindPolicyDefaults, DefaultsName)
	}
	mode := policyv1.DefaultsMode_DEFAULTS_MODE_DENY
	switch {
	case d.Mode.Line == 0:
		p.missing("mode", "deny or shadow")
	case d.Mode.Value == "shadow":
		mode = policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW
	case d.Mode.Value != "deny":
		p.fail(d.Mode, "mode is %q; it must be deny or shadow", d.Mode.Value)
	}
	if err := p.err(); err != nil {
		return policyv1.DefaultsMode_DEFAULTS_MODE_DENY, "", err
	}
	return mode, DefaultsName, nil
}

// A parser turns one document into its compiled form and gathers the mistakes.
type parser struct {
	file string
	td   spiffeid.TrustDomain
	line int // of the document, for what is missing from it
	errs strictyaml.Errors
	// source is the document as it was written.
	source strictyaml.Document
	// decoding is how many of errs say that a value could not be read; its meaning is not judged any more.
	decoding int
}

// decode reads the document. Its mistakes are kept, so that those of the meaning are reported beside them.
func (p *parser) decode(doc strictyaml.Document, into any) {
	p.line = max(doc.Line, 1)
	if doc.Node != nil {
		p.line = doc.Node.Line
	}
	err := strictyaml.Decode(doc, into)
	var list strictyaml.Errors
	if err != nil && !errors.As(err, &list) {
		p.at(p.line, 1, "%v", err)
	}
	p.errs = append(p.errs, list...)
	p.decoding = len(p.errs)
}

func (p *parser) at(line, column int, format string, args ...any) {
	for _, e := range p.errs[:p.decoding] {
		if e.Line == line && e.Column == column {
			return
		}
	}
	p.errs = append(p.errs, &strictyaml.Error{File: p.file, Line: line, Column: column, Message: fmt.Sprintf(format, args...)})
}

func (p *parser) fail(t text, format string, args ...any) { p.at(t.Line, t.Column, format, args...) }

func (p *parser) missing(field, want string) {
	p.at(p.line, 1, "%s is missing; write %s", field, want)
}

func (p *parser) err() error {
	if len(p.errs) == 0 {
		return nil
	}
	return strictyaml.Sorted(p.errs)
}

func (p *parser) kind(t text, want string) {
	if t.Line == 0 {
		p.missing("kind", want)
	} else if t.Value != want {
		p.fail(t, "kind is %q; it must be %s here", t.Value, want)
	}
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9._]*[a-z0-9])?$`)

func (p *parser) name(t text) string {
	switch {
	case t.Line == 0:
		p.missing("name", "one such as documents")
	case len(t.Value) > 253 || !nameForm.MatchString(t.Value):
		p.fail(t, "name is %q; it must be up to 253 lower-case letters, digits, \"-\", \".\" and \"_\", with a letter or digit at both ends", shorten(t.Value))
	}
	return t.Value
}

// full makes an ID or pattern of a document full.
func (p *parser) full(t text) (string, idPattern, bool) {
	s := t.Value
	if strings.HasPrefix(s, "/") {
		s = scheme + p.td.Name() + s
	}
	pattern, err := parseIDPattern(s)
	if err != nil {
		p.fail(t, "%v", err)
		return "", idPattern{}, false
	}
	return s, pattern, true
}

func (p *parser) services(list []text) []string {
	if len(list) == 0 {
		p.missing("service", "the ID of the service, such as /documents-service")
		return nil
	}
	var out []string
	seen := make(map[string]bool, len(list))
	for _, t := range list {
		s, pattern, ok := p.full(t)
		switch {
		case !ok:
		case pattern.trustDomain != p.td.Name():
			p.fail(t, "service %q is not in the trust domain %s; a CallPolicy governs local services only", s, p.td.Name())
		case len(pattern.segments) > 0 && pattern.segments[0] == reserved:
			p.fail(t, "service %q is under /%s; CallPolicies do not govern the CA and its agents", s, reserved)
		case seen[s]:
			p.fail(t, "service %q is listed twice", s)
		default:
			out, seen[s] = append(out, s), true
		}
	}
	return out
}

func (p *parser) rule(doc strictyaml.Located[ruleDoc], effect policyv1.Effect) *policyv1.Rule {
	d := doc.Value
	r := &policyv1.Rule{Effect: effect, Shadow: d.Shadow, Line: uint32(doc.Line)}
	if d.From.Line == 0 {
		p.at(doc.Line, doc.Column, "from is missing; write the callers' IDs, or [/**] for every workload of the trust domain")
	}
	for _, t := range p.filled("from", d.From) {
		if s, _, ok := p.full(t); ok {
			r.From = append(r.From, s)
		}
	}
	if d.HTTP.Line != 0 && d.GRPC.Line != 0 {
		p.at(d.GRPC.Line, d.GRPC.Column, "http and grpc exclude each other; write two rules")
	}
	if d.HTTP.Line != 0 {
		r.Requires = append(r.Requires, featureHTTP)
		if len(d.HTTP.Value) == 0 {
			p.at(d.HTTP.Line, d.HTTP.Column, "http is empty; remove it to cover any protocol, or say which requests")
		}
	}
	for _, item := range d.HTTP.Value {
		r.Http = append(r.Http, p.http(item))
	}
	if d.GRPC.Line != 0 {
		r.Requires = append(r.Requires, featureGRPC)
	}
	for _, t := range p.filled("grpc", d.GRPC) {
		if _, err := parseGRPCMethod(t.Value); err != nil {
			p.fail(t, "%v", err)
		}
		r.Grpc = append(r.Grpc, t.Value)
	}
	if d.JWT.Line != 0 {
		p.jwt(d.JWT, r)
	}
	p.when(d, r)
	return r
}

// when compiles the condition of a rule, and says what is wrong with it where it stands in the file.
func (p *parser) when(d ruleDoc, r *policyv1.Rule) {
	var c *condition
	if d.When.Line != 0 {
		r.When, r.WhenLine, r.WhenColumn = d.When.Value, uint32(d.When.Line), uint32(d.When.Column)
		var errs []*conditionError
		c, errs = compileCondition(r.When, r.Effect == policyv1.Effect_EFFECT_DENY)
		for _, e := range errs {
			line, column := p.within(d.When, e.line, e.column)
			p.at(line, column, "when: %s", e.text)
		}
		if len(errs) > 0 {
			return
		}
		r.Requires = append(r.Requires, c.requires()...)
	}
	if r.Effect == policyv1.Effect_EFFECT_DENY && r.Jwt != nil && (c == nil || !c.jwt) {
		p.at(d.JWT.Line, d.JWT.Column, "jwt in a deny: a caller would escape it by leaving its token out; remove jwt to refuse the caller")
	}
	if defect := c.defect(r); defect != "" {
		p.fail(d.When, "%s", defect)
	}
}

// filled returns the items of a list that may be absent, but not empty.
func (p *parser) filled(field string, list texts) []text {
	if list.Line != 0 && len(list.Value) == 0 {
		p.at(list.Line, list.Column, "%s is empty; an empty list would cover nothing, and absent means any where it is optional", field)
	}
	return list.Value
}

func (p *parser) http(item strictyaml.Located[httpDoc]) *policyv1.HTTPMatch {
	m := &policyv1.HTTPMatch{}
	if item.Value.Methods.Line == 0 && item.Value.Paths.Line == 0 {
		p.at(item.Line, item.Column, "an empty item of http would cover every request; say methods or paths, or remove http")
	}
	for _, t := range p.filled("methods", item.Value.Methods) {
		if err := checkMethod(t.Value); err != nil {
			p.fail(t, "%v", err)
		}
		m.Methods = append(m.Methods, t.Value)
	}
	for _, t := range p.filled("paths", item.Value.Paths) {
		if _, err := parsePathPattern(t.Value); err != nil {
			p.fail(t, "%v", err)
		}
		m.Paths = append(m.Paths, t.Value)
	}
	return m
}

func checkMethod(s string) error {
	if s == "" || len(s) > 64 {
		return fmt.Errorf("method %q must have 1 to 64 letters", shorten(s))
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		case 'a' <= c && c <= 'z':
			return fmt.Errorf("method %q can never match: methods are case-sensitive, write %q", s, strings.ToUpper(s))
		default:
			return fmt.Errorf("method %q has the byte %q; remove methods to cover any", s, s[i:i+1])
		}
	}
	return nil
}

func (p *parser) jwt(doc strictyaml.Located[jwtDoc], r *policyv1.Rule) {
	r.Requires = append(r.Requires, featureJWT)
	r.Jwt = &policyv1.JWTMatch{Subject: policyv1.SubjectBinding_SUBJECT_BINDING_PEER}
	switch subject := doc.Value.Subject; {
	case subject.Line == 0, subject.Value == "peer":
	case subject.Value == "any":
		r.Jwt.Subject = policyv1.SubjectBinding_SUBJECT_BINDING_ANY
		r.Requires = append(r.Requires, featureJWTSubjectAny)
	default:
		p.fail(subject, "subject is %q; it must be peer or any", subject.Value)
	}
	if doc.Value.Audience.Line == 0 {
		p.at(doc.Line, doc.Column, "jwt needs audience: the names under which the service accepts tokens")
	}
	for _, t := range p.filled("audience", doc.Value.Audience) {
		if t.Value == "" {
			p.fail(t, "audience is empty; write the name under which the service accepts tokens")
		}
		r.Jwt.Audience = append(r.Jwt.Audience, t.Value)
	}
}
