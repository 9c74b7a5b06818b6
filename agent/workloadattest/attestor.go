// Package workloadattest finds out what a calling process is and says it in selectors. It puts the methods of
// attestation together and remembers, for each pinned process, what they found. The agent hands it to the Workload API
// endpoint; it knows no registration entries and decides nothing.
package workloadattest

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// A Method finds selectors of one type, such as unix. It is called concurrently. One that holds something, such as
// connections, is an io.Closer.
type Method interface {
	// Name is the type of the method's selectors.
	Name() string

	// Selectors returns what holds for the process in the given state. What cannot be found out is left out and told by
	// the error; the selectors that are returned beside an error count. It returns soon after ctx ends.
	Selectors(ctx context.Context, p *peer.Process, state peer.Snapshot) ([]spiffe.Selector, error)
}

// A Gradual is a Method that knows some selectors of a process before the others, such as those of a pod before those of the
// container.
type Gradual interface {
	Method

	// Gradually is Selectors that returns what it knows, with more true, as soon as enough says that this will do. later tells of
	// a selector whether it may be among those that are still to be found out. What is returned beside more holds.
	Gradually(ctx context.Context, p *peer.Process, state peer.Snapshot, enough Enough) (selectors []spiffe.Selector, more bool, err error)
}

// Enough tells whether who has these selectors, all of one method, need not wait for further ones of the method of which later is
// true: what is asked about matches by these, and whatever may match by those besides does not. A nil one is never so.
type Enough func(have []spiffe.Selector, later func(spiffe.Selector) bool) bool

// A Dependent is a Method that asks something that may be away, such as the kubelet or an engine's socket.
type Dependent interface {
	// Available returns nil if what the method asks answers now, or is known not to be on this machine and so needs not
	// to. It returns soon after ctx ends.
	Available(ctx context.Context) error
}

// A Doubter is a Method that knows when its selectors may stop to hold although the state stays the same. It is asked after
// Selectors.
type Doubter interface {
	Doubts(p *peer.Process, state peer.Snapshot) bool
}

// Config says how processes are attested.
type Config struct {
	// Methods are asked for every process, all at the same time. At least one.
	Methods []Method

	// Timeout is how long a method may take for one process that is not Patient. Zero means 5 s.
	Timeout time.Duration

	// MaxAge is how long a result is kept for a process that does not change. Zero means 5 minutes. What is found out by
	// asking others, such as a user's name, may change meanwhile.
	MaxAge time.Duration

	// MaxCached bounds the processes whose results are kept. Zero means 16384.
	MaxCached int

	// Log gets what a method could not find out. Nil means nowhere.
	Log *slog.Logger

	// Now is the clock for MaxAge. Nil means time.Now.
	Now func() time.Time

	// Enough, if not nil, lets a Gradual method answer before it knows all.
	Enough Enough

	// OnFailure, if not nil, is told the name of a method that could not find out everything. It must not block.
	OnFailure func(method string)
}

// Patient is a Method that waits longer than Timeout for what is just coming to be, such as a container that its manager does not
// list yet. It sees to it itself that nobody waits so long for a manager that does not answer.
type Patient interface{ Patience() time.Duration }

// An Attestor asks all methods. It satisfies workloadapi.Attestor.
type Attestor struct {
	cfg Config

	mu    sync.Mutex
	known map[uint64]*list.Element // by peer.Process.ID; the values are *result
	used  *list.List               // the most recently used first

	tallies []tally // one for each method, in their order
}

// A result is what was found out about one process in one state. It is not changed once it is known.
type result struct {
	process uint64
	caller  workloadapi.Caller
	at      time.Time
	missing string // what could not be found out, or empty
}

// New returns an Attestor.
func New(cfg Config) (*Attestor, error) {
	if len(cfg.Methods) == 0 {
		return nil, errors.New("workload attestation: Methods is empty: no process could be told from another")
	}
	names := map[string]bool{}
	for _, m := range cfg.Methods {
		if m == nil || m.Name() == "" {
			return nil, errors.New("workload attestation: a method without a name")
		}
		if names[m.Name()] {
			return nil, fmt.Errorf("workload attestation: method %q is there twice", m.Name())
		}
		names[m.Name()] = true
	}
	if cfg.Timeout < 0 || cfg.MaxAge < 0 || cfg.MaxCached < 0 {
		return nil, fmt.Errorf("workload attestation: Timeout %s, MaxAge %s and MaxCached %d: must not be negative", cfg.Timeout, cfg.MaxAge, cfg.MaxCached)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.MaxAge == 0 {
		cfg.MaxAge = 5 * time.Minute
	}
	if cfg.MaxCached == 0 {
		cfg.MaxCached = 16384
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Attestor{cfg: cfg, known: map[uint64]*list.Element{}, used: list.New(), tallies: make([]tally, len(cfg.Methods))}, nil
}

// Close closes the methods that are io.Closers. Calls of Attest that are under way end soon.
func (a *Attestor) Close() error {
	var errs []error
	for _, m := range a.cfg.Methods {
		if c, ok := m.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// Attest returns the process with all its selectors. See workloadapi.Attestor.
//
// A result is used again only for the same pinned process in the same state. One with something missing is never used
// again, so that a passing failure passes, and neither is one that a method doubts, nor one to which more is to come.
func (a *Attestor) Attest(ctx context.Context, p *peer.Process) (workloadapi.Caller, error) {
	state, err := p.Snapshot()
	if err != nil {
		return workloadapi.Caller{}, err
	}
	before := a.recall(p.ID())
	if before != nil && before.missing == "" && !before.caller.Fleeting && !before.caller.Provisional && before.caller.State.Equal(state) && a.cfg.Now().Sub(before.at) < a.cfg.MaxAge {
		caller := before.caller
		caller.Known = true
		return caller, nil
	}
	at := a.cfg.Now()
	selectors, more, missing, settled := a.ask(ctx, p, state)
	if err := ctx.Err(); err != nil {
		return workloadapi.Caller{}, context.Cause(ctx)
	}
	// Methods read by process id. What they read is about this process only if it has held the id until now.
	if err := p.Alive(); err != nil {
		return workloadapi.Caller{}, err
	}
	r := &result{process: p.ID(), at: at, caller: workloadapi.Caller{
		PID: p.PID, UID: state.EffectiveUID, GID: state.EffectiveGID, Selectors: selectors, State: state, Fleeting: a.doubtful(p, state), Provisional: more,
	}}
	if missing != nil {
		r.missing = missing.Error()
		if before == nil || before.missing != r.missing {
			a.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "workload attestation is incomplete", slog.Int("pid", int(p.PID)),
				slog.Uint64("uid", uint64(p.UID)), slog.Any("err", missing))
		}
	}
	if settled != nil {
		a.cfg.Log.LogAttrs(ctx, slog.LevelDebug, "selectors that the process does not have", slog.Int("pid", int(p.PID)),
			slog.Uint64("uid", uint64(p.UID)), slog.Any("why", settled))
	}
	a.remember(r)
	return r.caller, nil
}

// ask asks the methods side by side. One that fails, is too slow or returns selectors of another type hides nothing of
// the others. missing is what failed, settled what is not to be had; more says that a method has more to come.
func (a *Attestor) ask(ctx context.Context, p *peer.Process, state peer.Snapshot) (all []spiffe.Selector, more bool, missing, settled error) {
	type answer struct {
		selectors []spiffe.Selector
		more      bool
		err       error
	}
	answers := make([]answer, len(a.cfg.Methods))
	var wg sync.WaitGroup
	for i, m := range a.cfg.Methods {
		timeout := a.cfg.Timeout
		if m, ok := m.(Patient); ok {
			timeout = max(timeout, m.Patience())
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			if g, ok := m.(Gradual); ok && a.cfg.Enough != nil {
				answers[i].selectors, answers[i].more, answers[i].err = g.Gradually(ctx, p, state, a.cfg.Enough)
				return
			}
			answers[i].selectors, answers[i].err = m.Selectors(ctx, p, state)
		})
	}
	wg.Wait()

	var failures, absences []error
	seen := map[spiffe.Selector]bool{}
	for i, m := range a.cfg.Methods {
		more = more || answers[i].more
		err, absent := unsettled(answers[i].err)
		if absent != nil {
			absences = append(absences, fmt.Errorf("%s: %w", m.Name(), absent))
		}
		for _, s := range answers[i].selectors {
			if s.Type != m.Name() {
				err = errors.Join(err, fmt.Errorf("selector %q is not of the method's type", s))
				continue
			}
			if bad := s.Check(); bad != nil {
				err = errors.Join(err, bad)
				continue
			}
			if !seen[s] {
				seen[s] = true
				all = append(all, s)
			}
		}
		a.tallies[i].note(p.PID, a.cfg.Now(), err)
		if err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", m.Name(), err))
			if a.cfg.OnFailure != nil {
				a.cfg.OnFailure(m.Name())
			}
		}
	}
	return all, more, errors.Join(failures...), errors.Join(absences...)
}

func (a *Attestor) doubtful(p *peer.Process, state peer.Snapshot) bool {
	return slices.ContainsFunc(a.cfg.Methods, func(m Method) bool {
		d, ok := m.(Doubter)
		return ok && d.Doubts(p, state)
	})
}

func (a *Attestor) recall(process uint64) *result {
	a.mu.Lock()
	defer a.mu.Unlock()
	e := a.known[process]
	if e == nil {
		return nil
	}
	a.used.MoveToFront(e)
	return e.Value.(*result)
}

func (a *Attestor) remember(r *result) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e := a.known[r.process]; e != nil {
		e.Value = r
		a.used.MoveToFront(e)
		return
	}
	a.known[r.process] = a.used.PushFront(r)
	if a.used.Len() > a.cfg.MaxCached {
		oldest := a.used.Back()
		delete(a.known, oldest.Value.(*result).process)
		a.used.Remove(oldest)
	}
}
