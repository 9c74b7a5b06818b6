package adminapi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// A FederationStatus is how a relationship's bundle was last fetched.
type FederationStatus struct {
	TrustDomain                    spiffeid.TrustDomain
	FetchedAt, SucceededAt, NextAt time.Time // zero: never
	Err                            error
}

func (a *API) foreign(field, name string) (spiffeid.TrustDomain, error) {
	td, err := spiffe.ParseTrustDomain(strings.TrimPrefix(name, "spiffe://"))
	if err != nil {
		return td, &registry.ValidationError{Field: field, Value: clip(name), Problem: err.Error()}
	}
	if td == a.c.TrustDomain {
		return td, &registry.ValidationError{Field: field, Value: td.Name(), Problem: "is this trust domain itself [ID-24]"}
	}
	return td, nil
}

// protoFederation shows a relationship with the newest bundle of its trust domain, if there is one.
func (a *API) protoFederation(f *registry.Federation, m *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	out := &types.FederationRelationship{TrustDomain: f.TrustDomain.Name()}
	if m == nil || m.BundleEndpointUrl {
		out.BundleEndpointUrl = f.URL
	}
	if m == nil || m.BundleEndpointProfile {
		if f.Profile == registry.ProfileSPIFFE {
			out.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: f.EndpointID.String()}}
		} else {
			out.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
		}
	}
	if m == nil || m.TrustDomainBundle {
		b, err := a.c.Registry.Bundle(f.TrustDomain)
		if err != nil {
			return out, nil
		}
		if out.TrustDomainBundle, err = protoBundle(b, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// fillFederation sets those fields of f that the mask names from in. Nil is all.
func (a *API) fillFederation(f *registry.Federation, in *types.FederationRelationship, m *types.FederationRelationshipMask) error {
	if m == nil || m.BundleEndpointUrl {
		f.URL = in.BundleEndpointUrl
	}
	if m == nil || m.BundleEndpointProfile {
		f.EndpointID = spiffeid.ID{}
		switch p := in.BundleEndpointProfile.(type) {
		case *types.FederationRelationship_HttpsWeb:
			f.Profile = registry.ProfileWeb
		case *types.FederationRelationship_HttpsSpiffe:
			f.Profile = registry.ProfileSPIFFE
			id, err := spiffe.ParseWorkloadID(p.HttpsSpiffe.GetEndpointSpiffeId())
			if err != nil {
				return &registry.ValidationError{Field: "endpoint_spiffe_id", Value: clip(p.HttpsSpiffe.GetEndpointSpiffeId()), Problem: err.Error()}
			}
			f.EndpointID = id
		default:
			return &registry.ValidationError{Field: "bundle_endpoint_profile", Problem: "missing; choose https_web or https_spiffe [FED-15]"}
		}
	}
	return nil
}

// givenBundle returns the bundle that comes with a relationship, nil if none does.
func (a *API) givenBundle(in *types.FederationRelationship, m *types.FederationRelationshipMask) ([]byte, error) {
	if in.TrustDomainBundle == nil || m != nil && !m.TrustDomainBundle {
		return nil, nil
	}
	td, doc, err := a.parseProtoBundle(in.TrustDomainBundle)
	if err != nil {
		return nil, err
	}
	if name := strings.TrimPrefix(in.TrustDomain, "spiffe://"); td.Name() != name {
		return nil, &registry.ValidationError{Field: "trust_domain_bundle", Value: td.Name(), Problem: fmt.Sprintf("is of another trust domain than the relationship, which is with %q", clip(name))}
	}
	return doc, nil
}

func federationDetails(f *registry.Federation, bundle []byte) map[string]any {
	d := map[string]any{"url": f.URL, "profile": string(f.Profile), "bundle": bundle != nil}
	if !f.EndpointID.IsZero() {
		d["endpoint_id"] = f.EndpointID.String()
	}
	return d
}

func checkBatch(field string, n, most int) error {
	if n > most {
		return status.Errorf(codes.ResourceExhausted, "%s: %d in one call, at most %d are allowed", field, n, most)
	}
	return nil
}

// ListFederationRelationships returns a page of relationships in order of trust domain. [SPIRE-PROTOCOL §14]
func (a *API) ListFederationRelationships(_ context.Context, req *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, a.toStatus(err)
	}
	list := cursor{list: "federation relationships"}
	after, err := list.read(req.PageToken)
	if err != nil {
		return nil, a.toStatus(err)
	}
	out := &trustdomainv1.ListFederationRelationshipsResponse{}
	bytes := 0
	for _, f := range a.c.Registry.Federations() {
		if f.TrustDomain.Name() <= after {
			continue
		}
		m, err := a.protoFederation(f, req.OutputMask)
		if err != nil {
			return nil, a.toStatus(err)
		}
		n := len(out.FederationRelationships)
		bytes += proto.Size(m)
		if n == size || n > 0 && req.PageSize > 0 && bytes > maxPageBytes {
			out.NextPageToken = list.write(out.FederationRelationships[n-1].TrustDomain)
			break
		}
		if err := checkUnpaged(req.PageSize, bytes > maxUnpagedBytes); err != nil {
			return nil, err
		}
		out.FederationRelationships = append(out.FederationRelationships, m)
	}
	return out, nil
}

// GetFederationRelationship returns one relationship. [SPIRE-PROTOCOL §14]
func (a *API) GetFederationRelationship(_ context.Context, req *trustdomainv1.GetFederationRelationshipRequest) (*types.FederationRelationship, error) {
	td, err := a.foreign("trust_domain", req.TrustDomain)
	if err != nil {
		return nil, a.toStatus(err)
	}
	f, err := a.c.Registry.Federation(td)
	if err != nil {
		return nil, a.toStatus(noRelationship(td))
	}
	out, err := a.protoFederation(f, req.OutputMask)
	return out, a.toStatus(err)
}

func noRelationship(td spiffeid.TrustDomain) error {
	return status.Errorf(codes.NotFound, "federation relationship with %q not found", td.Name())
}

// changeFederations runs change on each item and returns its status and, if it went well, the relationship as it is now.
func (a *API) changeFederations(ctx context.Context, event string, in []*types.FederationRelationship, out *types.FederationRelationshipMask,
	change func(context.Context, spiffeid.TrustDomain, *types.FederationRelationship) (*registry.Federation, []byte, error)) ([]*types.Status, []*types.FederationRelationship, error) {
	if err := checkBatch("federation_relationships", len(in), maxBundles); err != nil {
		return nil, nil, err
	}
	var subjects []string
	for _, f := range in {
		subjects = append(subjects, clip(f.GetTrustDomain()))
	}
	if err := a.intend(ctx, auditlog.New, event, subjects, nil); err != nil {
		return nil, nil, a.toStatus(err)
	}
	states, shown := make([]*types.Status, len(in)), make([]*types.FederationRelationship, len(in))
	var records []auditlog.Record
	for i, item := range in {
		if item == nil {
			item = &types.FederationRelationship{}
		}
		var f *registry.Federation
		var bundle []byte
		td, err := a.foreign("trust_domain", item.TrustDomain)
		if err == nil {
			f, bundle, err = change(ctx, td, item)
		}
		var details map[string]any
		if err == nil {
			details = federationDetails(f, bundle)
			shown[i], err = a.protoFederation(f, out)
		}
		states[i] = a.itemStatus(err)
		records = append(records, a.record(ctx, event, clip(item.TrustDomain), err, details))
	}
	a.outcome(ctx, auditlog.New, records...)
	return states, shown, nil
}

// BatchCreateFederationRelationship makes relationships; the bundles are fetched from then on. [SPIRE-PROTOCOL §14]
func (a *API) BatchCreateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	states, shown, err := a.changeFederations(ctx, "federation.create", req.FederationRelationships, req.OutputMask,
		func(ctx context.Context, td spiffeid.TrustDomain, in *types.FederationRelationship) (*registry.Federation, []byte, error) {
			f := &registry.Federation{TrustDomain: td}
			if err := a.fillFederation(f, in, nil); err != nil {
				return nil, nil, err
			}
			bundle, err := a.givenBundle(in, nil)
			if err != nil {
				return nil, nil, err
			}
			if err = a.c.Registry.CreateFederation(ctx, f, bundle); errors.Is(err, registry.ErrExists) {
				err = status.Errorf(codes.AlreadyExists, "federation relationship with %q exists already", td.Name())
			}
			return f, bundle, err
		})
	if err != nil {
		return nil, err
	}
	out := &trustdomainv1.BatchCreateFederationRelationshipResponse{}
	for i := range states {
		out.Results = append(out.Results, &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: states[i], FederationRelationship: shown[i]})
	}
	return out, nil
}

// BatchUpdateFederationRelationship changes those fields of relationships that the input mask names. [SPIRE-PROTOCOL §14]
func (a *API) BatchUpdateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchUpdateFederationRelationshipRequest) (*trustdomainv1.BatchUpdateFederationRelationshipResponse, error) {
	states, shown, err := a.changeFederations(ctx, "federation.update", req.FederationRelationships, req.OutputMask,
		func(ctx context.Context, td spiffeid.TrustDomain, in *types.FederationRelationship) (*registry.Federation, []byte, error) {
			bundle, err := a.givenBundle(in, req.InputMask)
			if err != nil {
				return nil, nil, err
			}
			f, err := a.c.Registry.UpdateFederation(ctx, td, func(f *registry.Federation) error { return a.fillFederation(f, in, req.InputMask) }, bundle)
			if errors.Is(err, registry.ErrNotFound) {
				err = noRelationship(td)
			}
			return f, bundle, err
		})
	if err != nil {
		return nil, err
	}
	out := &trustdomainv1.BatchUpdateFederationRelationshipResponse{}
	for i := range states {
		out.Results = append(out.Results, &trustdomainv1.BatchUpdateFederationRelationshipResponse_Result{Status: states[i], FederationRelationship: shown[i]})
	}
	return out, nil
}

// BatchDeleteFederationRelationship ends relationships, and with each the trust in the trust domain's bundle. [FED-29]
func (a *API) BatchDeleteFederationRelationship(ctx context.Context, req *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	if err := checkBatch("trust_domains", len(req.TrustDomains), maxBatch); err != nil {
		return nil, err
	}
	const event = "federation.delete"
	subjects := make([]string, len(req.TrustDomains))
	for i, n := range req.TrustDomains {
		subjects[i] = clip(n)
	}
	if err := a.intend(ctx, auditlog.Essential, event, subjects, nil); err != nil {
		return nil, a.toStatus(err)
	}
	out := &trustdomainv1.BatchDeleteFederationRelationshipResponse{}
	var records []auditlog.Record
	for _, name := range req.TrustDomains {
		td, err := a.foreign("trust_domains", name)
		if err == nil {
			if err = a.c.Registry.DeleteFederation(store.WithReserve(ctx), td); errors.Is(err, registry.ErrNotFound) {
				err = noRelationship(td)
			}
		}
		out.Results = append(out.Results, &trustdomainv1.BatchDeleteFederationRelationshipResponse_Result{TrustDomain: name, Status: a.itemStatus(err)})
		records = append(records, a.record(ctx, event, clip(name), err, nil))
	}
	a.outcome(ctx, auditlog.Essential, records...)
	return out, nil
}

// RefreshBundle fetches the bundle of a trust domain now, and answers when it is stored. [SPIRE-PROTOCOL §14]
func (a *API) RefreshBundle(ctx context.Context, req *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	td, err := a.foreign("trust_domain", req.TrustDomain)
	if err != nil {
		return nil, a.toStatus(err)
	}
	switch err := a.c.Refresh(ctx, td); {
	case errors.Is(err, registry.ErrNotFound):
		return nil, a.toStatus(noRelationship(td))
	case errors.Is(err, context.Canceled), errors.Is(err, registry.ErrConflict), errors.Is(err, registry.ErrNotReady):
		return nil, a.toStatus(err)
	case err != nil:
		// Whatever was wrong at the endpoint is the admin's to know.
		return nil, status.Errorf(codes.Internal, "fetching the bundle of %q: %s", td.Name(), bounded([]string{err.Error()})[0])
	}
	return &emptypb.Empty{}, nil
}

// ListFederationStatus implements signet.admin.v1.
func (a *API) ListFederationStatus(context.Context, *adminv1.ListFederationStatusRequest) (*adminv1.ListFederationStatusResponse, error) {
	at := func(t time.Time) *timestamppb.Timestamp {
		if t.IsZero() {
			return nil
		}
		return timestamppb.New(t)
	}
	out := &adminv1.ListFederationStatusResponse{}
	for _, st := range a.c.FederationStatus() {
		m := &adminv1.FederationStatus{TrustDomain: st.TrustDomain.Name(), FetchedAt: at(st.FetchedAt), SucceededAt: at(st.SucceededAt), NextAt: at(st.NextAt)}
		if st.Err != nil {
			m.Error = bounded([]string{st.Err.Error()})[0]
		}
		out.Statuses = append(out.Statuses, m)
	}
	return out, nil
}
