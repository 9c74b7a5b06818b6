// Package observations keeps what enforcement points decided, as agents report it to this replica: in memory, bounded in
// number and time, and in files, so that a restart forgets nothing that is older than a few seconds. It is for operators
// who ask why, never for issuance: what cannot be written is dropped and counted, and nobody waits for its disk.
package observations

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/tally"
)

// Defaults of Config.
const (
	DefaultKeep       = 7 * 24 * time.Hour
	DefaultMaxRecords = 100_000
)

const (
	// bucket is the span of time in which counts are added up.
	bucket = time.Hour
	// perSecond bounds what all agents together report: beyond it they are asked to come again later.
	perSecond, burst = 20_000, 40_000

	saveEvery       = time.Second
	saveCountsEvery = 30 * time.Second
	sweepEvery      = time.Minute
	// tellEvery is how often the same trouble is logged.
	tellEvery = time.Minute
)

// Config says what is kept, and where.
type Config struct {
	// Dir holds the files. It is made if there is none.
	Dir string
	// Keep is for how long observations are kept, MaxRecords how many. One with long texts counts as several.
	Keep       time.Duration
	MaxRecords int
	// Observed is told of each observation before it is kept, with its agent. It must neither block nor change it. May be nil.
	Observed func(*policyv1.Observation)
	Now      func() time.Time
	Log      *slog.Logger
}

// Observations are those of one replica. They are safe for concurrent use.
type Observations struct {
	config Config
	kept   *tally.Kept
	limit  *rate.Limiter
	files  files // Run's own after Open

	accepted, refused, dropped, unsaved atomic.Uint64

	told rate.Sometimes
	mu   sync.Mutex
	bad  error // why nothing is written; guarded by mu
}

// Open reads what an earlier run has kept. Files that are damaged are set aside. The error is about the directory only;
// without it the caller may go on with what is returned, which then is kept in memory alone.
func Open(c Config) (*Observations, error) {
	o := &Observations{
		config: c, kept: tally.NewKept(tally.KeptConfig{MaxRecords: c.MaxRecords, Keep: c.Keep, Bucket: bucket, Now: c.Now, Track: true}),
		limit: rate.NewLimiter(perSecond, burst), told: rate.Sometimes{Interval: tellEvery},
	}
	err := o.files.open(c.Dir, c.Log, func(one *policyv1.Observation) {
		if tally.Check(one, c.Now().Add(-2*c.Keep), c.Now()) == nil {
			o.kept.Restore(one)
		}
	})
	o.kept.Changed(true) // what was restored is in the files
	if err == nil && o.files.untidy {
		if err := o.files.compact(o.kept); err != nil {
			c.Log.Warn("observations could not be written anew", "err", err) // what is damaged stays where it is until they can be
		}
	}
	if err != nil {
		err = fmt.Errorf("observations: %w", err)
		o.bad = err
	}
	return o, err
}

// A BusyError says that all agents together report too much.
type BusyError struct{ RetryAfter time.Duration }

func (e *BusyError) Error() string {
	return fmt.Sprintf("agents report more than %d observations a second to this CA", perSecond)
}

// Add takes what an agent reports, of which mine says whether its service is one that the agent may serve: what is not,
// or malformed, is left out and counted. The error is a *BusyError; then nothing was taken.
func (o *Observations) Add(agent string, observed []*policyv1.Observation, mine func(i int) bool, dropped uint64) error {
	now := time.Now()
	if r := o.limit.ReserveN(now, min(len(observed), burst)); r.DelayFrom(now) > 0 {
		wait := r.DelayFrom(now)
		r.CancelAt(now)
		return &BusyError{RetryAfter: wait}
	}
	o.dropped.Add(min(dropped, 1<<40))
	wall := o.config.Now()
	for i, one := range observed {
		if one == nil || !mine(i) {
			o.refused.Add(1)
			continue
		}
		if err := tally.Check(one, wall.Add(-o.config.Keep), wall); err != nil {
			o.refused.Add(1)
			o.told.Do(func() { o.config.Log.Warn("an agent reports a malformed observation", "node_id", agent, "err", err) })
			continue
		}
		one.AgentId = agent
		o.accepted.Add(one.GetCount())
		if o.config.Observed != nil {
			o.config.Observed(one)
		}
		o.kept.Add(one)
	}
	return nil
}

// Decision returns a single decision by its id. Nil: it is not, or no longer, known.
func (o *Observations) Decision(id string) *policyv1.Observation { return o.kept.Get(id) }

// Reports returns all reports of a single decision. See tally.Kept.
func (o *Observations) Reports(id string) []*policyv1.Observation { return o.kept.Reports(id) }

// List returns observations in the order of their last occurrence. They must not be changed.
func (o *Observations) List(f tally.Filter) []*policyv1.Observation { return o.kept.List(f) }

// Keep is for how long observations are kept.
func (o *Observations) Keep() time.Duration { return o.config.Keep }

// Stats are counters since the start, and what is there.
type Stats struct {
	// Accepted counts decisions that agents reported; Refused reports that were malformed or about somebody else's service;
	// Dropped decisions that agents say they had no room for.
	Accepted, Refused, Dropped uint64
	// Unsaved counts records that are not in the files, because these could not be written.
	Unsaved uint64
	Records int
	Bytes   int64
}

// Stats returns the counters.
func (o *Observations) Stats() Stats {
	return Stats{Accepted: o.accepted.Load(), Refused: o.refused.Load(), Dropped: o.dropped.Load(), Unsaved: o.unsaved.Load(), Records: o.kept.Len(), Bytes: o.files.bytes.Load()}
}

// Trouble is why observations are kept in memory alone at the moment, or nil.
func (o *Observations) Trouble() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.bad
}

// Run writes to the files until ctx ends, and then what is left. It is called once, and closes the files.
func (o *Observations) Run(ctx context.Context) {
	defer o.files.close()
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	counted, swept := time.Now(), time.Now()
	for {
		select {
		case <-ctx.Done():
			o.save(true)
			return
		case <-tick.C:
		}
		counts := time.Since(counted) >= saveCountsEvery
		if counts {
			counted = time.Now()
		}
		o.save(counts)
		if time.Since(swept) >= sweepEvery {
			swept = time.Now()
			o.kept.Sweep()
			o.note(o.files.compact(o.kept))
		}
	}
}

// save writes what is new.
func (o *Observations) save(counts bool) {
	changed := o.kept.Changed(counts)
	if len(changed) == 0 {
		return
	}
	written, err := o.files.append(changed)
	o.unsaved.Add(uint64(len(changed) - written))
	o.note(err)
}

// note remembers and logs why the files cannot be written.
func (o *Observations) note(err error) {
	o.mu.Lock()
	was := o.bad
	o.bad = err
	o.mu.Unlock()
	switch {
	case err != nil && was == nil:
		o.config.Log.Warn("observations are kept in memory alone, and a restart forgets them", "err", err)
	case err == nil && was != nil:
		o.config.Log.Info("observations are written again")
	}
}
