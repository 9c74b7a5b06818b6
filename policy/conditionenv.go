package policy

import (
	"fmt"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/env"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/interpreter"
)

// The names that a condition may use.
const (
	varPeerID          = "peer.id"
	varPeerTrustDomain = "peer.trust_domain"
	varPeerSVIDKind    = "peer.svid_kind"
	varPeerHint        = "peer.hint"
	varMethod          = "request.method"
	varPath            = "request.path"
	varHeaders         = "request.headers"
	varGRPCMethod      = "request.grpc_method"
	varJWTID           = "jwt.id"
	varJWTTrustDomain  = "jwt.trust_domain"
	varJWTClaims       = "jwt.claims"
	varUserIssuer      = "user.issuer"
	varUserClaims      = "user.claims"
)

// What an expression may be, and what evaluating it may cost. A unit of cost is about one comparison.
const (
	maxConditionBytes = 4096
	maxConditionNodes = 512
	maxConditionDepth = 24
	maxNesting        = 2   // comprehensions within comprehensions
	maxRegexProgram   = 500 // instructions
	// maxCost ends an evaluation. An expression is refused when the policy is applied if it could cost more than that with
	// claims and headers of the usual size: usualItems in a list, usualBytes in a text.
	maxCost    = 20_000
	usualItems = 32
	usualBytes = 256
)

// maxHeaderValue is the longest value of a header that a condition compares.
const maxHeaderValue = 8 << 10

// celEnv is what conditions are written in: a part of the standard library of CEL, without what makes new lists and maps
// and without conversions that round, and two functions for claims.
var celEnv = sync.OnceValues(func() (*cel.Env, error) {
	text, dyn := cel.StringType, cel.DynType
	claims := cel.MapType(text, dyn)
	return cel.NewCustomEnv(
		cel.StdLib(cel.StdLibSubset(env.NewLibrarySubset().
			AddIncludedMacros(operators.Has, operators.All, operators.Exists, operators.ExistsOne).
			AddIncludedFunctions(
				env.NewFunction(operators.LogicalAnd), env.NewFunction(operators.LogicalOr), env.NewFunction(operators.LogicalNot),
				env.NewFunction(operators.Conditional), env.NewFunction(operators.NotStrictlyFalse),
				env.NewFunction(operators.Equals), env.NewFunction(operators.NotEquals),
				env.NewFunction(operators.Less), env.NewFunction(operators.LessEquals),
				env.NewFunction(operators.Greater), env.NewFunction(operators.GreaterEquals),
				env.NewFunction(operators.In), env.NewFunction(operators.Index),
				env.NewFunction(operators.Add, overload(overloads.AddString, "string"), overload(overloads.AddInt64, "int")), // int: exists_one counts
				env.NewFunction(overloads.Size), env.NewFunction(overloads.Contains), env.NewFunction(overloads.StartsWith),
				env.NewFunction(overloads.EndsWith), env.NewFunction(overloads.Matches),
			))),
		cel.Variable(varPeerID, text), cel.Variable(varPeerTrustDomain, text), cel.Variable(varPeerSVIDKind, text), cel.Variable(varPeerHint, text),
		cel.Variable(varMethod, text), cel.Variable(varPath, text), cel.Variable(varGRPCMethod, text), cel.Variable(varHeaders, cel.MapType(text, text)),
		cel.Variable(varJWTID, text), cel.Variable(varJWTTrustDomain, text), cel.Variable(varJWTClaims, claims),
		cel.Variable(varUserIssuer, text), cel.Variable(varUserClaims, claims),
		cel.Function("split", cel.MemberOverload("string_split", []*cel.Type{text, text}, cel.ListType(text), cel.BinaryBinding(split))),
		cel.Function("lowerAscii", cel.MemberOverload("string_lower_ascii", []*cel.Type{text}, text, cel.UnaryBinding(lowerASCII))),
		cel.CustomTypeAdapter(claimAdapter{types.DefaultTypeAdapter}),
		cel.CrossTypeNumericComparisons(true),
		cel.EnableHiddenAccumulatorName(true),
		cel.EnableErrorOnBadPresenceTest(true),
		cel.ParserExpressionSizeLimit(maxConditionBytes),
		cel.ParserRecursionLimit(maxConditionDepth),
		cel.ParserErrorRecoveryLimit(4),
		cel.ExpressionNodeLimit(maxConditionNodes),
		cel.RegexProgramSizeLimit(maxRegexProgram),
		cel.ASTValidators(cel.ValidateRegexLiterals(), cel.ValidateComprehensionNestingLimit(maxNesting)),
	)
})

func overload(id, operand string) *env.Overload {
	t := env.NewTypeDesc(operand)
	return env.NewOverload(id, []*env.TypeDesc{t, t}, t)
}

// programOptions are how an expression is evaluated. Counting the cost takes as long as the rest, so it is done where the
// cost depends on the call by more than the length of its texts.
func programOptions(counted bool) []cel.ProgramOption {
	o := []cel.ProgramOption{cel.OptimizeRegex(interpreter.MatchesRegexOptimization), cel.CustomDecoratorV2(strictly)}
	if counted {
		o = append(o, cel.CostTracking(functionCosts{}), cel.CostLimit(maxCost))
	}
	return o
}

func split(text, separator ref.Val) ref.Val {
	s, sep := string(text.(types.String)), string(separator.(types.String))
	if sep == "" {
		return types.NewErr("split by nothing")
	}
	return types.NewStringList(types.DefaultTypeAdapter, strings.Split(s, sep))
}

func lowerASCII(text ref.Val) ref.Val {
	s := string(text.(types.String))
	lower := []byte(s)
	for i, c := range lower {
		if 'A' <= c && c <= 'Z' {
			lower[i] = c + 'a' - 'A'
		}
	}
	return types.String(lower)
}

// functionCosts says what a call cost. CEL's own model charges one step for a call whose operands were not typed when it
// was compiled, as claims are not: endless lists and texts would be searched for nothing.
type functionCosts struct{}

func (functionCosts) CallCost(function, _ string, args []ref.Val, _ ref.Val) *uint64 {
	if function == overloads.Matches {
		return nil // its operands have one type, and the model counts the pattern, too
	}
	n := uint64(1)
	for _, arg := range args {
		switch v := arg.(type) {
		case types.String:
			n += uint64(len(v)) / 10
		case traits.Lister:
			if size, ok := v.Size().(types.Int); ok && function == operators.In && size > 0 {
				n += uint64(size)
			}
		}
	}
	return &n
}

// usualSizes estimates with claims and headers as they usually are.
type usualSizes struct{}

func (usualSizes) EstimateSize(node cost.AstNode) *cost.SizeEstimate {
	if node.ComputedSize() != nil {
		return nil
	}
	most := uint64(usualBytes)
	switch node.Type().Kind() {
	case types.ListKind, types.MapKind:
		most = usualItems
	case types.DynKind:
		// A text or a list: a comprehension asks how often it turns, all else how long the text is.
		if path := node.Path(); len(path) > 0 {
			most = usualItems
		}
	}
	return &cost.SizeEstimate{Min: 0, Max: most}
}

func (usualSizes) EstimateCallCost(function, _ string, target *cost.AstNode, _ []cost.AstNode) *cost.CallEstimate {
	switch function {
	case "split":
		return &cost.CallEstimate{CostEstimate: cost.Estimate{Min: 1, Max: 1 + usualBytes/8},
			ResultSize: &cost.SizeEstimate{Min: 1, Max: usualItems, Elem: &cost.SizeEstimate{Min: 0, Max: usualBytes}}}
	case "lowerAscii":
		return &cost.CallEstimate{CostEstimate: cost.Estimate{Min: 1, Max: 1 + usualBytes/8}, ResultSize: &cost.SizeEstimate{Min: 0, Max: usualBytes}}
	}
	return nil
}

// strictly replaces the operators that CEL lets answer for values of different types: there, 5 == "5" is false and
// 5 != "5" is true, so that a claim of another type than its reader thought could grant something. Here it is an error.
func strictly(i interpreter.InterpretableV2) (interpreter.InterpretableV2, error) {
	call, ok := i.(interpreter.InterpretableCall)
	if !ok {
		return i, nil
	}
	var compare func(l, r ref.Val) ref.Val
	switch call.Function() {
	case operators.Equals:
		compare = equal
	case operators.NotEquals:
		compare = func(l, r ref.Val) ref.Val {
			if b, ok := equal(l, r).(types.Bool); ok {
				return !b
			}
			return errMistyped(l, r)
		}
	case operators.In:
		compare = isIn
	default:
		return i, nil
	}
	args := call.Args()
	if len(args) != 2 {
		return nil, fmt.Errorf("%s has %d operands", call.Function(), len(args))
	}
	return &comparison{InterpretableCall: call, left: args[0], right: args[1], compare: compare}, nil
}

// A comparison is an operator that is read strictly.
type comparison struct {
	interpreter.InterpretableCall
	left, right interpreter.InterpretableV2
	compare     func(l, r ref.Val) ref.Val
}

func (c *comparison) Eval(vars interpreter.Activation) ref.Val {
	return interpreter.EvalActivation(vars, c.Exec)
}

func (c *comparison) Exec(frame *interpreter.ExecutionFrame) ref.Val {
	l := c.left.Exec(frame)
	if types.IsUnknownOrError(l) {
		return l
	}
	r := c.right.Exec(frame)
	if types.IsUnknownOrError(r) {
		return r
	}
	result := c.compare(l, r)
	if costs := frame.CostTracker(); costs != nil {
		costs.EvalBinary(frame, c.ID(), c.InterpretableCall, l, r, result)
	}
	return result
}

func errMistyped(l, r ref.Val) ref.Val {
	return types.NewErr("%s and %s cannot be compared", kindOf(l), kindOf(r))
}

// equal compares texts, truth values and numbers, each among themselves.
func equal(l, r ref.Val) ref.Val {
	switch a := l.(type) {
	case types.String:
		if b, ok := r.(types.String); ok {
			return types.Bool(a == b)
		}
	case types.Bool:
		if b, ok := r.(types.Bool); ok {
			return types.Bool(a == b)
		}
	case types.Int, types.Uint, types.Double:
		switch r.(type) {
		case types.Int, types.Uint, types.Double:
			return a.Equal(r)
		}
	}
	return errMistyped(l, r)
}

// isIn looks for a key in a map or an item in a list, all of whose items must be comparable until it is found.
func isIn(needle, hay ref.Val) ref.Val {
	switch h := hay.(type) {
	case *headerMap:
		return h.Contains(needle)
	case interface {
		ref.Val
		Find(key ref.Val) (ref.Val, bool)
	}:
		if _, ok := needle.(types.String); !ok {
			return types.NewErr("%s cannot be the name of a claim", kindOf(needle))
		}
		value, found := h.Find(needle)
		if types.IsError(value) && !found {
			return value
		}
		return types.Bool(found)
	case interface {
		ref.Val
		Get(index ref.Val) ref.Val
		Size() ref.Val
	}:
		n, ok := h.Size().(types.Int)
		if !ok {
			return types.NewErr("%s has no items", kindOf(hay))
		}
		var trouble ref.Val
		for i := types.Int(0); i < n; i++ {
			item := h.Get(i)
			if types.IsUnknownOrError(item) {
				trouble = item
				continue
			}
			switch found := equal(needle, item); found {
			case types.True:
				return types.True
			case types.False:
			default:
				trouble = found
			}
		}
		if trouble != nil {
			return trouble
		}
		return types.False
	}
	return types.NewErr("%s has no items", kindOf(hay))
}

// kindOf names the type of a value for a message that holds nothing of the value.
func kindOf(v ref.Val) string {
	switch v.Type() {
	case types.StringType:
		return "a text"
	case types.BoolType:
		return "a truth value"
	case types.IntType, types.UintType, types.DoubleType:
		return "a number"
	case types.NullType:
		return "null"
	case types.ListType:
		return "a list"
	case types.MapType:
		return "a map"
	}
	return "a value"
}

// isVariable reports whether a name stands for something that a condition is about.
func isVariable(name string) bool {
	switch name {
	case varPeerID, varPeerTrustDomain, varPeerSVIDKind, varPeerHint, varMethod, varPath, varHeaders, varGRPCMethod,
		varJWTID, varJWTTrustDomain, varJWTClaims, varUserIssuer, varUserClaims:
		return true
	}
	return false
}
