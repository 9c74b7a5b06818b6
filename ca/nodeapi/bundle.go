package nodeapi

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// GetBundle returns the trust domain's own bundle. Anyone may ask. [SPIRE-PROTOCOL §8]
func (a *API) GetBundle(ctx context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	out, err := a.OwnBundle(req.GetOutputMask())
	if err != nil {
		return nil, a.toStatus(err)
	}
	a.fetched(ctx, out)
	return out, nil
}

// fetched notes what an agent that shows its SVID now has. For agents that do not follow it is how they acknowledge an
// authority that is prepared. [DESIGN §5]
func (a *API) fetched(ctx context.Context, b *types.Bundle) {
	c := access.From(ctx)
	if len(a.c.Authority.Prepared()) == 0 || !registry.IsAgentID(c.ID) || c.ID.TrustDomain() != a.c.TrustDomain {
		return
	}
	n, err := a.c.Guard.CheckAgent(ctx, c)
	if err != nil {
		return // the bundle is for anyone; that it was fetched counts for an agent's present SVID only
	}
	var ids []string
	for _, x := range b.X509Authorities {
		if cert, err := x509.ParseCertificate(x.Asn1); err == nil {
			ids = append(ids, hex.EncodeToString(cert.SubjectKeyId))
		}
	}
	for _, j := range b.JwtAuthorities {
		ids = append(ids, j.KeyId)
	}
	for _, w := range b.WitAuthorities {
		ids = append(ids, w.KeyId)
	}
	a.c.Rotation.Fetched(n, ids)
}

// OwnBundle returns the trust domain's own bundle in SPIRE's form, with those fields that the mask names. Nil names all.
func (a *API) OwnBundle(m *types.BundleMask) (*types.Bundle, error) {
	b := a.c.Authority.Bundle()
	out := &types.Bundle{TrustDomain: b.TrustDomain.Name()}
	if m == nil || m.X509Authorities {
		for _, x := range b.X509 {
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: x.Certificate.Raw, Tainted: x.State == authority.StateTainted})
		}
	}
	if m == nil || m.JwtAuthorities {
		for _, j := range b.JWT {
			der, err := marshalKey(j.PublicKey)
			if err != nil {
				return nil, err
			}
			out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{PublicKey: der, KeyId: j.KeyID, ExpiresAt: unix(j.ExpiresAt), Tainted: j.State == authority.StateTainted})
		}
	}
	if m == nil || m.WitAuthorities {
		for _, w := range b.WIT {
			der, err := marshalKey(w.PublicKey)
			if err != nil {
				return nil, err
			}
			out.WitAuthorities = append(out.WitAuthorities, &types.WITKey{PublicKey: der, KeyId: w.KeyID, ExpiresAt: unix(w.ExpiresAt), Tainted: w.State == authority.StateTainted})
		}
	}
	if m == nil || m.RefreshHint {
		out.RefreshHint = int64(b.RefreshHint / time.Second)
	}
	if m == nil || m.SequenceNumber {
		out.SequenceNumber = b.Sequence
	}
	return out, nil
}

// unix is 0 for a time that is not known.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
