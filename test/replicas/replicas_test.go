// Package replicas runs CAs of several replicas, as processes on a real etcd, with agents and workloads on them, and kills what can be
// killed.
package replicas

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/test/etcdtest"
	"github.com/signet-id/signet/test/replicatest"
)

func TestMain(m *testing.M) {
	replicatest.MaySignet()
	goleak.VerifyTestMain(m)
}

// patience bounds what happens in its own time, generously: the machine may be busy.
const patience = replicatest.Patience

type replica = replicatest.Replica

var eventually = replicatest.Eventually

// A fleet is some replicas with agents and workloads on them.
type fleet struct {
	*replicatest.Fleet
	t       testing.TB
	running sync.WaitGroup
	ctx     context.Context
}

// newFleet starts n replicas on an etcd, or one with a file if the etcd is nil. more is added to their configuration.
func newFleet(t testing.TB, cluster *etcdtest.Cluster, n int, more string) *fleet {
	t.Helper()
	f := &fleet{t: t, Fleet: replicatest.Start(t, replicatest.Config{Etcd: cluster, Replicas: n, More: func(int) string { return more }})}
	ctx, cancel := context.WithCancel(context.Background())
	f.ctx = ctx
	t.Cleanup(func() {
		cancel()
		f.running.Wait()
	})
	return f
}

// A node is an agent with a workload on it.
type node struct {
	id    spiffeid.ID // the workload's
	agent *agent.Agent
	x509  *workloadapi.X509Source

	calls, failed atomic.Int64
	first         atomic.Pointer[error]
}

// identity is the document that every workload of these tests has.
func identity() string {
	return fmt.Sprintf("kind: Identity\nname: me\nspiffeID: /me\nmatch: [%q]\n", fmt.Sprint("unix:uid:", os.Getuid()))
}

// newAgent makes an agent that talks to address.
func (f *fleet) newAgent(address string, token nodeattest.Secret) *agent.Agent {
	f.t.Helper()
	dir, err := os.MkdirTemp(f.Dir, "n")
	if err != nil {
		f.t.Fatal(err)
	}
	a, err := agent.New(agent.Config{TrustDomain: "example.org", ServerAddress: address, DataDir: filepath.Join(dir, "data"),
		SocketPath: filepath.Join(dir, "a.sock"), JoinToken: token, Version: "test", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.t.Fatal(err)
	}
	return a
}

// node starts an agent and a workload on it.
func (f *fleet) node(address string, token nodeattest.Secret) *node {
	f.t.Helper()
	n := &node{agent: f.newAgent(address, token)}
	f.running.Go(func() {
		if err := n.agent.Run(f.ctx); err != nil {
			f.t.Errorf("agent: %v", err)
		}
	})
	select {
	case <-n.agent.Ready():
	case <-time.After(patience):
		f.t.Fatal("an agent did not become ready")
	}
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	var err error
	if n.x509, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(n.agent.Addr()))); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { n.x509.Close() })
	svid, err := n.x509.GetX509SVID()
	if err != nil {
		f.t.Fatal(err)
	}
	n.id = svid.ID
	return n
}

// ids fetches the IDs of a new caller at the agent.
func (n *node) ids(ctx context.Context) (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr(n.agent.Addr()))
	out := map[string]bool{}
	for _, s := range svids {
		out[s.ID.Path()] = true
	}
	return out, err
}

// traffic has every node call its neighbour, again and again, until the returned function is called, which fails the test for each call
// that failed.
func (f *fleet) traffic(nodes []*node) (stop func()) {
	ctx, cancel := context.WithCancel(f.ctx)
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for ctx.Err() == nil {
				if err := replicatest.Call(ctx, n.x509, nodes[(i+1)%len(nodes)].x509); err != nil && ctx.Err() == nil {
					n.failed.Add(1)
					n.first.CompareAndSwap(nil, &err)
				}
				n.calls.Add(1)
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	return func() {
		f.t.Helper()
		cancel()
		wg.Wait()
		var calls int64
		for i, n := range nodes {
			calls += n.calls.Load()
			if n.calls.Load() == 0 {
				f.t.Errorf("workload %d made no call", i)
			}
			if bad := n.failed.Load(); bad > 0 {
				f.t.Errorf("%d calls of workload %d failed, the first: %v", bad, i, *n.first.Load())
			}
		}
		f.t.Logf("%d mTLS calls of workloads", calls)
	}
}
