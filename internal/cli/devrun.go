package cli

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-id/signet/internal/dev"
)

func (a *app) devCommand() *cobra.Command {
	var dir, trustDomain, listen, logLevel string
	var groups []string
	var ephemeral bool
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a CA and an agent in this process, to develop and try things",
		Long: `Run a real CA and a real agent in this process, ready in under a second. The state is in one directory, with the sockets ca.sock
and agent.sock and the bundle bundle.pem. What to put into the environment of workloads is printed on stdout, for eval.

The key that seals the CA's private keys lies beside the data (mode 0600), so it protects nothing here: this is no CA for production.`,
		Example: `  signet dev
  signet dev --dir /tmp/td --trust-domain test.example --listen 127.0.0.1:8081
  signet dev --ephemeral --node-group backend`,
	}
	fs := cmd.Flags()
	fs.StringVar(&dir, "dir", "", "directory for the state (default ~/.signet/dev)")
	fs.StringVar(&trustDomain, "trust-domain", "example.org", "trust domain; it cannot be changed for a directory that has state")
	fs.StringVar(&listen, "listen", "", "address of the CA (default a free port on 127.0.0.1, kept over restarts)")
	fs.StringArrayVar(&groups, "node-group", nil, "the one node gets the selector node:group:NAME (repeatable)")
	fs.BoolVar(&ephemeral, "ephemeral", false, "use a temporary directory and remove it at the end")
	fs.StringVar(&logLevel, "log-level", "warn", "debug, info, warn or error")
	exclusive(cmd, "dir", "ephemeral")
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		var level slog.Level
		if level.UnmarshalText([]byte(logLevel)) != nil {
			return usagef("--log-level %q is not one of debug, info, warn, error", logLevel)
		}
		switch {
		case ephemeral:
			if dir, err = os.MkdirTemp("", "signet-dev-"); err != nil {
				return fmt.Errorf("making a temporary directory: %w", err)
			}
			defer func() {
				if gone := os.RemoveAll(dir); err == nil && gone != nil {
					err = fmt.Errorf("removing %q: %w", dir, gone)
				}
			}()
		case dir == "":
			home, err := os.UserHomeDir()
			if err != nil {
				return withHint(fmt.Errorf("finding the home directory: %w", err), "name a directory with --dir, or use --ephemeral")
			}
			dir = filepath.Join(home, ".signet", "dev")
		}
		begin := time.Now()
		instance, err := dev.Start(cmd.Context(), dev.Config{Dir: dir, TrustDomain: trustDomain, Listen: listen, NodeGroups: groups,
			Log: slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))})
		if err != nil {
			if cmd.Context().Err() != nil {
				return nil
			}
			return fmt.Errorf("starting in %q: %w", dir, err)
		}
		took := time.Since(begin)
		fmt.Fprintf(a.stdout, "export SPIFFE_ENDPOINT_SOCKET=%s\nexport %s=%s\nexport %s=%s\n", shellWord(instance.WorkloadAPI()), envCASocket, shellWord(instance.CASocket()),
			envAgentSocket, shellWord(instance.AgentAdminSocket()))
		a.note("ready in %d ms", took.Milliseconds())
		a.note("CA of %s at %s, bundle %s", instance.TrustDomain(), instance.CAAddr(), instance.BundlePath())
		a.note("the seal key lies beside the data and protects nothing here; stop with Ctrl-C")
		waited := instance.Wait(cmd.Context())
		if err := instance.Close(); waited == nil {
			return err
		}
		return waited
	}
	return cmd
}
