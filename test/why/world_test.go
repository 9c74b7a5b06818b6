// Package why holds the corpus of broken set-ups: each is really built, with a real CA, a real agent and real processes,
// and "signet why" must name its cause.
package why

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	agentapi "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/nodeattest"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/internal/dev"
	"github.com/signet-id/signet/internal/why"
)

// eventually bounds whatever a set-up waits for.
const eventually = 20 * time.Second

// A world is one CA with one agent, and the processes on its node.
type world struct {
	*testing.T
	*dev.Instance
	dir        string
	offset     atomic.Int64 // of the clock of CA, agent and who asks
	skew       atomic.Int64 // of the agent's alone
	noCA       bool         // whoever asks cannot reach the CA
	noAgent    bool         // nor the agent
	config     agent.Config // of the agent
	kubeconfig string       // of its cluster, if there is one
}

// A maker changes what a world begins with.
type maker struct {
	CA    func(*ca.Config)
	Agent func(*agent.Config)
	// Groups are the node's.
	Groups []string
	// World makes what the others need.
	World   func(*world)
	CAOf    func(*world, *ca.Config)
	AgentOf func(*world, *agent.Config)
}

func newWorld(t *testing.T, m maker) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "why")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{T: t, dir: dir}
	if m.World != nil {
		m.World(w)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*eventually)
	defer cancel()
	w.Instance, err = dev.Start(ctx, dev.Config{
		Dir: filepath.Join(dir, "d"), NodeGroups: m.Groups, Now: w.now,
		CA: func(c *ca.Config) {
			c.Audit.Reserve = 1 << 20
			if m.CA != nil {
				m.CA(c)
			}
			if m.CAOf != nil {
				m.CAOf(w, c)
			}
		},
		Agent: func(c *agent.Config) {
			c.RegistrationWait = 20 * time.Millisecond
			c.Now = func() time.Time { return w.now().Add(time.Duration(w.skew.Load())) }
			if m.Agent != nil {
				m.Agent(c)
			}
			if m.AgentOf != nil {
				m.AgentOf(w, c)
			}
			w.config = *c
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	for _, d := range []string{dir, filepath.Join(dir, "d")} { // the agent's socket is for all users
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// startAlone starts the agent with another configuration, and does not wait for its CA.
func (w *world) startAlone(change func(*agent.Config)) {
	w.Helper()
	if err := w.StopAgent(); err != nil {
		w.Fatal(err)
	}
	c := w.config
	change(&c)
	a, err := agent.New(c)
	if err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	w.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.Errorf("the agent: %v", err)
		}
	})
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.offset.Load())) }

// dial dials a Unix socket.
func (w *world) dial(path string) *grpc.ClientConn {
	w.Helper()
	c, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		w.Fatal(err)
	}
	return c
}

// conn dials a Unix socket until the end of the test.
func (w *world) conn(path string) *grpc.ClientConn {
	w.Helper()
	c := w.dial(path)
	w.Cleanup(func() { c.Close() })
	return c
}

// ask is "signet why" without its printing.
func (w *world) ask(target why.Target) *why.Answer {
	w.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), eventually)
	defer cancel()
	var caConn grpc.ClientConnInterface
	err := fmt.Errorf("nobody may ask the CA here")
	if !w.noCA {
		caConn, err = w.conn(w.CASocket()), nil
	}
	var local agentv1.AgentClient
	if !w.noAgent {
		local = agentv1.NewAgentClient(w.conn(w.AgentAdminSocket()))
	}
	answer, err := why.Ask(ctx, local, caConn, err, target, w.now())
	if err != nil {
		w.Fatalf("asking: %v", err)
	}
	return answer
}

// status is how the agent is.
func (w *world) status() *agentv1.GetStatusResponse {
	w.Helper()
	conn := w.dial(w.AgentAdminSocket())
	defer conn.Close()
	s, err := agentv1.NewAgentClient(conn).GetStatus(context.Background(), &agentv1.GetStatusRequest{})
	if err != nil {
		w.Fatal(err)
	}
	return s
}

func (w *world) agentID() string { return w.status().GetId() }

// until waits for what ok says.
func (w *world) until(what string, ok func() bool) {
	w.Helper()
	deadline := time.After(eventually)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			w.Fatalf("%s did not come about; the agent is %v", what, w.status())
		}
	}
}

// An entrySpec is a registration entry that a set-up makes.
type entrySpec struct {
	id, spiffeID, parent, hint string
	selectors, federates       []string
	ttl                        time.Duration
	expires                    time.Duration // from now
	admin, downstream          bool
}

// entry makes an entry, for this node unless parent says otherwise, and waits until the agent has it.
func (w *world) entry(e entrySpec) string {
	w.Helper()
	id, code, msg := w.tryEntry(e)
	if code != codes.OK {
		w.Fatalf("making an entry: %v %s", code, msg)
	}
	if e.parent == "" && w.status().GetCa().GetConnected() {
		w.held(id, true)
	}
	return id
}

func (w *world) tryEntry(e entrySpec) (string, codes.Code, string) {
	w.Helper()
	if e.parent == "" {
		e.parent = w.agentID()
	}
	if e.spiffeID == "" {
		e.spiffeID = "/web"
	}
	wire := &types.Entry{Id: e.id, SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: e.spiffeID}, ParentId: spiffeID(e.parent), Hint: e.hint,
		FederatesWith: e.federates, X509SvidTtl: int32(e.ttl / time.Second), Admin: e.admin, Downstream: e.downstream}
	if e.expires != 0 {
		wire.ExpiresAt = w.now().Add(e.expires).Unix()
	}
	for _, s := range e.selectors {
		typ, value, _ := strings.Cut(s, ":")
		wire.Selectors = append(wire.Selectors, &types.Selector{Type: typ, Value: value})
	}
	r, err := entryv1.NewEntryClient(w.conn(w.CASocket())).BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{wire}})
	if err != nil {
		w.Fatal(err)
	}
	one := r.GetResults()[0]
	return one.GetEntry().GetId(), codes.Code(one.GetStatus().GetCode()), one.GetStatus().GetMessage()
}

// held waits until the agent has the entry, or has it no more.
func (w *world) held(id string, want bool) {
	w.Helper()
	client := agentv1.NewAgentClient(w.conn(w.AgentAdminSocket()))
	w.until(fmt.Sprintf("that entry %s is held: %t", id, want), func() bool {
		r, err := client.Explain(context.Background(), &agentv1.ExplainRequest{Target: &agentv1.ExplainRequest_Id{Id: id}})
		if err != nil {
			w.Fatal(err)
		}
		held := false
		for _, c := range r.GetEntries() {
			held = held || c.GetRemovedAt() == nil
		}
		return held == want
	})
}

// issued waits until the agent has an SVID for the entry, or was refused one.
func (w *world) issued(id string) {
	w.Helper()
	client := agentv1.NewAgentClient(w.conn(w.AgentAdminSocket()))
	w.until("an answer about the SVID of "+id, func() bool {
		r, err := client.Explain(context.Background(), &agentv1.ExplainRequest{Target: &agentv1.ExplainRequest_Id{Id: id}})
		if err != nil {
			w.Fatal(err)
		}
		for _, c := range r.GetEntries() {
			if c.GetSvid().GetValid() || c.GetIssuance().GetError() != "" {
				return true
			}
		}
		return false
	})
}

func (w *world) updateEntry(e *types.Entry, mask *types.EntryMask) {
	w.Helper()
	r, err := entryv1.NewEntryClient(w.conn(w.CASocket())).BatchUpdateEntry(context.Background(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
	if err != nil || r.GetResults()[0].GetStatus().GetCode() != 0 {
		w.Fatalf("updating an entry: %v %v", err, r)
	}
}

func (w *world) deleteEntry(id string) {
	w.Helper()
	r, err := entryv1.NewEntryClient(w.conn(w.CASocket())).BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	if err != nil || r.GetResults()[0].GetStatus().GetCode() != 0 {
		w.Fatalf("deleting an entry: %v %v", err, r)
	}
	w.held(id, false)
}

func (w *world) apply(doc string) {
	w.Helper()
	_, err := adminv1.NewAdminClient(w.conn(w.CASocket())).Apply(context.Background(), &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(doc), File: "t.yaml"}}})
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) agents() agentapi.AgentClient { return agentapi.NewAgentClient(w.conn(w.CASocket())) }

// otherNode attests a second agent and returns its ID.
func (w *world) otherNode() string {
	w.Helper()
	r, err := adminv1.NewAdminClient(w.conn(w.CASocket())).CreateJoinToken(context.Background(), &adminv1.CreateJoinTokenRequest{})
	if err != nil {
		w.Fatal(err)
	}
	dir := filepath.Join(w.dir, "other")
	if err := os.Mkdir(dir, 0o755); err != nil {
		w.Fatal(err)
	}
	a, err := agent.New(agent.Config{TrustDomain: "example.org", ServerAddress: w.CAAddr(), DataDir: filepath.Join(dir, "data"), SocketPath: filepath.Join(dir, "a.sock"),
		JoinToken: nodeattest.Secret(r.GetToken()), Now: w.now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	w.Cleanup(func() {
		cancel()
		<-done
	})
	select {
	case <-a.Ready():
	case <-time.After(eventually):
		w.Fatal("the other agent is not ready")
	}
	return a.Status().ID.String()
}

func spiffeID(s string) *types.SPIFFEID {
	td, path, _ := strings.Cut(strings.TrimPrefix(s, "spiffe://"), "/")
	return &types.SPIFFEID{TrustDomain: td, Path: "/" + path}
}

// An option changes how a process is started.
type option func(*exec.Cmd)

func as(uid, gid uint32, groups ...uint32) option {
	return func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
	}
}

func env(v string) option {
	return func(c *exec.Cmd) { c.Env = append(c.Env, v) }
}

// program makes a program of that name, which sleeps, and returns its path.
func (w *world) program(name string) string {
	w.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		w.Fatal(err)
	}
	b, err := os.ReadFile(sleep)
	if err != nil {
		w.Fatal(err)
	}
	path := filepath.Join(w.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		w.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o755); err != nil {
		w.Fatal(err)
	}
	return path
}

// run starts a program that sleeps, and returns its process id once it runs it.
func (w *world) run(path string, options ...option) int32 {
	w.Helper()
	cmd := exec.Command(path, "600")
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/bin:/bin"}
	for _, o := range options {
		o(cmd)
	}
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return int32(cmd.Process.Pid)
}

// childMode makes this program one of the callers of the set-ups.
const childMode = "SIGNET_WHY_CHILD"

func TestMain(m *testing.M) {
	if config := os.Getenv("SIGNET_WHY_AGENT"); config != "" {
		os.Exit(childAgent(config))
	}
	if mode := os.Getenv(childMode); mode != "" {
		os.Exit(child(mode, os.Getenv("SIGNET_WHY_SOCKET")))
	}
	os.Exit(run(m))
}

// self is this program where every user may run it.
var self string

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "why")
	if err == nil {
		defer os.RemoveAll(dir)
		err = os.Chmod(dir, 0o755)
	}
	if err == nil {
		self, err = filepath.Join(dir, "caller"), exec.Command("cp", os.Args[0], filepath.Join(dir, "caller")).Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// child calls the Workload API in a certain way, says so, and waits for the end of its input.
func child(mode, socket string) int {
	if mode == "why" { // the command line as another user
		cli.Main(context.Background(), []string{"why", cmp.Or(os.Getenv("SIGNET_WHY_PID"), "1"), "--socket", socket}, strings.NewReader(""), os.Stdout, os.Stderr)
		return 0
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer conn.Close()
	client := workload.NewSpiffeWorkloadAPIClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), eventually)
	defer cancel()
	with := metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	fetch := func(ctx context.Context) error {
		stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	switch mode {
	case "once":
		fmt.Println(fetch(with))
		return 0
	case "fetch":
		err = fetch(with)
	case "headerless":
		err = fetch(ctx)
	case "streams":
		for range 5 {
			err = fetch(with)
		}
	case "flood", "short flood": // from many connections, since one has room for a hundred calls
		calls := make(chan error)
		const connections, each = 15, 90
		for i := range connections {
			conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				fmt.Println(err)
				return 1
			}
			defer conn.Close()
			for j := range each {
				go func() {
					_, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(with, &workload.JWTSVIDRequest{Audience: []string{fmt.Sprintf("a%d.%d.%s", i, j, strings.Repeat("a", map[string]int{"flood": 1500}[mode]))}})
					calls <- err
				}()
			}
		}
		for range connections * each {
			if e := <-calls; e != nil {
				err = e
			}
		}
	case "setuid":
		if err = fetch(with); err != nil {
			if err := syscall.Setresuid(4711, 4711, 4711); err != nil {
				fmt.Println(err)
				return 1
			}
		}
		err = fetch(with)
	case "badtoken":
		_, err = client.ValidateJWTSVID(with, &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: "y"})
	}
	fmt.Println("done:", err)
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// caller starts this program as a caller and returns when it has called.
func (w *world) caller(mode string, options ...option) int32 {
	w.Helper()
	cmd := exec.Command(self)
	cmd.Env = []string{childMode + "=" + mode, "SIGNET_WHY_SOCKET=" + w.AgentSocket()}
	cmd.Dir = "/"
	for _, o := range options {
		o(cmd)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		w.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	buf := make([]byte, 4096)
	n, err := out.Read(buf)
	if err != nil {
		w.Fatalf("the caller %q said nothing: %v %s", mode, err, stderr.String())
	}
	if mode == "once" {
		cmd.Wait()
	} else if !strings.HasPrefix(string(buf[:n]), "done:") {
		w.Fatalf("the caller %q: %s", mode, buf[:n])
	}
	return int32(cmd.Process.Pid)
}

// start starts a command that goes on until the end of the test.
func (w *world) start(cmd *exec.Cmd) int32 {
	w.Helper()
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return int32(cmd.Process.Pid)
}

func itoa(p int32) string { return strconv.Itoa(int(p)) }
