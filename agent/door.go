package agent

import (
	"context"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/svidcache"
)

// A door lets the SVID cache ask the CA, without either package knowing the other.
type door struct{ client *caclient.Client }

var _ svidcache.CA = (*door)(nil)

func (d *door) IssueX509(ctx context.Context, requests []svidcache.X509Request) []svidcache.X509Answer {
	items := make([]caclient.IssueItem, len(requests))
	for i, r := range requests {
		items[i] = caclient.IssueItem{EntryID: r.EntryID, PublicKey: r.PublicKey, CSR: r.CSR}
	}
	issued := d.client.IssueX509(ctx, items)
	answers := make([]svidcache.X509Answer, len(issued))
	for i, r := range issued {
		answers[i] = svidcache.X509Answer{Err: r.Err, Chain: r.Chain, EntryRevision: r.EntryRevision}
	}
	return answers
}

func (d *door) NewJWTSVID(ctx context.Context, entryID string, audience []string) (svidcache.JWTAnswer, error) {
	s, err := d.client.NewJWTSVID(ctx, entryID, audience)
	if err != nil {
		return svidcache.JWTAnswer{}, err
	}
	return svidcache.JWTAnswer{Token: s.Token, IssuedAt: s.IssuedAt, ExpiresAt: s.ExpiresAt}, nil
}

// IssueWIT is svidcache.WITIssuer's.
func (d *door) IssueWIT(ctx context.Context, requests []svidcache.WITRequest) []svidcache.WITAnswer {
	items := make([]caclient.WITItem, len(requests))
	for i, r := range requests {
		items[i] = caclient.WITItem{EntryID: r.EntryID, PublicKey: r.PublicKey, Algorithm: r.Algorithm}
	}
	issued := d.client.IssueWIT(ctx, items)
	answers := make([]svidcache.WITAnswer, len(issued))
	for i, r := range issued {
		answers[i] = svidcache.WITAnswer{Err: r.Err, Token: r.Token}
	}
	return answers
}

func (d *door) Sync(ctx context.Context) error { return d.client.Sync(ctx) }

func (d *door) HandedOn(authorities []string) { d.client.HandedOn(authorities) }

func (d *door) InUse(authorities []string) { d.client.InUse(authorities) }
