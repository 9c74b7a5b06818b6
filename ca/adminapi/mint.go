package adminapi

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// MintX509SVID signs an X509-SVID for the key and the SPIFFE ID in a CSR, without a registration entry. DNS names in
// the CSR are taken over. [SPIRE-PROTOCOL §14]
func (a *API) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	var subject string
	fail := func(err error) (*svidv1.MintX509SVIDResponse, error) {
		a.outcome(ctx, auditlog.New, a.record(ctx, "x509svid.mint", subject, err, nil))
		a.c.Issued("x509", "refused", 1)
		return nil, a.toStatus(err)
	}
	if len(req.Csr) == 0 {
		return fail(&registry.ValidationError{Field: "csr", Problem: "missing"})
	}
	if req.Ttl < 0 {
		return fail(&registry.ValidationError{Field: "ttl", Problem: "must not be negative; 0 means the default"})
	}
	key, err := authority.CheckCSR(req.Csr, spiffeid.ID{})
	if err != nil {
		return fail(err)
	}
	csr, err := x509.ParseCertificateRequest(req.Csr)
	if err != nil {
		return fail(&registry.ValidationError{Field: "csr", Problem: err.Error()})
	}
	if len(csr.URIs) != 1 {
		return fail(&registry.ValidationError{Field: "csr", Problem: "must hold exactly one URI SAN, the SPIFFE ID"})
	}
	id, err := spiffe.ParseWorkloadID(csr.URIs[0].String())
	if err != nil {
		return fail(&registry.ValidationError{Field: "csr", Value: csr.URIs[0].String(), Problem: err.Error()})
	}
	// Once more with the ID: a parsed and printed URL has lost an empty fragment. [X509-49]
	if _, err := authority.CheckCSR(req.Csr, id); err != nil {
		return fail(err)
	}
	subject = id.String()
	if ttl := time.Duration(req.Ttl) * time.Second; ttl > 0 {
		if err := a.c.Authority.CheckTTL(ttl); err != nil {
			return fail(&registry.ValidationError{Field: "ttl", Problem: err.Error()})
		}
	}
	notBefore, _, err := a.c.Registry.Terms(id, nil)
	if err != nil {
		return fail(err)
	}
	prepared, err := a.c.Authority.CheckX509(authority.X509Request{ID: id, NotBefore: notBefore, PublicKey: key, TTL: time.Duration(req.Ttl) * time.Second, DNSNames: csr.DNSNames})
	if err != nil {
		return fail(err)
	}
	svid, err := a.c.Authority.SignX509(ctx, prepared)
	if err != nil {
		return fail(err)
	}
	rec := a.record(ctx, "x509svid.mint", subject, nil, map[string]any{"serial": svid.SerialNumber, "not_after": svid.NotAfter.Unix(), "authority": svid.AuthorityID})
	if err := a.c.Audit.Append(ctx, auditlog.New, rec); err != nil {
		return nil, a.toStatus(err)
	}
	a.c.Issued("x509", "", 1)
	a.canary(ctx, id, "x509")
	return &svidv1.MintX509SVIDResponse{Svid: &types.X509SVID{Id: protoID(id), CertChain: svid.Chain, ExpiresAt: svid.NotAfter.Unix()}}, nil
}

// MintJWTSVID signs a JWT-SVID without a registration entry. [SPIRE-PROTOCOL §14]
func (a *API) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	var subject string
	fail := func(err error) (*svidv1.MintJWTSVIDResponse, error) {
		a.outcome(ctx, auditlog.New, a.record(ctx, "jwtsvid.mint", subject, err, nil))
		a.c.Issued("jwt", "refused", 1)
		return nil, a.toStatus(err)
	}
	id, err := a.ownID("id", req.Id)
	if err != nil {
		return fail(err)
	}
	subject = id.String()
	if len(req.Audience) == 0 {
		return fail(&registry.ValidationError{Field: "audience", Problem: "at least one is needed [JWT-13]"})
	}
	if req.Ttl < 0 {
		return fail(&registry.ValidationError{Field: "ttl", Problem: "must not be negative; 0 means the default"})
	}
	if ttl := time.Duration(req.Ttl) * time.Second; ttl > 0 {
		if err := a.c.Authority.CheckJWTTTL(ttl); err != nil {
			return fail(&registry.ValidationError{Field: "ttl", Problem: err.Error()})
		}
	}
	_, notBefore, err := a.c.Registry.Terms(id, nil)
	if err != nil {
		return fail(err)
	}
	svid, err := a.c.Authority.SignJWT(ctx, authority.JWTRequest{ID: id, NotBefore: notBefore, Audience: req.Audience, TTL: time.Duration(req.Ttl) * time.Second})
	if err != nil {
		return fail(err)
	}
	rec := a.record(ctx, "jwtsvid.mint", subject, nil, map[string]any{"audience": req.Audience, "not_after": svid.Expiry.Unix(), "authority": svid.KeyID})
	if err := a.c.Audit.Append(ctx, auditlog.New, rec); err != nil {
		return nil, a.toStatus(err)
	}
	a.c.Issued("jwt", "", 1)
	a.canary(ctx, id, "jwt")
	return &svidv1.MintJWTSVIDResponse{Svid: &types.JWTSVID{Token: svid.Token, Id: protoID(id), IssuedAt: svid.IssuedAt.Unix(), ExpiresAt: svid.Expiry.Unix()}}, nil
}

// MintWITSVID signs a WIT-SVID for a public key without a registration entry, if WIT-SVIDs are enabled. The admin vouches
// that the key is the subject's. [WIT-SVID §3]
func (a *API) MintWITSVID(ctx context.Context, req *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
	if !a.c.Authority.WITEnabled() {
		return nil, a.toStatus(authority.ErrNoWIT)
	}
	var subject string
	fail := func(err error) (*svidv1.MintWITSVIDResponse, error) {
		a.outcome(ctx, auditlog.New, a.record(ctx, "witsvid.mint", subject, err, nil))
		a.c.Issued("wit", "refused", 1)
		return nil, a.toStatus(err)
	}
	id, err := a.ownID("id", req.Id)
	if err != nil {
		return fail(err)
	}
	subject = id.String()
	if len(req.PublicKey) == 0 {
		return fail(&registry.ValidationError{Field: "public_key", Problem: "missing"})
	}
	key, err := authority.ParsePublicKey(req.PublicKey)
	if err != nil {
		return fail(err)
	}
	ttl := time.Duration(req.Ttl) * time.Second
	if ttl < 0 {
		return fail(&registry.ValidationError{Field: "ttl", Problem: "must not be negative; 0 means the default"})
	}
	if err := a.c.Authority.CheckWITTTL(ttl); err != nil {
		return fail(&registry.ValidationError{Field: "ttl", Problem: err.Error()})
	}
	_, notBefore, err := a.c.Registry.Terms(id, nil)
	if err != nil {
		return fail(err)
	}
	svid, err := a.c.Authority.SignWIT(ctx, authority.WITRequest{ID: id, NotBefore: notBefore, PublicKey: key, Algorithm: req.SigningAlgorithm, TTL: ttl})
	if err != nil {
		return fail(err)
	}
	rec := a.record(ctx, "witsvid.mint", subject, nil, map[string]any{"jti": svid.JTI, "not_after": svid.Expiry.Unix(), "authority": svid.KeyID})
	if err := a.c.Audit.Append(ctx, auditlog.New, rec); err != nil {
		return nil, a.toStatus(err)
	}
	a.c.Issued("wit", "", 1)
	a.canary(ctx, id, "wit")
	return &svidv1.MintWITSVIDResponse{Svid: &types.WITSVID{Token: svid.Token, Id: protoID(id), ExpiresAt: svid.Expiry.Unix(), IssuedAt: svid.IssuedAt.Unix()}}, nil
}

func (a *API) canary(ctx context.Context, id spiffeid.ID, kind string) {
	if c := access.From(ctx); a.c.Canary != nil && a.c.Registry.IsCanary(id) {
		a.c.Canary(ctx, id, kind, c.String(), c.Address)
	}
}
