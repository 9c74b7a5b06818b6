package cli

import (
	"github.com/spf13/cobra"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/cli/daemon"
	manager "github.com/signet-id/signet/internal/daemon"
)

func (a *app) caCommand() *cobra.Command {
	return a.noun("ca", "The CA: run it, ask it about itself", "", a.caRunCommand(), a.caInfoCommand(), a.caLogLevelCommand())
}

func (a *app) caRunCommand() *cobra.Command {
	var f daemon.Flags
	cmd := &cobra.Command{
		Use:   "run --config FILE",
		Short: "Run the CA until stopped",
		Long: `Run the CA until SIGTERM or SIGINT. SIGHUP reads the configuration again, takes over what can change while running, and names in
the log what needs a restart.`,
		Example: `  signet ca run --config /etc/signet/ca.yaml`,
	}
	daemonFlags(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.Check(); err != nil {
			return &usageError{err: err, hint: example(cmd)}
		}
		read := func() (ca.Config, error) {
			c, err := daemon.ReadConfig(f.Config, ca.ReadConfig)
			f.Override(&c.Logging.Level, &c.Logging.Format)
			return c, err
		}
		c, err := read()
		if err != nil {
			return err
		}
		notifier, err := manager.NewNotifier()
		if err != nil {
			return err
		}
		defer notifier.Close()
		d, err := ca.New(cmd.Context(), c)
		if err != nil {
			return err
		}
		return daemon.Serve(cmd.Context(), d, notifier, a.stderr, c.Logging.Format, func() ([]string, error) {
			c, err := read()
			if err != nil {
				return nil, err
			}
			return d.Reload(c)
		})
	}
	return cmd
}

// daemonFlags gives cmd the flags of every daemon.
func daemonFlags(cmd *cobra.Command, f *daemon.Flags) {
	cmd.Flags().StringVar(&f.Config, "config", "", "configuration file, YAML or JSON")
	cmd.Flags().StringVar(&f.LogLevel, "log-level", "", "debug, info, warn or error, instead of what the file says")
	cmd.Flags().StringVar(&f.LogFormat, "log-format", "", "text or json, instead of what the file says")
}
