package analyse

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// A Verdict is what can be said of a call of which no token, no header and no user is known.
type Verdict string

const (
	VerdictAllow       Verdict = "allow"
	VerdictDeny        Verdict = "deny"
	VerdictConditional Verdict = "conditional" // it depends on a token or on a condition
)

// maxConditions is how many conditions are looked at one by one.
const maxConditions = 8

// conditionOf is what a rule asks for beside caller and request, as text; empty: nothing.
func conditionOf(r *policyv1.Rule) string {
	if !conditional(r) {
		return ""
	}
	text := ""
	if jwt := r.GetJwt(); jwt != nil {
		text = fmt.Sprintf("jwt %q %d", jwt.GetAudience(), jwt.GetSubject())
	}
	return text + " when " + r.GetWhen()
}

// conditionsOf returns the conditions of all rules that are enforced, each once.
func conditionsOf(sets ...*policyv1.PolicySet) []string {
	seen := map[string]bool{}
	for _, s := range sets {
		for _, p := range s.GetPolicies() {
			for _, r := range p.GetRules() {
				if c := conditionOf(r); c != "" {
					seen[c] = true
				}
			}
		}
	}
	out := make([]string, 0, len(seen))
	for c := range seen {
		out = append(out, c)
	}
	slices.Sort(out)
	return out
}

// assume is a set in which the conditions that hold are gone, and so are the rules whose condition does not.
func assume(set *policyv1.PolicySet, holds func(condition string) bool) *policyv1.PolicySet {
	out := &policyv1.PolicySet{Format: set.GetFormat(), TrustDomain: set.GetTrustDomain(), Epoch: set.GetEpoch(), Revision: set.GetRevision(), Defaults: set.GetDefaults()}
	for _, p := range set.GetPolicies() {
		kept := &policyv1.Policy{Name: p.Name, Revision: p.Revision, Services: p.Services, Mode: p.Mode, File: p.File, Line: p.Line}
		for _, r := range p.GetRules() {
			if c := conditionOf(r); c != "" {
				if !holds(c) {
					continue
				}
				r = proto.CloneOf(r)
				r.Jwt, r.When = nil, ""
				r.Requires = slices.DeleteFunc(r.Requires, func(f string) bool {
					return !slices.Contains([]string{"http", "grpc"}, f) && slices.Contains(policy.Features(), f)
				})
			}
			kept.Rules = append(kept.Rules, r)
		}
		out.Policies = append(out.Policies, kept)
	}
	return out
}

// A judge decides calls under several assumptions about conditions: none holds, all hold, and each alone.
type judge struct{ views []*policy.Policies }

func newJudge(set *policyv1.PolicySet, conditions []string) (*judge, error) {
	j := &judge{}
	add := func(holds func(string) bool) error {
		p, err := policy.Compile(assume(set, holds))
		j.views = append(j.views, p)
		return err
	}
	if err := add(func(string) bool { return false }); err != nil || len(conditions) == 0 {
		return j, err
	}
	if err := add(func(string) bool { return true }); err != nil || len(conditions) == 1 {
		return j, err
	}
	for _, c := range conditions[:min(len(conditions), maxConditions)] {
		if err := add(func(s string) bool { return s == c }); err != nil {
			return j, err
		}
	}
	return j, nil
}

// judge returns the verdict, the answers under each assumption as text, and the decision that the verdict names: the one
// that allows, if there is one.
func (j *judge) judge(r *policy.Request) (Verdict, string, policy.Outcome) {
	answers := make([]byte, len(j.views))
	allowed := 0
	var shown policy.Outcome
	for i, p := range j.views {
		o := p.Decide(r).Outcome
		answers[i] = '0'
		if o.Allowed {
			answers[i] = '1'
			allowed++
		}
		if i == 0 || o.Allowed && !shown.Allowed {
			shown = o
		}
	}
	switch allowed {
	case 0:
		return VerdictDeny, string(answers), shown
	case len(j.views):
		return VerdictAllow, string(answers), shown
	}
	return VerdictConditional, string(answers), shown
}
