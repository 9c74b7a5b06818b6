package adminapi

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/tally"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

// Observations has what agents reported.
type Observations interface {
	// Reports returns all reports of a single decision, of which one at most is true.
	Reports(id string) []*policyv1.Observation
	// List returns observations in the order of their last occurrence. They are not changed.
	List(tally.Filter) []*policyv1.Observation
	// Keep is for how long they are kept.
	Keep() time.Duration
}

// maxOtherReports is how many more reports of one decision an answer holds.
const maxOtherReports = 20

// maxObservations is how many are listed at most.
const maxObservations = 100_000

// An ObservationsServer is signet.admin.v1.Observations.
type ObservationsServer struct {
	adminv1.UnimplementedObservationsServer
	API *API
}

var errNoObservations = status.Error(codes.Unimplemented, "observations are off in the CA's configuration (observations.disable)")

// GetDecision returns one decision with the policies of its service.
func (s *ObservationsServer) GetDecision(_ context.Context, req *adminv1.GetDecisionRequest) (*adminv1.GetDecisionResponse, error) {
	a := s.API
	if a.c.Observations == nil {
		return nil, errNoObservations
	}
	if req.GetDecisionId() == "" {
		return nil, status.Error(codes.InvalidArgument, "decision_id is empty")
	}
	reports := a.c.Observations.Reports(req.GetDecisionId())
	if len(reports) == 0 {
		return nil, status.Errorf(codes.NotFound, "decision %.64q is not known to this CA, which keeps decisions for %v", req.GetDecisionId(), a.c.Observations.Keep())
	}
	o := reports[0]
	out := &adminv1.GetDecisionResponse{Observation: o, Others: reports[1:min(len(reports), 1+maxOtherReports)]}
	service, err := spiffe.ParseWorkloadID(o.GetService())
	if err != nil {
		return out, nil
	}
	out.Policies = a.policiesOf(service)
	for _, p := range out.Policies.GetPolicies() {
		// A policy that has not been changed since is what it was.
		if p.GetName() == o.GetRule().GetPolicy() && p.GetRevision() <= o.GetRevision() && o.GetEpoch() == a.c.Epoch {
			out.PolicyThen = p
		}
	}
	return out, nil
}

// policiesOf is the policies that name a service, and what holds where none does.
func (a *API) policiesOf(service spiffeid.ID) *policyv1.PolicySet {
	all := a.c.Registry.PolicySet(a.c.Epoch)
	set := &policyv1.PolicySet{Format: all.GetFormat(), TrustDomain: all.GetTrustDomain(), Epoch: all.GetEpoch(), Revision: all.GetRevision(), Defaults: all.GetDefaults(), UserIssuers: all.GetUserIssuers()}
	for _, p := range all.GetPolicies() {
		for _, pattern := range p.GetServices() {
			if policy.ServiceMatches(pattern, service) {
				set.Policies = append(set.Policies, p)
				break
			}
		}
	}
	return set
}

// ListObservations streams the latest observations that are asked for, oldest first.
func (s *ObservationsServer) ListObservations(req *adminv1.ListObservationsRequest, ss grpc.ServerStreamingServer[policyv1.Observation]) error {
	if s.API.c.Observations == nil {
		return errNoObservations
	}
	f := tally.Filter{Service: req.GetService(), Peer: req.GetPeer(), Limit: maxObservations}
	if n := int(req.GetLimit()); n > 0 && n < f.Limit {
		f.Limit = n
	}
	if t := req.GetSince(); t != nil {
		f.Since = t.AsTime()
	}
	if t := req.GetUntil(); t != nil {
		f.Until = t.AsTime()
	}
	switch req.GetVerdict() {
	case adminv1.Verdict_VERDICT_UNSPECIFIED:
	case adminv1.Verdict_VERDICT_ALLOWED:
		f.Wanted = (*policyv1.Observation).GetAllowed
	case adminv1.Verdict_VERDICT_DENIED:
		f.Wanted = func(o *policyv1.Observation) bool { return !o.GetAllowed() }
	case adminv1.Verdict_VERDICT_SHADOW:
		f.Wanted = tally.ShadowDiffers
	default:
		return status.Errorf(codes.InvalidArgument, "verdict %d is not known to this CA", req.GetVerdict())
	}
	for _, o := range s.API.c.Observations.List(f) {
		if err := ss.Send(o); err != nil {
			return err
		}
	}
	return nil
}
