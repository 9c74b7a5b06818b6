package observations

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/tally"
	"github.com/signet-id/signet/policy"
)

// A ca takes batches, or does not.
type ca struct {
	mu      sync.Mutex
	err     error
	calls   int
	counts  map[string]uint64 // by path
	ids     map[string]int
	dropped uint64
	largest int
}

func (c *ca) send(_ context.Context, observed []*policyv1.Observation, dropped uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	if c.err != nil {
		return c.err
	}
	c.largest = max(c.largest, len(observed))
	c.dropped += dropped
	for _, o := range observed {
		c.counts[o.GetPath()] += o.GetCount()
		if o.GetDecisionId() != "" {
			c.ids[o.GetDecisionId()]++
		}
	}
	return nil
}

func (c *ca) set(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

func (c *ca) sum() (n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, count := range c.counts {
		n += count
	}
	return n
}

func start(t *testing.T) (*Observations, *ca, func()) {
	c := &ca{counts: map[string]uint64{}, ids: map[string]int{}}
	o := New(Config{Send: c.send})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); o.Run(ctx) }()
	return o, c, func() { cancel(); <-done }
}

func counted(path string, n uint64) *policyv1.Observation {
	now := time.Now().UnixNano()
	return &policyv1.Observation{Count: n, First: now, Last: now, Service: "spiffe://example.org/db", Peer: "spiffe://example.org/web", Allowed: true, Reason: "allowed",
		Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Method: "GET", Path: path}
}

func denied(id string) *policyv1.Observation {
	o := counted("/", 1)
	o.DecisionId, o.Allowed, o.Reason = id, false, "no_allow"
	return o
}

func TestHandsOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, c, stop := start(t)
		o.Observe(policy.Judgement{ID: "OWN", Time: time.Now(), Service: spiffeid.RequireFromString("spiffe://example.org/db"), Decision: policy.Decision{Outcome: policy.Outcome{Reason: policy.ReasonNoAllow}}, Point: "ext_authz"})
		if err := o.Report([]*policyv1.Observation{denied("A"), counted("/a", 5)}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		if c.ids["OWN"] != 1 || c.ids["A"] != 1 || c.counts["/a"] != 5 {
			t.Errorf("after 200ms the CA has %v, %v", c.ids, c.counts)
		}
		// It was reported already: a resent report counts once.
		if err := o.Report([]*policyv1.Observation{denied("A")}); err != nil {
			t.Fatal(err)
		}
		if err := o.Report([]*policyv1.Observation{counted("/b", 1)}); err != nil {
			t.Fatal(err)
		}
		stop() // the rest is sent at the end
		if c.ids["A"] != 1 || c.counts["/b"] != 1 {
			t.Errorf("at the end the CA has %v, %v", c.ids, c.counts)
		}
		if o.Decision("A") == nil || o.Decision("OWN").GetPoint() != "ext_authz" || len(o.Decisions(tally.Filter{})) != 2 {
			t.Errorf("remembered: %v", o.Decisions(tally.Filter{}))
		}
		if reported, sent, lost := o.Stats(); reported != 9 || sent != 8 || lost != 0 {
			t.Errorf("reported %d, sent %d, lost %d", reported, sent, lost)
		}
	})
}

// TestMalformed: a report with one observation that is malformed is refused as a whole.
func TestMalformed(t *testing.T) {
	o := New(Config{})
	bad := denied("B")
	bad.Peer = "nobody"
	if err := o.Report([]*policyv1.Observation{denied("A"), bad}); err == nil || o.Decision("A") != nil {
		t.Errorf("got %v, %v", err, o.Decision("A"))
	}
	liar := denied("C")
	liar.AgentId = "spiffe://example.org/spire/agent/other"
	if err := o.Report([]*policyv1.Observation{liar}); err != nil || o.Decision("C").GetAgentId() != "" {
		t.Errorf("%v, %v", err, o.Decision("C"))
	}
}

// TestOutage: nothing is lost in an outage within the bounds, memory does not grow beyond them, calls come with growing pauses,
// and what was dropped is told.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, c, stop := start(t)
		defer stop()
		c.set(errors.New("away"))
		var want uint64
		for i := range 600 {
			for j := range 20 {
				if err := o.Report([]*policyv1.Observation{counted(fmt.Sprint("/", j), 3), denied(fmt.Sprint("D", i, "X", j))}); err != nil {
					t.Fatal(err)
				}
				want += 4
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if c.calls > 40 {
			t.Errorf("the CA was asked %d times in ten minutes of an outage", c.calls)
		}
		c.set(nil)
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if c.sum()+c.dropped != want || c.dropped > 0 || c.largest > maxBatch {
			t.Errorf("after the outage the CA has %d and %d dropped of %d, in batches of at most %d", c.sum(), c.dropped, want, c.largest)
		}
		if len(c.ids) == 0 || len(c.ids) > 2*maxSingle {
			t.Errorf("%d single ones", len(c.ids))
		}
		// Peers that are made up find no room, and that is told.
		c.set(errors.New("away"))
		want = c.sum()
		for i := range 50_000 {
			one := counted("/", 1)
			one.Peer = fmt.Sprint("spiffe://example.org/p", i)
			if err := o.Report([]*policyv1.Observation{one}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute)
		c.set(nil)
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if c.sum()+c.dropped != want+50_000 || c.dropped == 0 {
			t.Errorf("the CA has %d and %d dropped of %d", c.sum(), c.dropped, want+50_000)
		}
	})
}

// TestUnwanted: a CA of the version before is not asked again and again, and hears of it after an upgrade.
func TestUnwanted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, c, stop := start(t)
		defer stop()
		c.set(ErrUnwanted)
		for i := range 3600 {
			if err := o.Report([]*policyv1.Observation{denied(fmt.Sprint("D", i))}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if c.calls > 15 {
			t.Errorf("it was asked %d times in an hour", c.calls)
		}
		c.set(nil)
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		if c.sum()+c.dropped != 3600 {
			t.Errorf("after its upgrade it has %d and %d dropped of 3600", c.sum(), c.dropped)
		}
	})
}

// TestRejected: a batch that the CA will never take does not stand in the way of others.
func TestRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, c, stop := start(t)
		defer stop()
		c.set(&Rejection{errors.New("malformed")})
		if err := o.Report([]*policyv1.Observation{denied("A")}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		c.set(nil)
		if err := o.Report([]*policyv1.Observation{denied("B")}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if _, _, lost := o.Stats(); c.ids["A"] != 0 || c.ids["B"] != 1 || lost != 1 {
			t.Errorf("the CA has %v, %d lost", c.ids, lost)
		}
	})
}

// TestFlood: a million observations of 100,000 paths from one service leave room for what others report.
func TestFlood(t *testing.T) {
	c := &ca{counts: map[string]uint64{}, ids: map[string]int{}}
	o := New(Config{Send: c.send})
	quiet := counted("/quiet", 1)
	quiet.Service = "spiffe://example.org/quiet"
	batch := make([]*policyv1.Observation, 1000)
	for i := range 1000 {
		for j := range batch {
			batch[j] = counted(fmt.Sprint("/", (1000*i+j)%100_000), 1)
		}
		if err := o.Report(batch); err != nil {
			t.Fatal(err)
		}
	}
	single := denied("QUIET")
	single.Service = quiet.Service
	if err := o.Report([]*policyv1.Observation{quiet, single}); err != nil {
		t.Fatal(err)
	}
	if err := o.send(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c.sum()+c.dropped != 1_000_002 || c.dropped != 0 || c.counts["/quiet"] != 1 || c.ids["QUIET"] != 1 || len(c.counts) > maxKeys {
		t.Errorf("the CA has %d and %d dropped, %d paths, %d of the other service", c.sum(), c.dropped, len(c.counts), c.counts["/quiet"])
	}
}
