package tally

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

func newKept(most int) *Kept {
	return NewKept(KeptConfig{MaxRecords: most, Keep: 24 * time.Hour, Bucket: time.Hour, Now: func() time.Time { return moment }, Track: true})
}

func counted(service, peer, path string, n uint64) *policyv1.Observation {
	return &policyv1.Observation{Count: n, First: moment.Add(-time.Minute).UnixNano(), Last: moment.UnixNano(), Service: "spiffe://example.org/" + service, Peer: "spiffe://example.org/" + peer,
		Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Method: "GET", Path: path, Allowed: true, Reason: "allowed", AgentId: "spiffe://example.org/spire/agent/a"}
}

func denied(id, service, peer string) *policyv1.Observation {
	o := counted(service, peer, "/", 1)
	o.DecisionId, o.Allowed, o.Reason = id, false, "no_allow"
	return o
}

// checkKept checks what must always hold.
func checkKept(t *testing.T, k *Kept) {
	t.Helper()
	k.mu.RLock()
	defer k.mu.RUnlock()
	total, singles := 0, 0
	for name, s := range k.services {
		single, count := 0, 0
		for _, o := range s.singles {
			single += weight(o)
			if !slices.Contains(k.byID[o.GetDecisionId()], o) {
				t.Fatalf("%s: decision %s is not found by its id", name, o.GetDecisionId())
			}
		}
		for _, o := range s.counts {
			count += weight(o)
		}
		if single != s.single || count != s.counted || s.weight() == 0 {
			t.Fatalf("%s: weights %d and %d, counted as %d and %d", name, single, count, s.single, s.counted)
		}
		total += single + count
		singles += len(s.singles)
	}
	reports := 0
	for _, all := range k.byID {
		reports += len(all)
	}
	if total != k.total || total > k.config.MaxRecords || singles != reports {
		t.Fatalf("weights %d, counted as %d, at most %d; %d single ones, %d by id", total, k.total, k.config.MaxRecords, singles, reports)
	}
}

func TestKept(t *testing.T) {
	k := newKept(100)
	k.Add(denied("A", "db", "web"))
	if k.Add(denied("A", "db", "other")) != nil {
		t.Error("a decision that is known is kept again")
	}
	first := k.Add(counted("db", "web", "/a", 2))
	later := counted("db", "web", "/a", 3)
	later.Last, later.Revision = moment.Add(time.Second).UnixNano(), 9
	sum := k.Add(later)
	if sum.GetCount() != 5 || sum.GetRevision() != 9 || sum.GetLast() != later.GetLast() || first.GetCount() != 2 {
		t.Errorf("2 and 3 make %v; the first is now %v", sum, first)
	}
	k.Add(counted("db", "web", "/b", 1))
	k.Add(counted("cache", "web", "/a", 1))
	if got := k.Get("A"); got.GetPeer() != "spiffe://example.org/web" || k.Get("B") != nil {
		t.Errorf("Get = %v, %v", got, k.Get("B"))
	}
	if got := k.List(Filter{Service: "spiffe://example.org/db"}); len(got) != 3 || got[2] != sum {
		t.Errorf("List = %v", got)
	}
	for name, tt := range map[string]struct {
		filter Filter
		want   int
	}{
		"all": {Filter{}, 4}, "a peer": {Filter{Peer: "spiffe://example.org/web"}, 4}, "another": {Filter{Peer: "spiffe://example.org/x"}, 0}, "limit": {Filter{Limit: 2}, 2},
		"since": {Filter{Since: moment.Add(time.Nanosecond)}, 1}, "until": {Filter{Until: moment.Add(time.Nanosecond)}, 3}, "denied": {Filter{Wanted: func(o *policyv1.Observation) bool { return !o.GetAllowed() }}, 1},
	} {
		if got := k.List(tt.filter); len(got) != tt.want {
			t.Errorf("%s: %d, want %d", name, len(got), tt.want)
		}
	}
	if got := k.Changed(false); len(got) != 1 || got[0].GetDecisionId() != "A" {
		t.Errorf("new single ones: %v", got)
	}
	if got := k.Changed(true); len(got) != 3 {
		t.Errorf("new counts: %v", got)
	}
	if got := k.Changed(true); len(got) != 0 {
		t.Errorf("nothing is new, and there is %v", got)
	}
	checkKept(t, k)
	k.config.Now = func() time.Time { return moment.Add(24*time.Hour + time.Millisecond) }
	k.Sweep()
	if k.Len() != 1 || k.Get("A") != nil {
		t.Errorf("after a day %d are left", k.Len())
	}
	checkKept(t, k)
}

// TestOneReportDoesNotHideAnother: who is told the id of its denial reports one with this id about a service of its own,
// before who denied has reported it.
func TestOneReportDoesNotHideAnother(t *testing.T) {
	k := NewKept(KeptConfig{MaxRecords: 100, Keep: 24 * time.Hour, Bucket: time.Hour, Now: func() time.Time { return moment }, Track: true})
	by := func(o *policyv1.Observation, agent string) *policyv1.Observation { o.AgentId = agent; return o }
	k.Add(by(denied("A", "mine", "nobody"), "stolen"))
	if k.Add(by(denied("A", "db", "web"), "honest")) == nil {
		t.Fatal("a denial found no room since somebody else has taken its id")
	}
	if k.Add(by(denied("A", "db", "web"), "honest")) != nil {
		t.Error("what is known is kept again")
	}
	k.Add(by(denied("A", "db", "other"), "stolen")) // it may serve this service, too
	if got := k.Reports("A"); len(got) != 3 || got[1].GetAgentId() != "honest" || len(k.List(Filter{Service: "spiffe://example.org/db"})) != 2 {
		t.Errorf("%v", got)
	}
	if got := k.Changed(false); len(got) != 3 {
		t.Errorf("%d go into the files", len(got))
	}
	checkKept(t, k)
	k.config.Now = func() time.Time { return moment.Add(25 * time.Hour) }
	k.Sweep()
	if k.Reports("A") != nil {
		t.Error("they are kept for ever")
	}
	checkKept(t, k)
}

// TestKeptFloods: neither services, paths, peers nor denials push out what is known of another service, nor counts denials.
func TestKeptFloods(t *testing.T) {
	const most = 6400
	for name, flood := range map[string]func(i int) *policyv1.Observation{
		"paths":   func(i int) *policyv1.Observation { return counted("noisy", "web", fmt.Sprint("/", i), 1) },
		"peers":   func(i int) *policyv1.Observation { return counted("noisy", fmt.Sprint("p", i), "/", 1) },
		"denials": func(i int) *policyv1.Observation { return denied(fmt.Sprint("X", i), "noisy", "web") },
		"times": func(i int) *policyv1.Observation {
			o := counted("noisy", "web", "/", 1)
			o.Last -= int64(i) * int64(time.Second)
			o.First = o.Last
			return o
		},
		"long texts": func(i int) *policyv1.Observation {
			o := denied(fmt.Sprint("X", i), "noisy", strings.Repeat("x", 2000))
			return o
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(most)
			for i := range 50 {
				k.Add(denied(fmt.Sprint("KEEP", i), "quiet", "web"))
				k.Add(counted("quiet", "web", fmt.Sprint("/", i%10), 1))
				k.Add(denied(fmt.Sprint("NOISY", i), "noisy", "victim"))
			}
			kept := k.Add(counted("noisy", "reader", "/known", 7))
			var sum uint64
			for i := range 50_000 {
				k.Add(flood(i))
				if i%10_000 == 0 {
					checkKept(t, k)
				}
			}
			checkKept(t, k)
			for i := range 50 {
				if k.Get(fmt.Sprint("KEEP", i)) == nil {
					t.Fatalf("denial %d of another service is gone", i)
				}
				if strings.HasSuffix(name, "s") && name != "denials" && name != "long texts" && k.Get(fmt.Sprint("NOISY", i)) == nil {
					t.Fatalf("denial %d of the service was pushed out by counts", i)
				}
			}
			for _, o := range k.List(Filter{Service: "spiffe://example.org/quiet", Wanted: (*policyv1.Observation).GetAllowed}) {
				sum += o.GetCount()
			}
			if sum != 50 {
				t.Errorf("%d calls of the other service are counted, want 50", sum)
			}
			if name == "paths" {
				found := false
				for _, o := range k.List(Filter{Service: kept.GetService(), Peer: kept.GetPeer()}) {
					found = found || o.GetPath() == "/known" && o.GetCount() == 7
				}
				if !found {
					t.Error("another peer's path was pushed out")
				}
			}
		})
	}
}

// TestKeptManyServices: there may be more services than records.
func TestKeptManyServices(t *testing.T) {
	k := newKept(500)
	for i := range 5000 {
		k.Add(counted(fmt.Sprint("s", i), "web", "/", 1))
		k.Add(denied(fmt.Sprint("D", i), fmt.Sprint("s", i), "web"))
	}
	checkKept(t, k)
	if k.Len() < 200 {
		t.Errorf("%d of 500 are left", k.Len())
	}
}

// TestRestore: what Changed told is what there is after a restart.
func TestRestore(t *testing.T) {
	k := newKept(100_000)
	var log []*policyv1.Observation
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 20_000 {
		if r.IntN(4) == 0 {
			k.Add(denied(fmt.Sprint("D", i), fmt.Sprint("s", r.IntN(5)), "web"))
		} else {
			k.Add(counted(fmt.Sprint("s", r.IntN(5)), fmt.Sprint("p", r.IntN(5)), fmt.Sprint("/", r.IntN(20)), uint64(1+r.IntN(5))))
		}
		if i%1000 == 0 {
			for _, o := range k.Changed(i%2000 == 0) {
				log = append(log, proto.CloneOf(o))
			}
		}
	}
	for _, o := range k.Changed(true) {
		log = append(log, proto.CloneOf(o))
	}
	again := newKept(100_000)
	for _, o := range log {
		again.Restore(o)
	}
	checkKept(t, again)
	text := func(k *Kept) map[string]uint64 {
		out := map[string]uint64{}
		for _, o := range k.List(Filter{}) {
			out[fmt.Sprint(o.GetDecisionId(), o.GetService(), o.GetPeer(), o.GetPath())] += o.GetCount()
		}
		return out
	}
	have, want := text(again), text(k)
	if len(have) != len(want) {
		t.Errorf("%d records, want %d", len(have), len(want))
	}
	for name, n := range want {
		if have[name] != n {
			t.Errorf("%s: %d, want %d", name, have[name], n)
		}
	}
}

func TestCheck(t *testing.T) {
	good := func() *policyv1.Observation {
		o := denied("A2", "db", "web")
		o.Rule = &policyv1.RuleRef{Policy: "p", File: "f", Line: 1}
		return o
	}
	for name, change := range map[string]func(*policyv1.Observation){
		"no service":              func(o *policyv1.Observation) { o.Service = "" },
		"a service that is no ID": func(o *policyv1.Observation) { o.Service = "https://example.org/db" },
		"a peer that is no ID":    func(o *policyv1.Observation) { o.Peer = "web" },
		"a long path":             func(o *policyv1.Observation) { o.Path = strings.Repeat("/", 257) },
		"a long method":           func(o *policyv1.Observation) { o.Method = strings.Repeat("G", 65) },
		"a long reason":           func(o *policyv1.Observation) { o.Reason = strings.Repeat("x", 33) },
		"a long file":             func(o *policyv1.Observation) { o.Rule.File = strings.Repeat("x", 1025) },
		"a long token":            func(o *policyv1.Observation) { o.Token = strings.Repeat("x", 257) },
		"no UTF-8":                func(o *policyv1.Observation) { o.Path = "/\xff" },
		"a strange id":            func(o *policyv1.Observation) { o.DecisionId = "a b" },
		"a long id":               func(o *policyv1.Observation) { o.DecisionId = strings.Repeat("A", 65) },
		"no count":                func(o *policyv1.Observation) { o.Count = 0 },
		"a single one twice":      func(o *policyv1.Observation) { o.Count = 2 },
		"an enormous count":       func(o *policyv1.Observation) { o.DecisionId, o.Count = "", 1<<63 },
	} {
		o := good()
		change(o)
		if err := Check(o, moment.Add(-time.Hour), moment); err == nil {
			t.Errorf("%s is taken: %v", name, o)
		}
	}
	for name, tt := range map[string]struct{ first, last, wantFirst, wantLast int64 }{
		"as they are":   {-60, -30, -60, -30},
		"of the future": {60, 90, 0, 0},
		"of long ago":   {-10000, -9000, -3600, -3600},
		"reversed":      {-30, -60, -60, -60},
	} {
		o := good()
		at := func(s int64) int64 { return moment.Add(time.Duration(s) * time.Second).UnixNano() }
		o.First, o.Last = at(tt.first), at(tt.last)
		if err := Check(o, moment.Add(-time.Hour), moment); err != nil || o.GetFirst() != at(tt.wantFirst) || o.GetLast() != at(tt.wantLast) {
			t.Errorf("%s: %v, %v", name, err, o)
		}
	}
	o := good()
	o.Protocol = 99
	o.ProtoReflect().SetUnknown([]byte{0xf8, 0x3f, 1})
	o.Rule.ProtoReflect().SetUnknown([]byte{0xf8, 0x3f, 1})
	if err := Check(o, moment.Add(-time.Hour), moment); err != nil || o.GetProtocol() != 0 || len(o.ProtoReflect().GetUnknown())+len(o.Rule.ProtoReflect().GetUnknown()) != 0 {
		t.Errorf("what is newer: %v, %v", err, o)
	}
}

// FuzzCheck: what is let through is within bounds, can be written, and is let through again.
func FuzzCheck(f *testing.F) {
	b, _ := proto.Marshal(denied("A", "db", "web"))
	f.Add(b)
	b, _ = proto.Marshal(counted("db", "web", "/a", 5))
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		o := new(policyv1.Observation)
		if proto.Unmarshal(b, o) != nil || Check(o, moment.Add(-time.Hour), moment) != nil {
			return
		}
		out, err := proto.Marshal(o)
		if err != nil || len(out) > 12<<10 {
			t.Fatalf("%d bytes, %v", len(out), err)
		}
		again := new(policyv1.Observation)
		if err := proto.Unmarshal(out, again); err != nil || Check(again, moment.Add(-time.Hour), moment) != nil || !proto.Equal(o, again) {
			t.Fatalf("read again: %v, %v", err, again)
		}
		k := newKept(10)
		k.Add(again)
		checkKept(t, k)
		tally := New(Config{MaxKeys: 8})
		tally.Add(o)
		got, dropped := tally.Drain()
		var sum uint64
		for _, one := range got {
			sum += one.GetCount()
		}
		if sum+dropped != o.GetCount() {
			t.Fatalf("%d counted, %d dropped of %d", sum, dropped, o.GetCount())
		}
	})
}

func BenchmarkKeptAdd(b *testing.B) {
	k := newKept(100_000)
	all := make([]*policyv1.Observation, 4096)
	for i := range all {
		all[i] = counted(fmt.Sprint("s", i%16), fmt.Sprint("p", i%8), fmt.Sprint("/", i), 1)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		k.Add(copyOf(all[i%len(all)]))
	}
}
