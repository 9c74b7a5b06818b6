package e2e

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
)

// TestClockJumps moves the clock of CA and agent an hour forward and back while a workload holds a stream: nothing
// ends, and everybody has a valid SVID again without a person. [DESIGN §12]
func TestClockJumps(t *testing.T) {
	for name, jump := range map[string]time.Duration{"an hour forward": time.Hour, "an hour back": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := bounded(t, 110*time.Second)
			var offset atomic.Int64
			now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
			dir, err := os.MkdirTemp("", "signet")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			// The authorities are some hours old, as they would be: before its own begin nothing of theirs is valid.
			offset.Store(int64(-5 * time.Hour))
			c := dev.Config{Dir: dir, Now: now, CA: func(c *ca.Config) { c.TTL.Agent, c.Audit.Reserve = 50*time.Minute, 1<<20 }}
			s, err := dev.Start(ctx, c)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			offset.Store(0)
			if s, err = dev.Start(ctx, c); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			apply := func(docs string) {
				conn, err := s.Admin()
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := adminv1.NewAdminClient(conn).Apply(ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(docs), File: "t.yaml"}}}); err != nil {
					t.Fatal(err)
				}
			}
			apply(identity("web"))
			client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if _, err := client.FetchX509SVID(ctx); err != nil {
				t.Fatal(err)
			}
			offset.Store(int64(jump))
			valid := func() error {
				svid, err := client.FetchX509SVID(ctx)
				if err != nil {
					return err
				}
				if leaf := svid.Certificates[0]; now().Before(leaf.NotBefore) || now().After(leaf.NotAfter) {
					return fmt.Errorf("the SVID is valid from %v to %v, and it is %v", leaf.NotBefore, leaf.NotAfter, now())
				}
				return nil
			}
			if err := eventually(ctx, valid); err != nil {
				t.Fatalf("after the jump: %v", err)
			}
			apply(identity("later")) // CA and agent still speak with each other
			if err := eventually(ctx, func() error {
				svids, err := client.FetchX509SVIDs(ctx)
				if err == nil && len(svids) != 2 {
					err = fmt.Errorf("%d SVIDs", len(svids))
				}
				return err
			}); err != nil {
				t.Fatalf("a new entry after the jump: %v", err)
			}
		})
	}
}
