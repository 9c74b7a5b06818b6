package tally

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

var (
	documents = spiffeid.RequireFromString("spiffe://example.org/documents")
	reader    = spiffeid.RequireFromString("spiffe://example.org/reader")
	other     = spiffeid.RequireFromString("spiffe://example.org/other")
	moment    = time.Unix(1_800_000_000, 5)
)

func get(peer spiffeid.ID, path string, allowed bool) policy.Judgement {
	d := policy.Decision{Outcome: policy.Outcome{Allowed: allowed, Reason: policy.ReasonNoAllow}, Epoch: "e", Revision: 7}
	if allowed {
		d.Reason, d.Rule = policy.ReasonAllowed, policy.Rule{Policy: "documents", File: "p.yaml", Line: 3}
	}
	return policy.Judgement{ID: "ID", Time: moment, Service: documents, Peer: peer, Decision: d, Point: "http",
		Call: policy.Call{Protocol: policy.ProtocolHTTP, Method: "GET", Path: path}}
}

// sum counts what was drained, by path.
func sum(observed []*policyv1.Observation) map[string]uint64 {
	out := make(map[string]uint64)
	for _, o := range observed {
		out[o.GetPath()] += o.GetCount()
	}
	return out
}

func TestObserve(t *testing.T) {
	tally := New(Config{})
	for i := range 3 {
		j := get(reader, "/a", true)
		j.Time = moment.Add(time.Duration(i) * time.Second)
		j.Decision.Revision += int64(i)
		tally.Observe(j)
	}
	select {
	case <-tally.Urgent():
		t.Error("an allowed call is urgent")
	default:
	}
	tally.Observe(get(reader, "/a", false))
	<-tally.Urgent()
	got, dropped := tally.Drain()
	if len(got) != 2 || dropped != 0 {
		t.Fatalf("%d observations, %d dropped: %v", len(got), dropped, got)
	}
	want := &policyv1.Observation{Count: 3, First: moment.UnixNano(), Last: moment.Add(2 * time.Second).UnixNano(), Service: documents.String(), Peer: reader.String(),
		Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Method: "GET", Path: "/a", Allowed: true, Reason: "allowed", Rule: &policyv1.RuleRef{Policy: "documents", File: "p.yaml", Line: 3},
		Epoch: "e", Revision: 9, Point: "http"}
	if !proto.Equal(got[1], want) {
		t.Errorf("counted %v\nwant %v", got[1], want)
	}
	want = &policyv1.Observation{DecisionId: "ID", Count: 1, First: moment.UnixNano(), Last: moment.UnixNano(), Service: documents.String(), Peer: reader.String(),
		Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Method: "GET", Path: "/a", Reason: "no_allow", Epoch: "e", Revision: 7, Point: "http"}
	if !proto.Equal(got[0], want) {
		t.Errorf("single %v\nwant %v", got[0], want)
	}
	if again, dropped := tally.Drain(); len(again) != 0 || dropped != 0 {
		t.Errorf("drained twice: %v, %d", again, dropped)
	}
}

func TestObserveWouldBeDenials(t *testing.T) {
	tally := New(Config{})
	j := get(reader, "/a", true)
	j.Decision.Shadow = policy.Outcome{Reason: policy.ReasonDenied, Rule: policy.Rule{Policy: "next"}}
	j.Decision.FormerlyAllowed, j.Decision.Rollout, j.Decision.Revocation = true, "roll", "rev"
	tally.Observe(j)
	got, _ := tally.Drain()
	if len(got) != 1 || got[0].GetDecisionId() != "ID" || got[0].GetShadowReason() != "denied" || got[0].GetShadowRule().GetPolicy() != "next" ||
		!got[0].GetFormerlyAllowed() || got[0].GetRollout() != "roll" || got[0].GetRevocation() != "rev" || !ShadowDiffers(got[0]) {
		t.Errorf("got %v", got)
	}
}

// TestManyPaths: paths of one peer that are made up do not hide those of another, and no call is lost from the sum.
func TestManyPaths(t *testing.T) {
	for _, services := range []int{1, 2} {
		tally := New(Config{MaxKeys: 512, Services: services})
		const calls = 100_000
		for i := range calls {
			tally.Observe(get(reader, fmt.Sprint("/", i), true))
		}
		for range 3 {
			tally.Observe(get(other, "/known", true))
		}
		got, dropped := tally.Drain()
		sums := sum(got)
		var all uint64
		for _, n := range sums {
			all += n
		}
		if len(got) > 512 || all != calls+3 || dropped != 0 || sums["/known"] != 3 || sums[""] == 0 {
			t.Errorf("%d observations of %d calls, %d dropped, %d of the other peer, %d without a path", len(got), all, dropped, sums["/known"], sums[""])
		}
		if again, _ := tally.Drain(); len(again) != 0 {
			t.Errorf("drained twice: %d", len(again))
		}
		tally.Observe(get(reader, "/again", true))
		if got, _ := tally.Drain(); sum(got)["/again"] != 1 {
			t.Errorf("after a drain there is no room: %v", got)
		}
	}
}

// TestManyPeers: beyond the bound decisions are dropped, and counted.
func TestManyPeers(t *testing.T) {
	tally := New(Config{MaxKeys: 64})
	const calls = 10_000
	for i := range calls {
		tally.Observe(get(spiffeid.RequireFromString(fmt.Sprint("spiffe://example.org/", i)), "/", true))
	}
	got, dropped := tally.Drain()
	var all uint64
	for _, n := range sum(got) {
		all += n
	}
	if len(got) > 64 || all+dropped != calls || dropped == 0 {
		t.Errorf("%d observations of %d calls, %d dropped", len(got), all, dropped)
	}
}

// TestManyDenials: denials are told one by one up to a rate, for each peer, and then counted; allowed calls keep their room.
func TestManyDenials(t *testing.T) {
	tally := New(Config{MaxKeys: 512})
	const calls = 50_000
	for i := range calls {
		tally.Observe(get(reader, fmt.Sprint("/", i), false))
	}
	tally.Observe(get(other, "/victim", false))
	tally.Observe(get(other, "/fine", true))
	got, dropped := tally.Drain()
	singles, all := map[string]int{}, uint64(0)
	for _, o := range got {
		if o.GetDecisionId() != "" {
			singles[o.GetPeer()]++
		}
		all += o.GetCount()
	}
	if singles[reader.String()] != peerSinglesBurst || singles[other.String()] != 1 || all != calls+2 || dropped != 0 || sum(got)["/fine"] != 1 {
		t.Errorf("single ones %v, %d in all, %d dropped, %d allowed", singles, all, dropped, sum(got)["/fine"])
	}
}

func TestObserveStrangeBytes(t *testing.T) {
	tally := New(Config{})
	for _, allowed := range []bool{true, false} {
		j := get(spiffeid.ID{}, "/\xff\xfe", allowed)
		j.Call.Method = "G\x80T"
		tally.Observe(j)
	}
	got, _ := tally.Drain()
	for _, o := range got {
		if o.GetPath() != "/?" || o.GetMethod() != "G?T" || o.GetPeer() != "" {
			t.Errorf("got %v", o)
		}
		if _, err := proto.Marshal(o); err != nil {
			t.Error(err)
		}
		if err := Check(o, moment.Add(-time.Hour), moment); err != nil {
			t.Error(err)
		}
	}
}

func TestOmitPaths(t *testing.T) {
	tally := New(Config{OmitPaths: true})
	tally.Observe(get(reader, "/people/jane", true))
	tally.Observe(get(reader, "/people/jane", false))
	tally.Add(&policyv1.Observation{Count: 1, Service: documents.String(), Path: "/people/jane"})
	rpc := get(reader, "/people.v1.People/Get", true)
	rpc.Call.GRPC = true
	tally.Observe(rpc)
	got, _ := tally.Drain()
	if sums := sum(got); len(got) != 4 || sums[""] != 3 || sums["/people.v1.People/Get"] != 1 {
		t.Errorf("got %v", got)
	}
}

// TestConcurrently loses nothing while it is drained.
func TestConcurrently(t *testing.T) {
	tally := New(Config{})
	const workers, calls = 8, 5000
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range calls {
				tally.Observe(get(reader, fmt.Sprint("/", w, "/", i%7), i%100 != 0))
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	var all uint64
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		got, dropped := tally.Drain()
		for _, n := range sum(got) {
			all += n
		}
		all += dropped
	}
	if all != workers*calls {
		t.Errorf("%d of %d calls", all, workers*calls)
	}
}

// TestAllowedCallsCostNothing: an allowed call that was counted before makes no garbage.
func TestAllowedCallsCostNothing(t *testing.T) {
	tally := New(Config{})
	j := get(reader, "/a", true)
	tally.Observe(j)
	if n := testing.AllocsPerRun(1000, func() { tally.Observe(j) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkObserveAllowed(b *testing.B) {
	tally := New(Config{})
	paths := make([]policy.Judgement, 64)
	for i := range paths {
		paths[i] = get(reader, fmt.Sprint("/v1/documents/", i), true)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			tally.Observe(paths[i%64])
		}
	})
}

// BenchmarkObserveNewPaths is the worst that a caller can do: each call has another path.
func BenchmarkObserveNewPaths(b *testing.B) {
	tally := New(Config{})
	paths := make([]string, 1<<16)
	for i := range paths {
		paths[i] = fmt.Sprint("/", i)
	}
	b.ReportAllocs()
	j := get(reader, "", true)
	for i := 0; b.Loop(); i++ {
		j.Call.Path = paths[i&(1<<16-1)]
		tally.Observe(j)
	}
}

func BenchmarkObserveDenied(b *testing.B) {
	tally := New(Config{})
	j := get(reader, "/a", false)
	b.ReportAllocs()
	for b.Loop() {
		tally.Observe(j)
	}
}
