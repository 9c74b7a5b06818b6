package envoyrbac

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Envoy matches whole strings against regular expressions, and refuses those whose program is large. So patterns are
// expressions only where text does not do, and these know nothing but ASCII: nothing else is in a sound path or a SPIFFE ID.
const (
	anySegment = `[!-.0-~]+`
	anyText    = `[!-~]*`

	// spiffeIDs are all those with a path. A segment is neither empty nor "." or "..".
	spiffeIDs = `spiffe://[a-z0-9._-]+(?:/(?:\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\.{3,}))+`

	// soundBytes, soundEscapes and dotSegment are of paths without a query, as package policy judges them.
	soundBytes   = `/[!-:<-\[\]-~]*`
	soundEscapes = `(?:[!-$&-~]|%(?:2[0-246-9a-cA-C]|3[ac-eAC-E]|[46]0|5[bdeBDE]|7[b-dB-D]|[89a-fA-F][0-9a-fA-F]))*`
	dotSegment   = anyText + `/\.\.?(?:/` + anyText + `)?`

	// grpcTypes are the content types of gRPC but the plain one.
	grpcTypes = `application/grpc\+[A-Za-z0-9!#$&^_.+-]+`
)

// maxProgram is the size of a program from which on Envoy refuses it by default.
const maxProgram = 100

func exact(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

func prefix(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: s}}
}

func contains(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Contains{Contains: s}}
}

func regex(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: s}}}
}

// wideIDs are the IDs that a pattern of a deny covers: "**" may stand for nothing.
func wideIDs(pattern string) []*matcherv3.StringMatcher {
	below, rest := strings.CutSuffix(pattern, "/**")
	switch starred := hasStar(below); {
	case rest && !starred:
		return []*matcherv3.StringMatcher{exact(below), prefix(below + "/")}
	case rest:
		return []*matcherv3.StringMatcher{regex(starredText(below) + `(?:/` + anyText + `)?`)}
	case starred:
		return []*matcherv3.StringMatcher{regex(starredText(below))}
	default:
		return []*matcherv3.StringMatcher{exact(below)}
	}
}

// narrowIDs are the IDs that a pattern of an allow covers. No wildcard in the first segment covers what is the CA's and
// the agents'.
func narrowIDs(pattern string) *rbacv3.Principal {
	below, rest := strings.CutSuffix(pattern, "/**")
	var one *rbacv3.Principal
	switch starred := hasStar(below); {
	case rest && !starred:
		one = authenticated(prefix(below + "/"))
	case rest:
		one = authenticated(regex(starredText(below) + `/` + anyText))
	case starred:
		one = authenticated(regex(starredText(below)))
	default:
		return authenticated(exact(below))
	}
	td, path, _ := strings.Cut(strings.TrimPrefix(pattern, "spiffe://"), "/")
	if first, _, _ := strings.Cut(path, "/"); first != "*" && first != "**" {
		return one
	}
	reserved := "spiffe://" + td + "/spire"
	except := authenticated(exact(reserved), prefix(reserved+"/"))
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: []*rbacv3.Principal{
		one, {Identifier: &rbacv3.Principal_NotId{NotId: except}},
	}}}}
}

// hasStar reports whether a segment is a wildcard.
func hasStar(pattern string) bool {
	return strings.HasSuffix(pattern, "/*") || strings.Contains(pattern, "/*/")
}

// starredText is a pattern as an expression.
func starredText(pattern string) string {
	segments := strings.Split(pattern, "/")
	for i, s := range segments {
		if s == "*" {
			segments[i] = anySegment
		} else {
			segments[i] = regexp.QuoteMeta(s)
		}
	}
	return strings.Join(segments, "/")
}

// narrowPath is a pattern of an allow: byte for byte, and "**" is at least one segment. That there are no empty segments has
// been seen to.
func narrowPath(pattern string) *rbacv3.Permission {
	below, rest := strings.CutSuffix(pattern, "/**")
	switch starred := hasStar(below); {
	case rest && !starred:
		return allOf([]*rbacv3.Permission{path(prefix(below + "/")), not(path(exact(below + "/")))})
	case rest:
		return path(regex(starredText(below) + `/[!-.0-~]` + anyText))
	case starred:
		return path(regex(starredText(below)))
	default:
		return path(exact(below))
	}
}

// widePath is a pattern of a deny: bytes may be escaped, a trailing slash does not matter, and "**" may stand for nothing.
func widePath(pattern string) []*rbacv3.Permission {
	below, rest := strings.CutSuffix(pattern, "/**")
	below = strings.TrimSuffix(below, "/")
	expression, literal := "", true
	if below != "" {
		for _, s := range strings.Split(below[1:], "/") {
			if s == "*" {
				expression, literal = expression+"/"+anySegment, false
				continue
			}
			text, plain := spelled(s)
			expression, literal = expression+"/"+text, literal && plain
		}
	}
	switch {
	case literal && rest:
		return []*rbacv3.Permission{path(exact(below)), path(prefix(below + "/"))}
	case literal:
		return []*rbacv3.Permission{path(exact(below)), path(exact(below + "/"))}
	case rest:
		return []*rbacv3.Permission{path(regex(expression + `(?:/` + anyText + `)?`))}
	default:
		return []*rbacv3.Permission{path(regex(expression + `/?`))}
	}
}

// spelled is a segment as an expression for all ways in which a sound path may spell it. plain says that there is one only,
// the segment itself.
func spelled(segment string) (expression string, plain bool) {
	plain = true
	var out strings.Builder
	for i := 0; i < len(segment); i++ {
		c := segment[i]
		if c == '%' && i+2 < len(segment) {
			if _, err := fmt.Sscanf(segment[i+1:i+3], "%02x", &c); err == nil {
				i += 2
			}
		}
		if unreserved(c) {
			out.WriteString(regexp.QuoteMeta(string(rune(c))))
			continue
		}
		plain = false
		escaped := "%" + hexDigit(c>>4) + hexDigit(c&15)
		if c > ' ' && c < 0x7f {
			out.WriteString("(?:" + regexp.QuoteMeta(string(rune(c))) + "|" + escaped + ")")
		} else {
			out.WriteString(escaped)
		}
	}
	return out.String(), plain
}

// unreserved are the bytes that no sound path escapes.
func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0
}

func hexDigit(n byte) string {
	lower := "0123456789abcdef"[n : n+1]
	if upper := strings.ToUpper(lower); upper != lower {
		return "[" + lower + upper + "]"
	}
	return lower
}

func authenticated(names ...*matcherv3.StringMatcher) *rbacv3.Principal {
	var ids []*rbacv3.Principal
	for _, name := range names {
		ids = append(ids, &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: name}}})
	}
	if len(ids) == 1 {
		return ids[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: ids}}}
}

func anybody() *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}
}

func anything() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
}

func not(p *rbacv3.Permission) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: p}}
}

func allOf(parts []*rbacv3.Permission) *rbacv3.Permission {
	if len(parts) == 1 {
		return parts[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: parts}}}
}

func anyOf(parts []*rbacv3.Permission) *rbacv3.Permission {
	if len(parts) == 1 {
		return parts[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: parts}}}
}

// path matches the path without its query.
func path(m *matcherv3.StringMatcher) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{Rule: &matcherv3.PathMatcher_Path{Path: m}}}}
}

func headerIs(name string, m *matcherv3.StringMatcher) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: &routev3.HeaderMatcher{Name: name,
		HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: m}}}}
}

func headerContains(name, s string) *rbacv3.Permission { return headerIs(name, contains(s)) }

func present(name string) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: &routev3.HeaderMatcher{Name: name,
		HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}}}}
}

func anyMethod(methods []string) *rbacv3.Permission {
	var parts []*rbacv3.Permission
	for _, m := range methods {
		parts = append(parts, headerIs(":method", exact(m)))
	}
	return anyOf(parts)
}

// isGRPC is a content type exactly as gRPC's clients write it.
func isGRPC() *rbacv3.Permission {
	return anyOf([]*rbacv3.Permission{headerIs("content-type", exact("application/grpc")), headerIs("content-type", regex(grpcTypes))})
}

// likeGRPC is a POST that somebody could take for gRPC.
func likeGRPC() *rbacv3.Permission {
	return allOf([]*rbacv3.Permission{anyMethod([]string{"POST"}), anyOf([]*rbacv3.Permission{
		headerIs("content-type", exact("application/grpc")), headerIs("content-type", prefix("application/grpc;")),
		allOf([]*rbacv3.Permission{headerIs("content-type", prefix("application/grpc+")), not(headerIs("content-type", exact("application/grpc+")))}),
	})})
}

// tooLarge reports whether some expression of a policy may be larger than Envoy takes by default.
func tooLarge(p *rbacv3.Policy) bool {
	large := false
	for _, s := range expressions(p) {
		parsed, err := syntax.Parse(s, syntax.Perl)
		if err != nil {
			return true
		}
		program, err := syntax.Compile(parsed.Simplify())
		large = large || err != nil || len(program.Inst) > maxProgram
	}
	return large
}

// expressions are all regular expressions of a policy.
func expressions(p *rbacv3.Policy) (out []string) {
	if p == nil {
		return nil
	}
	var walk func(protoreflect.Message)
	walk = func(m protoreflect.Message) {
		if r, ok := m.Interface().(*matcherv3.RegexMatcher); ok {
			out = append(out, r.GetRegex())
		}
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			switch {
			case f.IsMap() || f.Kind() != protoreflect.MessageKind:
			case f.IsList():
				for i := range v.List().Len() {
					walk(v.List().Get(i).Message())
				}
			default:
				walk(v.Message())
			}
			return true
		})
	}
	walk(proto.Message(p).ProtoReflect())
	return out
}
