//go:build scale

package scale

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/tlsauthz"
	"github.com/signet-id/signet/test/signettest"
)

// followed is a source of policies that an agent's Follow stream keeps, as the agent and its workload's library would.
type followed struct {
	current atomic.Pointer[policy.Policies]
	mu      sync.Mutex
	readers map[chan struct{}]struct{}
}

func (f *followed) Policies() *policy.Policies { return f.current.Load() }

func (f *followed) Subscribe() (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readers[c] = struct{}{}
	return c, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.readers, c)
	}
}

func (f *followed) set(p *policy.Policies) {
	f.current.Store(p)
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.readers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// follow reads revocations until the stream ends.
func (f *followed) follow(stream nodev1.Node_FollowClient) {
	all := map[string]*policyv1.Revocation{}
	for {
		m, err := stream.Recv()
		if err != nil {
			return // the CA is gone: what is known stays
		}
		if len(m.GetRevocations())+len(m.GetRemovedRevocations()) == 0 {
			continue
		}
		for _, name := range m.GetRemovedRevocations() {
			delete(all, name)
		}
		set := &policyv1.RevocationSet{Revision: m.GetTo()}
		for _, r := range m.GetRevocations() {
			all[r.GetName()] = r
		}
		for _, r := range all {
			set.Revocations = append(set.Revocations, r)
		}
		p := f.Policies()
		f.set(p.WithRevocations(policy.CompileRevocations(set, p.TrustDomain())))
	}
}

// TestRevokeClosesTwoThousandConnections: 200 agents' Follow streams, ten TLS connections behind each; how long from the
// command to the end of each connection. The way from an agent to its workload over its socket is not in it.
func TestRevokeClosesTwoThousandConnections(t *testing.T) {
	const agents, each, rounds = 200, 10, 5
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Limits.Attest.Rate, c.Limits.Connections.Rate = ca.Unlimited, ca.Unlimited
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	self := fmt.Sprint("unix:uid:", os.Getuid())
	s.Apply(fmt.Sprintf("kind: Identity\nname: db\nspiffeID: /db\nmatch: [%q]\n---\nkind: Identity\nname: web\nspiffeID: /web\nmatch: [%q]\n", self, self))
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	x, err := c.FetchX509Context(ctx)
	if err != nil {
		t.Fatal(err)
	}
	svids := map[string]*x509svid.SVID{}
	for _, one := range x.SVIDs {
		svids[one.ID.Path()] = one
	}
	db, web := svids["/db"], svids["/web"]
	if db == nil || web == nil {
		t.Fatalf("SVIDs %v", svids)
	}
	set := &policyv1.PolicySet{Format: policy.Format, TrustDomain: db.ID.TrustDomain().Name(), Policies: []*policyv1.Policy{{Name: "db", Mode: policyv1.Mode_MODE_ENFORCE,
		Services: []string{db.ID.String()}, Rules: []*policyv1.Rule{{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{web.ID.String()}}}}}}
	compiled, err := policy.Compile(set)
	if err != nil {
		t.Fatal(err)
	}
	admin := adminv1.NewAdminClient(s.AdminConn())
	var setUp, following sync.WaitGroup
	addresses := make([]string, agents)
	gate := make(chan struct{}, 16)
	for i := range agents {
		setUp.Go(func() {
			gate <- struct{}{}
			defer func() { <-gate }()
			tok, err := admin.CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{})
			if err != nil {
				t.Error(err)
				return
			}
			stream, err := join(ctx, t, s.CAAddr(), tok.Token)
			if err != nil {
				t.Error(err)
				return
			}
			source := &followed{readers: map[chan struct{}]struct{}{}}
			source.set(compiled)
			following.Go(func() { source.follow(stream) })
			inner, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Error(err)
				return
			}
			l, err := tlsauthz.Listen(inner, tlsauthz.Config{Policies: source, Service: db.ID, Log: slog.New(slog.DiscardHandler)}, db, x.Bundles)
			if err != nil {
				t.Error(err)
				return
			}
			addresses[i] = l.Addr().String()
			t.Cleanup(func() { l.Close() })
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer conn.Close()
						if _, err := conn.Write([]byte("x")); err == nil {
							_, _ = io.Copy(io.Discard, conn)
						}
					}()
				}
			}()
		})
	}
	setUp.Wait()
	if t.Failed() {
		return
	}
	for round := range rounds {
		kill := round == rounds-1
		conns := make([]*tls.Conn, agents*each)
		for i := range conns {
			setUp.Go(func() {
				gate <- struct{}{}
				defer func() { <-gate }()
				for { // until the last round's revocation is gone here
					conn, err := tls.Dial("tcp", addresses[i/each], tlsconfig.MTLSClientConfig(web, x.Bundles, tlsconfig.AuthorizeID(db.ID)))
					if err == nil {
						if _, err = io.ReadFull(conn, make([]byte, 1)); err == nil {
							conns[i] = conn
							return
						}
						conn.Close()
					}
					select {
					case <-time.After(10 * time.Millisecond):
					case <-ctx.Done():
						t.Error(err)
						return
					}
				}
			})
		}
		setUp.Wait()
		if t.Failed() {
			return
		}
		took := make([]time.Duration, len(conns))
		start := time.Now()
		for i, conn := range conns {
			setUp.Go(func() {
				conn.SetReadDeadline(start.Add(time.Minute))
				_, err := conn.Read(make([]byte, 1))
				took[i] = time.Since(start)
				if err, ok := err.(net.Error); ok && err.Timeout() {
					t.Errorf("connection %d is open after a minute", i)
				}
				conn.Close()
			})
		}
		name := fmt.Sprint("r", round)
		s.Apply("kind: Revocation\nname: " + name + "\nid: /web\nreason: measured\n")
		committed := time.Since(start)
		if kill {
			if err := s.StopCA(); err != nil {
				t.Error(err)
			}
		}
		setUp.Wait()
		slices.Sort(took)
		t.Logf("round %d, CA stopped at once %t: command %v; of %d connections the first closed after %v, p50 %v, p99 %v, the last %v", round, kill,
			committed.Round(time.Millisecond), len(took), took[0].Round(time.Millisecond), took[len(took)/2].Round(time.Millisecond), took[len(took)*99/100].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
		if last := took[len(took)-1]; !kill && last > 30*time.Second {
			t.Errorf("the last connection closed after %v", last)
		}
		if !kill {
			s.Delete("Revocation", name)
		}
	}
	cancel()
	following.Wait()
}
