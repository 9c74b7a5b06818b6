package cli

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/signet-id/signet/internal/demo"
)

func (a *app) demoCommand() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See everything work: a CA, an agent, three services, calls allowed and refused",
		Long: `Run a CA, an agent and three services as separate processes, let them call each other, and check everything that is shown:
identities, an allowed call and a refused one with its reason, JWT-SVIDs, rotation under live traffic, a policy change, and
both the agent and the CA killed and started again. It takes about a quarter of a minute, needs no root and no free port in
particular, and leaves nothing behind. The exit status is 0 if every check passed.`,
		Example: `  signet demo
  signet demo --keep`,
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "leave everything running to play with, until Ctrl-C")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		program, err := os.Executable()
		if err != nil {
			return fmt.Errorf("finding this program, of which the demo runs copies: %w", err)
		}
		// A closed terminal or pipe ends the demo in order, too: it would leave its directory behind.
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGHUP)
		defer stop()
		pipe := make(chan os.Signal, 1) // so that writing returns the error
		signal.Notify(pipe, syscall.SIGPIPE)
		defer signal.Stop(pipe)
		err = demo.Run(ctx, demo.Config{Program: program, Stdout: a.stdout, Color: a.color, Unicode: showsUnicode(a), Keep: keep})
		if err != nil {
			return fmt.Errorf("demo: %w", err)
		}
		return nil
	}
	return cmd
}

// showsUnicode tells whether stdout is a terminal whose locale has UTF-8.
func showsUnicode(a *app) bool {
	out, ok := a.stdout.(*resultWriter)
	if !ok {
		return false
	}
	f, ok := out.w.(*os.File)
	if !ok {
		return false
	}
	if info, err := f.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := os.Getenv(name); v != "" {
			v = strings.ToLower(v)
			return strings.Contains(v, "utf-8") || strings.Contains(v, "utf8")
		}
	}
	return false
}

// demoServiceCommand is one of the three services of the demo. Only the demo calls it.
func (a *app) demoServiceCommand() *cobra.Command {
	c := demo.ServiceConfig{Stderr: a.stderr}
	cmd := &cobra.Command{Use: "demo-service NAME --control PATH", Short: "One of the three services of the demo", Hidden: true, Args: exactArgs("NAME")}
	cmd.Flags().StringVar(&c.Control, "control", "", "path of the socket on which the demo talks to it")
	cmd.Flags().StringVar(&c.Documents, "documents", "", "address of documents-service")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch c.Name = args[0]; {
		case c.Name != demo.Documents && c.Name != demo.Trusty && c.Name != demo.Utility:
			return usagef("%q is not one of %s, %s, %s", c.Name, demo.Documents, demo.Trusty, demo.Utility)
		case !filepath.IsAbs(c.Control):
			return usagef("--control %q is not an absolute path", c.Control)
		case c.Name != demo.Documents && c.Documents == "":
			return usagef("--documents is missing: the address of %s", demo.Documents)
		}
		return demo.RunService(cmd.Context(), c)
	}
	return cmd
}
