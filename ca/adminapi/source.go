package adminapi

import (
	"context"
	"slices"
	"strings"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

// A Source applies documents that are no operator's: the custom resources of a cluster. They go the way of `signet apply`, with
// the same checks and the same records in the audit log.
type Source struct {
	// Name is who acts, in the audit log, where no document is meant.
	Name string
	// Actor returns who wants a document as it is, such as kubernetes/prod/CallPolicy/web/documents.
	Actor func(registry.Ref) string
}

type sourceKey struct{}

// record is API.record of what a source does.
func (s Source) record(a *API, event, subject string, err error, details map[string]any) auditlog.Record {
	rec := auditlog.Record{Time: a.c.Now(), Event: event, Actor: s.Name, ActorKind: "kubernetes", Subject: subject, Outcome: auditlog.Done, Details: details}
	if kind, name, ok := strings.Cut(subject, "/"); ok {
		rec.Actor = s.Actor(registry.Ref{Kind: kind, Name: name})
	}
	if err != nil {
		rec.Outcome = auditlog.Refused
		details["reason"] = bounded([]string{err.Error()})[0]
	}
	return rec
}

// Refused writes down that a document of a source was refused.
func (a *API) Refused(ctx context.Context, s Source, ref registry.Ref, err error) {
	ctx = context.WithValue(ctx, sourceKey{}, s)
	a.outcome(ctx, auditlog.New, a.record(ctx, "apply", ref.Kind+"/"+ref.Name, err, nil))
}

// ApplySource plans documents and deletions of a source and applies them as one commit. Errors are those of registry.Plan and
// registry.Apply, a *registry.NeedsYesError if what was planned must be confirmed and yes is not true, and what the audit log
// cannot take. It writes nothing down about plans that are refused.
func (a *API) ApplySource(ctx context.Context, s Source, docs []strictyaml.Document, o registry.Options, yes bool) (*registry.Plan, store.Revision, error) {
	ctx = context.WithValue(ctx, sourceKey{}, s)
	plan := func() (*registry.Plan, error) { return a.c.Registry.Plan(docs, o) }
	p, err := plan()
	if err != nil {
		return nil, 0, err
	}
	if err := p.NeedsYes(); err != nil && !yes {
		return nil, 0, err
	}
	if len(p.Bans) > 0 {
		if p, err = a.banAndPlan(ctx, p, plan); err != nil {
			return nil, 0, err
		}
	}
	subjects := changedBy(p)
	if len(subjects) == 0 {
		return p, p.Revision, nil
	}
	class := auditlog.New
	if !slices.ContainsFunc(p.Changes, func(c registry.PlannedChange) bool {
		return c.Action != registry.Delete && c.Action != registry.Unchanged
	}) {
		class, ctx = auditlog.Essential, store.WithReserve(ctx) // what only takes away, a full disk must not keep
	}
	rev, err := a.apply(ctx, "apply", p, class, subjects)
	return p, rev, err
}
