package workloadapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/workloadapi/peer"
)

// Conditions of an endpoint that other endpoints of the agent know too.
var (
	// ErrStopping is the cause of contexts that end because the agent does. The caller gets Unavailable.
	ErrStopping = errors.New("the agent is shutting down")

	// ErrBusy says that a bound of the endpoint is reached. The caller gets Unavailable.
	ErrBusy = errors.New("too many calls are open")

	// ErrTooFast says that a caller begins more calls a second than it may. The caller gets ResourceExhausted.
	ErrTooFast = errors.New("the process or its user begins too many calls a second: keep a stream open, and JWT-SVIDs until they end")

	// ErrSubjectChanged says that a subject is not what it was when it was attested.
	ErrSubjectChanged = errors.New("the process is not what it was")

	// ErrDisabled says that the configuration turns a profile off. The caller gets Unimplemented.
	ErrDisabled = errors.New("this profile is disabled in the agent's configuration")
)

// Conditions of the endpoint itself.
var (
	errUnsteady    = errors.New("the process kept changing while it was attested")
	errNothingYet  = errors.New("the caller is registered, but its identities, bundles or policies are still on their way")
	errNoPolicies  = errors.New("the agent's CA has no call policies, as a SPIRE server; without them a service allows nothing")
	errSourceEnded = errors.New("the agent stopped following the caller's identities")
	errUnsent      = errors.New("the message could not be sent")
)

// An ArgumentError is a mistake of the client. Its text goes to the client. [Workload Endpoint §6, Workload API §4.3]
type ArgumentError struct {
	Text string
	// Reason is ReasonInvalidArgument where it is empty.
	Reason Reason
}

func (e *ArgumentError) Error() string { return e.Text }

func badArgument(format string, args ...any) error {
	return &ArgumentError{Text: fmt.Sprintf(format, args...)}
}

// A formatError says that the caller reads only older policy formats than the agent holds.
type formatError struct{ reads, have uint32 }

func (e *formatError) Error() string {
	return fmt.Sprintf("the policies have format %d and the caller reads up to %d: upgrade the caller", e.have, e.reads)
}

// Status is the one place where errors become gRPC codes. ctx is that of the call. Endpoints on which others speak for
// workloads judge what has another meaning there first.
//
// Clients end their watch for good on InvalidArgument and on Canceled. So the one stands only for mistakes in the request
// and the other only for calls that the client itself gave up; every passing condition is Unavailable (WEP-24). An error
// that is not known here leaves without its text, because the peer is not trusted; the interceptor has logged it.
func Status(ctx context.Context, err error) error {
	var argument *ArgumentError
	var format *formatError
	switch {
	case err == nil:
		return nil
	case errors.Is(context.Cause(ctx), ErrStopping):
		return refusal(codes.Unavailable, ReasonStopping, ErrStopping.Error())
	case errors.As(err, &argument):
		return refusal(codes.InvalidArgument, cmp.Or(argument.Reason, ReasonInvalidArgument), argument.Text)
	case errors.As(err, &format):
		return refusal(codes.FailedPrecondition, ReasonPolicyFormat, format.Error())
	case errors.Is(err, errNoPolicies):
		return refusal(codes.FailedPrecondition, ReasonNoPolicies, errNoPolicies.Error())
	case errors.Is(err, ErrDisabled):
		return refusal(codes.Unimplemented, ReasonDisabled, ErrDisabled.Error())
	case errors.Is(err, ErrNoIdentity):
		return refusal(codes.PermissionDenied, ReasonNoIdentity, noIdentityText(ctx))
	case errors.Is(err, ErrTooFast):
		return refusal(codes.ResourceExhausted, ReasonRateLimited, ErrTooFast.Error())
	case errors.Is(err, ErrTooMany):
		return refusal(codes.ResourceExhausted, ReasonRateLimited, ErrTooMany.Error())
	case errors.Is(err, peer.ErrForeignPIDNamespace):
		return refusal(codes.PermissionDenied, ReasonForeignPIDNamespace, peer.ErrForeignPIDNamespace.Error())
	case errors.Is(err, peer.ErrUserChanged):
		return refusal(codes.PermissionDenied, ReasonUserChanged, peer.ErrUserChanged.Error())
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	}
	for _, p := range passing {
		if errors.Is(err, p.err) {
			return refusal(codes.Unavailable, p.reason, p.err.Error())
		}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		// Not the client's context: a part of the agent gave up.
		return refusal(codes.Unavailable, ReasonTimeout, "the agent could not answer in time")
	}
	return refusal(codes.Internal, ReasonInternal, "internal error")
}

// passing are the conditions that pass, so that the client shall come back.
var passing = []struct {
	err    error
	reason Reason
}{
	{ErrSubjectChanged, ReasonProcessUnsteady},
	{ErrNotReady, ReasonNotReady},
	{ErrUnavailable, ReasonCAUnavailable},
	{peer.ErrGone, ReasonProcessGone},
	{ErrStopping, ReasonStopping},
	{ErrBusy, ReasonTooManyCalls},
	{errUnsteady, ReasonProcessUnsteady},
	{errNothingYet, ReasonIdentityPending},
	{errSourceEnded, ReasonInterrupted},
	{errUnsent, ReasonInterrupted},
}

// noIdentityText names the process as the agent sees it: that is often the answer already.
func noIdentityText(ctx context.Context) string {
	p, err := peer.FromContext(ctx)
	if err != nil {
		return ErrNoIdentity.Error()
	}
	return fmt.Sprintf("%v: no registration entry for this node matches process %d of uid %d (signet why %d, run by an admin of this node, says which comes nearest)", ErrNoIdentity, p.PID, p.UID, p.PID)
}
