package nodeapi

import (
	"context"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/ca/authority"
)

// GetBundle returns the trust domain's own bundle. Anyone may ask. [SPIRE-PROTOCOL §8]
func (a *API) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	out, err := a.OwnBundle(req.GetOutputMask())
	if err != nil {
		return nil, a.toStatus(err)
	}
	return out, nil
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
