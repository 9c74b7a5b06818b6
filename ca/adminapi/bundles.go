package adminapi

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// Bounds of foreign bundles given by hand. [TDB-21]
const (
	maxAuthorities = 1000
	maxBundles     = 250
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
	if n := len(in.X509Authorities) + len(in.JwtAuthorities) + len(in.WitAuthorities); n > maxAuthorities {
		return td, nil, &registry.ValidationError{Field: "bundle", Value: td.Name(), Problem: "has more than 1000 authorities"}
	}
	b := spiffebundle.New(td)
	for _, x := range in.X509Authorities {
		if x.GetTainted() {
			return td, nil, errTaintedInput("x509_authorities")
		}
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
		if j.GetTainted() {
			return td, nil, errTaintedInput("jwt_authorities")
		}
		if err := addKey(j.KeyId, j.PublicKey, b.HasJWTAuthority, b.AddJWTAuthority); err != nil {
			return td, nil, &registry.ValidationError{Field: "jwt_authorities", Value: clip(j.KeyId), Problem: err.Error()}
		}
	}
	for _, w := range in.WitAuthorities {
		if w.GetTainted() {
			return td, nil, errTaintedInput("wit_authorities")
		}
		if err := addKey(w.GetKeyId(), w.GetPublicKey(), b.HasWITAuthority, b.AddWITAuthority); err != nil {
			return td, nil, &registry.ValidationError{Field: "wit_authorities", Value: clip(w.GetKeyId()), Problem: err.Error()}
		}
	}
	if in.RefreshHint < 0 {
		return td, nil, &registry.ValidationError{Field: "refresh_hint", Value: td.Name(), Problem: "must not be negative"}
	}
	if in.RefreshHint > 0 {
		const longest = int64(math.MaxInt64 / time.Second)
		b.SetRefreshHint(time.Duration(min(in.RefreshHint, longest)) * time.Second)
	}
	if in.SequenceNumber > 0 {
		b.SetSequenceNumber(in.SequenceNumber)
	}
	doc, err := spiffe.MarshalBundle(b)
	if err != nil { // such as a kind of key that no SVID may have
		return td, nil, &registry.ValidationError{Field: "bundle", Value: td.Name(), Problem: err.Error()}
	}
	return td, doc, nil
}

func addKey(kid string, der []byte, has func(string) bool, add func(string, crypto.PublicKey) error) error {
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return err
	}
	if has(kid) {
		return errors.New("the key_id occurs twice [DEC-09]")
	}
	return add(kid, key)
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
		keys := parsed.JWTAuthorities()
		for _, kid := range slices.Sorted(maps.Keys(keys)) {
			der, err := x509.MarshalPKIXPublicKey(keys[kid])
			if err != nil {
				return nil, err
			}
			out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{KeyId: kid, PublicKey: der})
		}
	}
	if m == nil || m.WitAuthorities {
		keys := parsed.WITAuthorities()
		for _, kid := range slices.Sorted(maps.Keys(keys)) {
			der, err := x509.MarshalPKIXPublicKey(keys[kid])
			if err != nil {
				return nil, err
			}
			out.WitAuthorities = append(out.WitAuthorities, &types.WITKey{KeyId: kid, PublicKey: der})
		}
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
	list := cursor{list: "federated bundles"}
	after, err := list.read(req.PageToken)
	if err != nil {
		return nil, a.toStatus(err)
	}
	out := &bundlev1.ListFederatedBundlesResponse{}
	bytes := 0
	for _, b := range a.c.Registry.Bundles() {
		if b.TrustDomain.Name() <= after {
			continue
		}
		m, err := protoBundle(b, req.OutputMask)
		if err != nil {
			return nil, a.toStatus(err)
		}
		n := len(out.Bundles)
		bytes += proto.Size(m)
		if n == size || n > 0 && req.PageSize > 0 && bytes > maxPageBytes {
			out.NextPageToken = list.write(out.Bundles[n-1].TrustDomain)
			break
		}
		if err := checkUnpaged(req.PageSize, bytes > maxUnpagedBytes); err != nil {
			return nil, err
		}
		out.Bundles = append(out.Bundles, m)
	}
	return out, checkUnpaged(req.PageSize, out.NextPageToken != "")
}

// setMode says what a batch RPC does when a bundle exists or not.
type setMode struct {
	event            string
	mustExist, fresh bool
	input            *types.BundleMask // which fields are taken; nil: all
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
		if b == nil {
			b = &types.Bundle{}
		}
		var err error
		shown[i], err = a.setBundle(ctx, b, out, mode)
		states[i] = a.itemStatus(err)
		records = append(records, a.record(ctx, mode.event, clip(b.GetTrustDomain()), err, nil))
	}
	a.outcome(ctx, auditlog.New, records...)
	return states, shown, nil
}

func (a *API) setBundle(ctx context.Context, in *types.Bundle, mask *types.BundleMask, mode setMode) (*types.Bundle, error) {
	const attempts = 4 // conflicts come only from the same bundle being changed at the same moment
	for range attempts {
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
		var rev store.Revision
		switch {
		case mode.fresh:
			rev, err = a.c.Registry.ReplaceBundle(ctx, td, 0, doc)
		case mode.mustExist:
			if doc, err = mergeBundle(have, doc, mode.input); err == nil {
				rev, err = a.c.Registry.ReplaceBundle(ctx, td, have.Revision, doc)
			}
		default:
			rev, err = a.c.Registry.SetBundle(ctx, td, doc)
		}
		switch {
		case errors.Is(err, registry.ErrConflict):
			if _, err := a.c.Registry.Barrier(ctx); err != nil {
				return nil, err
			}
			continue
		case err != nil:
			return nil, err
		}
		return protoBundle(&registry.Bundle{TrustDomain: td, Content: doc, Revision: rev}, mask)
	}
	return nil, registry.ErrConflict
}

// mergeBundle returns have with those fields of doc that the mask names.
func mergeBundle(have *registry.Bundle, doc []byte, m *types.BundleMask) ([]byte, error) {
	if m == nil {
		return doc, nil
	}
	out, _, err := spiffe.ParseBundle(have.TrustDomain, have.Content)
	if err != nil {
		return nil, err
	}
	in, _, err := spiffe.ParseBundle(have.TrustDomain, doc)
	if err != nil {
		return nil, err
	}
	if m.X509Authorities {
		out.SetX509Authorities(in.X509Authorities())
	}
	if m.JwtAuthorities {
		out.SetJWTAuthorities(in.JWTAuthorities())
	}
	if m.WitAuthorities {
		out.SetWITAuthorities(in.WITAuthorities())
	}
	if m.RefreshHint {
		out.ClearRefreshHint()
		if d, ok := in.RefreshHint(); ok {
			out.SetRefreshHint(d)
		}
	}
	if m.SequenceNumber {
		out.ClearSequenceNumber()
		if n, ok := in.SequenceNumber(); ok {
			out.SetSequenceNumber(n)
		}
	}
	return spiffe.MarshalBundle(out)
}

// BatchUpdateFederatedBundle changes those fields of known foreign bundles that the input mask names. [SPIRE-PROTOCOL §14]
func (a *API) BatchUpdateFederatedBundle(ctx context.Context, req *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	states, shown, err := a.setBundles(ctx, req.Bundle, req.OutputMask, setMode{event: "bundle.update", mustExist: true, input: req.InputMask})
	if err != nil {
		return nil, err
	}
	out := &bundlev1.BatchUpdateFederatedBundleResponse{}
	for i := range states {
		out.Results = append(out.Results, &bundlev1.BatchUpdateFederatedBundleResponse_Result{Status: states[i], Bundle: shown[i]})
	}
	return out, nil
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

// BatchDeleteFederatedBundle forgets foreign bundles. RESTRICT refuses while an entry federates with the trust domain, DELETE
// deletes such entries, DISSOCIATE strikes it from them. [SPIRE-PROTOCOL §14]
func (a *API) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if len(req.TrustDomains) > maxBundles {
		return nil, status.Errorf(codes.ResourceExhausted, "trust_domains: %d in one call, at most %d are allowed", len(req.TrustDomains), maxBundles)
	}
	mode, ok := map[bundlev1.BatchDeleteFederatedBundleRequest_Mode]registry.FederatedEntries{bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT: registry.RestrictEntries,
		bundlev1.BatchDeleteFederatedBundleRequest_DELETE: registry.DeleteEntries, bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE: registry.DissociateEntries}[req.Mode]
	if !ok {
		return nil, a.toStatus(&registry.ValidationError{Field: "mode", Value: req.Mode.String(), Problem: "must be RESTRICT, DELETE or DISSOCIATE"})
	}
	subjects := make([]string, len(req.TrustDomains))
	for i, n := range req.TrustDomains {
		subjects[i] = clip(n)
	}
	if err := a.intend(ctx, auditlog.Essential, "bundle.delete", subjects, map[string]any{"mode": req.Mode.String()}); err != nil {
		return nil, a.toStatus(err)
	}
	out := &bundlev1.BatchDeleteFederatedBundleResponse{}
	var records []auditlog.Record
	for _, name := range req.TrustDomains {
		touched, err := a.deleteBundle(ctx, name, mode)
		out.Results = append(out.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{TrustDomain: name, Status: a.itemStatus(err)})
		records = append(records, a.record(ctx, "bundle.delete", clip(name), err, map[string]any{"mode": req.Mode.String()}))
		event := "entry.delete"
		if mode == registry.DissociateEntries {
			event = "entry.update"
		}
		for _, e := range touched {
			details := entryDetails(e)
			details["because"] = "bundle.delete " + clip(name)
			records = append(records, a.record(ctx, event, e.SPIFFEID.String(), nil, details))
		}
	}
	a.outcome(ctx, auditlog.Essential, records...)
	return out, nil
}

func (a *API) deleteBundle(ctx context.Context, name string, mode registry.FederatedEntries) ([]*registry.Entry, error) {
	td, err := spiffe.ParseTrustDomain(strings.TrimPrefix(name, "spiffe://"))
	if err != nil {
		return nil, &registry.ValidationError{Field: "trust_domains", Value: clip(name), Problem: err.Error()}
	}
	touched, err := a.c.Registry.DeleteBundle(store.WithReserve(ctx), td, mode)
	switch {
	case errors.Is(err, registry.ErrFederated):
		err = status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, registry.ErrNotFound):
		err = status.Errorf(codes.NotFound, "bundle of %q not found", td.Name())
	}
	return touched, err
}
