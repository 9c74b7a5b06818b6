// Package agentrun is the command "agent run", for both signet and the slim signet-agent. It must not import the CA, so
// that signet-agent does not link it.
package agentrun

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/examiner"
	"github.com/signet-id/signet/internal/cli/daemon"
	manager "github.com/signet-id/signet/internal/daemon"
	"github.com/signet-id/signet/internal/handover"
	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/internal/version"
)

// Examine is the command of the agent's second process, which the agent starts by itself. args is the mode of its system
// call filter.
func Examine(args []string) error {
	if len(args) != 1 {
		return errors.New("the agent starts this by itself")
	}
	return examiner.Main(args[0])
}

// Run runs an agent until ctx ends. SIGHUP reloads its configuration; what is said about that goes to stderr. examine are
// the arguments with which this program calls Examine. The error may have a method Hint with the operator's next step.
func Run(ctx context.Context, f daemon.Flags, examine []string, stderr io.Writer) (err error) {
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
	// The memory holds the keys of all workloads; no crash may bring it to a disk.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switching core dumps off: %w", err)
	}
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
		if name != agent.SocketWorkload {
			log.Warn("a socket that was passed in is not used", "name", name, "known", agent.SocketWorkload)
		}
		defer s.Close()
	}
	var turn *os.File
	if c.HandOver {
		var inherited map[string]*os.File
		inherited, turn, err = standBy(ctx, c, log)
		defer turn.Close()
		if ctx.Err() != nil {
			return nil // ended while it waited
		}
		if err != nil {
			return err
		}
		for name, s := range inherited {
			defer s.Close()
			if c.Sockets[name] == nil { // the service manager's come first
				c.Sockets = with(c.Sockets, name, s)
			}
		}
	}
	held, err := sandbox.Held()
	if err != nil {
		return err
	}
	privileges, err := c.Privileges(f.Config, held)
	if err != nil {
		return err
	}
	watch := func(context.Context) error { return nil }
	if privileges.Examiner {
		// While this process still may start another.
		self, err := os.Executable()
		if err != nil {
			return err
		}
		e, err := examiner.Start(examiner.Config{Command: append([]string{self}, examine...), Seccomp: c.Sandbox.Seccomp, Log: log})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, e.Close()) }()
		c.Executables, watch = e, e.Watch
	}
	a, err := agent.New(c)
	if err != nil {
		return err
	}
	if c.HandOver {
		offer, offerErr := handover.NewOffer(c.DataDir, a.Sockets, log)
		if offerErr != nil {
			return errors.Join(offerErr, a.Close())
		}
		defer func() { err = errors.Join(err, offer.Close()) }() // when the agent has let go of everything
		turn.Close()                                             // whoever waits next finds the offer
	}
	if err := restrict(privileges, log); err != nil {
		return errors.Join(err, a.Close())
	}
	if notifier.Keeps() {
		sockets, err := a.Sockets()
		if err != nil {
			return errors.Join(err, a.Close())
		}
		for name, s := range sockets {
			notifier.Keep(name, s)
			s.Close()
		}
	}
	return daemon.Serve(ctx, watched{a, watch}, notifier, stderr, c.Logging.Format, func() ([]string, error) {
		c, err := read()
		if err != nil {
			return nil, err
		}
		return a.Reload(c)
	})
}

// restrict gives up what the agent does not need, and says what it runs with and what will not work.
func restrict(p agent.Privileges, log *slog.Logger) error {
	report, err := sandbox.Apply(p.Policy)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	log.Info("what the agent runs with", "process", report)
	for _, m := range p.Missing {
		log.Warn("a privilege is missing, and so some things will not work", "missing", m)
	}
	for _, r := range p.Remarks {
		log.Info("about the agent's privileges", "remark", r)
	}
	return nil
}

// watched is an agent that ends with its examiner.
type watched struct {
	*agent.Agent
	watch func(context.Context) error
}

// Run runs the agent.
func (w watched) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		err := w.watch(ctx)
		if err != nil {
			cancel()
		}
		ended <- err
	}()
	err := w.Agent.Run(ctx)
	cancel()
	return errors.Join(err, <-ended)
}
