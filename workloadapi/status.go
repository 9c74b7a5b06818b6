package workloadapi

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/workloadapi/peer"
)

// Conditions of the endpoint itself.
var (
	errStopping      = errors.New("the agent is shutting down")
	errBusy          = errors.New("too many calls are open")
	errUnsteady      = errors.New("the calling process kept changing while it was attested")
	errCallerChanged = errors.New("the calling process is not what it was")
	errNothingYet    = errors.New("the caller is registered, but its identities, bundles or policies are still on their way")
	errSourceEnded   = errors.New("the agent stopped following the caller's identities")
	errDisabled      = errors.New("this profile is disabled in the agent's configuration")
	errUnsent        = errors.New("the message could not be sent")
)

// An argumentError is a mistake of the client. Its text goes to the client. [Workload Endpoint §6, Workload API §4.3]
type argumentError struct{ text string }

func (e *argumentError) Error() string { return e.text }

func badArgument(format string, args ...any) error {
	return &argumentError{fmt.Sprintf(format, args...)}
}

// A formatError says that the caller reads only older policy formats than the agent holds.
type formatError struct{ reads, have uint32 }

func (e *formatError) Error() string {
	return fmt.Sprintf("the policies have format %d and the caller reads up to %d: upgrade the caller", e.have, e.reads)
}

// toStatus is the one place where errors become gRPC codes.
//
// Clients end their watch for good on InvalidArgument and on Canceled. So the one stands only for mistakes in the request
// and the other only for calls that the client itself gave up; every passing condition is Unavailable (WEP-24). An error
// that is not known here leaves without its text, because the peer is not trusted; the interceptor has logged it.
func toStatus(ctx context.Context, err error) error {
	var argument *argumentError
	var format *formatError
	switch {
	case err == nil:
		return nil
	case errors.Is(context.Cause(ctx), errStopping):
		return status.Error(codes.Unavailable, errStopping.Error())
	case errors.As(err, &argument):
		return status.Error(codes.InvalidArgument, argument.text)
	case errors.As(err, &format):
		return status.Error(codes.FailedPrecondition, format.Error())
	case errors.Is(err, errDisabled):
		return status.Error(codes.Unimplemented, errDisabled.Error())
	case errors.Is(err, ErrNoIdentity):
		return status.Error(codes.PermissionDenied, noIdentityText(ctx))
	case errors.Is(err, ErrTooMany):
		return status.Error(codes.ResourceExhausted, ErrTooMany.Error())
	case errors.Is(err, peer.ErrForeignPIDNamespace):
		return status.Error(codes.PermissionDenied, peer.ErrForeignPIDNamespace.Error())
	case errors.Is(err, peer.ErrUserChanged):
		return status.Error(codes.PermissionDenied, peer.ErrUserChanged.Error())
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	}
	for _, passing := range []error{ErrNotReady, ErrUnavailable, peer.ErrGone, errStopping, errBusy, errUnsteady, errNothingYet, errSourceEnded, errUnsent} {
		if errors.Is(err, passing) {
			return status.Error(codes.Unavailable, passing.Error())
		}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		// Not the client's context: a part of the agent gave up.
		return status.Error(codes.Unavailable, "the agent could not answer in time")
	}
	return status.Error(codes.Internal, "internal error")
}

// noIdentityText names the process as the agent sees it: that is often the answer already.
func noIdentityText(ctx context.Context) string {
	p, err := peer.FromContext(ctx)
	if err != nil {
		return ErrNoIdentity.Error()
	}
	return fmt.Sprintf("%v: no registration entry for this node matches process %d of uid %d (signet entry list shows what there is)", ErrNoIdentity, p.PID, p.UID)
}
