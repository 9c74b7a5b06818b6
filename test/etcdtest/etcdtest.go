// Package etcdtest runs real members of etcd for tests: processes on loopback that can be killed, stopped, woken up, filled and
// restored. Only tests import it.
//
// The programs are those that make etcd builds into bin/etcd, from the module in test/etcd, or those in the directory that
// SIGNET_ETCD_BIN names. Without them the tests are skipped.
package etcdtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Variable names the directory of etcd, etcdctl and etcdutl.
const Variable = "SIGNET_ETCD_BIN"

// Program returns the path of etcd, etcdctl or etcdutl, or skips the test.
func Program(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv(Variable)
	if dir == "" {
		_, file, _, _ := runtime.Caller(0)
		dir = filepath.Join(filepath.Dir(file), "../../bin/etcd")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		t.Skipf("%s is not there: make etcd builds it, or name its directory in %s", path, Variable)
	} else if err != nil {
		t.Fatal(err)
	}
	return path
}

// Config says how the members run.
type Config struct {
	// Members is their number. 0: one.
	Members int
	// Quota is etcd's --quota-backend-bytes. 0: etcd's default.
	Quota int64
	// TLS makes the client URLs https, with certificates of Cluster.PKI; clients must show one.
	TLS bool
	// Flags are further flags of each member.
	Flags []string
}

// A Cluster is a set of members.
type Cluster struct {
	Members []*Member
	PKI     *PKI // nil without TLS
	dir     string
	c       Config
}

// A Member is one etcd process and its data.
type Member struct {
	Name     string
	Endpoint string // its client URL
	DataDir  string

	cluster *Cluster
	peer    string
	metrics string
	mu      sync.Mutex // guards cmd
	cmd     *exec.Cmd
	exited  chan struct{}
	log     string
}

// Start starts a cluster that ends with the test, and waits until it answers.
func Start(t testing.TB, c Config) *Cluster {
	t.Helper()
	Program(t, "etcd")
	if c.Members == 0 {
		c.Members = 1
	}
	dir, err := os.MkdirTemp("", "etcdtest-")
	if err != nil {
		t.Fatal(err)
	}
	cl := &Cluster{dir: dir, c: c}
	t.Cleanup(func() {
		for _, m := range cl.Members {
			m.Kill()
		}
		if t.Failed() {
			for _, m := range cl.Members {
				if data, err := os.ReadFile(m.log); err == nil {
					t.Logf("%s ended with:\n%s", m.Name, tail(string(data), 15))
				}
			}
		}
		os.RemoveAll(dir)
	})
	scheme := "http"
	if c.TLS {
		scheme = "https"
		cl.PKI = NewPKI(t, filepath.Join(dir, "pki"))
	}
	for i := range c.Members {
		name := fmt.Sprintf("m%d", i)
		cl.Members = append(cl.Members, &Member{Name: name, cluster: cl, Endpoint: scheme + "://" + freeAddress(t), peer: "http://" + freeAddress(t), metrics: "http://" + freeAddress(t),
			DataDir: filepath.Join(dir, name), log: filepath.Join(dir, name+".log")})
	}
	for _, m := range cl.Members {
		m.Start(t)
	}
	for _, m := range cl.Members {
		m.WaitHealthy(t)
	}
	return cl
}

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// freeAddress returns a loopback address that is free at this moment.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Endpoints returns the client URLs of all members.
func (c *Cluster) Endpoints() []string {
	var out []string
	for _, m := range c.Members {
		out = append(out, m.Endpoint)
	}
	return out
}

// Start starts the member on the data it has.
func (m *Member) Start(t testing.TB) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	log, err := os.OpenFile(m.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	args := []string{"--name", m.Name, "--data-dir", m.DataDir, "--listen-client-urls", m.Endpoint, "--advertise-client-urls", m.Endpoint,
		"--listen-peer-urls", m.peer, "--initial-advertise-peer-urls", m.peer, "--initial-cluster", m.cluster.initial(),
		"--listen-metrics-urls", m.metrics, "--logger", "zap", "--log-level", "warn", "--heartbeat-interval", "100", "--election-timeout", "1000"}
	if m.cluster.c.Quota > 0 {
		args = append(args, "--quota-backend-bytes", fmt.Sprint(m.cluster.c.Quota))
	}
	if p := m.cluster.PKI; p != nil {
		args = append(args, "--cert-file", p.ServerCert, "--key-file", p.ServerKey, "--trusted-ca-file", p.CA, "--client-cert-auth")
	}
	cmd := exec.Command(Program(t, "etcd"), append(args, m.cluster.c.Flags...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		runtime.LockOSThread() // the parent that Pdeathsig means is this thread
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	m.cmd, m.exited = cmd, exited
}

func (c *Cluster) initial() string {
	var out []string
	for _, m := range c.Members {
		out = append(out, m.Name+"="+m.peer)
	}
	return strings.Join(out, ",")
}

// WaitHealthy waits until the member has a leader and answers.
func (m *Member) WaitHealthy(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.metrics+"/readyz", nil)
		if err != nil {
			t.Fatal(err)
		}
		rsp, err := http.DefaultClient.Do(req)
		if err == nil {
			rsp.Body.Close()
			if rsp.StatusCode == http.StatusOK {
				break
			}
		}
		select {
		case <-ctx.Done():
			data, _ := os.ReadFile(m.log)
			t.Fatalf("%s is not ready after a minute: %v\n%s", m.Name, err, tail(string(data), 20))
		case <-tick.C:
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// Kill ends the process as a power cut does, and waits for its end.
func (m *Member) Kill() {
	m.signal(syscall.SIGCONT)
	m.signal(syscall.SIGKILL)
	m.mu.Lock()
	exited := m.exited
	m.mu.Unlock()
	if exited != nil {
		<-exited
	}
}

// Pause makes the process hang: its sockets stay open, and nothing answers. Resume wakes it up.
func (m *Member) Pause() { m.signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (m *Member) Resume() { m.signal(syscall.SIGCONT) }

func (m *Member) signal(s syscall.Signal) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cmd != nil && m.cmd.Process != nil {
		_ = m.cmd.Process.Signal(s)
	}
}

// Ctl runs etcdctl and returns what it printed. Its own flags come last.
func (c *Cluster) Ctl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.TryCtl(t, args...)
	if err != nil {
		t.Fatalf("etcdctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// TryCtl is Ctl that may fail.
func (c *Cluster) TryCtl(t testing.TB, args ...string) (string, error) {
	t.Helper()
	all := []string{"--endpoints", strings.Join(c.Endpoints(), ",")}
	if c.PKI != nil {
		all = append(all, "--cacert", c.PKI.CA, "--cert", c.PKI.RootCert, "--key", c.PKI.RootKey)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, Program(t, "etcdctl"), append(all, args...)...).CombinedOutput()
	return string(out), err
}

// Revision returns the newest revision of all that is in etcd.
func (c *Cluster) Revision(t testing.TB) int64 {
	t.Helper()
	for line := range strings.Lines(c.Ctl(t, "get", "x", "--write-out=fields")) {
		var n int64
		if _, err := fmt.Sscanf(line, `"Revision" : %d`, &n); err == nil {
			return n
		}
	}
	t.Fatal("etcdctl names no revision")
	return 0
}

// Snapshot saves the state of a member, running, to a file.
func (c *Cluster) Snapshot(t testing.TB) string {
	t.Helper()
	path := filepath.Join(c.dir, fmt.Sprintf("snapshot-%d.db", time.Now().UnixNano()))
	args := []string{"--endpoints", c.Members[0].Endpoint, "snapshot", "save", path}
	if c.PKI != nil {
		args = append(args, "--cacert", c.PKI.CA, "--cert", c.PKI.RootCert, "--key", c.PKI.RootKey)
	}
	if out, err := exec.Command(Program(t, "etcdctl"), args...).CombinedOutput(); err != nil {
		t.Fatalf("saving a snapshot: %v\n%s", err, out)
	}
	return path
}

// Restore kills the members, replaces their data by a snapshot, as an operator does after a disaster, and starts them. flags
// are further ones of etcdutl snapshot restore.
func (c *Cluster) Restore(t testing.TB, snapshot string, flags ...string) {
	t.Helper()
	for _, m := range c.Members {
		m.Kill()
	}
	for _, m := range c.Members {
		if err := os.RemoveAll(m.DataDir); err != nil {
			t.Fatal(err)
		}
		args := []string{"snapshot", "restore", snapshot, "--name", m.Name, "--data-dir", m.DataDir, "--initial-cluster", c.initial(), "--initial-advertise-peer-urls", m.peer}
		if out, err := exec.Command(Program(t, "etcdutl"), append(args, flags...)...).CombinedOutput(); err != nil {
			t.Fatalf("restoring a snapshot: %v\n%s", err, out)
		}
	}
	for _, m := range c.Members {
		m.Start(t)
	}
	for _, m := range c.Members {
		m.WaitHealthy(t)
	}
}
