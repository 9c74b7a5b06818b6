package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
)

// A replica is a registry that runs on a store that others may run on, too.
func replica(t testing.TB, s store.Store, now func() time.Time) *Registry {
	t.Helper()
	r, err := Open(t.Context(), Config{TrustDomain: td, Store: s, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func newStore(t testing.TB) store.Store {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// A clock that tests move.
type clock struct{ at atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.at.Store(1795320000)
	return c
}

func (c *clock) now() time.Time        { return time.Unix(c.at.Load(), 0) }
func (c *clock) move(by time.Duration) { c.at.Add(int64(by / time.Second)) }

func plan(t testing.TB, r *Registry, text string) *Plan {
	t.Helper()
	p, err := tryPlan(r, text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func tryPlan(r *Registry, text string) (*Plan, error) {
	docs, err := strictyaml.Split([]byte(text), "t.yaml", 1)
	if err != nil {
		return nil, err
	}
	return r.Plan(docs, Options{})
}

func apply(t testing.TB, r *Registry, text string) store.Revision {
	t.Helper()
	rev, err := r.Apply(t.Context(), plan(t, r, text))
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func begin(t testing.TB, r *Registry, text string, s RolloutSpec) *Rollout {
	t.Helper()
	o, err := r.StartRollout(t.Context(), plan(t, r, text), s)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// twoSides returns agents that a roll-out of this name includes at once, and only at last.
func twoSides(t testing.TB, r *Registry, name string, percent int) (first, last spiffeid.ID) {
	t.Helper()
	o := &Rollout{Name: name, Steps: []int{percent}, State: RolloutRunning}
	for i := range 1000 {
		id, err := AgentID(td, "join_token", fmt.Sprint("n", i))
		if err != nil {
			t.Fatal(err)
		}
		switch in := o.Includes(id); {
		case in && first.IsZero():
			first = id
		case !in && last.IsZero():
			last = id
		default:
			continue
		}
		if err := r.PutNode(t.Context(), &Node{ID: id, Attestation: "join_token", Serial: "1", Active: true}, nil); err != nil {
			t.Fatal(err)
		}
		if !first.IsZero() && !last.IsZero() {
			return first, last
		}
	}
	t.Fatal("no two sides")
	return first, last
}

// holds returns the policies that a new follower is sent, by name.
func holds(t testing.TB, r *Registry, agent spiffeid.ID) map[string]*policyv1.Policy {
	t.Helper()
	f := r.Follow(agent, 0, false)
	defer f.Close()
	out := map[string]*policyv1.Policy{}
	for _, p := range f.Next(true).Policies {
		out[p.Name] = p
	}
	return out
}

const identity = "---\nkind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n---\nkind: Identity\nname: db\nspiffeID: /db\nmatch: [\"unix:uid:2\"]\n"

func policyOf(name, service, from string) string {
	return fmt.Sprintf("---\nkind: CallPolicy\nname: %s\nservice: [%s]\nallow: [{from: [%s]}]\n", name, service, from)
}

func from(p *policyv1.Policy) string {
	if p == nil {
		return "nothing"
	}
	var out []string
	for _, r := range p.Rules {
		out = append(out, r.From...)
	}
	s := strings.ReplaceAll(strings.Join(out, " "), "spiffe://example.org", "")
	if p.Rollout != nil {
		s += " instead of " + from(p.Rollout.Former) + " by " + p.Rollout.Name
	}
	return strings.TrimSpace(s)
}

func TestARolloutHasTwoSidesUntilItIsDone(t *testing.T) {
	s, c := newStore(t), newClock()
	r := replica(t, s, c.now)
	first, last := twoSides(t, r, "v2", 10)
	apply(t, r, identity+policyOf("p", "/web", "/old"))
	old := r.ix.policies["p"].Revision
	o := begin(t, r, policyOf("p", "/web", "/new")+policyOf("q", "/db", "/new"), RolloutSpec{Name: "v2", Steps: []int{10, 50}, Bake: time.Minute, By: "me"})
	if fmt.Sprint(o.Steps) != "[10 50 100]" || o.Percent() != 10 || len(o.Policies) != 2 {
		t.Fatalf("%+v", o)
	}
	check := func(when string, r *Registry, wantFirst, wantLast string) {
		t.Helper()
		for agent, want := range map[spiffeid.ID]string{first: wantFirst, last: wantLast} {
			h := holds(t, r, agent)
			if got := from(h["p"]) + "; " + from(h["q"]); got != want {
				t.Errorf("%s: %s has %q, want %q", when, agent, got, want)
			}
		}
	}
	const begun, still = "/new instead of /old by v2; /new instead of nothing by v2", "/old; nothing"
	check("at 10 %", r, begun, still)
	check("at another replica, or after a restart of the CA", replica(t, s, c.now), begun, still)
	if p := holds(t, r, first)["p"]; p.Revision <= int64(old) {
		t.Errorf("the new version has the revision %d, the old one %d", p.Revision, old)
	}
	if set := r.PolicySet("e"); from(set.Policies[0]) != "/old" || len(set.Policies) != 1 {
		t.Errorf("what is applied is %v", set.Policies)
	}

	// An agent that follows all the time is told of each side's changes, one that was away of those it missed.
	f := r.Follow(first, 0, false)
	defer f.Close()
	f.Next(true)
	if concerned, in := r.RolloutAgents("v2"); concerned != 1 || len(in) != 1 || in[0] != first {
		t.Errorf("%d agents, %v have it", concerned, in)
	}
	c.move(time.Minute)
	moves := r.RolloutMoves()
	if len(moves) != 1 || moves[0].Event() != "rollout.step" {
		t.Fatalf("%v", moves)
	}
	if _, err := r.MakeMove(t.Context(), moves[0]); err != nil {
		t.Fatal(err)
	}
	if d := f.Next(false); d != nil && len(d.Policies) > 0 {
		t.Errorf("who has it already is sent %v", d.Policies)
	}
	if got := r.RolloutMoves(); len(got) != 0 {
		t.Errorf("before the time: %v", got)
	}
	if _, err := r.PromoteRollout(t.Context(), "v2", false); err != nil {
		t.Fatal(err)
	}
	check("at 100 %", r, begun, begun)
	away := r.Follow(last, 0, false)
	awayAt := away.Next(true).To
	away.Close()
	c.move(time.Minute)
	for _, m := range r.RolloutMoves() {
		if m.Event() != "rollout.done" {
			t.Errorf("%s", m.Event())
		}
		if _, err := r.MakeMove(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	if d := f.Next(false); d == nil || len(d.Policies) != 2 || d.Policies[0].Rollout != nil {
		t.Errorf("who had it is sent %v", d)
	}
	back := r.Follow(last, awayAt, true)
	defer back.Close()
	if d := back.Next(false); d == nil || d.Snapshot || len(d.Policies) != 2 || d.Policies[0].Rollout != nil {
		t.Errorf("who was away is sent %+v", d)
	}
	check("when it is done", r, "/new; /new", "/new; /new")
	if o, err := r.Rollout("v2"); err != nil || o.State != RolloutDone || o.Percent() != 100 || o.Policies[0].Policy != nil {
		t.Errorf("%+v, %v", o, err)
	}
	if concerned, in := r.RolloutAgents("v2"); concerned != 0 || len(in) != 0 {
		t.Errorf("%d agents, %v", concerned, in)
	}
	apply(t, r, policyOf("p", "/web", "/newer")) // it is free again
}

func TestARolloutGoesBackOnDenials(t *testing.T) {
	c := newClock()
	r := replica(t, newStore(t), c.now)
	first, last := twoSides(t, r, "v2", 10)
	apply(t, r, identity+policyOf("p", "/web", "/old"))
	begin(t, r, policyOf("p", "/web", "/new"), RolloutSpec{Name: "v2", Steps: []int{10}, MaxDenials: 3})
	r.NoteFormerlyAllowed(last, "v2", 100) // it does not have the new version: whatever it reports is no denial by it
	r.NoteFormerlyAllowed(first, "other", 100)
	r.NoteFormerlyAllowed(first, "v2", 0)
	if m := r.RolloutMoves(); len(m) != 0 {
		t.Fatalf("what does not count is counted: %v", m)
	}
	r.NoteFormerlyAllowed(first, "v2", 2)
	select {
	case <-r.FormerlyAllowed():
	default:
		t.Error("nobody is woken")
	}
	m := r.RolloutMoves()
	if len(m) != 1 || m[0].Event() != "" {
		t.Fatalf("%+v", m)
	}
	if _, err := r.MakeMove(t.Context(), m[0]); err != nil {
		t.Fatal(err)
	}
	if o, _ := r.Rollout("v2"); o.Denials != 2 || o.State != RolloutRunning {
		t.Fatalf("%+v", o)
	}
	second := another(t, r, "v2", 10, first)
	r.NoteFormerlyAllowed(second, "v2", 1<<63)
	r.NoteFormerlyAllowed(second, "v2", 1<<63)
	r.NoteFormerlyAllowed(first, "v2", 2)
	m = r.RolloutMoves()
	if len(m) != 1 || m[0].Event() != "rollout.rollback" {
		t.Fatalf("%+v", m)
	}
	if _, err := r.MakeMove(t.Context(), m[0]); err != nil {
		t.Fatal(err)
	}
	o, _ := r.Rollout("v2")
	if o.State != RolloutRolledBack || !strings.Contains(o.Reason, "3 are tolerated") || o.Percent() != 0 {
		t.Errorf("%+v", o)
	}
	if got := from(holds(t, r, first)["p"]); got != "/old" {
		t.Errorf("then %s", got)
	}
	r.NoteFormerlyAllowed(first, "v2", 5)
	if m := r.RolloutMoves(); len(m) != 0 {
		t.Errorf("it is over, and still counted: %v", m)
	}

	begin(t, r, policyOf("p", "/web", "/new"), RolloutSpec{Name: "any", Steps: []int{100}, MaxDenials: -1})
	r.NoteFormerlyAllowed(first, "any", 1000)
	for _, m := range r.RolloutMoves() {
		if _, err := r.MakeMove(t.Context(), m); err != nil || m.Event() != "" {
			t.Fatal(m.Event(), err)
		}
	}
	if o, _ := r.Rollout("any"); o.State != RolloutRunning || o.Denials != 1000 {
		t.Errorf("%+v", o)
	}
}

// Two replicas look at the same moment: a step is made once, and what each has counted is counted.
func TestReplicasMoveARolloutOnce(t *testing.T) {
	s, c := newStore(t), newClock()
	a, b := replica(t, s, c.now), replica(t, s, c.now)
	first, _ := twoSides(t, a, "v2", 10)
	apply(t, a, identity+policyOf("p", "/web", "/old"))
	o := begin(t, a, policyOf("p", "/web", "/new"), RolloutSpec{Name: "v2", Steps: []int{10, 50}, MaxDenials: -1, Bake: time.Minute})
	if err := b.WaitFor(t.Context(), o.Revision); err != nil {
		t.Fatal(err)
	}
	c.move(time.Minute)
	a.NoteFormerlyAllowed(first, "v2", 2)
	b.NoteFormerlyAllowed(first, "v2", 3)
	ma, mb := a.RolloutMoves(), b.RolloutMoves()
	rev, err := a.MakeMove(t.Context(), ma[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.MakeMove(t.Context(), mb[0]); !errors.Is(err, ErrConflict) {
		t.Fatalf("the second move: %v", err)
	}
	if err := b.WaitFor(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	mb = b.RolloutMoves()
	if len(mb) != 1 || mb[0].Event() != "" {
		t.Fatalf("%+v", mb)
	}
	if _, err := b.MakeMove(t.Context(), mb[0]); err != nil {
		t.Fatal(err)
	}
	if o, _ := b.Rollout("v2"); o.Step != 1 || o.Denials != 5 {
		t.Errorf("step %d, %d denials", o.Step, o.Denials)
	}
}

func TestWhatOverlapsARolloutIsRefused(t *testing.T) {
	c := newClock()
	r := replica(t, newStore(t), c.now)
	apply(t, r, identity)
	apply(t, r, policyOf("p", "/web", "/old"))
	apply(t, r, policyOf("z", "/db", "/old"))
	before := plan(t, r, policyOf("p", "/web", "/elsewhere"))
	fresh := plan(t, r, policyOf("n", "/web", "/elsewhere"))
	begin(t, r, policyOf("p", "/web", "/new")+policyOf("n", "/web", "/new"), RolloutSpec{Name: "v2", Steps: []int{10}})
	for name, text := range map[string]string{"a change": policyOf("p", "/web", "/other"), "a policy that it brings": policyOf("n", "/db", "/other"), "its own": policyOf("p", "/web", "/new")} {
		if _, err := tryPlan(r, text); !errors.Is(err, ErrInRollout) || !strings.Contains(err.Error(), `"v2"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := r.PlanDelete(KindCallPolicy, "p", false); !errors.Is(err, ErrInRollout) {
		t.Errorf("a deletion: %v", err)
	}
	docs, _ := strictyaml.Split([]byte(policyOf("z", "/db", "/old")), "t.yaml", 1)
	if _, err := r.Plan(docs, Options{Prune: true}); !errors.Is(err, ErrInRollout) {
		t.Errorf("a pruning: %v", err)
	}
	for name, p := range map[string]*Plan{"a change": before, "a creation": fresh} {
		if _, err := r.Apply(t.Context(), p); !errors.Is(err, ErrConflict) {
			t.Errorf("%s that was planned before it began: %v", name, err)
		}
		if _, err := r.StartRollout(t.Context(), p, RolloutSpec{Name: "v3", Steps: []int{10}}); !errors.Is(err, ErrConflict) {
			t.Errorf("another roll-out of it, planned before: %v", err)
		}
	}
	if p := plan(t, r, policyOf("p", "/web", "/old")); len(p.writes) != 0 {
		t.Error("what is applied already is a change")
	}
	apply(t, r, policyOf("z", "/db", "/other")) // the others go on
	for name, tt := range map[string]struct {
		text string
		spec RolloutSpec
	}{
		"is the name of a roll-out": {policyOf("z", "/db", "/x"), RolloutSpec{Name: "v2", Steps: []int{10}}},
		"must rise":                 {policyOf("z", "/db", "/x"), RolloutSpec{Name: "v4", Steps: []int{50, 50}}},
		"percent, such as":          {policyOf("z", "/db", "/x"), RolloutSpec{Name: "v4"}},
		"at most 720h":              {policyOf("z", "/db", "/x"), RolloutSpec{Name: "v4", Steps: []int{1}, Bake: 1000 * time.Hour}},
		"A-Z":                       {policyOf("z", "/db", "/x"), RolloutSpec{Name: "a/b", Steps: []int{1}}},
		"is no CallPolicy":          {"kind: PolicyDefaults\nmode: shadow\n", RolloutSpec{Name: "v4", Steps: []int{1}}},
		"nothing to roll":           {policyOf("z", "/db", "/other"), RolloutSpec{Name: "v4", Steps: []int{1}}},
	} {
		if _, err := r.StartRollout(t.Context(), plan(t, r, tt.text), tt.spec); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q: %v", name, err)
		}
	}
	for i := range MaxRollouts - 1 {
		begin(t, r, policyOf(fmt.Sprint("r", i), "/web", "/x"), RolloutSpec{Name: fmt.Sprint("r", i), Steps: []int{1}})
	}
	if _, err := r.StartRollout(t.Context(), plan(t, r, policyOf("more", "/web", "/x")), RolloutSpec{Name: "more", Steps: []int{1}}); err == nil || !strings.Contains(err.Error(), "one too many") {
		t.Errorf("one too many: %v", err)
	}
	if _, err := r.AbortRollout(t.Context(), "v2", "because"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.AbortRollout(t.Context(), "v2", ""); !errors.Is(err, ErrRolloutOver) {
		t.Errorf("aborted twice: %v", err)
	}
	if _, err := r.PromoteRollout(t.Context(), "v2", true); !errors.Is(err, ErrRolloutOver) {
		t.Errorf("promoted after its end: %v", err)
	}
	if _, err := r.PromoteRollout(t.Context(), "none", true); !errors.Is(err, ErrNotFound) {
		t.Errorf("there is none: %v", err)
	}
	if o, _ := r.Rollout("v2"); o.State != RolloutAborted || o.Reason != "because" {
		t.Errorf("%+v", o)
	}
	apply(t, r, policyOf("p", "/web", "/after"))
}

// An agent must not learn of services that it does not have, be it by the new version or by the former.
func TestARolloutTellsAnAgentOnlyOfItsOwn(t *testing.T) {
	c := newClock()
	r := replica(t, newStore(t), c.now)
	first, _ := twoSides(t, r, "v2", 10)
	apply(t, r, identity+policyOf("gone", "/web, /elsewhere", "/old")+policyOf("come", "/elsewhere", "/secret")+policyOf("not", "/elsewhere", "/secret"))
	begin(t, r, policyOf("gone", "/other", "/secret")+policyOf("come", "/web, /elsewhere", "/new")+policyOf("not", "/elsewhere", "/secret2"), RolloutSpec{Name: "v2", Steps: []int{10}})
	h := holds(t, r, first)
	if len(h) != 2 || from(h["gone"]) != "instead of /old by v2" || from(h["come"]) != "/new instead of nothing by v2" {
		t.Errorf("%v", h)
	}
	for _, p := range h {
		if text := p.String(); strings.Contains(text, "elsewhere") || strings.Contains(text, "secret") || strings.Contains(text, "other") {
			t.Errorf("it is told %s", text)
		}
	}
}

func TestTheClockIsSetBackInARollout(t *testing.T) {
	c := newClock()
	r := replica(t, newStore(t), c.now)
	apply(t, r, policyOf("p", "/web", "/old"))
	begin(t, r, policyOf("p", "/web", "/new"), RolloutSpec{Name: "v2", Steps: []int{10}, Bake: time.Minute})
	c.move(-24 * time.Hour)
	for _, m := range r.RolloutMoves() {
		if _, err := r.MakeMove(t.Context(), m); err != nil || m.Event() != "" {
			t.Fatal(m.Event(), err)
		}
	}
	c.move(time.Minute)
	if m := r.RolloutMoves(); len(m) != 1 || m[0].Event() != "rollout.step" {
		t.Errorf("a minute later: %v", m)
	}
}

func TestSharesRiseAndStay(t *testing.T) {
	const agents = 4000
	var before []int
	for _, percent := range []int{1, 10, 50, 100} {
		o := &Rollout{Name: "n", Steps: []int{percent}, State: RolloutRunning}
		var in []int
		for i := range agents {
			id, _ := AgentID(td, "join_token", fmt.Sprint("n", i))
			if o.Includes(id) {
				in = append(in, i)
			}
		}
		// Six standard deviations of a fair draw.
		p := float64(percent) / 100
		if d := float64(len(in)) - p*agents; d*d > 36*p*(1-p)*agents+1 {
			t.Errorf("%d%%: %d of %d agents", percent, len(in), agents)
		}
		for _, i := range before {
			if !slices.Contains(in, i) {
				t.Fatalf("%d%%: agent %d was in, and is not any more", percent, i)
			}
		}
		before = in
	}
	if o := (&Rollout{Name: "n", Steps: []int{100}, State: RolloutAborted}); o.Includes(spiffeid.RequireFromPath(td, "/spire/agent/x")) {
		t.Error("a roll-out that is over includes agents")
	}
}

func TestOldRolloutsAreForgotten(t *testing.T) {
	c := newClock()
	r := replica(t, newStore(t), c.now)
	for i := range keptRollouts + 5 {
		name := fmt.Sprint("o", i)
		begin(t, r, policyOf("p", "/web", "/x"), RolloutSpec{Name: name, Steps: []int{1}})
		if _, err := r.AbortRollout(t.Context(), name, ""); err != nil {
			t.Fatal(err)
		}
		c.move(time.Second)
	}
	all := r.Rollouts()
	if len(all) > keptRollouts+1 || all[0].Name != fmt.Sprint("o", keptRollouts+4) {
		t.Errorf("%d are kept, the last ended is %s", len(all), all[0].Name)
	}
}
