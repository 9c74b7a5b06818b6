package adminapi

import (
	"context"
	"errors"
	"time"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/rotation"
)

// This file is SPIRE's LocalAuthority service. It has no words for what an activation waits for: it waits a little, for
// agents that are just about to answer, and then says who lags. [SPIRE-PROTOCOL §14]

// activateWait is how long ActivateX509Authority and its siblings wait for laggards: two rounds of SPIRE's agents,
// which fetch the bundle every five seconds.
const activateWait = 12 * time.Second

func spireState(x authority.Authority) *localauthorityv1.AuthorityState {
	return &localauthorityv1.AuthorityState{AuthorityId: x.ID, ExpiresAt: x.NotAfter.Unix()}
}

// states returns the active, the prepared and the newest old authority of a kind; nil where there is none.
func (a *API) states(kind authority.Kind) (active, prepared, old *localauthorityv1.AuthorityState) {
	for _, x := range a.c.Authority.Authorities(kind) { // oldest first
		switch x.State {
		case authority.StateActive:
			active = spireState(x)
		case authority.StatePrepared:
			prepared = spireState(x)
		case authority.StateOld, authority.StateTainted:
			old = spireState(x)
		}
	}
	return active, prepared, old
}

func (a *API) spireStatus(err error) error {
	return a.authorityStatus(err, codes.InvalidArgument, codes.InvalidArgument)
}

func (a *API) spirePrepare(ctx context.Context, kind authority.Kind) (*localauthorityv1.AuthorityState, error) {
	st, err := a.c.Rotation.Prepare(ctx, actor(ctx), kind)
	if err != nil {
		return nil, a.spireStatus(err)
	}
	return spireState(st.Authority), nil
}

func (a *API) spireActivate(ctx context.Context, kind authority.Kind, id string) (*localauthorityv1.AuthorityState, error) {
	if id == "" {
		return nil, errNoAuthorityID
	}
	patience, cancel := context.WithTimeout(ctx, activateWait)
	defer cancel()
	st, err := a.c.Rotation.Activate(patience, actor(ctx), kind, id, rotation.How{Wait: true})
	return a.spireStep(st, err, authority.StatePrepared)
}

var errNoAuthorityID = status.Error(codes.InvalidArgument, "no authority ID provided")

func (a *API) spireEnd(ctx context.Context, kind authority.Kind, id string, from authority.State,
	end func(context.Context, rotation.Actor, authority.Kind, string, bool) (authority.Step, error)) (*localauthorityv1.AuthorityState, error) {
	if id == "" {
		return nil, errNoAuthorityID
	}
	st, err := end(ctx, actor(ctx), kind, id, false)
	return a.spireStep(st, err, from)
}

// spireStep refuses a step that was already made, which is no error elsewhere.
func (a *API) spireStep(st authority.Step, err error, from authority.State) (*localauthorityv1.AuthorityState, error) {
	if err == nil && !st.Changed {
		err = &authority.StateError{Kind: st.Kind, ID: st.ID, State: st.State, Want: from}
	}
	if err != nil {
		return nil, a.spireStatus(err)
	}
	return spireState(st.Authority), nil
}

// GetX509AuthorityState implements SPIRE's LocalAuthority.
func (a *API) GetX509AuthorityState(context.Context, *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	active, prepared, old := a.states(authority.KindX509)
	return &localauthorityv1.GetX509AuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

// PrepareX509Authority implements SPIRE's LocalAuthority.
func (a *API) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	st, err := a.spirePrepare(ctx, authority.KindX509)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: st}, nil
}

// ActivateX509Authority implements SPIRE's LocalAuthority.
func (a *API) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	st, err := a.spireActivate(ctx, authority.KindX509, req.AuthorityId)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: st}, nil
}

// TaintX509Authority implements SPIRE's LocalAuthority.
func (a *API) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	if a.c.Authority.HasUpstream() {
		return nil, errUpstream
	}
	st, err := a.spireEnd(ctx, authority.KindX509, req.AuthorityId, authority.StateOld, a.c.Rotation.Taint)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: st}, nil
}

// RevokeX509Authority implements SPIRE's LocalAuthority.
func (a *API) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	if a.c.Authority.HasUpstream() {
		return nil, errUpstream
	}
	st, err := a.spireEnd(ctx, authority.KindX509, req.AuthorityId, authority.StateTainted, a.c.Rotation.Revoke)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: st}, nil
}

var errNoUpstream = status.Error(codes.FailedPrecondition, "no upstream authority is configured: the X.509 authorities sign themselves")

// errUpstream answers for local X.509 authorities below an upstream CA: a root of the upstream is what can be tainted.
var errUpstream = status.Error(codes.FailedPrecondition, "an upstream authority is configured: its authorities are tainted and revoked, not local ones")

// TaintX509UpstreamAuthority implements SPIRE's LocalAuthority.
func (a *API) TaintX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	if err := a.endRoot(ctx, req.SubjectKeyId, a.c.Rotation.TaintRoot); err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: req.SubjectKeyId}, nil
}

// RevokeX509UpstreamAuthority implements SPIRE's LocalAuthority.
func (a *API) RevokeX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.RevokeX509UpstreamAuthorityRequest) (*localauthorityv1.RevokeX509UpstreamAuthorityResponse, error) {
	if err := a.endRoot(ctx, req.SubjectKeyId, a.c.Rotation.RevokeRoot); err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: req.SubjectKeyId}, nil
}

func (a *API) endRoot(ctx context.Context, id string, end func(context.Context, rotation.Actor, string) error) error {
	switch {
	case !a.c.Authority.HasUpstream():
		return errNoUpstream
	case id == "":
		return status.Error(codes.InvalidArgument, "no subject key id provided")
	}
	err := end(ctx, actor(ctx), id)
	switch {
	case errors.Is(err, authority.ErrUnknownRoot):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, authority.ErrRootState):
		return status.Error(codes.FailedPrecondition, err.Error())
	case err != nil:
		return a.spireStatus(err)
	}
	return nil
}

// GetJWTAuthorityState implements SPIRE's LocalAuthority.
func (a *API) GetJWTAuthorityState(context.Context, *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	active, prepared, old := a.states(authority.KindJWT)
	return &localauthorityv1.GetJWTAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

// PrepareJWTAuthority implements SPIRE's LocalAuthority.
func (a *API) PrepareJWTAuthority(ctx context.Context, _ *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	st, err := a.spirePrepare(ctx, authority.KindJWT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareJWTAuthorityResponse{PreparedAuthority: st}, nil
}

// ActivateJWTAuthority implements SPIRE's LocalAuthority.
func (a *API) ActivateJWTAuthority(ctx context.Context, req *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	st, err := a.spireActivate(ctx, authority.KindJWT, req.AuthorityId)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: st}, nil
}

// TaintJWTAuthority implements SPIRE's LocalAuthority.
func (a *API) TaintJWTAuthority(ctx context.Context, req *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	st, err := a.spireEnd(ctx, authority.KindJWT, req.AuthorityId, authority.StateOld, a.c.Rotation.Taint)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: st}, nil
}

// RevokeJWTAuthority implements SPIRE's LocalAuthority.
func (a *API) RevokeJWTAuthority(ctx context.Context, req *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	st, err := a.spireEnd(ctx, authority.KindJWT, req.AuthorityId, authority.StateTainted, a.c.Rotation.Revoke)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: st}, nil
}

// errNoWIT answers for WIT authorities while WIT-SVIDs are not enabled.
var errNoWIT = status.Error(codes.Unimplemented, "WIT functionality is disabled")

// GetWITAuthorityState implements SPIRE's LocalAuthority.
func (a *API) GetWITAuthorityState(context.Context, *localauthorityv1.GetWITAuthorityStateRequest) (*localauthorityv1.GetWITAuthorityStateResponse, error) {
	if !a.c.Authority.WITEnabled() {
		return nil, errNoWIT
	}
	active, prepared, old := a.states(authority.KindWIT)
	return &localauthorityv1.GetWITAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

// PrepareWITAuthority implements SPIRE's LocalAuthority.
func (a *API) PrepareWITAuthority(ctx context.Context, _ *localauthorityv1.PrepareWITAuthorityRequest) (*localauthorityv1.PrepareWITAuthorityResponse, error) {
	if !a.c.Authority.WITEnabled() {
		return nil, errNoWIT
	}
	st, err := a.spirePrepare(ctx, authority.KindWIT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareWITAuthorityResponse{PreparedAuthority: st}, nil
}

// ActivateWITAuthority implements SPIRE's LocalAuthority.
func (a *API) ActivateWITAuthority(ctx context.Context, req *localauthorityv1.ActivateWITAuthorityRequest) (*localauthorityv1.ActivateWITAuthorityResponse, error) {
	if !a.c.Authority.WITEnabled() {
		return nil, errNoWIT
	}
	st, err := a.spireActivate(ctx, authority.KindWIT, req.AuthorityId)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateWITAuthorityResponse{ActivatedAuthority: st}, nil
}

// TaintWITAuthority implements SPIRE's LocalAuthority.
func (a *API) TaintWITAuthority(ctx context.Context, req *localauthorityv1.TaintWITAuthorityRequest) (*localauthorityv1.TaintWITAuthorityResponse, error) {
	if !a.c.Authority.WITEnabled() {
		return nil, errNoWIT
	}
	st, err := a.spireEnd(ctx, authority.KindWIT, req.AuthorityId, authority.StateOld, a.c.Rotation.Taint)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintWITAuthorityResponse{TaintedAuthority: st}, nil
}

// RevokeWITAuthority implements SPIRE's LocalAuthority.
func (a *API) RevokeWITAuthority(ctx context.Context, req *localauthorityv1.RevokeWITAuthorityRequest) (*localauthorityv1.RevokeWITAuthorityResponse, error) {
	if !a.c.Authority.WITEnabled() {
		return nil, errNoWIT
	}
	st, err := a.spireEnd(ctx, authority.KindWIT, req.AuthorityId, authority.StateTainted, a.c.Rotation.Revoke)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeWITAuthorityResponse{RevokedAuthority: st}, nil
}
