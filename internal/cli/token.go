package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

func (a *app) tokenCommand() *cobra.Command {
	return a.noun("token", "Join tokens: how a new node proves itself", "", a.tokenCreateCommand())
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var groups []string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a join token for one node",
		Long: `Create a token with which one node can attest once. The token is the only output on stdout, and cannot be shown again: the
CA keeps a hash. It carries a pin of the CA's authority, so the agent needs nothing else to know that it talks to the right CA.`,
		Example: `  signet token create --node-group backend --ttl 10m
  signet token create > token && scp token node7:/etc/signet/token && rm token`,
	}
	output := outputFlag(cmd)
	cmd.Flags().StringArrayVar(&groups, "node-group", nil, "the node gets the selector node:group:NAME (repeatable)")
	cmd.Flags().DurationVar(&ttl, "ttl", 10*time.Minute, "how long the token can be used, at most 24h")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if ttl < time.Second || ttl > 24*time.Hour || ttl%time.Second != 0 {
			return usagef("--ttl %s is not a whole number of seconds from 1s to 24h", ttl)
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			t, err := adminv1.NewAdminClient(c).CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{Ttl: int64(ttl / time.Second), NodeGroups: groups})
			if err != nil {
				return caError("creating a join token", c, err)
			}
			if *output == formatJSON || *output == formatYAML {
				return a.show(*output, struct {
					Token     string `json:"token"`
					AgentID   string `json:"agent_id"`
					ExpiresAt string `json:"expires_at"`
				}{t.GetToken(), t.GetAgentId(), stamp(t.GetExpiresAt().AsTime())}, nil)
			}
			a.note("the agent will be %s; the token is good once, until %s", t.GetAgentId(), stamp(t.GetExpiresAt().AsTime()))
			_, err = fmt.Fprintln(a.stdout, escape(t.GetToken()))
			return err
		})
	}
	return a.reachesCA(cmd)
}
