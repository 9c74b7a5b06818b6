package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/cli"
)

// asSignet makes the test binary be the signet command, so that tests run real processes of this very tree.
const asSignet = "SIGNET_TEST_AS_SIGNET"

func TestMain(m *testing.M) {
	if os.Getenv(asSignet) != "" {
		ctx, stop := cliContext()
		code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	}
	goleak.VerifyTestMain(m)
}

// A process is a signet daemon that can be killed and started again on the same files.
type process struct {
	t    *testing.T
	args []string
	wrap []string // a command that runs it, such as unshare

	cmd *exec.Cmd
	out *tail
}

// tail keeps the end of what a process says.
type tail struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *tail) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *tail) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func (p *process) start() {
	p.t.Helper()
	args := append(slices.Clone(p.wrap), os.Args[0])
	args = append(args, p.args...)
	p.out = &tail{}
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Env = append(os.Environ(), asSignet+"=1")
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

// end sends a signal and waits.
func (p *process) end(sig syscall.Signal) error {
	if p.cmd == nil {
		return nil
	}
	p.cmd.Process.Signal(sig)
	err := p.cmd.Wait()
	p.cmd = nil
	return err
}

// A fleet is a CA and an agent as processes.
type fleet struct {
	t         *testing.T
	dir       string
	addr      string // where the agent dials
	ca, agent *process
	admin     *grpc.ClientConn
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &fleet{t: t, dir: dir, addr: freePort(t)}
	f.write("ca.yaml", fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s/ca\nadmin_socket: {path: %s/ca.sock}\nseal: {key_file: %s/seal.key, create: true}\naudit: {reserve_bytes: 2097152}\n", f.addr, dir, dir, dir))
	f.ca = &process{t: t, args: []string{"ca", "run", "--config", dir + "/ca.yaml"}}
	f.agent = &process{t: t, args: []string{"agent", "run", "--config", dir + "/agent.yaml"}}
	if f.admin, err = grpc.NewClient("unix://"+dir+"/ca.sock", grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.admin.Close()
		f.agent.end(syscall.SIGKILL)
		f.ca.end(syscall.SIGKILL)
		if t.Failed() {
			for name, p := range map[string]*process{"ca": f.ca, "agent": f.agent} {
				if p.out != nil {
					s := p.out.String()
					t.Logf("%s said:\n%s", name, s[max(0, len(s)-4000):])
				}
			}
		}
	})
	return f
}

func (f *fleet) write(name, content string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// token creates a join token once the CA answers, and configures the agent with it.
func (f *fleet) configureAgent(ctx context.Context, server string) {
	f.t.Helper()
	var tok *adminv1.CreateJoinTokenResponse
	if err := eventually(ctx, func() (err error) {
		tok, err = adminv1.NewAdminClient(f.admin).CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{})
		return err
	}); err != nil {
		f.t.Fatal(err)
	}
	f.write("token", tok.Token)
	f.write("agent.yaml", fmt.Sprintf("trust_domain: example.org\nserver_address: %s\ndata_dir: %s/agent\nsocket_path: %s/agent.sock\njoin_token_file: %s/token\n", server, f.dir, f.dir, f.dir))
}

func (f *fleet) up(ctx context.Context) {
	f.t.Helper()
	f.ca.start()
	f.configureAgent(ctx, f.addr)
	f.agent.start()
}

func (f *fleet) apply(ctx context.Context, docs string) {
	f.t.Helper()
	if err := eventually(ctx, func() error {
		_, err := adminv1.NewAdminClient(f.admin).Apply(ctx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(docs), File: "t.yaml"}}})
		return err
	}); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleet) endpoint() string { return "unix://" + f.dir + "/agent.sock" }

// ids fetches which SPIFFE IDs a new caller gets now.
func (f *fleet) ids(ctx context.Context) ([]string, error) {
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(f.endpoint()))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	svids, err := c.FetchX509SVIDs(ctx)
	var out []string
	for _, s := range svids {
		out = append(out, s.ID.Path())
	}
	return out, err
}

func (f *fleet) await(ctx context.Context, path string) {
	f.t.Helper()
	if err := eventually(ctx, func() error {
		ids, err := f.ids(ctx)
		if err == nil && !slices.Contains(ids, path) {
			err = fmt.Errorf("the caller has %v, not %s", ids, path)
		}
		return err
	}); err != nil {
		f.t.Fatal(err)
	}
}

func bounded(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// TestKilledCALosesNothingAcknowledged kills the CA at random moments under a load of new entries.
func TestKilledCALosesNothingAcknowledged(t *testing.T) {
	ctx := bounded(t, 90*time.Second)
	f := newFleet(t)
	f.up(ctx)
	f.apply(ctx, identity("web"))
	f.await(ctx, "/web")
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(f.endpoint())))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()

	var mu sync.Mutex
	var acked []string
	progress := make(chan struct{}) // told of an acknowledgement when somebody waits for one
	load, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := 0; load.Err() == nil; n++ {
				id := fmt.Sprintf("w%d-%d", w, n)
				r, err := entryv1.NewEntryClient(f.admin).BatchCreateEntry(load, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{Id: id,
					SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/" + id}, ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/n"},
					Selectors: []*types.Selector{{Type: "unix", Value: "uid:9"}}}}})
				if err == nil && r.Results[0].Status.Code == 0 {
					mu.Lock()
					acked = append(acked, id)
					mu.Unlock()
					select {
					case progress <- struct{}{}:
					default:
					}
				}
			}
		})
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for round := range 5 {
		for range 5 { // however slow the machine is, the kill hits a load
			select {
			case <-progress:
			case <-ctx.Done():
				t.Fatalf("round %d: nothing is acknowledged", round)
			}
		}
		pause := time.NewTimer(time.Duration(rnd.IntN(300)) * time.Millisecond)
		<-pause.C
		f.ca.end(syscall.SIGKILL)
		if _, err := src.GetX509SVID(); err != nil {
			t.Errorf("round %d: the workload lost its SVID: %v", round, err)
		}
		if ids, err := f.ids(ctx); err != nil || !slices.Equal(ids, []string{"/web"}) {
			t.Errorf("round %d: with the CA dead a caller gets %v, %v", round, ids, err)
		}
		f.ca.start()
	}
	f.apply(ctx, identity("late"))
	stop()
	wg.Wait()
	f.await(ctx, "/late") // the agent came back by itself
	for _, id := range acked {
		if _, err := entryv1.NewEntryClient(f.admin).GetEntry(ctx, &entryv1.GetEntryRequest{Id: id}); err != nil {
			t.Errorf("entry %s was acknowledged: %v", id, err)
		}
	}
	if len(acked) < 20 {
		t.Errorf("only %d entries were acknowledged: the load did not run", len(acked))
	}
}

// TestKilledAgentComesBackToItsWorkloads kills the agent; open sources keep their SVIDs and follow again.
func TestKilledAgentComesBackToItsWorkloads(t *testing.T) {
	ctx := bounded(t, 60*time.Second)
	f := newFleet(t)
	f.up(ctx)
	f.apply(ctx, identity("web"))
	f.await(ctx, "/web")
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(f.endpoint())),
		workloadapi.WithDefaultX509SVIDPicker(nil))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	first, _ := src.GetX509SVID()
	for round := range 3 {
		f.agent.end(syscall.SIGKILL)
		if svid, err := src.GetX509SVID(); err != nil || svid.ID != first.ID {
			t.Errorf("round %d: %v", round, err)
		}
		f.agent.start()
		f.await(ctx, "/web") // with the identity that it kept: its join token is used
		f.apply(ctx, strings.Replace(identity("web"), "match:", fmt.Sprintf("dnsNames: [r%d.internal]\nmatch:", round), 1))
		if err := eventually(ctx, func() error {
			svid, err := src.GetX509SVID()
			if err == nil && !slices.Contains(svid.Certificates[0].DNSNames, fmt.Sprintf("r%d.internal", round)) {
				err = errors.New("the open source still has the old SVID")
			}
			return err
		}); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
}

// TestWrongOrder starts the agent long before its CA.
func TestWrongOrder(t *testing.T) {
	ctx := bounded(t, 60*time.Second)
	f := newFleet(t)
	f.ca.start()
	f.configureAgent(ctx, f.addr)
	if err := f.ca.end(syscall.SIGTERM); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	f.agent.start()
	if err := eventually(ctx, func() error {
		if _, err := f.ids(ctx); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "sync") && !strings.Contains(err.Error(), "ready") {
			return fmt.Errorf("an agent that never synchronised answers %v, want Unavailable [WEP-25]", err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	f.ca.start()
	f.apply(ctx, identity("web"))
	f.await(ctx, "/web")
	for name, p := range map[string]*process{"agent": f.agent, "ca": f.ca} {
		start := time.Now()
		if err := p.end(syscall.SIGTERM); err != nil {
			t.Errorf("%s on SIGTERM: %v", name, err)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s took %v to end", name, took)
		}
	}
}

// A relay stands between agent and CA and can be cut.
type relay struct {
	l      net.Listener
	target string
	mu     sync.Mutex
	cut    bool
	conns  map[net.Conn]bool
	wg     sync.WaitGroup
}

func newRelay(t *testing.T, target string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{l: l, target: target, conns: map[net.Conn]bool{}}
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.carry(c) })
		}
	})
	t.Cleanup(func() { l.Close(); r.setCut(true); r.wg.Wait() })
	return r
}

func (r *relay) carry(c net.Conn) {
	defer c.Close()
	d, err := net.Dial("tcp", r.target)
	if err != nil {
		return
	}
	defer d.Close()
	r.mu.Lock()
	if r.cut {
		r.mu.Unlock()
		return
	}
	r.conns[c], r.conns[d] = true, true
	r.mu.Unlock()
	done := make(chan struct{}, 2)
	r.wg.Go(func() { io.Copy(c, d); c.Close(); done <- struct{}{} })
	r.wg.Go(func() { io.Copy(d, c); d.Close(); done <- struct{}{} })
	<-done
	<-done
	r.mu.Lock()
	delete(r.conns, c)
	delete(r.conns, d)
	r.mu.Unlock()
}

func (r *relay) setCut(cut bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = cut
	if cut {
		for c := range r.conns {
			c.Close()
		}
	}
}

// TestCutNetwork changes things while agent and CA cannot reach each other: nothing is lost, nothing is served that
// must not be once they can again.
func TestCutNetwork(t *testing.T) {
	ctx := bounded(t, 60*time.Second)
	f := newFleet(t)
	r := newRelay(t, f.addr)
	f.ca.start()
	f.configureAgent(ctx, r.l.Addr().String())
	f.agent.start()
	f.apply(ctx, identity("one")+identity("two"))
	f.await(ctx, "/two")
	for round := range 2 {
		r.setCut(true)
		if _, err := adminv1.NewAdminClient(f.admin).DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: "Identity", Name: "two", Yes: true}); err != nil {
			t.Fatal(err)
		}
		fresh := fmt.Sprint("fresh", round) // what no agent can have from before the cut
		f.apply(ctx, identity(fresh))
		if ids, err := f.ids(ctx); err != nil || !slices.Contains(ids, "/one") || slices.Contains(ids, "/"+fresh) {
			t.Errorf("during the cut: %v %v", ids, err)
		}
		r.setCut(false)
		f.await(ctx, "/"+fresh)
		if ids, err := f.ids(ctx); err != nil || slices.Contains(ids, "/two") {
			t.Errorf("after the cut: %v %v", ids, err)
		}
		f.apply(ctx, identity("two"))
		f.await(ctx, "/two")
	}
}

// TestReloadOnSIGHUP changes the configuration files of running daemons: what can be taken over is, what cannot is
// named, and no stream is dropped.
func TestReloadOnSIGHUP(t *testing.T) {
	ctx := bounded(t, 60*time.Second)
	f := newFleet(t)
	f.up(ctx)
	f.apply(ctx, identity("web"))
	f.await(ctx, "/web")
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(f.endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	w := &endings{updates: make(watcher, 16), errs: make(chan error, 16)}
	watching, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { client.WatchX509Context(watching, w) })
	defer wg.Wait()
	defer stop()
	<-w.updates
	edit := func(name, with string) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(f.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		f.write(name, string(b)+with)
	}
	edit("ca.yaml", "log: {level: debug}\njwt_issuer: https://issuer.example\n")
	edit("agent.yaml", "log: {level: debug}\nmax_prefetch: 7\n")
	for _, tt := range []struct {
		p     *process
		field string
	}{{f.ca, "jwt_issuer"}, {f.agent, "max_prefetch"}} {
		tt.p.cmd.Process.Signal(syscall.SIGHUP)
		if err := eventually(ctx, func() error {
			if out := tt.p.out.String(); !strings.Contains(out, tt.field) {
				return fmt.Errorf("%v does not name %s, which needs a restart: %s", tt.p.args, tt.field, out)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		f.write(filepath.Base(tt.p.args[3]), "trust_domain: [\n")
		before := len(tt.p.out.String())
		tt.p.cmd.Process.Signal(syscall.SIGHUP)
		if err := eventually(ctx, func() error {
			if out := tt.p.out.String(); !strings.Contains(out[before:], filepath.Base(tt.p.args[3])+":") {
				return fmt.Errorf("%v does not say what is wrong with its file: %s", tt.p.args, out[before:])
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	f.apply(ctx, identity("after"))
	for ids := range w.updates {
		if slices.Contains(ids, "/after") {
			break
		}
	}
	select {
	case err := <-w.errs:
		t.Errorf("the stream was dropped: %v", err)
	default:
	}
}

// endings also keeps the errors of a watch.
type endings struct {
	updates watcher
	errs    chan error
}

func (e *endings) OnX509ContextUpdate(c *workloadapi.X509Context) { e.updates.OnX509ContextUpdate(c) }
func (e *endings) OnX509ContextWatchError(err error)              { e.errs <- err }
