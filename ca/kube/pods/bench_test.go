package pods

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// cluster makes n pods on nodes, in a hundred namespaces.
func cluster(n, nodes int) []*Pod {
	out := make([]*Pod, n)
	for i := range out {
		out[i] = pod(fmt.Sprintf("%08d-0000-4000-8000-000000000000", i), fmt.Sprintf("%08d-node", i%nodes), fmt.Sprintf("ns%d", i%100), fmt.Sprintf("sa%d", i%10))
		out[i].Labels = map[string]string{"app.kubernetes.io/name": fmt.Sprint("app", i%50)}
	}
	return out
}

// templates apply n templates, of which the first is for all pods and the others for a namespace each.
func templates(b testing.TB, r *registry.Registry, n int) {
	text := byServiceAccount
	for i := range n - 1 {
		text += fmt.Sprintf("---\nkind: Identity\nname: t%d\nspiffeID: /t%d/{{ .k8s.ns }}/{{ .k8s.label[\"app.kubernetes.io/name\"] }}\nmatch: [k8s:ns:ns%d]\n", i, i, i)
	}
	apply(b, r, text)
}

// BenchmarkExpand is 10,000 pods on 500 nodes with 100 templates: each is one entry by the first, and nearly all one more.
func BenchmarkExpand(b *testing.B) {
	r := newRegistry(b)
	templates(b, r, 100)
	all := cluster(10_000, 500)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	x := New(Config{Registry: r})
	x.Update("prod", all, nil)
	runtime.GC()
	runtime.ReadMemStats(&after)
	entries := r.CountPodEntries("")
	bytes := float64(after.HeapAlloc-before.HeapAlloc) / float64(entries)
	b.ResetTimer()
	for b.Loop() {
		x = New(Config{Registry: r})
		x.Update("prod", all, nil)
	}
	b.ReportMetric(bytes, "B/entry")
	b.ReportMetric(float64(entries), "entries")
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(entries), "µs/entry")
	runtime.KeepAlive(x)
}

// BenchmarkOnePod is a pod that comes and goes among 10,000, until the agent of its node has the difference; and beside it the
// same by a plain entry for that agent.
func BenchmarkOnePod(b *testing.B) {
	r := newRegistry(b)
	templates(b, r, 100)
	x := New(Config{Registry: r})
	x.Update("prod", cluster(10_000, 500), nil)
	agent := node(b, r, "prod", "00000001-node")
	f := r.Follow(agent, 0, false)
	defer f.Close()
	<-f.Wake()
	f.Next(false)
	look := func() {
		for {
			<-f.Wake()
			if d := f.Next(false); d != nil {
				return
			}
		}
	}
	b.Run("pod", func(b *testing.B) {
		p := []*Pod{pod("new", "00000001-node", "ns200", "sa")}
		for b.Loop() {
			x.Update("prod", p, nil)
			look()
			x.Update("prod", nil, []string{"new"})
			look()
		}
	})
	b.Run("plain", func(b *testing.B) {
		unix := spiffe.Selector{Type: "unix", Value: "uid:1"}
		for b.Loop() {
			res := r.CreateEntries(b.Context(), []*registry.Entry{{ID: "new", SPIFFEID: spiffeid.RequireFromPath(td, "/new"), ParentID: agent, Selectors: []spiffe.Selector{unix}}})
			if res[0].Err != nil {
				b.Fatal(res[0].Err)
			}
			look()
			if _, _, err := r.DeleteEntry(b.Context(), "new"); err != nil {
				b.Fatal(err)
			}
			look()
		}
	})
}

// BenchmarkScope is what an agent without pods, and one with twenty, may serve, in a cluster of 10,000.
func BenchmarkScope(b *testing.B) {
	r := newRegistry(b)
	none := spiffeid.RequireFromPath(td, "/spire/agent/join_token/x")
	if err := r.PutNode(b.Context(), &registry.Node{ID: none, Attestation: "join_token", ExpiresAt: time.Now().Add(time.Hour)}, nil); err != nil {
		b.Fatal(err)
	}
	some := node(b, r, "prod", "00000001-node")
	scope := func(agent spiffeid.ID) func(*testing.B) {
		return func(b *testing.B) {
			for b.Loop() {
				r.Scope(agent)
			}
		}
	}
	b.Run("empty cluster", scope(none))
	templates(b, r, 100)
	b.Run("templates alone", scope(none))
	x := New(Config{Registry: r})
	x.Update("prod", cluster(1, 1), nil)
	b.Run("one pod elsewhere", scope(none))
	x.Update("prod", cluster(10_000, 500), nil)
	b.Run("no pods", scope(none))
	b.Run("20 pods", scope(some))
}

// BenchmarkManyAtOnce is 5,000 pods that come at once on 500 nodes with an agent each, with 100 templates: until the last agent has the
// last entry of its pods. Batches are those of the watch at most; what a pod waits is from when the batches begin.
func BenchmarkManyAtOnce(b *testing.B) {
	const nodes, many, batch = 500, 5000, 2000
	r := newRegistry(b)
	templates(b, r, 100)
	all := cluster(many, nodes)
	want := make([]int, nodes) // entries of each node
	probe := New(Config{Registry: r})
	probe.Update("prod", all, nil)
	agents := make([]spiffeid.ID, nodes)
	entries := 0
	for i := range agents {
		agents[i] = node(b, r, "prod", fmt.Sprintf("%08d-node", i))
		scope, _ := r.Scope(agents[i])
		want[i], entries = len(scope), entries+len(scope)
	}
	var gone []string
	for _, p := range all {
		gone = append(gone, p.UID)
	}
	probe.Update("prod", nil, gone)
	x := New(Config{Registry: r})
	followers := make([]*registry.Follower, nodes)
	for i, a := range agents {
		followers[i] = r.Follow(a, 0, false)
		defer followers[i].Close()
		<-followers[i].Wake()
		followers[i].Next(false)
	}
	var expanded, last time.Duration
	var waits []time.Duration // of all entries
	b.ResetTimer()
	for b.Loop() {
		began := time.Now()
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i, f := range followers {
			wg.Go(func() {
				for n := 0; n < want[i]; {
					<-f.Wake()
					d := f.Next(false)
					if d == nil {
						continue
					}
					n += len(d.Entries)
					mu.Lock()
					for range d.Entries {
						waits = append(waits, time.Since(began))
					}
					mu.Unlock()
				}
			})
		}
		for rest := all; len(rest) > 0; rest = rest[min(batch, len(rest)):] {
			x.Update("prod", rest[:min(batch, len(rest))], nil)
		}
		expanded += time.Since(began)
		wg.Wait()
		last += time.Since(began)
		b.StopTimer()
		x.Update("prod", nil, gone)
		for _, f := range followers {
			for f.Next(false) != nil { // what came meanwhile
			}
			select {
			case <-f.Wake():
			default:
			}
		}
		b.StartTimer()
	}
	slices.Sort(waits)
	b.ReportMetric(float64(entries), "entries")
	b.ReportMetric(float64(expanded.Milliseconds())/float64(b.N), "ms-expanded")
	b.ReportMetric(float64(last.Milliseconds())/float64(b.N), "ms-last")
	b.ReportMetric(float64(waits[len(waits)/2].Milliseconds()), "ms-p50")
	b.ReportMetric(float64(waits[len(waits)*99/100].Milliseconds()), "ms-p99")
}
