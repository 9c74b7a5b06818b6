package cli

import (
	"github.com/spf13/cobra"

	"github.com/signet-id/signet/internal/cli/daemon"
	"github.com/signet-id/signet/internal/cli/proxyrun"
)

func (a *app) proxyCommand() *cobra.Command {
	return a.noun("proxy", "The mutual TLS proxy", "", a.proxyRunCommand())
}

func (a *app) proxyRunCommand() *cobra.Command {
	var f daemon.Flags
	cmd := &cobra.Command{
		Use:   "run --config FILE",
		Short: "Run the mutual TLS proxy until stopped",
		Long: `Speak mutual TLS for programs that cannot: before a service, whose call policies decide what reaches it, and before a client, which talks
to expected servers alone. Identities, policies and revocations come from the agent. SIGHUP reads the configuration again, takes over
what can change while running without dropping a connection, and names in the log what needs a restart. SIGTERM lets connections end
for at most ten seconds. The program signet-proxy does the same and is smaller.`,
		Example: `  signet proxy run --config /etc/signet/proxy.yaml`,
	}
	daemonFlags(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.Check(); err != nil {
			return &usageError{err: err, hint: example(cmd)}
		}
		return proxyrun.Run(cmd.Context(), f, a.stderr)
	}
	return cmd
}
