package workloadapi

import (
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ReasonDomain is the domain of the google.rpc.ErrorInfo in what this endpoint refuses.
const ReasonDomain = "signet"

// A Reason is why a call was not answered, for programs: it stays the same when the text gets better. It says nothing that
// the caller may not know, above all not which of several causes within the agent's state it was: "signet why" tells that
// to the node's operator. docs/reference/reasons.md has the list.
type Reason string

// The reasons, each with the gRPC code that it comes with.
const (
	ReasonNoIdentity          Reason = "NO_IDENTITY"           // PermissionDenied: no registration entry matches, or not for the ID that was asked for
	ReasonForeignPIDNamespace Reason = "FOREIGN_PID_NAMESPACE" // PermissionDenied: the agent cannot see the caller's process
	ReasonUserChanged         Reason = "USER_CHANGED"          // PermissionDenied: the process is another user or group than it connected as
	ReasonHeaderMissing       Reason = "HEADER_MISSING"        // InvalidArgument: the security header is not there
	ReasonInvalidArgument     Reason = "INVALID_ARGUMENT"      // InvalidArgument: another mistake in the request, which the text names
	ReasonTokenInvalid        Reason = "TOKEN_INVALID"         // InvalidArgument: the JWT-SVID to be validated is not valid
	ReasonNotReady            Reason = "NOT_READY"             // Unavailable: the agent has not synchronised with its CA yet
	ReasonIdentityPending     Reason = "IDENTITY_PENDING"      // Unavailable: there is an entry, and nothing issued for it yet
	ReasonCAUnavailable       Reason = "CA_UNAVAILABLE"        // Unavailable: the CA is out of reach or refuses, and nothing valid is cached
	ReasonTooManyCalls        Reason = "TOO_MANY_CALLS"        // Unavailable: as many calls are open as may be
	ReasonProcessGone         Reason = "PROCESS_GONE"          // Unavailable: the process that connected has ended
	ReasonProcessUnsteady     Reason = "PROCESS_UNSTEADY"      // Unavailable: the process kept changing while it was looked at
	ReasonInterrupted         Reason = "INTERRUPTED"           // Unavailable: the stream cannot go on; open it anew
	ReasonTimeout             Reason = "TIMEOUT"               // Unavailable: the agent could not answer in time
	ReasonStopping            Reason = "STOPPING"              // Unavailable: the agent is shutting down
	ReasonRateLimited         Reason = "RATE_LIMITED"          // ResourceExhausted: too many calls are begun, or new JWT-SVIDs asked for
	ReasonPolicyFormat        Reason = "POLICY_FORMAT"         // FailedPrecondition: the caller reads only older policies
	ReasonNoPolicies          Reason = "NO_POLICIES"           // FailedPrecondition: the agent's CA has no call policies
	ReasonDisabled            Reason = "DISABLED"              // Unimplemented: this profile is switched off
	ReasonInternal            Reason = "INTERNAL"              // Internal: the agent's log says more
)

// Reasons are all of them, for the document and its test.
var Reasons = []Reason{
	ReasonNoIdentity, ReasonForeignPIDNamespace, ReasonUserChanged, ReasonHeaderMissing, ReasonInvalidArgument, ReasonTokenInvalid, ReasonNotReady,
	ReasonIdentityPending, ReasonCAUnavailable, ReasonTooManyCalls, ReasonProcessGone, ReasonProcessUnsteady, ReasonInterrupted, ReasonTimeout, ReasonStopping,
	ReasonRateLimited, ReasonPolicyFormat, ReasonNoPolicies, ReasonDisabled, ReasonInternal,
}

// refusal is a status with its reason.
func refusal(code codes.Code, reason Reason, text string) error {
	st := status.New(code, text)
	detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: string(reason), Domain: ReasonDomain})
	if err != nil {
		return st.Err() // only a status of OK or a message that cannot be encoded gets here
	}
	return detailed.Err()
}

// ReasonOf returns the reason in an answer of the endpoint, or "" if there is none.
func ReasonOf(err error) Reason {
	st, ok := status.FromError(err)
	if !ok {
		return ""
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == ReasonDomain {
			return Reason(info.GetReason())
		}
	}
	return ""
}
