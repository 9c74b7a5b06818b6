package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/mem"
)

const pinChildEnv = "SIGNET_TEST_PIN"

// connectAndWait makes the test binary, as a child, connect to the named socket, say so, and wait for its input to end.
func connectAndWait(socket string) {
	if socket != "-" {
		if _, err := net.Dial("unix", socket); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

func newTable(t testing.TB, c Config) *Table {
	t.Helper()
	table, err := NewTable(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
		if len(table.pins) != 0 || len(table.byPID) != 0 || table.conns != 0 || len(table.uidConns) != 0 {
			t.Errorf("after Close: %d pins, %d connections", len(table.pins), table.conns)
		}
	})
	return table
}

func newListener(t testing.TB) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), "s")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// A pinCaller is a child that holds a connection.
type pinCaller struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

func pinStartCaller(t testing.TB, socket string) *pinCaller {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), pinChildEnv+"="+socket)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &pinCaller{cmd: cmd, stdin: stdin}
	t.Cleanup(c.end)
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("child: %q, %v", line, err)
	}
	return c
}

// end kills the child and reaps it, so that its process id is free.
func (c *pinCaller) end() {
	c.stdin.Close()
	c.cmd.Process.Kill()
	c.cmd.Wait()
}

func (c *pinCaller) pid() int32 { return int32(c.cmd.Process.Pid) }

func pinAccept(t testing.TB, l *net.UnixListener) *net.UnixConn {
	t.Helper()
	l.SetDeadline(time.Now().Add(10 * time.Second))
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// identify makes a process of an accepted connection, which is closed with the test.
func identify(t testing.TB, table *Table, raw net.Conn) *Process {
	t.Helper()
	c, info, err := table.identify(raw)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if info.Err != nil {
		t.Fatal(info.Err)
	}
	return info.Process
}

func waitGone(t testing.TB, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the end of the process was not noticed")
	}
}

// ways are those in which a table can hold on to a process: by a pidfd, by the connection, and as on older kernels.
var ways = map[string]func(*Table){
	"held":                 func(*Table) {},
	"not held":             func(t *Table) { t.maxHeld = 0 },
	"without SO_PEERPIDFD": func(t *Table) { t.noPeerPIDFD = true },
}

func everyWay(t *testing.T, f func(t *testing.T, table *Table)) {
	for name, change := range ways {
		t.Run(name, func(t *testing.T) {
			table := newTable(t, Config{})
			change(table)
			f(t, table)
		})
	}
}

func TestWEP_19_KernelSaysWhoConnected(t *testing.T) {
	everyWay(t, func(t *testing.T, table *Table) {
		l := newListener(t)
		child := pinStartCaller(t, l.Addr().String())
		p := identify(t, table, pinAccept(t, l))
		if p.PID != child.pid() || p.UID != uint32(os.Geteuid()) || p.GID != uint32(os.Getegid()) {
			t.Errorf("process %d of %d:%d, want %d of %d:%d", p.PID, p.UID, p.GID, child.pid(), os.Geteuid(), os.Getegid())
		}
		s, err := p.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		var self unix.Stat_t
		if err := unix.Stat("/proc/self/exe", &self); err != nil {
			t.Fatal(err)
		}
		if s.EffectiveUID != uint32(os.Geteuid()) || s.Executable != FileOf(&self) || s.StartTime == 0 {
			t.Errorf("snapshot %+v", s)
		}
		again, err := p.Snapshot()
		if err != nil || !again.Equal(s) {
			t.Errorf("a second snapshot differs: %+v, %v", again, err)
		}
		child.end()
		waitGone(t, p)
		if _, err := p.Snapshot(); !errors.Is(err, ErrGone) {
			t.Errorf("snapshot of an ended process: %v, want ErrGone", err)
		}
	})
}

func TestWEP_21_ZombieHasEnded(t *testing.T) {
	everyWay(t, func(t *testing.T, table *Table) {
		l := newListener(t)
		child := pinStartCaller(t, l.Addr().String())
		p := identify(t, table, pinAccept(t, l))
		if err := child.cmd.Process.Kill(); err != nil { // and not reaped
			t.Fatal(err)
		}
		waitGone(t, p)
		if err := p.Alive(); !errors.Is(err, ErrGone) {
			t.Errorf("Alive of a zombie = %v, want ErrGone", err)
		}
	})
}

// reusePID starts children until one has the process id.
func reusePID(t *testing.T, pid int32) *pinCaller {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to choose a process id")
	}
	for range 200 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(int(pid)-1)), 0); err != nil {
			t.Fatal(err)
		}
		c := pinStartCaller(t, "-")
		if c.pid() == pid {
			return c
		}
		c.end()
	}
	t.Fatalf("process id %d could not be had again", pid)
	return nil
}

func TestWEP_21_PIDReusedBetweenConnectAndIdentification(t *testing.T) {
	table, l := newTable(t, Config{}), newListener(t)
	first := pinStartCaller(t, l.Addr().String())
	raw := pinAccept(t, l)
	defer raw.Close()
	first.end()
	second := reusePID(t, first.pid())
	_, info, err := table.identify(raw)
	if !errors.Is(err, ErrGone) {
		t.Errorf("the connection of an ended process, whose id process %d has now: %+v, %v; want ErrGone", second.pid(), info, err)
	}
}

func TestWEP_21_PIDReusedAfterIdentification(t *testing.T) {
	everyWay(t, func(t *testing.T, table *Table) {
		l := newListener(t)
		first := pinStartCaller(t, l.Addr().String())
		p := identify(t, table, pinAccept(t, l))
		first.end()
		second := reusePID(t, first.pid())
		if _, err := p.Snapshot(); !errors.Is(err, ErrGone) {
			t.Errorf("snapshot of an ended process, whose id process %d has now: %v, want ErrGone", second.pid(), err)
		}
		// The process that has the id now is another one, with a pin of its own.
		other, err := table.Open(second.pid())
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if other.ID() == p.ID() {
			t.Error("two processes share a pin because they had the same process id")
		}
	})
}

func TestWEP_22_ConnectionsCloseWithTheirProcess(t *testing.T) {
	everyWay(t, func(t *testing.T, table *Table) {
		l := newListener(t)
		child := pinStartCaller(t, l.Addr().String())
		raw := pinAccept(t, l)
		p := identify(t, table, raw)
		child.end()
		waitGone(t, p)
		raw.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := raw.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read on the connection of an ended process: %v, want it closed", err)
		}
	})
}

// TestPIDFDsAreBounded: the processes beyond the bound are held on to by their connections, also when the one that is asked
// is closed, and one that is opened by its id has a pidfd in any case.
func TestPIDFDsAreBounded(t *testing.T) {
	table, l := newTable(t, Config{}), newListener(t)
	table.maxHeld = 2
	open := func() (n int) {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range names {
			if to, err := os.Readlink("/proc/self/fd/" + d.Name()); err == nil && strings.Contains(to, "pidfd") {
				n++
			}
		}
		return n
	}
	before := open()
	var processes []*Process
	var children []*pinCaller
	for range 5 {
		children = append(children, pinStartCaller(t, l.Addr().String()))
		processes = append(processes, identify(t, table, pinAccept(t, l)))
	}
	// os/exec holds a pidfd for each child as well.
	if got := open() - before - len(children); got != 2 {
		t.Errorf("%d pidfds are open for %d processes, want 2", got, len(processes))
	}
	opened, err := table.Open(processes[4].PID)
	if err != nil || opened.ID() != processes[4].ID() {
		t.Fatalf("the same process by its id: %v", err)
	}
	if got := open() - before - len(children); got != 3 {
		t.Errorf("%d pidfds are open, want 3 with that of the process opened by its id", got)
	}
	opened.Close()
	for i, p := range processes {
		if err := p.Alive(); err != nil {
			t.Errorf("process %d: %v", i, err)
		}
		children[i].end()
		waitGone(t, p)
	}
	// The watcher says that a process is gone and then closes its pidfd.
	left := open() - before
	for end := time.Now().Add(10 * time.Second); left != 0 && time.Now().Before(end); left = open() - before {
		runtime.Gosched()
	}
	if left != 0 {
		t.Errorf("%d pidfds are left over", left)
	}
}

// TestAnotherConnectionIsAsked: a process without a pidfd is held on to by any of its connections.
func TestAnotherConnectionIsAsked(t *testing.T) {
	table, l := newTable(t, Config{}), newListener(t)
	table.maxHeld = 0
	var conns []net.Conn
	var processes []*Process
	for range 3 {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conn, info, err := table.identify(pinAccept(t, l))
		if err != nil {
			t.Fatal(err)
		}
		conns, processes = append(conns, conn), append(processes, info.Process)
	}
	for i := range conns {
		if _, err := processes[2].Snapshot(); err != nil {
			t.Fatalf("with %d of 3 connections: %v", 3-i, err)
		}
		conns[i].Close()
	}
	if err := processes[2].Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("without a connection: %v, want ErrGone", err)
	}
}

func TestOnePinForOneProcess(t *testing.T) {
	everyWay(t, func(t *testing.T, table *Table) {
		l := newListener(t)
		var conns []net.Conn
		var wg sync.WaitGroup
		var mu sync.Mutex
		ids := map[uint64]int{}
		for range 20 {
			c, err := net.Dial("unix", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			raw := pinAccept(t, l)
			wg.Go(func() {
				wrapped, info, err := table.identify(raw)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				conns = append(conns, wrapped)
				ids[info.Process.ID()]++
			})
		}
		wg.Wait()
		if len(ids) != 1 || len(table.pins) != 1 {
			t.Errorf("%d pins for one process, want 1", len(ids))
		}
		p, err := table.Open(int32(os.Getpid()))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range conns {
			c.Close()
			c.Close() // twice is once
		}
		if err := p.Alive(); err != nil {
			t.Errorf("Alive while one use is left: %v", err)
		}
		p.Close()
		if err := p.Alive(); !errors.Is(err, ErrGone) {
			t.Errorf("Alive after the last use: %v, want ErrGone", err)
		}
	})
}

func TestConnectionLimits(t *testing.T) {
	table, l := newTable(t, Config{MaxConnections: 3, MaxConnectionsPerUID: 2}), newListener(t)
	take := func() (net.Conn, error) {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		wrapped, _, err := table.identify(pinAccept(t, l))
		return wrapped, err
	}
	one, err := take()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := take(); err != nil {
		t.Fatal(err)
	}
	if _, err := take(); err == nil || !strings.Contains(err.Error(), "limit for one user") {
		t.Errorf("the third connection of a user who may have two: %v", err)
	}
	one.Close()
	if _, err := take(); err != nil {
		t.Errorf("after one was closed: %v", err)
	}
}

func TestForeignSocketsAndProcessesRefused(t *testing.T) {
	table := newTable(t, Config{})
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := table.Credentials().ServerHandshake(a); err == nil {
		t.Error("a connection that is no Unix socket was taken")
	}
	if _, err := table.Open(0); err == nil {
		t.Error("process id 0 was opened")
	}
	child := pinStartCaller(t, "-")
	child.end()
	if _, err := table.Open(child.pid()); !errors.Is(err, ErrGone) {
		t.Errorf("Open of an ended process: %v, want ErrGone", err)
	}
	if _, err := FromContext(context.Background()); err == nil {
		t.Error("a context without a connection has a process")
	}
}

// TestReadOnReady: a buffer is taken when there is something to read, and given back when nothing was.
func TestReadOnReady(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		defer c.Close()
	}
	c, pool := &conn{UnixConn: ends[0]}, &countingPool{}
	var _ interface {
		ReadOnReady(int, mem.BufferPool) (*[]byte, int, error)
	} = c
	type result struct {
		buf *[]byte
		n   int
		err error
	}
	read := make(chan result)
	go func() {
		for range 3 {
			buf, n, err := c.ReadOnReady(8, pool)
			read <- result{buf, n, err}
		}
	}()
	if _, err := ends[1].Write([]byte("hello, caller")); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"hello, c", "aller"} {
		if r := <-read; r.err != nil || string((*r.buf)[:r.n]) != want {
			t.Errorf("%+v, want %q", r, want)
		}
	}
	ends[1].Close()
	if r := <-read; r.err != io.EOF || r.buf != nil {
		t.Errorf("at the end: %+v", r)
	}
	if out := pool.out.Load(); out != 2 {
		t.Errorf("%d buffers are out, want the two that were handed on", out)
	}
	ends[0].Close()
	if _, _, err := c.ReadOnReady(8, pool); err == nil || pool.out.Load() != 2 {
		t.Errorf("closed: %v, %d buffers are out", err, pool.out.Load())
	}
}

// A countingPool counts the buffers that were not put back.
type countingPool struct{ out atomic.Int64 }

func (p *countingPool) Get(n int) *[]byte {
	p.out.Add(1)
	b := make([]byte, n)
	return &b
}

func (p *countingPool) Put(*[]byte) { p.out.Add(-1) }
