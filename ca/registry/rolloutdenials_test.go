package registry

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// another attests one more agent that a roll-out of this name includes at once.
func another(t testing.TB, r *Registry, name string, percent int, not spiffeid.ID) spiffeid.ID {
	t.Helper()
	o := &Rollout{Name: name, Steps: []int{percent}, State: RolloutRunning}
	for i := range 1000 {
		id, err := AgentID(td, "join_token", fmt.Sprint("another", i))
		if err != nil {
			t.Fatal(err)
		}
		if id != not && o.Includes(id) {
			if err := r.PutNode(t.Context(), &Node{ID: id, Attestation: "join_token", Serial: "1", Active: true}, nil); err != nil {
				t.Fatal(err)
			}
			return id
		}
	}
	t.Fatal("no such agent")
	return spiffeid.ID{}
}

// makeMoves does what is to be done, and returns the events.
func makeMoves(t testing.TB, r *Registry) (events []string) {
	t.Helper()
	for _, m := range r.RolloutMoves() {
		if _, err := r.MakeMove(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		events = append(events, m.Event())
	}
	return events
}

// A stolen agent reports denials that never were, to have back what a roll-out takes from its thief.
func TestOneAgentDoesNotRollBackForOthers(t *testing.T) {
	for _, tolerated := range []int64{0, 5} {
		t.Run(fmt.Sprint(tolerated), func(t *testing.T) {
			c, s := newClock(), newStore(t)
			r := replica(t, s, c.now)
			stolen, _ := twoSides(t, r, "v2", 50)
			other := another(t, r, "v2", 50, stolen)
			apply(t, r, identity+policyOf("p", "/web", "/old"))
			begin(t, r, policyOf("p", "/web", "/new"), RolloutSpec{Name: "v2", Steps: []int{50}, MaxDenials: tolerated, Bake: time.Minute})
			if tolerated > 0 { // what others report within what is tolerated does not help it
				r.NoteFormerlyAllowed(other, "v2", uint64(tolerated))
			}
			for range 10 {
				r.NoteFormerlyAllowed(stolen, "v2", 1<<62)
			}
			if got := makeMoves(t, r); len(got) != 1 || got[0] != "rollout.hold" {
				t.Fatalf("one agent alone: %q", got)
			}
			o, err := r.Rollout("v2")
			if err != nil || o.State != RolloutRunning || !o.Held || o.Returned != stolen || !strings.Contains(o.Reason, stolen.String()) {
				t.Fatalf("%+v, %v", o, err)
			}
			if got := from(holds(t, r, stolen)["p"]); got != "/old" {
				t.Errorf("the agent that reports has %s", got)
			}
			if got := from(holds(t, r, other)["p"]); !strings.HasPrefix(got, "/new ") {
				t.Errorf("the other has %s", got)
			}
			r.NoteFormerlyAllowed(stolen, "v2", 1<<62) // it has the former versions now
			c.move(time.Hour)
			again := replica(t, s, c.now) // after a restart
			if got := makeMoves(t, again); len(got) != 0 {
				t.Errorf("a roll-out that is held: %q", got)
			}
			if _, err := again.PromoteRollout(t.Context(), "v2", false); err != nil {
				t.Fatal(err)
			}
			if o, err := again.Rollout("v2"); err != nil || o.Held || o.Reason != "" || o.Percent() != 100 || o.Includes(stolen) {
				t.Errorf("promoted: %+v, %v", o, err)
			}
			again.NoteFormerlyAllowed(other, "v2", 6) // now there are too many without the first agent's
			if got := makeMoves(t, again); len(got) != 1 || got[0] != "rollout.rollback" {
				t.Errorf("two agents: %q", got)
			}
		})
	}
}

// More agents than are kept apart: the one that floods is among them, whenever it comes.
func TestAFloodIsNotHiddenAmongManyReports(t *testing.T) {
	o := &Rollout{MaxDenials: 1000}
	id := func(i int) spiffeid.ID {
		id, err := AgentID(td, "join_token", fmt.Sprint("n", i))
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	for i := range 200 {
		o.count(map[spiffeid.ID]int64{id(i): 2})
	}
	for range 5000 {
		o.count(map[spiffeid.ID]int64{id(1000): 1})
	}
	if o.Denials != 5400 || len(o.Reports) != maxReporters || o.most().Agent != id(1000) || o.withoutOne() > 400 {
		t.Errorf("%d denials, %d agents, most %v, without it %d", o.Denials, len(o.Reports), o.most(), o.withoutOne())
	}
}

// Where a service is on one node only, nobody else can report, and nobody else is concerned.
func TestTheOnlyAgentOfAServiceRollsBack(t *testing.T) {
	c := newClock()
	r := replica(t, newStore(t), c.now)
	first, last := twoSides(t, r, "v2", 50)
	n, err := r.NodeNow(t.Context(), last)
	if err != nil {
		t.Fatal(err)
	}
	n.Banned = true
	if err := r.PutNode(t.Context(), n, nil); err != nil {
		t.Fatal(err)
	}
	apply(t, r, identity+policyOf("p", "/web", "/old"))
	begin(t, r, policyOf("p", "/web", "/new"), RolloutSpec{Name: "v2", Steps: []int{50}})
	r.NoteFormerlyAllowed(first, "v2", 1)
	if got := makeMoves(t, r); len(got) != 1 || got[0] != "rollout.rollback" {
		t.Errorf("%q", got)
	}
}
