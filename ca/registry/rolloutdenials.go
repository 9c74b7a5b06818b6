package registry

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/policy"
)

// Who reports a denial is believed about its own calls only: a stolen agent can report what never was, and what a roll-out
// tightens is what its thief wants to have back. So a roll-out goes back for all only if there are too many denials without
// those of the agent that reports most. Too many with them give this one agent the former versions back, which it could
// have had all along, and hold the roll-out where it is.

const (
	// maxReporters bounds the agents whose denials a record keeps apart.
	maxReporters = 64
	// maxCounted bounds those between two moves; what more agents report is noted once the others are written down.
	maxCounted = 10_000
	// mostDenials bounds one count, so that a sum never overflows.
	mostDenials = 1 << 40
)

// denials counts what enforcement points report, between two moves.
type denials struct {
	mu    sync.Mutex // guards count
	count map[string]map[spiffeid.ID]int64
	wake  chan struct{} // one slot
}

func newDenials() denials {
	return denials{count: map[string]map[spiffeid.ID]int64{}, wake: make(chan struct{}, 1)}
}

// note adds n.
func (d *denials) note(rollout string, agent spiffeid.ID, n uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	by := d.count[rollout]
	if by == nil {
		by = map[spiffeid.ID]int64{}
		d.count[rollout] = by
	}
	if _, known := by[agent]; known || len(by) < maxCounted {
		by[agent] = min(by[agent]+int64(min(n, mostDenials)), mostDenials)
	}
}

// take removes what was written down. The caller holds mu.
func (d *denials) take(rollout string, written map[spiffeid.ID]int64) {
	by := d.count[rollout]
	for agent, n := range written {
		if by[agent] -= n; by[agent] <= 0 {
			delete(by, agent)
		}
	}
	if len(by) == 0 {
		delete(d.count, rollout)
	}
}

// NoteFormerlyAllowed counts n denials that an agent reports of calls that were allowed before a roll-out. Only what agents
// report that have the new versions counts. It does not block.
func (r *Registry) NoteFormerlyAllowed(agent spiffeid.ID, rollout string, n uint64) {
	r.mu.RLock()
	o := r.ix.rollouts.byName[rollout]
	r.mu.RUnlock()
	if n == 0 || o == nil || !o.running() || !o.Includes(agent) {
		return
	}
	r.denied.note(rollout, agent, n)
	select {
	case r.denied.wake <- struct{}{}:
	default:
	}
}

// count adds what agents reported. Of more agents than a record keeps apart, one that is new takes the place, and the count,
// of the least: what is kept for an agent can be too much, but one that reported more than a 64th of all is always there.
func (o *Rollout) count(by map[spiffeid.ID]int64) {
	reports := slices.Clone(o.Reports)
	for agent, n := range by {
		at := slices.IndexFunc(reports, func(r RolloutReports) bool { return r.Agent == agent })
		switch {
		case at >= 0:
		case len(reports) < maxReporters:
			at = len(reports)
			reports = append(reports, RolloutReports{Agent: agent})
		default:
			at = 0
			for i, r := range reports {
				if r.Denials < reports[at].Denials {
					at = i
				}
			}
			reports[at].Agent = agent
		}
		n = min(n, mostDenials-reports[at].Denials) // alike in both, so that a flood hides nobody else's
		reports[at].Denials += n
		o.Denials += n
	}
	o.Reports = reports
}

// most is what the agent reported that reported most.
func (o *Rollout) most() RolloutReports {
	var most RolloutReports
	for _, r := range o.Reports {
		if r.Denials > most.Denials {
			most = r
		}
	}
	return most
}

// withoutOne is how many denials there are without those of the agent that reported most.
func (o *Rollout) withoutOne() int64 { return o.Denials - o.most().Denials }

// hold gives the former versions back to the one agent that reports too many denials, and makes no more steps.
func (o *Rollout) hold() {
	one := o.most()
	o.Returned, o.Held = one.Agent, true
	o.Reason = fmt.Sprintf("held: %s reports %d denials of calls that were allowed before, %d are tolerated, and no other agent bears that out; it has the former versions back. Promote or abort",
		one.Agent, one.Denials, o.MaxDenials)
}

// concernsOne tells whether at most one agent may serve what o changes: then nobody else can bear out what it reports, and
// going back changes nothing for others.
func (ix *index) concernsOne(td spiffeid.TrustDomain, o *Rollout, now time.Time) bool {
	var served []*Entry
	for id := range ix.registered() {
		if ix.rolls(o, id) {
			served = slices.AppendSeq(served, ix.holders(id))
		}
	}
	agents := 0
	for _, n := range ix.nodes {
		if last := max(n.ExpiresAt.Unix(), n.NewExpiresAt.Unix()); !n.ExpiresAt.IsZero() && last < now.Unix() {
			continue // it is gone
		}
		roots := ix.roots(td, n.ID, now)
		if slices.ContainsFunc(served, func(e *Entry) bool { return ix.serves(roots, e, now) }) {
			if agents++; agents > 1 {
				return false
			}
		}
	}
	return true
}

// rolls tells whether a policy of o, new or former, is about a service.
func (ix *index) rolls(o *Rollout, service spiffeid.ID) bool {
	named := func(p *Policy) bool {
		return p != nil && slices.ContainsFunc(p.Compiled.Services, func(s string) bool { return policy.ServiceMatches(s, service) })
	}
	return slices.ContainsFunc(o.Policies, func(p RolledPolicy) bool { return named(p.Policy) || named(ix.policies[p.Name]) })
}
