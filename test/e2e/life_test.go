package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	serveragentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
)

// A span is a CA and an agent whose clock can be moved.
type span struct {
	*dev.Instance
	t      *testing.T
	ctx    context.Context
	offset atomic.Int64
	config *agent.Config // the agent's, as it was started last
}

func newSpan(t *testing.T) *span {
	t.Helper()
	l := &span{t: t, ctx: bounded(t, 100*time.Second)}
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// The authorities are older than what the tests' clocks do, as those of a running trust domain are.
	l.offset.Store(int64(-24 * time.Hour))
	c := dev.Config{Dir: dir, Now: l.now, CA: func(c *ca.Config) { c.Audit.Reserve = 1 << 20 }, Agent: func(c *agent.Config) {
		// The token that comes with each start is not for these tests: a node has one once.
		own := filepath.Join(dir, "node.token")
		if _, err := os.Stat(own); err != nil {
			if err := os.Rename(c.JoinTokenFile, own); err != nil {
				t.Error(err)
			}
		}
		c.Metrics.Listen, c.JoinTokenFile, l.config = "127.0.0.1:0", own, c
	}}
	if l.Instance, err = dev.Start(l.ctx, c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	l.offset.Store(0)
	l.admin(func(c *grpc.ClientConn) error {
		_, err := adminv1.NewAdminClient(c).Apply(l.ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(identity("web")), File: "t.yaml"}}})
		return err
	})
	return l
}

func (l *span) now() time.Time { return time.Now().Add(time.Duration(l.offset.Load())) }

// admin calls the CA as its admin.
func (l *span) admin(f func(*grpc.ClientConn) error) {
	l.t.Helper()
	conn, err := l.Admin()
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	if err := f(conn); err != nil {
		l.t.Fatal(err)
	}
}

func (l *span) agentAct(f func(serveragentv1.AgentClient, *types.SPIFFEID) error) {
	l.t.Helper()
	id := l.Agent().Status().ID
	l.admin(func(c *grpc.ClientConn) error {
		return f(serveragentv1.NewAgentClient(c), &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()})
	})
}

// shows waits until the agent is in the state, by all the ways in which it can be asked, and ready or not.
func (l *span) shows(state agent.State, ready bool) {
	l.t.Helper()
	conn, err := grpc.NewClient("unix://"+l.AgentAdminSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	web := func(path string) (int, string, error) {
		req, err := http.NewRequestWithContext(l.ctx, http.MethodGet, "http://"+l.Agent().MetricsAddr().String()+path, nil)
		if err != nil {
			return 0, "", err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body), err
	}
	err = eventually(l.ctx, func() error {
		s, err := agentv1.NewAgentClient(conn).GetStatus(l.ctx, &agentv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		if s.GetState() != string(state) || (s.GetNotReady() == "") != ready {
			return fmt.Errorf("signet agent status: %q (%s), not ready: %q", s.GetState(), s.GetDetail(), s.GetNotReady())
		}
		code, body, err := web("/ready")
		if err != nil || (code == http.StatusOK) != ready {
			return errors.Join(err, fmt.Errorf("/ready: %d %s", code, body))
		}
		_, body, err = web("/metrics")
		if err != nil || !strings.Contains(body, fmt.Sprintf("signet_agent_state{state=%q} 1\n", state)) || strings.Count(body, "signet_agent_state{") != 6 {
			return errors.Join(err, fmt.Errorf("/metrics does not say %q", state))
		}
		return nil
	})
	if err != nil {
		l.t.Fatalf("want %q, ready %t: %v", state, ready, err)
	}
}

// served says that the workload has an SVID that is valid now.
func (l *span) served() {
	l.t.Helper()
	err := eventually(l.ctx, func() error {
		svid, err := workloadapi.FetchX509SVID(l.ctx, workloadapi.WithAddr(l.WorkloadAPI()))
		if err != nil {
			return err
		}
		if leaf := svid.Certificates[0]; l.now().Before(leaf.NotBefore) || !l.now().Before(leaf.NotAfter) {
			return fmt.Errorf("valid from %v to %v, and it is %v", leaf.NotBefore, leaf.NotAfter, l.now())
		}
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// TestEveryStateShowsAndHasAWayBack takes one agent through all that can happen to it. Status, health and metrics say the
// same at each step, and the workload is served at the end of each.
func TestEveryStateShowsAndHasAWayBack(t *testing.T) {
	t.Parallel() // a banned agent asks every half a minute
	l := newSpan(t)
	l.shows(agent.InSync, true)
	l.served()

	if err := l.StopCA(); err != nil {
		t.Fatal(err)
	}
	l.shows(agent.Connecting, true)
	l.served()
	if err := l.RestartCA(l.ctx); err != nil {
		t.Fatal(err)
	}
	l.shows(agent.InSync, true)

	l.agentAct(func(c serveragentv1.AgentClient, id *types.SPIFFEID) error {
		_, err := c.BanAgent(l.ctx, &serveragentv1.BanAgentRequest{Id: id})
		return err
	})
	l.shows(agent.Banned, false)
	l.served() // what it holds, until it ends
	id := l.Agent().Status().ID.String()
	l.admin(func(c *grpc.ClientConn) error {
		_, err := adminv1.NewAdminClient(c).UnbanAgent(l.ctx, &adminv1.UnbanAgentRequest{AgentId: id})
		return err
	})
	l.shows(agent.InSync, true)
	l.served()

	// Evicted, and its token is used up: an operator gives another. Until then it serves what it holds.
	l.agentAct(func(c serveragentv1.AgentClient, id *types.SPIFFEID) error {
		_, err := c.DeleteAgent(l.ctx, &serveragentv1.DeleteAgentRequest{Id: id})
		return err
	})
	l.shows(agent.Refused, true)
	l.served()
	l.admin(func(c *grpc.ClientConn) error {
		r, err := adminv1.NewAdminClient(c).CreateJoinToken(l.ctx, &adminv1.CreateJoinTokenRequest{})
		if err != nil {
			return err
		}
		return os.WriteFile(l.config.JoinTokenFile, []byte(r.GetToken()), 0o600)
	})
	if _, err := l.Agent().Reload(*l.config); err != nil { // SIGHUP
		t.Fatal(err)
	}
	l.shows(agent.InSync, true)
	l.served()
}

// TestAsleepForThreeDays: node and CA wake up with everything expired but the authorities. No person is needed.
func TestAsleepForThreeDays(t *testing.T) {
	t.Parallel()
	l := newSpan(t)
	l.served()
	for _, restart := range []bool{false, true} {
		if restart {
			if err := l.StopAgent(); err != nil {
				t.Fatal(err)
			}
		}
		l.offset.Add(int64(72 * time.Hour))
		if restart {
			if err := l.RestartAgent(l.ctx); err != nil {
				t.Fatal(err)
			}
		}
		l.served()
		l.shows(agent.InSync, true)
	}
}
