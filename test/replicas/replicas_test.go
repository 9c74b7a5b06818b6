// Package replicas runs CAs of several replicas, as processes on a real etcd, with agents and workloads on them, and kills what can be
// killed.
package replicas

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/nodeattest"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/test/etcdtest"
)

// asSignet makes the test binary be the signet command, so that tests run real processes of this very tree.
const asSignet = "SIGNET_TEST_AS_SIGNET"

func TestMain(m *testing.M) {
	if os.Getenv(asSignet) != "" {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	}
	goleak.VerifyTestMain(m)
}

// patience bounds what happens in its own time, generously: the machine may be busy.
const patience = 90 * time.Second

// A replica is one CA process, with a data directory of its own.
type replica struct {
	t     testing.TB
	name  string
	dir   string
	addr  string
	conn  *grpc.ClientConn
	admin adminv1.AdminClient

	mu  sync.Mutex // guards all below
	cmd *exec.Cmd
	out *said
}

// said keeps what a process said.
type said struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *said) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *said) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// A fleet is an etcd, the replicas on it, and one address in front of them.
type fleet struct {
	t        testing.TB
	etcd     *etcdtest.Cluster // nil: one replica with a file
	dir      string
	replicas []*replica
	front    *front
	running  sync.WaitGroup
	ctx      context.Context
}

// newFleet starts n replicas on an etcd, or one with a file if the etcd is nil. more is added to their configuration.
func newFleet(t testing.TB, cluster *etcdtest.Cluster, n int, more string) *fleet {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet") // short: a Unix socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &fleet{t: t, etcd: cluster, dir: dir, ctx: ctx}
	t.Cleanup(func() {
		cancel()
		f.running.Wait()
		if f.front != nil {
			f.front.close()
		}
		for _, r := range f.replicas {
			r.end(syscall.SIGKILL)
			r.conn.Close()
			if t.Failed() {
				s := r.out.String()
				t.Logf("%s said:\n%s", r.name, s[max(0, len(s)-3000):])
			}
		}
		os.RemoveAll(dir)
	})
	key := make([]byte, 32)
	rand.Read(key)
	if err := os.WriteFile(filepath.Join(dir, "seal.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		r := &replica{t: t, name: fmt.Sprintf("ca%d", i), addr: freeAddress(t), out: &said{}}
		r.dir = filepath.Join(dir, r.name)
		store := ""
		if cluster != nil {
			store = "store: {etcd: {endpoints: ["
			for _, e := range cluster.Endpoints() {
				store += e + ", "
			}
			store += "], timeout: 2s}}\n"
		}
		config := fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s/data\nadmin_socket: {path: %s/ca.sock}\nseal: {key_file: %s/seal.key}\naudit: {reserve_bytes: 1048576}\nlimits: {attest: {rate: -1}, connections: {rate: -1}}\n%s%s",
			r.addr, r.dir, r.dir, dir, store, more)
		if err := os.Mkdir(r.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(r.dir, "ca.yaml"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		if r.conn, err = grpc.NewClient("unix://"+r.dir+"/ca.sock", grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
			t.Fatal(err)
		}
		r.admin = adminv1.NewAdminClient(r.conn)
		f.replicas = append(f.replicas, r)
	}
	for _, r := range f.replicas {
		r.start()
	}
	for _, r := range f.replicas {
		r.answers()
	}
	f.front = newFront(t, f.replicas)
	return f
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (r *replica) start() {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cmd = exec.Command(os.Args[0], "ca", "run", "--config", filepath.Join(r.dir, "ca.yaml"))
	r.cmd.Env = append(os.Environ(), asSignet+"=1")
	r.cmd.Stdout, r.cmd.Stderr = r.out, r.out
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
}

// end sends a signal and waits for the process's end.
func (r *replica) end(sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Signal(sig)
	_ = r.cmd.Wait()
	r.cmd = nil
}

// answers waits until the replica's admin socket answers.
func (r *replica) answers() {
	r.t.Helper()
	eventually(r.t, r.name+" to answer", func() error {
		_, err := r.admin.GetStatus(r.t.Context(), &adminv1.GetStatusRequest{})
		return err
	})
}

// eventually tries until f succeeds.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("waiting for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

// apply applies documents at a replica until it is acknowledged.
func (r *replica) apply(docs string) {
	r.t.Helper()
	eventually(r.t, "an apply at "+r.name, func() error {
		_, err := r.admin.Apply(r.t.Context(), &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(docs), File: "t.yaml"}}})
		if code := status.Code(err); err != nil && code != codes.Unavailable && code != codes.Aborted && code != codes.DeadlineExceeded {
			r.t.Fatalf("apply at %s: %v", r.name, err)
		}
		return err
	})
}

func (r *replica) token() nodeattest.Secret {
	r.t.Helper()
	var token *adminv1.CreateJoinTokenResponse
	eventually(r.t, "a token of "+r.name, func() (err error) {
		token, err = r.admin.CreateJoinToken(r.t.Context(), &adminv1.CreateJoinTokenRequest{})
		return err
	})
	return nodeattest.Secret(token.Token)
}

// front is what a load balancer is: each new connection goes to the next replica that takes it, and stays there.
type front struct {
	l       net.Listener
	targets []*replica
	next    atomic.Int64
	wg      sync.WaitGroup
	mu      sync.Mutex // guards conns and closed
	conns   map[net.Conn]struct{}
	closed  bool
}

func newFront(t testing.TB, targets []*replica) *front {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &front{l: l, targets: targets, conns: map[net.Conn]struct{}{}}
	f.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.wg.Go(func() { f.serve(c) })
		}
	})
	return f
}

func (f *front) addr() string { return f.l.Addr().String() }

func (f *front) keep(c net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		c.Close()
		return false
	}
	f.conns[c] = struct{}{}
	return true
}

func (f *front) drop(c net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
	c.Close()
}

func (f *front) serve(c net.Conn) {
	if !f.keep(c) {
		return
	}
	defer f.drop(c)
	for range f.targets {
		target := f.targets[int(f.next.Add(1))%len(f.targets)]
		up, err := net.DialTimeout("tcp", target.addr, time.Second)
		if err != nil {
			continue
		}
		if !f.keep(up) {
			return
		}
		var both sync.WaitGroup
		both.Go(func() { io.Copy(up, c); f.drop(up); c.Close() })
		both.Go(func() { io.Copy(c, up); f.drop(up); c.Close() })
		both.Wait()
		return
	}
}

func (f *front) close() {
	f.l.Close()
	f.mu.Lock()
	f.closed = true
	for c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.wg.Wait()
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
	dir, err := os.MkdirTemp(f.dir, "n")
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

// call makes one mTLS connection from n to peer, with a byte each way.
func (n *node) call(ctx context.Context, peer *node) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer raw.Close()
		conn := tls.Server(raw, tlsconfig.MTLSServerConfig(peer.x509, peer.x509, tlsconfig.AuthorizeAny()))
		_, err = io.CopyN(conn, conn, 1)
		served <- err
	}()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		l.Close()
		<-served
		return err
	}
	conn := tls.Client(raw, tlsconfig.MTLSClientConfig(n.x509, n.x509, tlsconfig.AuthorizeAny()))
	_, err = conn.Write([]byte{7})
	if err == nil {
		_, err = io.ReadFull(conn, make([]byte, 1))
	}
	raw.Close()
	return errors.Join(err, <-served)
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
				if err := n.call(ctx, nodes[(i+1)%len(nodes)]); err != nil && ctx.Err() == nil {
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
