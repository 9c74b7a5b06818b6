package nodeapi

import (
	"context"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/store"
)

// PostStatus notes what version the calling agent is. SPIRE's agents call it once when they start. The serial number of the
// bundle that they tell of is not looked at: they send none. [SPIRE-PROTOCOL §2]
func (a *API) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	c := access.From(ctx)
	if req.AgentVersion != "" { // optional: nothing said is no reason to forget
		if err := a.c.Registry.NoteVersion(store.WithReserve(ctx), c.ID, clip(req.AgentVersion)); err != nil {
			return nil, a.toStatus(err)
		}
	}
	return &agentv1.PostStatusResponse{}, nil
}
