package workloadattest

import (
	"context"
	"sync"
	"time"
)

// A Health is how one method fares.
type Health struct {
	// Method is its name.
	Method string
	// Unavailable says why what it asks does not answer now; nil if it does, or if it asks nobody.
	Unavailable error
	// Asked counts the processes that were looked at, Incomplete those about which something could not be found out.
	Asked, Incomplete int64
	// Last is what could not be found out last, about which process and when; nil: nothing was missing yet.
	Last    error
	LastPID int32
	LastAt  time.Time
}

// A tally is what one method's calls came to.
type tally struct {
	mu     sync.Mutex
	health Health // without Method and Unavailable
}

func (t *tally) note(pid int32, at time.Time, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.health.Asked++
	if err != nil {
		t.health.Incomplete++
		t.health.Last, t.health.LastPID, t.health.LastAt = err, pid, at
	}
}

// Health says how each method fares, in their order. Those that depend on others ask them now, side by side, and for as
// long as attesting one process may take.
func (a *Attestor) Health(ctx context.Context) []Health {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Timeout)
	defer cancel()
	all := make([]Health, len(a.cfg.Methods))
	var wg sync.WaitGroup
	for i, m := range a.cfg.Methods {
		t := &a.tallies[i]
		t.mu.Lock()
		all[i] = t.health
		t.mu.Unlock()
		all[i].Method = m.Name()
		if d, ok := m.(Dependent); ok {
			wg.Go(func() { all[i].Unavailable = d.Available(ctx) })
		}
	}
	wg.Wait()
	return all
}
