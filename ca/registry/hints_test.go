package registry

import (
	"fmt"
	"strings"
	"testing"
	"time"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

// asking stores a policy whose first rule requires the hints of its callers.
func asking(t testing.TB, r *Registry, text string) {
	t.Helper()
	docs, err := strictyaml.Split([]byte(text), "t.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	x, err := r.parseResource(docs[0])
	if err != nil {
		t.Fatal(err)
	}
	x.compiled.Rules[0].Requires = append(x.compiled.Rules[0].Requires, "when", featureHint)
	b, err := x.encode(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.commit(t.Context(), nil, []store.Write{{Key: x.key(), Value: b}}); err != nil {
		t.Fatal(err)
	}
}

func hintsIn(p *policyv1.Policy) string {
	var out []string
	for _, h := range p.GetPeerHints() {
		out = append(out, strings.TrimPrefix(h.SpiffeId, "spiffe://example.org")+"="+h.Hint)
	}
	return strings.Join(out, " ")
}

func identityWith(name, id, hint, more string) string {
	return fmt.Sprintf("---\nkind: Identity\nname: %s\nspiffeID: %s\nmatch: [\"unix:path:/bin/%s\"]\nhint: %s\n%s", name, id, name, hint, more)
}

func TestPeerHintsGoWithThePoliciesThatAskForThem(t *testing.T) {
	c := newClock()
	r := replica(t, newStore(t), c.now)
	agent, other := twoSides(t, r, "x", 10)
	web := "---\nkind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n"
	apply(t, r, web+identityWith("a", "/jobs/a", "batch", "")+identityWith("b", "/jobs/b", "live", "")+identityWith("b2", "/jobs/b", "live", "")+
		identityWith("c", "/jobs/c", "one", "")+identityWith("c2", "/jobs/c", "two", "")+identityWith("d", "/elsewhere", "batch", ""))
	asking(t, r, "kind: CallPolicy\nname: p\nservice: /web\nallow: [{from: [/jobs/**, /nobody]}, {from: [/elsewhere]}]\n")
	f := r.Follow(agent, 0, false)
	defer f.Close()
	if got := hintsIn(f.Next(true).Policies[0]); got != "/jobs/a=batch /jobs/b=live" {
		t.Errorf("hints %q", got)
	}
	next := func(what, want string) {
		t.Helper()
		d := f.Next(false)
		if d == nil || len(d.Policies) != 1 {
			t.Errorf("%s: no policy is sent", what)
			return
		}
		if got := hintsIn(d.Policies[0]); got != want {
			t.Errorf("%s: hints %q, want %q", what, got, want)
		}
	}
	apply(t, r, identityWith("b2", "/jobs/b", "other", ""))
	next("two entries that do not agree", "/jobs/a=batch")
	apply(t, r, identityWith("b2", "/jobs/x", "other", ""))
	next("an entry for another ID", "/jobs/a=batch /jobs/b=live /jobs/x=other")
	apply(t, r, identityWith("e", "/jobs/e", "brief", fmt.Sprintf("expiresAt: %q\n", c.now().Add(time.Hour).UTC().Format(time.RFC3339))))
	next("a new entry", "/jobs/a=batch /jobs/b=live /jobs/e=brief /jobs/x=other")
	c.move(2 * time.Hour)
	r.NoteEnds()
	next("an entry that has ended", "/jobs/a=batch /jobs/b=live /jobs/x=other")
	p, err := r.PlanDelete(KindIdentity, "a", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	next("an entry that is gone", "/jobs/b=live /jobs/x=other")
	apply(t, r, identityWith("d", "/elsewhere", "else", ""))
	if d := f.Next(false); d != nil && len(d.Policies) > 0 {
		t.Errorf("a hint that no condition asks for: %v", d.Policies)
	}
	if set := r.PolicySet("e"); hintsIn(set.Policies[0]) != "/jobs/b=live /jobs/x=other" {
		t.Errorf("the admins' set has %q", hintsIn(set.Policies[0]))
	}
	// Whoever does not have the service is told of nobody.
	apply(t, r, strings.Replace(web, "match:", "on: [\"node:group:none\"]\nmatch:", 1))
	for _, id := range []string{agent.String(), other.String()} {
		if strings.Contains(fmt.Sprint(holds(t, r, other)), "hint") {
			t.Errorf("%s has hints without the service", id)
		}
	}
}

func TestTooManyPeerHintsCloseTheRule(t *testing.T) {
	h := newHints()
	for i := range MaxPeerHints + 1 {
		id, err := AgentID(td, "join_token", fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		h.byID[id] = "h"
	}
	rules := []*policyv1.Rule{{From: []string{"spiffe://example.org/**"}, Requires: []string{featureHint}}, {From: []string{"spiffe://example.org/x"}}}
	if _, many := h.find(rules); many {
		t.Error("no wildcard in the first segment covers /spire, and yet there are too many")
	}
	rules[0].From[0] = "spiffe://example.org/spire/**"
	hints, many := h.find(rules)
	if !many {
		t.Fatalf("%d hints", len(hints))
	}
	p := foundHints{policy: &Policy{}, many: true}.withHints(&policyv1.Policy{Rules: rules})
	if len(p.PeerHints) != 0 || p.Rules[0].Requires[1] != tooManyHints || len(p.Rules[1].Requires) != 0 || len(rules[0].Requires) != 1 {
		t.Errorf("%v", p)
	}
	ix := newIndex()
	ix.hints.byID = h.byID
	err := ix.checkHints(&resource{name: "p", doc: Document{File: "f", Line: 3}, compiled: &policyv1.Policy{Rules: rules}})
	if err == nil || !strings.Contains(err.Error(), "f:3: ") || !strings.Contains(err.Error(), "more than 10000 callers") {
		t.Errorf("at apply: %v", err)
	}
	var patterns []string
	for i := range 3000 {
		patterns = append(patterns, fmt.Sprintf("spiffe://example.org/%d/*", i))
	}
	if _, many := h.find([]*policyv1.Rule{{From: patterns}}); !many {
		t.Error("the work is not bounded")
	}
}
