package adminapi

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
)

// RolloutsServer is the service Rollouts of signet.admin.v1.
type RolloutsServer struct {
	noRollouts
	*API
}

// noRollouts is embedded one level deeper than the API, so that Go prefers what the API has.
type noRollouts struct {
	adminv1.UnimplementedRolloutsServer
}

// maxShownAgents is how many IDs of agents an answer about a roll-out holds.
const maxShownAgents = 100

// StartRollout implements signet.admin.v1.
func (a *API) StartRollout(ctx context.Context, req *adminv1.StartRolloutRequest) (*adminv1.Rollout, error) {
	o, err := a.startRollout(ctx, req)
	if err != nil {
		err = a.toStatus(err)
		a.outcome(ctx, auditlog.New, a.record(ctx, "rollout.start", clip(req.Name), err, nil))
		return nil, err
	}
	a.outcome(ctx, auditlog.New, a.record(ctx, "rollout.start", o.Name, nil, RolloutDetails(o)))
	return a.rollout(o), nil
}

func (a *API) startRollout(ctx context.Context, req *adminv1.StartRolloutRequest) (*registry.Rollout, error) {
	docs, err := documents(req.Documents)
	if err != nil {
		return nil, err
	}
	p, err := a.c.Registry.Plan(docs, registry.Options{PlannedAt: store.Revision(req.PlannedAt)})
	if err != nil {
		if !isPlanFault(err) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", errDocument, err)
	}
	if err := refuseUnconfirmed(p, req.Yes); err != nil {
		return nil, err
	}
	const maxSeconds = int64(366 * 24 * time.Hour / time.Second)
	if req.Bake < 0 || req.Bake > maxSeconds {
		return nil, &registry.ValidationError{Field: "bake", Problem: "must be 0 or a number of seconds, at most 30 days"}
	}
	spec := registry.RolloutSpec{Name: req.Name, Bake: time.Duration(req.Bake) * time.Second, MaxDenials: req.MaxDenials, By: access.From(ctx).String()}
	for _, s := range req.Steps {
		spec.Steps = append(spec.Steps, int(s))
	}
	if err := a.intend(ctx, auditlog.New, "rollout.start", changed(p), map[string]any{"rollout": clip(req.Name)}); err != nil {
		return nil, err
	}
	return a.c.Registry.StartRollout(ctx, p, spec)
}

func changed(p *registry.Plan) []string {
	var out []string
	for _, c := range p.Changes {
		if c.Action != registry.Unchanged {
			out = append(out, c.Kind+"/"+c.Name)
		}
	}
	return out
}

// RolloutDetails describes a roll-out in the audit log.
func RolloutDetails(o *registry.Rollout) map[string]any {
	var policies []string
	for _, p := range o.Policies {
		policies = append(policies, p.Name)
	}
	d := map[string]any{"policies": bounded(policies), "percent": o.Percent(), "steps": fmt.Sprint(o.Steps), "denials": o.Denials, "max_denials": o.MaxDenials, "revision": int64(o.Revision)}
	if o.Reason != "" {
		d["reason"] = o.Reason
	}
	return d
}

// ListRollouts implements signet.admin.v1.
func (a *API) ListRollouts(_ context.Context, req *adminv1.ListRolloutsRequest) (*adminv1.ListRolloutsResponse, error) {
	if req.Name != "" {
		o, err := a.c.Registry.Rollout(req.Name)
		if err != nil {
			return nil, a.toStatus(err)
		}
		return &adminv1.ListRolloutsResponse{Rollouts: []*adminv1.Rollout{a.rollout(o)}}, nil
	}
	out := &adminv1.ListRolloutsResponse{}
	for _, o := range a.c.Registry.Rollouts() {
		out.Rollouts = append(out.Rollouts, a.rollout(o))
	}
	return out, nil
}

// PromoteRollout implements signet.admin.v1.
func (a *API) PromoteRollout(ctx context.Context, req *adminv1.PromoteRolloutRequest) (*adminv1.Rollout, error) {
	return a.moveRollout(ctx, "rollout.promote", req.Name, auditlog.New, func() (*registry.Rollout, error) {
		return a.c.Registry.PromoteRollout(ctx, req.Name, req.All)
	})
}

// AbortRollout implements signet.admin.v1. It works on a full disk, too.
func (a *API) AbortRollout(ctx context.Context, req *adminv1.AbortRolloutRequest) (*adminv1.Rollout, error) {
	return a.moveRollout(ctx, "rollout.abort", req.Name, auditlog.Essential, func() (*registry.Rollout, error) {
		return a.c.Registry.AbortRollout(store.WithReserve(ctx), req.Name, req.Reason)
	})
}

func (a *API) moveRollout(ctx context.Context, event, name string, class auditlog.Class, move func() (*registry.Rollout, error)) (*adminv1.Rollout, error) {
	_, err := a.c.Registry.Rollout(name)
	if err == nil {
		err = a.intend(ctx, class, event, []string{name}, nil)
	}
	var o *registry.Rollout
	if err == nil {
		o, err = move()
	}
	if err != nil {
		err = a.toStatus(err)
		a.outcome(ctx, class, a.record(ctx, event, clip(name), err, nil))
		return nil, err
	}
	a.outcome(ctx, class, a.record(ctx, event, o.Name, nil, RolloutDetails(o)))
	return a.rollout(o), nil
}

func (a *API) rollout(o *registry.Rollout) *adminv1.Rollout {
	out := &adminv1.Rollout{Name: o.Name, State: string(o.State), Step: int32(o.Step), Percent: int32(o.Percent()), Bake: int64(o.Bake / time.Second), MaxDenials: o.MaxDenials,
		Denials: o.Denials, Reason: o.Reason, StartedBy: o.By, StartedAt: timestamppb.New(o.StartedAt), StepAt: timestamppb.New(o.StepAt), Revision: int64(o.Revision)}
	for _, s := range o.Steps {
		out.Steps = append(out.Steps, int32(s))
	}
	for _, p := range o.Policies {
		out.Policies = append(out.Policies, p.Name)
	}
	slices.Sort(out.Policies)
	if o.State != registry.RolloutRunning {
		out.EndedAt = timestamppb.New(o.EndedAt)
		return out
	}
	if !o.Held {
		out.NextAt = timestamppb.New(o.StepAt.Add(o.Bake))
	}
	concerned, first := a.c.Registry.RolloutAgents(o.Name)
	out.Agents, out.FirstAgents = int64(concerned), int64(len(first))
	for _, id := range first[:min(len(first), maxShownAgents)] {
		out.FirstAgentIds = append(out.FirstAgentIds, id.String())
	}
	return out
}

// maxSetPart bounds one part of a policy set, well below what gRPC's clients take.
const maxSetPart = 1 << 20

// StreamPolicySet implements signet.admin.v1.
func (s *RolloutsServer) StreamPolicySet(_ *adminv1.StreamPolicySetRequest, stream adminv1.Rollouts_StreamPolicySetServer) error {
	set := s.c.Registry.PolicySet(s.c.Epoch)
	part := &policyv1.PolicySet{Format: set.Format, TrustDomain: set.TrustDomain, Epoch: set.Epoch, Revision: set.Revision, Defaults: set.Defaults}
	size := 0
	room := func(m proto.Message) error {
		n := proto.Size(m)
		if size > 0 && size+n > maxSetPart {
			if err := stream.Send(&adminv1.StreamPolicySetResponse{Part: part}); err != nil {
				return err
			}
			part, size = &policyv1.PolicySet{}, 0
		}
		size += n
		return nil
	}
	for _, i := range set.UserIssuers {
		if err := room(i); err != nil {
			return err
		}
		part.UserIssuers = append(part.UserIssuers, i)
	}
	for _, p := range set.Policies {
		if err := room(p); err != nil {
			return err
		}
		part.Policies = append(part.Policies, p)
	}
	return stream.Send(&adminv1.StreamPolicySetResponse{Part: part})
}
