// Command signet-proxy is "signet proxy run" as a program of its own: it links neither the CA, nor the agent, nor any operator command.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/signet-id/signet/internal/cli/daemon"
	"github.com/signet-id/signet/internal/cli/proxyrun"
	"github.com/signet-id/signet/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// run returns the exit status: 0 done, 1 refused or failed, 2 wrong usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var f daemon.Flags
	var showVersion bool
	flags := flag.NewFlagSet("signet-proxy", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&f.Config, "config", "", "configuration `FILE`, YAML or JSON")
	flags.StringVar(&f.ConfigEnv, "config-env", "", "`VARIABLE` of the environment that holds the configuration, instead of -config")
	flags.StringVar(&f.LogLevel, "log-level", "", "debug, info, warn or error, instead of what the file says")
	flags.StringVar(&f.LogFormat, "log-format", "", "text or json, instead of what the file says")
	flags.BoolVar(&showVersion, "version", false, "print version and commit")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	}
	if showVersion {
		v := version.Get()
		fmt.Fprintf(stdout, "signet-proxy %s (commit %s, %s, %s)\n", v.Version, v.Commit, v.Go, v.Platform)
		return 0
	}
	if err := f.Check(); err != nil || flags.NArg() > 0 {
		if err == nil {
			err = fmt.Errorf("no argument is taken, such as %q", flags.Arg(0))
		}
		fmt.Fprintf(stderr, "signet-proxy: error: %v\nsignet-proxy: hint: for example: signet-proxy -config /etc/signet/proxy.yaml\n", err)
		return 2
	}
	if err := proxyrun.Run(ctx, f, stderr); err != nil {
		fmt.Fprintf(stderr, "signet-proxy: error: %v\n", err)
		var h interface{ Hint() string }
		if errors.As(err, &h) {
			fmt.Fprintf(stderr, "signet-proxy: hint: %s\n", h.Hint())
		}
		return 1
	}
	return 0
}
