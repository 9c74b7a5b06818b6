package adminapi

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/policy"
)

// RevocationsServer is signet.admin.v1.Revocations.
type RevocationsServer struct {
	adminv1.UnimplementedRevocationsServer
	*API
}

const (
	// firstHit is how many of each kind a preview names.
	firstHit = 100
	// maxLookingBack bounds the audit records that a preview looks at, and lookBack the time that it takes.
	maxLookingBack = 1_000_000
	lookBack       = 5 * time.Second
)

// PreviewRevocation says whom a Revocation would hit.
func (a RevocationsServer) PreviewRevocation(ctx context.Context, req *adminv1.PreviewRevocationRequest) (*adminv1.PreviewRevocationResponse, error) {
	docs, err := documents([]*adminv1.Document{req.GetDocument()})
	if err != nil {
		return nil, a.toStatus(err)
	}
	if len(docs) != 1 {
		return nil, a.toStatus(&registry.ValidationError{Field: "document", Problem: "holds more than one document"})
	}
	d, err := policy.ParseRevocation(docs[0], a.c.TrustDomain)
	if err != nil {
		return nil, a.toStatus(fmt.Errorf("%w: %w", errDocument, err))
	}
	hit := a.c.Registry.Reach(d)
	out := &adminv1.PreviewRevocationResponse{Target: d.Target(), Ids: int64(len(hit.IDs)), RegisteredIds: int64(hit.Registered), FirstIds: idStrings(hit.IDs),
		Agents: int64(len(hit.Agents)), FirstAgents: idStrings(hit.Agents), Admins: idStrings(hit.Admins), Danger: hit.Danger}
	items, err := a.c.Registry.CompileRevocation(d)
	if err != nil {
		return nil, a.toStatus(fmt.Errorf("%w: %w", errDocument, err))
	}
	if err := a.knownSVIDs(ctx, items, out); err != nil {
		return nil, a.toStatus(err)
	}
	return out, nil
}

func idStrings(ids []spiffeid.ID) []string {
	var out []string
	for _, id := range ids[:min(len(ids), firstHit)] {
		out = append(out, id.String())
	}
	return out
}

// knownSVIDs looks through this replica's audit log for what was issued, has not ended, and is hit.
func (a RevocationsServer) knownSVIDs(ctx context.Context, items []*policyv1.Revocation, out *adminv1.PreviewRevocationResponse) error {
	revocations := policy.CompileRevocations(&policyv1.RevocationSet{Revocations: items}, a.c.TrustDomain)
	ctx, cancel := context.WithTimeout(ctx, lookBack)
	defer cancel()
	enough := errors.New("enough")
	now, seen := a.c.Now(), 0
	err := a.c.Audit.Search(ctx, auditlog.Filter{Outcome: auditlog.Done}, func(r auditlog.Record) error {
		if seen++; seen > maxLookingBack {
			return enough
		}
		svid, leaf, ok := IssuedBy(r)
		if !ok || svid.ExpiresAt.AsTime().Before(now) {
			return nil
		}
		found := false
		if leaf != nil {
			_, found = revocations.X509SVID(leaf)
		} else if id, err := spiffeid.FromString(svid.SpiffeId); err == nil {
			_, found = revocations.JWTSVID(id, svid.Jti, r.Time)
		}
		if found {
			out.Svids = append(out.Svids, svid)
		}
		if n := len(out.Svids) - firstHit; n > 0 {
			out.Svids, out.MoreSvids = out.Svids[n:], true
		}
		return nil
	})
	slices.Reverse(out.Svids)
	switch {
	case err == nil, errors.Is(err, auditlog.ErrMalformed):
		return nil
	case errors.Is(err, enough), errors.Is(err, context.DeadlineExceeded):
		out.MoreSvids = true
		return nil
	}
	return err
}

// IssuedBy reads an audit record of an SVID that was issued. leaf stands for the certificate, if it is an X509-SVID, as far as
// revocations look at it: its NotBefore is when it was issued.
func IssuedBy(r auditlog.Record) (svid *adminv1.KnownSVID, leaf *x509.Certificate, ok bool) {
	kind := ""
	switch r.Event {
	case "x509svid.issued", "x509svid.mint", "agent.attested", "agent.reattested", "agent.renewed", "agent.recovered":
		kind = "x509"
	case "jwtsvid.issued", "jwtsvid.mint", "witsvid.issued", "witsvid.mint":
		kind = "jwt"
	default:
		return nil, nil, false
	}
	text := func(name string) string { s, _ := r.Details[name].(string); return s }
	notAfter, _ := r.Details["not_after"].(json.Number)
	end, err := strconv.ParseInt(notAfter.String(), 10, 64)
	if err != nil {
		return nil, nil, false
	}
	svid = &adminv1.KnownSVID{SpiffeId: r.Subject, Type: kind, SerialNumber: text("serial"), Jti: text("jti"), ObtainedBy: r.Actor,
		IssuedAt: timestamppb.New(r.Time), ExpiresAt: timestamppb.New(time.Unix(end, 0)), AuthorityId: text("authority")}
	if kind != "x509" {
		return svid, nil, true
	}
	serial, good := new(big.Int).SetString(svid.SerialNumber, 10)
	uri, err := url.Parse(r.Subject)
	if !good || err != nil {
		return nil, nil, false
	}
	aki, _ := hex.DecodeString(svid.AuthorityId)
	leaf = &x509.Certificate{Raw: []byte{0}, SerialNumber: serial, URIs: []*url.URL{uri}, NotBefore: r.Time, NotAfter: time.Unix(end, 0), KeyUsage: x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true, AuthorityKeyId: aki}
	return svid, leaf, true
}
