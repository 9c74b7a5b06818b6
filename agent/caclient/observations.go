package caclient

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// ErrNoObservations says that the CA knows nothing of observations: it is of another kind or version, or they are off there.
var ErrNoObservations = errors.New("the CA takes no observations")

// An InvalidError says that the CA will never take what it was sent.
type InvalidError struct{ Err error }

func (e *InvalidError) Error() string { return e.Err.Error() }

func (e *InvalidError) Unwrap() error { return e.Err }

// ReportObservations hands on what enforcement points on this node decided, and how many more decisions there were. It does
// so only while the agent is in sync: what the CA has to tell comes first. The error is ErrNoObservations, an
// *InvalidError, or one that passes.
func (c *Client) ReportObservations(ctx context.Context, observed []*policyv1.Observation, dropped uint64) error {
	s, release, err := c.use()
	if err != nil {
		return err
	}
	defer release()
	switch {
	case s.spire.Load():
		return ErrNoObservations
	case !s.inSync.Load():
		return ErrUnreachable
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = nodev1.NewNodeClient(s.conn).ReportObservations(ctx, &nodev1.ReportObservationsRequest{Observations: observed, Dropped: dropped})
	switch status.Code(err) {
	case codes.Unimplemented:
		return ErrNoObservations
	case codes.InvalidArgument:
		return &InvalidError{err}
	}
	return fromStatus(err)
}
