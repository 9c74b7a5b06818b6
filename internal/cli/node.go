package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

const agentPage = 500

// nodeCommand is "signet agent": the agents that the CA knows, and "agent run".
func (a *app) nodeCommand() *cobra.Command {
	return a.noun("agent", "Agents: run one, or look after those that the CA knows", "",
		a.agentRunCommand(), a.agentExamineCommand(), a.agentListCommand(), a.agentShowCommand(), a.agentStatusCommand(), a.agentCountCommand(),
		a.agentActCommand("evict", "Forget agents: their SVIDs stop working, and they may attest again",
			"evicted", func(ctx context.Context, c *caConn, id *types.SPIFFEID) error {
				_, err := agentv1.NewAgentClient(c).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id})
				return err
			}),
		a.agentActCommand("ban", "Ban agents: their SVIDs stop working, and they may not attest again until unbanned",
			"banned", func(ctx context.Context, c *caConn, id *types.SPIFFEID) error {
				_, err := agentv1.NewAgentClient(c).BanAgent(ctx, &agentv1.BanAgentRequest{Id: id})
				return err
			}),
		a.agentActCommand("unban", "Lift the ban of agents: they come back by themselves, with their evidence or their last key",
			"unbanned", func(ctx context.Context, c *caConn, id *types.SPIFFEID) error {
				_, err := adminv1.NewAdminClient(c).UnbanAgent(ctx, &adminv1.UnbanAgentRequest{AgentId: idString(id)})
				return err
			}))
}

// A node is an agent as the CA knows it.
type node struct {
	ID          string   `json:"id"`
	Attestation string   `json:"attestation_type"`
	Selectors   []string `json:"selectors,omitempty"`
	Serial      string   `json:"serial_number,omitempty"`
	ExpiresAt   string   `json:"expires_at,omitempty"`
	Banned      bool     `json:"banned"`
	CanReattest bool     `json:"can_reattest"`
	Version     string   `json:"agent_version,omitempty"`

	expires time.Time
}

func nodeOf(n *types.Agent) node {
	expires := unixTime(n.GetX509SvidExpiresAt())
	return node{ID: idString(n.GetId()), Attestation: n.GetAttestationType(), Selectors: selectorStrings(n.GetSelectors()), Serial: n.GetX509SvidSerialNumber(),
		ExpiresAt: stamp(expires), Banned: n.GetBanned(), CanReattest: n.GetCanReattest(), Version: n.GetAgentVersion(), expires: expires}
}

func (n node) state(now time.Time) string {
	switch {
	case n.Banned:
		return "banned"
	case n.expires.IsZero() || now.After(n.expires):
		return "expired"
	}
	return "attested"
}

func stateColor(state string) string {
	switch state {
	case "banned":
		return red
	case "expired", "away":
		return yellow
	}
	return green
}

// agentFilter are the flags of list and count.
type agentFilter struct {
	attestation string
	selectors   []string
	banned      bool
	reattest    bool
	before      string
}

func (f *agentFilter) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.attestation, "attestation-type", "", "only agents that attested this way, such as join_token")
	cmd.Flags().StringArrayVar(&f.selectors, "selector", nil, "only agents that have this selector, TYPE:VALUE (repeatable; all must hold)")
	cmd.Flags().BoolVar(&f.banned, "banned", false, "only agents that are (=false: are not) banned")
	cmd.Flags().BoolVar(&f.reattest, "can-reattest", false, "only agents that can (=false: cannot) attest again with their evidence")
	cmd.Flags().StringVar(&f.before, "expires-before", "", "only agents whose SVID ends before this `TIME`, such as 2027-01-31T00:00:00Z")
}

func (f *agentFilter) request(cmd *cobra.Command) (*agentv1.ListAgentsRequest_Filter, error) {
	out := &agentv1.ListAgentsRequest_Filter{ByAttestationType: f.attestation}
	if len(f.selectors) > 0 {
		selectors, err := wireSelectors(f.selectors)
		if err != nil {
			return nil, err
		}
		out.BySelectorMatch = &types.SelectorMatch{Selectors: selectors, Match: types.SelectorMatch_MATCH_SUPERSET}
	}
	if cmd.Flags().Changed("banned") {
		out.ByBanned = wrapperspb.Bool(f.banned)
	}
	if cmd.Flags().Changed("can-reattest") {
		out.ByCanReattest = wrapperspb.Bool(f.reattest)
	}
	if f.before != "" {
		if _, err := time.Parse(time.RFC3339, f.before); err != nil {
			return nil, usagef("--expires-before %q is not a time such as 2027-01-31T00:00:00Z", f.before)
		}
		out.ByExpiresBefore = f.before
	}
	return out, nil
}

func (a *app) agentListCommand() *cobra.Command {
	var filter agentFilter
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the agents that have attested",
		Example: `  signet agent list
  signet agent list --selector node:group:backend -o wide`,
	}
	output := outputFlag(cmd)
	filter.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		by, err := filter.request(cmd)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			now := a.now()
			l := &lister[node]{app: a, format: *output, none: "no agent matches", columns: []column[node]{
				{name: "AGENT", value: func(n node) string { return n.ID }},
				{name: "STATE", value: func(n node) string { return n.state(now) }, color: func(n node) string { return stateColor(n.state(now)) }},
				{name: "ATTESTED BY", value: func(n node) string { return n.Attestation }},
				{name: "SVID", value: func(n node) string { return left(n.expires, now) }},
				{name: "VERSION", value: func(n node) string { return n.Version }},
				{name: "SERIAL", wide: true, value: func(n node) string { return n.Serial }},
				{name: "SELECTORS", wide: true, value: func(n node) string { return strings.Join(n.Selectors, " ") }},
			}}
			client := agentv1.NewAgentClient(c)
			for token := ""; ; {
				page, err := client.ListAgents(ctx, &agentv1.ListAgentsRequest{Filter: by, PageSize: agentPage, PageToken: token})
				if err != nil {
					return caError("listing agents", c, err)
				}
				items := make([]node, len(page.GetAgents()))
				for i, n := range page.GetAgents() {
					items[i] = nodeOf(n)
				}
				if err := l.add(items); err != nil {
					return err
				}
				if token = page.GetNextPageToken(); token == "" {
					return l.close()
				}
			}
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) agentCountCommand() *cobra.Command {
	var filter agentFilter
	cmd := &cobra.Command{Use: "count", Short: "Count the agents that have attested", Example: "  signet agent count --banned"}
	filter.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		by, err := filter.request(cmd)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := agentv1.NewAgentClient(c).CountAgents(ctx, &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{
				ByAttestationType: by.ByAttestationType, BySelectorMatch: by.BySelectorMatch, ByBanned: by.ByBanned, ByCanReattest: by.ByCanReattest, ByExpiresBefore: by.ByExpiresBefore}})
			if err != nil {
				return caError("counting agents", c, err)
			}
			_, err = fmt.Fprintln(a.stdout, answer.GetCount())
			return err
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) agentShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show AGENT-ID",
		Short:   "Show one agent",
		Example: "  signet agent show /spire/agent/join_token/0c5e",
		Args:    exactArgs("AGENT-ID"),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			id, err := c.wireID(ctx, "AGENT-ID", args[0])
			if err != nil {
				return err
			}
			answer, err := agentv1.NewAgentClient(c).GetAgent(ctx, &agentv1.GetAgentRequest{Id: id})
			if err != nil {
				return agentHint(caError(fmt.Sprintf("showing agent %s", idString(id)), c, err))
			}
			n, now := nodeOf(answer), a.now()
			fields := []field{
				{name: "Agent", value: n.ID},
				{name: "State", value: n.state(now), color: stateColor(n.state(now))},
				{name: "Attested by", value: n.Attestation},
				{name: "SVID serial", value: n.Serial},
			}
			if !n.expires.IsZero() {
				fields = append(fields, field{name: "SVID expires", value: fmt.Sprintf("%s (%s)", n.ExpiresAt, left(n.expires, now))})
			}
			fields = append(fields, field{name: "Can re-attest", value: yesNo(n.CanReattest)}, field{name: "Version", value: n.Version})
			return a.show(*output, n, append(fields, manyFields("Selector", n.Selectors)...))
		})
	}
	return a.reachesCA(cmd)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// A nodeStatus is what a replica of the CA sees of an agent now.
type nodeStatus struct {
	AgentID      string   `json:"agent_id"`
	Connected    bool     `json:"connected"`
	Acknowledged int64    `json:"acknowledged_revision"`
	Banned       bool     `json:"banned"`
	ExpiresAt    string   `json:"expires_at,omitempty"`
	Entries      int64    `json:"entries"`
	Version      string   `json:"agent_version,omitempty"`
	Remote       string   `json:"remote_address,omitempty"`
	Attestation  string   `json:"attestation_type,omitempty"`
	Serial       string   `json:"serial_number,omitempty"`
	Selectors    []string `json:"selectors,omitempty"`

	expires time.Time
}

func (s nodeStatus) state(now time.Time) string {
	switch {
	case s.Banned:
		return "banned"
	case s.Connected:
		return "connected"
	case s.expires.IsZero() || now.After(s.expires):
		return "expired"
	}
	return "away"
}

func (a *app) agentStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [AGENT-ID]",
		Short: "Say how the agent of this node is, or which agents follow the CA",
		Long: `On a node: say how its agent is, from the agent's admin socket (--socket, else $` + envAgentSocket + `, else
` + defaultAgentSocket + `).

Where there is only a CA, or with --server, an AGENT-ID or the CA's socket as --socket: say which agents are connected to this
replica of the CA, which revision each has acknowledged, and how many entries it serves. An agent that is "away" has a valid
SVID and no connection to this replica; agents of SPIRE always are.`,
		Example: `  signet agent status
  signet agent status --socket /run/signet/ca/admin.sock -o wide`,
		Args: atMostArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.agentOrCA(cmd, args, *output, func() error { return a.fleetStatus(cmd.Context(), *output, args) })
	}
	a.reachesCA(cmd)
	cmd.Flags().Lookup("socket").Usage = "admin socket of the agent of this node, or of the CA"
	return cmd
}

// fleetStatus asks the CA how its agents are, or the one that is named.
func (a *app) fleetStatus(ctx context.Context, f format, args []string) error {
	return a.withCA(ctx, func(ctx context.Context, c *caConn) error {
		req := &adminv1.ListAgentStatusRequest{PageSize: agentPage}
		if len(args) == 1 {
			id, err := c.id(ctx, "AGENT-ID", args[0])
			if err != nil {
				return err
			}
			req.AgentId = id.String()
		}
		now := a.now()
		l := &lister[nodeStatus]{app: a, format: f, none: "no agent has attested", columns: []column[nodeStatus]{
			{name: "AGENT", value: func(s nodeStatus) string { return s.AgentID }},
			{name: "STATE", value: func(s nodeStatus) string { return s.state(now) }, color: func(s nodeStatus) string { return stateColor(s.state(now)) }},
			{name: "REVISION", value: func(s nodeStatus) string { return fmt.Sprint(s.Acknowledged) }},
			{name: "ENTRIES", value: func(s nodeStatus) string { return fmt.Sprint(s.Entries) }},
			{name: "SVID", value: func(s nodeStatus) string { return left(s.expires, now) }},
			{name: "VERSION", value: func(s nodeStatus) string { return s.Version }},
			{name: "FROM", wide: true, value: func(s nodeStatus) string { return s.Remote }},
			{name: "ATTESTED BY", wide: true, value: func(s nodeStatus) string { return s.Attestation }},
			{name: "SELECTORS", wide: true, value: func(s nodeStatus) string { return strings.Join(s.Selectors, " ") }},
		}}
		client := adminv1.NewAdminClient(c)
		for {
			page, err := client.ListAgentStatus(ctx, req)
			if err != nil {
				return agentHint(caError("asking for the status of agents", c, err))
			}
			items := make([]nodeStatus, len(page.GetAgents()))
			for i, s := range page.GetAgents() {
				items[i] = nodeStatus{AgentID: s.GetAgentId(), Connected: s.GetConnected(), Acknowledged: s.GetAcknowledgedRevision(),
					Banned: s.GetBanned(), Entries: s.GetEntries(), Version: s.GetAgentVersion(),
					Remote: s.GetRemoteAddress(), Attestation: s.GetAttestationType(), Serial: s.GetSerialNumber(), Selectors: s.GetSelectors()}
				if s.GetExpiresAt() != nil {
					items[i].expires = s.GetExpiresAt().AsTime()
					items[i].ExpiresAt = stamp(items[i].expires)
				}
			}
			if err := l.add(items); err != nil {
				return err
			}
			if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
				return l.close()
			}
		}
	})
}

// agentActCommand makes a command that does one thing to each agent that is named.
func (a *app) agentActCommand(verb, short, done string, act func(context.Context, *caConn, *types.SPIFFEID) error) *cobra.Command {
	cmd := &cobra.Command{
		Use:     verb + " AGENT-ID...",
		Short:   short,
		Example: "  signet agent " + verb + " /spire/agent/join_token/0c5e",
		Args:    someArgs("AGENT-ID"),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			for _, arg := range args {
				id, err := c.wireID(ctx, "AGENT-ID", arg)
				if err != nil {
					return err
				}
				if err := act(ctx, c, id); err != nil {
					return agentHint(caError(fmt.Sprintf("%s of agent %s", verb, idString(id)), c, err))
				}
				fmt.Fprintf(a.stdout, "%s %s\n", done, escape(idString(id)))
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

func agentHint(err error) error {
	if isCode(err, codes.NotFound) {
		return withHint(err, "'signet agent list' shows the agents there are")
	}
	return err
}
