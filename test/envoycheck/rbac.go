package envoycheck

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	exprv1alpha1 "google.golang.org/genproto/googleapis/api/expr/v1alpha1"
)

// An RBAC is what Envoy's documentation says of its RBAC filters, written down slowly: one call, of which a filter knows the
// names in the peer's certificate and the headers.
type RBAC struct {
	T         testing.TB
	URIs, DNS []string
	Subject   string

	// Headers are by names in lower case, pseudo-headers among them; nil for a connection.
	Headers map[string][]string

	// LenientExpressions says that bytes that are not UTF-8 count as characters in expressions.
	LenientExpressions bool
}

// Passes reports whether a filter lets the call through.
func (e *RBAC) Passes(r *rbacv3.RBAC) bool {
	matched := false
	for _, name := range slices.Sorted(maps.Keys(r.GetPolicies())) {
		matched = matched || e.policy(r.Policies[name])
	}
	return matched == (r.GetAction() == rbacv3.RBAC_ALLOW)
}

func (e *RBAC) policy(p *rbacv3.Policy) bool {
	return slices.ContainsFunc(p.Permissions, e.permission) && slices.ContainsFunc(p.Principals, e.principal) && (p.Condition == nil || e.condition(p.Condition))
}

func (e *RBAC) permission(p *rbacv3.Permission) bool {
	switch rule := p.Rule.(type) {
	case *rbacv3.Permission_Any:
		return true
	case *rbacv3.Permission_NotRule:
		return !e.permission(rule.NotRule)
	case *rbacv3.Permission_AndRules:
		return !slices.ContainsFunc(rule.AndRules.Rules, func(p *rbacv3.Permission) bool { return !e.permission(p) })
	case *rbacv3.Permission_OrRules:
		return slices.ContainsFunc(rule.OrRules.Rules, e.permission)
	case *rbacv3.Permission_UrlPath:
		path := e.Headers[":path"]
		return len(path) > 0 && e.text(rule.UrlPath.GetPath(), withoutQuery(path[0]))
	case *rbacv3.Permission_Header:
		return e.header(rule.Header)
	}
	e.T.Fatalf("a permission of the kind %T", p.Rule)
	return false
}

func withoutQuery(path string) string {
	if i := strings.IndexAny(path, "?#"); i >= 0 {
		return path[:i]
	}
	return path
}

// header: several lines are one with commas; a header that is not there matches no text.
func (e *RBAC) header(m *routev3.HeaderMatcher) bool {
	lines := e.Headers[strings.ToLower(m.Name)]
	switch kind := m.HeaderMatchSpecifier.(type) {
	case *routev3.HeaderMatcher_PresentMatch:
		return len(lines) > 0 == kind.PresentMatch
	case *routev3.HeaderMatcher_StringMatch:
		return len(lines) > 0 && e.text(kind.StringMatch, strings.Join(lines, ","))
	}
	e.T.Fatalf("a header matcher of the kind %T", m.HeaderMatchSpecifier)
	return false
}

func (e *RBAC) principal(p *rbacv3.Principal) bool {
	switch id := p.Identifier.(type) {
	case *rbacv3.Principal_Any:
		return true
	case *rbacv3.Principal_NotId:
		return !e.principal(id.NotId)
	case *rbacv3.Principal_AndIds:
		return !slices.ContainsFunc(id.AndIds.Ids, func(p *rbacv3.Principal) bool { return !e.principal(p) })
	case *rbacv3.Principal_OrIds:
		return slices.ContainsFunc(id.OrIds.Ids, e.principal)
	case *rbacv3.Principal_Authenticated_:
		// Each URI, each DNS name, and the subject are tried.
		names := append(append(slices.Clone(e.URIs), e.DNS...), e.Subject)
		return slices.ContainsFunc(names, func(name string) bool { return e.text(id.Authenticated.PrincipalName, name) })
	}
	e.T.Fatalf("a principal of the kind %T", p.Identifier)
	return false
}

func (e *RBAC) text(m *matcherv3.StringMatcher, s string) bool {
	if m.IgnoreCase {
		e.T.Fatal("a matcher without regard to case")
	}
	switch kind := m.MatchPattern.(type) {
	case *matcherv3.StringMatcher_Exact:
		return s == kind.Exact
	case *matcherv3.StringMatcher_Prefix:
		return strings.HasPrefix(s, kind.Prefix)
	case *matcherv3.StringMatcher_Contains:
		return strings.Contains(s, kind.Contains)
	case *matcherv3.StringMatcher_SafeRegex:
		if !e.LenientExpressions && !utf8.ValidString(s) {
			return false
		}
		return regexp.MustCompile("^(?:" + kind.SafeRegex.Regex + ")$").MatchString(s)
	}
	e.T.Fatalf("a string matcher of the kind %T", m.MatchPattern)
	return false
}

// condition evaluates the two conditions that there are. An error is false: an attribute that is not there.
func (e *RBAC) condition(x *exprv1alpha1.Expr) bool {
	call := x.GetCallExpr()
	switch {
	case call.GetFunction() == "_>_" && call.Args[0].GetCallExpr().GetFunction() == "size":
		attribute := call.Args[0].GetCallExpr().Args[0].GetSelectExpr()
		if attribute.GetOperand().GetIdentExpr().GetName() != "request" || attribute.Field != "url_path" {
			break
		}
		path := e.Headers[":path"]
		return len(path) > 0 && int64(utf8.RuneCountInString(withoutQuery(path[0]))) > call.Args[1].GetConstExpr().GetInt64Value()
	case call.GetFunction() == "startsWith":
		attribute := call.GetTarget().GetSelectExpr()
		if attribute.GetOperand().GetIdentExpr().GetName() != "connection" || attribute.Field != "uri_san_peer_certificate" {
			break
		}
		return len(e.URIs) > 0 && strings.HasPrefix(e.URIs[0], call.Args[0].GetConstExpr().GetStringValue())
	}
	e.T.Fatalf("a condition %v", x)
	return false
}
