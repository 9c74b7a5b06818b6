package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/why"
)

// shownCandidates bounds the entries that are printed of those that do not match.
const shownCandidates = 3

// caWait is how long the CA may take to answer: its part is good to have, and no more.
const caWait = 10 * time.Second

func (a *app) whyCommand() *cobra.Command {
	var socket, caSocket, cluster string
	cmd := &cobra.Command{
		Use:   "why PID|NAMESPACE/POD|ENTRY-ID|SPIFFE-ID",
		Short: "Say why a process gets no identity, and what to do about it",
		Long: `Say why a process, the processes of a pod, or the callers of a registration entry get what they get: which selectors they have
and where each came from, the nearest entries and the selector that differs, what the CA said, and the command that would fix it.

The agent of this node is asked on its admin socket (--socket, else $` + envAgentSocket + `, else ` + defaultAgentSocket + `). It explains from what it
holds. Entries of other nodes, and what templated Identities make of a pod, only the CA knows: it is asked too, if it can be reached on its admin
socket (--ca-socket, else $` + envCASocket + `, else ` + defaultCASocket + `) or with --server. A number is a process id, as the agent counts processes.
Of a pod the CA alone says what it is given, on whichever node it runs; where there is no agent, nothing more is asked.

Exit status 0: an identity is served, and nothing is wrong. 1: there is a cause.`,
		Example: `  signet why $(pidof web)
  signet why prod/web-0
  kubectl -n signet-system exec signet-ca-0 -- signet why prod/web-0
  signet why /web -o json`,
		Args: exactArgs("PID|NAMESPACE/POD|ENTRY-ID|SPIFFE-ID"),
	}
	output := outputFlag(cmd)
	fs := cmd.Flags()
	fs.StringVar(&socket, "socket", "", "admin socket of the agent (default $"+envAgentSocket+", else "+defaultAgentSocket+")")
	fs.StringVar(&cluster, "cluster", "", "of a pod: its cluster, by the name in the CA's configuration (default: all that it watches)")
	fs.StringVar(&caSocket, "ca-socket", "", "admin socket of the CA (default $"+envCASocket+", else "+defaultCASocket+")")
	fs.StringVar(&a.ca.server, "server", "", "HOST:PORT of the CA, over mTLS as the identity that the Workload API gives")
	fs.StringVar(&a.ca.endpoint, "endpoint", "", "with --server: "+endpointFlagHelp)
	fs.DurationVar(&a.ca.timeout, "timeout", defaultTimeout, "how long to wait")
	exclusive(cmd, "ca-socket", "server")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		target, err := whyTarget(args[0])
		if err != nil {
			return err
		}
		if target.Cluster = cluster; cluster != "" && target.Pod == "" {
			return usagef("--cluster is for a pod, NAMESPACE/POD")
		}
		if a.ca.timeout <= 0 {
			return usagef("--timeout %s is not a positive duration, such as 30s", a.ca.timeout)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), a.ca.timeout)
		defer cancel()
		a.ca.socket = caSocket
		return a.why(ctx, *output, agentSocket(socket), target)
	}
	return cmd
}

// whyTarget reads the argument.
func whyTarget(arg string) (why.Target, error) {
	if arg != "" && strings.Trim(arg, "0123456789") == "" {
		pid, err := strconv.ParseInt(arg, 10, 32)
		if err != nil || pid == 0 {
			return why.Target{}, usagef("%q is no process id", arg)
		}
		return why.Target{PID: int32(pid)}, nil
	}
	if arg == "" {
		return why.Target{}, usagef("the argument is empty: name a process id, a pod, an entry or a SPIFFE ID")
	}
	if before, after, ok := strings.Cut(arg, "/"); ok && before != "" && !strings.Contains(after, "/") && !strings.HasSuffix(before, ":") {
		return why.Target{Pod: arg}, nil
	}
	return why.Target{ID: arg}, nil
}

func (a *app) why(ctx context.Context, f format, socket string, t why.Target) error {
	var agent agentv1.AgentClient // a nil *localAgent must not become one that is not nil, nor a nil *caConn
	l, agentErr := dialAgent(ctx, socket)
	switch {
	case agentErr == nil:
		defer l.Close()
		agent = l
	case t.Pod == "":
		return a.noAgent(f, agentErr)
	}
	ca, caErr := a.caForWhy(ctx)
	var conn grpc.ClientConnInterface
	if ca != nil {
		defer ca.Close()
		conn = ca
	}
	if agent == nil && conn == nil {
		a.note("the CA, which knows what its templates give a pod, cannot be asked either: %v", caErr)
		return a.noAgent(f, agentErr)
	}
	answer, err := why.Ask(ctx, agent, conn, caErr, t, a.now())
	if err != nil && agent == nil {
		return caError("asking about pod "+strconv.Quote(t.Pod), ca, err)
	}
	if err != nil {
		err = agentError("asking the agent at "+strconv.Quote(socket), err)
		if isCode(err, codes.NotFound) {
			return withHint(err, "the agent counts processes as the host does; in a container, look for the number on the host")
		}
		return a.noAgent(f, err)
	}
	if answer.CA.Err != nil {
		a.note("the CA was not asked, so entries of other nodes are unknown here: %v", answer.CA.Err)
		a.note("with --ca-socket or --server it is; or run on the CA's host: signet entry list --selector TYPE:VALUE")
	}
	if answer.CA.PodsErr != nil {
		a.note("what the CA makes of the pod is not known: %v", answer.CA.PodsErr)
	}
	if own := answer.Local.GetCallerPid(); own != int32(os.Getpid()) && t.PID != 0 {
		a.note("the agent is in another PID namespace: this process is %d here and %d there; the number that you gave was taken as the agent counts", os.Getpid(), own)
	}
	if f == formatJSON || f == formatYAML {
		if err := a.show(f, whyJSON(answer), nil); err != nil {
			return err
		}
	} else {
		w := &whyPrinter{app: a, wide: f == formatWide, now: a.now()}
		w.answer(answer)
		if _, err := io.WriteString(a.stdout, w.b.String()); err != nil {
			return err
		}
	}
	for _, finding := range answer.Findings {
		if finding.Main().Code != why.Served {
			return errCauseShown
		}
	}
	return nil
}

// errCauseShown ends a command that has done its work and found that something is wrong.
var errCauseShown = &silentError{}

// A silentError makes the exit status 1 without another word.
type silentError struct{}

func (*silentError) Error() string { return "" }

// caForWhy connects to the CA, if that is possible at once.
func (a *app) caForWhy(ctx context.Context) (*caConn, error) {
	if a.ca.server == "" {
		path := strings.TrimPrefix(strings.TrimPrefix(cmp.Or(a.ca.socket, os.Getenv(envCASocket), defaultCASocket), "unix://"), "unix:")
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("its admin socket is not here: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, caWait)
	defer cancel()
	return a.connect(ctx)
}

// noAgent names why the agent could not be asked: that, too, is a cause.
func (a *app) noAgent(f format, err error) error {
	code := why.Code("")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		code = why.AdminSocketMissing
	case errors.Is(err, fs.ErrPermission), isCode(err, codes.PermissionDenied):
		code = why.AdminSocketDenied
		switch {
		case strings.Contains(err.Error(), "PID namespace"):
			code = why.ForeignNamespace
		case strings.Contains(err.Error(), "hidepid"):
			code = why.ProcessHidden
		}
	case errors.Is(err, syscall.ECONNREFUSED):
		code = why.AgentNotRunning
	case isCode(err, codes.Unimplemented), isCode(err, codes.InvalidArgument):
		code = why.NotAdminSocket
	}
	if code == "" {
		return err
	}
	var h interface{ Hint() string }
	hint := ""
	if errors.As(err, &h) {
		hint = h.Hint()
	}
	if f == formatJSON || f == formatYAML {
		if err := a.show(f, whyAnswer{Findings: []whyFinding{{Causes: []*why.Cause{{Code: code, Text: err.Error(), Fix: []string{"# " + hint}}}}}}, nil); err != nil {
			return err
		}
		return errCauseShown
	}
	return withHint(fmt.Errorf("%s: %w", code, err), "%s", hint)
}

// whyAnswer is what -o json prints.
type whyAnswer struct {
	Agent    *agentState  `json:"agent,omitempty"`
	CAAsked  bool         `json:"ca_asked"`
	CAError  string       `json:"ca_error,omitempty"`
	Findings []whyFinding `json:"findings"`
}

type whyFinding struct {
	PID        int32          `json:"pid,omitempty"`
	UID        *uint32        `json:"uid,omitempty"`
	GID        *uint32        `json:"gid,omitempty"`
	StartedAt  string         `json:"started_at,omitempty"`
	Ended      bool           `json:"ended,omitempty"`
	Executable string         `json:"executable,omitempty"`
	Causes     []*why.Cause   `json:"causes"`
	Selectors  []whyMethod    `json:"attested,omitempty"`
	Entries    []whyCandidate `json:"entries,omitempty"`
	Refusals   []whyRefusal   `json:"refusals,omitempty"`
	Pod        *whyPod        `json:"pod,omitempty"`
}

type whyMethod struct {
	Attestor  string   `json:"attestor"`
	Selectors []string `json:"selectors"`
	Error     string   `json:"error,omitempty"`
	Micros    int64    `json:"microseconds,omitempty"`
}

type whyCandidate struct {
	ID          string          `json:"id"`
	SPIFFEID    string          `json:"spiffe_id"`
	Matches     bool            `json:"matches"`
	Selectors   []string        `json:"selectors"`
	Differences []whyDifference `json:"differences,omitempty"`
	Hint        string          `json:"hint,omitempty"`
	ExpiresAt   string          `json:"expires_at,omitempty"`
	RemovedAt   string          `json:"removed_at,omitempty"`
	SVID        *whySVID        `json:"svid,omitempty"`
	Watchers    int64           `json:"subscriptions"`
	Error       string          `json:"issue_error,omitempty"`
	FailedAt    string          `json:"issue_failed_at,omitempty"`
	RetryAt     string          `json:"issue_retry_at,omitempty"`
}

type whyDifference struct {
	Selector string   `json:"selector"`
	Kind     string   `json:"kind"`
	Have     []string `json:"have,omitempty"`
}

type whySVID struct {
	NotBefore string `json:"not_before"`
	NotAfter  string `json:"not_after"`
	RenewAt   string `json:"renew_at"`
	Authority string `json:"authority"`
	Tainted   bool   `json:"authority_tainted"`
	Gone      bool   `json:"authority_gone"`
	Valid     bool   `json:"valid"`
}

type whyRefusal struct {
	Reason  string `json:"reason"`
	Method  string `json:"method"`
	Message string `json:"message"`
	Count   int64  `json:"count"`
	LastAt  string `json:"last_at"`
}

func whyJSON(answer *why.Answer) whyAnswer {
	out := whyAnswer{CAAsked: answer.CA.Err == nil, Findings: []whyFinding{}}
	if s := answer.Local.GetStatus(); s != nil {
		state := agentStateOf(s)
		out.Agent = &state
	}
	if answer.CA.Err != nil {
		out.CAError = answer.CA.Err.Error()
	}
	for _, f := range answer.Findings {
		one := whyFinding{Causes: f.Causes, Pod: whyPodOf(f.Pod)}
		candidates := answer.Local.GetEntries()
		if p := f.Process; p != nil {
			one.PID, one.Ended, one.Executable, one.StartedAt = p.GetPid(), p.GetEnded(), p.GetExecutable(), stampOf(p.GetStartedAt())
			uid, gid := p.GetUid(), p.GetGid()
			one.UID, one.GID = &uid, &gid
			candidates = p.GetCandidates()
			for _, m := range p.GetMethods() {
				one.Selectors = append(one.Selectors, whyMethod{Attestor: m.GetName(), Selectors: append([]string{}, m.GetSelectors()...), Error: m.GetError(), Micros: m.GetMicros()})
			}
			for _, r := range p.GetRefusals() {
				one.Refusals = append(one.Refusals, whyRefusal{r.GetReason(), r.GetMethod(), r.GetMessage(), r.GetCount(), stampOf(r.GetLastAt())})
			}
		}
		for _, c := range candidates {
			one.Entries = append(one.Entries, whyCandidateOf(c))
		}
		out.Findings = append(out.Findings, one)
	}
	return out
}

func whyCandidateOf(c *agentv1.Candidate) whyCandidate {
	out := whyCandidate{ID: c.GetEntryId(), SPIFFEID: c.GetSpiffeId(), Matches: c.GetMatches(), Selectors: c.GetSelectors(), Hint: c.GetHint(), ExpiresAt: stampOf(c.GetExpiresAt()),
		RemovedAt: stampOf(c.GetRemovedAt()), Watchers: c.GetWatchers(), Error: c.GetIssuance().GetError(), FailedAt: stampOf(c.GetIssuance().GetFailedAt()), RetryAt: stampOf(c.GetIssuance().GetRetryAt())}
	for _, d := range c.GetDifferences() {
		out.Differences = append(out.Differences, whyDifference{d.GetSelector(), d.GetKind(), d.GetHave()})
	}
	if s := c.GetSvid(); s != nil {
		out.SVID = &whySVID{stampOf(s.GetNotBefore()), stampOf(s.GetNotAfter()), stampOf(s.GetRenewAt()), s.GetAuthority(), s.GetTainted(), s.GetAuthorityGone(), s.GetValid()}
	}
	return out
}
