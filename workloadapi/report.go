package workloadapi

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Observations takes what enforcement points on this node decided.
type Observations interface {
	// Report takes over observations about services that the caller is. It must not block. The error says what is wrong with
	// one of them, for the caller; then none was taken.
	Report([]*policyv1.Observation) error
}

// Bounds of reports. A library reports twice a second at most.
const (
	// maxReported is the most observations of one report.
	maxReported = 1000

	// reportsPerSecond bounds the reports of one process, and observationsPerSecond what they hold; all processes of a user
	// may report as much as ten of them.
	reportsPerSecond, observationsPerSecond = 5, 2000
	reportersPerUID                         = 10
)

// reportRates bound how much is reported.
type reportRates struct {
	calls    *CallRate[processKey]
	observed *CallRate[processKey]
	ofUser   *CallRate[uidKey]
}

func newReportRates() reportRates {
	return reportRates{NewCallRate[processKey](reportsPerSecond), NewCallRate[processKey](observationsPerSecond), NewCallRate[uidKey](reportersPerUID * observationsPerSecond)}
}

// take counts a report.
func (r *reportRates) take(info peer.Info, n int) error {
	if p := info.Process; p != nil {
		k := processKey{p.ID(), p.PID}
		if err := r.calls.Take(k); err != nil {
			return fmt.Errorf("reports of decisions: %w", err)
		}
		if !r.observed.TakeMany(k, n) {
			return fmt.Errorf("%v reports more than %d decisions a second: %w", k, observationsPerSecond, ErrTooFast)
		}
	}
	if u := uidKey(info.UID); !r.ofUser.TakeMany(u, n) {
		return fmt.Errorf("%v reports more than %d decisions a second: %w", u, reportersPerUID*observationsPerSecond, ErrTooFast)
	}
	return nil
}

// Report takes what the caller decided about calls to itself.
func (p *policyService) Report(ctx context.Context, req *policyapi.ReportRequest) (*policyapi.ReportResponse, error) {
	s := p.server
	if s.cfg.Observations == nil {
		return nil, status.Error(codes.Unimplemented, "observations are off in the agent's configuration")
	}
	observed := req.GetObservations()
	if len(observed) > maxReported {
		return nil, status.Errorf(codes.ResourceExhausted, "%d observations are more than %d: send them in several reports", len(observed), maxReported)
	}
	info, err := peer.InfoFromContext(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.reports.take(info, max(1, len(observed))); err != nil {
		return nil, err
	}
	err = s.Answer(ctx, func(caller Caller) error {
		u, err := s.Current(ctx, caller)
		if err != nil {
			return err
		}
		own := map[string]bool{}
		for _, i := range u.Identities {
			own[i.ID.String()] = true
		}
		for i, o := range observed {
			if !own[o.GetService()] {
				return badArgument("observations[%d].service is none of the caller's own SPIFFE IDs", i)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Observations.Report(observed); err != nil {
		return nil, badArgument("%v", err)
	}
	return &policyapi.ReportResponse{}, nil
}
