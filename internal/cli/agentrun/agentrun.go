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
	turn, letGo, err := takeSockets(ctx, &c, log)
	defer letGo()
	switch {
	case ctx.Err() != nil:
		return nil // ended while it waited
	case err != nil:
		return err
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
		e, startErr := startExaminer(c, examine, log)
		if startErr != nil {
			return startErr
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
	if err := keepSockets(a, notifier); err != nil {
		return errors.Join(err, a.Close())
	}
	return daemon.Serve(ctx, watched{a, watch}, notifier, stderr, c.Logging.Format, func() ([]string, error) {
		c, err := read()
		if err != nil {
			return nil, err
		}
		return a.Reload(c)
	})
}

// takeSockets takes those that the service manager passes in and, if the agent before this one hands over, what that has, once it has ended or
// ctx has. turn keeps others from its place, too, until it is closed. letGo closes all; whoever uses a socket has a copy by then.
func takeSockets(ctx context.Context, c *agent.Config, log *slog.Logger) (turn *os.File, letGo func(), err error) {
	var all []*os.File
	letGo = func() {
		turn.Close()
		for _, s := range all {
			s.Close()
		}
	}
	if c.Sockets, err = manager.Sockets(); err != nil {
		return nil, letGo, err
	}
	for name, s := range c.Sockets {
		if name != agent.SocketWorkload {
			log.Warn("a socket that was passed in is not used", "name", name, "known", agent.SocketWorkload)
		}
		all = append(all, s)
	}
	if !c.HandOver {
		return nil, letGo, nil
	}
	inherited, turn, err := standBy(ctx, *c, log)
	for name, s := range inherited {
		all = append(all, s)
		if c.Sockets[name] == nil { // the service manager's come first
			c.Sockets = with(c.Sockets, name, s)
		}
	}
	return turn, letGo, err
}

// startExaminer starts the process that looks at executables, while this one still may start another.
func startExaminer(c agent.Config, examine []string, log *slog.Logger) (*examiner.Client, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return examiner.Start(examiner.Config{Command: append([]string{self}, examine...), Seccomp: c.Sandbox.Seccomp, Log: log})
}

// keepSockets gives the agent's sockets to a service manager that keeps them.
func keepSockets(a *agent.Agent, notifier *manager.Notifier) error {
	if !notifier.Keeps() {
		return nil
	}
	sockets, err := a.Sockets()
	if err != nil {
		return err
	}
	for name, s := range sockets {
		notifier.Keep(name, s)
		s.Close()
	}
	return nil
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
