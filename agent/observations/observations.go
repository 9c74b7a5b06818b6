// Package observations knows what the enforcement points on this node decided: it takes their reports and what the agent
// decides itself, remembers the denials for operators of this node, and hands everything on to the CA in batches. Whatever
// happens to the CA, what waits for it is bounded, and what found no room is counted.
package observations

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/tally"
	"github.com/signet-id/signet/policy"
)

// Bounds of what an agent holds.
const (
	// maxKeys and maxSingle are what waits for the CA: different calls that are counted, and denials one by one. As many again
	// may be under way.
	maxKeys, maxSingle = 16384, 4096
	// maxKept and keep are how many denials are remembered for operators of this node, and for how long.
	maxKept = 4096
	keep    = 24 * time.Hour
	// oldest is the age of an observation beyond which its time is moved.
	oldest = 7 * 24 * time.Hour
)

const (
	// sendEvery is how often counts are sent, sendSoon how long a denial waits for others, and sendGap the shortest time
	// between two batches: Follow shares the connection.
	sendEvery = 10 * time.Second
	sendSoon  = 50 * time.Millisecond
	sendGap   = 200 * time.Millisecond
	firstTry  = time.Second
	lastTry   = time.Minute
	// unwantedTry is when a CA that knows nothing of observations is asked again: it may have been upgraded.
	unwantedTry  = 10 * time.Minute
	sweepEvery   = 10 * time.Minute
	closeTimeout = time.Second

	// maxBatch is the most observations of a batch [signet.node.v1], and maxBatchBytes well below what the CA takes.
	maxBatch      = 1000
	maxBatchBytes = 512 << 10
)

// ErrUnwanted is what Config.Send returns if the CA knows nothing of observations.
var ErrUnwanted = errors.New("the CA takes no observations")

// A Rejection is what Config.Send returns if the CA will never take a batch.
type Rejection struct{ Err error }

func (r *Rejection) Error() string { return r.Err.Error() }
func (r *Rejection) Unwrap() error { return r.Err }

// Config says where observations go.
type Config struct {
	// Send hands a batch to the CA, and how many more decisions there were. The error is ErrUnwanted, a *Rejection, or passing.
	Send func(ctx context.Context, observed []*policyv1.Observation, dropped uint64) error
	// OmitPaths keeps no paths but those of gRPC.
	OmitPaths bool
	// Log gets what operators should know. Nil means nowhere.
	Log *slog.Logger
	// Now is the wall clock. Nil means time.Now.
	Now func() time.Time
}

// Observations are those of one agent. They are a policy.Observer for the decisions that the agent makes itself.
type Observations struct {
	config Config
	tally  *tally.Tally
	kept   *tally.Kept

	pending []*policyv1.Observation // drained and not sent yet; Run's own
	dropped uint64                  // not told yet; Run's own

	reported, sent, lost atomic.Uint64
}

// New returns Observations that send nothing until Run.
func New(c Config) *Observations {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Observations{
		config: c, tally: tally.New(tally.Config{MaxKeys: maxKeys, MaxSingle: maxSingle, Services: 2, OmitPaths: c.OmitPaths}),
		kept: tally.NewKept(tally.KeptConfig{MaxRecords: maxKept, Keep: keep, Bucket: time.Hour, Now: c.Now}),
	}
}

// Observe takes note of a decision that the agent made. It does not block.
func (o *Observations) Observe(j policy.Judgement) {
	o.reported.Add(1)
	if !j.Decision.Allowed || j.Decision.ShadowDiffers() {
		o.kept.Add(tally.Single(j, o.config.OmitPaths))
	}
	o.tally.Observe(j)
}

// Report takes the observations of an enforcement point, whose service is known to be the reporter's own. The error says
// which of them is malformed; then none is taken.
func (o *Observations) Report(observed []*policyv1.Observation) error {
	now := o.config.Now()
	for i, one := range observed {
		if err := tally.Check(one, now.Add(-oldest), now); err != nil {
			return fmt.Errorf("observations[%d].%w", i, err)
		}
		one.AgentId = "" // the CA fills it in
	}
	for _, one := range observed {
		o.reported.Add(one.GetCount())
		if one.GetDecisionId() != "" {
			if o.config.OmitPaths {
				tally.OmitPath(one)
			}
			// What is kept is never changed, and what is sent is not either.
			if o.kept.Add(one) == nil {
				continue // it was reported before
			}
		}
		o.tally.Add(one)
	}
	return nil
}

// Decision returns a denial, or what would be one, by its id. Nil: it is not, or no longer, known here.
func (o *Observations) Decision(id string) *policyv1.Observation { return o.kept.Get(id) }

// Reports returns all reports of one denial. See tally.Kept.
func (o *Observations) Reports(id string) []*policyv1.Observation { return o.kept.Reports(id) }

// Decisions lists the denials, and what would be some, that are known here.
func (o *Observations) Decisions(f tally.Filter) []*policyv1.Observation { return o.kept.List(f) }

// Keep is for how long denials are known here, and how many.
func (o *Observations) Keep() (time.Duration, int) { return keep, maxKept }

// Stats are counters since the beginning: decisions reported to this agent, handed on to the CA, and lost for want of room.
func (o *Observations) Stats() (reported, sent, lost uint64) {
	return o.reported.Load(), o.sent.Load(), o.lost.Load()
}

// Run hands observations on until ctx ends, and then for at most a second what is left.
func (o *Observations) Run(ctx context.Context) {
	defer func() {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		_ = o.send(last) // what the CA does not take now is lost with this process
	}()
	wait, swept := firstTry, time.Now()
	for {
		if time.Since(swept) > sweepEvery {
			o.kept.Sweep()
			swept = time.Now()
		}
		if !pause(ctx, sendEvery/2+rand.N(sendEvery/2), o.tally.Urgent()) || !pause(ctx, sendSoon, nil) {
			return
		}
		err := o.send(ctx)
		if err == nil {
			wait = firstTry
			continue
		}
		// Half to the whole of the wait: the agents of a CA that is back do not all come at once.
		again := wait/2 + rand.N(wait/2)
		if errors.Is(err, ErrUnwanted) {
			again = unwantedTry/2 + rand.N(unwantedTry/2)
		}
		o.config.Log.Debug("decisions could not be reported to the CA", "retry_in", again, "err", err)
		if !pause(ctx, again, nil) {
			return
		}
		wait = min(2*wait, lastTry)
	}
}

// pause waits for a time or for sooner, and returns false if ctx ends meanwhile.
func pause(ctx context.Context, d time.Duration, sooner <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-sooner:
	case <-timer.C:
	}
	return true
}

// send hands on all there is. What the CA does not take at the moment stays pending.
func (o *Observations) send(ctx context.Context) error {
	if len(o.pending) == 0 {
		var dropped uint64
		o.pending, dropped = o.tally.Drain()
		o.dropped += dropped
		o.lost.Add(dropped)
	}
	for len(o.pending) > 0 || o.dropped > 0 {
		n := batch(o.pending)
		err := o.config.Send(ctx, o.pending[:n], o.dropped)
		if rejected, ok := errors.AsType[*Rejection](err); ok {
			o.config.Log.Warn("the CA refused a batch of observations, which is lost", "observations", n, "err", rejected)
			for _, one := range o.pending[:n] {
				o.lost.Add(one.GetCount())
			}
			err = nil
		} else if err == nil {
			for _, one := range o.pending[:n] {
				o.sent.Add(one.GetCount())
			}
		}
		if err != nil {
			return err
		}
		o.pending, o.dropped = o.pending[n:], 0
		if !pause(ctx, sendGap, nil) {
			return ctx.Err()
		}
	}
	o.pending = nil
	return nil
}

// batch is how many of observed go into one batch.
func batch(observed []*policyv1.Observation) int {
	size := 0
	for i, one := range observed {
		if size += proto.Size(one); i == maxBatch || i > 0 && size > maxBatchBytes {
			return i
		}
	}
	return len(observed)
}
