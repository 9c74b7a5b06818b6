// Package onbehalf tests the two APIs by which programs speak for workloads, the Broker API and the Delegated Identity API,
// with a real CA, a real agent, and workloads that are processes of their own.
package onbehalf

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/test/signettest"
)

// childEnv makes this program a workload, delegateEnv a delegate at the socket that it names.
const childEnv, delegateEnv = "SIGNET_TEST_ONBEHALF", "SIGNET_TEST_DELEGATE"

func TestMain(m *testing.M) {
	if socket := os.Getenv(delegateEnv); socket != "" {
		os.Exit(playDelegate(socket))
	}
	if fd := os.Getenv(sniffEnv); fd != "" {
		sniff(fd)
		os.Exit(0)
	}
	if os.Getenv(childEnv) != "" {
		os.Stdout.WriteString("ready\n")
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A world is a CA, an agent, and the program of a workload.
type world struct {
	*signettest.Signet
	t       testing.TB
	ctx     context.Context
	log     *lockedLog
	dir     string
	program string // what workloads run; this test runs another file
}

// A lockedLog can be read while it is written.
type lockedLog struct {
	mu      sync.Mutex
	text    strings.Builder
	written chan struct{} // one slot
}

// await waits for text in the log.
func (l *lockedLog) await(t testing.TB, text string) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for !strings.Contains(l.String(), text) {
		select {
		case <-l.written:
		case <-limit:
			t.Fatalf("the agent's log does not say %q", text)
		}
	}
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.written <- struct{}{}:
	default:
	}
	return l.text.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// newWorld has identities for this test, /speaker, and for the workload's program, /w.
func newWorld(t testing.TB, change func(w *world, c *agent.Config)) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "behalf") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	w := &world{t: t, ctx: ctx, log: &lockedLog{written: make(chan struct{}, 1)}, dir: dir, program: filepath.Join(dir, "workload")}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(w.program, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Signet = signettest.Start(t, signettest.Config{Log: slog.New(slog.NewTextHandler(w.log, nil)), Agent: func(c *agent.Config) { change(w, c) }})
	w.identity("speaker", "/speaker", self)
	w.identity("w", "/w", w.program)
	return w
}

// identity gives an ID to whoever runs the program.
func (w *world) identity(name, id, program string) {
	w.t.Helper()
	w.Apply(fmt.Sprintf("kind: Identity\nname: %s\nspiffeID: %s\nmatch: [\"unix:path:%s\"]\n", name, id, program))
}

// start starts a process that runs the workload's program. The function ends it.
func (w *world) start() (pid int32, kill func()) {
	w.t.Helper()
	cmd := exec.Command(w.program)
	cmd.Env = append(os.Environ(), childEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		cmd.Process.Kill()
		in.Close()
		cmd.Wait()
	})
	w.t.Cleanup(kill)
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		w.t.Fatal(err)
	}
	return int32(cmd.Process.Pid), kill
}

// own is this test's own X509-SVID, as any workload gets it.
func (w *world) own() *workloadapi.X509Source {
	w.t.Helper()
	source, err := workloadapi.NewX509Source(w.ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(w.WorkloadAPI())))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { source.Close() })
	return source
}

func ended[M any](stream grpc.ServerStreamingClient[M]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

func wantCode(t testing.TB, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Fatalf("status %v (%v), want %v", status.Code(err), err, want)
	}
	for _, word := range words {
		if !strings.Contains(status.Convert(err).Message(), word) {
			t.Errorf("message %q does not say %q", status.Convert(err).Message(), word)
		}
	}
}
