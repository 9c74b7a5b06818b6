package proxy

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/test/signettest"
)

// echoSocket in the environment makes this test program a backend of its own process, since descriptors are few.
const echoSocket = "SIGNET_TEST_ECHO_SOCKET"

// echoMain is the backend: it echoes what comes on the connections of a Unix socket.
func echoMain(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_ = serve(c) // the caller sees what is missing
		}()
	}
}

// serve echoes x, takes as many bytes as a caller announces with u, and sends as many as it asks for with d.
func serve(c net.Conn) error {
	head := make([]byte, 5)
	for {
		if _, err := io.ReadFull(c, head[:1]); err != nil {
			return err
		}
		if head[0] == 'x' {
			if _, err := c.Write(head[:1]); err != nil {
				return err
			}
			continue
		}
		if _, err := io.ReadFull(c, head[1:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(head[1:]))
		b := chunks.Get().(*[]byte)
		for n > 0 {
			var m int
			var err error
			if head[0] == 'u' {
				m, err = c.Read((*b)[:min(n, len(*b))])
			} else {
				m, err = c.Write((*b)[:min(n, len(*b))])
			}
			if err != nil {
				return err
			}
			n -= m
		}
		chunks.Put(b)
		if head[0] == 'u' {
			if _, err := c.Write(head[:1]); err != nil {
				return err
			}
		}
	}
}

// echoProcess starts the backend and returns its address.
func echoProcess(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "echo")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), echoSocket+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		os.RemoveAll(dir)
	})
	if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	return "unix://" + path
}

func tcpConfig(backend, more string) string {
	return fmt.Sprintf("inbound:\n- {name: in, listen: 127.0.0.1:0, service: spiffe://example.org/service, backend: '%s'%s}\nmetrics: {listen: '127.0.0.1:0'}\ndrain_timeout: 1s\n", backend, more)
}

const tcpPolicies = "kind: CallPolicy\nname: service\nservice: /service\nmode: enforce\nallow:\n- from: [/caller]\n"

// ping sends a byte and waits for it to come back.
func ping(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	b := []byte("x")
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// memory is a number of /proc/PID/status, in KiB.
func (p *process) memory(what string) int {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	m := regexp.MustCompile(what + `:\s+(\d+)`).FindSubmatch(status)
	if m == nil {
		p.t.Fatalf("no %s", what)
	}
	n, _ := strconv.Atoi(string(m[1]))
	return n
}

// TestTenThousandConnections: as many are open at once, each to a connection of the backend's, all of them work, and an idle one costs
// little. The hard limit of descriptors leaves a hundred out where it is 20,000.
func TestTenThousandConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	want := min(10000, int(limit.Max-200)/2)
	s := signettest.Start(t, signettest.Config{})
	s.Apply(identities(t) + tcpPolicies)
	p := start(t, s, tcpConfig(echoProcess(t), ", limits: {max_connections: 10000}"))
	p.waitReady()
	config := caller(t, s)
	address := p.address("in")
	eventually(t, "the policy is in force", func() bool {
		c, err := tls.Dial("tcp", address, config)
		if err != nil {
			return false
		}
		defer c.Close()
		return ping(c) == nil
	})
	before := p.memory("VmRSS")
	conns := make([]net.Conn, want)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	all := func(f func(i int) error) {
		t.Helper()
		var g errgroup.Group
		g.SetLimit(64)
		for i := range conns {
			g.Go(func() error { return f(i) })
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	all(func(i int) error {
		c, err := tls.Dial("tcp", address, config)
		if err != nil {
			return err
		}
		conns[i] = c
		return ping(c)
	})
	opened := time.Since(began)
	all(func(i int) error { return ping(conns[i]) })
	after := p.memory("VmRSS")
	perConnection := float64(after-before) / float64(want)
	t.Logf("%d connections opened in %s; resident %d MiB, %.1f KiB for each", want, opened.Round(time.Millisecond), after>>10, perConnection)
	if perConnection > 60 {
		t.Errorf("%.1f KiB for each idle connection; 60 at most", perConnection)
	}
}

// TestNoDescriptorsLeft: a proxy that has run out of descriptors waits, and goes on once some are free.
func TestNoDescriptorsLeft(t *testing.T) {
	s := signettest.Start(t, signettest.Config{})
	s.Apply(identities(t) + tcpPolicies)
	p := start(t, s, tcpConfig(echoProcess(t), ""))
	p.waitReady()
	config, address := caller(t, s), p.address("in")
	eventually(t, "the policy is in force", func() bool {
		c, err := tls.Dial("tcp", address, config)
		if err != nil {
			return false
		}
		defer c.Close()
		return ping(c) == nil
	})
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(fds) + 10), Max: uint64(len(fds) + 10)}, nil); err != nil {
		t.Fatal(err)
	}
	var waiting []net.Conn
	for range 30 {
		c, err := net.Dial("tcp", address) // into the listener's queue, at least
		if err != nil {
			t.Fatal(err)
		}
		waiting = append(waiting, c)
	}
	p.says(`cannot accept a connection; trying again.*too many open files`, 1)
	for _, c := range waiting {
		c.Close()
	}
	eventually(t, "it serves again", func() bool {
		c, err := tls.Dial("tcp", address, config)
		if err != nil {
			return false
		}
		defer c.Close()
		return ping(c) == nil
	})
	p.signal(syscall.SIGTERM)
	<-p.exited
	if p.err != nil {
		t.Errorf("the proxy ended with %v", p.err)
	}
}
