package cli

import (
	"github.com/spf13/cobra"

	"github.com/signet-id/signet/internal/cli/agentrun"
	"github.com/signet-id/signet/internal/cli/daemon"
)

// examineName is the hidden command of the agent's second process.
const examineName = "examiner"

func (a *app) agentExamineCommand() *cobra.Command {
	cmd := &cobra.Command{Use: examineName + " MODE", Short: "The part of the agent that looks at executables", Hidden: true, Args: exactArgs("MODE")}
	cmd.RunE = func(_ *cobra.Command, args []string) error { return agentrun.Examine(args) }
	return cmd
}

func (a *app) agentRunCommand() *cobra.Command {
	var f daemon.Flags
	cmd := &cobra.Command{
		Use:   "run --config FILE",
		Short: "Run the agent of this node until stopped",
		Long: `Run the agent of this node until SIGTERM or SIGINT. SIGHUP reads the configuration again, takes over what can change while
running, and names in the log what needs a restart. The program signet-agent does the same and is smaller.`,
		Example: `  signet agent run --config /etc/signet/agent.yaml`,
	}
	daemonFlags(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.Check(); err != nil {
			return &usageError{err: err, hint: example(cmd)}
		}
		return agentrun.Run(cmd.Context(), f, []string{"agent", examineName}, a.stderr)
	}
	return cmd
}
