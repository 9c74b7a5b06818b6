package pods

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/analyse"
	"github.com/signet-id/signet/spiffe"
)

// BenchmarkTools is what operators' commands ask of a CA with 10,000 pods and three templates, and beside it of one in which the
// same SPIFFE IDs are those of as many registered entries.
func BenchmarkTools(b *testing.B) {
	const templates = "kind: Identity\nname: a\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\n---\nkind: Identity\nname: b\nspiffeID: /pod/{{ .k8s.ns }}/{{ .k8s.pod }}\n---\n" +
		"kind: Identity\nname: c\nspiffeID: /app/{{ .k8s.ns }}/{{ .k8s.pod }}/x\n"
	all := make([]*Pod, 10_000)
	for i := range all {
		all[i] = pod(fmt.Sprintf("uid-%d", i), fmt.Sprintf("node-%d", i%100), fmt.Sprintf("ns-%d", i%20), fmt.Sprintf("sa-%d", i%50))
	}
	byPods := newRegistry(b)
	apply(b, byPods, templates)
	x := New(Config{Registry: byPods})
	x.Synced("prod", true)
	x.Update("prod", all, nil)
	held := byPods.PodEntries(func(*registry.Entry) bool { return true })
	if len(held) != 30_000 {
		b.Fatalf("%d entries", len(held))
	}
	byEntries := newRegistry(b)
	for chunk := range slices.Chunk(held, 1000) {
		var entries []*registry.Entry
		for i, e := range chunk {
			entries = append(entries, &registry.Entry{SPIFFEID: e.SPIFFEID, ParentID: spiffeid.RequireFromPath(td, "/spire/agent/x/y"),
				Selectors: []spiffe.Selector{{Type: "k8s", Value: "pod-uid:" + e.Pod.UID}, {Type: "unix", Value: fmt.Sprint("uid:", i)}}})
		}
		for _, r := range byEntries.CreateEntries(b.Context(), entries) {
			if r.Err != nil {
				b.Fatal(r.Err)
			}
		}
	}
	var policies strings.Builder
	for i := range 20 {
		fmt.Fprintf(&policies, "kind: CallPolicy\nname: p%d\nservice: /ns/ns-%d/sa/*\nallow: [{from: [/pod/ns-%d/*, /app/ns-%d/**]}]\n---\n", i, i, i, (i+1)%20)
	}
	for _, r := range []*registry.Registry{byPods, byEntries} {
		apply(b, r, policies.String())
	}
	change, err := strictyaml.Split([]byte("kind: CallPolicy\nname: p3\nservice: /ns/ns-3/sa/*\nallow: [{from: [/pod/ns-4/*]}]\n"), "f.yaml", 1)
	if err != nil {
		b.Fatal(err)
	}
	for _, side := range []struct {
		name string
		r    *registry.Registry
		// churn lets one ID go and come back.
		churn func(i int)
	}{{"pods", byPods, func(i int) {
		x.Update("prod", nil, []string{all[i%len(all)].UID})
		x.Update("prod", all[i%len(all):i%len(all)+1], nil)
	}}, {"entries", byEntries, func(i int) {
		e, _ := byEntries.ListEntries(registry.EntryFilter{SPIFFEID: held[i%len(held)].SPIFFEID}, "", 1)
		if _, _, err := byEntries.DeleteEntry(b.Context(), e[0].ID); err != nil {
			b.Fatal(err)
		}
		again := *e[0]
		again.ID = ""
		if res := byEntries.CreateEntries(b.Context(), []*registry.Entry{&again}); res[0].Err != nil {
			b.Fatal(res[0].Err)
		}
	}}} {
		plan := func(b *testing.B) {
			p, err := side.r.Plan(change, registry.Options{})
			if err != nil || len(p.Changes) != 1 {
				b.Fatal(p, err)
			}
		}
		b.Run("plan/"+side.name, func(b *testing.B) {
			for b.Loop() {
				plan(b)
			}
		})
		b.Run("plan-after-a-change/"+side.name, func(b *testing.B) {
			i := 0
			for b.Loop() {
				b.StopTimer()
				side.churn(i)
				i++
				b.StartTimer()
				plan(b)
			}
		})
		b.Run("ids/"+side.name, func(b *testing.B) {
			for b.Loop() {
				if ids, _, _ := side.r.Everybody(); len(ids) != 20_100 {
					b.Fatalf("%d IDs", len(ids))
				}
			}
		})
		b.Run("list/"+side.name, func(b *testing.B) {
			for b.Loop() {
				n := 0
				if side.r == byPods {
					n = len(side.r.PodEntries(func(*registry.Entry) bool { return true }))
				} else {
					for after := registry.EntryID(""); ; {
						page, more := side.r.ListEntries(registry.EntryFilter{}, after, 500)
						if n += len(page); !more {
							break
						}
						after = page[len(page)-1].ID
					}
				}
				if n != 30_000 {
					b.Fatalf("%d entries", n)
				}
			}
		})
		set := side.r.PolicySet("")
		known := func() *analyse.Known {
			ids, patterns, unknown := side.r.Everybody()
			return analyse.NewKnown(td, slices.Values(ids), nil).WithTemplates(patterns, len(unknown) > 0)
		}
		b.Run("who-can/"+side.name, func(b *testing.B) {
			for b.Loop() {
				grants, err := analyse.WhoCan(set, known(), policy.Request{Service: spiffeid.RequireFromPath(td, "/ns/ns-3/sa/sa-3")}, true)
				if err != nil || len(grants) != 1000 {
					b.Fatal(len(grants), err)
				}
			}
		})
		b.Run("graph/"+side.name, func(b *testing.B) {
			for b.Loop() {
				g, err := analyse.NewGraph(set, known(), []*policyv1.Observation{}, "")
				if err != nil || len(g.Edges) == 0 {
					b.Fatal(g, err)
				}
			}
		})
	}
}
