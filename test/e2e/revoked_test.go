package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/source"
)

func revocation(name, id string) string {
	return fmt.Sprintf("---\nkind: Revocation\nname: %s\nid: %s\nreason: test\n", name, id)
}

// source opens one for the service /web.
func (f *fleet) source(ctx context.Context) *source.Source {
	f.t.Helper()
	var s *source.Source
	if err := eventually(ctx, func() (err error) {
		s, err = source.New(ctx, source.Options{Addr: f.endpoint(), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
		return err
	}); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { s.Close() })
	return s
}

func reason(s *source.Source, from string) policy.Reason {
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://example.org" + path) }
	return s.Policies().Decide(&policy.Request{Service: id("/web"), Peer: id(from), Method: "GET", Path: "/"}).Reason
}

// awaitReason waits without a pause, so that what follows comes right after.
func awaitReason(ctx context.Context, t *testing.T, s *source.Source, from string, want policy.Reason) {
	t.Helper()
	changed, stop := s.Subscribe()
	defer stop()
	for {
		got := reason(s, from)
		if got == want {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("%s gets %v, want %v", from, got, want)
		}
	}
}

// TestRevokedAndAllKilled kills the CA and the agent after a revocation and starts the agent without the CA: nobody is revived at
// new services, as the revocation is in the sealed cache, nor at those that were there, although the agent then finds an older
// cache. [DESIGN §8]
func TestRevokedAndAllKilled(t *testing.T) {
	t.Parallel()
	ctx := bounded(t, 100*time.Second)
	f := newSurvivor(ctx, t, func(f *fleet) string { return f.addr }, "")
	f.apply(ctx, identity("web")+outagePolicies)
	f.await(ctx, "/web")
	f.saved(ctx, 1)
	older := f.dir + "/older"
	if err := os.CopyFS(older, os.DirFS(f.dir+"/agent/cache")); err != nil {
		t.Fatal(err)
	}
	private(t, older)
	s := f.source(ctx)
	awaitReason(ctx, t, s, "/caller", policy.ReasonAllowed)
	f.apply(ctx, revocation("leak", "/caller"))
	awaitReason(ctx, t, s, "/caller", policy.ReasonRevoked)
	f.saved(ctx, 1)
	f.agent.end(syscall.SIGKILL)
	f.ca.end(syscall.SIGKILL)
	f.agent.start()
	if got := reason(f.source(ctx), "/caller"); got != policy.ReasonRevoked {
		t.Errorf("a service that begins after the kill decides %v", got)
	}

	f.agent.end(syscall.SIGKILL)
	if err := errors.Join(os.RemoveAll(f.dir+"/agent/cache"), os.Rename(older, f.dir+"/agent/cache")); err != nil {
		t.Fatal(err)
	}
	changed, stop := s.Subscribe()
	defer stop()
	select { // what came before
	case <-changed:
	default:
	}
	f.agent.start()
	if got := reason(f.source(ctx), "/caller"); got != policy.ReasonAllowed {
		t.Fatalf("a service that begins with the older cache decides %v: it is not older", got)
	}
	select {
	case <-changed:
	case <-ctx.Done():
		t.Fatal("the service that was there has not found the agent again")
	}
	if got := reason(s, "/caller"); got != policy.ReasonRevoked {
		t.Errorf("a service that knew of the revocation decides %v when its agent does not know", got)
	}
	f.ca.start()
	if err := eventually(ctx, func() error {
		_, err := adminv1.NewAdminClient(f.admin).DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: "Revocation", Name: "leak", Yes: true})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	awaitReason(ctx, t, s, "/caller", policy.ReasonAllowed) // what the CA takes back is taken back
}

// TestOldBackup puts an older copy of the CA's store back, upon which revisions are given once more. Agents take what the CA
// says then, although a policy of the same name and revision was another one, and tell of it.
func TestOldBackup(t *testing.T) {
	t.Parallel()
	ctx := bounded(t, 100*time.Second)
	f := newFleet(t)
	f.up(ctx)
	f.apply(ctx, identity("web")+outagePolicies)
	f.await(ctx, "/web")
	s := f.source(ctx)
	awaitReason(ctx, t, s, "/caller", policy.ReasonAllowed)

	end := func(p *process) {
		t.Helper()
		if err := p.end(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	end(f.ca)
	backup := f.dir + "/backup"
	if err := os.CopyFS(backup, os.DirFS(f.dir+"/ca")); err != nil {
		t.Fatal(err)
	}
	f.ca.start()
	f.apply(ctx, strings.ReplaceAll(outagePolicies, "[/caller]", "[/caller, /thief]"))
	awaitReason(ctx, t, s, "/thief", policy.ReasonAllowed)
	f.apply(ctx, revocation("leak", "/caller"))
	awaitReason(ctx, t, s, "/caller", policy.ReasonRevoked)
	f.apply(ctx, revocation("more", "/other"))
	awaitReason(ctx, t, s, "/other", policy.ReasonRevoked)
	end(f.agent)
	end(f.ca)
	if err := errors.Join(os.RemoveAll(f.dir+"/ca"), os.Rename(backup, f.dir+"/ca")); err != nil {
		t.Fatal(err)
	}
	f.ca.start()
	f.apply(ctx, strings.ReplaceAll(outagePolicies, "[/caller]", "[/caller, /third]"))
	f.agent.start()
	awaitReason(ctx, t, s, "/third", policy.ReasonAllowed)
	awaitReason(ctx, t, s, "/caller", policy.ReasonAllowed) // the backup knows of no revocation
	if got := reason(s, "/thief"); got == policy.ReasonAllowed {
		t.Error("what the CA does not allow any more is allowed")
	}
	if said := f.agent.out.String(); !strings.Contains(said, "older backup") || !strings.Contains(said, "leak") {
		t.Errorf("the agent does not tell of it:\n%s", said)
	}
}
