package source

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/internal/tally"
	"github.com/signet-id/signet/policy"
)

const (
	// reportEvery is how often counts are reported, reportSoon how long a denial waits for others, and reportGap the shortest
	// time between two reports.
	reportEvery = 10 * time.Second
	reportSoon  = 50 * time.Millisecond
	reportGap   = 500 * time.Millisecond
	// reportTimeout bounds one report, and closeTimeout the last one.
	reportTimeout = 10 * time.Second
	closeTimeout  = time.Second
	lastReportTry = time.Minute

	// maxReport and maxReportBytes bound one report, well below what the agent's socket takes.
	maxReport      = 500
	maxReportBytes = 128 << 10
)

// Observe takes note of a decision, to report it to the agent: it makes a Source a policy.Observer. It does not block.
// Allowed calls are counted; denials are reported one by one, unless there are very many.
func (s *Source) Observe(j policy.Judgement) {
	if r := s.reports; r.wanted.Load() {
		r.tally.Observe(j)
	}
}

// A reporter tells the agent what was decided. It keeps what it could not tell within bounds, and its agent is not asked
// again before the contact is made anew if it wants no reports.
type reporter struct {
	source *Source
	tally  *tally.Tally
	wanted atomic.Bool
	again  chan struct{} // one slot: the contact was made anew

	pending []*policyv1.Observation // drained and not told yet; run's own

	cancel    context.CancelFunc
	closing   context.Context
	done      chan struct{}
	closeOnce sync.Once
}

func newReporter(s *Source) *reporter {
	r := &reporter{source: s, tally: tally.New(tally.Config{}), again: make(chan struct{}, 1), done: make(chan struct{})}
	r.wanted.Store(true)
	r.closing, r.cancel = context.WithCancel(context.Background())
	return r
}

// connected is told that a watch of policies has begun: the agent may be another one.
func (r *reporter) connected() {
	r.wanted.Store(true)
	select {
	case r.again <- struct{}{}:
	default:
	}
}

// close reports the rest and ends run.
func (r *reporter) close() {
	r.closeOnce.Do(r.cancel)
	<-r.done
}

// run reports until the reporter is closed. ctx ends the reports under way.
func (r *reporter) run(ctx context.Context) {
	defer close(r.done)
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	defer func() {
		last, cancel := context.WithTimeout(ctx, closeTimeout)
		defer cancel()
		_ = r.report(last) // what cannot be told now is lost with the program
	}()
	wait := firstRetry
	for {
		if !r.pause(reportEvery/2+rand.N(reportEvery/2), r.tally.Urgent()) || !r.pause(reportSoon, nil) {
			return
		}
		err := r.report(ctx)
		if err == nil {
			wait = firstRetry
			if !r.pause(reportGap, nil) {
				return
			}
			continue
		}
		// Half to the whole of the wait, so that workloads of a restarted agent do not all come back at once.
		if !r.pause(wait/2+rand.N(wait/2), r.again) {
			return
		}
		wait = min(2*wait, lastReportTry)
	}
}

// pause waits for a time or for sooner, and returns false if the reporter is closed meanwhile.
func (r *reporter) pause(d time.Duration, sooner <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-r.closing.Done():
		return false
	case <-sooner:
	case <-timer.C:
	}
	return true
}

// report tells the agent all there is. What it does not take at the moment stays pending.
func (r *reporter) report(ctx context.Context) error {
	if len(r.pending) == 0 {
		// Who calls is told apart by the agent, for each of whose IDs alone it takes reports.
		own := make(map[string]bool)
		for _, id := range r.source.ServiceIDs() {
			own[id.String()] = true
		}
		observed, _ := r.tally.Drain()
		for _, o := range observed {
			if own[o.GetService()] {
				r.pending = append(r.pending, o)
			}
		}
	}
	for len(r.pending) > 0 {
		n := batch(r.pending)
		call, cancel := context.WithTimeout(ctx, reportTimeout)
		_, err := policyapi.NewPoliciesClient(r.source.conn).Report(call, &policyapi.ReportRequest{Observations: r.pending[:n]})
		cancel()
		switch status.Code(err) {
		case codes.OK:
		case codes.Unimplemented:
			// An agent of the version before, or one whose configuration has observations off.
			r.wanted.Store(false)
			r.pending = nil
			r.tally.Drain()
			return nil
		case codes.InvalidArgument:
			r.source.options.Log.Debug("the agent refused a report of decisions", "err", err)
		default:
			r.source.options.Log.Debug("decisions could not be reported to the agent; they are kept within bounds", "err", err)
			return err
		}
		r.pending = r.pending[n:]
	}
	r.pending = nil
	return nil
}

// batch is how many of observed go into one report.
func batch(observed []*policyv1.Observation) int {
	size := 0
	for i, o := range observed {
		if size += proto.Size(o); i == maxReport || i > 0 && size > maxReportBytes {
			return i
		}
	}
	return len(observed)
}
