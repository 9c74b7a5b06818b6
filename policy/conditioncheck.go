package policy

import (
	"fmt"
	"math"
	"regexp/syntax"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"

	"github.com/signet-id/signet/spiffe"
)

// A conditionCheck judges the syntax tree of an expression whose types are known to be right.
type conditionCheck struct {
	condition *condition
	info      *ast.SourceInfo
	deny      bool
	errs      []*conditionError
	locals    []string // names that the loops around bind
}

// known is what the conjuncts around a part of the tree fix.
type known struct {
	// free: the part is reached from the root by && and || and the branches of ?: only (in a deny by ! as well), so that a
	// conjunct in it fixes something.
	free bool
	// trustDomain and issuer: a conjunct fixes jwt.trust_domain, or user.issuer.
	trustDomain, issuer bool
}

func (c *conditionCheck) fail(e ast.Expr, format string, args ...any) {
	if len(c.errs) == maxIssues {
		return
	}
	at := c.info.GetStartLocation(e.ID())
	c.errs = append(c.errs, &conditionError{max(1, at.Line()), max(1, at.Column()+1), fmt.Sprintf(format, args...)})
}

func (c *conditionCheck) root(e ast.Expr) { c.walk(e, known{free: true}) }

// conjuncts returns the operands of a tree of &&.
func conjuncts(e ast.Expr) []ast.Expr {
	if e.Kind() != ast.CallKind || e.AsCall().FunctionName() != operators.LogicalAnd {
		return []ast.Expr{e}
	}
	var all []ast.Expr
	for _, operand := range e.AsCall().Args() {
		all = append(all, conjuncts(operand)...)
	}
	return all
}

// fixes returns the text to which e holds a variable, if e is an equality of the two.
func fixes(e ast.Expr, variable string) (string, bool) {
	if e.Kind() != ast.CallKind || e.AsCall().FunctionName() != operators.Equals {
		return "", false
	}
	args := e.AsCall().Args()
	for i := range args {
		if text, ok := literal(args[1-i]); ok && isIdent(args[i], variable) {
			return text, true
		}
	}
	return "", false
}

func isIdent(e ast.Expr, name string) bool { return e.Kind() == ast.IdentKind && e.AsIdent() == name }

func literal(e ast.Expr) (string, bool) {
	if e.Kind() != ast.LiteralKind {
		return "", false
	}
	s, ok := e.AsLiteral().(types.String)
	return string(s), ok
}

func (c *conditionCheck) walk(e ast.Expr, k known) {
	switch e.Kind() {
	case ast.IdentKind:
		c.ident(e, k)
	case ast.LiteralKind:
		c.literal(e)
	case ast.SelectKind:
		if isIdent(e.AsSelect().Operand(), varHeaders) {
			c.fail(e, `write request.headers["%s"], or "%s" in request.headers`, e.AsSelect().FieldName(), e.AsSelect().FieldName())
			return
		}
		c.walk(e.AsSelect().Operand(), k.bound())
	case ast.ListKind:
		for _, item := range e.AsList().Elements() {
			c.walk(item, k.bound())
		}
	case ast.CallKind:
		c.call(e, k)
	case ast.ComprehensionKind:
		c.loop(e, k.bound())
	default:
		c.fail(e, "maps and messages cannot be made here; compare with lists and texts")
	}
}

// bound is what is known where conjuncts fix nothing more.
func (k known) bound() known {
	k.free = false
	return k
}

func (c *conditionCheck) ident(e ast.Expr, k known) {
	name := strings.TrimPrefix(e.AsIdent(), ".")
	switch name {
	case varJWTClaims:
		c.condition.jwt = true
		if !k.trustDomain {
			c.fail(e, `jwt.claims is read without saying whose claims they are: join it by && with jwt.trust_domain == "..."`)
		}
	case varJWTID, varJWTTrustDomain:
		c.condition.jwt = true
	case varUserClaims:
		c.condition.user = true
		if !k.issuer {
			c.fail(e, `user.claims is read without saying whose claims they are: join it by && with user.issuer == "..."`)
		}
	case varUserIssuer:
		c.fail(e, `user.issuer can only be compared by == with a text, such as user.issuer == "https://login.example.org"`)
	case varHeaders:
		c.fail(e, `request.headers can only be asked for one header: request.headers["x-name"], or "x-name" in request.headers`)
	case varPeerHint:
		c.condition.hint = true
	case varMethod:
		c.condition.method = true
	case varPath:
		c.condition.path = true
	case varGRPCMethod:
		c.condition.grpc, c.condition.path = true, true
	default:
		if !isVariable(name) && !slices.Contains(c.locals, name) && !strings.HasPrefix(name, "@") {
			c.fail(e, "%q cannot be used here", shorten(name))
		}
	}
}

func (c *conditionCheck) literal(e ast.Expr) {
	switch v := e.AsLiteral().(type) {
	case types.Null:
		c.fail(e, "null is not compared; ask with has() whether a claim is there")
	case types.Double:
		if whole := math.Trunc(float64(v)); whole == float64(v) && math.Abs(whole) >= 1<<53 {
			c.fail(e, "a number with a point is exact only below 2^53; write it without the point")
		}
	}
}

func (c *conditionCheck) call(e ast.Expr, k known) {
	call := e.AsCall()
	args := call.Args()
	if call.IsMemberFunction() {
		args = append([]ast.Expr{call.Target()}, args...)
	}
	switch call.FunctionName() {
	case operators.LogicalAnd:
		all := conjuncts(e)
		if k.free {
			for _, part := range all {
				if _, ok := fixes(part, varJWTTrustDomain); ok {
					k.trustDomain = true
				}
				if _, ok := fixes(part, varUserIssuer); ok {
					k.issuer = true
				}
			}
		}
		for _, part := range all {
			c.walk(part, k)
		}
		return
	case operators.LogicalOr:
		for _, arg := range args {
			c.walk(arg, k)
		}
		return
	case operators.LogicalNot:
		if !c.deny {
			k = k.bound()
		}
		c.walk(args[0], k)
		return
	case operators.Conditional:
		c.walk(args[0], k.bound())
		c.walk(args[1], k)
		c.walk(args[2], k)
		return
	case operators.Equals:
		if text, ok := fixes(e, varUserIssuer); ok {
			c.condition.user = true
			c.condition.issuers = append(c.condition.issuers, text)
			return
		}
		if text, ok := fixes(e, varJWTTrustDomain); ok {
			if _, err := spiffe.ParseTrustDomain(text); err != nil {
				c.fail(e, "jwt.trust_domain can never be this: %v", err)
			}
		}
	case operators.Index:
		if isIdent(args[0], varHeaders) {
			c.header(args[1])
			return
		}
	case operators.In:
		if isIdent(args[1], varHeaders) {
			c.header(args[0])
			return
		}
		c.condition.counted = c.condition.counted || args[1].Kind() != ast.ListKind
	case overloads.Matches:
		c.condition.counted = true
		c.regex(args[1])
	case operators.Add, "split":
		c.condition.counted = true
	}
	for _, arg := range args {
		c.walk(arg, k.bound())
	}
}

func (c *conditionCheck) loop(e ast.Expr, k known) {
	c.condition.counted = true
	l := e.AsComprehension()
	name := l.IterVar()
	if root, _, _ := strings.Cut(name, "."); root == "peer" || root == "request" || root == "jwt" || root == "user" {
		c.fail(e, "%q is the name of something that conditions are about; take another for what a loop goes over", name)
		return
	}
	c.walk(l.IterRange(), k)
	c.locals = append(c.locals, name)
	for _, part := range []ast.Expr{l.AccuInit(), l.LoopCondition(), l.LoopStep(), l.Result()} {
		c.walk(part, k)
	}
	c.locals = c.locals[:len(c.locals)-1]
}

// regex wants a whole pattern: CEL finds one anywhere in a text, and an allow must be read narrow.
func (c *conditionCheck) regex(e ast.Expr) {
	pattern, ok := literal(e)
	if !ok {
		c.fail(e, "the pattern of matches must be written out")
		return
	}
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		c.fail(e, "the pattern cannot be read: %v", err)
		return
	}
	if !(re.Op == syntax.OpConcat && re.Sub[0].Op == syntax.OpBeginText && re.Sub[len(re.Sub)-1].Op == syntax.OpEndText) {
		c.fail(e, "the pattern is looked for anywhere in the text: begin it with ^ and end it with $, or use contains")
	}
}

// header wants the name of a header that every enforcement point sees alike.
func (c *conditionCheck) header(e ast.Expr) {
	name, ok := literal(e)
	if !ok {
		c.fail(e, "the name of a header must be written out")
		return
	}
	if why := headerFault(name); why != "" {
		c.fail(e, "header %q: %s", shorten(name), why)
	}
}

// headerFault says why a condition cannot ask for a header.
func headerFault(name string) string {
	if name == "" || len(name) > 128 {
		return "a name has 1 to 128 characters"
	}
	for i := range len(name) {
		switch b := name[i]; {
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9', b == '-':
		case 'A' <= b && b <= 'Z':
			return "write its name in lower case"
		case b == '_':
			return "programs behind some servers cannot tell _ from -; name it with -"
		default:
			return fmt.Sprintf("its name has the character %q", name[i:i+1])
		}
	}
	switch name {
	case "authorization", "proxy-authorization", "cookie", "set-cookie":
		return "it holds secrets, which do not belong into a policy; ask for claims by jwt or user"
	case "host", "connection", "content-length", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect":
		return "it is about the connection, and not every enforcement point sees it"
	case "x-http-method-override", "x-http-method", "x-method-override":
		return "it is never believed; a request that has it is refused where a deny lists methods"
	}
	switch {
	case strings.HasPrefix(name, "grpc-"):
		return "it is of the gRPC protocol, and not every enforcement point sees it"
	case strings.HasSuffix(name, "-bin"):
		return "its value is binary, and enforcement points see it decoded or not"
	}
	return ""
}
