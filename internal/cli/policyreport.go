package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

func (a *app) policyReportCommand() *cobra.Command {
	var service, peer, since, until string
	var shadow, calls bool
	cmd := &cobra.Command{
		Use:   "report [--service ID] [--since WHEN]",
		Short: "Count and list what was denied, and what would be denied if shadow policies were enforced",
		Long: `Count the denials of the fleet, and the calls whose answer would change if all that only reports were enforced (shadow policies, shadow
rules, PolicyDefaults in shadow mode), by service, policy and rule, with the first, the last and a decision id for each. With --calls
each caller and request is a line of its own.

The CA is asked, which knows what enforcement points have reported to their agents and keeps it for a week unless its configuration says
otherwise. 'signet why-denied DECISION-ID' tells more about one.`,
		Example: `  signet policy report --since 24h
  signet policy report --service /documents --shadow --calls -o json`,
	}
	output := outputFlag(cmd)
	fs := cmd.Flags()
	fs.StringVar(&service, "service", "", "calls to this service only")
	fs.StringVar(&peer, "peer", "", "calls by this caller only")
	fs.StringVar(&since, "since", "", "from this moment on: RFC 3339, or how long ago, such as 24h")
	fs.StringVar(&until, "until", "", "up to this moment: RFC 3339, or how long ago")
	fs.BoolVar(&shadow, "shadow", false, "leave out the denials, and list what enforcing would change")
	fs.BoolVar(&calls, "calls", false, "a line for each caller and request")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		req := &adminv1.ListObservationsRequest{}
		var err error
		if req.Since, err = a.moment("--since", since); err != nil {
			return err
		}
		if req.Until, err = a.moment("--until", until); err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			q := whyDenied{}
			if req.Service, err = q.full(ctx, c, "--service", service); err != nil {
				return err
			}
			if req.Peer, err = q.full(ctx, c, "--peer", peer); err != nil {
				return err
			}
			r := newReport(calls)
			verdicts := []adminv1.Verdict{adminv1.Verdict_VERDICT_DENIED, adminv1.Verdict_VERDICT_SHADOW}
			if shadow {
				verdicts = verdicts[1:]
			}
			for _, v := range verdicts {
				req.Verdict = v
				if err := eachObservation(ctx, c, req, func(o *policyv1.Observation) { r.add(o, v == adminv1.Verdict_VERDICT_SHADOW) }); err != nil {
					return err
				}
			}
			return a.showReport(*output, r, calls)
		})
	}
	return a.reachesCA(cmd)
}

// eachObservation asks the CA for a list.
func eachObservation(ctx context.Context, c *caConn, req *adminv1.ListObservationsRequest, f func(*policyv1.Observation)) error {
	const doing = "asking the CA what was decided"
	stream, err := adminv1.NewObservationsClient(c).ListObservations(ctx, req)
	if err != nil {
		return caError(doing, c, err)
	}
	for {
		o, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return caError(doing, c, err)
		}
		f(o)
	}
}

// A reportLine is what is alike.
type reportLine struct {
	// Kind is denied, or "would be denied" or "would be allowed" for what enforcing would change.
	Kind    string       `json:"kind"`
	Service string       `json:"service"`
	Peer    string       `json:"peer,omitempty"`
	Call    string       `json:"call,omitempty"`
	Reason  string       `json:"reason"`
	Rule    *policy.Rule `json:"rule,omitempty"`
	Count   uint64       `json:"count"`
	// Peers is how many callers there were.
	Peers       int    `json:"peers"`
	First       string `json:"first"`
	Last        string `json:"last"`
	DecisionID  string `json:"decision_id,omitempty"`
	first, last int64
	peers       map[string]bool
}

// A report adds up observations.
type report struct {
	calls bool
	lines map[reportKey]*reportLine
}

type reportKey struct {
	kind, service, peer, call, reason string
	rule                              policy.Rule
}

func newReport(calls bool) *report { return &report{calls: calls, lines: map[reportKey]*reportLine{}} }

func (r *report) add(o *policyv1.Observation, shadow bool) {
	line := &reportLine{Kind: verdictWord(o.GetAllowed()), Service: o.GetService(), Reason: o.GetReason(), Rule: ruleOfRef(o.GetRule())}
	if shadow {
		line.Kind, line.Reason, line.Rule = "would be "+verdictWord(o.GetShadowAllowed()), o.GetShadowReason(), ruleOfRef(o.GetShadowRule())
	}
	if r.calls {
		line.Peer, line.Call = o.GetPeer(), callWords(o)
	}
	k := reportKey{kind: line.Kind, service: line.Service, peer: line.Peer, call: line.Call, reason: line.Reason}
	if line.Rule != nil {
		k.rule = *line.Rule
	}
	if have := r.lines[k]; have != nil {
		line = have
	} else {
		line.first, line.peers = o.GetFirst(), map[string]bool{}
		r.lines[k] = line
	}
	line.Count += o.GetCount()
	line.peers[o.GetPeer()] = true
	line.first, line.last = min(line.first, o.GetFirst()), max(line.last, o.GetLast())
	line.DecisionID = cmp.Or(o.GetDecisionId(), line.DecisionID) // the latest, as they come
}

func (a *app) showReport(f format, r *report, calls bool) error {
	items := make([]*reportLine, 0, len(r.lines))
	for _, line := range r.lines {
		first, last := moments(line.first, line.last)
		line.First, line.Last, line.Peers = first.Format(time.RFC3339), last.Format(time.RFC3339), len(line.peers)
		items = append(items, line)
	}
	slices.SortFunc(items, func(a, b *reportLine) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Kind, b.Kind), -cmp.Compare(a.Count, b.Count), cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Call, b.Call), cmp.Compare(a.DecisionID, b.DecisionID))
	})
	columns := []column[*reportLine]{
		{name: "SERVICE", value: func(l *reportLine) string { return l.Service }},
		{name: "WHAT", value: func(l *reportLine) string { return l.Kind }, color: func(l *reportLine) string {
			if l.Kind == verdictWord(false) {
				return red
			}
			return yellow
		}},
		{name: "COUNT", value: func(l *reportLine) string { return fmt.Sprint(l.Count) }},
		{name: "REASON", value: func(l *reportLine) string { return l.Reason }},
		{name: "RULE", value: func(l *reportLine) string { return rulePlace(l.Rule) }},
	}
	if calls {
		columns = append(columns, column[*reportLine]{name: "PEER", value: func(l *reportLine) string { return l.Peer }},
			column[*reportLine]{name: "CALL", value: func(l *reportLine) string { return l.Call }})
	} else {
		columns = append(columns, column[*reportLine]{name: "PEERS", value: func(l *reportLine) string { return fmt.Sprint(l.Peers) }})
	}
	columns = append(columns,
		column[*reportLine]{name: "FIRST", wide: true, value: func(l *reportLine) string { return l.First }},
		column[*reportLine]{name: "LAST", value: func(l *reportLine) string { return l.Last }},
		column[*reportLine]{name: "EXAMPLE", value: func(l *reportLine) string { return l.DecisionID }})
	return list(a, f, "nothing was denied, and enforcing what only reports would change nothing, as far as the CA was told", columns, items)
}
