package caclient

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Reason is why the CA refuses this agent. The values are those of SPIRE's PermissionDeniedDetails.
type Reason int

const (
	// Expired: the agent's SVID is past its end.
	Expired = Reason(types.PermissionDeniedDetails_AGENT_EXPIRED)
	// NotAttested: the CA does not know this agent (any more).
	NotAttested = Reason(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	// NotActive: another SVID of this agent is the current one.
	NotActive = Reason(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	// Banned: an operator has banned this agent.
	Banned = Reason(types.PermissionDeniedDetails_AGENT_BANNED)
	// MustReattest: this kind of agent renews by attesting again.
	MustReattest = Reason(types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
)

func (r Reason) String() string {
	switch r {
	case Expired:
		return "the agent's SVID has expired"
	case NotAttested:
		return "the CA does not know this agent"
	case NotActive:
		return "another SVID of this agent is in use"
	case Banned:
		return "the agent is banned"
	case MustReattest:
		return "the agent must attest again"
	}
	return fmt.Sprintf("reason %d", int(r))
}

// A DeniedError says that the CA was reached and refuses this agent. Waiting alone does not help.
type DeniedError struct {
	Reason  Reason
	Message string
	// SVID is the agent's that was refused, where Client.Run returns the error.
	SVID *x509svid.SVID
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("the CA refuses this agent: %s (%q)", e.Reason, e.Message)
}

// An UnverifiedError says that somebody answers at the CA's address whom the bundle that is held does not verify: the clock
// is wrong, it is not the CA, or the CA was made anew with other authorities.
type UnverifiedError struct{ err error }

func (e *UnverifiedError) Error() string { return "the CA does not verify: " + e.err.Error() }

func (e *UnverifiedError) Unwrap() error { return e.err }

// fromStatus turns the gRPC error of a call into one that callers can test for: *DeniedError where SPIRE's details say
// why the agent is refused, else err itself.
func fromStatus(err error) error {
	st, ok := status.FromError(err)
	if !ok || st.Code() != codes.PermissionDenied {
		return err
	}
	for _, d := range st.Details() {
		if pd, ok := d.(*types.PermissionDeniedDetails); ok && pd.GetReason() != types.PermissionDeniedDetails_UNKNOWN {
			return &DeniedError{Reason: Reason(pd.GetReason()), Message: st.Message()}
		}
	}
	return err
}
