package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

func open(t testing.TB) *Registry {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r, err := Open(t.Context(), Config{TrustDomain: td, Store: s})
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

func sel(s string) spiffe.Selector {
	out, err := spiffe.ParseSelector(s)
	if err != nil {
		return spiffe.Selector{}
	}
	return out
}

// holding is what an agent has after applying Deltas, as caclient does it.
type holding struct {
	rev      store.Revision
	entries  map[EntryID]store.Revision
	policies map[string]string
	bundles  map[spiffeid.TrustDomain]store.Revision
}

func (h *holding) apply(t *testing.T, d *Delta) {
	t.Helper()
	if d.Snapshot {
		*h = holding{entries: map[EntryID]store.Revision{}, policies: map[string]string{}, bundles: map[spiffeid.TrustDomain]store.Revision{}}
	} else if d.From != h.rev {
		t.Fatalf("a difference from %d to an agent at %d", d.From, h.rev)
	}
	for _, e := range d.Entries {
		h.entries[e.ID] = e.Revision
	}
	for _, id := range d.RemovedEntries {
		delete(h.entries, id)
	}
	for _, p := range d.Policies {
		h.policies[p.Name] = fmt.Sprint(p.Revision, p.Services)
	}
	for _, n := range d.RemovedPolicies {
		delete(h.policies, n)
	}
	for _, b := range d.Bundles {
		h.bundles[b.TrustDomain] = b.Revision
	}
	for _, td := range d.RemovedBundles {
		delete(h.bundles, td)
	}
	h.rev = d.To
}

func (h *holding) clone() *holding {
	return &holding{h.rev, maps.Clone(h.entries), maps.Clone(h.policies), maps.Clone(h.bundles)}
}

// want works out slowly and plainly what concerns an agent.
func want(r *Registry, agent spiffeid.ID) *holding {
	ix := r.ix
	w := &holding{entries: map[EntryID]store.Revision{}, policies: map[string]string{}, bundles: map[spiffeid.TrustDomain]store.Revision{}}
	n := ix.nodes[agent]
	if n == nil || n.Banned {
		return w
	}
	has := func(ss []spiffe.Selector) bool {
		for _, s := range ss {
			if !slices.Contains(n.Selectors, s) {
				return false
			}
		}
		return true
	}
	reach := map[spiffeid.ID]bool{agent: true}
	for grew := true; grew; {
		before := len(reach)
		for _, e := range ix.entries {
			switch {
			case e.alias() && has(e.Selectors), e.OnNodes && has(e.On):
				if e.alias() {
					reach[e.SPIFFEID] = true
				} else {
					reach[e.ParentID] = true
				}
			}
			if !e.alias() && reach[e.ParentID] {
				reach[e.SPIFFEID] = true
			}
		}
		grew = len(reach) > before
	}
	ids := map[spiffeid.ID]bool{}
	for id, e := range ix.entries {
		if !e.alias() && reach[e.ParentID] {
			w.entries[id] = e.Revision
			ids[e.SPIFFEID] = true
			for _, f := range e.FederatesWith {
				if b := ix.bundles[f]; b != nil {
					w.bundles[f] = b.Revision
				}
			}
		}
	}
	for name, p := range ix.policies {
		var services []string
		for _, s := range p.Compiled.Services {
			for id := range ids {
				if policy.ServiceMatches(s, id) {
					services = append(services, s)
					break
				}
			}
		}
		if services != nil {
			w.policies[name] = fmt.Sprint(p.Revision, services)
		}
	}
	return w
}

// TestFollowersHoldWhatConcernsThem makes random changes and compares what followed agents hold, through differences,
// reconnects from old revisions and snapshots, with a plain definition of scope.
func TestFollowersHoldWhatConcernsThem(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { follows(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func follows(t *testing.T, rnd *rand.Rand) {
	r := open(t)
	ctx := t.Context()
	pick := func(ss ...string) string { return ss[rnd.IntN(len(ss))] }
	groups := []spiffe.Selector{sel("node:group:a"), sel("node:group:b"), sel("node:group:c")}
	some := func() (out []spiffe.Selector) {
		for _, g := range groups {
			if rnd.IntN(3) == 0 {
				out = append(out, g)
			}
		}
		return out
	}
	var agents []spiffeid.ID
	for i := range 3 {
		id, _ := AgentID(td, "join_token", fmt.Sprint("n", i))
		agents = append(agents, id)
		if err := r.PutNode(ctx, &Node{ID: id, Attestation: "join_token", Serial: "1", Active: true, Selectors: some()}, nil); err != nil {
			t.Fatal(err)
		}
	}
	fed := spiffeid.RequireTrustDomainFromString("partner.example")
	held := make([]*holding, len(agents))
	old := make([][]*holding, len(agents))
	f := make([]*Follower, len(agents))
	for i, a := range agents {
		held[i] = &holding{}
		f[i] = r.Follow(a, 0, false)
		defer func() { f[i].Close() }()
	}
	paths := []string{"/a", "/b", "/c", "/d/x", "/d/y"}
	for step := range 300 {
		var err error
		switch op := rnd.IntN(12); op {
		case 0, 1, 2, 3: // an entry below an agent, an alias, another entry, or a group of nodes
			e := &Entry{SPIFFEID: spiffeid.RequireFromPath(td, pick(paths...)), Selectors: []spiffe.Selector{sel("unix:uid:" + pick("1", "2", "3", "4"))}}
			switch rnd.IntN(4) {
			case 0:
				e.ParentID = agents[rnd.IntN(len(agents))]
			case 1:
				e.ParentID = spiffeid.RequireFromPath(td, pick(paths...))
			case 2:
				e.ParentID, e.Selectors = ServerID(td), some()
			case 3:
				e.OnNodes, e.On = true, some()
			}
			if rnd.IntN(4) == 0 {
				e.FederatesWith = []spiffeid.TrustDomain{fed}
			}
			err = r.CreateEntries(ctx, []*Entry{e})[0].Err
		case 4, 5, 6:
			if page, _ := r.ListEntries(EntryFilter{}, "", 1000); len(page) > 0 {
				_, _, err = r.DeleteEntry(ctx, page[rnd.IntN(len(page))].ID)
			}
		case 7:
			if page, _ := r.ListEntries(EntryFilter{}, "", 1000); len(page) > 0 {
				_, err = r.UpdateEntry(ctx, page[rnd.IntN(len(page))].ID, func(e *Entry) error {
					e.SPIFFEID, e.Hint = spiffeid.RequireFromPath(td, pick(paths...)), fmt.Sprint(step)
					return nil
				})
			}
		case 8:
			var n *Node
			if n, err = r.NodeNow(ctx, agents[rnd.IntN(len(agents))]); err == nil {
				n.Selectors, n.Banned = some(), rnd.IntN(8) == 0
				err = r.PutNode(ctx, n, nil)
			}
		case 9:
			doc := fmt.Sprintf("kind: CallPolicy\nname: %s\nservice: [%s, %s]\nallow: [{from: [/x%d]}]\n", pick("p", "q"), pick("/a", "/b"), pick("/c", "/d/*"), step)
			docs, derr := strictyaml.Split([]byte(doc), "t", 1)
			if derr != nil {
				t.Fatal(derr)
			}
			var p *Plan
			if p, err = r.Plan(docs, Options{}); err == nil {
				_, err = r.Apply(ctx, p)
			}
		case 10:
			if p, perr := r.PlanDelete(KindCallPolicy, pick("p", "q"), false); perr == nil {
				_, err = r.Apply(ctx, p)
			}
		case 11:
			if rnd.IntN(2) == 0 {
				_, err = r.SetBundle(ctx, fed, []byte(fmt.Sprintf(`{"keys":[],"spiffe_sequence":%d}`, step+1)))
			} else {
				_, err = r.commit(ctx, nil, []store.Write{{Key: bundlePrefix + fed.Name(), Delete: true}}) // as the end of a relationship does
			}
		}
		_, exists := errors.AsType[*ExistsError](err)
		_, invalid := errors.AsType[*ValidationError](err)
		if err != nil && !exists && !invalid && !errors.Is(err, ErrNotFound) {
			t.Fatalf("step %d: %v", step, err)
		}
		for i, a := range agents {
			if rnd.IntN(3) == 0 {
				continue // this one lags behind and gets several changes at once
			}
			if rnd.IntN(15) == 0 { // reconnects, perhaps from something older that it had acknowledged
				f[i].Close()
				if n := len(old[i]); n > 0 && rnd.IntN(2) == 0 {
					held[i] = old[i][rnd.IntN(n)].clone()
				}
				f[i] = r.Follow(a, held[i].rev, true)
			}
			if d := f[i].Next(rnd.IntN(5) == 0); d != nil {
				held[i].apply(t, d)
				if old[i] = append(old[i], held[i].clone()); len(old[i]) > 5 {
					old[i] = old[i][1:]
				}
			}
			w := want(r, a)
			if !maps.Equal(w.entries, held[i].entries) || !maps.Equal(w.policies, held[i].policies) || !maps.Equal(w.bundles, held[i].bundles) {
				t.Fatalf("step %d: agent %d holds\n %v\n %v\n %v\nwant\n %v\n %v\n %v", step, i, held[i].entries, held[i].policies, held[i].bundles, w.entries, w.policies, w.bundles)
			}
			for id := range r.ix.entries {
				_, in := w.entries[id]
				if _, err := r.AuthorizedEntry(a, id); in != (err == nil) {
					t.Fatalf("step %d: agent %d, entry %s: in scope %t, AuthorizedEntry %v", step, i, id, in, err)
				}
			}
		}
	}
}

// FuzzParseJoinToken: what parses prints back as read, and no error repeats it.
func FuzzParseJoinToken(f *testing.F) {
	f.Add(NewJoinToken("").Reveal())
	f.Add(NewJoinToken("00ff").Reveal())
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseJoinToken(s)
		if err != nil {
			return
		}
		want := s
		if tok.Pin() == "" {
			want += "."
		}
		if got := tok.Reveal(); got != want {
			t.Errorf("ParseJoinToken(%q).Reveal() = %q", s, got)
		}
		if p := fmt.Sprintf("%v %+v %#v %s", tok, tok, tok, tok); p != "[join token] [join token] [join token] [join token]" {
			t.Errorf("prints as %q", p)
		}
	})
}
