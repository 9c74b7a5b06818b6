package cli

import (
	"context"
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

func (a *app) rolloutCommand() *cobra.Command {
	return a.noun("rollout", "Roll-outs: new call policies for a share of the agents first",
		`'signet apply --rollout' brings new versions of call policies to a share of the agents first, then step by step to all. Calls that
the new versions deny and the former ones allowed are counted; when there are too many, every agent gets the former versions
back. If one agent alone reports too many, it alone does, and the roll-out is held until you promote or abort it. These commands look at roll-outs and end them.`,
		a.rolloutStatusCommand(), a.rolloutPromoteCommand(), a.rolloutAbortCommand())
}

// rolloutFlags are those of apply that make it a roll-out.
type rolloutFlags struct {
	shares     string
	name       string
	bake       time.Duration
	maxDenials int64
}

func (r *rolloutFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&r.shares, "rollout", "", "roll CallPolicies out: rising shares of the agents, such as 10% or 10%,50%,100%")
	cmd.Flags().StringVar(&r.name, "rollout-name", "", "name of the roll-out; it also chooses which agents are first (default: one at random)")
	cmd.Flags().DurationVar(&r.bake, "bake", 10*time.Minute, "with --rollout: how long each step lasts")
	cmd.Flags().Int64Var(&r.maxDenials, "max-denials", 0, "with --rollout: how many denials of formerly allowed calls there may be; one more rolls back; -1: any number")
}

// check refuses flags that mean nothing without --rollout.
func (r *rolloutFlags) check(cmd *cobra.Command, prune bool) error {
	if r.shares == "" {
		for _, name := range []string{"rollout-name", "bake", "max-denials"} {
			if cmd.Flags().Changed(name) {
				return &usageError{err: fmt.Errorf("--%s goes with --rollout only", name), hint: "add --rollout 10%,100%"}
			}
		}
		return nil
	}
	if prune {
		return &usageError{err: fmt.Errorf("--rollout and --prune exclude each other: a roll-out deletes nothing"), hint: "delete after the roll-out: 'signet delete policy NAME'"}
	}
	if _, err := r.steps(); err != nil {
		return err
	}
	if r.bake < time.Second || r.bake%time.Second != 0 {
		return &usageError{err: fmt.Errorf("--bake is %v; it must be whole seconds, at least 1", r.bake)}
	}
	return nil
}

func (r *rolloutFlags) steps() ([]int32, error) {
	var out []int32
	for _, s := range strings.Split(r.shares, ",") {
		n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(s), "%"))
		if err != nil || n < 1 || n > 100 || len(out) > 0 && int32(n) <= out[len(out)-1] {
			return nil, &usageError{err: fmt.Errorf("--rollout is %q; it must be rising shares from 1%% to 100%%", r.shares), hint: "for example: --rollout 10%,50%,100%"}
		}
		out = append(out, int32(n))
	}
	return out, nil
}

// startRollout begins to roll out what was planned as one batch.
func (a *app) startRollout(ctx context.Context, c *caConn, r *rolloutFlags, docs []strictyaml.Document, p plan, yes bool) (rollout, error) {
	steps, err := r.steps()
	if err != nil {
		return rollout{}, err
	}
	name := r.name
	if name == "" {
		name = strings.ToLower(rand.Text()[:10])
	}
	answer, err := adminv1.NewRolloutsClient(c).StartRollout(ctx, &adminv1.StartRolloutRequest{Name: name, Documents: wireDocuments(docs), Steps: steps,
		Bake: int64(r.bake / time.Second), MaxDenials: r.maxDenials, Yes: yes, PlannedAt: p.Revision})
	if err != nil {
		return rollout{}, applyError("starting the roll-out", c, err)
	}
	return rolloutOf(answer), nil
}

// A rollout as it is printed.
type rollout struct {
	Name        string   `json:"name"`
	State       string   `json:"state"`
	Percent     int32    `json:"percent"`
	Steps       []int32  `json:"steps"`
	Bake        string   `json:"bake"`
	Agents      int64    `json:"agents"`
	FirstAgents int64    `json:"first_agents"`
	First       []string `json:"first_agent_ids,omitempty"`
	Denials     int64    `json:"denials"`
	MaxDenials  int64    `json:"max_denials"`
	Policies    []string `json:"policies"`
	Reason      string   `json:"reason,omitempty"`
	StartedBy   string   `json:"started_by"`
	StartedAt   string   `json:"started_at"`
	StepAt      string   `json:"step_at"`
	NextAt      string   `json:"next_at,omitempty"`
	EndedAt     string   `json:"ended_at,omitempty"`
	Revision    int64    `json:"revision"`
}

func rolloutOf(r *adminv1.Rollout) rollout {
	return rollout{Name: r.GetName(), State: r.GetState(), Percent: r.GetPercent(), Steps: r.GetSteps(), Bake: (time.Duration(r.GetBake()) * time.Second).String(),
		Agents: r.GetAgents(), FirstAgents: r.GetFirstAgents(), First: r.GetFirstAgentIds(), Denials: r.GetDenials(), MaxDenials: r.GetMaxDenials(), Policies: r.GetPolicies(),
		Reason: r.GetReason(), StartedBy: r.GetStartedBy(), StartedAt: stampOf(r.GetStartedAt()), StepAt: stampOf(r.GetStepAt()), NextAt: stampOf(r.GetNextAt()), EndedAt: stampOf(r.GetEndedAt()),
		Revision: r.GetRevision()}
}

func (r rollout) share() string {
	steps := make([]string, len(r.Steps))
	for i, s := range r.Steps {
		steps[i] = fmt.Sprintf("%d%%", s)
	}
	return fmt.Sprintf("%d%% of %s", r.Percent, strings.Join(steps, ", "))
}

func (r rollout) agents() string {
	if r.State != "running" {
		return ""
	}
	return fmt.Sprintf("%d of %d", r.FirstAgents, r.Agents)
}

func (r rollout) denials() string {
	if r.MaxDenials < 0 {
		return fmt.Sprint(r.Denials)
	}
	return fmt.Sprintf("%d of %d", r.Denials, r.MaxDenials)
}

// next is when it goes on by itself.
func (r rollout) next() string {
	if r.State == "running" && r.NextAt == "" {
		return "held"
	}
	return r.NextAt
}

func (r rollout) color() string {
	switch r.State {
	case "done":
		return green
	case "running":
		return yellow
	}
	return red
}

func (a *app) rolloutStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [NAME]",
		Short: "List roll-outs, or show one: share, agents, denials",
		Long: `List roll-outs, those under way first, or show one. AGENTS counts the agents that follow the CA that answers and receive one of the
policies: how many of them have the new versions.`,
		Example: "  signet rollout status\n  signet rollout status documents-v2 -o json",
		Args:    atMostArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			req := &adminv1.ListRolloutsRequest{}
			if len(args) > 0 {
				req.Name = args[0]
			}
			answer, err := adminv1.NewRolloutsClient(c).ListRollouts(ctx, req)
			if err != nil {
				return rolloutError("asking for roll-outs", c, err)
			}
			var all []rollout
			for _, r := range answer.GetRollouts() {
				all = append(all, rolloutOf(r))
			}
			if len(args) > 0 && len(all) == 1 {
				return a.showRollout(*output, all[0])
			}
			return list(a, *output, "nothing is or was rolled out", []column[rollout]{
				{name: "NAME", value: func(r rollout) string { return r.Name }},
				{name: "STATE", value: func(r rollout) string { return r.State }, color: rollout.color},
				{name: "SHARE", value: rollout.share},
				{name: "AGENTS", value: rollout.agents},
				{name: "DENIALS", value: rollout.denials},
				{name: "NEXT", value: rollout.next},
				{name: "POLICIES", value: func(r rollout) string { return strings.Join(r.Policies, ",") }},
				{name: "STARTED BY", wide: true, value: func(r rollout) string { return r.StartedBy }},
				{name: "STARTED", wide: true, value: func(r rollout) string { return r.StartedAt }},
				{name: "ENDED", wide: true, value: func(r rollout) string { return r.EndedAt }},
				{name: "REASON", wide: true, value: func(r rollout) string { return r.Reason }},
			}, all)
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) showRollout(f format, r rollout) error {
	fields := []field{
		{name: "roll-out", value: r.Name}, {name: "state", value: r.State, color: r.color()}, {name: "reason", value: r.Reason}, {name: "share", value: r.share()},
		{name: "agents", value: r.agents()}, {name: "denials of what was allowed", value: r.denials()}, {name: "each step lasts", value: r.Bake},
		{name: "started by", value: r.StartedBy}, {name: "started", value: r.StartedAt}, {name: "this step since", value: r.StepAt}, {name: "next step", value: r.next()}, {name: "ended", value: r.EndedAt},
	}
	fields = append(fields, manyFields("policy", r.Policies)...)
	if f == formatWide {
		fields = append(fields, manyFields("agent", r.First)...)
	}
	return a.show(f, r, fields)
}

func (a *app) rolloutPromoteCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "promote NAME",
		Short:   "Go on to the next step of a roll-out, or with --all to its end",
		Long:    `Go on to the next step before the time; after the last one the new versions are what is applied. With --all, go there at once.`,
		Example: "  signet rollout promote documents-v2 --all",
		Args:    exactArgs("NAME"),
	}
	output := outputFlag(cmd)
	cmd.Flags().BoolVar(&all, "all", false, "to the end: all agents, without further waiting")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			r, err := adminv1.NewRolloutsClient(c).PromoteRollout(ctx, &adminv1.PromoteRolloutRequest{Name: args[0], All: all})
			if err != nil {
				return rolloutError("promoting the roll-out", c, err)
			}
			return a.showRollout(*output, rolloutOf(r))
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) rolloutAbortCommand() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:     "abort NAME",
		Short:   "End a roll-out: every agent gets the former versions back",
		Example: "  signet rollout abort documents-v2 --reason 'reports cannot read'",
		Args:    exactArgs("NAME"),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit log and the status")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			r, err := adminv1.NewRolloutsClient(c).AbortRollout(ctx, &adminv1.AbortRolloutRequest{Name: args[0], Reason: reason})
			if err != nil {
				return rolloutError("aborting the roll-out", c, err)
			}
			return a.showRollout(*output, rolloutOf(r))
		})
	}
	return a.reachesCA(cmd)
}

func rolloutError(doing string, c *caConn, err error) error {
	err = caError(doing, c, err)
	if isCode(err, codes.NotFound) || isCode(err, codes.FailedPrecondition) {
		return withHint(err, "'signet rollout status' shows those there are")
	}
	return err
}
