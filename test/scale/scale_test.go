//go:build scale

package scale

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

func identities(from, to int, match func(int) string) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "---\nkind: Identity\nname: s%d\nspiffeID: /scale/%d\nmatch: [%q]\n", i, i, match(i))
	}
	return b.String()
}

// TestTenThousandEntriesOnOneAgent: a workload is served at once although its agent holds ten thousand entries, and a
// change reaches it as fast as with one.
func TestTenThousandEntriesOnOneAgent(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	const n = 10_000
	before := live()
	start := time.Now()
	for from := 0; from < n; from += 100 {
		s.Apply(identities(from, from+100, func(i int) string { return fmt.Sprint("unix:uid:", 100_000+i) }))
	}
	t.Logf("%d Identities applied in %v", n, time.Since(start))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	self := fmt.Sprint("unix:uid:", os.Getuid())
	start = time.Now()
	s.Apply("kind: Identity\nname: me\nspiffeID: /me\nmatch: [\"" + self + "\"]\n")
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	svid, err := c.FetchX509SVID(ctx)
	if err != nil || svid.ID.Path() != "/me" {
		t.Fatal(svid, err)
	}
	t.Logf("one more entry to its SVID: %v; heap of CA and agent grew by %.1f MB", time.Since(start), float64(live()-before)/1e6)
	start = time.Now()
	if err := s.RestartAgent(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("restart of the agent until it holds all: %v", time.Since(start))
	start = time.Now()
	if err := s.RestartCA(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("restart of the CA: %v", time.Since(start))
}

// TestThousandStreams opens a thousand connections of workloads and counts how long a change takes to reach all.
func TestThousandStreams(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	self := fmt.Sprint("unix:uid:", os.Getuid())
	doc := "kind: Identity\nname: me\nspiffeID: /me\nmatch: [\"" + self + "\"]\n"
	s.Apply(doc)
	const n = 1000
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	before := live()
	sources := make([]*workloadapi.X509Source, n)
	start := time.Now()
	var wg sync.WaitGroup
	gate := make(chan struct{}, 64)
	for i := range n {
		wg.Go(func() {
			gate <- struct{}{}
			defer func() { <-gate }()
			src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
			if err != nil {
				t.Error(err)
				return
			}
			sources[i] = src
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	t.Logf("%d sources ready in %v; heap, clients included, grew by %.1f kB each", n, time.Since(start), float64(live()-before)/n/1e3)
	start = time.Now()
	s.Apply(strings.Replace(doc, "match:", "dnsNames: [new.internal]\nmatch:", 1))
	for _, src := range sources {
		for {
			svid, err := src.GetX509SVID()
			if err != nil {
				t.Fatal(err)
			}
			if slices.Contains(svid.Certificates[0].DNSNames, "new.internal") {
				break
			}
			select {
			case <-src.Updated():
			case <-ctx.Done():
				t.Fatal("not every source got the change")
			}
		}
	}
	t.Logf("a change reached all in %v", time.Since(start))
	for _, src := range sources {
		src.Close()
	}
}

// TestThousandAgents lets a thousand agents follow one CA and counts how long a policy change takes to reach all.
func TestThousandAgents(t *testing.T) {
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) { // they all have one address
		c.Limits.Attest.Rate, c.Limits.Connections.Rate = ca.Unlimited, ca.Unlimited
	}})
	const n = 1000
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s.Apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	admin := adminv1.NewAdminClient(s.AdminConn())
	streams := make([]nodev1.Node_FollowClient, n)
	before := live()
	start := time.Now()
	var wg sync.WaitGroup
	gate := make(chan struct{}, 16)
	for i := range n {
		wg.Go(func() {
			gate <- struct{}{}
			defer func() { <-gate }()
			tok, err := admin.CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{})
			if err != nil {
				t.Error(err)
				return
			}
			if streams[i], err = join(ctx, t, s.CAAddr(), tok.Token); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	t.Logf("%d agents attested and follow after %v; heap, clients included, grew by %.1f kB each", n, time.Since(start), float64(live()-before)/n/1e3)
	start = time.Now()
	s.Apply("kind: CallPolicy\nname: p\nservice: /web\nallow: [{from: [/caller]}]\n")
	for i := range n {
		wg.Go(func() {
			for {
				m, err := streams[i].Recv()
				if err != nil {
					t.Error(err)
					return
				}
				if len(m.Policies) > 0 {
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("a policy reached all in %v", time.Since(start))
}

// join attests and follows as an agent does, as far as the CA sees.
func join(ctx context.Context, t *testing.T, addr, token string) (nodev1.Node_FollowClient, error) {
	dial := func(certs ...tls.Certificate) (*grpc.ClientConn, error) {
		// Who the server is, is checked elsewhere.
		return grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: certs})))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	first, err := dial()
	if err != nil {
		return nil, err
	}
	defer first.Close()
	a, err := agentv1.NewAgentClient(first).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}}); err != nil {
		return nil, err
	}
	r, err := a.Recv()
	if err != nil {
		return nil, err
	}
	conn, err := dial(tls.Certificate{Certificate: r.GetResult().Svid.CertChain, PrivateKey: key})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	f, err := nodev1.NewNodeClient(conn).Follow(ctx)
	if err != nil {
		return nil, err
	}
	if err := f.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: &nodev1.FollowRequest_Hello{Format: 1}}}); err != nil {
		return nil, err
	}
	m, err := f.Recv()
	if err == nil && !m.Complete {
		err = fmt.Errorf("the first message is not complete")
	}
	return f, err
}
