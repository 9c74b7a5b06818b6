package source

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/policy"
)

// A reported is what an agent was told.
type reported struct {
	refuse error // what every report is answered with; nil: it is taken
	calls  int
	counts map[string]uint64 // by path
	ids    map[string]int
	most   int // bytes of the largest report
}

func (a *agent) Report(_ context.Context, r *policyapi.ReportRequest) (*policyapi.ReportResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reports.calls++
	if a.reports.refuse != nil {
		return nil, a.reports.refuse
	}
	a.reports.most = max(a.reports.most, proto.Size(r))
	for _, o := range r.GetObservations() {
		a.reports.counts[o.GetPath()] += o.GetCount()
		if o.GetDecisionId() != "" {
			a.reports.ids[o.GetDecisionId()]++
		}
	}
	return &policyapi.ReportResponse{}, nil
}

// told looks at what the agent was told.
func (a *agent) told(f func(r *reported)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f(&a.reports)
}

func (a *agent) sum() (n uint64) {
	a.told(func(r *reported) {
		for _, c := range r.counts {
			n += c
		}
	})
	return n
}

func newReporting(t *testing.T) (*agent, *Source) {
	a := newAgent(t)
	a.reports = reported{counts: map[string]uint64{}, ids: map[string]int{}}
	return a, newSource(t, a, nil)
}

func judged(path string, allowed bool) policy.Judgement {
	d := policy.Decision{Outcome: policy.Outcome{Allowed: allowed, Reason: policy.ReasonNoAllow}}
	if allowed {
		d.Reason = policy.ReasonAllowed
	}
	return policy.Judgement{ID: rand.Text(), Time: time.Now(), Service: spiffeid.RequireFromString("spiffe://example.org/docs"), Peer: spiffeid.RequireFromString("spiffe://example.org/web"),
		Decision: d, Point: "http", Call: policy.Call{Protocol: policy.ProtocolHTTP, Method: "GET", Path: path}}
}

// TestReport: denials are told soon, counts at the end at the latest, and nothing about services that are not the workload's.
func TestReport(t *testing.T) {
	a, s := newReporting(t)
	var observer policy.Observer = s
	for range 1000 {
		observer.Observe(judged("/a", true))
	}
	other := judged("/other", false)
	other.Service = spiffeid.RequireFromString("spiffe://example.org/other")
	observer.Observe(other)
	one := judged("/d", false)
	observer.Observe(one)
	await(t, "the denial", func() (found bool) {
		a.told(func(r *reported) { found = r.ids[one.ID] == 1 })
		return found
	})
	observer.Observe(judged("/end", true))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	a.told(func(r *reported) {
		if r.counts["/a"] != 1000 || r.counts["/end"] != 1 || r.counts["/other"] != 0 || len(r.ids) != 1 {
			t.Errorf("told %v, %v", r.counts, r.ids)
		}
	})
	observer.Observe(judged("/late", true)) // after Close it does no harm
}

// TestReportToAnAgentOfBefore: it is asked once, costs nothing from then on, and again when the contact is made anew.
func TestReportToAnAgentOfBefore(t *testing.T) {
	a, s := newReporting(t)
	a.told(func(r *reported) { r.refuse = status.Error(codes.Unimplemented, "unknown method Report") })
	s.Observe(judged("/a", false))
	await(t, "the answer", func() bool { return !s.reports.wanted.Load() })
	for range 1000 {
		s.Observe(judged("/a", false))
	}
	if observed, dropped := s.reports.tally.Drain(); len(observed) != 0 || dropped != 0 {
		t.Errorf("%d decisions are held for an agent that wants none", len(observed))
	}
	a.told(func(r *reported) {
		if r.calls != 1 {
			t.Errorf("it was asked %d times", r.calls)
		}
		r.refuse = nil
	})
	a.stop()
	waitLost(t, s)
	a.start(t)
	<-s.Updated()
	one := judged("/b", false)
	s.Observe(one)
	await(t, "the denial at an agent that was upgraded", func() (found bool) {
		a.told(func(r *reported) { found = r.ids[one.ID] == 1 })
		return found
	})
}

// TestReportOutage: what was decided while the agent was away is told when it is back, in reports that it takes; a report that it
// will never take stands in nobody's way, and Close waits for no agent that is away.
func TestReportOutage(t *testing.T) {
	a, s := newReporting(t)
	a.stop()
	waitLost(t, s)
	const paths, each = 3000, 3
	for range each {
		for i := range paths {
			j := judged(fmt.Sprint("/", i), true)
			j.Peer = spiffeid.RequireFromString(fmt.Sprint("spiffe://example.org/", i%16, "/a-service-with-a-long-name-that-fills-reports"))
			s.Observe(j)
		}
	}
	a.start(t)
	<-s.Updated()
	s.Observe(judged("/back", false))
	await(t, "all that was decided", func() bool { return a.sum() == each*paths+1 })
	a.told(func(r *reported) {
		if r.most > maxReportBytes+4096 {
			t.Errorf("a report has %d bytes", r.most)
		}
		r.refuse, r.calls = status.Error(codes.InvalidArgument, "malformed"), 0
	})
	s.Observe(judged("/refused", false))
	await(t, "the refused report", func() (found bool) {
		a.told(func(r *reported) {
			if found = r.calls > 0; found {
				r.refuse = nil
			}
		})
		return found
	})
	one := judged("/after", false)
	s.Observe(one)
	await(t, "the report after it", func() (found bool) {
		a.told(func(r *reported) { found = r.ids[one.ID] == 1 })
		return found
	})
	a.stop()
	waitLost(t, s)
	s.Observe(judged("/lost", false))
	began := time.Now()
	if err := s.Close(); err != nil || time.Since(began) > 10*time.Second {
		t.Errorf("Close took %v: %v", time.Since(began), err)
	}
	a.start(t)
}

// BenchmarkObserve is what an allowed call costs beyond its decision.
func BenchmarkObserve(b *testing.B) {
	s := &Source{options: Options{Log: slog.New(slog.DiscardHandler)}}
	s.reports = newReporter(s)
	j := judged("/v1/documents/7", true)
	b.ReportAllocs()
	for b.Loop() {
		s.Observe(j)
	}
	close(s.reports.done)
}
