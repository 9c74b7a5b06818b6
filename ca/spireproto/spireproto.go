// Package spireproto writes what the registry holds in the messages of SPIRE's Server API. The doors for nodes and for
// operators both answer with them; it never reads a message and knows nothing of who asks.
package spireproto

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/ca/registry"
)

// ID returns an ID in SPIRE's form: the trust domain without a scheme, the path with its slash. [SPIRE-PROTOCOL §1]
func ID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// AllEntryFields returns a mask with every field of an entry, which is what no mask means.
func AllEntryFields() *types.EntryMask {
	return &types.EntryMask{SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, FederatesWith: true, Admin: true,
		Downstream: true, ExpiresAt: true, DnsNames: true, RevisionNumber: true, StoreSvid: true, JwtSvidTtl: true, Hint: true, CreatedAt: true,
		AdditionalAttributes: true}
}

// Entry returns those fields of an entry that the mask names, and its ID always. A nil mask names all of them.
func Entry(e *registry.Entry, m *types.EntryMask) *types.Entry {
	if m == nil {
		m = AllEntryFields()
	}
	out := &types.Entry{Id: string(e.ID)}
	if m.SpiffeId {
		out.SpiffeId = ID(e.SPIFFEID)
	}
	if m.ParentId {
		out.ParentId = ID(e.ParentID)
	}
	if m.Selectors {
		out.Selectors = make([]*types.Selector, len(e.Selectors))
		for i, s := range e.Selectors {
			out.Selectors[i] = &types.Selector{Type: s.Type, Value: s.Value}
		}
	}
	if m.X509SvidTtl {
		out.X509SvidTtl = int32(e.X509TTL / time.Second)
	}
	if m.JwtSvidTtl {
		out.JwtSvidTtl = int32(e.JWTTTL / time.Second)
	}
	if m.FederatesWith {
		for _, td := range e.FederatesWith {
			out.FederatesWith = append(out.FederatesWith, td.Name())
		}
	}
	if m.ExpiresAt && !e.ExpiresAt.IsZero() {
		out.ExpiresAt = e.ExpiresAt.Unix()
	}
	if m.DnsNames {
		out.DnsNames = e.DNSNames
	}
	if m.RevisionNumber {
		out.RevisionNumber = int64(e.Revision)
	}
	if m.CreatedAt {
		out.CreatedAt = e.CreatedAt.Unix()
	}
	if m.Hint {
		out.Hint = e.Hint
	}
	out.Admin = m.Admin && e.Admin
	out.Downstream = m.Downstream && e.Downstream
	out.StoreSvid = m.StoreSvid && e.StoreSVID
	if m.AdditionalAttributes && (e.NoX509Prefetch || e.JWTIncludeJTI) {
		out.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: e.NoX509Prefetch, JwtSvidIncludeJti: e.JWTIncludeJTI}
	}
	return out
}
