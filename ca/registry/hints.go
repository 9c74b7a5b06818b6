package registry

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// Conditions may ask for the hint of the caller's registration entry. Only its issuer can vouch for that, so the hints of
// those callers whom a rule with such a condition names go with the policy, to the agents that receive the policy.

// featureHint is what a rule requires whose condition asks for peer.hint.
const featureHint = "when.hint"

// MaxPeerHints bounds the hints that go with one policy.
const MaxPeerHints = 10_000

// maxHintSteps bounds the work to find them: patterns with wildcards times IDs that have a hint.
const maxHintSteps = 20_000_000

// tooManyHints is what the rules of a policy require in the end that has more callers with hints than can be told: no
// reader has it. So an allow covers nobody and a deny everybody until the rules name fewer callers.
var tooManyHints = fmt.Sprintf("hints of more than %d callers", MaxPeerHints)

// hints knows the hint of each ID that has exactly one.
type hints struct {
	byID    map[spiffeid.ID]string
	version int // grows with each change of byID

	mu    sync.Mutex // guards found; taken inside Registry.mu or alone
	found map[string]foundHints
}

// foundHints are those of one policy.
type foundHints struct {
	policy  *Policy
	version int
	hints   []*policyv1.PeerHint
	sum     uint64
	many    bool
}

func newHints() hints { return hints{byID: map[spiffeid.ID]string{}, found: map[string]foundHints{}} }

// noteHint works out anew the hint of an ID: all its entries that have not ended must agree. It tells whether it changed.
func (ix *index) noteHint(id spiffeid.ID) bool {
	hint, first := "", true
	for e := range ix.holders(id) {
		switch {
		case e.alias() || ix.ended[e.ID]:
		case first:
			hint, first = e.Hint, false
		case e.Hint != hint:
			hint = ""
		}
	}
	if ix.hints.byID[id] == hint {
		return false
	}
	if hint == "" {
		delete(ix.hints.byID, id)
	} else {
		ix.hints.byID[id] = hint
	}
	ix.hints.version++
	return true
}

// asksHints returns the rules of a policy whose conditions ask for peer.hint.
func asksHints(p *policyv1.Policy) []*policyv1.Rule {
	var out []*policyv1.Rule
	for _, r := range p.Rules {
		if slices.Contains(r.Requires, featureHint) {
			out = append(out, r)
		}
	}
	return out
}

// hintsOf returns the hints that go with p, in order of ID. Registry.mu is held.
func (ix *index) hintsOf(p *Policy) foundHints {
	if len(p.hinted) == 0 {
		return foundHints{}
	}
	h := &ix.hints
	h.mu.Lock()
	defer h.mu.Unlock()
	name := p.Compiled.Name
	if f, ok := h.found[name]; ok && f.policy == p && f.version == h.version {
		return f
	}
	f := foundHints{policy: p, version: h.version}
	f.hints, f.many = h.find(p.hinted)
	sum := fnv.New64a()
	for _, ph := range f.hints {
		fmt.Fprintf(sum, "%s\x00%s\x00", ph.SpiffeId, ph.Hint)
	}
	if f.many {
		fmt.Fprint(sum, "many")
	}
	f.sum = sum.Sum64()
	h.found[name] = f
	return f
}

// forget drops what was found for a policy that is gone.
func (h *hints) forget(policy string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.found, policy)
}

// find returns the hints of the callers that rules name; many says that there are too many.
func (h *hints) find(rules []*policyv1.Rule) (out []*policyv1.PeerHint, many bool) {
	found := map[spiffeid.ID]bool{}
	var patterns []string
	for _, r := range rules {
		for _, from := range r.From {
			if strings.Contains(from, "*") {
				patterns = append(patterns, from)
			} else if id, err := spiffeid.FromString(from); err == nil && h.byID[id] != "" {
				found[id] = true
			}
		}
	}
	slices.Sort(patterns)
	patterns = slices.Compact(patterns)
	if len(patterns) > 0 && len(h.byID) > maxHintSteps/len(patterns) {
		return nil, true
	}
	for id := range h.byID {
		if slices.ContainsFunc(patterns, func(p string) bool { return readWide(p, id) }) {
			found[id] = true
		}
		if len(found) > MaxPeerHints {
			return nil, true
		}
	}
	for id := range found {
		out = append(out, &policyv1.PeerHint{SpiffeId: id.String(), Hint: h.byID[id]})
	}
	slices.SortFunc(out, func(a, b *policyv1.PeerHint) int { return strings.Compare(a.SpiffeId, b.SpiffeId) })
	return out, len(out) > MaxPeerHints
}

// readWide tells whether a pattern covers an ID as in a deny, where /a/** covers /a as well.
func readWide(pattern string, id spiffeid.ID) bool {
	if policy.ServiceMatches(pattern, id) {
		return true
	}
	above, ok := strings.CutSuffix(pattern, "/**")
	return ok && policy.ServiceMatches(above, id)
}

// withHints returns p with the hints that its conditions ask for. What it shares with p is not changed by anybody.
func (f foundHints) withHints(p *policyv1.Policy) *policyv1.Policy {
	if f.policy == nil {
		return p
	}
	out := &policyv1.Policy{Name: p.Name, Revision: p.Revision, Services: p.Services, Mode: p.Mode, Rules: p.Rules, File: p.File, Line: p.Line, Rollout: p.Rollout, PeerHints: f.hints}
	if !f.many {
		return out
	}
	out.PeerHints, out.Rules = nil, slices.Clone(p.Rules)
	for i, r := range out.Rules {
		if slices.Contains(r.Requires, featureHint) {
			out.Rules[i] = proto.CloneOf(r)
			out.Rules[i].Requires = append(out.Rules[i].Requires, tooManyHints)
		}
	}
	return out
}

// checkHints refuses a policy whose conditions ask for the hints of too many. mu is held.
func (ix *index) checkHints(x *resource) error {
	if x.compiled == nil {
		return nil
	}
	rules := asksHints(x.compiled)
	if len(rules) == 0 {
		return nil
	}
	if _, many := ix.hints.find(rules); many {
		return fmt.Errorf("%s:%d: CallPolicy %q: the rules whose conditions ask for peer.hint name more than %d callers that have one; name fewer in `from`", x.doc.File, x.doc.Line, x.name, MaxPeerHints)
	}
	return nil
}
