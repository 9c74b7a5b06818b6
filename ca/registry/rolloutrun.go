package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
)

// A RolloutSpec says how policies are to be rolled out.
type RolloutSpec struct {
	// Name must be new among the roll-outs that are known.
	Name string
	// Steps are shares of the agents in percent. 100 is added if it is not the last.
	Steps []int
	// Bake is how long each step lasts, the last one, too. Zero: DefaultBake.
	Bake time.Duration
	// MaxDenials is how many denials of formerly allowed calls there may be; one more rolls back. Negative: any number.
	MaxDenials int64
	By         string
}

func (s *RolloutSpec) check() error {
	if err := CheckName(s.Name); err != nil {
		return invalid("name", s.Name, "%v", err)
	}
	if len(s.Steps) == 0 || len(s.Steps) > maxRolloutSteps {
		return invalid("steps", fmt.Sprint(s.Steps), "must be 1 to %d shares in percent, such as 10, 50, 100", maxRolloutSteps)
	}
	last := 0
	for _, p := range s.Steps {
		if p <= last || p > 100 {
			return invalid("steps", fmt.Sprint(s.Steps), "must rise from 1 to 100 percent")
		}
		last = p
	}
	if s.Bake < 0 || s.Bake > maxBake || s.Bake%time.Second != 0 {
		return invalid("bake", s.Bake.String(), "must be whole seconds, at most %v; 0 means %v", maxBake, DefaultBake)
	}
	return nil
}

// StartRollout begins to roll out what p changes: CallPolicies that come or change, and nothing else. Nothing is changed if
// any of them was changed after planning, or is being rolled out already.
func (r *Registry) StartRollout(ctx context.Context, p *Plan, s RolloutSpec) (*Rollout, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	o := &Rollout{Name: s.Name, Steps: slices.Clone(s.Steps), Bake: s.Bake, MaxDenials: s.MaxDenials, State: RolloutRunning, By: clip(s.By), StartedAt: r.c.Now(), StepAt: r.c.Now()}
	if o.Steps[len(o.Steps)-1] != 100 {
		o.Steps = append(o.Steps, 100)
	}
	if o.Bake == 0 {
		o.Bake = DefaultBake
	}
	size := 0
	checks := []store.Check{{Key: rolloutPrefix + s.Name}}
	for _, w := range p.writes {
		name, ok := strings.CutPrefix(w.Key, policyPrefix)
		if !ok || w.Delete {
			return nil, invalid("documents", w.Key, "is no CallPolicy that comes or changes; a roll-out takes nothing else, apply the rest without --rollout")
		}
		at := slices.IndexFunc(p.checks, func(c store.Check) bool { return c.Key == w.Key })
		if at < 0 {
			return nil, fmt.Errorf("the plan does not check %s", w.Key)
		}
		o.Policies = append(o.Policies, RolledPolicy{Name: name, Former: p.checks[at].Modified, record: json.RawMessage(w.Value)})
		checks = append(checks, p.checks[at])
		size += len(w.Value)
	}
	switch {
	case len(o.Policies) == 0:
		return nil, invalid("documents", "", "change no CallPolicy: there is nothing to roll out")
	case len(o.Policies) > MaxRolloutPolicies:
		return nil, invalid("documents", "", "change %d CallPolicies, at most %d fit one roll-out; roll them out in parts", len(o.Policies), MaxRolloutPolicies)
	case size > maxRolloutBytes:
		return nil, invalid("documents", "", "have %d bytes with what they compile to, at most %d fit one roll-out; roll them out in parts", size, maxRolloutBytes)
	}
	r.mu.RLock()
	running := len(r.ix.rollouts.running())
	exists := r.ix.rollouts.byName[s.Name] != nil
	r.mu.RUnlock()
	switch {
	case exists:
		return nil, invalid("name", s.Name, "is the name of a roll-out already; take another, which also chooses other agents")
	case running >= MaxRollouts:
		return nil, invalid("name", s.Name, "is one too many: %d roll-outs are under way; promote or abort one", running)
	}
	value, err := o.encode()
	if err != nil {
		return nil, err
	}
	// As of the planning, which refused what is in another roll-out.
	checks = append(checks, p.checks[slices.IndexFunc(p.checks, func(c store.Check) bool { return c.Key == rolloutGuard })])
	writes := []store.Write{{Key: rolloutPrefix + s.Name, Value: value}, {Key: rolloutGuard, Value: []byte(s.Name)}}
	for _, old := range r.Rollouts() { // the last ended first
		if !old.running() {
			if running++; running > keptRollouts && len(writes) < store.MaxWrites && len(checks) < store.MaxChecks {
				checks = append(checks, store.Check{Key: rolloutPrefix + old.Name, Modified: old.Revision})
				writes = append(writes, store.Write{Key: rolloutPrefix + old.Name, Delete: true})
			}
		}
	}
	if _, err := r.commit(ctx, checks, writes); err != nil {
		return nil, err
	}
	return r.Rollout(s.Name)
}

// A RolloutMove is what is to be done about a roll-out now.
type RolloutMove struct {
	Before, After *Rollout
	denials       map[spiffeid.ID]int64
}

// Event names the move for the audit log; empty: it only counts.
func (m *RolloutMove) Event() string {
	switch {
	case m.After.State == RolloutDone:
		return "rollout.done"
	case m.After.State == RolloutRolledBack:
		return "rollout.rollback"
	case m.After.Held && !m.Before.Held:
		return "rollout.hold"
	case m.After.Step != m.Before.Step:
		return "rollout.step"
	}
	return ""
}

// FormerlyAllowed has one slot, which is filled when denials of formerly allowed calls were noted. It is for one reader.
func (r *Registry) FormerlyAllowed() <-chan struct{} { return r.denied.wake }

// RolloutMoves returns what is to be done now: go back because of denials, go on because a step has lasted long enough, or
// only write the denials down. MakeMove does it.
func (r *Registry) RolloutMoves() []*RolloutMove {
	now := r.c.Now()
	r.mu.RLock()
	defer r.mu.RUnlock()
	r.denied.mu.Lock()
	defer r.denied.mu.Unlock()
	var out []*RolloutMove
	for name := range r.denied.count {
		if o := r.ix.rollouts.byName[name]; o == nil || !o.running() {
			delete(r.denied.count, name)
		}
	}
	for _, o := range r.ix.rollouts.running() {
		m := &RolloutMove{Before: o, denials: maps.Clone(r.denied.count[o.Name])}
		next := *o
		next.count(m.denials)
		tooMany := o.MaxDenials >= 0 && next.Denials > o.MaxDenials
		switch gone := r.ix.changedMeanwhile(o); {
		case tooMany && (next.withoutOne() > o.MaxDenials || (o.Returned.IsZero() || len(m.denials) > 0) && r.ix.concernsOne(r.c.TrustDomain, o, now)):
			next.end(RolloutRolledBack, now, fmt.Sprintf("%d calls were denied that were allowed before; %d are tolerated", next.Denials, o.MaxDenials))
		case gone != "":
			next.end(RolloutRolledBack, now, fmt.Sprintf("CallPolicy %q is not what it was when the roll-out began", gone))
		case tooMany && o.Returned.IsZero():
			next.hold()
		case o.StepAt.After(now): // the clock was set back: the step begins anew rather than last for years
			next.StepAt = now
		case !o.Held && now.Sub(o.StepAt) >= o.Bake:
			next.advance(now)
		case len(m.denials) == 0:
			continue
		}
		m.After = &next
		out = append(out, m)
	}
	return out
}

// changedMeanwhile returns a policy that is not what o replaces; it cannot be, unless a store was restored or mended by hand.
func (ix *index) changedMeanwhile(o *Rollout) string {
	for _, p := range o.Policies {
		var at store.Revision
		if held := ix.policies[p.Name]; held != nil {
			at = held.Revision
		}
		if at != p.Former {
			return p.Name
		}
	}
	return ""
}

func (o *Rollout) advance(now time.Time) {
	if o.Step+1 < len(o.Steps) {
		o.Step++
		o.StepAt = now
		return
	}
	o.end(RolloutDone, now, "")
}

func (o *Rollout) end(s RolloutState, now time.Time, reason string) {
	o.State, o.EndedAt, o.Reason, o.Held = s, now, reason, false
}

// MakeMove does it. ErrConflict means that another replica or an operator was faster: what is to be done is asked anew.
func (r *Registry) MakeMove(ctx context.Context, m *RolloutMove) (store.Revision, error) {
	after := *m.After
	checks := []store.Check{{Key: rolloutPrefix + after.Name, Modified: m.Before.Revision}}
	var writes []store.Write
	if !after.running() {
		after.Policies = nil
		for _, p := range m.Before.Policies {
			if after.State == RolloutDone {
				checks = append(checks, store.Check{Key: policyPrefix + p.Name, Modified: p.Former})
				writes = append(writes, store.Write{Key: policyPrefix + p.Name, Value: p.record})
			}
			after.Policies = append(after.Policies, RolledPolicy{Name: p.Name, Former: p.Former})
		}
	}
	value, err := after.encode()
	if err != nil {
		return 0, err
	}
	rev, err := r.commit(ctx, checks, append(writes, store.Write{Key: rolloutPrefix + after.Name, Value: value}))
	if err != nil {
		return 0, err
	}
	r.denied.mu.Lock()
	defer r.denied.mu.Unlock()
	r.denied.take(after.Name, m.denials)
	return rev, nil
}

// PromoteRollout goes on to the next step before its time, or with all to the end.
func (r *Registry) PromoteRollout(ctx context.Context, name string, all bool) (*Rollout, error) {
	return r.moveByHand(ctx, name, func(o *Rollout, now time.Time) {
		if all {
			o.end(RolloutDone, now, "")
			return
		}
		o.Held, o.Reason = false, "" // the operator has seen why
		o.advance(now)
	})
}

// AbortRollout gives all agents the old versions back.
func (r *Registry) AbortRollout(ctx context.Context, name, reason string) (*Rollout, error) {
	return r.moveByHand(ctx, name, func(o *Rollout, now time.Time) { o.end(RolloutAborted, now, clip(reason)) })
}

// ErrRolloutOver means that a roll-out is not under way any more.
var ErrRolloutOver = errors.New("is over")

func (r *Registry) moveByHand(ctx context.Context, name string, change func(*Rollout, time.Time)) (*Rollout, error) {
	for range maxAttempts {
		o, err := r.Rollout(name)
		if err != nil {
			return nil, err
		}
		if !o.running() {
			return nil, fmt.Errorf("roll-out %q %w: %s", name, ErrRolloutOver, o.State)
		}
		next := *o
		change(&next, r.c.Now())
		_, err = r.MakeMove(ctx, &RolloutMove{Before: o, After: &next})
		if errors.Is(err, ErrConflict) {
			if _, err := r.Barrier(ctx); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		return r.Rollout(name)
	}
	return nil, fmt.Errorf("roll-out %q: %w", name, ErrConflict)
}
