package pods

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

func newRegistry(t testing.TB) *registry.Registry {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return replica(t, s)
}

func replica(t testing.TB, s store.Store) *registry.Registry {
	t.Helper()
	r, err := registry.Open(t.Context(), registry.Config{TrustDomain: td, Store: s})
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

// rule gives every pod whose namespace it is for the ID that path makes of it.
type rule struct {
	name, ns string
	created  time.Time
	revision store.Revision
	path     func(*Pod) (string, error)
}

func (r *rule) Name() string       { return r.name }
func (r *rule) Created() time.Time { return r.created }

func (r *rule) Expand(p *Pod) ([]*registry.Entry, error) {
	if r.ns != "" && p.Namespace != r.ns {
		return nil, nil
	}
	path, err := r.path(p)
	if err != nil {
		return nil, err
	}
	id, err := spiffeid.FromPath(td, path)
	if err != nil {
		return nil, err
	}
	return []*registry.Entry{{SPIFFEID: id, Revision: r.revision}}, nil
}

func nsSA(p *Pod) (string, error) { return "/ns/" + p.Namespace + "/sa/" + p.ServiceAccount, nil }

func pod(uid, node, ns, sa string) *Pod {
	return &Pod{Cluster: "prod", UID: uid, NodeUID: node, NodeName: "name-of-" + node, Namespace: ns, ServiceAccount: sa, Name: "pod-" + uid, Created: time.Unix(1000, 0)}
}

// node attests a node of a cluster as k8s_psat does.
func node(t testing.TB, r *registry.Registry, cluster, uid string, more ...string) spiffeid.ID {
	t.Helper()
	id := spiffeid.RequireFromPath(td, "/spire/agent/k8s_psat/"+cluster+"/"+uid)
	n := &registry.Node{ID: id, Attestation: "k8s_psat", ExpiresAt: time.Now().Add(time.Hour)}
	for _, s := range append([]string{"k8s_psat:cluster:" + cluster, "k8s_psat:agent_node_uid:" + uid}, more...) {
		parsed, err := spiffe.ParseSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		n.Selectors = append(n.Selectors, parsed)
	}
	if err := r.PutNode(t.Context(), n, nil); err != nil {
		t.Fatal(err)
	}
	return id
}

// of returns what an agent may serve: "path for pod UID", sorted.
func of(r *registry.Registry, agent spiffeid.ID) []string {
	entries, _ := r.Scope(agent)
	var out []string
	for _, e := range entries {
		s := e.SPIFFEID.Path()
		if e.Pod != nil {
			s += " for " + e.Pod.UID
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

func expect(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func TestANodeHoldsItsOwnPodsOnly(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	x.SetRules(OriginIdentities, []Rule{&rule{name: "Identity all", path: nsSA, revision: 1}})
	a, b := node(t, r, "prod", "node-a"), node(t, r, "prod", "node-b")
	other := node(t, r, "test", "node-a") // the same UID in another cluster
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web"), pod("2", "node-b", "shop", "db"), pod("3", "", "shop", "pending")}, nil)
	expect(t, "node a", of(r, a), "/ns/shop/sa/web for 1")
	expect(t, "node b", of(r, b), "/ns/shop/sa/db for 2")
	expect(t, "the node of another cluster", of(r, other))

	mirror, ended := pod("4", "node-a", "kube-system", "x"), pod("1", "node-a", "shop", "web")
	mirror.Mirror, ended.Ended = true, true
	x.Update("prod", []*Pod{mirror, ended, pod("3", "node-b", "shop", "pending")}, nil)
	expect(t, "node a after its pod ended", of(r, a))
	expect(t, "node b after a pod was scheduled", of(r, b), "/ns/shop/sa/db for 2", "/ns/shop/sa/pending for 3")

	x.Update("prod", []*Pod{pod("2", "node-a", "shop", "db")}, []string{"3"})
	expect(t, "node a, whose pod it is now", of(r, a), "/ns/shop/sa/db for 2")
	expect(t, "node b, which lost it, and a pod that was deleted", of(r, b))

	// Created anew under the same name: another pod.
	x.Update("prod", []*Pod{pod("5", "node-b", "shop", "db")}, []string{"2"})
	expect(t, "node a", of(r, a))
	expect(t, "node b", of(r, b), "/ns/shop/sa/db for 5")
}

// TestNothingButAttestationLeadsToPods: a stolen node cannot come by another's pods, whatever selectors and entries there are.
func TestNothingButAttestationLeadsToPods(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	x.SetRules(OriginIdentities, []Rule{&rule{name: "Identity all", path: nsSA, revision: 1}})
	a := node(t, r, "prod", "node-a")
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	victim, _ := r.Scope(a)
	if len(victim) != 1 {
		t.Fatalf("%d entries", len(victim))
	}
	thieves := map[string]spiffeid.ID{
		"by a label":                  node(t, r, "prod", "node-b", "k8s_psat:agent_node_label:x:agent_node_uid:node-a"),
		"by a second answer":          node(t, r, "prod", "node-c", "k8s_psat:agent_node_uid:node-a"),
		"by a second cluster":         node(t, r, "test", "node-a", "k8s_psat:cluster:prod"),
		"by the node's name as a UID": node(t, r, "prod", "name-of-node-a"),
	}
	token := spiffeid.RequireFromPath(td, "/spire/agent/join_token/x")
	n := &registry.Node{ID: token, Attestation: "join_token", ExpiresAt: time.Now().Add(time.Hour)}
	for _, s := range []string{"k8s_psat:cluster:prod", "k8s_psat:agent_node_uid:node-a"} {
		parsed, _ := spiffe.ParseSelector(s)
		n.Selectors = append(n.Selectors, parsed)
	}
	if err := r.PutNode(t.Context(), n, nil); err != nil {
		t.Fatal(err)
	}
	thieves["by another attestor"] = token
	for how, thief := range thieves {
		if got, _ := r.Scope(thief); len(got) != 0 {
			t.Errorf("%s: a node has %v", how, of(r, thief))
		}
		if _, err := r.AuthorizedEntry(thief, victim[0].ID); !errors.Is(err, registry.ErrNotFound) {
			t.Errorf("%s: an entry of another node's pod: %v", how, err)
		}
	}
	unix, _ := spiffe.ParseSelector("unix:uid:0")
	for what, e := range map[string]*registry.Entry{
		"a parent among pods": {SPIFFEID: spiffeid.RequireFromPath(td, "/evil"), ParentID: victim[0].ParentID, Selectors: []spiffe.Selector{unix}},
		"an ID of pods":       {ID: victim[0].ID, SPIFFEID: spiffeid.RequireFromPath(td, "/evil"), ParentID: token, Selectors: []spiffe.Selector{unix}},
	} {
		if res := r.CreateEntries(t.Context(), []*registry.Entry{e}); res[0].Err == nil {
			t.Errorf("%s was registered", what)
		}
	}
	// Nothing descends from a pod: who names a pod's ID as parent gives its node nothing.
	res := r.CreateEntries(t.Context(), []*registry.Entry{{SPIFFEID: spiffeid.RequireFromPath(td, "/below"), ParentID: victim[0].SPIFFEID, Selectors: []spiffe.Selector{unix}}})
	if res[0].Err != nil {
		t.Fatal(res[0].Err)
	}
	expect(t, "the node of the parent", of(r, a), "/ns/shop/sa/web for 1")
}

// TestARegisteredIDIsNoPods: an ID that an operator registered is never a pod's by its labels, whichever came first.
func TestARegisteredIDIsNoPods(t *testing.T) {
	r := newRegistry(t)
	apply(t, r, "kind: Identity\nname: by-label\nspiffeID: /app/{{ .k8s.label[\"app\"] }}\n")
	refused := make(chan Refusal, 10)
	x := New(Config{Registry: r, Refused: func(r Refusal) { refused <- r }})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	agent := node(t, r, "prod", "node-a")
	p := pod("1", "node-a", "shop", "web")
	p.Labels = map[string]string{"app": "payments"}
	x.Update("prod", []*Pod{p}, nil)
	f := r.Follow(agent, 0, false)
	defer f.Close()
	held := map[registry.EntryID]string{}
	look := func() []string {
		for d := f.Next(false); d != nil; d = f.Next(false) {
			for _, e := range d.Entries {
				held[e.ID] = e.SPIFFEID.Path()
			}
			for _, id := range d.RemovedEntries {
				delete(held, id)
			}
		}
		return slices.Sorted(maps.Values(held))
	}
	expect(t, "before", look(), "/app/payments")

	unix, _ := spiffe.ParseSelector("unix:uid:0")
	res := r.CreateEntries(t.Context(), []*registry.Entry{{ID: "payments", SPIFFEID: spiffeid.RequireFromPath(td, "/app/payments"), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/x/y"), Selectors: []spiffe.Selector{unix}}})
	if res[0].Err != nil {
		t.Fatal(res[0].Err)
	}
	expect(t, "once the ID is registered", look())
	expect(t, "and for agents that poll", of(r, agent))
	if got := <-refused; got.Pod.UID != "1" || got.Rule != "Identity by-label" || !strings.Contains(got.Reason, "payments") {
		t.Errorf("refusal %+v", got)
	}
	if _, _, err := r.DeleteEntry(t.Context(), "payments"); err != nil {
		t.Fatal(err)
	}
	expect(t, "once it is not any more", look(), "/app/payments")
	if len(refused) > 0 {
		t.Errorf("refused once more: %+v", <-refused)
	}
}

// TestNoPodIsAnAdmin: rules that go beside registered entries, as those of spire-controller-manager do, give no pod the ID of an
// admin or of a CA below, whatever its labels say: what such an entry gives, the ID has.
func TestNoPodIsAnAdmin(t *testing.T) {
	r := newRegistry(t)
	agent := node(t, r, "prod", "node-a")
	unix, _ := spiffe.ParseSelector("unix:uid:0")
	for id, change := range map[string]func(*registry.Entry){"plain": func(*registry.Entry) {}, "admin": func(e *registry.Entry) { e.Admin = true }, "downstream": func(e *registry.Entry) { e.Downstream = true }} {
		e := &registry.Entry{ID: registry.EntryID(id), SPIFFEID: spiffeid.RequireFromPath(td, "/ops/"+id), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/x/y"), Selectors: []spiffe.Selector{unix}}
		change(e)
		if res := r.CreateEntries(t.Context(), []*registry.Entry{e}); res[0].Err != nil {
			t.Fatal(res[0].Err)
		}
	}
	x := New(Config{Registry: r})
	x.SetRules("spire:prod", []Rule{&rule{name: "ClusterSPIFFEID ops", path: func(p *Pod) (string, error) { return "/ops/" + p.Labels["app"], nil }, revision: 1}})
	for i, app := range []string{"plain", "admin", "downstream"} {
		p := pod(fmt.Sprint(i), "node-a", "shop", "web")
		p.Labels = map[string]string{"app": app}
		x.Update("prod", []*Pod{p}, nil)
	}
	expect(t, "the node", of(r, agent), "/ops/plain for 0")
}

// TestReplicasAgreeWhateverTheOrder: the same pods and rules give the same entries in any order of arrival, and after any
// detour.
func TestReplicasAgreeWhateverTheOrder(t *testing.T) {
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	label := func(prefix string) func(*Pod) (string, error) {
		return func(p *Pod) (string, error) {
			if p.Labels["app"] == "" {
				return "", errors.New("no label app")
			}
			return prefix + p.Labels["app"], nil
		}
	}
	old, young := time.Unix(100, 0), time.Unix(200, 0)
	rules := map[string][]Rule{
		OriginIdentities: {&rule{name: "Identity b", created: old, path: label("/a/"), revision: 3}, &rule{name: "Identity a", created: young, path: label("/a/"), revision: 4, ns: "x"},
			&rule{name: "Identity c", created: old, path: nsSA, revision: 5}},
		"spire:prod": {&rule{name: "ClusterSPIFFEID one", path: nsSA, revision: 6, ns: "y"}, &rule{name: "ClusterSPIFFEID two", path: label("/spiffe/"), revision: 7}, &rule{name: "ClusterSPIFFEID three", path: label("/spiffe/"), revision: 7}},
	}
	var pods []*Pod
	for i := range 60 {
		p := pod(fmt.Sprint(i), fmt.Sprint("node-", i%5), []string{"x", "y"}[i%2], fmt.Sprint("sa", i%7))
		p.Labels = map[string]string{"app": []string{"", "p", "q", "r"}[i%4]}
		pods = append(pods, p)
	}
	snapshot := func(r *registry.Registry) map[registry.EntryID]string {
		out := map[registry.EntryID]string{}
		for _, e := range r.PodEntries(func(*registry.Entry) bool { return true }) {
			out[e.ID] = fmt.Sprint(e.SPIFFEID, e.ParentID, e.Revision, e.Selectors, e.Rule, e.CreatedAt.Unix())
		}
		return out
	}
	var first map[registry.EntryID]string
	for range 8 {
		r := replica(t, s)
		x := New(Config{Registry: r})
		type step func()
		var steps []step
		for origin, rs := range rules {
			steps = append(steps, func() { x.SetRules(origin, rs) }, func() { x.SetRules(origin, rs[:rnd.IntN(len(rs))]); x.SetRules(origin, rs) })
		}
		for _, p := range pods {
			moved := *p
			moved.NodeUID, moved.Labels = "node-9", map[string]string{"app": "z"}
			steps = append(steps, func() { x.Update("prod", []*Pod{&moved}, nil); x.Update("prod", []*Pod{p}, nil) }, func() { x.Update("prod", nil, []string{p.UID}); x.Update("prod", []*Pod{p}, nil) })
		}
		rnd.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
		for _, s := range steps {
			s()
		}
		got := snapshot(r)
		if first == nil {
			first = got
			continue
		}
		if !maps.Equal(got, first) {
			t.Fatalf("replicas disagree:\n%v\n%v", got, first)
		}
	}
	owners := map[string]string{}
	for _, e := range replicaEntries(first) {
		id, owner := e[0], e[1]
		if before := owners[id]; before != "" && before != owner {
			t.Errorf("%s is %s's and %s's", id, before, owner)
		}
		owners[id] = owner
	}
	if len(owners) < 10 {
		t.Errorf("only %d IDs", len(owners))
	}
}

// replicaEntries returns the ID and the owner of each entry of a snapshot.
func replicaEntries(snapshot map[registry.EntryID]string) (out [][2]string) {
	for _, s := range snapshot {
		id, _, _ := strings.Cut(s, " ")
		owner := "spire"
		if _, rest, ok := strings.Cut(s, "Identity "); ok {
			owner = rest[:1]
		}
		out = append(out, [2]string{id, owner})
	}
	return out
}

func TestARefusalIsReportedOnce(t *testing.T) {
	r := newRegistry(t)
	var got []string
	x := New(Config{Registry: r, Refused: func(r Refusal) { got = append(got, r.Rule+" "+r.Pod.UID+": "+r.Reason) }})
	failing := func(reason string, rev store.Revision) *rule {
		return &rule{name: "Identity a", revision: rev, path: func(*Pod) (string, error) { return "", errors.New(reason) }}
	}
	x.SetRules(OriginIdentities, []Rule{failing("no label", 1)})
	for range 3 {
		x.Update("prod", []*Pod{pod("1", "n", "x", "y")}, nil)
	}
	x.SetRules(OriginIdentities, []Rule{failing("no label", 2)})
	expect(t, "one reason", got, "Identity a 1: no label")
	got = nil
	x.SetRules(OriginIdentities, []Rule{failing("two labels", 3)})
	expect(t, "another reason", got, "Identity a 1: two labels")
	got = nil
	x.SetRules(OriginIdentities, []Rule{&rule{name: "Identity a", path: nsSA, revision: 4}})
	x.SetRules(OriginIdentities, []Rule{failing("two labels", 5)})
	expect(t, "the same after it was none", got, "Identity a 1: two labels")
	got = nil
	x.SetRules(OriginIdentities, []Rule{&rule{name: "Identity a", path: func(*Pod) (string, error) { return "/spire/server", nil }}})
	if len(got) != 1 || !strings.Contains(got[0], "reserved") {
		t.Errorf("a reserved ID: %q", got)
	}
}

// TestUnknownUntilAllIsTold: no agent drops anything before pods and rules are told, and what it asks for meanwhile is not
// refused for good.
func TestUnknownUntilAllIsTold(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	x.Expect(OriginIdentities, "spire:prod")
	x.Synced("prod", false)
	agent, other := node(t, r, "prod", "node-a"), node(t, r, "test", "node-a")
	f, g := r.Follow(agent, 0, false), r.Follow(other, 0, false)
	defer f.Close()
	defer g.Close()
	prefix := registry.PodEntryPrefix("prod")
	if d := f.Next(false); d == nil || !d.Snapshot || !slices.Equal(d.UnknownPrefixes, []string{prefix}) {
		t.Fatalf("first snapshot %+v", d)
	}
	if d := g.Next(false); d == nil || len(d.UnknownPrefixes) > 0 {
		t.Errorf("the snapshot of a cluster that is not watched: %+v", d)
	}
	missing := func(want error) {
		t.Helper()
		if err := r.Missing(agent, registry.EntryID(prefix+"x")); !errors.Is(err, want) {
			t.Errorf("missing: %v, want %v", err, want)
		}
		if err := r.Missing(agent, "x"); !errors.Is(err, registry.ErrNotFound) {
			t.Errorf("a registered entry that is missing: %v", err)
		}
		if err := r.Missing(other, registry.EntryID(prefix+"x")); !errors.Is(err, registry.ErrNotFound) {
			t.Errorf("missing for another cluster: %v", err)
		}
	}
	missing(registry.ErrNotReady)
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	x.Synced("prod", true)
	missing(registry.ErrNotReady)
	x.SetRules(OriginIdentities, []Rule{&rule{name: "Identity all", path: nsSA, revision: 1}})
	missing(registry.ErrNotReady)
	x.SetRules("spire:prod", nil)
	missing(registry.ErrNotFound)
	<-f.Wake()
	if d := f.Next(false); d == nil || !d.Snapshot || len(d.UnknownPrefixes) > 0 || len(d.Entries) != 1 {
		t.Fatalf("the snapshot once all is known: %+v", d)
	}
	x.Synced("prod", false)
	missing(registry.ErrNotReady)
	if d := f.Next(false); d != nil {
		t.Errorf("an agent that is up to date is told %+v", d)
	}
}

// TestAnAgentNeverContinuesAnOldHistory: what it was sent by another replica is not said by a revision.
func TestAnAgentNeverContinuesAnOldHistory(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	x.SetRules(OriginIdentities, []Rule{&rule{name: "Identity all", path: nsSA, revision: 1}})
	x.Synced("prod", true)
	agent := node(t, r, "prod", "node-a")
	f := r.Follow(agent, 0, false)
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	d := f.Next(true)
	f.Close()
	x.Update("prod", nil, []string{"1"})
	f = r.Follow(agent, d.To, true)
	defer f.Close()
	if d = f.Next(false); d == nil || !d.Snapshot || len(d.Entries) != 0 {
		t.Errorf("it continues with %+v", d)
	}
}

// TestOnlyTheAgentConcernedIsWoken: pods of one node are nothing to the others.
func TestOnlyTheAgentConcernedIsWoken(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	on, _ := spiffe.ParseSelector("k8s_psat:agent_node_label:zone:a")
	a, b := node(t, r, "prod", "node-a", on.String()), node(t, r, "prod", "node-b", on.String())
	for _, selectors := range [][]spiffe.Selector{nil, {on}} {
		x.SetRules(OriginIdentities, []Rule{onRule{&rule{name: "Identity all", path: nsSA, revision: 1}, selectors}})
		f, g := r.Follow(a, 0, false), r.Follow(b, 0, false)
		for _, f := range []*registry.Follower{f, g} {
			<-f.Wake()
			f.Next(false)
		}
		x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
		<-f.Wake()
		if d := f.Next(false); d == nil || d.Snapshot || len(d.Entries) != 1 || d.From != d.To {
			t.Errorf("on %v: %+v", selectors, d)
		}
		x.Update("prod", nil, []string{"1"})
		<-f.Wake()
		if d := f.Next(false); d == nil || d.Snapshot || len(d.RemovedEntries) != 1 {
			t.Errorf("on %v: %+v", selectors, d)
		}
		select {
		case <-g.Wake():
			t.Errorf("on %v: the other node's agent is woken", selectors)
		default:
		}
		f.Close()
		g.Close()
	}
}

type onRule struct {
	*rule
	on []spiffe.Selector
}

func (r onRule) Expand(p *Pod) ([]*registry.Entry, error) {
	out, err := r.rule.Expand(p)
	for _, e := range out {
		e.On = r.on
	}
	return out, err
}

func TestOnIsAboutTheNode(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	on, _ := spiffe.ParseSelector("k8s_psat:agent_node_label:zone:a")
	x.SetRules(OriginIdentities, []Rule{onRule{&rule{name: "Identity all", path: nsSA, revision: 1}, []spiffe.Selector{on}}})
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web"), pod("2", "node-b", "shop", "db")}, nil)
	expect(t, "a node with the label", of(r, node(t, r, "prod", "node-a", on.String())), "/ns/shop/sa/web for 1")
	expect(t, "a node without it", of(r, node(t, r, "prod", "node-b")))
}

// TestRulesOfOneCluster: what is written in a cluster is for its own pods, and keeps no other cluster waiting.
func TestRulesOfOneCluster(t *testing.T) {
	r := newRegistry(t)
	refused := make(chan Refusal, 10)
	x := New(Config{Registry: r, Refused: func(r Refusal) { refused <- r }})
	x.Expect("spire:prod", "spire:test")
	x.Synced("prod", true)
	x.Synced("test", true)
	prod, test := node(t, r, "prod", "node-a"), node(t, r, "test", "node-b")
	unknown := func(what string, agent spiffeid.ID, want bool) {
		t.Helper()
		if got := r.PodsUnknown(agent); got != want {
			t.Errorf("%s: unknown %t, want %t", what, got, want)
		}
	}
	unknown("prod, whose rules are missing", prod, true)
	x.SetRules("spire:prod", []Rule{&rule{name: "ClusterSPIFFEID all", path: nsSA, revision: 1},
		&rule{name: "ClusterSPIFFEID bad", path: func(*Pod) (string, error) { return "", errors.New("no") }, revision: 1}})
	unknown("prod, whose rules were told", prod, false)
	unknown("test, whose rules are missing", test, true)
	other := pod("2", "node-b", "shop", "web")
	other.Cluster = "test"
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	x.Update("test", []*Pod{other}, nil)
	expect(t, "a pod of the rules' cluster", of(r, prod), "/ns/shop/sa/web for 1")
	expect(t, "a pod of another cluster", of(r, test))
	if len(refused) != 1 || (<-refused).Pod.Cluster != "prod" {
		t.Error("pods of another cluster are told of rules that are not for them")
	}
	x.SetRules("spire:test", nil)
	unknown("test, whose rules were told", test, false)
}

// TestOrderOfIdentities: of two Identities of one second one goes first, by name, whichever the pod.
func TestOrderOfIdentities(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	at := func(path string) func(*Pod) (string, error) {
		return func(p *Pod) (string, error) { return "/" + path + "/" + p.Name, nil }
	}
	when := time.Unix(2000, 0)
	var rules []Rule
	for _, n := range []string{"b", "a.b", "a", "a-b"} {
		rules = append(rules, &rule{name: "Identity " + n, created: when, path: at(n), revision: 1})
	}
	x.SetRules(OriginIdentities, rules)
	var first []string
	for i := range 200 {
		uid := fmt.Sprint(i)
		x.Update("prod", []*Pod{pod(uid, "node-a", "shop", "web")}, nil)
		entries := x.Entries("prod", uid)
		slices.SortFunc(entries, func(a, b *registry.Entry) int { return strings.Compare(string(a.ID), string(b.ID)) }) // as agents do
		var order []string
		for _, e := range entries {
			order = append(order, strings.Split(e.SPIFFEID.Path(), "/")[1])
		}
		if first == nil {
			first = order
		}
		if len(order) != 4 || order[3] != "b" || !slices.Equal(order, first) {
			t.Fatalf("pod %d has them in the order %q, the first in %q", i, order, first)
		}
	}
}
