package pods

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
)

// timed is a registry whose clock a test moves.
func timed(t *testing.T) (*registry.Registry, *atomic.Int64) {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	ahead := new(atomic.Int64)
	r, err := registry.Open(t.Context(), registry.Config{TrustDomain: td, Store: s, Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }})
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
	return r, ahead
}

// expandNow is what Run does when templated Identities changed; who applies some does not wait for it.
func expandNow(x *Expander) {
	x.takeIdentities()
	x.c.Registry.Expanded(0)
}

// A holding is what a follower was told so far, by path.
type holding struct {
	f    *registry.Follower
	held map[registry.EntryID]string
}

func (h *holding) now() []string {
	for d := h.f.Next(false); d != nil; d = h.f.Next(false) {
		if d.Snapshot {
			clear(h.held)
		}
		for _, e := range d.Entries {
			h.held[e.ID] = e.SPIFFEID.Path() + " " + e.Hint
		}
		for _, id := range d.RemovedEntries {
			delete(h.held, id)
		}
	}
	return slices.Sorted(maps.Values(h.held))
}

// TestATemplateThatHasEndedClaimsNothing: at its end an Identity's pods have nothing by it, the next Identity that makes the same
// IDs has them, and no namespace has services by it. When the clock is set back it holds again.
func TestATemplateThatHasEndedClaimsNothing(t *testing.T) {
	r, ahead := timed(t)
	x := New(Config{Registry: r})
	agent := node(t, r, "prod", "node-a")
	x.Synced("prod", true)
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	end := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	apply(t, r, "kind: Identity\nname: a-first\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\nhint: first\nexpiresAt: '"+end+"'\n---\n"+
		"kind: Identity\nname: b-second\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\nmatch: [k8s:ns:shop]\nhint: second\n")
	expandNow(x)
	f := r.Follow(agent, 0, false)
	defer f.Close()
	h := &holding{f, map[registry.EntryID]string{}}
	expect(t, "before", h.now(), "/ns/shop/sa/web first")
	speaks := func(service string) error {
		docs, err := strictyaml.Split([]byte("kind: CallPolicy\nname: prod_shop_p\nservice: "+service+"\nallow: [{from: [/x]}]\n"), "p.yaml", 1)
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.Plan(docs, registry.Options{Owner: "kubernetes/prod/resources", Namespaces: map[string]registry.Namespace{"prod_shop_p": {Cluster: "prod", Name: "shop", Clusters: []string{"prod"}}}})
		return err
	}
	apply(t, r, "kind: Identity\nname: c-third\nspiffeID: /team/{{ .k8s.ns }}/{{ .k8s.sa }}\nexpiresAt: '"+end+"'\n")
	expandNow(x)
	if err := speaks("/team/shop/web"); err != nil {
		t.Errorf("a service by an Identity that has not ended: %v", err)
	}
	counted := r.TemplatesChanged()

	ahead.Store(int64(2 * time.Hour))
	ended := r.NoteEnds()
	if len(ended) != 2 {
		t.Errorf("%d ended, want the two Identities", len(ended))
	}
	select {
	case <-r.TemplatedChanged():
	default:
		t.Error("nobody is told to expand anew")
	}
	if r.TemplatesChanged() == counted {
		t.Error("policies of namespaces are not judged anew")
	}
	expandNow(x)
	expect(t, "after its end", h.now(), "/ns/shop/sa/web second")
	expect(t, "and for agents that poll", of(r, agent), "/ns/shop/sa/web for 1")
	if err := speaks("/team/shop/web"); err == nil || !strings.Contains(err.Error(), "is not of namespace") {
		t.Errorf("a service by an Identity that has ended: %v", err)
	}
	if err := speaks("/ns/shop/sa/web"); err != nil {
		t.Errorf("a service by the other: %v", err)
	}

	ahead.Store(0)
	r.NoteEnds()
	expandNow(x)
	expect(t, "the clock is set back", h.now(), "/ns/shop/sa/web first", "/team/shop/web ")
}

// TestARegisteredIDIsFreeAtItsEnd: pods get an ID when the Identity that had it ends, not a day later when that is removed, and
// an index that is read anew knows.
func TestARegisteredIDIsFreeAtItsEnd(t *testing.T) {
	r, ahead := timed(t)
	x := New(Config{Registry: r})
	agent := node(t, r, "prod", "node-a")
	x.Synced("prod", true)
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	end := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	apply(t, r, byServiceAccount+"---\nkind: Identity\nname: plain\nspiffeID: /ns/shop/sa/web\nmatch: [unix:uid:1]\nexpiresAt: '"+end+"'\n")
	expandNow(x)
	f := r.Follow(agent, 0, false)
	defer f.Close()
	h := &holding{f, map[registry.EntryID]string{}}
	expect(t, "before", of(r, agent), "/ns/shop/sa/web")
	if taken := r.TakenPodEntries(); len(taken) != 1 || taken[0].By.ID != "identity.plain" {
		t.Errorf("taken %+v", taken)
	}
	h.now()
	ahead.Store(int64(2 * time.Hour))
	r.NoteEnds()
	expect(t, "at its end", of(r, agent), "/ns/shop/sa/web for 1")
	expect(t, "and for followers", h.now(), "/ns/shop/sa/web ")
	if taken := r.TakenPodEntries(); len(taken) > 0 {
		t.Errorf("taken %+v", taken)
	}
	ahead.Store(0)
	r.NoteEnds()
	expect(t, "the clock is set back", of(r, agent), "/ns/shop/sa/web")
}

// TestPodsThatLoseTheirIDAreNamed: an Identity for one ID that pods have says from whom it takes it, and what an admin must know.
func TestPodsThatLoseTheirIDAreNamed(t *testing.T) {
	r := newRegistry(t)
	apply(t, r, byServiceAccount)
	x := New(Config{Registry: r})
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web"), pod("2", "node-b", "shop", "web"), pod("3", "node-b", "bank", "db")}, nil)
	warnings := func(doc string) string {
		docs, err := strictyaml.Split([]byte(doc), "f.yaml", 1)
		if err != nil {
			t.Fatal(err)
		}
		p, err := r.Plan(docs, registry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, w := range p.Warnings {
			all = append(all, w.Text)
		}
		return strings.Join(all, "\n")
	}
	const web, db, free = "kind: Identity\nname: web\nspiffeID: /ns/shop/sa/web\nmatch: [unix:uid:1]\n", "kind: Identity\nname: db\nspiffeID: /ns/bank/sa/db\nmatch: [unix:uid:1]\nadmin: true\n", "kind: Identity\nname: free\nspiffeID: /ns/bank/sa/other\nmatch: [unix:uid:1]\n"
	if got := warnings(web); !strings.Contains(got, `Identity "web" takes spiffe://example.org/ns/shop/sa/web from 2 pods, such as shop/pod-`) || !strings.Contains(got, "by Identity cluster-default") {
		t.Errorf("two pods: %q", got)
	}
	if got := warnings(db); !strings.Contains(got, "from the pod bank/pod-3") || !strings.Contains(got, "they are admins until those end") {
		t.Errorf("an admin: %q", got)
	}
	if got := warnings(free); got != "" {
		t.Errorf("an ID that no pod has: %q", got)
	}
	apply(t, r, web)
	if got := warnings(web + "hint: h\n"); got != "" {
		t.Errorf("one that has it already: %q", got)
	}
}
