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
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// childEnv makes the test binary play a caller; its value is the part.
const childEnv = "SIGNET_TEST_PEER"

func TestMain(m *testing.M) {
	if socket := os.Getenv(pinChildEnv); socket != "" {
		connectAndWait(socket)
	}
	switch os.Getenv(childEnv) {
	case "":
		goleak.VerifyTestMain(m)
	case "caller":
		caller(os.Args[1:])
	case "reuse":
		if err := reuse(); err != nil {
			fmt.Println("error:", err)
		}
	}
}

// caller connects to the socket of its first argument, if it has one, takes the name of its second, and lives until its
// input ends.
func caller(args []string) {
	if len(args) > 1 {
		if err := os.WriteFile("/proc/self/comm", []byte(args[1]), 0); err != nil {
			fmt.Println("error:", err)
		}
	}
	if len(args) > 0 && args[0] != "" {
		conn, err := net.Dial("unix", args[0])
		if err != nil {
			fmt.Println("error:", err)
			return
		}
		defer conn.Close()
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// A child is a running caller.
type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

func startCaller(prepare func(*exec.Cmd), args ...string) (*child, error) {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = []string{childEnv + "=caller"}
	cmd.Stderr = os.Stderr
	if prepare != nil {
		prepare(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{cmd: cmd, stdin: stdin}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		return nil, errors.Join(fmt.Errorf("the caller says %q: %w", line, err), c.end())
	}
	return c, nil
}

func (c *child) end() error {
	c.stdin.Close()
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait() // says that it was killed
	return nil
}

// A place is a socket whose callers a table identifies.
type place struct {
	table    *Table
	listener *net.UnixListener
	path     string
}

func newPlace(dir string) (*place, error) {
	table, err := NewTable(Config{})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		return nil, errors.Join(err, table.Close())
	}
	return &place{table: table, listener: listener, path: path}, nil
}

func (p *place) close() { p.listener.Close(); p.table.Close() }

func (p *place) accept() (net.Conn, Info, error) {
	p.listener.SetDeadline(time.Now().Add(20 * time.Second))
	raw, err := p.listener.AcceptUnix()
	if err != nil {
		return nil, Info{}, err
	}
	return p.table.identify(raw)
}

func testPlace(t *testing.T) *place {
	t.Helper()
	p, err := newPlace(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

func testCaller(t *testing.T, prepare func(*exec.Cmd), args ...string) *child {
	t.Helper()
	c, err := startCaller(prepare, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.end() })
	return c
}

func TestProcessIsPinnedUntilItEnds(t *testing.T) {
	for name, change := range ways {
		t.Run(name, func(t *testing.T) {
			p := testPlace(t)
			change(p.table)
			c := testCaller(t, nil, p.path, ") S 1 (\nUid:\t0")
			conn, info, err := p.accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			process := info.Process
			if process.PID != int32(c.cmd.Process.Pid) || process.UID != uint32(os.Getuid()) || info.UID != process.UID {
				t.Errorf("the caller is process %d of uid %d, want %d of %d", process.PID, process.UID, c.cmd.Process.Pid, os.Getuid())
			}
			s, err := process.Snapshot()
			if err != nil || s.EffectiveUID != uint32(os.Geteuid()) || s.StartTime == 0 || s.Executable.Inode == 0 {
				t.Errorf("a caller with a hostile name: %+v, %v", s, err)
			}
			again, err := p.table.Open(process.PID)
			if err != nil || again.ID() != process.ID() {
				t.Errorf("the same process opened by its id is another: %v", err)
			}
			// A zombie has ended: its parent, this test, has not waited for it yet.
			c.cmd.Process.Kill()
			select {
			case <-process.Done():
			case <-time.After(10 * time.Second):
				t.Fatal("the end of the process goes unnoticed")
			}
			for _, p := range []*Process{process, again} {
				if err := p.Alive(); !errors.Is(err, ErrGone) {
					t.Errorf("Alive after the end: %v", err)
				}
				if _, err := p.Snapshot(); !errors.Is(err, ErrGone) {
					t.Errorf("Snapshot after the end: %v", err)
				}
			}
			if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Error("the connection of a process that has ended stays open")
			}
			again.Close()
			conn.Close()
			conn.Close() // twice is allowed
			p.table.mu.Lock()
			defer p.table.mu.Unlock()
			if len(p.table.pins)+len(p.table.byPID)+p.table.conns+len(p.table.uidConns) != 0 {
				t.Errorf("%d pins and %d connections are left over", len(p.table.pins), p.table.conns)
			}
		})
	}
}

func TestCallerThatEndedBeforeAcceptIsRefused(t *testing.T) {
	p := testPlace(t)
	c := testCaller(t, nil, p.path)
	c.end()
	if conn, info, err := p.accept(); !errors.Is(err, ErrGone) {
		if err == nil {
			conn.Close()
		}
		t.Errorf("a caller that was gone before it was accepted: %+v, %v; want ErrGone", info, err)
	}
}

func TestOpenRefusesWhatIsNoProcess(t *testing.T) {
	p := testPlace(t)
	c := testCaller(t, nil)
	pid := int32(c.cmd.Process.Pid)
	c.end()
	for _, pid := range []int32{0, -1, pid} {
		if process, err := p.table.Open(pid); err == nil {
			t.Errorf("process %d was opened as %+v", pid, process)
		}
	}
}

func TestTableClosesUnderItsCallers(t *testing.T) {
	p := testPlace(t)
	var group sync.WaitGroup
	for range 20 {
		c := testCaller(t, nil, p.path)
		conn, info, err := p.accept()
		if err != nil {
			t.Fatal(err)
		}
		group.Go(func() {
			conn.Read(make([]byte, 1))
			select { // a process's files are closed before it has ended
			case <-info.Process.Done():
			case <-time.After(10 * time.Second):
			}
			if err := info.Process.Alive(); !errors.Is(err, ErrGone) {
				t.Errorf("after the table was closed: %v", err)
			}
			conn.Close()
		})
		group.Go(func() { c.cmd.Process.Kill() })
	}
	p.close()
	group.Wait()
	if _, err := p.table.Open(int32(os.Getpid())); err == nil {
		t.Error("a closed table opens a process")
	}
}

// A caller in another PID namespace has no process id here. [DESIGN §7]
func TestForeignPIDNamespaceIsRefused(t *testing.T) {
	// The agent's side is in a PID namespace of its own, so that this process is out of its sight.
	report := inNamespace(t)
	if !strings.Contains(report, "foreign caller refused") {
		t.Errorf("got %q", report)
	}
}

// A process id that was given to another process is not taken for the one that had it. [DESIGN §12]
func TestReusedProcessID(t *testing.T) {
	report := inNamespace(t)
	for _, want := range []string{"same id", "old gone", "new alive", "another process"} {
		if !strings.Contains(report, want) {
			t.Errorf("%q is missing in %q", want, report)
		}
	}
}

// inNamespace runs reuse in its own PID namespace and returns what it says; this process, too, connects to it.
func inNamespace(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", dir)
	cmd.Env = []string{childEnv + "=reuse"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	if uid := os.Geteuid(); uid != 0 { // who is not root is it in a user namespace
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var report strings.Builder
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		fmt.Fprintln(&report, lines.Text())
		if lines.Text() == "waiting" {
			conn, err := net.Dial("unix", filepath.Join(dir, "s"))
			if err != nil {
				t.Error(err)
				break
			}
			defer conn.Close()
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, report.String())
	}
	return report.String()
}

// reuse is the agent's side in a PID namespace of its own, as its first process.
func reuse() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	p, err := newPlace(os.Args[1])
	if err != nil {
		return err
	}
	defer p.close()

	fmt.Println("waiting")
	conn, info, err := p.accept()
	if err != nil {
		return err
	}
	conn.Close()
	if errors.Is(info.Err, ErrForeignPIDNamespace) && info.Process == nil {
		fmt.Println("foreign caller refused")
	}

	first, err := startCaller(nil, p.path)
	if err != nil {
		return err
	}
	oldConn, old, err := p.accept()
	if err != nil {
		return err
	}
	defer oldConn.Close()
	pid := first.cmd.Process.Pid
	if err := first.end(); err != nil {
		return err
	}
	// Threads take ids too, so it may need some tries until a caller has the very one.
	for range 200 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(fmt.Sprint(pid-1)), 0); err != nil {
			return err
		}
		second, err := startCaller(nil, p.path)
		if err != nil {
			return err
		}
		newConn, info, err := p.accept()
		if err != nil {
			return errors.Join(err, second.end())
		}
		if second.cmd.Process.Pid == pid {
			fmt.Println("same id")
			if err := old.Process.Alive(); errors.Is(err, ErrGone) {
				fmt.Println("old gone")
			}
			if _, err := old.Process.Snapshot(); err == nil {
				fmt.Println("error: the old process has the new one's state")
			}
			if info.Process.Alive() == nil {
				fmt.Println("new alive")
			}
			if info.Process.ID() != old.Process.ID() && info.Process.PID == old.Process.PID {
				fmt.Println("another process")
			}
			newConn.Close()
			return second.end()
		}
		newConn.Close()
		if err := second.end(); err != nil {
			return err
		}
	}
	return fmt.Errorf("process id %d did not come again", pid)
}
