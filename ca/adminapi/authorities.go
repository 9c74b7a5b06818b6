package adminapi

import (
	"context"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/rotation"
)

func authorityKind(t adminv1.AuthorityType) (authority.Kind, error) {
	switch t {
	case adminv1.AuthorityType_AUTHORITY_TYPE_X509:
		return authority.KindX509, nil
	case adminv1.AuthorityType_AUTHORITY_TYPE_JWT:
		return authority.KindJWT, nil
	case adminv1.AuthorityType_AUTHORITY_TYPE_WIT:
		return authority.KindWIT, nil
	}
	return "", &registry.ValidationError{Field: "type", Value: t.String(), Problem: "must be x509, jwt or wit"}
}

func protoKind(k authority.Kind) adminv1.AuthorityType {
	switch k {
	case authority.KindJWT:
		return adminv1.AuthorityType_AUTHORITY_TYPE_JWT
	case authority.KindWIT:
		return adminv1.AuthorityType_AUTHORITY_TYPE_WIT
	}
	return adminv1.AuthorityType_AUTHORITY_TYPE_X509
}

func stampOf(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func protoAuthority(x authority.Authority) *adminv1.Authority {
	m := &adminv1.Authority{Type: protoKind(x.Kind), Id: x.ID, State: string(x.State), NotBefore: stampOf(x.NotBefore), NotAfter: stampOf(x.NotAfter),
		PreparedAt: stampOf(x.PreparedAt), ActivatedAt: stampOf(x.ActivatedAt), DeactivatedAt: stampOf(x.DeactivatedAt),
		TaintedAt: stampOf(x.TaintedAt), RevokedAt: stampOf(x.RevokedAt), SignedUntil: stampOf(x.SignedUntil)}
	if x.Certificate != nil {
		m.Certificate = x.Certificate.Raw
	}
	for _, c := range x.Above {
		subject := c.Subject.String()
		m.Above = append(m.Above, &adminv1.IssuingCertificate{Id: hex.EncodeToString(c.SubjectKeyId), NotBefore: stampOf(c.NotBefore), NotAfter: stampOf(c.NotAfter),
			Subject: strings.ToValidUTF8(subject[:min(len(subject), maxSubjectBytes)], "\uFFFD")})
	}
	return m
}

// maxSubjectBytes bounds what is shown of the name of a CA above.
const maxSubjectBytes = 256

func protoReadiness(r rotation.Readiness) *adminv1.Readiness {
	m := &adminv1.Readiness{LaggardCount: int64(r.Count), LiveAgents: int64(r.Live), HintsUntil: stampOf(r.HintsUntil), Deadline: stampOf(r.Deadline), Ready: r.Ready}
	for _, l := range r.Laggards {
		m.Laggards = append(m.Laggards, &adminv1.Laggard{AgentId: l.Agent.String(), Reason: l.Reason, Since: stampOf(l.Since)})
	}
	return m
}

func actor(ctx context.Context) rotation.Actor {
	c := access.From(ctx)
	return rotation.Actor{Name: c.String(), Kind: c.KindName(), Address: c.Address}
}

// ListAuthorities returns the authorities of the trust domain in every state.
func (a *API) ListAuthorities(_ context.Context, req *adminv1.ListAuthoritiesRequest) (*adminv1.ListAuthoritiesResponse, error) {
	kinds := a.c.Authority.Kinds()
	if req.Type != adminv1.AuthorityType_AUTHORITY_TYPE_UNSPECIFIED {
		kind, err := authorityKind(req.Type)
		if err != nil {
			return nil, a.toStatus(err)
		}
		kinds = []authority.Kind{kind}
	}
	out := &adminv1.ListAuthoritiesResponse{Automatic: a.c.Rotation.Automatic(), Warnings: a.c.Rotation.Warnings()}
	used := a.c.Rotation.InUse()
	for _, kind := range kinds {
		for _, x := range a.c.Authority.Authorities(kind) {
			m := protoAuthority(x)
			if u, known := used[x.ID]; known {
				m.AgentsUsing, m.AgentsUnknown = int64(u.Using), int64(u.Unknown)
			}
			if x.State == authority.StatePrepared {
				m.Readiness = protoReadiness(a.c.Rotation.Readiness(x))
			}
			out.Authorities = append(out.Authorities, m)
		}
	}
	return out, nil
}

// PrepareAuthority makes and publishes a new authority, or returns the one that is prepared.
func (a *API) PrepareAuthority(ctx context.Context, req *adminv1.PrepareAuthorityRequest) (*adminv1.AuthorityChange, error) {
	kind, err := authorityKind(req.Type)
	if err != nil {
		return nil, a.toStatus(err)
	}
	st, err := a.c.Rotation.Prepare(ctx, actor(ctx), kind)
	return a.change(st, err)
}

// ActivateAuthority makes a prepared authority the one that signs. [DESIGN §5]
func (a *API) ActivateAuthority(req *adminv1.ActivateAuthorityRequest, s grpc.ServerStreamingServer[adminv1.ActivateAuthorityResponse]) error {
	kind, err := authorityKind(req.Type)
	if err != nil {
		return a.toStatus(err)
	}
	if req.Wait && req.Force {
		return a.toStatus(&registry.ValidationError{Field: "force", Problem: "excludes wait"})
	}
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // a CA that shuts down does not wait for laggards
		select {
		case <-a.c.Stop:
			cancel()
		case <-stop:
		}
	}()
	st, err := a.c.Rotation.Activate(ctx, actor(ctx), kind, req.Id, rotation.How{Wait: req.Wait, Force: req.Force, Progress: func(r rotation.Readiness) error {
		return s.Send(&adminv1.ActivateAuthorityResponse{Message: &adminv1.ActivateAuthorityResponse_Waiting{Waiting: protoReadiness(r)}})
	}})
	change, err := a.change(st, err)
	if err != nil {
		select {
		case <-a.c.Stop:
			return status.Error(codes.Unavailable, "the CA is shutting down; ask again when it is back")
		default:
			return err
		}
	}
	return s.Send(&adminv1.ActivateAuthorityResponse{Message: &adminv1.ActivateAuthorityResponse_Change{Change: change}})
}

// TaintAuthority has all that an authority signed re-issued.
func (a *API) TaintAuthority(ctx context.Context, req *adminv1.EndAuthorityRequest) (*adminv1.AuthorityChange, error) {
	return a.endAuthority(ctx, req, authority.StateTainted, a.c.Rotation.Taint)
}

// RevokeAuthority takes an authority out of the bundle.
func (a *API) RevokeAuthority(ctx context.Context, req *adminv1.EndAuthorityRequest) (*adminv1.AuthorityChange, error) {
	return a.endAuthority(ctx, req, authority.StateRevoked, a.c.Rotation.Revoke)
}

func (a *API) endAuthority(ctx context.Context, req *adminv1.EndAuthorityRequest, to authority.State,
	end func(context.Context, rotation.Actor, authority.Kind, string, bool) (authority.Step, error)) (*adminv1.AuthorityChange, error) {
	kind, err := authorityKind(req.Type)
	if err != nil {
		return nil, a.toStatus(err)
	}
	if req.Id == "" {
		return nil, a.toStatus(&registry.ValidationError{Field: "id", Problem: "missing; signet authority list shows the ids"})
	}
	if root, ok := a.upstreamRoot(kind, req.Id); ok {
		return a.endUpstreamRoot(ctx, root, to)
	}
	st, err := end(ctx, actor(ctx), kind, req.Id, req.Stolen)
	return a.change(st, err)
}

// upstreamRoot finds a root of the upstream CA in the bundle, which is no authority of this CA.
func (a *API) upstreamRoot(kind authority.Kind, id string) (authority.X509Authority, bool) {
	if kind == authority.KindX509 {
		for _, root := range a.c.Authority.Bundle().X509 {
			if root.Upstream && root.ID == id {
				return root, true
			}
		}
	}
	return authority.X509Authority{}, false
}

// endUpstreamRoot taints or revokes a root of the upstream CA. Either has to come after the other, also if its key was stolen:
// the authority that signs now must not lead to it.
func (a *API) endUpstreamRoot(ctx context.Context, root authority.X509Authority, to authority.State) (*adminv1.AuthorityChange, error) {
	end := a.c.Rotation.TaintRoot
	if to == authority.StateRevoked {
		end = a.c.Rotation.RevokeRoot
	}
	if err := end(ctx, actor(ctx), root.ID); err != nil {
		return nil, a.authorityStatus(err, codes.NotFound, codes.FailedPrecondition)
	}
	return a.change(authority.Step{Changed: true, Authority: authority.Authority{Kind: authority.KindX509, ID: root.ID, State: to, Certificate: root.Certificate,
		NotBefore: root.Certificate.NotBefore, NotAfter: root.Certificate.NotAfter}}, nil)
}

func (a *API) change(st authority.Step, err error) (*adminv1.AuthorityChange, error) {
	if err != nil {
		return nil, a.authorityStatus(err, codes.NotFound, codes.FailedPrecondition)
	}
	return &adminv1.AuthorityChange{Authority: protoAuthority(st.Authority), Changed: st.Changed}, nil
}

// authorityStatus gives the errors of steps their codes; those for an unknown authority and for one in a wrong state differ
// between the two APIs.
func (a *API) authorityStatus(err error, unknown, wrongState codes.Code) error {
	state, waits := (*authority.StateError)(nil), (*rotation.WaitError)(nil)
	switch {
	case errors.Is(err, authority.ErrUnknownAuthority), errors.Is(err, authority.ErrUnknownRoot):
		return status.Error(unknown, err.Error())
	case errors.Is(err, authority.ErrBelow), errors.Is(err, authority.ErrRootState):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, rotation.ErrNotPrepared), errors.As(err, &state):
		return status.Error(wrongState, err.Error())
	case errors.As(err, &waits), errors.Is(err, authority.ErrNotYet), errors.Is(err, authority.ErrTooMany):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, authority.ErrConflict):
		return status.Error(codes.Aborted, err.Error())
	}
	return a.toStatus(err)
}

// ExplainTTL says what decides how long an entry's SVIDs are valid.
func (a *API) ExplainTTL(_ context.Context, req *adminv1.ExplainTTLRequest) (*adminv1.ExplainTTLResponse, error) {
	e, err := a.c.Registry.AnyEntry(registry.EntryID(req.EntryId))
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "entry %q not found", clip(req.EntryId))
	}
	out := &adminv1.ExplainTTLResponse{EntryId: string(e.ID), SpiffeId: e.IDText()}
	for _, x := range []struct {
		kind  authority.Kind
		asked time.Duration
		into  **adminv1.TTLExplanation
	}{{authority.KindX509, e.X509TTL, &out.X509}, {authority.KindJWT, e.JWTTTL, &out.Jwt}} {
		d, err := a.c.Authority.ExplainTTL(x.kind, x.asked)
		if err != nil {
			return nil, a.toStatus(err)
		}
		seconds := func(d time.Duration) int64 { return int64(d / time.Second) }
		*x.into = &adminv1.TTLExplanation{Type: protoKind(x.kind), Ttl: seconds(d.TTL), DecidedBy: d.DecidedBy, EntryTtl: seconds(d.Asked),
			DefaultTtl: seconds(d.Default), Maximum: seconds(d.Maximum), AuthorityId: d.AuthorityID, AuthorityNotAfter: stampOf(d.NotAfter), Text: d.String()}
	}
	return out, nil
}
