package adminapi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

// errDocument marks what is wrong with documents, which the operator may read in full.
var errDocument = errors.New("documents")

// maxSourceBytes bounds the name of a document's file.
const maxSourceBytes = 1024

func documents(in []*adminv1.Document) ([]strictyaml.Document, error) {
	var out []strictyaml.Document
	var errs []error
	for _, d := range in {
		if len(d.GetFile()) > maxSourceBytes {
			return nil, &registry.ValidationError{Field: "documents.file", Value: d.File, Problem: fmt.Sprintf("at most %d bytes are allowed", maxSourceBytes)}
		}
		split, err := strictyaml.Split(d.GetContent(), d.GetFile(), max(1, int(d.GetLine())))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, split...)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("%w: %w", errDocument, err)
	}
	if len(out) == 0 {
		return nil, &registry.ValidationError{Field: "documents", Problem: "none given"}
	}
	return out, nil
}

func (a *API) plan(req *adminv1.ApplyRequest) (*registry.Plan, error) {
	docs, err := documents(req.Documents)
	if err != nil {
		return nil, err
	}
	p, err := a.c.Registry.Plan(docs, registry.Options{Prune: req.Prune, PlannedAt: store.Revision(req.PlannedAt)})
	if err != nil && isPlanFault(err) {
		return nil, fmt.Errorf("%w: %w", errDocument, err)
	}
	return p, err
}

// isPlanFault tells whether an error of planning is one of the documents.
func isPlanFault(err error) bool {
	return !errors.Is(err, registry.ErrConflict) && !errors.Is(err, registry.ErrTooMany) && !errors.Is(err, registry.ErrTooManyRevocations) && !errors.Is(err, registry.ErrInRollout) && !errors.Is(err, registry.ErrCommitTooLarge)
}

// Plan implements signet.admin.v1.
func (a *API) Plan(_ context.Context, req *adminv1.ApplyRequest) (*adminv1.ApplyResponse, error) {
	p, err := a.plan(req)
	if err != nil {
		return nil, a.toStatus(err)
	}
	return answer(p, p.Revision), nil
}

// Apply implements signet.admin.v1.
func (a *API) Apply(ctx context.Context, req *adminv1.ApplyRequest) (*adminv1.ApplyResponse, error) {
	p, err := a.plan(req)
	if err != nil {
		a.outcome(ctx, auditlog.New, a.record(ctx, "apply", "", err, nil))
		return nil, a.toStatus(err)
	}
	if err := refuseUnconfirmed(p, req.Yes); err != nil {
		a.outcome(ctx, auditlog.New, a.record(ctx, "apply", "", err, nil))
		return nil, err
	}
	if len(p.Bans) > 0 {
		if p, err = a.banAndPlan(ctx, p, func() (*registry.Plan, error) { return a.plan(req) }); err != nil {
			return nil, a.toStatus(err)
		}
	}
	return a.commit(ctx, "apply", p, auditlog.New)
}

// banAndPlan bans the agents that a plan revokes and plans anew, so that it revokes what they obtained until they were banned.
func (a *API) banAndPlan(ctx context.Context, p *registry.Plan, plan func() (*registry.Plan, error)) (*registry.Plan, error) {
	for _, id := range p.Bans {
		if _, err := a.BanAgent(ctx, &agentv1.BanAgentRequest{Id: protoID(id)}); err != nil && status.Code(err) != codes.NotFound {
			return nil, err
		}
	}
	return plan()
}

// refuseUnconfirmed refuses a plan that must be confirmed and is not.
func refuseUnconfirmed(p *registry.Plan, yes bool) error {
	if yes {
		return nil
	}
	if err := p.NeedsYes(); err != nil {
		between := "; "
		if len(p.Dangers) == 0 {
			between = "\n"
		}
		return status.Errorf(codes.FailedPrecondition, "%v%sapply it with --yes if that is meant", err, between)
	}
	return nil
}

func (a *API) commit(ctx context.Context, event string, p *registry.Plan, class auditlog.Class) (*adminv1.ApplyResponse, error) {
	subjects := changedBy(p)
	if len(subjects) == 0 {
		return answer(p, p.Revision), nil
	}
	rev, err := a.apply(ctx, event, p, class, subjects)
	if err != nil {
		return nil, a.toStatus(err)
	}
	return answer(p, rev), nil
}

// apply commits a plan that changes subjects, between what the audit log says of it before and after.
func (a *API) apply(ctx context.Context, event string, p *registry.Plan, class auditlog.Class, subjects []string) (store.Revision, error) {
	if err := a.intend(ctx, class, event, subjects, nil); err != nil {
		return 0, err
	}
	rev, err := a.c.Registry.Apply(ctx, p)
	var records []auditlog.Record
	for _, c := range p.Changes {
		if c.Action == registry.Unchanged {
			continue
		}
		details := map[string]any{"revision": int64(rev), "differences": bounded(c.Differences)}
		if c.Entry != nil {
			details["spiffe_id"] = c.Entry.IDText()
			maps.Copy(details, entryDetails(c.Entry))
		}
		if v := c.Revocation; v != nil {
			details["target"], details["revocations"] = bounded([]string{v.Target})[0], len(v.Items)
			if !v.Expires.IsZero() {
				details["expires"] = v.Expires.UTC().Format(time.RFC3339)
			}
			if len(v.Items) > 0 && v.Items[0].Reason != "" {
				details["reason"] = v.Items[0].Reason
			}
		}
		if f := c.Federation; f != nil {
			details["trust_domain"] = f.TrustDomain.Name()
			maps.Copy(details, federationDetails(f, nil))
			details["bundle"] = f.Initial != ""
		}
		if c.Rules != nil {
			details["rules"] = bounded(c.Rules)
		}
		records = append(records, a.record(ctx, "resource."+actionNames[c.Action], c.Kind+"/"+c.Name, err, details))
	}
	a.outcome(ctx, class, records...)
	return rev, err
}

// changedBy names what a plan changes.
func changedBy(p *registry.Plan) []string {
	var subjects []string
	for _, c := range p.Changes {
		if c.Action != registry.Unchanged {
			subjects = append(subjects, c.Kind+"/"+c.Name)
		}
	}
	return subjects
}

var actionNames = map[registry.Action]string{registry.Create: "create", registry.Change: "change", registry.Delete: "delete"}

func answer(p *registry.Plan, rev store.Revision) *adminv1.ApplyResponse {
	out := &adminv1.ApplyResponse{Revision: int64(rev)}
	for _, c := range p.Changes {
		action := map[registry.Action]adminv1.Action{registry.Unchanged: adminv1.Action_ACTION_UNCHANGED, registry.Create: adminv1.Action_ACTION_CREATE,
			registry.Change: adminv1.Action_ACTION_CHANGE, registry.Delete: adminv1.Action_ACTION_DELETE}[c.Action]
		out.Changes = append(out.Changes, &adminv1.Change{Action: action, Kind: c.Kind, Name: c.Name, Differences: c.Differences})
	}
	for _, l := range p.Lockouts {
		out.Warnings = append(out.Warnings, l.String())
	}
	if p.LockoutsUnsure {
		out.Warnings = append(out.Warnings, "there is so much to look at that it is not sure whether this locks anybody out; 'signet policy diff' looks at one service")
	}
	for _, f := range p.Findings {
		out.Warnings = append(out.Warnings, f.String())
	}
	if p.FindingsOmitted > 0 {
		out.Warnings = append(out.Warnings, fmt.Sprintf("and %d more findings", p.FindingsOmitted))
	}
	for _, w := range p.Warnings {
		out.Warnings = append(out.Warnings, w.Text)
	}
	out.Warnings = append(out.Warnings, p.Dangers...)
	return out
}

// GetResources implements signet.admin.v1.
func (a *API) GetResources(_ context.Context, req *adminv1.GetResourcesRequest) (*adminv1.GetResourcesResponse, error) {
	all, err := a.c.Registry.Resources(req.Kind, req.Name)
	if err != nil {
		return nil, a.toStatus(err)
	}
	after, err := readToken(req.PageToken)
	if err != nil {
		return nil, a.toStatus(err)
	}
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, a.toStatus(err)
	}
	size = min(size, 1000)
	from := 0
	if after != "" {
		from, _ = slices.BinarySearchFunc(all, after, func(r registry.Resource, name string) int {
			if r.Document.Name <= name {
				return -1
			}
			return 1
		})
	}
	var counts map[string]PodCount
	if a.c.Pods != nil && slices.ContainsFunc(all, func(r registry.Resource) bool { return r.Templated }) {
		counts = a.c.Pods.Counts()
	}
	out := &adminv1.GetResourcesResponse{}
	sum := 0
	for i, r := range all[from:] {
		if sum += len(r.Document.Content); i == size || i > 0 && sum > maxPageBytes {
			out.NextPageToken = writeToken(all[from+i-1].Document.Name)
			break
		}
		n, counted := counts[r.Document.Name]
		if !counted {
			n.Given = r.Pods
		}
		out.Resources = append(out.Resources, &adminv1.Resource{Kind: r.Kind, Name: r.Document.Name, Revision: int64(r.Revision),
			CreatedAt: timestamppb.New(r.CreatedAt), EntryId: string(r.EntryID), Templated: r.Templated, Pods: int64(n.Given), RefusedPods: int64(n.Refused),
			Document: &adminv1.Document{Content: r.Document.Content, File: r.Document.File, Line: uint32(r.Document.Line)}})
	}
	return out, nil
}

// DeleteResource implements signet.admin.v1.
func (a *API) DeleteResource(ctx context.Context, req *adminv1.DeleteResourceRequest) (*adminv1.DeleteResourceResponse, error) {
	if req.Name == "" {
		return nil, a.toStatus(&registry.ValidationError{Field: "name", Problem: "missing"})
	}
	p, err := a.c.Registry.PlanDelete(req.Kind, req.Name, req.Yes)
	if err == nil {
		err = refuseUnconfirmed(p, req.Yes)
	}
	if err != nil {
		a.outcome(ctx, auditlog.New, a.record(ctx, "resource.delete", clip(req.Kind+"/"+req.Name), err, nil))
		return nil, a.toStatus(err)
	}
	out, err := a.commit(store.WithReserve(ctx), "delete", p, auditlog.Essential)
	if err != nil {
		return nil, err
	}
	return &adminv1.DeleteResourceResponse{Revision: out.Revision}, nil
}

// GetPolicySet implements signet.admin.v1.
func (a *API) GetPolicySet(context.Context, *adminv1.GetPolicySetRequest) (*adminv1.GetPolicySetResponse, error) {
	return &adminv1.GetPolicySetResponse{Policies: a.c.Registry.PolicySet(a.c.Epoch)}, nil
}

// CreateJoinToken implements signet.admin.v1: a token for nodes of the given groups. (SPIRE's RPC of the same name is
// on its Agent service.)
func (a *AdminServer) CreateJoinToken(ctx context.Context, req *adminv1.CreateJoinTokenRequest) (*adminv1.CreateJoinTokenResponse, error) {
	ttl := time.Duration(req.Ttl) * time.Second
	switch {
	case req.Ttl < 0 || req.Ttl > int64(maxTokenTTL/time.Second):
		return nil, a.toStatus(&registry.ValidationError{Field: "ttl", Value: fmt.Sprint(req.Ttl), Problem: "must be 1 to 86400 seconds; 0 means 600"})
	case req.Ttl == 0:
		ttl = defaultTokenTTL
	}
	const maxGroups = 16
	if len(req.NodeGroups) > maxGroups {
		return nil, a.toStatus(&registry.ValidationError{Field: "node_groups", Problem: fmt.Sprintf("at most %d are allowed", maxGroups)})
	}
	for i, g := range req.NodeGroups {
		if err := registry.CheckName(g); err != nil {
			return nil, a.toStatus(&registry.ValidationError{Field: "node_groups", Value: g, Problem: err.Error()})
		}
		if slices.Contains(req.NodeGroups[:i], g) {
			return nil, a.toStatus(&registry.ValidationError{Field: "node_groups", Value: g, Problem: "is named twice"})
		}
	}
	t, rec, id, err := a.createToken(ctx, ttl, req.NodeGroups, nil)
	if err != nil {
		return nil, a.toStatus(err)
	}
	return tokenAnswer(t, rec, id), nil
}

// AdminServer is signet.admin.v1. It is a type of its own because SPIRE's Agent service has an RPC of the same name.
type AdminServer struct{ *API }

// ListAgentStatus implements signet.admin.v1.
func (a *API) ListAgentStatus(_ context.Context, req *adminv1.ListAgentStatusRequest) (*adminv1.ListAgentStatusResponse, error) {
	after, err := readToken(req.PageToken)
	if err != nil {
		return nil, a.toStatus(err)
	}
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, a.toStatus(err)
	}
	size = min(size, 1000)
	page, more := a.c.Registry.ListNodes(func(n *registry.Node) bool { return req.AgentId == "" || n.ID.String() == req.AgentId }, after, size)
	if req.AgentId != "" && len(page) == 0 {
		return nil, status.Errorf(codes.NotFound, "agent %q not found", clip(req.AgentId))
	}
	follow := a.c.Following()
	out := &adminv1.ListAgentStatusResponse{Revision: int64(a.c.Registry.Revision())}
	for _, n := range page {
		st := &adminv1.AgentStatus{AgentId: n.ID.String(), AttestationType: n.Attestation, Banned: n.Banned, SerialNumber: n.Serial, AgentVersion: n.Version}
		for _, s := range n.Selectors {
			st.Selectors = append(st.Selectors, s.String())
		}
		if !n.ExpiresAt.IsZero() {
			st.ExpiresAt = timestamppb.New(n.ExpiresAt)
		}
		if f, ok := follow[n.ID]; ok {
			st.Connected, st.AcknowledgedRevision, st.AgentVersion, st.RemoteAddress, st.Entries = true, int64(f.Acknowledged), f.Version, f.Address, int64(f.Entries)
		}
		out.Agents = append(out.Agents, st)
	}
	if more {
		out.NextPageToken = writeToken(page[len(page)-1].ID.String())
	}
	return out, nil
}

// GetStatus implements signet.admin.v1.
func (a *API) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	e, n, p := a.c.Registry.Counts()
	return &adminv1.GetStatusResponse{TrustDomain: a.c.TrustDomain.Name(), Version: a.c.Version, Epoch: a.c.Epoch, Revision: int64(a.c.Registry.Revision()),
		Entries: int64(e), Agents: int64(n), Policies: int64(p), Followers: int64(a.c.Registry.Followers())}, nil
}
