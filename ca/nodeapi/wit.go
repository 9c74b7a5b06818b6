package nodeapi

import (
	"context"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// BatchNewWITSVID signs a WIT-SVID per item by public key, if WIT-SVIDs are enabled. As with X509-SVIDs by public key the
// agent is the registration authority: it vouches that the key is the workload's. [WIT-SVID §3, SPIRE-PROTOCOL §14]
func (a *API) BatchNewWITSVID(ctx context.Context, req *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	if !a.c.Authority.WITEnabled() {
		return nil, a.toStatus(authority.ErrNoWIT)
	}
	c := access.From(ctx)
	ids := make([]registry.EntryID, len(req.Params))
	for i, p := range req.Params {
		ids[i] = registry.EntryID(p.GetEntryId())
	}
	entries, err := a.authorizedEntries(ctx, c, "params", ids)
	if err != nil {
		return nil, err
	}
	svids, errs := make([]*authority.WITSVID, len(ids)), make([]error, len(ids))
	spread(len(ids), parallelJWTs, func(i int) { svids[i], errs[i] = a.newWIT(ctx, req.Params[i], entries[i]) })

	out := &svidv1.BatchNewWITSVIDResponse{Results: make([]*svidv1.BatchNewWITSVIDResponse_Result, len(ids))}
	var issued, refused []auditlog.Record
	now := a.c.Now()
	for i, err := range errs {
		if err != nil {
			st := status.Convert(a.toStatus(err))
			out.Results[i] = &svidv1.BatchNewWITSVIDResponse_Result{Status: &types.Status{Code: int32(st.Code()), Message: st.Message()}}
			refused = append(refused, auditlog.Record{Time: now, Event: "witsvid.refused", Actor: c.ID.String(), ActorKind: "agent", Subject: clip(string(ids[i])),
				Outcome: auditlog.Refused, Details: map[string]any{"reason": excerpt(st.Message())}})
			continue
		}
		e, svid := entries[i], svids[i]
		a.canary(ctx, c, e, "wit")
		out.Results[i] = &svidv1.BatchNewWITSVIDResponse_Result{Status: &types.Status{Code: int32(codes.OK), Message: "OK"}, Svid: &types.WITSVID{
			Token: svid.Token, Id: protoID(e.SPIFFEID), ExpiresAt: svid.Expiry.Unix(), IssuedAt: svid.IssuedAt.Unix(), Hint: e.Hint}}
		issued = append(issued, auditlog.Record{Time: now, Event: "witsvid.issued", Actor: c.ID.String(), ActorKind: "agent", Subject: e.SPIFFEID.String(),
			Outcome: auditlog.Done, Details: map[string]any{"entry_id": string(e.ID), "jti": svid.JTI, "not_after": svid.Expiry.Unix(), "authority": svid.KeyID}})
	}
	if err := a.audit(ctx, auditlog.Essential, issued...); err != nil {
		return nil, a.toStatus(err) // nothing leaves unlogged
	}
	if err := a.stillAdmitted(c); err != nil {
		return nil, err
	}
	a.auditRefused(ctx, refused)
	a.c.Issued("wit", "", len(issued))
	a.c.Issued("wit", "refused", len(refused))
	return out, nil
}

// newWIT signs one item for its entry, which is nil if the agent may not have it.
func (a *API) newWIT(ctx context.Context, p *svidv1.NewWITSVIDParams, e *registry.Entry) (*authority.WITSVID, error) {
	switch {
	case p.GetEntryId() == "":
		return nil, status.Error(codes.InvalidArgument, "malformed param: missing entry ID")
	case len(p.GetPublicKey()) == 0:
		return nil, status.Error(codes.InvalidArgument, "malformed param: missing public key")
	case e == nil:
		return nil, a.c.Registry.Missing(access.From(ctx).ID, registry.EntryID(p.EntryId))
	}
	key, err := authority.ParsePublicKey(p.PublicKey)
	if err != nil {
		return nil, err
	}
	_, notBefore, err := a.terms(e.SPIFFEID, nil)
	if err != nil {
		return nil, err
	}
	return a.c.Authority.SignWIT(ctx, authority.WITRequest{ID: e.SPIFFEID, NotBefore: notBefore, PublicKey: key, Algorithm: p.SigningAlgorithm})
}
