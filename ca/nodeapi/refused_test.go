package nodeapi

import (
	"context"
	"log/slog"
	"testing"

	"github.com/signet-id/signet/ca/auditlog"
)

// TestRefusalsAreLoggedForWhoHangsUp: an agent that asks for what is not its own does not keep that out of the log by ending
// the call before it is answered.
func TestRefusalsAreLoggedForWhoHangsUp(t *testing.T) {
	log, err := auditlog.Open(auditlog.Config{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	ctx, hangUp := context.WithCancel(t.Context())
	hangUp()
	a := New(Config{Audit: log, Log: slog.New(slog.DiscardHandler)})
	a.auditRefused(ctx, []auditlog.Record{{Event: "x509svid.refused", Outcome: auditlog.Refused}})
	if n := log.Checkpoint().Seq; n != 1 {
		t.Errorf("%d records are in the log, want 1", n)
	}
}
