package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/svidcache"
	"github.com/signet-id/signet/agent/workloadattest"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/nearmiss"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

const (
	// maxCandidates bounds the entries that an explanation shows of those that do not match.
	maxCandidates = 10
	// maxMatching bounds those that do.
	maxMatching = 100
	// maxExplained bounds the processes of one explanation.
	maxExplained = 20
	// ticksPerSecond is what /proc counts start times in: USER_HZ, which is 100 on every Linux.
	ticksPerSecond = 100
	// podEntryPrefix starts the ids of the entries that a CA works out for pods, which have a selector that begins with podUID.
	podEntryPrefix = "signet.pod."
	podUID         = "pod-uid:"
)

// explain says what the agent knows of why a process, the processes of a pod or an entry's callers get what they get. It
// explains from what the agent holds and from this machine alone: it asks the CA nothing, so that a node that was stolen
// learns nothing by it. [DESIGN §4: a stolen node must not learn the call graph]
func (a *Agent) explain(ctx context.Context, caller *peer.Process, peers *peer.Table, req *agentv1.ExplainRequest) (*agentv1.ExplainResponse, error) {
	out := &agentv1.ExplainResponse{Status: a.describe(ctx), CallerPid: caller.PID}
	switch t := req.GetTarget().(type) {
	case *agentv1.ExplainRequest_Pid:
		if t.Pid <= 0 {
			return nil, status.Errorf(codes.InvalidArgument, "process id %d is not positive", t.Pid)
		}
		p := a.explainPID(ctx, peers, t.Pid)
		if p == nil {
			return nil, status.Errorf(codes.NotFound, "there is no process %d, and none has called the agent lately", t.Pid)
		}
		out.Processes = append(out.Processes, p)
	case *agentv1.ExplainRequest_Pod:
		pids, err := a.processesOf(ctx, peers, t.Pod)
		if err != nil {
			return nil, err
		}
		for _, pid := range pids[:min(len(pids), maxExplained)] {
			if p := a.explainPID(ctx, peers, pid); p != nil {
				out.Processes = append(out.Processes, p)
			}
		}
	case *agentv1.ExplainRequest_Id:
		if t.Id == "" {
			return nil, status.Error(codes.InvalidArgument, "id is empty: name a registration entry or a SPIFFE ID")
		}
		a.explainID(t.Id, out)
	default:
		return nil, status.Error(codes.InvalidArgument, "there is no target: name a process, a pod or an ID")
	}
	return out, nil
}

// explainPID looks at a process; at what is remembered of it, if it has ended. It is nil if there is nothing.
func (a *Agent) explainPID(ctx context.Context, peers *peer.Table, pid int32) *agentv1.Process {
	p, err := peers.Open(pid)
	if errors.Is(err, peer.ErrGone) {
		return a.explainEnded(pid)
	}
	out := &agentv1.Process{Pid: pid}
	if err != nil {
		out.Error = err.Error()
		return out
	}
	defer p.Close()
	state, reports, err := a.attestor.Explain(ctx, p)
	switch {
	case errors.Is(err, peer.ErrGone):
		return a.explainEnded(pid)
	case err != nil:
		out.Error = err.Error()
		return out
	}
	out.Uid, out.Gid = state.EffectiveUID, state.EffectiveGID
	began := startedAt(state.StartTime)
	out.StartedAt = stamp(began)
	if exe, _, err := p.Executables().Path(pid, state.RealUID); err == nil {
		out.Executable = strings.ToValidUTF8(exe, "\uFFFD")
	}
	out.OtherPidNamespace = otherPIDNamespace(pid)
	out.Endpoint = endpointOf(pid, a.config.SocketPath, state)
	var selectors []spiffe.Selector
	for _, r := range reports {
		m := &agentv1.Method{Name: r.Method, Micros: r.Took.Microseconds()}
		for _, s := range r.Selectors {
			m.Selectors = append(m.Selectors, strings.ToValidUTF8(s.String(), "\uFFFD"))
		}
		if r.Err != nil {
			m.Error = strings.ToValidUTF8(r.Err.Error(), "\uFFFD")
		}
		out.Methods = append(out.Methods, m)
		selectors = append(selectors, r.Selectors...)
	}
	out.Candidates = a.candidates(selectors)
	out.Refusals = a.refusedSince(pid, began)
	if p.Alive() != nil { // what was read may be about another process by now
		return a.explainEnded(pid)
	}
	return out
}

// explainEnded is what is remembered of a process that has ended.
func (a *Agent) explainEnded(pid int32) *agentv1.Process {
	out := &agentv1.Process{Pid: pid, Ended: true, Refusals: a.refusedSince(pid, time.Time{})}
	for _, r := range a.cache.Refused() {
		if r.PID == pid {
			a.asRefused(out, r)
			return out
		}
	}
	if len(out.Refusals) == 0 {
		return nil
	}
	return out
}

// asRefused fills in what a caller was when it got nothing.
func (a *Agent) asRefused(out *agentv1.Process, r svidcache.Refused) {
	out.Uid, out.Gid = r.UID, r.GID
	for _, name := range a.attestor.Names() {
		m := &agentv1.Method{Name: name}
		for _, s := range r.Selectors {
			if s.Type == name {
				m.Selectors = append(m.Selectors, strings.ToValidUTF8(s.String(), "\uFFFD"))
			}
			if s.Type == "unix" && name == "unix" && strings.HasPrefix(s.Value, "path:") {
				out.Executable = strings.ToValidUTF8(strings.TrimPrefix(s.Value, "path:"), "\uFFFD")
			}
		}
		out.Methods = append(out.Methods, m)
	}
	out.Candidates = a.candidates(r.Selectors)
}

func (a *Agent) refusedSince(pid int32, since time.Time) []*agentv1.Refusal {
	var all []*agentv1.Refusal
	for _, k := range a.refusals.of(pid, since) {
		all = append(all, &agentv1.Refusal{Reason: string(k.Reason), Method: strings.ToValidUTF8(k.Method, "\uFFFD"), Message: k.Text, Count: k.Count, LastAt: stamp(k.Last)})
	}
	return all
}

// candidates are the entries that match, and then those that come nearest.
func (a *Agent) candidates(selectors []spiffe.Selector) []*agentv1.Candidate {
	subject := nearmiss.NewSubject(selectors, a.attestor.Names(), nearmiss.Host{SamePath: sameFile})
	results := map[string]nearmiss.Result{}
	type ranked struct {
		id     string
		result nearmiss.Result
	}
	ownPod := slices.IndexFunc(selectors, func(s spiffe.Selector) bool { return s.Type == "k8s" && strings.HasPrefix(s.Value, podUID) })
	var near []ranked // the nearest first, no more than are shown
	entries := a.cache.Entries(func(id string, _ spiffeid.ID, want []spiffe.Selector, gone bool) bool {
		r := subject.Compare(want)
		if r.Cost == 0 {
			results[id] = r
			return true
		}
		if gone {
			return false // it did not match when it was there: nothing can be mended in it
		}
		if ownPod >= 0 && strings.HasPrefix(id, podEntryPrefix) && !slices.Contains(want, selectors[ownPod]) {
			return false // a template gave it to another pod
		}
		i, _ := slices.BinarySearchFunc(near, r, func(x ranked, r nearmiss.Result) int { return x.result.Order(r) })
		if i >= maxCandidates {
			return false
		}
		near = slices.Insert(near, i, ranked{id, r})
		near = near[:min(len(near), maxCandidates)]
		results[id] = r
		return true
	})
	kept := map[string]bool{}
	for _, n := range near {
		kept[n.id] = true
	}
	hints := map[string]*svidcache.EntryState{}
	var matching, others []*agentv1.Candidate
	for i := range entries {
		e := &entries[i]
		r := results[e.ID]
		c := candidateOf(e)
		for _, d := range r.Differences {
			difference := &agentv1.Difference{Selector: d.Want.String(), Kind: string(d.Kind)}
			for _, h := range d.Have[:min(len(d.Have), maxCandidates)] {
				difference.Have = append(difference.Have, strings.ToValidUTF8(h.String(), "\uFFFD"))
			}
			c.Differences = append(c.Differences, difference)
		}
		switch {
		case r.Cost > 0 && kept[e.ID]:
			others = append(others, c)
		case r.Cost > 0, len(matching) == maxMatching:
		default:
			c.Matches = true
			if e.Hint != "" && !e.Expired && e.RemovedAt.IsZero() {
				if first := hints[e.Hint]; first != nil && first.Older(e) {
					c.ShadowedBy = first.ID
				} else {
					hints[e.Hint] = e
				}
			}
			matching = append(matching, c)
		}
	}
	slices.SortStableFunc(others, func(x, y *agentv1.Candidate) int { return results[x.EntryId].Order(results[y.EntryId]) })
	return append(matching, others...)
}

func candidateOf(e *svidcache.EntryState) *agentv1.Candidate {
	c := &agentv1.Candidate{EntryId: e.ID, SpiffeId: e.SPIFFEID.String(), Hint: e.Hint, Revision: e.Revision, ExpiresAt: stamp(e.ExpiresAt), Expired: e.Expired,
		RemovedAt: stamp(e.RemovedAt), Watchers: int64(e.Watchers)}
	for _, s := range e.Selectors {
		c.Selectors = append(c.Selectors, s.String())
	}
	for _, td := range e.FederatesWith {
		c.FederatesWith = append(c.FederatesWith, td.Name())
	}
	for _, td := range e.MissingBundles {
		c.MissingBundles = append(c.MissingBundles, td.Name())
	}
	if s := e.SVID; s != nil {
		c.Svid = &agentv1.X509SVID{NotBefore: stamp(s.NotBefore), NotAfter: stamp(s.NotAfter), RenewAt: stamp(s.RenewAt), Authority: s.Authority, Tainted: s.Tainted,
			AuthorityGone: s.Gone, Valid: s.Valid, Outdated: s.Outdated}
	}
	if e.InFlight || e.Failures > 0 || e.Failed != nil {
		c.Issuance = &agentv1.Issuance{InFlight: e.InFlight, Failures: int64(e.Failures), RetryAt: stamp(e.RetryAt)}
		if e.Failed != nil {
			c.Issuance.Error, c.Issuance.FailedAt = strings.ToValidUTF8(e.Failed.Error(), "\uFFFD"), stamp(e.FailedAt)
		}
	}
	return c
}

// explainID finds the entries of an ID, and the callers that lately got nothing, compared with them.
func (a *Agent) explainID(id string, out *agentv1.ExplainResponse) {
	if strings.HasPrefix(id, "/") {
		id = a.config.trustDomain().IDString() + id
	}
	entries := a.cache.Entries(func(entryID string, spiffeID spiffeid.ID, _ []spiffe.Selector, _ bool) bool {
		return entryID == id || spiffeID.String() == id
	})
	named := map[string]bool{}
	for i := range entries[:min(len(entries), maxMatching)] {
		out.Entries = append(out.Entries, candidateOf(&entries[i]))
		named[entries[i].ID] = true
	}
	for _, r := range a.cache.Refused() {
		if len(out.Processes) == maxExplained {
			break
		}
		p := &agentv1.Process{Pid: r.PID, Ended: true, Refusals: []*agentv1.Refusal{{Reason: "NO_IDENTITY", Count: 1, LastAt: stamp(r.At)}}}
		a.asRefused(p, r)
		p.Candidates = slices.DeleteFunc(p.Candidates, func(c *agentv1.Candidate) bool { return !named[c.EntryId] })
		if len(p.Candidates) > 0 {
			out.Processes = append(out.Processes, p)
		}
	}
}

// sameFile says whether two paths lead to one file: by symbolic or hard links.
func sameFile(a, b string) bool {
	if !filepath.IsAbs(a) || !filepath.IsAbs(b) {
		return false
	}
	fa, err := os.Stat(a)
	if err != nil {
		return false
	}
	fb, err := os.Stat(b)
	return err == nil && os.SameFile(fa, fb)
}

// startedAt is the moment of a start time in ticks after boot.
func startedAt(ticks uint64) time.Time {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return time.Time{}
	}
	since := time.Duration(up.Nano()) - time.Duration(ticks)*(time.Second/ticksPerSecond)
	return time.Now().Add(-since).Round(time.Second / ticksPerSecond)
}

// otherPIDNamespace says whether the process is in another PID namespace than the agent.
func otherPIDNamespace(pid int32) bool {
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return false
	}
	its, err := os.Readlink("/proc/" + strconv.Itoa(int(pid)) + "/ns/pid")
	return err == nil && own != its
}

var errNoKubernetes = status.Error(codes.FailedPrecondition, "this agent does not attest Kubernetes: set workload_attestation.k8s in its configuration, or name a process")

// processesOf finds the processes of a pod by asking the attestor of Kubernetes about each process of a container.
func (a *Agent) processesOf(ctx context.Context, peers *peer.Table, pod string) ([]int32, error) {
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, status.Errorf(codes.InvalidArgument, "pod %q is not of the form NAMESPACE/NAME", pod)
	}
	if !slices.Contains(a.attestor.Names(), "k8s") {
		return nil, errNoKubernetes
	}
	names, err := os.ReadDir("/proc")
	if err != nil {
		return nil, status.Errorf(codes.Internal, "listing processes: %v", err)
	}
	var pids []int32
	asked := map[string]bool{} // by cgroup, whose processes are all of one container
	for _, n := range names {
		pid, err := strconv.ParseInt(n.Name(), 10, 32)
		if err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, status.FromContextError(err).Err()
		}
		cgroup, err := readBounded("/proc/"+n.Name()+"/cgroup", 64<<10)
		if err != nil || strings.TrimSpace(string(cgroup)) == "0::/" {
			continue
		}
		of, known := asked[string(cgroup)]
		if !known {
			of = a.isOfPod(ctx, peers, int32(pid), namespace, name)
			asked[string(cgroup)] = of
		}
		if of {
			pids = append(pids, int32(pid))
		}
	}
	if len(pids) == 0 {
		return nil, status.Errorf(codes.NotFound, "no process of pod %s runs on this node, as far as the kubelet says", pod)
	}
	return pids, nil
}

// isOfPod asks the attestor of Kubernetes alone whose the process is.
func (a *Agent) isOfPod(ctx context.Context, peers *peer.Table, pid int32, namespace, name string) bool {
	p, err := peers.Open(pid)
	if err != nil {
		return false
	}
	defer p.Close()
	reports, err := a.attestor.Ask(ctx, p, "k8s")
	if err != nil {
		return false
	}
	has := func(value string) bool {
		return slices.ContainsFunc(reports, func(r workloadattest.Report) bool {
			return slices.Contains(r.Selectors, spiffe.Selector{Type: "k8s", Value: value})
		})
	}
	return has("ns:"+namespace) && has("pod-name:"+name)
}
