package cli

import (
	"fmt"
	"os"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	endpoint "github.com/signet-id/signet/workloadapi"
)

// workloadError explains an answer of the Workload API: by its reason, where the agent gives one, else by its code.
func workloadError(doing string, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	said := &remoteError{doing: doing, code: st.Code(), message: st.Message()}
	if hint := reasonHint(endpoint.ReasonOf(err)); hint != "" {
		return withHint(said, "%s", hint)
	}
	switch st.Code() {
	case codes.PermissionDenied:
		return withHint(said, "%s", reasonHint(endpoint.ReasonNoIdentity))
	case codes.Unavailable:
		return withHint(said, "is an agent running behind --endpoint or $%s, and has it ever reached its CA?", envEndpoint)
	case codes.DeadlineExceeded:
		return withHint(said, "the agent did not answer in time; --timeout sets how long to wait")
	case codes.Unimplemented:
		return withHint(said, "the agent does not offer this, or it is switched off in its configuration")
	}
	return said
}

// reasonHint is the next step for each reason that the agent gives.
func reasonHint(r endpoint.Reason) string {
	switch r {
	case endpoint.ReasonNoIdentity:
		program, err := os.Executable()
		if err != nil {
			program = "signet"
		}
		return fmt.Sprintf("no registration entry matches this process (pid %d, uid %d, program %s) on this node: 'signet why %d', run by an admin of this node, says which entry comes nearest "+
			"and what to change; 'signet why PID' does so for the service itself", os.Getpid(), os.Getuid(), program, os.Getpid())
	case endpoint.ReasonForeignPIDNamespace:
		return "the agent runs in a PID namespace of its own and cannot see who calls: run it with hostPID: true, or --pid=host"
	case endpoint.ReasonUserChanged:
		return "the process changed its user or group after it connected: connect as the user that the registration entry names"
	case endpoint.ReasonNotReady, endpoint.ReasonCAUnavailable:
		return "the agent has no use of its CA now: 'signet agent status', run by an admin of this node, says since when and why"
	case endpoint.ReasonIdentityPending:
		return "there is a registration entry, and the CA has not issued for it: 'signet why PID', run by an admin of this node, shows what the CA said"
	case endpoint.ReasonTooManyCalls:
		return "this user has too many calls open, or all users together: close what is not needed, or raise max_streams_per_uid in the agent's configuration"
	case endpoint.ReasonRateLimited:
		return "use each JWT-SVID until it ends, and ask for one SPIFFE ID only (--id)"
	case endpoint.ReasonStopping, endpoint.ReasonInterrupted, endpoint.ReasonTimeout:
		return "the agent stops or is slow: try again"
	case endpoint.ReasonProcessGone, endpoint.ReasonProcessUnsteady:
		return "the process that connected ended or became another program meanwhile: connect anew"
	case endpoint.ReasonHeaderMissing:
		return "what calls is no SPIFFE client: send the metadata workload.spiffe.io: true with each call"
	case endpoint.ReasonTokenInvalid:
		return "'signet svid inspect FILE' shows the token and what is wrong with it"
	case endpoint.ReasonDisabled:
		return "the agent's configuration switches this off; WIT-SVIDs need wit.enabled: true there and in the CA's configuration"
	case endpoint.ReasonInternal:
		return "the agent's log says more"
	}
	return ""
}
