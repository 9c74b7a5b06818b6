// Package rotation rotates the authorities of a real CA under real agents and traffic that never stops, and counts what
// fails. `make rotation` does it with a hundred agents and fifty rotations of each kind; make test with a few.
package rotation

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/nodeattest"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/replicatest"
	"github.com/signet-id/signet/test/signettest"
)

const audience = "spiffe://example.org/audience"

// number reads a variable of the environment that makes the test larger.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%s is not a positive number", name, text)
	}
	return n
}

// A workload is one program on one node: it holds SVIDs from its agent's streams, calls its neighbour by mTLS, and has its
// neighbour validate its JWT-SVIDs.
type workload struct {
	x509 *workloadapi.X509Source
	jwt  *workloadapi.JWTSource

	handshakes, verifications atomic.Int64 // that worked
	rounds                    atomic.Int64
}

// authorityID is that of the authority that signed the workload's present SVID.
func (w *workload) authorityID() string {
	svid, err := w.x509.GetX509SVID()
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%x", svid.Certificates[0].AuthorityKeyId)
}

// call makes one mTLS connection from w to peer, with a byte each way, and has peer validate a JWT-SVID of w.
func (w *workload) call(ctx context.Context, peer *workload) error {
	if err := replicatest.Call(ctx, w.x509, peer.x509); err != nil {
		return fmt.Errorf("mTLS: %w", err)
	}
	w.handshakes.Add(1)
	svid, err := w.jwt.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return fmt.Errorf("fetching a JWT-SVID: %w", err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), peer.jwt, []string{audience}); err != nil {
		return fmt.Errorf("validating a JWT-SVID: %w", err)
	}
	w.verifications.Add(1)
	return nil
}

// TestJWT_32_RotationUnderTraffic: no handshake and no verification fails while authorities rotate, one after the
// other, prepared, activated, tainted and revoked, and every live agent moves to the next each time.
func TestJWT_32_RotationUnderTraffic(t *testing.T) {
	agents, rotations := number(t, "SIGNET_ROTATION_AGENTS", 5), number(t, "SIGNET_ROTATIONS", 2)
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Authorities.Rotate = "manual"
		c.Limits.Attest.Rate, c.Limits.Connections.Rate = ca.Unlimited, ca.Unlimited // they all have one address
	}, Log: slog.New(slog.DiscardHandler)})
	s.Apply(fmt.Sprintf("kind: Identity\nname: me\nspiffeID: /me\nmatch: [%q]\n", fmt.Sprint("unix:uid:", os.Getuid())))
	if err := s.StopAgent(); err != nil { // the others are enough
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	admin := adminv1.NewAdminClient(s.AdminConn())
	workloads := make([]*workload, agents)
	for i := range agents {
		workloads[i] = startNode(t, ctx, &running, s, admin)
	}
	forget(t, ctx, s, admin, agents)

	// Together two hundred calls a second, however many they are: what is measured is failures, not the machine.
	pause := time.Duration(agents) * 5 * time.Millisecond
	var failures atomic.Int64
	var first atomic.Pointer[error]
	for i, w := range workloads {
		running.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for ctx.Err() == nil {
				if err := w.call(ctx, workloads[(i+1)%len(workloads)]); err != nil && ctx.Err() == nil {
					failures.Add(1)
					first.CompareAndSwap(nil, &err)
				}
				w.rounds.Add(1)
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	began := time.Now()
	for n := range rotations {
		for _, kind := range []adminv1.AuthorityType{adminv1.AuthorityType_AUTHORITY_TYPE_X509, adminv1.AuthorityType_AUTHORITY_TYPE_JWT} {
			rotate(t, ctx, admin, kind, workloads)
			if t.Failed() {
				return
			}
		}
		if (n+1)%10 == 0 {
			t.Logf("%d rotations of each kind after %v, %d failures", n+1, time.Since(began).Round(time.Second), failures.Load())
		}
	}
	took := time.Since(began)
	cancel()
	running.Wait()
	var handshakes, verifications int64
	for i, w := range workloads {
		if w.handshakes.Load() == 0 || w.verifications.Load() == 0 {
			t.Errorf("workload %d made no traffic", i)
		}
		handshakes += w.handshakes.Load()
		verifications += w.verifications.Load()
	}
	t.Logf("%d agents, %d rotations of each kind in %v: %d handshakes and %d verifications, %d failed", agents, rotations, took.Round(time.Second), handshakes, verifications, failures.Load())
	if n := failures.Load(); n != 0 {
		t.Errorf("%d failed, the first: %v", n, *first.Load())
	}
}

// startNode starts an agent and a workload on it.
func startNode(t *testing.T, ctx context.Context, running *sync.WaitGroup, s *signettest.Signet, admin adminv1.AdminClient) *workload {
	t.Helper()
	dir, err := os.MkdirTemp("", "node") // short: a Unix socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	token, err := admin.CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(agent.Config{TrustDomain: s.TrustDomain().Name(), ServerAddress: s.CAAddr(), DataDir: filepath.Join(dir, "data"),
		SocketPath: filepath.Join(dir, "a.sock"), JoinToken: nodeattest.Secret(token.Token), Version: "test", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	running.Go(func() {
		if err := a.Run(ctx); err != nil {
			t.Errorf("agent: %v", err)
		}
	})
	select {
	case <-a.Ready():
	case <-time.After(time.Minute):
		t.Fatal("an agent did not become ready")
	}
	api := workloadapi.WithClientOptions(workloadapi.WithAddr(a.Addr()))
	w := &workload{}
	if w.x509, err = workloadapi.NewX509Source(ctx, api); err != nil {
		t.Fatal(err)
	}
	if w.jwt, err = workloadapi.NewJWTSource(ctx, api); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.x509.Close(); w.jwt.Close() })
	return w
}

// forget evicts the agent that signettest started and that is stopped: it would be waited for until its SVID ends.
func forget(t *testing.T, ctx context.Context, s *signettest.Signet, admin adminv1.AdminClient, want int) {
	t.Helper()
	list, err := admin.ListAgentStatus(ctx, &adminv1.ListAgentStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, st := range list.Agents {
		if st.Connected {
			left++
			continue
		}
		id, err := spiffeid.FromString(st.AgentId)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := agentv1.NewAgentClient(s.AdminConn()).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}}); err != nil {
			t.Fatal(err)
		}
	}
	if left != want {
		t.Fatalf("%d agents follow, want %d", left, want)
	}
}

// rotate takes one kind of authority through its whole life.
func rotate(t *testing.T, ctx context.Context, admin adminv1.AdminClient, kind adminv1.AuthorityType, workloads []*workload) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	before := find(t, ctx, admin, kind, "active")
	prepared, err := admin.PrepareAuthority(ctx, &adminv1.PrepareAuthorityRequest{Type: kind})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := admin.ActivateAuthority(ctx, &adminv1.ActivateAuthorityRequest{Type: kind, Id: prepared.Authority.Id, Wait: true})
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatalf("activating: %v", err)
	}
	if _, err := admin.TaintAuthority(ctx, &adminv1.EndAuthorityRequest{Type: kind, Id: before.Id}); err != nil {
		t.Fatalf("tainting: %v", err)
	}
	// Nobody needs it any more when no agent says that it does, and when what was on its way then has arrived.
	await(t, ctx, "the wave of "+before.Id, func() bool {
		old := find(t, ctx, admin, kind, "tainted")
		return old.AgentsUsing == 0 && (kind == adminv1.AuthorityType_AUTHORITY_TYPE_JWT || old.AgentsUnknown == 0)
	})
	if kind == adminv1.AuthorityType_AUTHORITY_TYPE_X509 {
		await(t, ctx, "the workloads' streams", func() bool {
			for _, w := range workloads {
				if w.authorityID() == before.Id {
					return false
				}
			}
			return true
		})
	}
	marks := make([]int64, len(workloads))
	for i, w := range workloads {
		marks[i] = w.rounds.Load()
	}
	await(t, ctx, "calls under way", func() bool {
		for i, w := range workloads {
			if w.rounds.Load() < marks[i]+2 {
				return false
			}
		}
		return true
	})
	if _, err := admin.RevokeAuthority(ctx, &adminv1.EndAuthorityRequest{Type: kind, Id: before.Id}); err != nil {
		t.Fatalf("revoking: %v", err)
	}
}

func find(t *testing.T, ctx context.Context, admin adminv1.AdminClient, kind adminv1.AuthorityType, state string) *adminv1.Authority {
	t.Helper()
	list, err := admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{Type: kind})
	if err != nil {
		t.Fatal(err)
	}
	var states []string
	for _, a := range list.Authorities {
		if a.State == state {
			return a
		}
		states = append(states, a.State)
	}
	t.Fatalf("no authority is %s; there are: %s", state, strings.Join(states, " "))
	return nil
}

// await looks again and again until done, or until ctx ends.
func await(t *testing.T, ctx context.Context, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, ctx.Err())
		}
	}
}

// TestStolenAuthorityNeedsNoPerson: after the revocation of a stolen active authority, agents and workloads have SVIDs of
// another one within seconds: those that were connected, and one that was away and knows only the authority that is gone.
func TestStolenAuthorityNeedsNoPerson(t *testing.T) {
	var again atomic.Bool
	s := signettest.Start(t, signettest.Config{Log: slog.New(slog.DiscardHandler), Agent: func(c *agent.Config) {
		if again.Load() { // nothing of what a person would have to bring
			c.JoinToken, c.JoinTokenFile, c.TrustBundlePath = "", "", ""
		}
	}})
	s.Apply(fmt.Sprintf("kind: Identity\nname: me\nspiffeID: /me\nmatch: [%q]\n", fmt.Sprint("unix:uid:", os.Getuid())))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	admin := adminv1.NewAdminClient(s.AdminConn())
	connected := startNode(t, ctx, &running, s, admin)
	if err := s.StopAgent(); err != nil { // this one is away
		t.Fatal(err)
	}
	for round := range 2 {
		stolen := find(t, ctx, admin, adminv1.AuthorityType_AUTHORITY_TYPE_X509, "active").Id
		if _, err := admin.RevokeAuthority(ctx, &adminv1.EndAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_X509, Id: stolen, Stolen: true}); err != nil {
			t.Fatal(err)
		}
		now := find(t, ctx, admin, adminv1.AuthorityType_AUTHORITY_TYPE_X509, "active").Id
		await(t, ctx, fmt.Sprintf("round %d: an SVID of the new authority", round), func() bool { return connected.authorityID() == now })
		bundle, err := connected.x509.GetX509BundleForTrustDomain(s.TrustDomain())
		if err != nil || len(bundle.X509Authorities()) != 1 {
			t.Errorf("round %d: the workload's bundle: %v %v", round, bundle, err)
		}
		if round == 0 {
			again.Store(true)
			if err := s.RestartAgent(ctx); err != nil { // with nothing but its data directory
				t.Fatalf("the agent that was away: %v", err)
			}
			src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
			if err != nil {
				t.Fatal(err)
			}
			defer src.Close()
			back := &workload{x509: src}
			await(t, ctx, "the SVID of the workload on the node that was away", func() bool { return back.authorityID() == now })
		}
	}
	await(t, ctx, "both agents to follow", func() bool {
		list, err := admin.ListAgentStatus(ctx, &adminv1.ListAgentStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, a := range list.Agents {
			if a.Connected {
				n++
			}
		}
		return n == 2
	})
}
