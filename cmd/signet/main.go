// Command signet is the whole of signet in one program: CA, agent, and every command an operator needs.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/signet-id/signet/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
