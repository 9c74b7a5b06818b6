package adminapi

import (
	"context"
	"crypto/x509"
	"errors"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
)

// AppendBundle publishes authorities of this trust domain whose keys are somebody else's: those of a SPIRE server that the
// trust domain is moving away from. Nothing is ever signed with them here. [SPIRE-PROTOCOL §14]
func (a *API) AppendBundle(ctx context.Context, req *bundlev1.AppendBundleRequest) (*types.Bundle, error) {
	if len(req.WitAuthorities) > 0 {
		return nil, status.Error(codes.Unimplemented, "wit_authorities: WIT authorities of others are not taken into the bundle")
	}
	var certs [][]byte
	for _, x := range req.X509Authorities {
		if x.GetTainted() {
			return nil, a.toStatus(errTaintedInput("x509_authorities"))
		}
		certs = append(certs, x.GetAsn1())
	}
	var keys []authority.JWTKey
	for _, j := range req.JwtAuthorities {
		switch {
		case j.GetTainted():
			return nil, a.toStatus(errTaintedInput("jwt_authorities"))
		case j.GetExpiresAt() < 0:
			return nil, a.toStatus(&registry.ValidationError{Field: "jwt_authorities", Value: clip(j.GetKeyId()), Problem: "expires_at must not be negative; 0 means that it is not known"})
		}
		k := authority.JWTKey{KeyID: j.GetKeyId(), PublicKey: j.GetPublicKey()}
		if j.GetExpiresAt() > 0 {
			k.ExpiresAt = time.Unix(j.GetExpiresAt(), 0).UTC()
		}
		keys = append(keys, k)
	}
	const event = "authority.append"
	details := map[string]any{"x509": len(certs), "jwt": len(keys)}
	if err := a.intend(ctx, auditlog.New, event, []string{a.c.TrustDomain.IDString()}, details); err != nil {
		return nil, a.toStatus(err)
	}
	added, rev, err := a.c.Authority.Append(ctx, certs, keys, access.From(ctx).String())
	if err != nil {
		a.outcome(ctx, auditlog.New, a.record(ctx, event, a.c.TrustDomain.IDString(), err, details))
		return nil, a.toStatus(err)
	}
	var records []auditlog.Record
	for _, x := range added {
		records = append(records, a.record(ctx, event, a.c.TrustDomain.IDString(), nil, AppendedDetails(x)))
	}
	a.outcome(ctx, auditlog.New, records...)
	// What was acknowledged is seen by whoever asks next, and by every agent that follows.
	if err := a.c.Registry.WaitFor(ctx, rev); err != nil {
		return nil, a.toStatus(err)
	}
	out, err := a.c.OwnBundle(req.OutputMask)
	return out, a.toStatus(err)
}

func errTaintedInput(field string) error {
	return &registry.ValidationError{Field: field, Problem: "an authority is marked as tainted; leave it out: nobody shall begin to trust it"}
}

// AppendedDetails says in the audit log which authority it is about.
func AppendedDetails(x *authority.Appended) map[string]any {
	d := map[string]any{"authority": x.ID, "type": "jwt", "source": x.Source}
	if x.X509() {
		d["type"], d["subject_name"] = "x509", bounded([]string{x.Certificate.Subject.String()})[0]
	}
	if !x.ExpiresAt.IsZero() {
		d["not_after"] = x.ExpiresAt.Unix()
	}
	return d
}

// ListAppendedAuthorities implements signet.admin.v1.
func (a *API) ListAppendedAuthorities(context.Context, *adminv1.ListAppendedAuthoritiesRequest) (*adminv1.ListAppendedAuthoritiesResponse, error) {
	out := &adminv1.ListAppendedAuthoritiesResponse{}
	for _, x := range a.c.Authority.Appended() {
		m := &adminv1.AppendedAuthority{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT, AuthorityId: x.ID, Tainted: x.Tainted, Source: x.Source, AppendedAt: timestamppb.New(x.AppendedAt)}
		if !x.ExpiresAt.IsZero() {
			m.ExpiresAt = timestamppb.New(x.ExpiresAt)
		}
		if x.X509() {
			m.Type, m.Certificate = adminv1.AuthorityType_AUTHORITY_TYPE_X509, x.Certificate.Raw
		} else {
			var err error
			if m.PublicKey, err = x509.MarshalPKIXPublicKey(x.PublicKey); err != nil {
				return nil, a.toStatus(err)
			}
		}
		out.Authorities = append(out.Authorities, m)
	}
	// Keys of downstream CAs have no moment at which an operator appended them; by that they are told apart.
	for _, j := range a.c.Authority.Bundle().JWT {
		if j.Origin == "" || j.Origin == authority.OriginUpstream {
			continue
		}
		der, err := x509.MarshalPKIXPublicKey(j.PublicKey)
		if err != nil {
			return nil, a.toStatus(err)
		}
		out.Authorities = append(out.Authorities, &adminv1.AppendedAuthority{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT, AuthorityId: j.KeyID, PublicKey: der,
			ExpiresAt: timestamppb.New(j.ExpiresAt), Source: "downstream CA " + j.Origin})
	}
	return out, nil
}

// changeAppended taints or revokes.
func (a *API) changeAppended(ctx context.Context, event string, kind adminv1.AuthorityType, id string, change func(ctx context.Context, x509 bool, id string) (store.Revision, error)) (int64, error) {
	details := map[string]any{"authority": clip(id), "type": "jwt"}
	switch {
	case kind == adminv1.AuthorityType_AUTHORITY_TYPE_X509:
		details["type"] = "x509"
	case kind != adminv1.AuthorityType_AUTHORITY_TYPE_JWT:
		return 0, a.toStatus(&registry.ValidationError{Field: "type", Problem: "must be X509 or JWT"})
	}
	if id == "" {
		return 0, a.toStatus(&registry.ValidationError{Field: "authority_id", Problem: "missing"})
	}
	subject := a.c.TrustDomain.IDString()
	if err := a.intend(ctx, auditlog.Essential, event, []string{subject}, details); err != nil {
		return 0, a.toStatus(err)
	}
	rev, err := change(store.WithReserve(ctx), kind == adminv1.AuthorityType_AUTHORITY_TYPE_X509, id)
	if errors.Is(err, authority.ErrUnknown) {
		err = status.Errorf(codes.NotFound, "authority_id: no %s authority %q was appended", details["type"], clip(id))
	}
	a.outcome(ctx, auditlog.Essential, a.record(ctx, event, subject, err, details))
	if err == nil {
		err = a.c.Registry.WaitFor(ctx, rev)
	}
	return int64(rev), a.toStatus(err)
}

// TaintAppendedAuthority implements signet.admin.v1.
func (a *API) TaintAppendedAuthority(ctx context.Context, req *adminv1.TaintAppendedAuthorityRequest) (*adminv1.TaintAppendedAuthorityResponse, error) {
	rev, err := a.changeAppended(ctx, "authority.taint", req.Type, req.AuthorityId, a.c.Authority.TaintAppended)
	if err != nil {
		return nil, err
	}
	return &adminv1.TaintAppendedAuthorityResponse{Revision: rev}, nil
}

// RevokeAppendedAuthority implements signet.admin.v1.
func (a *API) RevokeAppendedAuthority(ctx context.Context, req *adminv1.RevokeAppendedAuthorityRequest) (*adminv1.RevokeAppendedAuthorityResponse, error) {
	rev, err := a.changeAppended(ctx, "authority.revoke", req.Type, req.AuthorityId, a.revokeForeign)
	if err != nil {
		return nil, err
	}
	return &adminv1.RevokeAppendedAuthorityResponse{Revision: rev}, nil
}

// revokeForeign takes an appended authority out of the bundle, or a JWT key that a downstream CA has published.
func (a *API) revokeForeign(ctx context.Context, x509 bool, id string) (store.Revision, error) {
	rev, err := a.c.Authority.RevokeAppended(ctx, x509, id)
	if x509 || !errors.Is(err, authority.ErrUnknown) {
		return rev, err
	}
	switch _, err := a.c.Authority.RemoveJWTKey(ctx, id); {
	case errors.Is(err, authority.ErrUnknownAuthority):
		return 0, authority.ErrUnknown
	default:
		return 0, err // it returns when this CA follows the change
	}
}
