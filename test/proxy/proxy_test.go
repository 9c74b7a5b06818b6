// Package proxy runs the program signet-proxy beside a real CA and a real agent: with its sandbox, its signals, and what happens when
// it, or the agent, goes away.
package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/test/signettest"
)

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

var program string // signet-proxy

func TestMain(m *testing.M) {
	if path := os.Getenv(echoSocket); path != "" {
		fmt.Fprintln(os.Stderr, echoMain(path))
		os.Exit(1)
	}
	dir, err := os.MkdirTemp("", "signet-proxy")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "signet-proxy")
	build := exec.Command("go", "build", "-o", program, "../../cmd/signet-proxy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is released: only then all its threads can be restricted
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building signet-proxy: %v\n%s", err, out)
		os.Exit(1)
	}
	status := m.Run()
	os.RemoveAll(dir)
	os.Exit(status)
}

// identities give the proxy's program and this test's their IDs.
func identities(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`kind: Identity
name: service
spiffeID: /service
match: ["unix:path:%s"]
---
kind: Identity
name: caller
spiffeID: /caller
match: ["unix:path:%s"]
---
`, program, self)
}

const policies = `kind: CallPolicy
name: service
service: /service
mode: enforce
allow:
- from: [/caller]
  http: [{methods: [GET], paths: [/open/**]}]
`

// A process is a running signet-proxy.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	config string

	mu      sync.Mutex
	log     []string
	changed chan struct{} // closed and replaced with each line
	exited  chan struct{}
	err     error
}

// start runs signet-proxy with a configuration until the test ends.
func start(t testing.TB, s *signettest.Signet, config string) *process {
	t.Helper()
	p := &process{t: t, config: filepath.Join(t.TempDir(), "proxy.yaml"), changed: make(chan struct{}), exited: make(chan struct{})}
	p.write(config)
	p.cmd = exec.Command(program, "-config", p.config)
	p.cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+s.WorkloadAPI())
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			p.mu.Lock()
			p.log = append(p.log, lines.Text())
			close(p.changed)
			p.changed = make(chan struct{})
			p.mu.Unlock()
		}
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("the proxy said:\n%s", strings.Join(p.log, "\n"))
		}
	})
	return p
}

func (p *process) write(config string) {
	p.t.Helper()
	if err := os.WriteFile(p.config, []byte(config), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// says waits until the log has n lines that match, and returns the submatches of the last of them.
func (p *process) says(pattern string, n int) []string {
	p.t.Helper()
	re, deadline := regexp.MustCompile(pattern), time.After(patience)
	for {
		p.mu.Lock()
		var found [][]string
		for _, line := range p.log {
			if m := re.FindStringSubmatch(line); m != nil {
				found = append(found, m)
			}
		}
		changed := p.changed
		p.mu.Unlock()
		if len(found) >= n {
			return found[len(found)-1]
		}
		select {
		case <-changed:
		case <-deadline:
			p.t.Fatalf("the proxy does not say %q", pattern)
		}
	}
}

// address is where a listener listens.
func (p *process) address(listener string) string {
	p.t.Helper()
	return p.says(`msg=listening listener=`+listener+` address=(\S+)`, 1)[1]
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// ready is what /ready says: empty if it is.
func (p *process) ready() string {
	p.t.Helper()
	resp, err := http.Get("http://" + p.address("metrics") + "/ready")
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode == http.StatusOK {
		return ""
	}
	return string(body)
}

func (p *process) waitReady() {
	p.t.Helper()
	eventually(p.t, "the proxy is ready", func() bool { return p.ready() == "" })
}

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(patience)
	look := time.NewTicker(5 * time.Millisecond) // between looks at another process's state
	defer look.Stop()
	for !holds() {
		select {
		case <-deadline:
			t.Fatalf("still not: %s", what)
		case <-look.C:
		}
	}
}

// backend is an HTTP server on a Unix socket that answers with its name.
func backend(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "backend")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s for %s", name, r.Header.Get("Signet-Peer-Id"))
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-served
		os.RemoveAll(dir)
	})
	return "unix://" + l.Addr().String()
}

// caller is the TLS configuration of this process, as the agent gives it an identity.
func caller(t testing.TB, s *signettest.Signet) *tls.Config {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	return tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(s.ID("/service")))
}

func client(t testing.TB, c *tls.Config) *http.Client {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

// call returns the status of an answer and its body.
func call(c *http.Client, url string) (int, string, error) {
	resp, err := c.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

func httpConfig(backend string) string {
	return fmt.Sprintf(`inbound:
- name: in
  listen: 127.0.0.1:0
  service: spiffe://example.org/service
  protocol: http
  backend: %s
  http: {peer_id_header: Signet-Peer-Id}
metrics: {listen: "127.0.0.1:0"}
drain_timeout: 5s
sandbox: {landlock: auto, seccomp: require}
`, backend)
}

// TestLife: a proxy that is started before its identity exists waits and denies; then it serves, through the loss of its agent, a
// policy that comes after the agent's return, its own death, and an orderly end.
func TestLife(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	s.Apply(strings.SplitAfter(identities(t), "---\n")[1]) // the caller's alone
	config := httpConfig(backend(t, "one"))
	p := start(t, s, config)
	url := "https://" + p.address("in") + "/open/x"
	eventually(t, "the proxy says what it waits for", func() bool { return strings.Contains(p.ready(), "listener in: ") })
	tlsConfig := caller(t, s)
	if status, _, err := call(client(t, tlsConfig), url); err == nil {
		t.Fatalf("status %d without an identity", status)
	}

	s.Apply(identities(t) + policies)
	p.waitReady()
	p.says(`what the proxy runs with.*seccomp=on`, 1)
	c := client(t, tlsConfig)
	works := func(want string) {
		t.Helper()
		status, body, err := call(c, url)
		if err != nil || status != 200 || body != want+" for spiffe://example.org/caller" {
			t.Fatalf("%d %q, %v", status, body, err)
		}
	}
	eventually(t, "the policy is in force", func() bool { status, _, err := call(c, url); return err == nil && status == 200 })
	works("one")
	if status, _, err := call(c, strings.Replace(url, "/open", "/closed", 1)); err != nil || status != 403 {
		t.Fatalf("%d, %v; want 403", status, err)
	}

	// Without the agent everything goes on; what changes meanwhile comes with its return.
	if err := s.StopAgent(); err != nil {
		t.Fatal(err)
	}
	works("one")
	if status, _, err := call(client(t, tlsConfig), url); err != nil || status != 200 {
		t.Fatalf("a new connection without the agent: %d, %v", status, err)
	}
	s.Apply(strings.Replace(policies, "/open", "/changed", 1))
	if err := s.RestartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new policy is in force", func() bool { status, _, err := call(c, url); return err == nil && status == 403 })
	s.Apply(policies)
	eventually(t, "the old policy is in force again", func() bool { status, _, err := call(c, url); return err == nil && status == 200 })

	// Killed, and started anew.
	p.signal(syscall.SIGKILL)
	<-p.exited
	p = start(t, s, config)
	p.waitReady()
	url = "https://" + p.address("in") + "/open/x"
	works("one")

	p.signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(patience):
		t.Fatal("SIGTERM did not end the proxy")
	}
	if p.err != nil {
		t.Errorf("the proxy ended with %v", p.err)
	}
}

// TestReloadUnderLoad: while configurations change with SIGHUP, not one request fails, neither on connections that are open nor on
// new ones; what needs a restart is named.
func TestReloadUnderLoad(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	s.Apply(identities(t) + policies)
	configs := []string{httpConfig(backend(t, "one")), httpConfig(backend(t, "two"))}
	p := start(t, s, configs[0])
	p.waitReady()
	url, tlsConfig := "https://"+p.address("in")+"/open/x", caller(t, s)
	eventually(t, "the policy is in force", func() bool { status, _, err := call(client(t, tlsConfig), url); return err == nil && status == 200 })

	stop := make(chan struct{})
	var done atomic.Int64
	var load sync.WaitGroup
	for i := range 8 {
		load.Go(func() {
			c := client(t, tlsConfig)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if i%2 == 0 {
					c.CloseIdleConnections()
				}
				status, body, err := call(c, url)
				if err != nil || status != 200 {
					t.Errorf("%d %q, %v", status, body, err)
					return
				}
				done.Add(1)
			}
		})
	}
	for n := range 20 {
		before := done.Load()
		p.write(configs[(n+1)%2])
		p.signal(syscall.SIGHUP)
		p.says(`msg="the configuration was reloaded"`, n+1)
		eventually(t, "requests go on", func() bool { return done.Load() > before+8 || t.Failed() })
	}
	close(stop)
	load.Wait()
	t.Logf("%d requests during 20 reloads", done.Load())

	p.write(strings.NewReplacer("127.0.0.1:0\n", "127.0.0.1:1\n", "5s", "6s").Replace(configs[0]) + "outbound:\n- {name: out, listen: 127.0.0.1:0, address: localhost:1, servers: [spiffe://example.org/x]}\n")
	p.signal(syscall.SIGHUP)
	p.says(`some changes need a restart.*drain_timeout inbound\.in\.listen outbound\.out`, 1)
	p.write("inbound: []\n")
	p.signal(syscall.SIGHUP)
	p.says(`the configuration was not reloaded.*nothing to do`, 1)
	if status, body, err := call(client(t, tlsConfig), url); err != nil || status != 200 || !strings.HasPrefix(body, "one ") {
		t.Errorf("afterwards: %d %q, %v", status, body, err)
	}
}

// TestDrain: SIGTERM lets a connection end that is in use, and takes no new one.
func TestDrain(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	s.Apply(identities(t) + strings.Split(policies, "  http:")[0])
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { defer c.Close(); _, _ = io.Copy(c, c) })
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	p := start(t, s, fmt.Sprintf("inbound:\n- {name: in, listen: 127.0.0.1:0, service: spiffe://example.org/service, backend: '%s'}\nmetrics: {listen: '127.0.0.1:0'}\n", l.Addr()))
	p.waitReady()
	var conn *tls.Conn
	eventually(t, "the policy is in force", func() bool {
		c, err := tls.Dial("tcp", p.address("in"), caller(t, s))
		if err != nil {
			return false
		}
		if _, err := c.Write([]byte("x")); err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
			if err == nil {
				conn = c
				return true
			}
		}
		c.Close()
		return false
	})
	defer conn.Close()
	p.signal(syscall.SIGTERM)
	p.says(`no new connections are taken`, 1)
	if _, err := net.Dial("tcp", p.address("in")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a new connection: %v", err)
	}
	if _, err := conn.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "last words" {
		t.Errorf("%q, %v", got, err)
	}
	select {
	case <-p.exited:
	case <-time.After(patience):
		t.Fatal("the proxy did not end with its last connection")
	}
	if p.err != nil {
		t.Errorf("the proxy ended with %v", p.err)
	}
}
