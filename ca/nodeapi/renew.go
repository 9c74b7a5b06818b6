package nodeapi

import (
	"context"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
)

// RenewAgent signs a new SVID for the calling agent. The old one stays valid until the new one is first used.
// [SPIRE-PROTOCOL §4]
func (a *API) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	c := access.From(ctx)
	fail := func(err error) (*agentv1.RenewAgentResponse, error) {
		a.c.Issued("agent", "refused", 1)
		return nil, a.refuse(ctx, "agent.renew", c.ID.String(), err, nil)
	}
	if req.GetParams() == nil || len(req.Params.Csr) == 0 {
		return fail(status.Error(codes.InvalidArgument, "malformed param: missing CSR"))
	}
	if c.Node.CanReattest {
		return fail(access.Denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent %s must attest again instead of renewing", c.ID))
	}
	key, err := authority.CheckCSR(req.Params.Csr, spiffeid.ID{})
	if err != nil {
		return fail(err)
	}
	spki, err := marshalKey(key)
	if err != nil {
		return fail(err)
	}
	svid, err := a.signAgent(ctx, c.ID, key)
	if err != nil {
		return fail(err)
	}
	node := *c.Node
	const attempts = 4
	for range attempts {
		node.NewSerial, node.NewExpiresAt, node.NewKey, node.NewPlace = svid.SerialNumber, svid.NotAfter, spki, c.Place()
		if err = a.c.Registry.PutNode(store.WithReserve(ctx), &node, nil); !errors.Is(err, registry.ErrConflict) {
			break
		}
		// Somebody banned or evicted it meanwhile, or its SVID was promoted: judge it again.
		fresh, cerr := a.c.Guard.CheckAgent(ctx, c)
		if cerr != nil {
			return fail(cerr)
		}
		node = *fresh
	}
	if err != nil {
		return fail(err)
	}
	if err := a.auditAgent(ctx, auditlog.Essential, "agent.renewed", c.ID, svid, map[string]any{}); err != nil {
		return fail(err)
	}
	a.c.Issued("agent", "", 1)
	return &agentv1.RenewAgentResponse{Svid: joinChain(svid, c.ID)}, nil
}
