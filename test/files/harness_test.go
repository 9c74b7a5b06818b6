// Package files tests 'signet svid fetch --watch' as an operator runs it: a process of its own that keeps files for real
// programs, from a real agent of a real CA.
package files

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/test/signettest"
)

// asSignet makes the test binary be the signet command.
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

func start(t testing.TB) *signettest.Signet {
	t.Helper()
	return signettest.Start(t, signettest.Config{Agent: func(c *agent.Config) { c.RegistrationWait = time.Millisecond }})
}

// identity registers this process and its children, by their user.
func identity(s *signettest.Signet, path string, more ...string) {
	doc := fmt.Sprintf("kind: Identity\nname: %s\nspiffeID: /%s\nmatch: [\"unix:uid:%d\"]\n", path, path, os.Getuid())
	for _, m := range more {
		doc += m + "\n"
	}
	s.Apply(doc)
}

// bounded is a context that only a hanging test meets the end of.
func bounded(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// A helper is a running 'signet svid fetch'.
type helper struct {
	t    testing.TB
	cmd  *exec.Cmd
	out  *lockedBuffer // what it writes to stdout and stderr
	done chan error
}

func fetch(t testing.TB, s *signettest.Signet, args ...string) *helper {
	t.Helper()
	h := &helper{t: t, cmd: exec.Command(os.Args[0], append([]string{"svid", "fetch"}, args...)...), out: &lockedBuffer{}, done: make(chan error, 1)}
	h.cmd.Env = append(os.Environ(), asSignet+"=1", "SPIFFE_ENDPOINT_SOCKET="+s.WorkloadAPI())
	h.cmd.Stdout, h.cmd.Stderr = h.out, h.out
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { h.done <- h.cmd.Wait() }()
	t.Cleanup(func() {
		_ = h.cmd.Process.Kill() // it may have ended
		if t.Failed() {
			t.Logf("the helper said:\n%s", h.out.String())
		}
	})
	return h
}

// ends waits for the helper's end and returns its status.
func (h *helper) ends() int {
	h.t.Helper()
	select {
	case err := <-h.done:
		h.done <- err
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			h.t.Fatal(err)
		}
		return h.cmd.ProcessState.ExitCode()
	case <-bounded(h.t).Done():
		h.t.Fatal("the helper does not end")
		return 0
	}
}

// stop ends the helper as a service manager does.
func (h *helper) stop() {
	h.t.Helper()
	if err := h.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		h.t.Fatal(err)
	}
	if code := h.ends(); code != 0 {
		h.t.Errorf("the helper ends with status %d, want 0", code)
	}
}

// says waits until the helper has said something.
func (h *helper) says(words string) {
	h.t.Helper()
	eventually(h.t, "the helper says "+words, func() bool { return strings.Contains(h.out.String(), words) })
}

// eventually waits for a condition, which another process brings about.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	ctx := bounded(t)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("it does not come about that %s", what)
		}
	}
}

// leaf is the first certificate in a file.
func leaf(t testing.TB, path string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("%s holds no PEM", path)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// program is the path of a program that the test needs, or skips the test.
func program(t testing.TB, names ...string) string {
	t.Helper()
	for _, name := range names {
		for _, dir := range []string{"", "/usr/sbin/", "/usr/lib/postgresql/15/bin/", "/usr/lib/postgresql/17/bin/"} {
			if path, err := exec.LookPath(dir + name); err == nil {
				return path
			}
		}
	}
	t.Skipf("%s is not installed", names[0])
	return ""
}

// example is the code block of a language in docs/operate/files.md.
func example(t testing.TB, language string, replace ...string) string {
	t.Helper()
	doc, err := os.ReadFile("../../docs/operate/files.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := bytes.Cut(doc, []byte("```"+language+"\n"))
	block, _, ok2 := bytes.Cut(rest, []byte("```"))
	if !ok || !ok2 {
		t.Fatalf("docs/operate/files.md has no example for %s", language)
	}
	text := string(block)
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(text, replace[i]) {
			t.Fatalf("the example for %s has no %q", language, replace[i])
		}
		text = strings.ReplaceAll(text, replace[i], replace[i+1])
	}
	return text
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

// under is a directory that every user can enter.
func under(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet-files")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// A lockedBuffer is a log that can be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
