package e2e

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// cliContext ends as cmd/signet's does: on interrupt and SIGTERM.
func cliContext() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
}
