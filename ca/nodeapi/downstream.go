package nodeapi

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// NewDownstreamX509CA signs the certificate of a CA below this one, for the key in a CSR. Who may call it is said by
// registration entries; what it gets is fixed. [SPIRE-PROTOCOL §10]
func (a *API) NewDownstreamX509CA(ctx context.Context, req *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	c := access.From(ctx)
	subject := a.c.TrustDomain.IDString()
	fail := func(err error) (*svidv1.NewDownstreamX509CAResponse, error) {
		a.c.Issued("downstream", "refused", 1)
		return nil, a.refuse(ctx, "downstreamca.refused", subject, err, nil)
	}
	switch {
	case len(req.Csr) == 0:
		return fail(status.Error(codes.InvalidArgument, "malformed param: missing CSR"))
	case req.PreferredTtl < 0:
		return fail(status.Errorf(codes.InvalidArgument, "malformed param: preferred_ttl %d is negative", req.PreferredTtl))
	}
	if name, revoked := a.c.Registry.RevokedID(c.ID); revoked {
		return fail(&registry.RevokedError{ID: c.ID, Revocation: name})
	}
	key, err := authority.CheckCSR(req.Csr, a.c.TrustDomain.ID())
	if err != nil {
		return fail(err)
	}
	made, err := a.c.Authority.SignDownstream(ctx, authority.DownstreamRequest{PublicKey: key, TTL: time.Duration(req.PreferredTtl) * time.Second,
		MaxTTL: a.c.MaxDownstreamTTL, Depth: a.c.DownstreamDepth})
	if errors.Is(err, authority.ErrConflict) {
		return fail(status.Error(codes.Aborted, "the authorities were changed at this moment; try again"))
	}
	if err != nil {
		return fail(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return fail(err)
	}
	rec := auditlog.Record{Time: a.c.Now(), Event: "downstreamca.issued", Actor: c.String(), ActorKind: c.KindName(), Subject: subject, Outcome: auditlog.Done,
		Details: map[string]any{"serial": made.SerialNumber, "not_after": made.NotAfter.Unix(), "authority": made.AuthorityID, "path_len": made.PathLen,
			"key_sha256": sha256Hex(spki), "address": c.Address}}
	if err := a.audit(ctx, auditlog.Essential, rec); err != nil {
		return fail(err) // nothing leaves unlogged
	}
	a.c.Issued("downstream", "", 1)
	a.c.Log.Info("signed a downstream CA", "spiffe_id", c.String(), "serial", made.SerialNumber, "not_after", made.NotAfter)
	out := &svidv1.NewDownstreamX509CAResponse{CaCertChain: made.Chain}
	for _, x := range a.c.Authority.Bundle().X509 {
		out.X509Authorities = append(out.X509Authorities, x.Certificate.Raw)
	}
	return out, nil
}

// PublishJWTAuthority puts a JWT key of a downstream CA into the bundle, and answers with all that are there.
// [SPIRE-PROTOCOL §10]
func (a *API) PublishJWTAuthority(ctx context.Context, req *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	c := access.From(ctx)
	k := req.GetJwtAuthority()
	subject := clip(k.GetKeyId())
	fail := func(err error) (*bundlev1.PublishJWTAuthorityResponse, error) {
		return nil, a.refuse(ctx, "downstreamca.published", subject, err, nil)
	}
	if k == nil {
		return fail(status.Error(codes.InvalidArgument, "malformed param: missing JWT authority"))
	}
	if k.ExpiresAt <= 0 || k.ExpiresAt > maxUnix {
		return fail(status.Errorf(codes.InvalidArgument, "malformed param: jwt_authority.expires_at %d is no time in this century", k.ExpiresAt))
	}
	details := map[string]any{"not_after": k.ExpiresAt, "key_sha256": sha256Hex(k.PublicKey), "address": c.Address}
	record := func(event string) auditlog.Record {
		return auditlog.Record{Time: a.c.Now(), Event: event, Actor: c.String(), ActorKind: c.KindName(), Subject: subject, Outcome: auditlog.Done, Details: details}
	}
	// Logged before the commit as well: a key that the log does not know must not get into the bundle.
	known := slices.ContainsFunc(a.c.Authority.Bundle().JWT, func(j authority.JWTAuthority) bool { return j.KeyID == k.KeyId })
	if !known {
		if err := a.audit(ctx, auditlog.New, record("downstreamca.published.begin")); err != nil {
			return fail(err)
		}
	}
	changed, err := a.c.Authority.PublishJWTKey(ctx, c.ID, authority.ForeignJWTKey{KeyID: k.KeyId, PublicKey: k.PublicKey, ExpiresAt: time.Unix(k.ExpiresAt, 0)})
	switch {
	case errors.Is(err, authority.ErrTooManyKeys):
		return fail(status.Errorf(codes.ResourceExhausted, "%v; keys leave it when they expire", err))
	case errors.Is(err, authority.ErrConflict):
		return fail(status.Error(codes.Aborted, "the authorities were changed at this moment; try again"))
	case err != nil:
		return fail(err)
	}
	if changed {
		if err := a.audit(ctx, auditlog.New, record("downstreamca.published")); err != nil {
			a.c.Log.Error("audit of a published JWT key; its beginning is in the log", "key_id", k.KeyId, "err", err)
		}
		a.c.Log.Info("a downstream CA published a JWT key", "spiffe_id", c.String(), "key_id", k.KeyId)
	}
	b, err := a.GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{JwtAuthorities: true}})
	if err != nil {
		return nil, err
	}
	return &bundlev1.PublishJWTAuthorityResponse{JwtAuthorities: b.JwtAuthorities}, nil
}

// PublishWITAuthority is not offered, whether this CA issues WIT-SVIDs or not: they are incubating, and those of CAs below are
// not vouched for. [STAB-01]
func (a *API) PublishWITAuthority(context.Context, *bundlev1.PublishWITAuthorityRequest) (*bundlev1.PublishWITAuthorityResponse, error) {
	return nil, status.Error(codes.Unimplemented, "WIT authorities of CAs below are not taken into the bundle")
}

// maxUnix is the end of the year 2199: times beyond are mistakes, and the largest of them overflow.
const maxUnix = 7_258_118_399

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
