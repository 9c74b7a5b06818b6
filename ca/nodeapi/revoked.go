package nodeapi

import (
	"context"
	"crypto"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// This file keeps what is revoked from being issued again.

// terms returns when the validity of an SVID for id may begin at the earliest. A *registry.RevokedError means that none is
// issued.
func (a *API) terms(id spiffeid.ID, prefix []byte) (x509, tokens time.Time, err error) {
	return a.c.Registry.Terms(id, prefix)
}

// checkX509 checks an X509-SVID for an entry of the agent whose serial numbers begin with prefix.
func (a *API) checkX509(e *registry.Entry, key crypto.PublicKey, prefix []byte) (authority.PreparedX509, error) {
	notBefore, _, err := a.terms(e.SPIFFEID, prefix)
	if err != nil {
		return authority.PreparedX509{}, err
	}
	return a.c.Authority.CheckX509(authority.X509Request{ID: e.SPIFFEID, PublicKey: key, TTL: e.X509TTL, DNSNames: e.DNSNames, SerialPrefix: prefix, NotBefore: notBefore})
}

func (a *API) signJWT(ctx context.Context, e *registry.Entry, audience []string) (*authority.JWTSVID, error) {
	_, notBefore, err := a.terms(e.SPIFFEID, nil)
	if err != nil {
		return nil, err
	}
	return a.c.Authority.SignJWT(ctx, authority.JWTRequest{ID: e.SPIFFEID, Audience: audience, TTL: e.JWTTTL, IncludeJTI: e.JWTIncludeJTI, NotBefore: notBefore})
}

// stillAdmitted looks once more before what was signed leaves. A key store can take long, and what is signed after its agent
// was banned and revoked would not be among what is revoked.
func (a *API) stillAdmitted(c *access.Caller) error {
	if n, err := a.c.Registry.Node(c.ID); err == nil && n.Banned {
		return access.Denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", c.ID)
	}
	return nil
}

// canary tells of an SVID for an ID that nobody should ever hold. It is issued all the same, so that who asked does not learn
// that it was a trap.
func (a *API) canary(ctx context.Context, c *access.Caller, e *registry.Entry, kind string) {
	if e.Canary && a.c.Leaks != nil {
		a.c.Leaks.CanaryIssued(ctx, e.SPIFFEID, kind, c.String(), c.Address)
	}
}

// reportCanaries tells of calls by IDs that nobody should ever use, to services that the agent serves.
func (a *API) reportCanaries(ctx context.Context, c *access.Caller, observed []*policyv1.Observation, mine func(int) bool) {
	if a.c.Leaks == nil {
		return
	}
	is := map[string]bool{}
	for i, o := range observed {
		canary, known := is[o.GetPeer()]
		if !known {
			id, err := spiffe.ParseWorkloadID(o.GetPeer())
			canary = err == nil && a.c.Registry.IsCanary(id)
			is[o.GetPeer()] = canary
		}
		if canary && mine(i) {
			a.c.Leaks.CanaryUsed(ctx, c.ID, o)
		}
	}
}
