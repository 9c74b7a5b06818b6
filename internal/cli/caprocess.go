package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// caInfo is what a CA says of itself.
type caInfo struct {
	Uptime   string   `json:"uptime"`
	Agents   int32    `json:"agents"`
	Entries  int32    `json:"entries"`
	Bundles  int32    `json:"federated_bundles"`
	SVIDEnds string   `json:"svid_expires_at"`
	Chain    []string `json:"svid_chain"`
}

func (a *app) caInfoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "info",
		Short:   "Show how long the CA runs, what it has, and its own SVID; on the admin socket only",
		Example: "  signet ca info",
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := debugv1.NewDebugClient(c).GetInfo(ctx, &debugv1.GetInfoRequest{})
			if err != nil {
				return caError("asking the CA about itself", c, err)
			}
			info := caInfo{Uptime: (time.Duration(answer.GetUptime()) * time.Second).String(), Agents: answer.GetAgentsCount(), Entries: answer.GetEntriesCount(), Bundles: answer.GetFederatedBundlesCount()}
			for i, cert := range answer.GetSvidChain() {
				name := cert.GetSubject()
				if cert.GetId() != nil {
					name = idString(cert.GetId())
				}
				if i == 0 {
					info.SVIDEnds = stamp(unixTime(cert.GetExpiresAt()))
				}
				info.Chain = append(info.Chain, name)
			}
			return a.show(*output, info, []field{
				{name: "Uptime", value: info.Uptime}, {name: "Agents", value: fmt.Sprint(info.Agents)}, {name: "Entries", value: fmt.Sprint(info.Entries)},
				{name: "Bundles of others", value: fmt.Sprint(info.Bundles)}, {name: "SVID chain", value: strings.Join(info.Chain, " < ")}, {name: "SVID valid until", value: info.SVIDEnds},
			})
		})
	}
	return a.reachesSocket(cmd)
}

func (a *app) caLogLevelCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "log-level [LEVEL|reset]",
		Short: "Show or change how much the CA logs, until it is restarted; on the admin socket only",
		Long: `Show how much the CA logs, or change it: trace, debug, info, warn, error, or reset for what its configuration says. The change lasts until
the CA is restarted, or reads a configuration with another level.`,
		Example: `  signet ca log-level debug
  signet ca log-level reset`,
		Args: atMostArgs(1),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		level := types.LogLevel_UNSPECIFIED
		if len(args) == 1 && args[0] != "reset" {
			level = types.LogLevel(types.LogLevel_value[strings.ToUpper(args[0])])
			if level == types.LogLevel_UNSPECIFIED {
				return usagef("%q is not one of trace, debug, info, warn, error, reset", args[0])
			}
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			client := loggerv1.NewLoggerClient(c)
			var now *types.Logger
			var err error
			switch {
			case len(args) == 0:
				now, err = client.GetLogger(ctx, &loggerv1.GetLoggerRequest{})
			case args[0] == "reset":
				now, err = client.ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{})
			default:
				now, err = client.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: level})
			}
			if err != nil {
				return caError("asking for the log level", c, err)
			}
			_, err = fmt.Fprintf(a.stdout, "%s (configured: %s)\n", strings.ToLower(now.GetCurrentLevel().String()), strings.ToLower(now.GetLaunchLevel().String()))
			return err
		})
	}
	return a.reachesSocket(cmd)
}
