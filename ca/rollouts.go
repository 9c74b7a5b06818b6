package ca

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
)

const (
	// rolloutLook is how often roll-outs are looked at when no denial is reported: steps are minutes long.
	rolloutLook = 5 * time.Second
	// rolloutPause is how often denials are written down at most.
	rolloutPause = time.Second
)

// noteDenial counts what a roll-out denies that was allowed before it.
func (ca *CA) noteDenial(o *policyv1.Observation) {
	if !o.GetFormerlyAllowed() || o.GetAllowed() {
		return
	}
	if agent, err := spiffeid.FromString(o.GetAgentId()); err == nil {
		ca.reg.NoteFormerlyAllowed(agent, o.GetRollout(), o.GetCount())
	}
}

// moveRollouts moves roll-outs on, and back. Each replica does: of two that make the same move one fails and looks again.
func (ca *CA) moveRollouts(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	wake := ca.reg.FormerlyAllowed()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
		case <-timer.C:
		}
		moved := ca.makeRolloutMoves(ctx)
		if wake = ca.reg.FormerlyAllowed(); moved { // what is reported meanwhile is counted together
			wake = nil
			timer.Reset(rolloutPause)
		} else {
			timer.Reset(rolloutLook)
		}
	}
}

// makeRolloutMoves does what is to be done now, and tells whether there was anything.
func (ca *CA) makeRolloutMoves(ctx context.Context) bool {
	moves := ca.reg.RolloutMoves()
	for _, m := range moves {
		// What gives former versions back must not fail for want of room; the rest can wait.
		wctx, class := ctx, auditlog.New
		if m.After.State == registry.RolloutRolledBack || m.After.Held && !m.Before.Held {
			wctx, class = store.WithReserve(ctx), auditlog.Essential
		}
		if event := m.Event(); event != "" {
			rec := auditlog.Record{Time: ca.c.Now(), Event: event, Actor: registry.ServerID(ca.td).String(), ActorKind: "system",
				Subject: m.After.Name, Outcome: auditlog.Done, Details: adminapi.RolloutDetails(m.After)}
			if err := ca.audit.Append(ctx, class, rec); err != nil {
				ca.log.Error("a roll-out does not move, since that cannot be written to the audit log", "rollout", m.After.Name, "event", event, "err", err)
				continue
			}
		}
		rev, err := ca.reg.MakeMove(wctx, m)
		switch {
		case errors.Is(err, registry.ErrConflict), ctx.Err() != nil:
			// Somebody was faster; the next look shows what there is.
		case err != nil:
			ca.log.Error("moving a roll-out", "rollout", m.After.Name, "err", err)
		case m.After.State == registry.RolloutRolledBack:
			ca.log.Warn("rolled back", "rollout", m.After.Name, "reason", m.After.Reason, "revision", int64(rev))
		case m.After.Held && !m.Before.Held:
			ca.log.Warn("a roll-out is held until an admin promotes or aborts it", "rollout", m.After.Name, "agent", m.After.Returned.String(), "reason", m.After.Reason, "revision", int64(rev))
		case m.Event() != "":
			ca.log.Info("a roll-out moved", "rollout", m.After.Name, "state", string(m.After.State), "percent", m.After.Percent(), "revision", int64(rev))
		}
	}
	return len(moves) > 0
}
