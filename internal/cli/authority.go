package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

func (a *app) authorityCommand() *cobra.Command {
	return a.noun("authority", "Authorities: the keys that sign for the trust domain, and their rotation",
		`The keys that sign for the trust domain. Each is prepared (published, signs nothing yet), then active, then old; a tainted one has
all that it signed re-issued, a revoked one is out of the bundle. With authorities.rotate: auto all of it happens by schedule.`,
		a.authorityListCommand(), a.authorityPrepareCommand(), a.authorityActivateCommand(),
		a.authorityEndCommand("taint", "Have all that an old authority signed re-issued",
			`Have all that an old authority signed re-issued, in an orderly wave that the agents spread over some time. 'signet authority list'
shows how many agents still use it.`, func(ctx context.Context, c adminv1.AdminClient, req *adminv1.EndAuthorityRequest) (*adminv1.AuthorityChange, error) {
				return c.TaintAuthority(ctx, req)
			}),
		a.authorityEndCommand("revoke", "Take a tainted authority out of the bundle",
			`Take a tainted authority out of the bundle: nothing that it signed is good any more, and connections made with it are refused. With
--stolen an authority in any state is revoked at once, and if it is the active one, another takes over in the same act.`,
			func(ctx context.Context, c adminv1.AdminClient, req *adminv1.EndAuthorityRequest) (*adminv1.AuthorityChange, error) {
				return c.RevokeAuthority(ctx, req)
			}))
}

// typeFlag adds --type. Empty is allowed where all kinds can be meant.
func typeFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("type", "", "`TYPE` of authority: x509, jwt or wit")
}

func authorityType(text string, both bool) (adminv1.AuthorityType, error) {
	switch text {
	case "x509":
		return adminv1.AuthorityType_AUTHORITY_TYPE_X509, nil
	case "jwt":
		return adminv1.AuthorityType_AUTHORITY_TYPE_JWT, nil
	case "wit":
		return adminv1.AuthorityType_AUTHORITY_TYPE_WIT, nil
	case "":
		if both {
			return adminv1.AuthorityType_AUTHORITY_TYPE_UNSPECIFIED, nil
		}
		return 0, usagef("--type is missing: x509, jwt or wit")
	}
	return 0, usagef("--type %q is not x509, jwt or wit", text)
}

// An ownAuthority is an authority of this CA as the CA shows it.
type ownAuthority struct {
	Type          string     `json:"type"`
	ID            string     `json:"id"`
	State         string     `json:"state"`
	NotBefore     string     `json:"not_before"`
	NotAfter      string     `json:"not_after"`
	PreparedAt    string     `json:"prepared_at,omitempty"`
	ActivatedAt   string     `json:"activated_at,omitempty"`
	DeactivatedAt string     `json:"deactivated_at,omitempty"`
	TaintedAt     string     `json:"tainted_at,omitempty"`
	RevokedAt     string     `json:"revoked_at,omitempty"`
	SignedUntil   string     `json:"signed_until,omitempty"`
	AgentsUsing   *int64     `json:"agents_using,omitempty"`
	AgentsUnknown *int64     `json:"agents_unknown,omitempty"`
	Readiness     *readiness `json:"readiness,omitempty"`
	Above         []aboveOne `json:"above,omitempty"` // up to the root, which is the last

	end time.Time
}

// An aboveOne is a CA above an authority of this CA.
type aboveOne struct {
	ID        string `json:"id"`
	Subject   string `json:"subject"`
	NotBefore string `json:"not_before"`
	NotAfter  string `json:"not_after"`
}

type readiness struct {
	Ready        bool      `json:"ready"`
	LaggardCount int64     `json:"laggard_count"`
	LiveAgents   int64     `json:"live_agents"`
	HintsUntil   string    `json:"hints_until,omitempty"`
	Deadline     string    `json:"deadline,omitempty"`
	Laggards     []laggard `json:"laggards,omitempty"`
}

type laggard struct {
	Agent  string `json:"agent_id"`
	Reason string `json:"reason"`
	Since  string `json:"since"`
}

func stampOf(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return stamp(t.AsTime())
}

func readinessOf(m *adminv1.Readiness) *readiness {
	if m == nil {
		return nil
	}
	r := &readiness{Ready: m.GetReady(), LaggardCount: m.GetLaggardCount(), LiveAgents: m.GetLiveAgents(), HintsUntil: stampOf(m.GetHintsUntil()), Deadline: stampOf(m.GetDeadline())}
	for _, l := range m.GetLaggards() {
		r.Laggards = append(r.Laggards, laggard{l.GetAgentId(), l.GetReason(), stampOf(l.GetSince())})
	}
	return r
}

func authorityOf(m *adminv1.Authority) ownAuthority {
	x := ownAuthority{Type: "x509", ID: m.GetId(), State: m.GetState(), NotBefore: stampOf(m.GetNotBefore()), NotAfter: stampOf(m.GetNotAfter()),
		PreparedAt: stampOf(m.GetPreparedAt()), ActivatedAt: stampOf(m.GetActivatedAt()), DeactivatedAt: stampOf(m.GetDeactivatedAt()),
		TaintedAt: stampOf(m.GetTaintedAt()), RevokedAt: stampOf(m.GetRevokedAt()), SignedUntil: stampOf(m.GetSignedUntil()),
		Readiness: readinessOf(m.GetReadiness()), end: m.GetNotAfter().AsTime()}
	for _, c := range m.GetAbove() {
		x.Above = append(x.Above, aboveOne{c.GetId(), c.GetSubject(), stampOf(c.GetNotBefore()), stampOf(c.GetNotAfter())})
	}
	switch m.GetType() {
	case adminv1.AuthorityType_AUTHORITY_TYPE_JWT:
		x.Type = "jwt"
	case adminv1.AuthorityType_AUTHORITY_TYPE_WIT:
		x.Type = "wit"
	default:
		using, unknown := m.GetAgentsUsing(), m.GetAgentsUnknown()
		x.AgentsUsing, x.AgentsUnknown = &using, &unknown
	}
	return x
}

// waiting says in a few words what keeps a prepared authority, or who still needs one that is going.
func (x ownAuthority) waiting() string {
	switch r := x.Readiness; {
	case r != nil && r.Ready:
		return "ready"
	case r != nil && r.LaggardCount > 0:
		return fmt.Sprintf("waits for %d of %s", r.LaggardCount, count(int(r.LiveAgents), "agent"))
	case r != nil:
		return "waits until " + r.HintsUntil
	case x.AgentsUsing == nil || x.State != "old" && x.State != "tainted":
		return ""
	case *x.AgentsUnknown > 0:
		return fmt.Sprintf("used by %s, %d unknown", count(int(*x.AgentsUsing), "agent"), *x.AgentsUnknown)
	}
	return "used by " + count(int(*x.AgentsUsing), "agent")
}

// chain names the CAs above it, its issuer first, with their ids and ends.
func (x ownAuthority) chain() string {
	var names []string
	for _, c := range x.Above {
		names = append(names, fmt.Sprintf("%s (%s, until %s)", c.Subject, c.ID, c.NotAfter))
	}
	return strings.Join(names, " < ")
}

func authorityColor(state string) string {
	switch state {
	case "active":
		return green
	case "tainted", "prepared":
		return yellow
	case "revoked":
		return red
	}
	return ""
}

func (a *app) authorityListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the authorities, whom an activation waits for, and who still uses an old one",
		Long: `List the authorities, whom an activation waits for, and who still uses an old one. -o wide and json also show the chain of an X.509
authority below an upstream CA: each certificate up to the root with its id and validity.`,
		Example: `  signet authority list
  signet authority list --type x509 -o json`,
	}
	output := outputFlag(cmd)
	kind := typeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		t, err := authorityType(*kind, true)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := adminv1.NewAdminClient(c).ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{Type: t})
			if err != nil {
				return caError("listing authorities", c, err)
			}
			var items []ownAuthority
			for _, m := range answer.GetAuthorities() {
				items = append(items, authorityOf(m))
			}
			now := a.now()
			err = list(a, *output, "there are no authorities", []column[ownAuthority]{
				{name: "TYPE", value: func(x ownAuthority) string { return x.Type }},
				{name: "AUTHORITY", value: func(x ownAuthority) string { return x.ID }},
				{name: "STATE", value: func(x ownAuthority) string { return x.State }, color: func(x ownAuthority) string { return authorityColor(x.State) }},
				{name: "VALID", value: func(x ownAuthority) string { return left(x.end, now) }},
				{name: "NOTE", value: ownAuthority.waiting},
				{name: "PREPARED", wide: true, value: func(x ownAuthority) string { return x.PreparedAt }},
				{name: "ACTIVATED", wide: true, value: func(x ownAuthority) string { return x.ActivatedAt }},
				{name: "SIGNED UNTIL", wide: true, value: func(x ownAuthority) string { return x.SignedUntil }},
				{name: "NOT AFTER", wide: true, value: func(x ownAuthority) string { return x.NotAfter }},
				{name: "BELOW", wide: true, value: ownAuthority.chain},
			}, items)
			if err != nil {
				return err
			}
			for _, x := range items {
				a.noteLaggards(x.ID, x.Readiness)
			}
			for _, w := range answer.GetWarnings() {
				a.note("warning: %s", w)
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

// noteLaggards names those who lag.
func (a *app) noteLaggards(id string, r *readiness) {
	if r == nil || r.LaggardCount == 0 {
		return
	}
	const named = 20
	for _, l := range r.Laggards[:min(named, len(r.Laggards))] {
		a.note("%s waits for %s: %s (since %s)", id, l.Agent, l.Reason, l.Since)
	}
	if more := r.LaggardCount - int64(min(named, len(r.Laggards))); more > 0 {
		a.note("%s waits for %d more", id, more)
	}
	if r.Deadline != "" {
		a.note("it is activated at %s whoever lags", r.Deadline)
	}
}

func (a *app) showAuthority(output format, m *adminv1.AuthorityChange, done string) error {
	x := authorityOf(m.GetAuthority())
	x.AgentsUsing, x.AgentsUnknown = nil, nil // not asked for by a change
	if !m.GetChanged() {
		a.note("nothing to do: %s authority %s is %s already", x.Type, x.ID, x.State)
	} else {
		a.note("%s authority %s is %s", x.Type, x.ID, done)
	}
	if output == formatJSON || output == formatYAML {
		return a.show(output, x, nil)
	}
	_, err := fmt.Fprintln(a.stdout, escape(x.ID))
	return err
}

func (a *app) authorityPrepareCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "prepare",
		Short: "Make and publish an authority that signs nothing yet",
		Long: `Make a new authority and publish it in the bundle. It signs nothing until it is activated. If one is prepared already, that one is
named. Its id is the only output on stdout.`,
		Example: `  signet authority prepare --type x509`,
	}
	output := outputFlag(cmd)
	kind := typeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		t, err := authorityType(*kind, false)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := adminv1.NewAdminClient(c).PrepareAuthority(ctx, &adminv1.PrepareAuthorityRequest{Type: t})
			if err != nil {
				return caError("preparing an authority", c, err)
			}
			return a.showAuthority(*output, answer, "prepared; activate it with signet authority activate --wait --type "+*kind)
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) authorityActivateCommand() *cobra.Command {
	var wait, force bool
	cmd := &cobra.Command{
		Use:   "activate [AUTHORITY]",
		Short: "Make a prepared authority the one that signs",
		Long: `Make the prepared authority the one that signs; the one that did becomes old. Without --wait it is refused while a live agent has not
handed the new one on to all its workloads, or, if the bundle is federated, before others had the time to fetch it.`,
		Example: `  signet authority activate --type x509 --wait`,
		Args:    atMostArgs(1),
	}
	output := outputFlag(cmd)
	kind := typeFlag(cmd)
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until nobody lags, or for the deadline")
	cmd.Flags().BoolVar(&force, "force", false, "wait for nobody: workloads of agents that lag fail until these have caught up")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		t, err := authorityType(*kind, false)
		if err != nil {
			return err
		}
		if wait && force {
			return usagef("--wait and --force exclude each other")
		}
		req := &adminv1.ActivateAuthorityRequest{Type: t, Wait: wait, Force: force}
		if len(args) == 1 {
			req.Id = args[0]
		}
		return a.withCAUnbounded(cmd.Context(), func(ctx context.Context, c *caConn) error {
			stream, err := adminv1.NewAdminClient(c).ActivateAuthority(ctx, req)
			if err != nil {
				return caError("activating an authority", c, err)
			}
			for {
				m, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					return errors.New("the CA ended the call without an answer")
				}
				if err != nil {
					return activateHint(caError("activating an authority", c, err))
				}
				if w := m.GetWaiting(); w != nil {
					a.noteWait(readinessOf(w))
				}
				if change := m.GetChange(); change != nil {
					return a.showAuthority(*output, change, "active")
				}
			}
		})
	}
	return a.reachesCA(cmd)
}

// noteWait shows the progress of a wait.
func (a *app) noteWait(r *readiness) {
	if r.Ready {
		return // what follows is the outcome
	}
	var parts []string
	if r.LaggardCount > 0 {
		names := make([]string, 0, len(r.Laggards))
		const named = 3
		for _, l := range r.Laggards[:min(named, len(r.Laggards))] {
			names = append(names, fmt.Sprintf("%s (%s)", l.Agent, l.Reason))
		}
		if more := r.LaggardCount - int64(len(names)); more > 0 {
			names = append(names, fmt.Sprintf("and %d more", more))
		}
		parts = append(parts, fmt.Sprintf("for %d of %s: %s", r.LaggardCount, count(int(r.LiveAgents), "live agent"), strings.Join(names, ", ")))
	}
	if r.HintsUntil != "" {
		parts = append(parts, fmt.Sprintf("until %s for those who fetch the bundle", r.HintsUntil))
	}
	a.note("waiting %s; at %s it is activated in any case", strings.Join(parts, ", and "), r.Deadline)
}

func activateHint(err error) error {
	switch {
	case isCode(err, codes.FailedPrecondition) && strings.Contains(err.Error(), "no authority is prepared"):
		return withHint(err, "'signet authority list' shows whether the schedule has activated it already (authorities.rotate: auto)")
	case isCode(err, codes.FailedPrecondition):
		return withHint(err, "wait with --wait, see who lags with 'signet authority list', or go ahead with --force")
	}
	return err
}

func (a *app) authorityEndCommand(verb, short, long string, do func(context.Context, adminv1.AdminClient, *adminv1.EndAuthorityRequest) (*adminv1.AuthorityChange, error)) *cobra.Command {
	var stolen bool
	cmd := &cobra.Command{
		Use:     verb + " AUTHORITY",
		Short:   short,
		Long:    long,
		Example: "  signet authority " + verb + " --type x509 ad1f0c…",
		Args:    exactArgs("AUTHORITY"),
	}
	output := outputFlag(cmd)
	kind := typeFlag(cmd)
	cmd.Flags().BoolVar(&stolen, "stolen", false, "its key may be in wrong hands: any state will do, and nobody is waited for")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		t, err := authorityType(*kind, false)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := do(ctx, adminv1.NewAdminClient(c), &adminv1.EndAuthorityRequest{Type: t, Id: args[0], Stolen: stolen})
			if err != nil {
				return caError(fmt.Sprintf("to %s authority %s", verb, args[0]), c, err)
			}
			return a.showAuthority(*output, answer, answer.GetAuthority().GetState())
		})
	}
	return a.reachesCA(cmd)
}
