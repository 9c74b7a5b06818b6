package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// A condition is a compiled when.
type condition struct {
	tree    *cel.Ast
	program cel.Program
	facts   sync.Pool // of *facts
	// What it reads.
	hint, jwt, user, method, path, grpc bool
	// counted: it has a loop, or something as long.
	counted bool
	// issuers are those that it takes users of.
	issuers []string
}

// A conditionError is a mistake in an expression, with its place in it.
type conditionError struct {
	line, column int // from 1; of the expression
	text         string
}

func (e *conditionError) Error() string {
	return fmt.Sprintf("when, line %d, column %d: %s", e.line, e.column, e.text)
}

// compiledConditions are conditions by what was written; allows and denies do not compile alike. Once a *Policies has them,
// they are not changed any more.
type compiledConditions map[written]*compiled

type written struct {
	when string
	deny bool
}

type compiled struct {
	condition *condition
	errs      []*conditionError
}

// conditions compiles each expression once.
type conditions struct {
	now    compiledConditions // what was asked for
	before compiledConditions // what need not be compiled again
}

// conditionsAfter returns none yet, and takes over those of old that are asked for. old may be nil.
func conditionsAfter(old *Policies) conditions {
	c := conditions{now: make(compiledConditions)}
	if old != nil {
		c.before = old.conditions
	}
	return c
}

// of returns the condition of an expression, or what is wrong with it.
func (c conditions) of(when string, deny bool) (*condition, []*conditionError) {
	key := written{when, deny}
	found := c.now[key]
	if found == nil {
		if found = c.before[key]; found == nil {
			found = new(compiled)
			found.condition, found.errs = compileCondition(when, deny)
		}
		c.now[key] = found
	}
	return found.condition, found.errs
}

// compileCondition parses an expression, checks its types, that it reads claims of known issuers only and what it may cost.
func compileCondition(when string, deny bool) (*condition, []*conditionError) {
	whole := func(text string, args ...any) []*conditionError {
		return []*conditionError{{line: 1, column: 1, text: fmt.Sprintf(text, args...)}}
	}
	switch {
	case strings.TrimSpace(when) == "":
		return nil, whole("the condition is empty; remove when, or say what must hold")
	case len(when) > maxConditionBytes:
		return nil, whole("the condition has %d bytes; at most %d are allowed", len(when), maxConditionBytes)
	}
	if at := tooDeep(when); at >= 0 {
		line, column := position(when, at)
		return nil, []*conditionError{{line, column, fmt.Sprintf("brackets within brackets, more than %d deep", maxConditionDepth)}}
	}
	e, err := celEnv()
	if err != nil {
		return nil, whole("this program cannot read conditions: %v", err)
	}
	parsed, issues := e.Parse(when)
	if issues.Err() != nil {
		return nil, issueErrors(issues)
	}
	tree, issues := e.Check(parsed)
	if issues.Err() != nil {
		return nil, issueErrors(issues)
	}
	c := &condition{tree: tree}
	check := conditionCheck{condition: c, info: tree.NativeRep().SourceInfo(), deny: deny}
	if check.root(tree.NativeRep().Expr()); len(check.errs) > 0 {
		return nil, check.errs
	}
	if tree.OutputType() != cel.BoolType {
		return nil, whole("the condition is a %s; it must be true or false, such as jwt.claims.admin == true", cel.FormatCELType(tree.OutputType()))
	}
	estimate, err := e.EstimateCost(tree, usualSizes{})
	switch {
	case err != nil:
		return nil, whole("its cost cannot be told: %v", err)
	case estimate.Max > maxCost:
		return nil, whole("evaluating it could cost %d steps, for lists of %d items and texts of %d bytes; at most %d are allowed: write fewer loops within loops", estimate.Max, usualItems, usualBytes, maxCost)
	}
	if c.program, err = e.Program(tree, programOptions(c.counted)...); err != nil {
		return nil, whole("%v", err)
	}
	slices.Sort(c.issuers)
	c.issuers = slices.Compact(c.issuers)
	return c, nil
}

// tooDeep returns where brackets nest too deep, or -1. It counts those in texts, too. The parser has a limit of its own,
// and is slow before it gets there.
func tooDeep(when string) int {
	depth := 0
	for i := range len(when) {
		switch when[i] {
		case '(', '[', '{':
			if depth++; depth > maxConditionDepth {
				return i
			}
		case ')', ']', '}':
			depth--
		}
	}
	return -1
}

// position returns the line and the column, in characters from 1, of an offset in bytes.
func position(text string, offset int) (line, column int) {
	before := text[:offset]
	return 1 + strings.Count(before, "\n"), 1 + len([]rune(before[strings.LastIndexByte(before, '\n')+1:]))
}

// maxIssues is how many mistakes of one expression are named.
const maxIssues = 5

func issueErrors(issues *cel.Issues) []*conditionError {
	var errs []*conditionError
	for _, issue := range issues.Errors() {
		if len(errs) == maxIssues {
			break
		}
		text, _, _ := strings.Cut(issue.Message, "\n")
		text = strings.TrimPrefix(text, "Syntax error: ")
		errs = append(errs, &conditionError{line: max(1, issue.Location.Line()), column: max(1, issue.Location.Column()+1), text: shorten(printable(text))})
	}
	if len(errs) == 0 {
		errs = append(errs, &conditionError{1, 1, "the condition cannot be read"})
	}
	return errs
}

// requires returns the features that a rule with the condition requires.
func (c *condition) requires() []string {
	features := []string{featureWhen}
	if c.hint {
		features = append(features, featureWhenHint)
	}
	if c.user {
		features = append(features, featureWhenUser)
	}
	return features
}

// defect says why the rule with the condition cannot be judged, beyond mistakes of the expression.
func (c *condition) defect(r *policyv1.Rule) string {
	switch {
	case c == nil:
		return ""
	case c.jwt && r.GetJwt() == nil:
		return "its condition reads jwt, and the rule does not say for which audience: write jwt: {audience: [...]} beside when"
	case c.grpc && len(r.GetGrpc()) == 0:
		return "its condition reads request.grpc_method, and the rule is not about gRPC methods: write grpc: [...] beside when, such as pkg.Service/*"
	}
	return ""
}

// ConditionIssuers returns the issuers of user tokens that the condition of a rule asks for: values of iss. The rule is
// one that Compile takes.
func ConditionIssuers(r *policyv1.Rule) []string {
	if r.GetWhen() == "" {
		return nil
	}
	c, errs := compileCondition(r.GetWhen(), r.GetEffect() != policyv1.Effect_EFFECT_ALLOW)
	if len(errs) > 0 {
		return nil
	}
	return c.issuers
}

// facts are what a condition can ask for. They are the variables of one evaluation. They hold no pointer to the request or
// the scan, which so need not be on the heap.
type facts struct {
	peer          spiffeid.ID
	kind          SVIDKind
	method, path  string
	grpc          bool // path is a gRPC method behind its slash
	headers       headerMap
	token         *Token // nil: none that the rule would take
	user          *User
	hints         map[spiffeid.ID]string
	hintsOfPolicy map[string]string
	home          ref.Val // the trust domain of the service; nil: not at hand
}

// factsFor fills in what the call and a rule say. The path is the one to judge by.
func (s *scan) factsFor(f *facts, r *rule, path string) {
	*f = facts{peer: s.r.Peer, kind: s.r.PeerSVID, method: s.r.Method, path: path, grpc: s.grpc || r.deny && s.r.Method == "POST",
		headers: headerMap{s.r.Headers}, user: s.r.User, home: s.home, hints: s.hints, hintsOfPolicy: r.hints}
	if s.tokenFits(r.spec.GetJwt()) {
		f.token = s.r.Token
	}
}

// ResolveName returns the value of a variable. What the call does not have is an error where it is read.
func (f *facts) ResolveName(name string) (any, bool) {
	switch name {
	case varPeerID:
		return types.String(f.peer.String()), true
	case varPeerTrustDomain:
		return f.trustDomain(f.peer), true
	case varPeerSVIDKind:
		if int(f.kind) < len(kindValues) {
			return kindValues[f.kind], true
		}
		return types.String(f.kind.String()), true
	case varPeerHint:
		hint, found := f.hints[f.peer]
		if !found {
			hint, found = f.hintsOfPolicy[f.peer.String()]
		}
		return types.String(hint), found
	case varMethod:
		if value, ok := methodValues[f.method]; ok {
			return value, true
		}
		return types.String(f.method), true
	case varPath:
		return types.String(f.path), true
	case varGRPCMethod:
		return types.String(strings.TrimPrefix(f.path, "/")), f.grpc
	case varHeaders:
		return &f.headers, true
	}
	if f.token != nil {
		switch name {
		case varJWTID:
			return types.String(f.token.ID.String()), true
		case varJWTTrustDomain:
			return f.trustDomain(f.token.ID), true
		case varJWTClaims:
			return f.token.Claims, true
		}
	}
	if f.user != nil && f.user.Issuer != "" {
		switch name {
		case varUserIssuer:
			return types.String(f.user.Issuer), true
		case varUserClaims:
			return f.user.Claims, true
		}
	}
	return nil, false
}

// trustDomain returns the trust domain of an ID. Values that are there already need not be made for each call.
func (f *facts) trustDomain(id spiffeid.ID) ref.Val {
	name := id.TrustDomain().Name()
	if home, ok := f.home.(types.String); ok && string(home) == name {
		return f.home
	}
	return types.String(name)
}

// What the usual calls have, as values.
var (
	kindValues   = [...]ref.Val{SVIDX509: types.String("x509-svid"), SVIDJWT: types.String("jwt-svid"), SVIDWIT: types.String("wit-svid")}
	methodValues = map[string]ref.Val{
		"GET": types.String("GET"), "HEAD": types.String("HEAD"), "POST": types.String("POST"), "PUT": types.String("PUT"),
		"PATCH": types.String("PATCH"), "DELETE": types.String("DELETE"), "OPTIONS": types.String("OPTIONS"),
	}
)

// Parent returns nil: there are no other variables.
func (f *facts) Parent() interpreter.Activation { return nil }

// An evaluation counts for conditionSteps of a search, and one more for every costPerStep that it costs.
const (
	conditionSteps = 64
	costPerStep    = 4
)

// holds reports whether the condition of a rule holds for the call; one that meets an error does not hold in an allow and
// holds in a deny. The rest of the rule fits.
func (s *scan) holds(r *rule) bool {
	if r.condition == nil {
		return true
	}
	if !s.http || s.fault != pathSound {
		return r.deny // the call is refused whatever the condition says
	}
	if s.steps += conditionSteps; s.steps > maxSteps {
		s.conditions = true
		return r.deny
	}
	held, err := s.evaluate(r, s.path)
	if !r.deny {
		return held && err == nil
	}
	if held || err != nil {
		return true
	}
	if !r.condition.path {
		return false
	}
	// A deny also covers other spellings of what it names.
	path := s.plainPath()
	if path == s.path {
		return false
	}
	held, err = s.evaluate(r, path)
	return held || err != nil
}

func (s *scan) evaluate(r *rule, path string) (bool, error) {
	c := r.condition
	f, _ := c.facts.Get().(*facts)
	if f == nil {
		f = new(facts)
	}
	s.factsFor(f, r, path)
	held, cost, err := c.eval(f)
	s.steps += int(cost / costPerStep)
	*f = facts{} // nothing of a call stays behind
	c.facts.Put(f)
	return held, err
}

// plainPath is the path decoded and without a trailing slash.
func (s *scan) plainPath() string {
	path := s.judged
	if path == "" {
		path = s.path
	}
	if strings.IndexByte(path, '%') >= 0 {
		path = string(unescape(nil, path))
	}
	return path
}

var errNotBool = errors.New("the condition is neither true nor false")

func (c *condition) eval(f *facts) (held bool, cost uint64, err error) {
	value, details, err := c.program.Eval(f)
	if n := details.ActualCost(); n != nil {
		cost = *n
	}
	if err != nil {
		return false, cost, err
	}
	truth, ok := value.(types.Bool)
	if !ok {
		return false, cost, errNotBool
	}
	return bool(truth), cost, nil
}
