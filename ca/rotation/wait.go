package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// MaxLaggards is how many laggards a Readiness names; it counts all.
const MaxLaggards = 100

// hints is how many refresh hints the bundle is published before a new authority signs, while others fetch it. [FED-04]
const hints = 5

// A Laggard is a live agent that has not handed on a prepared authority.
type Laggard struct {
	Agent  spiffeid.ID
	Reason string
	Since  time.Time
}

// A Readiness says what the activation of a prepared authority waits for.
type Readiness struct {
	// Laggards are the first MaxLaggards in order of ID, Count is how many there are among the Live agents.
	Laggards    []Laggard
	Count, Live int
	// HintsUntil is when consumers who acknowledge nothing have had the time to fetch the bundle; zero if there are none.
	HintsUntil time.Time
	// Deadline is when it is activated whoever lags.
	Deadline time.Time
	// Ready says that nothing is waited for, Late that this is because of the deadline alone.
	Ready, Late bool
}

// A WaitError says that an activation would have to wait.
type WaitError struct {
	Kind authority.Kind
	ID   string
	Readiness
}

func (e *WaitError) Error() string {
	var reasons []string
	if e.Count > 0 {
		const named = 3
		var names []string
		for _, l := range e.Laggards[:min(named, len(e.Laggards))] {
			names = append(names, fmt.Sprintf("%s (%s, since %s)", l.Agent, l.Reason, l.Since.UTC().Format(time.RFC3339)))
		}
		if more := e.Count - len(names); more > 0 {
			names = append(names, fmt.Sprintf("and %d more", more))
		}
		reasons = append(reasons, fmt.Sprintf("%d of %d live agents have not handed it on: %s", e.Count, e.Live, strings.Join(names, "; ")))
	}
	if !e.HintsUntil.IsZero() {
		reasons = append(reasons, fmt.Sprintf("others fetch the bundle, which takes them until %s", e.HintsUntil.UTC().Format(time.RFC3339)))
	}
	return fmt.Sprintf("%s authority %s is not known everywhere yet: %s; wait for it, or force it", e.Kind, e.ID, strings.Join(reasons, "; and "))
}

// Readiness says what the activation of the prepared authority a waits for.
func (r *Rotator) Readiness(a authority.Authority) Readiness {
	now := r.c.Now()
	out := Readiness{Deadline: r.deadline(a)}
	streams := r.c.Following()
	r.c.Registry.LiveNodes(func(n *registry.Node, ack *registry.Ack) bool {
		out.Live++
		if ack.Has(a.PublishedID()) {
			return true
		}
		out.Count++
		since := a.PreparedAt
		if n.CreatedAt.After(since) {
			since = n.CreatedAt
		}
		out.Laggards = append(out.Laggards, Laggard{Agent: n.ID, Reason: lagReason(n, streams), Since: since})
		return true
	})
	slices.SortFunc(out.Laggards, func(a, b Laggard) int { return cmp.Compare(a.Agent.String(), b.Agent.String()) })
	out.Laggards = out.Laggards[:min(len(out.Laggards), MaxLaggards)]
	// Right after the clock jumped, no time has gone by that it says has: neither others have fetched the bundle, nor is it
	// certain that the active authority comes to its end.
	unsettled := r.c.Settle - r.steadyFor(time.Now())
	if r.c.Federated() {
		until := a.PreparedAt.Add(hints * r.c.RefreshHint)
		if settled := now.Add(unsettled); unsettled > 0 && until.Before(settled) {
			until = settled
		}
		if now.Before(until) {
			out.HintsUntil = until
		}
	}
	out.Ready = out.Count == 0 && out.HintsUntil.IsZero()
	if !out.Ready && unsettled <= 0 && !now.Before(out.Deadline) {
		out.Ready, out.Late = true, true
	}
	return out
}

func lagReason(n *registry.Node, streams map[spiffeid.ID]Follower) string {
	_, here := streams[n.ID]
	switch {
	case here:
		return "has open streams that it has not been written to"
	case n.Follows:
		return "does not follow this replica of the CA"
	case !n.Active:
		return "has never used its X509-SVID"
	}
	return "has not fetched the bundle with its X509-SVID"
}

// deadline is the last moment at which the active authority covers the longest TTL, or earlier if so configured.
func (r *Rotator) deadline(prepared authority.Authority) time.Time {
	deadline := r.c.Now() // with nothing active there is nothing to wait with
	for _, a := range r.c.Set.Authorities(prepared.Kind) {
		if a.State == authority.StateActive {
			deadline = a.NotAfter.Add(-r.c.Set.LongestTTL(prepared.Kind))
		}
	}
	if d := r.c.ActivationDeadline; d > 0 && prepared.PreparedAt.Add(d).Before(deadline) {
		deadline = prepared.PreparedAt.Add(d)
	}
	return deadline
}

// How says how an activation goes about laggards.
type How struct {
	// Wait waits until nobody lags, or for the deadline. Without it a laggard is a *WaitError.
	Wait bool
	// Force waits for nobody.
	Force bool
	// Progress, which may be nil, is told what is waited for whenever that changes, and once more when nothing is any more. Its
	// error ends the wait.
	Progress func(Readiness) error
}

// ErrNotPrepared is returned for an activation when no authority is prepared.
var ErrNotPrepared = errors.New("no authority is prepared; prepare one first")

// Activate makes a prepared authority the one that signs, once every live agent has handed it on. An empty id means the one
// that is prepared. [DESIGN §5]
func (r *Rotator) Activate(ctx context.Context, by Actor, kind authority.Kind, id string, how How) (authority.Step, error) {
	a, err := r.prepared(kind, id)
	if err != nil {
		return authority.Step{}, err
	}
	details := map[string]any{}
	if a.State == authority.StatePrepared { // any other is for the step itself to refuse, or to find done
		ready, err := r.await(ctx, a, how)
		if err != nil {
			return authority.Step{}, err
		}
		details["laggards"] = ready.Count
		if how.Force && !ready.Ready {
			details["forced"] = true
		}
		if ready.Late {
			details["deadline"] = ready.Deadline.Unix()
			r.c.Log.Warn("an authority is activated at its deadline, though not every agent has handed it on", "kind", string(kind), "authority_id", a.ID, "laggards", ready.Count)
		}
	}
	return r.act(ctx, by, "authority.activate", kind, a.ID, details, func() (authority.Step, error) { return r.c.Set.Activate(ctx, kind, a.ID) })
}

func (r *Rotator) prepared(kind authority.Kind, id string) (authority.Authority, error) {
	for _, a := range r.c.Set.Authorities(kind) {
		if a.ID == id || id == "" && a.State == authority.StatePrepared {
			return a, nil
		}
	}
	if id == "" {
		return authority.Authority{}, fmt.Errorf("%s: %w", kind, ErrNotPrepared)
	}
	return authority.Authority{}, fmt.Errorf("%s authority %.64q: %w", kind, id, authority.ErrUnknownAuthority)
}

// waitLook is the least time between two looks at who lags, and waitTick the longest.
const (
	waitLook = 100 * time.Millisecond
	waitTick = 5 * time.Second
)

// await returns when nothing keeps a from being activated, or how says not to wait.
func (r *Rotator) await(ctx context.Context, a authority.Authority, how How) (Readiness, error) {
	told := ""
	for {
		moved := r.c.Registry.Moved()
		ready := r.Readiness(a)
		if ready.Ready && told != "" && how.Progress != nil {
			// Whoever waited may have lost the right to ask meanwhile: telling them once more finds out.
			return ready, how.Progress(ready)
		}
		if ready.Ready || how.Force {
			return ready, nil
		}
		if !how.Wait {
			return ready, &WaitError{Kind: a.Kind, ID: a.ID, Readiness: ready}
		}
		if now := ready.summary(); how.Progress != nil && now != told {
			told = now
			if err := how.Progress(ready); err != nil {
				return ready, err
			}
		}
		if err := sleep(ctx, waitLook, nil); err != nil {
			return ready, errors.Join(&WaitError{Kind: a.Kind, ID: a.ID, Readiness: ready}, err)
		}
		if err := sleep(ctx, r.nap(waitTick, ready.HintsUntil, ready.Deadline), moved); err != nil {
			return ready, errors.Join(&WaitError{Kind: a.Kind, ID: a.ID, Readiness: ready}, err)
		}
		if is, err := r.prepared(a.Kind, a.ID); err != nil || is.State != authority.StatePrepared {
			return ready, nil // somebody else went ahead; the step itself says what that means
		}
	}
}

func (r Readiness) summary() string {
	var b strings.Builder
	fmt.Fprint(&b, r.Count, r.HintsUntil, r.Deadline)
	for _, l := range r.Laggards {
		b.WriteString(l.Agent.String())
	}
	return b.String()
}

// nap is how long to sleep so that none of the moments is missed.
func (r *Rotator) nap(longest time.Duration, moments ...time.Time) time.Duration {
	now := r.c.Now()
	for _, m := range moments {
		if left := m.Sub(now); left > 0 {
			longest = min(longest, left)
		}
	}
	return max(longest, time.Millisecond)
}

// sleep waits for d, for early, or for the end of ctx, which is its error.
func sleep(ctx context.Context, d time.Duration, early <-chan struct{}) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-early:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// Use is who still holds X509-SVIDs of an authority: agents that follow this replica and said so, and live agents of which
// this replica does not know.
type Use struct{ Using, Unknown int }

// InUse returns for each X.509 authority by how many agents it is used.
func (r *Rotator) InUse() map[string]Use {
	streams := r.c.Following()
	unknown := 0
	r.c.Registry.LiveNodes(func(n *registry.Node, _ *registry.Ack) bool {
		if f, here := streams[n.ID]; !here || f.InUse == nil {
			unknown++
		}
		return true
	})
	out := map[string]Use{}
	for _, a := range r.c.Set.Authorities(authority.KindX509) {
		u := Use{Unknown: unknown}
		for _, f := range streams {
			if slices.Contains(f.InUse, a.ID) {
				u.Using++
			}
		}
		out[a.ID] = u
	}
	return out
}
