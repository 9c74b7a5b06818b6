// Package proxyrun is the command "proxy run", for both signet and the slim signet-proxy. It must import neither the CA nor
// the agent, so that signet-proxy does not link them.
package proxyrun

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/cli/daemon"
	manager "github.com/signet-id/signet/internal/daemon"
	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/policy/proxy"
)

// heapFloor is what the garbage collector takes to be in use at least. A proxy holds little and makes garbage with each handshake; at
// the runtime's own floor of 4 MiB it would spend a seventh of its time on collecting. The bytes are never touched, and so take no memory.
const heapFloor = 16 << 20

// Run runs a proxy until ctx ends. SIGHUP reloads its configuration; what is said about that goes to stderr. The error may have
// a method Hint with the operator's next step.
func Run(ctx context.Context, f daemon.Flags, stderr io.Writer) error {
	if err := f.Check(); err != nil {
		return err
	}
	read := func() (proxy.Config, error) {
		c, err := daemon.ReadFlags(f, proxy.ReadConfig)
		f.Override(&c.Logging.Level, &c.Logging.Format)
		return c, err
	}
	c, err := read()
	if err != nil {
		return err
	}
	// The memory holds the keys of the service; no crash may bring it to a disk.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switching core dumps off: %w", err)
	}
	floor := make([]byte, heapFloor)
	defer runtime.KeepAlive(&floor)
	log := daemon.Logger(stderr, c.Logging.Format)
	notifier, err := manager.NewNotifier()
	if err != nil {
		return err
	}
	defer notifier.Close()
	if c.Sockets, err = manager.Sockets(); err != nil {
		return err
	}
	for name, s := range c.Sockets {
		if !c.HasListener(name) {
			log.Warn("a socket that was passed in is not used: no listener has its name", "name", name)
		}
		defer s.Close()
	}
	p, err := proxy.New(c)
	if err != nil {
		return err
	}
	if err := restrict(c.Policy(f.Config), log); err != nil {
		return errors.Join(err, p.Close())
	}
	return daemon.Serve(ctx, p, notifier, stderr, c.Logging.Format, func() ([]string, error) {
		c, err := read()
		if err != nil {
			return nil, err
		}
		return p.Reload(c)
	})
}

// restrict gives up what the proxy does not need, and says what it runs with.
func restrict(p sandbox.Policy, log *slog.Logger) error {
	report, err := sandbox.Apply(p)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	log.Info("what the proxy runs with", "process", report)
	return nil
}
