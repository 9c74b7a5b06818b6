package nodeapi

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/spiffe"
)

// MaxObservations is the most that one report holds.
const MaxObservations = 1000

// Observations keeps what agents report. Add must not wait for a disk.
type Observations interface {
	// Add takes the observations of an agent, of which mine says whether the service is one that the agent may serve. An
	// error means that nothing was taken, and the agent is to come again later.
	Add(agent string, observed []*policyv1.Observation, mine func(i int) bool, dropped uint64) error
}

// ReportObservations takes what enforcement points on an agent's node decided. What is about services that the agent may
// not serve is left out: a stolen node must not be able to tell tales about others.
func (a *API) ReportObservations(ctx context.Context, req *nodev1.ReportObservationsRequest) (*nodev1.ReportObservationsResponse, error) {
	if a.c.Observations == nil {
		return nil, status.Error(codes.Unimplemented, "observations are off in the CA's configuration")
	}
	observed := req.GetObservations()
	if len(observed) > MaxObservations {
		return nil, status.Errorf(codes.ResourceExhausted, "%d observations are more than %d: send them in several reports", len(observed), MaxObservations)
	}
	c := access.From(ctx)
	at := make(map[string]int)
	var ids []spiffeid.ID
	for _, o := range observed {
		if _, known := at[o.GetService()]; known {
			continue
		}
		if id, err := spiffe.ParseWorkloadID(o.GetService()); err == nil {
			at[o.GetService()] = len(ids)
			ids = append(ids, id)
		}
	}
	serves := a.c.Registry.Serves(c.ID, ids)
	mine := func(i int) bool {
		n, known := at[observed[i].GetService()]
		return known && serves[n]
	}
	if err := a.c.Observations.Add(c.ID.String(), observed, mine, req.GetDropped()); err != nil {
		return nil, access.Limited(0, "%v; call again later", err)
	}
	a.reportCanaries(ctx, c, observed, mine)
	return &nodev1.ReportObservationsResponse{}, nil
}
