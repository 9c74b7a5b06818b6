package policy

import (
	"fmt"

	"cel.dev/cel-go/common/ast"
	celparser "cel.dev/cel-go/parser"
)

// conditionMisfit says which part of a condition is not true.
func (s *scan) conditionMisfit(r *rule) string {
	return "its condition does not hold: " + s.firstTerm(r, false)
}

// conditionTrouble says by which error the condition of a deny came to hold; empty if it is simply true.
func (s *scan) conditionTrouble(r *rule) string {
	f := new(facts)
	s.factsFor(f, r, s.path)
	if _, _, err := r.condition.eval(f); err == nil {
		return ""
	}
	return "its condition meets an error, which counts as true in a deny: " + s.firstTerm(r, true)
}

// firstTerm finds the first term of the && in a condition that is false or meets an error, or one that meets an error, and
// says so. What it says of an error holds no claim and no header.
func (s *scan) firstTerm(r *rule, mustErr bool) string {
	tree := r.condition.tree.NativeRep()
	e, err := celEnv()
	if err != nil {
		return err.Error()
	}
	f := new(facts)
	s.factsFor(f, r, s.path)
	for _, term := range conjuncts(tree.Expr()) {
		text, err := celparser.Unparse(term, tree.SourceInfo())
		if err != nil {
			text = "a part of it"
		}
		program, err := e.PlanProgram(ast.NewCheckedAST(ast.NewAST(term, tree.SourceInfo()), tree.TypeMap(), tree.ReferenceMap()), programOptions(r.condition.counted)...)
		if err != nil {
			return fmt.Sprintf("%s cannot be judged alone", text)
		}
		held, _, err := (&condition{program: program}).eval(f)
		switch {
		case err != nil:
			return fmt.Sprintf("%s: %s", shorten(text), shorten(printable(err.Error())))
		case !held && !mustErr:
			return fmt.Sprintf("%s is false", shorten(text))
		}
	}
	return "a part of it, for another spelling of the path"
}
