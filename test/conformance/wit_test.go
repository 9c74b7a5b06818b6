package conformance

import (
	"context"
	"crypto/ecdsa"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// TestWAPI_74_WITsOfARealCA: go-spiffe's source takes WIT-SVIDs and bundles of a real CA and agent, the key fits the token,
// and both follow the rotation of the WIT authority. [WIT-24, WAPI-72, WAPI-76]
func TestWAPI_74_WITsOfARealCA(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) { c.WIT.Enabled = true }, Agent: func(c *agent.Config) { c.WIT.Enabled = true }})
	for _, path := range []string{"/a", "/b"} {
		s.Apply(fmt.Sprintf("kind: Identity\nname: w%s\nspiffeID: %s\nmatch: [unix:uid:%d]\n", path[1:], path, os.Getuid()))
	}
	source, err := workloadapi.NewWITSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	bundle, err := source.GetWITBundleForTrustDomain(s.TrustDomain())
	if err != nil {
		t.Fatal(err)
	}
	fetch := func() (svids []*witsvid.SVID) {
		for _, path := range []string{"/a", "/b"} {
			svid, err := source.GetWITSVIDForID(s.ID(path))
			if err != nil {
				t.Fatal(err)
			}
			svids = append(svids, svid)
		}
		return svids
	}
	svids := fetch()
	for i, svid := range svids {
		private, ok := svid.PrivateKey.(*ecdsa.PrivateKey)
		if !ok || !private.PublicKey.Equal(svid.PublicKey) {
			t.Errorf("the key of %s is not that of its token", svid.ID)
		}
		if _, err := witsvid.ParseAndValidate(svid.Marshal(), bundle); err != nil {
			t.Errorf("%s: %v", svid.ID, err)
		}
		if i > 0 && private.Equal(svids[0].PrivateKey) {
			t.Error("two identities share a key")
		}
	}

	authorities := localauthorityv1.NewLocalAuthorityClient(s.AdminConn())
	prepared, err := authorities.PrepareWITAuthority(ctx, &localauthorityv1.PrepareWITAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := prepared.GetPreparedAuthority().GetAuthorityId()
	for _, found := bundle.FindWITAuthority(next); !found; _, found = bundle.FindWITAuthority(next) {
		if err := source.WaitUntilUpdated(ctx); err != nil {
			t.Fatalf("the prepared authority does not arrive: %v", err)
		}
		if bundle, err = source.GetWITBundleForTrustDomain(s.TrustDomain()); err != nil {
			t.Fatal(err)
		}
	}
	old := svids[0].KeyID
	if _, err := authorities.ActivateWITAuthority(ctx, &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: next}); err != nil {
		t.Fatal(err)
	}
	if _, err := authorities.TaintWITAuthority(ctx, &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	for {
		if svids := fetch(); svids[0].KeyID == next && svids[1].KeyID == next {
			break
		}
		if err := source.WaitUntilUpdated(ctx); err != nil {
			t.Fatalf("the WIT-SVIDs are not re-issued after their authority was tainted: %v", err)
		}
	}
}

// TestWAPI_70_WITsNeedBothSwitches: an agent that does not serve the profile says so, and one whose CA does not issue has
// nothing yet.
func TestWAPI_70_WITsNeedBothSwitches(t *testing.T) {
	for name, test := range map[string]struct {
		agent bool
		want  codes.Code
	}{"at neither": {false, codes.Unimplemented}, "at the agent alone": {true, codes.Unavailable}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := signettest.Start(t, signettest.Config{Agent: func(c *agent.Config) { c.WIT.Enabled = test.agent }})
			s.Apply(fmt.Sprintf("kind: Identity\nname: w\nspiffeID: /w\nmatch: [unix:uid:%d]\n", os.Getuid()))
			conn, err := grpc.NewClient(s.WorkloadAPI(), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), 30*time.Second)
			defer cancel()
			stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchWITSVID(ctx, &workload.WITSVIDRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); status.Code(err) != test.want {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
}
