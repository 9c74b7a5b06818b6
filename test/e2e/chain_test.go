// Package e2e holds tests of the whole chain on real sockets: CA, agent, Workload API, go-spiffe's own clients, call
// policy.
package e2e

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/test/signettest"
)

// self is the selector that matches this test process.
func self() string { return fmt.Sprintf("unix:uid:%d", os.Getuid()) }

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func identity(name string) string {
	return fmt.Sprintf("---\nkind: Identity\nname: %s\nspiffeID: /%s\nmatch: [%q]\n", name, name, self())
}

func TestFromEntryToSVIDAndAway(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	ctx := within(t)
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.FetchX509SVID(ctx); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("without an entry: %v, want PermissionDenied", err)
	}
	s.Apply(identity("web"))
	svid, err := client.FetchX509SVID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != s.ID("/web") {
		t.Errorf("ID %s", svid.ID)
	}
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), "db"); err != nil {
		t.Errorf("ValidateJWTSVID: %v", err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), "other"); err == nil {
		t.Error("the token is good for another audience")
	}
	s.Delete("Identity", "web")
	if err := eventually(ctx, func() error {
		_, err := client.FetchX509SVID(ctx)
		if status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("after the entry was deleted: %v, want PermissionDenied", err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// eventually repeats f until it returns nil or ctx ends, and then returns its last error.
func eventually(ctx context.Context, f func() error) error {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-t.C:
		}
	}
}
