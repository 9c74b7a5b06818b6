package rotation

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/signet-id/signet/ca/authority"
)

// jump is a difference between the wall clock and the machine's steady clock that is no drift.
const jump = 30 * time.Second

// warnEvery is how often the log repeats what an operator has not changed.
const warnEvery = time.Hour

// A clock notices jumps of the wall clock. What the schedule does cannot be taken back, so that it waits until a clock that
// jumped has shown that it means it.
type clock struct {
	wall, steady time.Time // as of the last look
	jumped       time.Time // on the steady clock; zero: not since the start
}

// look notes the clocks, and says by how much the wall clock has jumped since the last look.
func (c *clock) look(wall, steady time.Time) time.Duration {
	wall = wall.Round(0) // without it, Sub would use the steady clock
	var by time.Duration
	if !c.wall.IsZero() {
		if by = wall.Sub(c.wall) - steady.Sub(c.steady); by.Abs() > jump {
			c.jumped = steady
		} else {
			by = 0
		}
	}
	c.wall, c.steady = wall, steady
	return by
}

// steadyFor says how long the wall clock has not jumped; forever if it never did.
func (c *clock) steadyFor(steady time.Time) time.Duration {
	if c.jumped.IsZero() {
		return 1<<63 - 1
	}
	return steady.Sub(c.jumped)
}

// A situation is all that the schedule looks at, for one kind of authority.
type situation struct {
	now         time.Time
	authorities []authority.Authority
	longest     time.Duration // of the TTLs
	wait        time.Duration // that consumers who acknowledge nothing are given
	ready       func(authority.Authority) Readiness
	// upstream says that another CA signs these, and that its follower prepares them: only to activate and retire them is
	// left to do.
	upstream bool

	steadyFor time.Duration // since the last jump of the clock
	upFor     time.Duration // since the start of this program
	settle    time.Duration
}

// What the schedule can do.
const (
	doNothing  = ""
	doPrepare  = "prepare"
	doActivate = "activate"
	doRetire   = "retire"
	doDiscard  = "discard" // a prepared authority that is not valid yet, while one is needed at once
)

// lead is how long before its end an authority's successor is prepared: a third of its life, and in any case long enough
// for everybody to hear of the next one while the old one still covers the longest TTL.
func lead(life, longest, wait time.Duration) time.Duration { return max(life/3, longest+2*wait) }

// Lead is how long before its end an authority of the given lifetime is replaced, if the longest TTL and the bundle's
// refresh hint are these. It must be less than its life, and leave it some.
func Lead(life, longest, refreshHint time.Duration) time.Duration {
	return lead(life, longest, hints*refreshHint)
}

// due returns the next thing to do, to which authority, and why. It is the whole schedule.
func (s situation) due() (do, id, why string) {
	if s.steadyFor < s.settle {
		return doNothing, "", ""
	}
	var active, prepared *authority.Authority
	for i := range s.authorities {
		switch a := &s.authorities[i]; a.State {
		case authority.StateActive:
			active = a
		case authority.StatePrepared:
			prepared = a
		}
	}
	valid := func(a *authority.Authority) bool { return !s.now.Before(a.NotBefore) && s.now.Before(a.NotAfter) }
	switch {
	case active == nil || !valid(active):
		// Nothing can be signed: there is nothing to lose by not waiting, but for a clock that is not set yet after the start.
		switch {
		case s.upFor < s.settle:
		case prepared == nil && s.upstream:
		case prepared == nil:
			return doPrepare, "", "the active authority cannot sign"
		case valid(prepared):
			return doActivate, prepared.ID, "the active authority cannot sign"
		case !s.upstream:
			return doDiscard, prepared.ID, "it is not valid now, and neither is the active one"
		}
	case prepared != nil && !s.now.Before(prepared.NotAfter):
		return doRetire, prepared.ID, "it came to its end before it signed"
	default:
		if !s.upstream && s.now.Before(active.NotAfter.Add(-lead(active.NotAfter.Sub(active.NotBefore), s.longest, s.wait))) {
			break // what an operator has prepared before its time is the operator's to activate
		}
		if prepared == nil && !s.upstream {
			return doPrepare, "", "the active authority nears its end"
		}
		if prepared == nil || !valid(prepared) {
			break
		}
		if ready := s.ready(*prepared); ready.Ready {
			return doActivate, prepared.ID, readyBecause(ready)
		}
	}
	// An old authority leaves when nothing of it is valid any more. That is never urgent, so that a clock must have been
	// right for as long as an SVID lives.
	if s.steadyFor < s.longest {
		return doNothing, "", ""
	}
	for _, a := range s.authorities {
		if a.State != authority.StateOld && a.State != authority.StateTainted {
			continue
		}
		if !a.SignedUntil.IsZero() && !s.now.Before(a.SignedUntil) || !s.now.Before(a.NotAfter) {
			return doRetire, a.ID, "nothing that it signed is valid any more"
		}
	}
	return doNothing, "", ""
}

func readyBecause(ready Readiness) string {
	if ready.Late {
		return "its deadline has come"
	}
	return "every live agent has handed it on"
}

// follow does what is due until ctx ends. Of several replicas all try, and commits decide.
func (r *Rotator) follow(ctx context.Context) {
	for ctx.Err() == nil {
		did := false
		for _, kind := range r.c.Set.Kinds() {
			did = r.once(ctx, kind) || did
		}
		r.warn()
		if did {
			continue
		}
		moved := r.wake
		t := time.NewTimer(r.pause())
		select {
		case <-t.C:
		case <-moved:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// pause is how long the schedule may sleep: shortly while agents are heard about a prepared authority.
func (r *Rotator) pause() time.Duration {
	const whilePrepared = time.Second
	if r.c.Automatic && len(r.c.Set.Prepared()) > 0 {
		return min(whilePrepared, r.c.Look)
	}
	return r.c.Look
}

// steadyFor looks at the clocks, and says how long the wall clock has not jumped.
func (r *Rotator) steadyFor(steady time.Time) time.Duration {
	r.mu.Lock()
	by := r.clock.look(r.c.Now(), steady)
	steadyFor := r.clock.steadyFor(steady)
	r.mu.Unlock()
	if by != 0 {
		r.c.Log.Warn("the wall clock jumped; authorities wait until it is steady", "by", by.Round(time.Second), "settle", r.c.Settle)
	}
	return steadyFor
}

// retryMin and retryMax bound the wait after a step of the schedule that failed, such as for a key store that is away: each
// attempt is two audit records, and a load on what is ill already.
const (
	retryMin = time.Second
	retryMax = time.Minute
)

// A retry is when a step that failed is tried again.
type retry struct {
	at   time.Time // on the steady clock
	wait time.Duration
}

// next returns the retry after another failure: later than the last, and at a moment of this replica's own.
func (b retry) next(steady time.Time) retry {
	b.wait = min(max(2*b.wait, retryMin), retryMax)
	b.at = steady.Add(b.wait/2 + rand.N(b.wait/2))
	return b
}

// once does one thing that is due for a kind, and says whether there may be more.
func (r *Rotator) once(ctx context.Context, kind authority.Kind) bool {
	steady := time.Now()
	steadyFor := r.steadyFor(steady)
	if !r.c.Automatic {
		return false
	}
	do, id, why := r.situation(kind, steady, steadyFor).due()
	if do == doNothing || steady.Before(r.retries[kind].at) {
		return false
	}
	err := r.do(ctx, kind, do, id, why)
	switch {
	case err == nil:
		delete(r.retries, kind)
		return true
	case ctx.Err() != nil, errors.Is(err, authority.ErrConflict):
		return false // another replica was faster; the watch shows it
	}
	r.retries[kind] = r.retries[kind].next(time.Now())
	r.c.Log.Error("the schedule of authorities", "step", do, "kind", string(kind), "authority_id", id, "err", err)
	return false
}

func (r *Rotator) situation(kind authority.Kind, steady time.Time, steadyFor time.Duration) situation {
	s := situation{now: r.c.Now(), authorities: r.c.Set.Authorities(kind), longest: r.c.Set.LongestTTL(kind), ready: r.Readiness,
		upstream: kind == authority.KindX509 && r.c.Set.HasUpstream(), steadyFor: steadyFor, upFor: steady.Sub(r.began), settle: r.c.Settle}
	if r.c.Federated() {
		s.wait = hints * r.c.RefreshHint
	}
	return s
}

func (r *Rotator) do(ctx context.Context, kind authority.Kind, do, id, why string) error {
	const patience = time.Minute // a key store may be slow
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	details := map[string]any{"why": why}
	by := r.Schedule()
	var st authority.Step
	var err error
	switch do {
	case doPrepare:
		st, err = r.act(ctx, by, "authority.prepare", kind, "", details, func() (authority.Step, error) { return r.c.Set.Prepare(ctx, kind) })
	case doActivate:
		for _, a := range r.c.Set.Authorities(kind) {
			if a.ID == id {
				details["laggards"] = r.Readiness(a).Count
			}
		}
		st, err = r.act(ctx, by, "authority.activate", kind, id, details, func() (authority.Step, error) { return r.c.Set.Activate(ctx, kind, id) })
	case doRetire:
		st, err = r.act(ctx, by, "authority.retire", kind, id, details, func() (authority.Step, error) { return r.c.Set.Retire(ctx, kind, id) })
	case doDiscard:
		st, err = r.act(ctx, by, "authority.discard", kind, id, details, func() (authority.Step, error) {
			return r.c.Set.Stolen(ctx, kind, id, authority.StateRevoked)
		})
	}
	if err == nil {
		r.c.Log.Info("the schedule of authorities", "step", do, "kind", string(kind), "authority_id", st.ID, "why", why)
	}
	return err
}

// Warnings are what an operator should know of the authorities now, a sentence each.
func (r *Rotator) Warnings() []string {
	var out []string
	now := r.c.Now()
	for _, kind := range r.c.Set.Kinds() {
		all := r.c.Set.Authorities(kind)
		successor := false
		for _, a := range all {
			successor = successor || a.State == authority.StatePrepared
		}
		for _, a := range all {
			longest := r.c.Set.LongestTTL(kind)
			left := a.NotAfter.Sub(now)
			switch {
			case a.State == authority.StateActive && left <= 0:
				out = append(out, fmt.Sprintf("the active %s authority %s has ended, and nothing is issued: prepare and activate another one", kind, a.ID))
			case a.State == authority.StateActive && left < longest:
				out = append(out, fmt.Sprintf("the active %s authority %s ends in %s, which cuts the validity of what it signs: activate another one", kind, a.ID, left.Round(time.Second)))
			case a.State == authority.StateActive && !successor && left < lead(a.NotAfter.Sub(a.NotBefore), longest, 0)/2:
				out = append(out, fmt.Sprintf("the active %s authority %s ends in %s, and no successor is prepared", kind, a.ID, left.Round(time.Second)))
			case a.State == authority.StatePrepared:
				if ready := r.Readiness(a); ready.Count > 0 && now.Sub(a.PreparedAt) > lagWarn {
					out = append(out, fmt.Sprintf("%d of %d live agents have not handed on the prepared %s authority %s", ready.Count, ready.Live, kind, a.ID))
				}
			}
		}
	}
	return out
}

// lagWarn is how long an agent may lag before anybody is told.
const lagWarn = 5 * time.Minute

// warn logs the warnings, each once an hour.
func (r *Rotator) warn() {
	steady := time.Now()
	warnings := r.Warnings()
	r.mu.Lock()
	defer r.mu.Unlock()
	for text, at := range r.told {
		if steady.Sub(at) >= warnEvery {
			delete(r.told, text)
		}
	}
	const most = 16
	for _, w := range warnings {
		key := w[:min(len(w), 60)] // without the numbers that change all the time
		if _, told := r.told[key]; !told && len(r.told) < most {
			r.told[key] = steady
			r.c.Log.Warn("authorities: " + w)
		}
	}
}
