package why

import (
	"strings"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

// endpoint says what keeps a process from the agent's socket.
func (d *diagnosis) endpoint(f *Finding, p *agentv1.Process) {
	e := p.GetEndpoint()
	if e == nil {
		return
	}
	own := "unix://" + d.status.GetSocketPath()
	if e.Environment != nil && !strings.HasPrefix(e.GetEnvironment(), "unix:") {
		f.add(cause(EndpointWrong, "process %d has SPIFFE_ENDPOINT_SOCKET=%s, which names no Unix socket of this agent", p.GetPid(), e.GetEnvironment()).
			fix("# start it with SPIFFE_ENDPOINT_SOCKET=%s", own))
		return
	}
	told := ""
	if e.Environment != nil {
		told = " (its SPIFFE_ENDPOINT_SOCKET is " + e.GetEnvironment() + ")"
	}
	switch e.GetObstacle() {
	case "denied":
		f.add(cause(SocketDenied, "process %d, uid %d, may not reach the agent's socket: the mode of %s forbids it%s", p.GetPid(), p.GetUid(), e.GetAt(), told).
			fix("ls -ld %s", quote(e.GetAt())).
			fix("# let everybody through: chmod o+x on a directory; the socket itself is 0777 unless somebody changed it"))
	case "missing":
		if e.Environment != nil {
			f.add(cause(EndpointWrong, "process %d looks for the Workload API at %s, where there is nothing (%s does not exist for it)", p.GetPid(), e.GetEnvironment(), e.GetAt()).
				fix("# start it with SPIFFE_ENDPOINT_SOCKET=%s, or mount that directory into its container", own))
		} else if len(f.Causes) == 0 {
			f.add(cause(SocketMissing, "process %d does not see the agent's socket: %s does not exist for it", p.GetPid(), e.GetAt()).
				fix("# mount the directory of %s into its container, and set SPIFFE_ENDPOINT_SOCKET there", d.status.GetSocketPath()))
		}
	case "other":
		f.add(cause(EndpointWrong, "process %d is told of %s, which is not this agent's socket%s: an older agent's, whose directory was replaced, or another program's", p.GetPid(), e.GetAt(), told).
			fix("# start it with SPIFFE_ENDPOINT_SOCKET=%s, or restart its container", own))
	}
}

// refusals says what the process was refused for, other than for want of an entry.
func (d *diagnosis) refusals(f *Finding, p *agentv1.Process) {
	for _, r := range p.GetRefusals() {
		when := ", last at " + clock(r.GetLastAt())
		switch r.GetReason() {
		case "HEADER_MISSING":
			f.add(cause(HeaderMissing, "process %d calls %s without the metadata workload.spiffe.io: true%s", p.GetPid(), r.GetMethod(), when).
				fix("# call with a SPIFFE library, or send that metadata with each call"))
		case "TOO_MANY_CALLS":
			f.add(cause(TooManyCalls, "calls of process %d, uid %d, were refused because too many are open: %s%s", p.GetPid(), p.GetUid(), r.GetMessage(), when).
				fix("# let the process close streams and connections it does not need, or raise max_streams_per_uid in the agent's configuration"))
		case "RATE_LIMITED":
			f.add(cause(RateLimited, "process %d, uid %d, asks for new JWT-SVIDs faster than the agent lets one user%s", p.GetPid(), p.GetUid(), when).
				fix("# let it keep each JWT-SVID until it ends, and ask for one SPIFFE ID and few audiences"))
		case "USER_CHANGED":
			f.add(cause(UserChanged, "process %d changed its user or group after it connected%s", p.GetPid(), when).fix("# let it connect after it has changed its user"))
		case "INVALID_ARGUMENT", "TOKEN_INVALID":
			f.add(cause(BadRequest, "process %d sent what the agent refused: %s%s", p.GetPid(), r.GetMessage(), when))
		case "FOREIGN_PID_NAMESPACE":
			f.add(cause(ForeignNamespace, "%s%s", r.GetMessage(), when))
		}
	}
}
