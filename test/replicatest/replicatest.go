// Package replicatest runs CAs of several replicas for tests: processes of this very tree, each with a data directory of its own, that can
// be killed, stopped and woken up, and one address in front of them. Only tests import it.
package replicatest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/nodeattest"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/test/etcdtest"
)

// AsSignet is the variable of the environment that makes a test binary be the signet command.
const AsSignet = "SIGNET_TEST_AS_SIGNET"

// MaySignet ends the process as the signet command if it was started as that. Each TestMain calls it first.
func MaySignet() {
	if os.Getenv(AsSignet) == "" {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Patience bounds what happens in its own time, generously: the machine may be busy.
const Patience = 90 * time.Second

// A Replica is one CA process, with a data directory of its own.
type Replica struct {
	t     testing.TB
	Name  string
	Dir   string
	Addr  string // where agents reach it
	Conn  *grpc.ClientConn
	Admin adminv1.AdminClient
	// Under is a command, with arguments, that is run with the replica's as its further arguments, and becomes it.
	Under []string

	mu  sync.Mutex // guards all below
	cmd *exec.Cmd
	Out *said
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

// A Fleet is some replicas, and one address in front of them.
type Fleet struct {
	Dir      string
	Replicas []*Replica
	Front    *Front
}

// Config says what runs.
type Config struct {
	// Etcd is what the replicas share; nil: one replica with a file.
	Etcd *etcdtest.Cluster
	// Replicas is their number.
	Replicas int
	// More returns what is added to a replica's configuration. Nil: nothing is.
	More func(i int) string
}

// Start starts the replicas, which end with the test, and returns when all answer.
func Start(t testing.TB, c Config) *Fleet {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet") // short: a Unix socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	f := &Fleet{Dir: dir}
	t.Cleanup(func() { os.RemoveAll(dir) })
	key := make([]byte, 32)
	rand.Read(key)
	if err := os.WriteFile(filepath.Join(dir, "seal.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range c.Replicas {
		name, addr := fmt.Sprintf("ca%d", i), FreeAddress(t)
		own := filepath.Join(dir, name)
		store := ""
		if c.Etcd != nil {
			store = "store: {etcd: {endpoints: ["
			for _, e := range c.Etcd.Endpoints() {
				store += e + ", "
			}
			store += "], timeout: 2s}}\n"
		}
		more := ""
		if c.More != nil {
			more = c.More(i)
		}
		config := fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s/data\nadmin_socket: {path: %s/ca.sock}\nseal: {key_file: %s/seal.key}\naudit: {reserve_bytes: 1048576}\nlimits: {attest: {rate: -1}, connections: {rate: -1}}\n%s%s",
			addr, own, own, dir, store, more)
		f.Replicas = append(f.Replicas, New(t, name, own, addr, config))
	}
	for _, r := range f.Replicas {
		r.Start()
	}
	for _, r := range f.Replicas {
		r.Answers()
	}
	f.Front = newFront(t, f.Replicas)
	t.Cleanup(f.Front.close)
	return f
}

// New returns a CA that has not been started. Its configuration names dir/ca.sock as its admin socket. It ends with the test.
func New(t testing.TB, name, dir, addr, config string) *Replica {
	t.Helper()
	r := &Replica{t: t, Name: name, Dir: dir, Addr: addr, Out: &said{}}
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "ca.yaml"), []byte(config), 0o600)
	}
	if err == nil {
		r.Conn, err = grpc.NewClient("unix://"+dir+"/ca.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if err != nil {
		t.Fatal(err)
	}
	r.Admin = adminv1.NewAdminClient(r.Conn)
	t.Cleanup(func() {
		r.End(syscall.SIGKILL)
		r.Conn.Close()
		if t.Failed() {
			s := r.Out.String()
			t.Logf("%s said:\n%s", name, s[max(0, len(s)-6000):])
		}
	})
	return r
}

// FreeAddress is one of this machine on which nobody listens.
func FreeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Start starts the process.
func (r *Replica) Start() {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	args := append(slices.Clone(r.Under), os.Args[0], "ca", "run", "--config", filepath.Join(r.Dir, "ca.yaml"))
	r.cmd = exec.Command(args[0], args[1:]...)
	r.cmd.Env = append(os.Environ(), AsSignet+"=1")
	r.cmd.Stdout, r.cmd.Stderr = r.Out, r.Out
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
}

// End sends a signal and waits for the process's end.
func (r *Replica) End(sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Signal(sig)
	_ = r.cmd.Wait()
	r.cmd = nil
}

// Answers waits until the replica's admin socket answers.
func (r *Replica) Answers() {
	r.t.Helper()
	r.Conn.ResetConnectBackoff()
	Eventually(r.t, r.Name+" to answer", func() error {
		_, err := r.Admin.GetStatus(r.t.Context(), &adminv1.GetStatusRequest{})
		return err
	})
}

// Signal sends a signal that does not end it.
func (r *Replica) Signal(sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cmd != nil {
		_ = r.cmd.Process.Signal(sig)
	}
}

// PID is that of the process.
func (r *Replica) PID() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cmd.Process.Pid
}

// Eventually tries until f succeeds.
func Eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.NewTimer(Patience)
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

// Apply applies documents at a replica until it is acknowledged.
func (r *Replica) Apply(docs string) {
	r.t.Helper()
	Eventually(r.t, "an apply at "+r.Name, func() error {
		_, err := r.Admin.Apply(r.t.Context(), &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(docs), File: "t.yaml"}}})
		if code := status.Code(err); err != nil && code != codes.Unavailable && code != codes.Aborted && code != codes.DeadlineExceeded {
			r.t.Fatalf("apply at %s: %v", r.Name, err)
		}
		return err
	})
}

// Token returns a join token of the replica's.
func (r *Replica) Token() nodeattest.Secret {
	r.t.Helper()
	var token *adminv1.CreateJoinTokenResponse
	Eventually(r.t, "a token of "+r.Name, func() (err error) {
		token, err = r.Admin.CreateJoinToken(r.t.Context(), &adminv1.CreateJoinTokenRequest{})
		return err
	})
	return nodeattest.Secret(token.Token)
}

// A Front is what a load balancer is: each new connection goes to the next replica that takes it, and stays there.
type Front struct {
	l       net.Listener
	targets []*Replica
	next    atomic.Int64
	only    atomic.Pointer[Replica]
	wg      sync.WaitGroup
	mu      sync.Mutex // guards conns and closed
	conns   map[net.Conn]struct{}
	closed  bool
}

func newFront(t testing.TB, targets []*Replica) *Front {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &Front{l: l, targets: targets, conns: map[net.Conn]struct{}{}}
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

func (f *Front) Addr() string { return f.l.Addr().String() }

func (f *Front) keep(c net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		c.Close()
		return false
	}
	f.conns[c] = struct{}{}
	return true
}

func (f *Front) drop(c net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
	c.Close()
}

func (f *Front) serve(c net.Conn) {
	if !f.keep(c) {
		return
	}
	defer f.drop(c)
	for range f.targets {
		target := f.targets[int(f.next.Add(1))%len(f.targets)]
		if only := f.only.Load(); only != nil {
			target = only
		}
		up, err := net.DialTimeout("tcp", target.Addr, time.Second)
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

// Cut breaks all connections, so that whoever had one comes again, to the next replica.
func (f *Front) Cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
}

// To has new connections go to r alone, and breaks those that there are.
func (f *Front) To(r *Replica) {
	f.only.Store(r)
	f.Cut()
}

func (f *Front) close() {
	f.l.Close()
	f.mu.Lock()
	f.closed = true
	for c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.wg.Wait()
}

// Call makes one mTLS connection from one workload to another, with a byte each way.
func Call(ctx context.Context, from, to *workloadapi.X509Source) error {
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
		conn := tls.Server(raw, tlsconfig.MTLSServerConfig(to, to, tlsconfig.AuthorizeAny()))
		_, err = io.CopyN(conn, conn, 1)
		served <- err
	}()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		l.Close()
		<-served
		return err
	}
	conn := tls.Client(raw, tlsconfig.MTLSClientConfig(from, from, tlsconfig.AuthorizeAny()))
	_, err = conn.Write([]byte{7})
	if err == nil {
		_, err = io.ReadFull(conn, make([]byte, 1))
	}
	raw.Close()
	return errors.Join(err, <-served)
}

// Ended waits until the process has ended by itself.
func (r *Replica) Ended() {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	gone := make(chan struct{})
	go func() { _ = r.cmd.Wait(); close(gone) }()
	select {
	case <-gone:
	case <-time.After(Patience):
		_ = r.cmd.Process.Kill()
		<-gone
		r.t.Errorf("%s goes on", r.Name)
	}
	r.cmd = nil
}
