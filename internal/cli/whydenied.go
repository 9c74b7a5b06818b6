package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// whyDenied is what the flags of why-denied ask for.
type whyDenied struct {
	id                   string
	service, peer, since string
	last                 int
	agentSocket          string
	agentOnly            bool
	sinceMoment          *timestamppb.Timestamp
}

// maxLast bounds --last.
const maxLast = 100

func (a *app) whyDeniedCommand() *cobra.Command {
	var q whyDenied
	cmd := &cobra.Command{
		Use:   "why-denied DECISION-ID | --service ID --peer ID [--last N]",
		Short: "Say why a call was denied: who, whom, what, when, where, by which rule, and the smallest change that would allow it",
		Long: `Tell the story of a decision of an enforcement point. Its id is in the refusal: the HTTP header Signet-Decision-Id, the details of a gRPC
status, and the service's own log. A TLS handshake that is refused has none that the caller could see: ask with --service, --peer
or both, and --last for the latest denials between them.

The CA is asked (--socket or --server), which keeps decisions for a week unless its configuration says otherwise, and where it cannot be
reached or does not know, the agent of this node on its admin socket (--agent-socket), which remembers the denials of its own
node until it is restarted. Of very many denials at a time only some are kept one by one, and the others counted: 'signet policy
report' shows these.

Exit status 0: the story is told, whatever it says. 1: the decision is not known, or nobody could be asked.`,
		Example: `  signet why-denied YXDMMKX43QIXGCXPXKI5PRAK6B
  signet why-denied --service /documents --peer /web --last 3
  signet why-denied --agent --service /documents`,
		Args: atMostArgs(1),
	}
	output := outputFlag(cmd)
	fs := cmd.Flags()
	fs.StringVar(&q.service, "service", "", "the latest denials of calls to this service")
	fs.StringVar(&q.peer, "peer", "", "the latest denials of calls by this caller")
	fs.StringVar(&q.since, "since", "", "with --service or --peer, from this moment on: RFC 3339, or how long ago, such as 24h")
	fs.IntVar(&q.last, "last", 1, "with --service or --peer, how many")
	fs.Lookup("last").NoOptDefVal = "1"
	fs.StringVar(&q.agentSocket, "agent-socket", "", "admin socket of the agent (default $"+envAgentSocket+", else "+defaultAgentSocket+")")
	fs.BoolVar(&q.agentOnly, "agent", false, "ask the agent of this node and not the CA")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 {
			q.id = strings.TrimSpace(args[0])
		}
		if err := q.check(cmd); err != nil {
			return err
		}
		var err error
		if q.sinceMoment, err = a.moment("--since", q.since); err != nil {
			return err
		}
		if a.ca.timeout <= 0 {
			return usagef("--timeout %s is not a positive duration, such as 30s", a.ca.timeout)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), a.ca.timeout)
		defer cancel()
		return a.whyDenied(ctx, *output, q)
	}
	return a.reachesCA(cmd)
}

func (q *whyDenied) check(cmd *cobra.Command) error {
	var problem string
	switch {
	case q.id == "" && q.service == "" && q.peer == "":
		problem = "name a decision id, or --service, --peer or both"
	case q.id != "" && (q.service != "" || q.peer != "" || q.since != "" || cmd.Flags().Changed("last")):
		problem = "a decision id excludes --service, --peer, --since and --last"
	case q.last < 1 || q.last > maxLast:
		problem = fmt.Sprintf("--last %d is not 1 to %d", q.last, maxLast)
	default:
		return nil
	}
	return &usageError{err: errors.New(problem), hint: example(cmd)}
}

// denials are what somebody knows of decisions.
type denials struct {
	observed []*policyv1.Observation
	policies *policyv1.PolicySet // those of the service of the last one, as of now; nil: not known
	then     *policyv1.Policy    // the deciding one as it was; nil: not known
	by       string              // whom was asked
	ca       *caConn             // nil: it was not the CA
}

// errNoDecision says that a decision is not known.
var errNoDecision = errors.New("not known")

func (a *app) whyDenied(ctx context.Context, f format, q whyDenied) error {
	var found *denials
	var caErr, agentErr error
	if !q.agentOnly {
		c, err := a.connect(ctx)
		if err == nil {
			defer c.Close()
			found, err = q.askCA(ctx, c)
		}
		caErr = err
	}
	if found == nil {
		// The agent is the second choice, which need not be there.
		if found, agentErr = a.askAgentForDenials(ctx, q, caErr); agentErr == nil && caErr != nil && !errors.Is(caErr, errNoDecision) {
			a.note("the CA was not asked: %v", caErr)
		}
	}
	if found == nil {
		return q.unknown(caErr, agentErr)
	}
	if q.id != "" && len(found.observed) > 1 {
		a.note("warning: decision %s was reported %d times, by different agents or about different services; at most one of these reports is true, and who sent another lies", q.id, len(found.observed))
	}
	stories := make([]*deniedStory, 0, len(found.observed))
	for i, o := range found.observed {
		one := *found
		if i < len(found.observed)-1 && o.GetService() != found.observed[len(found.observed)-1].GetService() {
			one.policies = nil // those are of another service
		}
		stories = append(stories, a.tellDenied(ctx, o, &one))
	}
	return a.showDenied(f, q, stories)
}

// unknown is the error where nobody knows.
func (q *whyDenied) unknown(caErr, agentErr error) error {
	switch {
	case q.agentOnly:
		return agentErr
	case !errors.Is(caErr, errNoDecision):
		return caErr // that the agent does not know, or is not there, says little then
	}
	hint := "ids are those of enforcement points that report to an agent: compare it with the refusal; of very many denials only some are kept one by one, and " +
		"'signet policy report' counts the others; the log of the service has all, and the agent of its node (signet why-denied --agent, there) those of the last minutes"
	if q.id == "" {
		hint = "'signet policy report' lists what was denied; 'signet get policies' and 'signet policy explain' say what would be"
	}
	return withHint(caErr, "%s", hint)
}

// askCA asks the CA. An error for which errors.Is(err, errNoDecision) holds means that it does not know.
func (q *whyDenied) askCA(ctx context.Context, c *caConn) (*denials, error) {
	client := adminv1.NewObservationsClient(c)
	found := &denials{by: "the CA", ca: c}
	id := q.id
	if id == "" {
		req := &adminv1.ListObservationsRequest{Since: q.sinceMoment, Limit: int32(q.last), Verdict: adminv1.Verdict_VERDICT_DENIED}
		var err error
		if req.Service, err = q.full(ctx, c, "--service", q.service); err != nil {
			return nil, err
		}
		if req.Peer, err = q.full(ctx, c, "--peer", q.peer); err != nil {
			return nil, err
		}
		if found.observed, err = observations(ctx, c, req); err != nil {
			return nil, err
		}
		if len(found.observed) == 0 {
			return nil, fmt.Errorf("the CA knows of no denial of %s: %w", q.which(), errNoDecision)
		}
		id = found.observed[len(found.observed)-1].GetDecisionId()
		if id == "" { // it is one of several that were counted, for which the policies cannot be asked by id
			set, _, err := livePolicies(ctx, c)
			if err != nil {
				return nil, err
			}
			found.policies = set.Set()
			return found, nil
		}
	}
	answer, err := client.GetDecision(ctx, &adminv1.GetDecisionRequest{DecisionId: id})
	if err != nil {
		err = caError("asking the CA about decision "+strconv.Quote(id), c, err)
		if isCode(err, codes.NotFound) {
			return nil, fmt.Errorf("%w (%w)", err, errNoDecision)
		}
		return nil, err
	}
	if found.observed == nil {
		found.observed = append(answer.GetOthers(), answer.GetObservation()) // the policies are those of the last one's service
	}
	if found.observed[len(found.observed)-1].GetService() != answer.GetObservation().GetService() {
		return found, nil // somebody else has reported this id, and the policies are those of that service
	}
	found.policies, found.then = answer.GetPolicies(), answer.GetPolicyThen()
	return found, nil
}

// which says in words what was asked for.
func (q *whyDenied) which() string {
	var words []string
	if q.peer != "" {
		words = append(words, "calls by "+q.peer)
	} else {
		words = append(words, "calls")
	}
	if q.service != "" {
		words = append(words, "to "+q.service)
	}
	if q.since != "" {
		words = append(words, "since "+q.since)
	}
	return strings.Join(words, " ")
}

func (q *whyDenied) full(ctx context.Context, c *caConn, flag, id string) (string, error) {
	if id == "" {
		return "", nil
	}
	full, err := c.id(ctx, flag, id)
	return full.String(), err
}

// observations asks the CA for a list.
func observations(ctx context.Context, c *caConn, req *adminv1.ListObservationsRequest) ([]*policyv1.Observation, error) {
	var out []*policyv1.Observation
	err := eachObservation(ctx, c, req, func(o *policyv1.Observation) { out = append(out, o) })
	return out, err
}

// askAgentForDenials asks the agent of this node.
func (a *app) askAgentForDenials(ctx context.Context, q whyDenied, caErr error) (*denials, error) {
	socket := agentSocket(q.agentSocket)
	l, err := dialAgent(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	req := &agentv1.FindDecisionsRequest{DecisionId: q.id, Since: q.sinceMoment}
	if q.id == "" {
		req.Limit = int32(q.last)
		if req.Service, err = l.fullID(ctx, "--service", q.service); err != nil {
			return nil, err
		}
		if req.Peer, err = l.fullID(ctx, "--peer", q.peer); err != nil {
			return nil, err
		}
	}
	answer, err := agentv1.NewDecisionsClient(l.conn).Find(ctx, req)
	if err != nil {
		return nil, agentError("asking the agent at "+strconv.Quote(socket)+" about denials", err)
	}
	if len(answer.GetDecisions()) == 0 {
		return nil, withHint(fmt.Errorf("the agent of this node remembers no denial of %s", q.which()), "the CA knows those of all nodes, and for longer: leave --agent out")
	}
	for _, o := range answer.GetDecisions() {
		o.AgentId = cmp.Or(o.GetAgentId(), answer.GetAgentId())
	}
	return &denials{observed: answer.GetDecisions(), policies: answer.GetPolicies(), by: "the agent of this node"}, nil
}

// fullID writes out an ID that may be relative to the agent's trust domain.
func (l *localAgent) fullID(ctx context.Context, flag, id string) (string, error) {
	if id == "" {
		return "", nil
	}
	if strings.HasPrefix(id, "/") {
		st, err := l.GetStatus(ctx, &agentv1.GetStatusRequest{}, grpc.WaitForReady(false))
		if err != nil {
			return "", agentError("asking the agent for its trust domain", err)
		}
		id = "spiffe://" + st.GetTrustDomain() + id
	}
	full, err := fullID(flag, id)
	return full.String(), err
}

// moments writes when something was for the first and the last time.
func moments(first, last int64) (from, to time.Time) {
	return time.Unix(0, first).UTC(), time.Unix(0, last).UTC()
}
