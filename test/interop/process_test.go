// Package interop runs unmodified SPIRE programs against signet as processes, and moves a trust domain from one to the
// other. It has no SPIRE of its own: the environment names the programs,
//
//	SPIRE_AGENT_BIN               the spire-agent
//	SPIRE_SERVER_BIN              the spire-server, which is its command line, too
//	SPIRE_CONTROLLER_MANAGER_BIN  the spire-controller-manager
//	SIGNET_KUBECONFIG, SPIRE_CONTROLLER_MANAGER_CRDS  a cluster for it, and a directory of its resource definitions
//
// and a test whose program is not named says so and is skipped. `make interop` runs it; docs/interop.md says what was run.
package interop

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/internal/cli"
)

const (
	envAgent      = "SPIRE_AGENT_BIN"
	envServer     = "SPIRE_SERVER_BIN"
	envController = "SPIRE_CONTROLLER_MANAGER_BIN"
	envCRDs       = "SPIRE_CONTROLLER_MANAGER_CRDS"
	envKubeconfig = "SIGNET_KUBECONFIG"
)

const trustDomain = "example.org"

// asSignet makes the test binary be the signet command, so that the processes are of this very tree.
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

// foreign returns the path of a SPIRE program. Without it there is nothing to test.
func foreign(t *testing.T, env string) string {
	t.Helper()
	path := os.Getenv(env)
	if path == "" {
		t.Skipf("%s names no program: these tests need an unmodified one of SPIRE's (docs/interop.md)", env)
	}
	if _, err := exec.LookPath(path); err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return path
}

// A process is a daemon that can be killed and started again on the same files.
type process struct {
	t    *testing.T
	name string
	args []string // args[0] is the program
	env  []string

	out    *tail
	cmd    *exec.Cmd
	exited chan struct{} // closed when it has ended, after err is set
	err    error
}

// tail keeps what a process says.
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

// daemon describes a process; it ends with the test at the latest, and what it said is shown if the test failed.
func daemon(t *testing.T, name string, args ...string) *process {
	p := &process{t: t, name: name, args: args, out: &tail{}}
	t.Cleanup(func() {
		p.kill()
		if s := p.out.String(); t.Failed() && s != "" {
			t.Logf("%s said:\n%s", name, s[max(0, len(s)-8000):])
		}
	})
	return p
}

// signet is a daemon of this tree.
func signetDaemon(t *testing.T, name string, args ...string) *process {
	p := daemon(t, name, append([]string{os.Args[0]}, args...)...)
	p.env = []string{asSignet + "=1"}
	return p
}

func (p *process) start() {
	p.t.Helper()
	p.cmd = exec.Command(p.args[0], p.args[1:]...)
	p.cmd.Env = append(os.Environ(), p.env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
	p.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		p.err = cmd.Wait()
		close(exited)
	}(p.cmd, p.exited)
}

func (p *process) running() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// end sends a signal and waits for the end.
func (p *process) end(sig syscall.Signal) error {
	if p.cmd == nil {
		return nil
	}
	p.cmd.Process.Signal(sig)
	<-p.exited
	p.cmd = nil
	return p.err
}

func (p *process) kill() { p.end(syscall.SIGKILL) }

// ends waits for the process to end by itself.
func (p *process) ends(ctx context.Context) error {
	select {
	case <-p.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s still runs", p.name)
	}
}

// run runs a command to its end and returns what it wrote to stdout.
func run(ctx context.Context, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

func bounded(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually tries f until it succeeds or ctx ends, and returns its last error.
func eventually(ctx context.Context, f func() error) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-t.C:
		}
	}
}

// must ends the test on an error.
func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
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

// shortDir is a directory whose path leaves room for the name of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "interop")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func writeFile(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// self is the selector that matches this test process.
func self() string { return fmt.Sprintf("unix:uid:%d", os.Getuid()) }

// x509SVID is what sources give.
type x509SVID = *x509svid.SVID

func contains(list []string, want ...string) error {
	for _, w := range want {
		if !slices.Contains(list, w) {
			return fmt.Errorf("%q is not among %q", w, list)
		}
	}
	return nil
}

func loadSVID(dir string) (x509SVID, error) { return x509svid.Load(dir+"/svid.pem", dir+"/key.pem") }

func verifyOptions(b *x509bundle.Bundle) x509.VerifyOptions {
	roots := x509.NewCertPool()
	for _, c := range b.X509Authorities() {
		roots.AddCert(c)
	}
	return x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
}
