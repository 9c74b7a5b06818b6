package analyse

import (
	"go.yaml.in/yaml/v3"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

// where finds the line and the column of a part of a document, a key for each mapping and an index for each list on the way.
// What is not there leads to the last part that is.
func where(doc *strictyaml.Document, steps ...any) (line, column int) {
	if doc == nil || doc.Node == nil {
		return 0, 0
	}
	n := doc.Node
	if n.Kind == yaml.DocumentNode && len(n.Content) == 1 {
		n = n.Content[0]
	}
	for _, step := range steps {
		next := (*yaml.Node)(nil)
		switch step := step.(type) {
		case string:
			for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
				if n.Content[i].Value == step {
					next = n.Content[i+1]
				}
			}
		case int:
			if n.Kind == yaml.SequenceNode && step < len(n.Content) {
				next = n.Content[step]
			}
		}
		if next == nil {
			break
		}
		n = next
	}
	return n.Line, n.Column
}

// ruleSteps are the steps to a rule of a compiled policy: its allows come first.
func ruleSteps(pol *policyv1.Policy, index int) []any {
	section, at := "allow", 0
	for _, r := range pol.GetRules()[:index] {
		if isDeny(r) == isDeny(pol.Rules[index]) {
			at++
		}
	}
	if isDeny(pol.Rules[index]) {
		section = "deny"
	}
	return []any{section, at}
}
