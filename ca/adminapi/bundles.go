package adminapi

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// Bounds of a foreign bundle given by hand. [TDB-21]
const (
	maxAuthorities = 1000
	maxBundles     = 100
)

// parseProtoBundle validates a bundle in SPIRE's form and returns it in SPIFFE bundle format.
func (a *API) parseProtoBundle(in *types.Bundle) (spiffeid.TrustDomain, []byte, error) {
	td, err := spiffe.ParseTrustDomain(strings.TrimPrefix(in.GetTrustDomain(), "spiffe://"))
	if err != nil {
		return td, nil, &registry.ValidationError{Field: "trust_domain", Value: in.GetTrustDomain(), Problem: err.Error()}
	}
	if td == a.c.TrustDomain {
		return td, nil, &registry.ValidationError{Field: "trust_domain", Value: td.Name(), Problem: "is this trust domain itself [ID-24]"}
	}
	if n := len(in.X509Authorities) + len(in.JwtAuthorities); n > maxAuthorities {
		return td, nil, &registry.ValidationError{Field: "bundle", Value: td.Name(), Problem: "has more than 1000 authorities"}
	}
	b := spiffebundle.New(td)
	for _, x := range in.X509Authorities {
		cert, err := x509.ParseCertificate(x.GetAsn1())
		if err != nil {
			return td, nil, &registry.ValidationError{Field: "x509_authorities", Value: td.Name(), Problem: err.Error()}
		}
		if !cert.IsCA {
			return td, nil, &registry.ValidationError{Field: "x509_authorities", Value: cert.Subject.String(), Problem: "is not a CA certificate [X509-68]"}
		}
		b.AddX509Authority(cert)
	}
	for _, j := range in.JwtAuthorities {
		if j.GetKeyId() == "" {
			return td, nil, &registry.ValidationError{Field: "jwt_authorities", Value: td.Name(), Problem: "a key has no key_id"}
		}
		key, err := x509.ParsePKIXPublicKey(j.PublicKey)
		if err != nil {
			return td, nil, &registry.ValidationError{Field: "jwt_authorities", Value: j.KeyId, Problem: err.Error()}
		}
		if err := b.AddJWTAuthority(j.KeyId, key); err != nil {
			return td, nil, &registry.ValidationError{Field: "jwt_authorities", Value: j.KeyId, Problem: err.Error()}
		}
	}
	if in.RefreshHint > 0 {
		b.SetRefreshHint(time.Duration(in.RefreshHint) * time.Second)
	}
	if in.SequenceNumber > 0 {
		b.SetSequenceNumber(in.SequenceNumber)
	}
	doc, err := spiffe.MarshalBundle(b)
	return td, doc, err
}

func protoBundle(b *registry.Bundle, m *types.BundleMask) (*types.Bundle, error) {
	parsed, _, err := spiffe.ParseBundle(b.TrustDomain, b.Content)
	if err != nil {
		return nil, err
	}
	out := &types.Bundle{TrustDomain: b.TrustDomain.Name()}
	if m == nil || m.X509Authorities {
		for _, x := range parsed.X509Authorities() {
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: x.Raw})
		}
	}
	if m == nil || m.JwtAuthorities {
		for kid, key := range parsed.JWTAuthorities() {
			der, err := x509.MarshalPKIXPublicKey(key)
			if err != nil {
				return nil, err
			}
			out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{KeyId: kid, PublicKey: der})
		}
		slices.SortFunc(out.JwtAuthorities, func(x, y *types.JWTKey) int { return strings.Compare(x.KeyId, y.KeyId) })
	}
	if h, ok := parsed.RefreshHint(); ok && (m == nil || m.RefreshHint) {
		out.RefreshHint = int64(h / time.Second)
	}
	if n, ok := parsed.SequenceNumber(); ok && (m == nil || m.SequenceNumber) {
		out.SequenceNumber = n
	}
	return out, nil
}

// CountBundles counts the own bundle and all foreign ones. [SPIRE-PROTOCOL §14]
func (a *API) CountBundles(context.Context, *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	return &bundlev1.CountBundlesResponse{Count: int32(1 + len(a.c.Registry.Bundles()))}, nil
}

// GetFederatedBundle returns one foreign bundle. [SPIRE-PROTOCOL §8]
func (a *API) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := spiffe.ParseTrustDomain(strings.TrimPrefix(req.TrustDomain, "spiffe://"))
	if err != nil {
		return nil, a.toStatus(&registry.ValidationError{Field: "trust_domain", Value: req.TrustDomain, Problem: err.Error()})
	}
	if td == a.c.TrustDomain {
		return nil, a.toStatus(&registry.ValidationError{Field: "trust_domain", Value: td.Name(), Problem: "is this trust domain itself; use GetBundle"})
	}
	b, err := a.c.Registry.Bundle(td)
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "bundle of %q not found", td.Name())
	}
	out, err := protoBundle(b, req.OutputMask)
	return out, a.toStatus(err)
}

// ListFederatedBundles returns a page of foreign bundles in order of trust domain. [SPIRE-PROTOCOL §14]
func (a *API) ListFederatedBundles(_ context.Context, req *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, a.toStatus(err)
	}
	after, err := readToken(req.PageToken)
	if err != nil {
		return nil, a.toStatus(err)
	}
	out := &bundlev1.ListFederatedBundlesResponse{}
	for _, b := range a.c.Registry.Bundles() {
		if b.TrustDomain.Name() <= after {
			continue
		}
		if len(out.Bundles) == size {
			out.NextPageToken = writeToken(out.Bundles[size-1].TrustDomain)
			break
		}
		m, err := protoBundle(b, req.OutputMask)
		if err != nil {
			return nil, a.toStatus(err)
		}
		out.Bundles = append(out.Bundles, m)
	}
	return out, checkUnpaged(req.PageSize, out.NextPageToken != "")
}

// setMode says what a batch RPC does when a bundle exists or not.
type setMode struct {
	event            string
	mustExist, fresh bool
}

func (a *API) setBundles(ctx context.Context, in []*types.Bundle, out *types.BundleMask, mode setMode) ([]*types.Status, []*types.Bundle, error) {
	if len(in) > maxBundles {
		return nil, nil, status.Errorf(codes.ResourceExhausted, "bundle: %d in one call, at most %d are allowed", len(in), maxBundles)
	}
	var subjects []string
	for _, b := range in {
		subjects = append(subjects, clip(b.GetTrustDomain()))
	}
	if err := a.intend(ctx, auditlog.New, mode.event, subjects, nil); err != nil {
		return nil, nil, a.toStatus(err)
	}
	states, shown := make([]*types.Status, len(in)), make([]*types.Bundle, len(in))
	var records []auditlog.Record
	for i, b := range in {
		var err error
		shown[i], err = a.setBundle(ctx, b, out, mode)
		states[i] = a.itemStatus(err)
		records = append(records, a.record(ctx, mode.event, clip(b.GetTrustDomain()), err, nil))
	}
	a.outcome(ctx, auditlog.New, records...)
	return states, shown, nil
}

func (a *API) setBundle(ctx context.Context, in *types.Bundle, mask *types.BundleMask, mode setMode) (*types.Bundle, error) {
	td, doc, err := a.parseProtoBundle(in)
	if err != nil {
		return nil, err
	}
	have, err := a.c.Registry.Bundle(td)
	switch exists := err == nil; {
	case mode.mustExist && !exists:
		return nil, status.Errorf(codes.NotFound, "bundle of %q not found", td.Name())
	case mode.fresh && exists:
		shown, _ := protoBundle(have, mask)
		return shown, status.Errorf(codes.AlreadyExists, "bundle of %q exists already", td.Name())
	}
	rev, err := a.c.Registry.SetBundle(ctx, td, doc)
	if err != nil {
		return nil, err
	}
	return protoBundle(&registry.Bundle{TrustDomain: td, Content: doc, Revision: rev}, mask)
}

// BatchSetFederatedBundle stores foreign bundles, new or known. [SPIRE-PROTOCOL §14]
func (a *API) BatchSetFederatedBundle(ctx context.Context, req *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	states, shown, err := a.setBundles(ctx, req.Bundle, req.OutputMask, setMode{event: "bundle.set"})
	if err != nil {
		return nil, err
	}
	out := &bundlev1.BatchSetFederatedBundleResponse{}
	for i := range states {
		out.Results = append(out.Results, &bundlev1.BatchSetFederatedBundleResponse_Result{Status: states[i], Bundle: shown[i]})
	}
	return out, nil
}

// BatchCreateFederatedBundle stores foreign bundles that are not known. [SPIRE-PROTOCOL §14]
func (a *API) BatchCreateFederatedBundle(ctx context.Context, req *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	states, shown, err := a.setBundles(ctx, req.Bundle, req.OutputMask, setMode{event: "bundle.create", fresh: true})
	if err != nil {
		return nil, err
	}
	out := &bundlev1.BatchCreateFederatedBundleResponse{}
	for i := range states {
		out.Results = append(out.Results, &bundlev1.BatchCreateFederatedBundleResponse_Result{Status: states[i], Bundle: shown[i]})
	}
	return out, nil
}

// BatchDeleteFederatedBundle forgets foreign bundles. RESTRICT refuses while an entry federates with the trust domain;
// the other modes, which change entries, are refused. [SPIRE-PROTOCOL §14]
func (a *API) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if len(req.TrustDomains) > maxBundles {
		return nil, status.Errorf(codes.ResourceExhausted, "trust_domains: %d in one call, at most %d are allowed", len(req.TrustDomains), maxBundles)
	}
	if req.Mode != bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT {
		return nil, status.Errorf(codes.Unimplemented, "mode %s is not supported; change or delete the entries first, then delete the bundle", req.Mode)
	}
	subjects := make([]string, len(req.TrustDomains))
	for i, n := range req.TrustDomains {
		subjects[i] = clip(n)
	}
	if err := a.intend(ctx, auditlog.Essential, "bundle.delete", subjects, nil); err != nil {
		return nil, a.toStatus(err)
	}
	out := &bundlev1.BatchDeleteFederatedBundleResponse{}
	var records []auditlog.Record
	for _, name := range req.TrustDomains {
		err := a.deleteBundle(ctx, name)
		out.Results = append(out.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{TrustDomain: name, Status: a.itemStatus(err)})
		records = append(records, a.record(ctx, "bundle.delete", clip(name), err, nil))
	}
	a.outcome(ctx, auditlog.Essential, records...)
	return out, nil
}

func (a *API) deleteBundle(ctx context.Context, name string) error {
	td, err := spiffe.ParseTrustDomain(strings.TrimPrefix(name, "spiffe://"))
	if err != nil {
		return &registry.ValidationError{Field: "trust_domains", Value: name, Problem: err.Error()}
	}
	if used, _ := a.c.Registry.ListEntries(registry.EntryFilter{FederatesWith: []spiffeid.TrustDomain{td}, FederatesMatch: registry.MatchAny}, "", 1); len(used) > 0 {
		return status.Errorf(codes.FailedPrecondition, "entry %q federates with %q; change or delete such entries first", string(used[0].ID), td.Name())
	}
	if _, err = a.c.Registry.DeleteBundle(store.WithReserve(ctx), td); errors.Is(err, registry.ErrNotFound) {
		return status.Errorf(codes.NotFound, "bundle of %q not found", td.Name())
	}
	return err
}
