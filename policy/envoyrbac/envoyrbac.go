// Package envoyrbac writes call policies as configuration of Envoy's RBAC filters, for Envoys that ask nobody. It calls
// nothing and reads nothing but a policy set; 'signet envoy rbac' prints what it returns.
//
// What comes out never allows what policy.Policies.Decide denies at that revision. An allow that RBAC cannot say, one with
// jwt or when, is left out; a deny with when holds without its condition. Both are told as notes. Revocations are not in it,
// nor is what is applied later: whoever needs those asks the agent (ext_authz).
package envoyrbac

import (
	"fmt"
	"slices"
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	exprv1alpha1 "google.golang.org/genproto/googleapis/api/expr/v1alpha1"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// Rules are what two RBAC filters, one behind the other, have to be told. A call passes if it passes both.
type Rules struct {
	// Deny has the action DENY. Nil: nothing is denied.
	Deny *rbacv3.RBAC
	// Allow has the action ALLOW: without policies it allows nothing.
	Allow *rbacv3.RBAC
	// Notes say what is left out, or stricter than the policies. Without notes the filters decide as the policies do.
	Notes []string
}

// For translates what a set says about a service, for requests over HTTP, gRPC included, or for connections.
func For(set *policyv1.PolicySet, service spiffeid.ID, protocol policy.Protocol) (*Rules, error) {
	if _, err := policy.Compile(set); err != nil {
		return nil, err
	}
	if service.Path() == "" || service.TrustDomain().Name() != set.GetTrustDomain() {
		return nil, fmt.Errorf("%s is not a service of the trust domain %s, of which alone its policies speak", service, set.GetTrustDomain())
	}
	t := &translation{
		http: protocol == policy.ProtocolHTTP, trustDomain: set.GetTrustDomain(),
		deny: map[string]*rbacv3.Policy{}, allow: map[string]*rbacv3.Policy{},
	}
	named := false
	for _, p := range set.GetPolicies() {
		if !slices.ContainsFunc(p.GetServices(), func(pattern string) bool { return policy.ServiceMatches(pattern, service) }) {
			continue
		}
		switch p.GetMode() {
		case policyv1.Mode_MODE_ENFORCE:
			named = true
		case policyv1.Mode_MODE_SHADOW:
			t.note("%s only reports, which these filters cannot: it is left out", place(p, nil))
			continue
		default:
			named = true
			t.denyAll(place(p, nil))
			continue
		}
		for i, r := range p.GetRules() {
			t.rule(p, i, r)
		}
	}
	t.checkPeer()
	switch {
	case named && t.http:
		t.checkPath()
	case !named && set.GetDefaults() == policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW:
		t.allow["default"] = &rbacv3.Policy{Permissions: []*rbacv3.Permission{anything()}, Principals: []*rbacv3.Principal{anybody()}}
		t.note("no policy names %s, and PolicyDefaults is shadow: everybody with an X509-SVID is allowed", service)
	}
	slices.Sort(t.notes)
	return &Rules{
		Deny:  &rbacv3.RBAC{Action: rbacv3.RBAC_DENY, Policies: t.deny},
		Allow: &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: t.allow},
		Notes: slices.Compact(t.notes),
	}, nil
}

// A translation gathers policies of RBAC. Their names say where each comes from.
type translation struct {
	http        bool
	trustDomain string
	deny, allow map[string]*rbacv3.Policy
	notes       []string
}

func (t *translation) note(format string, args ...any) {
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}

// place names a rule, or a policy, for operators.
func place(p *policyv1.Policy, r *policyv1.Rule) string {
	s := "policy " + p.GetName()
	line := p.GetLine()
	if r != nil && r.GetLine() != 0 {
		line = r.GetLine()
	}
	if p.GetFile() != "" && line != 0 {
		s += fmt.Sprintf(" (%s:%d)", p.GetFile(), line)
	}
	return s
}

// denyAll refuses everything, since what is meant is not known.
func (t *translation) denyAll(why string) {
	t.deny["not-understood"] = &rbacv3.Policy{Permissions: []*rbacv3.Permission{anything()}, Principals: []*rbacv3.Principal{anybody()}}
	t.note("%s has something that this program does not understand: every call is denied", why)
}

func (t *translation) rule(p *policyv1.Policy, i int, r *policyv1.Rule) {
	name := fmt.Sprintf("%s/%04d", p.GetName(), i)
	deny := r.GetEffect() != policyv1.Effect_EFFECT_ALLOW
	switch {
	case r.GetShadow():
		t.note("a rule of %s only reports, which these filters cannot: it is left out", place(p, r))
		return
	case !understood(r) && deny:
		t.denyAll(place(p, r))
		return
	case !understood(r):
		t.note("an allow of %s has something that this program does not understand: it allows nothing", place(p, r))
		return
	case !deny && (r.GetJwt() != nil || r.GetWhen() != ""):
		t.note("an allow of %s needs a token or has a condition, which these filters cannot judge: it is left out", place(p, r))
		return
	case deny && r.GetWhen() != "":
		t.note("a deny of %s has a condition, which these filters cannot judge: it denies without it", place(p, r))
	}
	if deny {
		t.denyRule(name, r)
	} else {
		t.allowRule(name, r)
	}
	for _, permissions := range []map[string]*rbacv3.Policy{t.deny, t.allow} {
		if tooLarge(permissions[name]) {
			t.note("%s has patterns for which Envoy needs the runtime key re2.max_program_size.error_level above its default of 100", place(p, r))
		}
	}
}

// denyRule reads wide: any name in the peer's certificate counts.
func (t *translation) denyRule(name string, r *policyv1.Rule) {
	var principals []*rbacv3.Principal
	for _, from := range r.GetFrom() {
		principals = append(principals, authenticated(wideIDs(from)...))
	}
	var permissions []*rbacv3.Permission
	if !t.http || len(r.GetHttp()) == 0 && len(r.GetGrpc()) == 0 {
		permissions = []*rbacv3.Permission{anything()}
	}
	methods := len(r.GetGrpc()) > 0
	for _, m := range r.GetHttp() {
		if !t.http {
			break
		}
		methods = methods || len(m.GetMethods()) > 0
		var parts []*rbacv3.Permission
		if len(m.GetMethods()) > 0 {
			parts = append(parts, anyMethod(m.GetMethods()))
		}
		if len(m.GetPaths()) > 0 {
			var paths []*rbacv3.Permission
			for _, p := range m.GetPaths() {
				paths = append(paths, widePath(p)...)
			}
			parts = append(parts, anyOf(paths))
		}
		permissions = append(permissions, allOf(parts))
	}
	for _, method := range r.GetGrpc() {
		if t.http {
			pattern := "/" + method
			if service, all := strings.CutSuffix(pattern, "/*"); all {
				pattern = service + "/**"
			}
			permissions = append(permissions, allOf([]*rbacv3.Permission{anyMethod([]string{"POST"}), anyOf(widePath(pattern))}))
		}
	}
	if t.http && methods {
		for _, header := range []string{"x-http-method-override", "x-http-method", "x-method-override"} {
			permissions = append(permissions, present(header))
		}
	}
	t.deny[name] = &rbacv3.Policy{Permissions: permissions, Principals: principals}
}

// allowRule reads narrow: what counts is the first URI of the peer's certificate, as for everybody else. RBAC looks at all
// of them, at DNS names and at the subject, which an authority of another trust domain may choose: so a policy for each
// trust domain has a condition beside its principals.
func (t *translation) allowRule(name string, r *policyv1.Rule) {
	if !t.http && (len(r.GetHttp()) > 0 || len(r.GetGrpc()) > 0) {
		return // a connection is allowed by rules without them alone
	}
	permissions := t.allowed(r)
	byDomain := map[string][]*rbacv3.Principal{}
	for _, from := range r.GetFrom() {
		td, _, _ := strings.Cut(strings.TrimPrefix(from, "spiffe://"), "/")
		byDomain[td] = append(byDomain[td], narrowIDs(from))
	}
	for td, principals := range byDomain {
		own := name
		if len(byDomain) > 1 {
			own += "/" + td
		}
		t.allow[own] = &rbacv3.Policy{Permissions: permissions, Principals: principals, Condition: peerOf(td)}
	}
}

func (t *translation) allowed(r *policyv1.Rule) []*rbacv3.Permission {
	if len(r.GetHttp()) == 0 && len(r.GetGrpc()) == 0 {
		return []*rbacv3.Permission{anything()}
	}
	var permissions []*rbacv3.Permission
	for _, m := range r.GetHttp() {
		var parts []*rbacv3.Permission
		if len(m.GetMethods()) > 0 {
			parts = append(parts, anyMethod(m.GetMethods()))
		} else {
			parts = append(parts, not(likeGRPC())) // which is a POST, and has to be named as one
		}
		if len(m.GetPaths()) > 0 {
			var paths []*rbacv3.Permission
			for _, p := range m.GetPaths() {
				paths = append(paths, narrowPath(p))
			}
			parts = append(parts, anyOf(paths))
		}
		permissions = append(permissions, allOf(parts))
	}
	for _, method := range r.GetGrpc() {
		permissions = append(permissions, allOf([]*rbacv3.Permission{
			anyMethod([]string{"POST"}), isGRPC(), not(headerContains(":path", "?")), narrowPath("/" + method),
		}))
	}
	return permissions
}

// checkPeer refuses whoever has no SPIFFE ID with a path.
func (t *translation) checkPeer() {
	t.deny["no-spiffe-id"] = &rbacv3.Policy{
		Permissions: []*rbacv3.Permission{anything()},
		Principals:  []*rbacv3.Principal{{Identifier: &rbacv3.Principal_NotId{NotId: authenticated(regex(spiffeIDs))}}},
	}
}

// checkPath refuses what programs understand in different ways, whatever the rules say.
func (t *translation) checkPath() {
	asterisk := allOf([]*rbacv3.Permission{anyMethod([]string{"OPTIONS"}), headerIs(":path", exact("*"))})
	sound := []*rbacv3.Permission{
		anyOf([]*rbacv3.Permission{path(regex(soundBytes)), asterisk}),
		anyOf([]*rbacv3.Permission{path(regex(soundEscapes)), asterisk}),
		not(path(regex(dotSegment))), not(path(contains("//"))), not(headerContains(":path", "#")),
	}
	t.deny["path"] = &rbacv3.Policy{Permissions: []*rbacv3.Permission{not(allOf(sound))}, Principals: []*rbacv3.Principal{anybody()}}
	t.deny["path-too-long"] = &rbacv3.Policy{Permissions: []*rbacv3.Permission{anything()}, Principals: []*rbacv3.Principal{anybody()}, Condition: longPath()}
}

// understood reports whether a rule can be read, as policy.Compile judges it.
func understood(r *policyv1.Rule) bool {
	if r.GetEffect() != policyv1.Effect_EFFECT_ALLOW && r.GetEffect() != policyv1.Effect_EFFECT_DENY {
		return false
	}
	// As a deny, a rule that cannot be judged is one for everybody, and decides for that reason.
	deny := proto.CloneOf(r)
	deny.Effect, deny.Shadow = policyv1.Effect_EFFECT_DENY, false
	p, err := policy.Compile(&policyv1.PolicySet{Format: policy.Format, TrustDomain: probed.TrustDomain().Name(), Policies: []*policyv1.Policy{{
		Services: []string{probed.String()}, Mode: policyv1.Mode_MODE_ENFORCE, Rules: []*policyv1.Rule{deny}}}})
	return err == nil && p.Decide(&policy.Request{Service: probed, Peer: probed}).Reason != policy.ReasonUnsupported
}

var probed = spiffeid.RequireFromString("spiffe://probe.invalid/probe")

// longPath is the condition size(request.url_path) > 8192, which patterns cannot say.
func longPath() *exprv1alpha1.Expr {
	return call("_>_", call("size", attribute("request", "url_path")), &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_ConstExpr{
		ConstExpr: &exprv1alpha1.Constant{ConstantKind: &exprv1alpha1.Constant_Int64Value{Int64Value: maxPath}}}})
}

// maxPath is the longest path that policies judge.
const maxPath = 8 << 10

// peerOf is the condition connection.uri_san_peer_certificate.startsWith("spiffe://td/"), of the first URI.
func peerOf(td string) *exprv1alpha1.Expr {
	e := call("startsWith", &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_ConstExpr{
		ConstExpr: &exprv1alpha1.Constant{ConstantKind: &exprv1alpha1.Constant_StringValue{StringValue: "spiffe://" + td + "/"}}}})
	e.GetCallExpr().Target = attribute("connection", "uri_san_peer_certificate")
	return e
}

func call(function string, args ...*exprv1alpha1.Expr) *exprv1alpha1.Expr {
	return &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_CallExpr{CallExpr: &exprv1alpha1.Expr_Call{Function: function, Args: args}}}
}

func attribute(of, field string) *exprv1alpha1.Expr {
	return &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_SelectExpr{SelectExpr: &exprv1alpha1.Expr_Select{
		Operand: &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_IdentExpr{IdentExpr: &exprv1alpha1.Expr_Ident{Name: of}}}, Field: field}}}
}
