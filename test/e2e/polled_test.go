package e2e

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// A log that tests read.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// polled starts a CA that has SPIRE's services only while spire is true; what it is changes with its restart.
func polled(t *testing.T, spire *atomic.Bool, change func(*ca.Config)) (*signettest.Signet, *log) {
	t.Helper()
	said := &log{}
	return signettest.Start(t, signettest.Config{
		CA: func(c *ca.Config) {
			c.SPIREOnly = spire.Load()
			if change != nil {
				change(c)
			}
		},
		Agent: func(c *agent.Config) { c.PollInterval = time.Second },
		Log:   slog.New(slog.NewTextHandler(said, nil)),
	}), said
}

// watchPolicies asks as a service does for its call policies, and returns the first answer.
func watchPolicies(ctx context.Context, conn *grpc.ClientConn) (*policyapi.WatchResponse, error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"))
	defer cancel()
	stream, err := policyapi.NewPoliciesClient(conn).Watch(ctx, &policyapi.WatchRequest{Format: 1})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

// TestPolledCA gives an agent a CA without Follow: what SPIRE's services bring is what it serves, without a registration that was
// acknowledged before being missed. Services that ask for call policies get none, and are told why.
func TestPolledCA(t *testing.T) {
	var spire atomic.Bool
	spire.Store(true)
	s, said := polled(t, &spire, func(c *ca.Config) { c.SyncPage = 3 })
	ctx := within(t)
	if got := s.Agent().Status(); got.Server != "spire" || got.Epoch != "spire" || got.State != agent.InSync {
		t.Errorf("the agent is %q at a CA of kind %q, epoch %q", got.State, got.Server, got.Epoch)
	}
	local, err := grpc.NewClient("unix://"+s.AgentAdminSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if got, err := agentv1.NewAgentClient(local).GetStatus(ctx, &agentv1.GetStatusRequest{}); err != nil || got.GetCa().GetServer() != "spire" || !got.GetCa().GetConnected() {
		t.Errorf("the agent's admin socket says %v, %v", got.GetCa(), err)
	}
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
		t.Fatalf("right after the registration: %v", err)
	}
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db", Subject: svid.ID})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), "db"); err != nil {
		t.Errorf("ValidateJWTSVID: %v", err)
	}
	if said := said.String(); !strings.Contains(said, "the CA is a SPIRE server") {
		t.Errorf("the log says nothing of a SPIRE server:\n%s", said)
	}
	conn, err := grpc.NewClient(s.WorkloadAPI(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := watchPolicies(ctx, conn); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "has no call policies") {
		t.Errorf("a service that asks for its policies gets %v, want FailedPrecondition", err)
	}

	// More than fit in a page, one changed, most deleted.
	var docs strings.Builder
	for i := range 10 {
		docs.WriteString(identity(fmt.Sprintf("many-%d", i)))
	}
	s.Apply(docs.String())
	has := func(want ...string) {
		t.Helper()
		if err := eventually(ctx, func() error {
			svids, err := client.FetchX509SVIDs(ctx)
			if err != nil {
				return err
			}
			got := map[string]bool{}
			for _, s := range svids {
				got[s.ID.Path()] = true
			}
			for _, id := range want {
				if !got[id] {
					return fmt.Errorf("there is no %s", id)
				}
			}
			if len(got) != len(want) {
				return fmt.Errorf("there are %d identities, want %d", len(got), len(want))
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	has("/web", "/many-0", "/many-1", "/many-2", "/many-3", "/many-4", "/many-5", "/many-6", "/many-7", "/many-8", "/many-9")
	s.Apply(strings.Replace(identity("many-3"), "/many-3", "/other", 1))
	for i := range 10 {
		if i != 3 {
			s.Delete("Identity", fmt.Sprintf("many-%d", i))
		}
	}
	has("/web", "/other")
}

// TestPolledCARotates renews what a tainted authority has signed, as soon as a poll brings the news.
func TestPolledCARotates(t *testing.T) {
	var spire atomic.Bool
	spire.Store(true)
	s, _ := polled(t, &spire, nil)
	ctx := within(t)
	s.Apply(identity("web"))
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	first, err := src.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	admin := adminv1.NewAdminClient(s.AdminConn())
	kind := adminv1.AuthorityType_AUTHORITY_TYPE_X509
	if _, err := admin.PrepareAuthority(ctx, &adminv1.PrepareAuthorityRequest{Type: kind}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // activate, taint
		if err := eventually(ctx, func() error { _, err := rotateOn(ctx, admin, kind); return err }); err != nil {
			t.Fatal(err)
		}
	}
	if err := eventually(ctx, func() error {
		now, err := src.GetX509SVID()
		if err == nil && bytes.Equal(now.Certificates[0].AuthorityKeyId, first.Certificates[0].AuthorityKeyId) {
			err = errors.New("the SVID is still of the tainted authority")
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// TestCAOfAnotherKind swaps what the CA is under a running agent, from one that is polled to one that is followed, and back. The
// streams of workloads stay; policies are there while the CA has them, and nothing that the CAs say is missed.
func TestCAOfAnotherKind(t *testing.T) {
	var spire atomic.Bool
	spire.Store(true)
	s, _ := polled(t, &spire, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.Apply(identity("web"))
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	conn, err := grpc.NewClient(s.WorkloadAPI(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for round, kind := range []string{"signet", "spire", "signet"} {
		spire.Store(kind == "spire")
		if err := s.RestartCA(ctx); err != nil {
			t.Fatal(err)
		}
		if err := eventually(ctx, func() error {
			if got := s.Agent().Status(); got.Server != kind || got.State != agent.InSync {
				return fmt.Errorf("the agent is %q at a CA of kind %q, want in sync at %q", got.State, got.Server, kind)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := watchPolicies(ctx, conn); (err == nil) != (kind == "signet") {
			t.Errorf("at a CA of kind %s a service that asks for its policies gets %v", kind, err)
		}
		// A change of the entry after the swap brings a new SVID, whatever the revisions of the other CA were.
		name := fmt.Sprintf("host%d.internal", round)
		admin, err := s.Admin()
		if err != nil {
			t.Fatal(err)
		}
		_, err = adminv1.NewAdminClient(admin).Apply(ctx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{File: "web.yaml",
			Content: []byte(identity("web") + fmt.Sprintf("dnsNames: [%s]\n", name))}}})
		admin.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := eventually(ctx, func() error {
			now, err := src.GetX509SVID()
			if err == nil {
				err = now.Certificates[0].VerifyHostname(name)
			}
			return err
		}); err != nil {
			t.Errorf("at a CA of kind %s: %v", kind, err)
		}
		roots := x509.NewCertPool()
		bundle, err := src.GetX509BundleForTrustDomain(s.TrustDomain())
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range bundle.X509Authorities() {
			roots.AddCert(a)
		}
		now, err := src.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := now.Certificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("at a CA of kind %s: %v", kind, err)
		}
	}
}
