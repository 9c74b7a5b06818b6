// Package cli is the command line of signet: one file per noun, each a thin shell around a library package or an RPC
// of the CA. cmd/signet calls Main and ends the process with what it returns.
//
// Conventions that every command keeps: verbs come after nouns; results go to stdout and nothing else does; notes and
// errors go to stderr; exit status 0 means done, 1 refused or failed, 2 wrong usage; whatever comes from elsewhere is
// escaped before a terminal sees it. Keys never go to stdout.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
)

// Exit statuses of every command.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// app is what commands share: the three streams, whether stdout may be coloured, the clock, and how the CA is reached.
// One app serves one call of Main and is used by one goroutine.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	color          bool
	now            func() time.Time
	ca             caFlags
}

// Main runs the command that args (without the program's name) describe and returns the exit status: 0 done, 1 refused
// or failed, 2 wrong usage. It returns when the command has ended or, for commands that run until told, soon after ctx
// ends. It never ends the process.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	out := &resultWriter{w: stdout}
	a := &app{stdin: stdin, stdout: out, stderr: stderr, color: isTerminal(stdout), now: time.Now}
	root := a.rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		err = out.failed()
	}
	if err == nil {
		return exitDone
	}
	if !errors.As(err, new(*silentError)) {
		printError(stderr, isTerminal(stderr), err)
	}
	var usage *usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

// resultWriter is stdout. It keeps the first error, so that no command says "done" whose result nobody got.
type resultWriter struct {
	w   io.Writer
	mu  sync.Mutex
	err error // guarded by mu
}

func (r *resultWriter) Write(b []byte) (int, error) {
	n, err := r.w.Write(b)
	if err != nil {
		r.mu.Lock()
		r.err = cmp.Or(r.err, err)
		r.mu.Unlock()
	}
	return n, err
}

func (r *resultWriter) failed() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		return nil
	}
	return fmt.Errorf("writing the result: %w", r.err)
}

// NewRootCommand returns the whole command tree, for the generator of docs/reference/cli.md. The commands write to
// nowhere.
func NewRootCommand() *cobra.Command {
	a := &app{stdin: eofReader{}, stdout: io.Discard, stderr: io.Discard, now: time.Now}
	return a.rootCommand()
}

type eofReader struct{}

func (eofReader) Read([]byte) (int, error) { return 0, io.EOF }

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "signet",
		Short: "Workload identities and call policies",
		Long: `signet gives every service a verified identity (SPIFFE) and tells it who may call it.

Commands that talk to the CA use its admin socket (--socket, else $SIGNET_CA_SOCKET, else ` + defaultCASocket + `),
or with --server its TCP port, as the identity that the Workload API gives the caller.`,
		Example: `  # a CA and an agent in one process, to try things
  signet dev

  # what is in this certificate, and which rules does it break
  signet svid inspect web.pem`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		hint := fmt.Sprintf("run '%s --help' for its flags", cmd.CommandPath())
		if strings.Contains(err.Error(), "--dry-run") && cmd.Name() == "apply" {
			hint = "'signet diff' takes the same documents, and shows what apply would do"
		}
		return &usageError{err: err, hint: hint}
	})
	root.AddGroup(
		&cobra.Group{ID: groupRun, Title: "Run:"},
		&cobra.Group{ID: groupState, Title: "Who is who and who may call whom:"},
		&cobra.Group{ID: groupLook, Title: "Look and explain:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(groupRun, a.demoCommand(), a.devCommand(), a.caCommand(), a.proxyCommand(), a.configCommand())
	add(groupState,
		a.applyCommand(), a.rolloutCommand(), a.diffCommand(), a.getCommand(), a.deleteCommand(), a.revokeCommand(), a.unrevokeCommand(),
		a.entryCommand(), a.nodeCommand(), a.tokenCommand(), a.bundleCommand(), a.federationCommand(), a.authorityCommand())
	add(groupLook, a.whyCommand(), a.whyDeniedCommand(), a.svidCommand(), a.envoyCommand(), a.policyCommand(), a.explainCommand(), a.auditCommand(), a.versionCommand())
	root.AddCommand(a.demoServiceCommand())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	root.SetUsageTemplate(usageTemplate)
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			a.namesItself(c)
			for _, shell := range c.Commands() {
				shell.Args = nil // finish gives it one whose error is of wrong usage
			}
		}
	}
	a.namesItself(root)
	finish(root)
	return root
}

const (
	groupRun   = "run"
	groupState = "state"
	groupLook  = "look"
)

// namesItself makes the root command refuse words that are no command; cobra alone would do so with an error that has
// no hint and the wrong exit status.
func (a *app) namesItself(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		if cmd.HasParent() {
			return &usageError{err: fmt.Errorf("%s needs a verb: %s", cmd.CommandPath(), verbs(cmd)),
				hint: fmt.Sprintf("run '%s --help'", cmd.CommandPath())}
		}
		return cmd.Help()
	}
}

// noun makes a command that only holds verbs.
func (a *app) noun(use, short, long string, cmds ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Long: long}
	cmd.AddCommand(cmds...)
	a.namesItself(cmd)
	return cmd
}

// isTerminal tells whether w is a terminal that wants colour: a character device, NO_COLOR unset, TERM not dumb.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" || os.Getenv("TERM") == "" {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
