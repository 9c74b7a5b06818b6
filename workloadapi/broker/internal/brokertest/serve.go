package brokertest

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/workloadapi/broker"
)

// BrokerPath is the path of the SPIFFE ID of the broker that Serve lists; ServerPath is the endpoint's own.
const BrokerPath, ServerPath = "/broker", "/spire/agent/join_token/n1"

// A Log is a log that can be read while it is written.
type Log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// A Clock is one that tests move.
type Clock struct{ ahead atomic.Int64 }

// Now is the time there.
func (c *Clock) Now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// Advance moves the clock.
func (c *Clock) Advance(d time.Duration) { c.ahead.Add(int64(d)) }

// An Endpoint is a running Broker Endpoint.
type Endpoint struct {
	Path   string       // of its Unix socket
	TCP    *net.TCPAddr // on the loopback interface
	Log    *Log
	Clock  *Clock
	Server atomic.Pointer[x509svid.SVID]
	Stop   func() // ends Run and waits
}

// Serve starts an endpoint for the test, on a Unix socket and a TCP port. One broker is listed, BrokerPath, with all
// types of references. Changes to the configuration come from adjust.
func Serve(t testing.TB, src *Source, adjust ...func(*broker.Config)) *Endpoint {
	t.Helper()
	return ServeAt(t, filepath.Join(t.TempDir(), "b.sock"), src, adjust...)
}

// ServeAt is Serve with a socket at a path.
func ServeAt(t testing.TB, path string, src *Source, adjust ...func(*broker.Config)) *Endpoint {
	t.Helper()
	e := &Endpoint{Path: path, Log: &Log{}, Clock: &Clock{}}
	e.Server.Store(src.Own.SVID(t, ServerPath, time.Hour))
	unix, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.TCP = tcp.Addr().(*net.TCPAddr)
	cfg := broker.Config{
		TrustDomain: src.Own.TD, Source: src, Attestor: ByPID{}, SVID: e.Server.Load, Bundles: src.Own.Bundle(),
		Listeners: []net.Listener{unix, tcp}, Log: slog.New(slog.NewTextHandler(e.Log, nil)), Now: e.Clock.Now,
		Brokers: []broker.Broker{{ID: src.Own.SVID(t, BrokerPath, time.Hour).ID, References: []broker.ReferenceType{broker.PID, broker.Kubernetes}}},
	}
	for _, f := range adjust {
		f(&cfg)
	}
	server, err := broker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	e.Stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run = %v, want nil", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Run does not end with its context")
		}
	})
	t.Cleanup(e.Stop)
	return e
}

// ChildEnv makes a test binary play a workload: its TestMain calls Child then.
const ChildEnv = "SIGNET_TEST_WORKLOAD"

// Child waits until its input ends.
func Child() int {
	os.Stdout.WriteString("ready\n")
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// A Workload is a process that does nothing but live.
type Workload struct {
	PID int32
	cmd *exec.Cmd
	in  io.Closer
	end sync.Once
}

// Start starts a workload, which ends with the test.
func Start(t testing.TB) *Workload {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), ChildEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w := &Workload{PID: int32(cmd.Process.Pid), cmd: cmd, in: in}
	t.Cleanup(w.Kill)
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatalf("the workload does not start: %v", err)
	}
	return w
}

// Kill ends the workload and waits for it.
func (w *Workload) Kill() {
	w.end.Do(func() {
		w.cmd.Process.Kill()
		w.in.Close()
		w.cmd.Wait()
	})
}

// Pods is a cluster's node with pods that come and go.
type Pods struct {
	mu   sync.Mutex
	pods map[string]broker.Pod // by namespace/name
	err  error
	asks int
}

// Put makes pods exist; those without a UID are gone.
func (p *Pods) Put(name string, pod broker.Pod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pods == nil {
		p.pods = map[string]broker.Pod{}
	}
	p.pods[name] = pod
	if pod.UID == "" {
		delete(p.pods, name)
	}
}

// Fail makes the kubelet fail with err, or work again.
func (p *Pods) Fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
}

// Pod is broker.Pods'.
func (p *Pods) Pod(_ context.Context, ref broker.PodReference) (broker.Pod, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asks++
	if p.err != nil {
		return broker.Pod{}, p.err
	}
	for name, pod := range p.pods {
		if (ref.Name == "" || name == ref.Namespace+"/"+ref.Name) && (ref.UID == "" || ref.UID == pod.UID) {
			return pod, nil
		}
	}
	return broker.Pod{}, broker.ErrNoPod
}
