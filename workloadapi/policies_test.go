package workloadapi_test

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/workloadapi"
)

func TestPoliciesWatch(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}, entry{match: everyone, identity: a.identity(t, "/web")}, entry{match: everyone, identity: a.identity(t, "/db")})
	src.policies = &policyv1.PolicySet{Format: 1, Revision: 7, Policies: []*policyv1.Policy{{Name: "web"}}}
	e := serve(t, src, func(c *workloadapi.Config) { c.SpreadUpdates = time.Hour }) // policies are never spread
	client := policyapi.NewPoliciesClient(e.dial(t))
	stream, err := client.Watch(spiffeCtx(t), &policyapi.WatchRequest{Format: 1})
	if err != nil {
		t.Fatal(err)
	}
	got := recv(t, stream)
	if want := []string{"spiffe://example.org/web", "spiffe://example.org/db"}; !slices.Equal(got.ServiceIds, want) || got.Policies.GetRevision() != 7 {
		t.Errorf("service ids %q at revision %d, want %q at 7", got.ServiceIds, got.Policies.GetRevision(), want)
	}
	// A renewed SVID is no news here; a new policy is.
	renewed := a.identity(t, "/web")
	src.change(func() { src.entries[0].identity = renewed })
	src.change(func() {
		src.policies = &policyv1.PolicySet{Format: 1, Revision: 8}
	})
	if got := recv(t, stream); got.Policies.GetRevision() != 8 || len(got.Policies.GetPolicies()) != 0 {
		t.Errorf("the next message has revision %d", got.Policies.GetRevision())
	}
	// So is the loss of the CA, at once and with its time, and its return.
	lost := time.Unix(1700000000, 5)
	src.change(func() { src.offline = lost })
	if got := recv(t, stream); got.GetOfflineSince() != lost.Unix() || got.Policies.GetRevision() != 8 {
		t.Errorf("offline since %d at revision %d, want %d at 8", got.GetOfflineSince(), got.Policies.GetRevision(), lost.Unix())
	}
	src.change(func() { src.offline = time.Time{} })
	if got := recv(t, stream); got.GetOfflineSince() != 0 {
		t.Errorf("offline since %d, want contact", got.GetOfflineSince())
	}
	src.change(func() { src.policies = &policyv1.PolicySet{Format: 2} })
	wantCode(t, last(stream, nil), codes.FailedPrecondition, "format 2", "upgrade")
	wantCode(t, first(client.Watch(spiffeCtx(t), &policyapi.WatchRequest{})), codes.InvalidArgument, "format")
}

func TestPoliciesNeverSynchronised(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	src.policies = nil
	e := serve(t, src, func(c *workloadapi.Config) { c.IssueWait = 50 * time.Millisecond })
	wantCode(t, first(policyapi.NewPoliciesClient(e.dial(t)).Watch(spiffeCtx(t), &policyapi.WatchRequest{Format: 1})), codes.Unavailable)
}
