package adminapi

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

var allAgentFields = &types.AgentMask{AttestationType: true, X509SvidSerialNumber: true, X509SvidExpiresAt: true, Selectors: true, Banned: true, CanReattest: true, AgentVersion: true}

func protoAgent(n *registry.Node, m *types.AgentMask) *types.Agent {
	if m == nil {
		m = allAgentFields
	}
	out := &types.Agent{Id: protoID(n.ID), Banned: m.Banned && n.Banned, CanReattest: m.CanReattest && n.CanReattest}
	if m.AttestationType {
		out.AttestationType = n.Attestation
	}
	if m.X509SvidSerialNumber {
		out.X509SvidSerialNumber = n.Serial
	}
	if m.X509SvidExpiresAt && !n.ExpiresAt.IsZero() {
		out.X509SvidExpiresAt = n.ExpiresAt.Unix()
	}
	if m.Selectors {
		for _, s := range n.Selectors {
			out.Selectors = append(out.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
		}
	}
	if m.AgentVersion {
		out.AgentVersion = n.Version
	}
	return out
}

func agentFilter(f *agentv1.ListAgentsRequest_Filter) (func(*registry.Node) bool, error) {
	if f == nil {
		return func(*registry.Node) bool { return true }, nil
	}
	var want []spiffe.Selector
	var kind registry.MatchKind
	if m := f.BySelectorMatch; m != nil {
		var err error
		if len(m.Selectors) == 0 {
			return nil, &registry.ValidationError{Field: "filter.by_selector_match", Problem: "needs at least one selector"}
		}
		if want, err = selectors("filter.by_selector_match", m.Selectors); err != nil {
			return nil, err
		}
		if kind, err = matchKind("filter.by_selector_match", int32(m.Match)); err != nil {
			return nil, err
		}
	}
	var before time.Time
	if f.ByExpiresBefore != "" {
		var err error
		if before, err = time.Parse("2006-01-02 15:04:05 -0700 -07", f.ByExpiresBefore); err != nil {
			if before, err = time.Parse(time.RFC3339, f.ByExpiresBefore); err != nil {
				return nil, &registry.ValidationError{Field: "filter.by_expires_before", Value: f.ByExpiresBefore, Problem: "is not a time such as 2027-01-31T00:00:00Z"}
			}
		}
	}
	return func(n *registry.Node) bool {
		switch {
		case f.ByAttestationType != "" && n.Attestation != f.ByAttestationType,
			f.ByBanned != nil && n.Banned != f.ByBanned.Value,
			f.ByCanReattest != nil && n.CanReattest != f.ByCanReattest.Value,
			!before.IsZero() && !n.ExpiresAt.Before(before),
			want != nil && !registry.MatchSelectors(kind, n.Selectors, want):
			return false
		}
		return true
	}, nil
}

// ListAgents returns a page of attested agents in order of ID. [SPIRE-PROTOCOL §14]
func (a *API) ListAgents(_ context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	keep, err := agentFilter(req.Filter)
	if err != nil {
		return nil, a.toStatus(err)
	}
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, a.toStatus(err)
	}
	list := cursor{list: "agents", filter: req.Filter}
	after, err := list.read(req.PageToken)
	if err != nil {
		return nil, a.toStatus(err)
	}
	page, more := a.c.Registry.ListNodes(keep, after, size)
	if err := checkUnpaged(req.PageSize, more); err != nil {
		return nil, err
	}
	out := &agentv1.ListAgentsResponse{}
	bytes := 0
	for i, n := range page {
		m := protoAgent(n, req.OutputMask)
		if bytes += proto.Size(m); req.PageSize > 0 && i > 0 && bytes > maxPageBytes {
			out.NextPageToken = list.write(page[i-1].ID.String())
			return out, nil
		}
		if err := checkUnpaged(req.PageSize, bytes > maxUnpagedBytes); err != nil {
			return nil, err
		}
		out.Agents = append(out.Agents, m)
	}
	if more {
		out.NextPageToken = list.write(page[len(page)-1].ID.String())
	}
	return out, nil
}

// CountAgents counts matching agents. [SPIRE-PROTOCOL §14]
func (a *API) CountAgents(_ context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	var f *agentv1.ListAgentsRequest_Filter
	if in := req.Filter; in != nil {
		f = &agentv1.ListAgentsRequest_Filter{ByAttestationType: in.ByAttestationType, BySelectorMatch: in.BySelectorMatch,
			ByBanned: in.ByBanned, ByCanReattest: in.ByCanReattest, ByExpiresBefore: in.ByExpiresBefore}
	}
	keep, err := agentFilter(f)
	if err != nil {
		return nil, a.toStatus(err)
	}
	page, _ := a.c.Registry.ListNodes(keep, "", int(^uint(0)>>1))
	return &agentv1.CountAgentsResponse{Count: int32(len(page))}, nil
}

func (a *API) agentID(in *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := a.ownID("id", in)
	if err != nil {
		return id, err
	}
	if id = registry.NormaliseAgentID(id); !registry.IsAgentID(id) {
		return id, &registry.ValidationError{Field: "id", Value: id.String(), Problem: "is not an agent's; agents' IDs begin with spiffe://" + a.c.TrustDomain.Name() + "/spire/agent/"}
	}
	return id, nil
}

// GetAgent returns one attested agent. [SPIRE-PROTOCOL §14]
func (a *API) GetAgent(_ context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	id, err := a.agentID(req.Id)
	if err != nil {
		return nil, a.toStatus(err)
	}
	n, err := a.c.Registry.Node(id)
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "agent %q not found", id)
	}
	return protoAgent(n, req.OutputMask), nil
}

// DeleteAgent evicts an agent: it loses its SVID at once and may attest again. [SPIRE-PROTOCOL §4]
func (a *API) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	return a.changeAgent(ctx, "agent.evict", req.Id, func(id spiffeid.ID) error {
		_, err := a.c.Registry.DeleteNode(store.WithReserve(ctx), id)
		return err
	})
}

// BanAgent bans an agent: it loses its SVID at once and may not attest until it is deleted or un-banned.
// [SPIRE-PROTOCOL §4]
func (a *API) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	return a.changeAgent(ctx, "agent.ban", req.Id, func(id spiffeid.ID) error {
		return a.updateNode(store.WithReserve(ctx), id, func(n *registry.Node) {
			// The keys stay for an un-ban: until then they open nothing.
			n.Banned, n.Active, n.Serial, n.NewSerial = true, true, "", ""
		})
	})
}

// UnbanAgent lifts a ban. The agent's SVID stays dead: the node attests again with its evidence, and one that has none to show
// again, as after a join token, wins a new SVID with its last key. [docs/decisions/0004, 0017]
func (a *API) UnbanAgent(ctx context.Context, req *adminv1.UnbanAgentRequest) (*adminv1.UnbanAgentResponse, error) {
	id, err := spiffe.ParseWorkloadID(req.AgentId)
	if err != nil {
		return nil, a.toStatus(&registry.ValidationError{Field: "agent_id", Value: req.AgentId, Problem: err.Error()})
	}
	_, err = a.changeAgent(ctx, "agent.unban", protoID(id), func(id spiffeid.ID) error {
		n, err := a.c.Registry.NodeNow(ctx, id)
		if err != nil {
			return err
		}
		if !n.Banned {
			return status.Errorf(codes.FailedPrecondition, "agent %q is not banned", id)
		}
		if n.CanReattest || len(n.Key) == 0 && len(n.NewKey) == 0 {
			_, err = a.c.Registry.DeleteNode(store.WithReserve(ctx), id)
			return err
		}
		return a.updateNode(store.WithReserve(ctx), id, func(n *registry.Node) { n.Banned = false })
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.UnbanAgentResponse{Revision: int64(a.c.Registry.Revision())}, nil
}

func (a *API) changeAgent(ctx context.Context, event string, in *types.SPIFFEID, change func(spiffeid.ID) error) (*emptypb.Empty, error) {
	id, err := a.agentID(in)
	if err != nil {
		return nil, a.toStatus(err)
	}
	if err := a.intend(ctx, auditlog.Essential, event, []string{id.String()}, nil); err != nil {
		return nil, a.toStatus(err)
	}
	err = change(id)
	if errors.Is(err, registry.ErrNotFound) {
		err = status.Errorf(codes.NotFound, "agent %q not found", id)
	}
	a.outcome(ctx, auditlog.Essential, a.record(ctx, event, id.String(), err, nil))
	if err != nil {
		return nil, a.toStatus(err)
	}
	return &emptypb.Empty{}, nil
}

func (a *API) updateNode(ctx context.Context, id spiffeid.ID, change func(*registry.Node)) error {
	const attempts = 8
	for range attempts {
		n, err := a.c.Registry.NodeNow(ctx, id)
		if err != nil {
			return err
		}
		change(n)
		if err = a.c.Registry.PutNode(ctx, n, nil); !errors.Is(err, registry.ErrConflict) {
			return err
		}
	}
	return registry.ErrConflict
}

// Bounds of join tokens' validity.
const (
	defaultTokenTTL = 10 * time.Minute
	maxTokenTTL     = 24 * time.Hour
)

// CreateJoinToken is SPIRE's RPC. The token is made here; with agent_id an entry makes that ID an alias of the node.
// [SPIRE-PROTOCOL §3.1]
func (a *API) CreateJoinToken(ctx context.Context, req *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	if req.Token != "" {
		return nil, a.toStatus(&registry.ValidationError{Field: "token", Problem: "leave it empty: the CA makes the token, which carries a pin of its authority"})
	}
	if req.Ttl < 1 {
		return nil, a.toStatus(&registry.ValidationError{Field: "ttl", Problem: "must be at least 1 second"})
	}
	var alias *registry.Entry
	if req.AgentId != nil {
		id, err := a.ownID("agent_id", req.AgentId)
		if err != nil {
			return nil, a.toStatus(err)
		}
		alias = &registry.Entry{SPIFFEID: id}
	}
	token, rec, _, err := a.createToken(ctx, time.Duration(req.Ttl)*time.Second, nil, alias)
	if err != nil {
		return nil, a.toStatus(err)
	}
	return &types.JoinToken{Value: token.Reveal(), ExpiresAt: rec.ExpiresAt.Unix()}, nil
}

func (a *API) createToken(ctx context.Context, ttl time.Duration, groups []string, alias *registry.Entry) (t registry.JoinToken, rec *registry.Token, id spiffeid.ID, err error) {
	if ttl > maxTokenTTL {
		return t, nil, id, &registry.ValidationError{Field: "ttl", Value: ttl.String(), Problem: "at most " + maxTokenTTL.String() + " is allowed"}
	}
	t = registry.NewJoinToken(a.c.Authority.Pin())
	if id, err = registry.AgentID(a.c.TrustDomain, "join_token", t.ID()); err != nil {
		return t, nil, id, err
	}
	if alias != nil {
		alias.ParentID = id
		alias.Selectors = []spiffe.Selector{{Type: "spiffe_id", Value: id.String()}}
	}
	details := map[string]any{"ttl": int64(ttl / time.Second), "node_groups": groups}
	if err = a.intend(ctx, auditlog.New, "token.create", []string{id.String()}, details); err != nil {
		return t, nil, id, err
	}
	rec, err = a.c.Registry.CreateToken(ctx, t, ttl, groups, alias)
	a.outcome(ctx, auditlog.New, a.record(ctx, "token.create", id.String(), err, details))
	return t, rec, id, err
}

// tokenAnswer converts for signet.admin.v1.
func tokenAnswer(t registry.JoinToken, rec *registry.Token, id spiffeid.ID) *adminv1.CreateJoinTokenResponse {
	return &adminv1.CreateJoinTokenResponse{Token: t.Reveal(), AgentId: id.String(), ExpiresAt: timestamppb.New(rec.ExpiresAt)}
}
