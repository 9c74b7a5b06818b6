package pods

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store/bolt"
)

// A site is one replica of several, each with its own view of the cluster.
type site struct {
	t *testing.T
	r *registry.Registry
	x *Expander
}

// sites makes n replicas on one store, with one agent on node-a of the cluster prod.
func sites(t *testing.T, n int) (out []*site, agent spiffeid.ID) {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for range n {
		r := replica(t, s)
		x := New(Config{Registry: r})
		x.Synced("prod", false)
		x.SetRules(OriginIdentities, []Rule{&rule{name: "Identity all", path: nsSA, revision: 1}})
		out = append(out, &site{t, r, x})
	}
	agent = node(t, out[0].r, "prod", "node-a")
	for _, x := range out {
		if _, err := x.r.Barrier(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return out, agent
}

// sees tells a replica what the watch brings of the pods, up to a version.
func (s *site) sees(version uint64, changed []*Pod, gone ...string) {
	s.r.Telling("prod", registry.Position{"pods": version})
	s.x.Update("prod", changed, gone)
	s.r.Followed("prod", registry.Position{"pods": version})
}

// A told is what an agent holds: it applies differences and snapshots as agents do, and goes from replica to replica with what it
// was told.
type told struct {
	t     *testing.T
	agent spiffeid.ID
	f     *registry.Follower
	claim registry.Claim
	held  map[registry.EntryID]*registry.Entry
	lost  []registry.EntryID
	came  []registry.EntryID
}

func (a *told) to(s *site) {
	if a.f != nil {
		a.f.Close()
	}
	a.f = s.r.FollowOn(a.agent, 0, false, a.claim)
	a.read()
}

// read applies what there is to apply, and returns the last of it.
func (a *told) read() (last *registry.Delta) {
	for d := a.f.Next(false); d != nil; d = a.f.Next(false) {
		last = d
		now := maps.Clone(a.held)
		if d.Snapshot {
			maps.DeleteFunc(now, func(registry.EntryID, *registry.Entry) bool { return len(d.UnknownPrefixes) == 0 })
		}
		for _, id := range d.RemovedEntries {
			delete(now, id)
		}
		if now == nil {
			now = map[registry.EntryID]*registry.Entry{}
		}
		for _, e := range d.Entries {
			now[e.ID] = e
		}
		for id := range a.held {
			if now[id] == nil {
				a.lost = append(a.lost, id)
			}
		}
		for id, e := range now {
			if was := a.held[id]; was == nil || was.Revision != e.Revision {
				a.came = append(a.came, id)
			}
		}
		a.held = now
		if d.Position != nil {
			a.claim = *d.Position
		}
	}
	return last
}

func (a *told) has(what string, want ...string) {
	a.t.Helper()
	var got []string
	for _, e := range a.held {
		got = append(got, e.Pod.UID)
	}
	slices.Sort(got)
	expect(a.t, what, got, want...)
}

// TestAReplicaThatLags: an agent that changes to a replica which has not seen as much of the cluster loses nothing of what it was told,
// gets nothing back that it was told is gone, and gets all when that replica has come as far.
func TestAReplicaThatLags(t *testing.T) {
	s, agent := sites(t, 2)
	ahead, behind := s[0], s[1]
	first := []*Pod{pod("1", "node-a", "shop", "web"), pod("2", "node-a", "shop", "db")}
	for _, x := range s {
		x.sees(100, first)
		x.x.Synced("prod", true)
	}
	a := &told{t: t, agent: agent}
	a.to(ahead)
	a.has("at first", "1", "2")
	ahead.sees(110, []*Pod{pod("3", "node-a", "shop", "new")})
	ahead.sees(120, nil, "2")
	a.read()
	a.has("as the one that is ahead says", "1", "3")
	a.lost, a.came = nil, nil

	a.to(behind)
	a.has("at the one that lags", "1", "3")
	if len(a.lost)+len(a.came) > 0 {
		t.Errorf("it lost %q and got %q at the replica that lags", a.lost, a.came)
	}
	id := func(x *site, uid string) registry.EntryID { return x.x.Entries("prod", uid)[0].ID }
	if err := behind.r.Missing(agent, id(ahead, "3")); !errors.Is(err, registry.ErrNotReady) {
		t.Errorf("what only the other replica knows: %v, want that it is not ready", err)
	}
	if err := behind.r.Missing(agent, "x"); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("what is no pod's: %v", err)
	}
	other := node(t, behind.r, "prod", "node-b")
	if err := behind.r.Missing(other, id(ahead, "3")); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("another node, which was told nothing: %v", err)
	}
	behind.sees(110, []*Pod{pod("3", "node-a", "shop", "new")})
	if d := a.read(); d != nil {
		t.Errorf("before it has come as far it says %+v", d)
	}
	behind.sees(121, []*Pod{pod("4", "node-a", "shop", "next")}, "2")
	d := a.read()
	if d == nil || !d.Snapshot || len(d.UnknownPrefixes) > 0 || d.Position == nil || d.Position.Position["pods"] != 121 {
		t.Errorf("when it has come as far: %+v", d)
	}
	a.has("then", "1", "3", "4")
	if !slices.Equal(a.came, []registry.EntryID{id(behind, "4")}) || len(a.lost) > 0 {
		t.Errorf("lost %q, new %q, want the next pod alone", a.lost, a.came)
	}
	behind.sees(130, nil, "1")
	a.read()
	a.has("and goes on", "3", "4")
	a.f.Close()
}

// TestAClaimGivesNothing: an agent that says it was told more than there is gets what is its own, no more, as soon as somebody has looked;
// and until then nothing that it should not have.
func TestAClaimGivesNothing(t *testing.T) {
	s, agent := sites(t, 1)
	x := s[0]
	x.sees(100, []*Pod{pod("1", "node-a", "shop", "web"), pod("2", "node-b", "shop", "db")})
	x.x.Synced("prod", true)
	for name, claim := range map[string]registry.Claim{
		"from the future":      {Cluster: "prod", Position: registry.Position{"pods": 1 << 63}},
		"of unknown things":    {Cluster: "prod", Position: registry.Position{"zebras": 1 << 63}},
		"of another cluster":   {Cluster: "test", Position: registry.Position{"pods": 1 << 63}},
		"of no cluster at all": {Position: registry.Position{"pods": 1 << 63}},
	} {
		f := x.r.FollowOn(agent, 0, false, claim)
		d := f.Next(false)
		if name == "from the future" {
			if len(d.Entries) != 0 || len(d.UnknownPrefixes) != 1 || d.Position != nil {
				t.Errorf("%s: %+v", name, d)
			}
			waiting := x.r.Waiting("prod")
			if n := x.r.Refute("prod", waiting, registry.Position{"pods": 1<<63 + 5}); n != 0 || f.Next(false) != nil {
				t.Errorf("a claim that may be true was refuted")
			}
			if n := x.r.Refute("prod", nil, registry.Position{"pods": 100}); n != 0 {
				t.Errorf("a claim that came after somebody looked was refuted")
			}
			if n := x.r.Refute("prod", waiting, registry.Position{"pods": 100}); n != 1 {
				t.Errorf("%d claims refuted", n)
			}
			d = f.Next(false)
		}
		if d == nil || !d.Snapshot || len(d.Entries) != 1 || d.Entries[0].Pod.UID != "1" || len(d.UnknownPrefixes) > 0 {
			t.Errorf("%s: %+v", name, d)
		}
		f.Close()
	}
	if n := len(x.r.Waiting("prod")); n != 0 {
		t.Errorf("%d wait after they have ended", n)
	}
}

// TestReplicasDeriveTheSame: whatever the order in which pods, their changes and the rules come to replicas, entries, IDs and revisions are
// the same in the end, and an agent that goes back and forth is told of nothing twice.
func TestReplicasDeriveTheSame(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	s, agent := sites(t, 3)
	var all []*Pod
	for i := range 60 {
		all = append(all, pod(fmt.Sprint(i), []string{"node-a", "node-b"}[i%2], []string{"shop", "bank", "zoo"}[i%3], fmt.Sprint("sa", i%7)))
	}
	more := []Rule{&rule{name: "Identity all", path: nsSA, revision: 1},
		&rule{name: "Identity second", path: func(p *Pod) (string, error) { return "/second/" + p.UID, nil }, revision: 7}}
	for _, x := range s {
		order := rnd.Perm(len(all))
		early := rnd.IntN(2) == 0
		if early {
			x.x.SetRules(OriginIdentities, more)
		}
		for i, at := range order {
			x.sees(uint64(100+i), []*Pod{all[at]})
		}
		var gone []string
		for i := 0; i < len(all); i += 5 {
			gone = append(gone, all[i].UID)
		}
		rnd.Shuffle(len(gone), func(i, j int) { gone[i], gone[j] = gone[j], gone[i] })
		x.sees(200, nil, gone...)
		if !early {
			x.x.SetRules(OriginIdentities, more)
		}
		x.x.Synced("prod", true)
	}
	what := func(x *site) (out []string) {
		for _, e := range x.r.PodEntries(func(*registry.Entry) bool { return true }) {
			out = append(out, fmt.Sprint(e.ID, " ", e.Revision, " ", e.SPIFFEID, " ", e.ParentID, " ", e.Selectors, " ", e.CreatedAt.Unix()))
		}
		slices.Sort(out)
		return out
	}
	for i, x := range s[1:] {
		if a, b := what(s[0]), what(x); !slices.Equal(a, b) || len(a) != 2*48 {
			t.Errorf("replica %d has %d entries, the first %d, and they are not the same", i+1, len(b), len(a))
		}
	}
	a := &told{t: t, agent: agent}
	a.to(s[0])
	a.came = nil
	for range 20 {
		a.to(s[rnd.IntN(len(s))])
	}
	if len(a.lost)+len(a.came) > 0 {
		t.Errorf("going from one to the other it lost %q and got %q", a.lost, a.came)
	}
	a.f.Close()
}
