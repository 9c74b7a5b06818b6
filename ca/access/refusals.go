package access

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/signet-id/signet/ca/auditlog"
)

const (
	// refusalRate and refusalBurst bound the audit records of refused callers without an identity. Anybody in the
	// network can be refused as often as they like; without the bound they could push everything else out of the log.
	refusalRate  = 50
	refusalBurst = 500
)

// Refusals writes refusals to the audit log: each one of a caller who is known, and those of strangers as long as they
// come at a bearable rate. What is beyond is counted, and the count is logged.
type Refusals struct {
	audit   *auditlog.Log
	now     func() time.Time
	log     *slog.Logger
	limiter *rate.Limiter
	beyond  atomic.Int64
}

// NewRefusals returns a Refusals that writes to audit.
func NewRefusals(audit *auditlog.Log, now func() time.Time, log *slog.Logger) *Refusals {
	return &Refusals{audit: audit, now: now, log: log, limiter: rate.NewLimiter(refusalRate, refusalBurst)}
}

// Record logs one refusal. That the log is full or broken does not turn a no into anything else.
func (r *Refusals) Record(ctx context.Context, c *Caller, rec auditlog.Record) {
	if c.Kind&(Local|Admin|Agent) == 0 && !r.limiter.Allow() {
		r.beyond.Add(1)
		return
	}
	if err := r.audit.Append(context.WithoutCancel(ctx), auditlog.New, rec); err != nil {
		r.log.Error("audit of a refusal", "event", rec.Event, "err", err)
	}
}

// Flush logs how many refusals of strangers were not logged one by one since the last Flush. The CA calls it from time
// to time and before it closes the log.
func (r *Refusals) Flush(ctx context.Context) {
	n := r.beyond.Swap(0)
	if n == 0 {
		return
	}
	rec := auditlog.Record{Time: r.now(), Event: "call.refused.more", Actor: "anonymous", ActorKind: "anonymous", Outcome: auditlog.Refused,
		Details: map[string]any{"count": n, "reason": "more refusals than are logged one by one"}}
	if err := r.audit.Append(ctx, auditlog.New, rec); err != nil {
		r.beyond.Add(n)
		r.log.Error("audit of refusals", "count", n, "err", err)
	}
}
