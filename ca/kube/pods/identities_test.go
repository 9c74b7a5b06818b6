package pods

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
)

func apply(t testing.TB, r *registry.Registry, text string) {
	t.Helper()
	docs, err := strictyaml.Split([]byte(text), "f.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.Plan(docs, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

func running(t testing.TB, x *Expander) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

const byServiceAccount = `kind: Identity
name: cluster-default
spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}
on: [k8s_psat:cluster:prod]
`

// TestAppliedIdentitiesArePodsAtOnce: who applied a template finds what it stands for, without waiting for anything else.
func TestAppliedIdentitiesArePodsAtOnce(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	running(t, x)
	agent := node(t, r, "prod", "node-a")
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web"), pod("2", "node-a", "bank", "db")}, nil)
	expect(t, "before", of(r, agent))
	// Run says that it works by the first change that it takes.
	for tick := time.NewTicker(time.Millisecond); ; <-tick.C {
		apply(t, r, byServiceAccount)
		if len(of(r, agent)) == 2 {
			break
		}
	}
	for range 20 { // it is no luck
		apply(t, r, byServiceAccount)
		expect(t, "applied", of(r, agent), "/ns/bank/sa/db for 2", "/ns/shop/sa/web for 1")
		res, err := r.Resources(registry.KindIdentity, "cluster-default")
		if err != nil || res[0].Pods != 2 {
			t.Errorf("resources %+v, %v", res, err)
		}
		apply(t, r, byServiceAccount+"match: [k8s:ns:shop, k8s:container-name:web]\nx509TTL: 10m\nhint: h\n")
		expect(t, "changed", of(r, agent), "/ns/shop/sa/web for 1")
		p, err := r.PlanDelete(registry.KindIdentity, "cluster-default", false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Apply(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		expect(t, "deleted", of(r, agent))
	}
}

// TestNothingIsStoredPerPod: pods that come, change and go leave no trace in the store, in which there are Identity and node as before.
func TestNothingIsStoredPerPod(t *testing.T) {
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r := replica(t, s)
	x := New(Config{Registry: r})
	agent := node(t, r, "prod", "node-a")
	apply(t, r, byServiceAccount)
	stored := func() (text []string, at store.Revision) {
		t.Helper()
		at, err := s.List(t.Context(), "", 0, func(i store.Item) error {
			text = append(text, fmt.Sprintf("%s of %d: %s", i.Key, i.Modified, i.Value))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return text, at
	}
	before, at := stored()
	if len(before) == 0 {
		t.Fatal("the store has nothing, not even the Identity")
	}
	x.takeIdentities() // as Run does first, at some moment
	running(t, x)
	var all []*Pod
	var uids []string
	for i := range 500 {
		all = append(all, pod(fmt.Sprint(i), "node-a", "shop", fmt.Sprintf("sa-%d", i)))
		uids = append(uids, all[i].UID)
	}
	x.Update("prod", all, nil)
	if n := len(of(r, agent)); n != len(all) {
		t.Fatalf("the node has %d entries of %d pods", n, len(all))
	}
	x.Update("prod", []*Pod{pod("0", "node-b", "shop", "sa-0")}, uids[1:])
	expect(t, "gone", of(r, agent))
	if after, now := stored(); now != at || !slices.Equal(after, before) {
		t.Errorf("the store was at %d with\n%s\nand is at %d with\n%s", at, strings.Join(before, "\n"), now, strings.Join(after, "\n"))
	}
}

// TestAnEntryKeepsItsIDAndTakesTheRulesRevision: an agent that reconnects, and another replica, find nothing new where nothing
// is; a change of the rule is one of each entry.
func TestAnEntryKeepsItsIDAndTakesTheRulesRevision(t *testing.T) {
	r := newRegistry(t)
	apply(t, r, byServiceAccount)
	entry := func() *registry.Entry {
		t.Helper()
		x := New(Config{Registry: r})
		x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
		got := x.Entries("prod", "1")
		if len(got) != 1 {
			t.Fatalf("%d entries", len(got))
		}
		return got[0]
	}
	first, again := entry(), entry()
	templates, _ := r.Templates()
	if first.ID != again.ID || first.Revision != again.Revision || first.Revision != templates[0].Revision || !first.CreatedAt.Equal(templates[0].CreatedAt) {
		t.Errorf("%+v\nand after a start %+v", first, again)
	}
	if !strings.HasPrefix(string(first.ID), registry.PodEntryPrefix("prod")) {
		t.Errorf("ID %s", first.ID)
	}
	var selectors []string
	for _, s := range first.Selectors {
		selectors = append(selectors, s.String())
	}
	expect(t, "selectors", selectors, "k8s:pod-uid:1")
	apply(t, r, byServiceAccount+"x509TTL: 10m\n")
	if changed := entry(); changed.ID != first.ID || changed.Revision <= first.Revision || changed.X509TTL == 0 {
		t.Errorf("changed: %+v", changed)
	}
	apply(t, r, byServiceAccount+"match: [k8s:container-name:web]\n")
	if changed := entry(); changed.ID == first.ID {
		t.Errorf("with other selectors: %+v", changed)
	}
}

func TestTwoTemplatesDoNotShareAnID(t *testing.T) {
	r := newRegistry(t)
	var got []string
	x := New(Config{Registry: r, Refused: func(r Refusal) { got = append(got, r.Pod.UID+" "+r.Rule+": "+r.Reason) }})
	byLabel := "kind: Identity\nname: b\nspiffeID: /app/{{ .k8s.label[\"app\"] }}\n"
	apply(t, r, byLabel+"---\nkind: Identity\nname: a\nspiffeID: /app/{{ .k8s.ns }}\n")
	x.takeIdentities()
	p, q := pod("1", "node-a", "shop", "web"), pod("2", "node-b", "bank", "web")
	q.Labels = map[string]string{"app": "shop"}
	agent, other := node(t, r, "prod", "node-a"), node(t, r, "prod", "node-b")
	x.Update("prod", []*Pod{q}, nil)
	expect(t, "alone", of(r, other), "/app/bank for 2", "/app/shop for 2")
	x.Update("prod", []*Pod{p}, nil)
	expect(t, "the pod whose ID it is", of(r, agent), "/app/shop for 1")
	expect(t, "the pod that chose it by its label", of(r, other), "/app/bank for 2")
	if !slices.Contains(got, "2 Identity b: spiffe://example.org/app/shop is the SPIFFE ID of Identity a") || !slices.Contains(got, `1 Identity b: spiffeID: .k8s.label["app"] is empty`) || len(got) != 2 {
		t.Errorf("refusals %q", got)
	}
	x.Update("prod", nil, []string{"1"})
	expect(t, "once it is gone", of(r, other), "/app/bank for 2", "/app/shop for 2")
}

// TestAnIdentityOfOneClusterIsNothingToPodsOfAnother: they get no ID by it, and so none that they could keep from others.
func TestAnIdentityOfOneClusterIsNothingToPodsOfAnother(t *testing.T) {
	r := newRegistry(t)
	var got []string
	x := New(Config{Registry: r, Refused: func(r Refusal) { got = append(got, r.Pod.UID+" "+r.Rule+": "+r.Reason) }})
	apply(t, r, "kind: Identity\nname: a\nspiffeID: /app/{{ .k8s.label[\"app\"] }}\non: [k8s_psat:cluster:stage]\n---\n"+
		"kind: Identity\nname: b\nspiffeID: /app/{{ .k8s.ns }}\non: [k8s_psat:cluster:prod]\n")
	x.takeIdentities()
	agent := node(t, r, "prod", "node-a")
	hostile := pod("2", "node-b", "anybody", "x")
	hostile.Labels = map[string]string{"app": "shop"}
	x.Update("prod", []*Pod{hostile}, nil)
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	expect(t, "a pod of the cluster", of(r, agent), "/app/shop for 1")
	expect(t, "refused", got)
}

// TestPodsMayBeAnything: whatever a pod is made of, it gets an ID that is right or none.
func TestPodsMayBeAnything(t *testing.T) {
	r := newRegistry(t)
	apply(t, r, byServiceAccount+"dnsNames: ['{{ .k8s.sa }}.internal']\n---\nkind: Identity\nname: b\nspiffeID: /app/{{ .k8s.label[\"app\"] }}\n")
	x := New(Config{Registry: r})
	long := strings.Repeat("a", 3000)
	for i, s := range []string{"", ".", "..", "a/b", "../x", "spire", "*", "**", "a b", "ä", "{{ .k8s.ns }}", "\x00", long, "%2f", "-x-"} {
		p := pod("u"+strings.Repeat("x", i), "node-a", s, s)
		p.Labels = map[string]string{"app": s}
		x.Update("prod", []*Pod{p, nil, {}}, []string{"", "?"})
		for _, e := range x.Entries("prod", p.UID) {
			if s != "spire" && s != "-x-" || !strings.HasPrefix(e.SPIFFEID.Path(), "/ns/"+s) && e.SPIFFEID.Path() != "/app/"+s {
				t.Errorf("a pod of %q is %s", s, e.SPIFFEID)
			}
			if _, err := spiffeid.FromString(e.SPIFFEID.String()); err != nil {
				t.Error(err)
			}
		}
	}
}
