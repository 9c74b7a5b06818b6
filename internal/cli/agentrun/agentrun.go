// Package agentrun is the command "agent run", for both signet and the slim signet-agent. It must not import the CA, so
// that signet-agent does not link it.
package agentrun

import (
	"context"
	"io"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/internal/cli/daemon"
	"github.com/signet-id/signet/internal/version"
)

// Run runs an agent until ctx ends. SIGHUP reloads its configuration; what is said about that goes to stderr. The error
// may have a method Hint with the operator's next step.
func Run(ctx context.Context, f daemon.Flags, stderr io.Writer) error {
	if err := f.Check(); err != nil {
		return err
	}
	read := func() (agent.Config, error) {
		c, err := daemon.ReadConfig(f.Config, agent.ReadConfig)
		f.Override(&c.Logging.Level, &c.Logging.Format)
		c.Version = version.String()
		return c, err
	}
	c, err := read()
	if err != nil {
		return err
	}
	a, err := agent.New(c)
	if err != nil {
		return err
	}
	return daemon.Serve(ctx, a, stderr, c.Logging.Format, func() ([]string, error) {
		c, err := read()
		if err != nil {
			return nil, err
		}
		return a.Reload(c)
	})
}
