package privilege

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
)

// activated is the agent of one of the two programs with a socket that somebody else holds, as systemd starts it.
func (p *place) activated(program int, socket *os.File) *process {
	agent := p.command(program, []uintptr{unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH})
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, agent.Args...)...)
	cmd.SysProcAttr = agent.SysProcAttr
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=workload")
	cmd.ExtraFiles = []*os.File{socket}
	return p.start(fmt.Sprintf("agent of version %d", program), cmd)
}

// runs waits until the process is the agent and answers.
func (p *place) runs(ctx context.Context, agent *process, program int) {
	p.t.Helper()
	p.eventually(func() error {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", agent.Process.Pid))
		if err == nil && exe != programs[program] {
			err = fmt.Errorf("%s runs", exe)
		}
		if err == nil && !strings.Contains(agent.out.String(), "agent starts") {
			err = errors.New("the agent has not started")
		}
		return err
	})
	if err := fetch(ctx, p.endpoint()); err != nil {
		p.t.Fatal(err)
	}
}

func fetch(ctx context.Context, addr string) error {
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(addr))
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.FetchX509SVIDs(ctx)
	return err
}

// A watcher counts what a go-spiffe stream gets.
type watcher struct{ updates, errors atomic.Int64 }

func (w *watcher) OnX509ContextUpdate(*workloadapi.X509Context) { w.updates.Add(1) }
func (w *watcher) OnX509ContextWatchError(error)                { w.errors.Add(1) }

// callers have streams open at an agent, and fetch from it all the time.
type callers struct {
	p            *place
	streams      []watcher
	done, failed atomic.Int64 // fetches
	why          atomic.Value // the last failure's text
	longest      atomic.Int64 // the longest fetch, in nanoseconds
}

// traffic starts callers, which end with the test.
func (p *place) traffic(ctx context.Context) *callers {
	p.t.Helper()
	c := &callers{p: p, streams: make([]watcher, 300)}
	var all sync.WaitGroup
	ctx, stop := context.WithCancel(ctx)
	p.t.Cleanup(func() {
		stop()
		all.Wait()
	})
	for i := range c.streams {
		w, err := workloadapi.New(ctx, workloadapi.WithAddr(p.endpoint()))
		if err != nil {
			p.t.Fatal(err)
		}
		all.Go(func() {
			defer w.Close()
			_ = w.WatchX509Context(ctx, &c.streams[i]) // ends with its context
		})
	}
	for range 4 {
		all.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				err := fetch(ctx, p.endpoint())
				switch {
				case err == nil:
					c.done.Add(1)
				case ctx.Err() == nil:
					c.failed.Add(1)
					c.why.Store(err.Error())
				}
				took := time.Since(began).Nanoseconds()
				for was := c.longest.Load(); took > was && !c.longest.CompareAndSwap(was, took); was = c.longest.Load() {
				}
			}
		})
	}
	return c
}

// settled waits until each stream has had a message of each agent.
func (c *callers) settled(atLeast int64) {
	c.p.t.Helper()
	c.p.eventually(func() error {
		for i := range c.streams {
			if n := c.streams[i].updates.Load(); n < atLeast {
				return fmt.Errorf("stream %d has had %d messages, want %d", i, n, atLeast)
			}
		}
		return nil
	})
}

// goesOn waits until there were some fetches more than before.
func (c *callers) goesOn(before int64) {
	c.p.t.Helper()
	c.p.eventually(func() error {
		if c.done.Load() < before+20 {
			return errors.New("callers do not go on")
		}
		return nil
	})
}

func (c *callers) noneFailed() {
	c.p.t.Helper()
	if n := c.failed.Load(); n != 0 {
		c.p.t.Errorf("%d of %d fetches failed, such as: %v", n, n+c.done.Load(), c.why.Load())
	}
}

// TestUpgradeWithStreamsOpen changes the agent's program for a newer one and back, with the socket held by who starts it,
// while hundreds of streams are open and callers come all the time: no call fails, and every stream goes on. A killed agent
// fails the calls that are under way, and no others.
func TestUpgradeWithStreamsOpen(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s := newSite(t)
	s.apply(fmt.Sprintf("{kind: Identity, name: web, spiffeID: /web, match: [\"unix:uid:%d\"]}\n", os.Getuid()))
	p := s.place(agentUser, "sandbox: {landlock: auto, seccomp: require}\n")
	path := filepath.Join(p.dir, "run", "agent.sock")
	if err := os.Chown(filepath.Dir(path), 0, 0); err != nil { // as systemd makes it
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	agent := p.activated(0, socket)
	p.eventually(func() error { return fetch(ctx, p.endpoint()) })

	c := p.traffic(ctx)
	c.settled(1)
	for round, program := range []int{1, 0, 1} { // up, down, up
		before := c.done.Load()
		if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-agent.done
		if !agent.ProcessState.Success() {
			t.Errorf("the agent ended with %v", agent.ProcessState)
		}
		if _, err := os.Lstat(path); err != nil {
			t.Fatalf("the agent has removed a socket that is not its own: %v", err)
		}
		agent = p.activated(program, socket)
		p.runs(ctx, agent, program)
		c.settled(int64(round) + 2)
		c.goesOn(before)
	}
	c.noneFailed()
	t.Logf("%d fetches in three changes of the program", c.done.Load())

	before := c.failed.Load()
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-agent.done
	agent = p.activated(0, socket)
	p.runs(ctx, agent, 0)
	c.settled(5)
	if n := c.failed.Load() - before; n > 4 {
		t.Errorf("%d fetches failed after a kill, but only 4 can have been under way: %v", n, c.why.Load())
	}
}

// TestSocketOfAnotherPath: a unit whose socket is elsewhere than socket_path is refused, with both names.
func TestSocketOfAnotherPath(t *testing.T) {
	s := newSite(t)
	p := s.place(0, "")
	for _, name := range []string{"agent.sock", "other.sock"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(p.dir, "run", name)})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if name == "agent.sock" {
			continue // what is at socket_path
		}
		socket, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		defer socket.Close()
		agent := p.activated(0, socket)
		<-agent.done
		if said := agent.out.String(); agent.ProcessState.Success() || !strings.Contains(said, "ListenStream must be socket_path") || !strings.Contains(said, "other.sock") {
			t.Errorf("the agent ended with %v and said %s", agent.ProcessState, said)
		}
	}
}

// TestManagerKeepsTheSocket: the agent tells a manager such as systemd that it is ready and alive, gives it its socket, and after
// a kill takes that very socket back: who called meanwhile is answered.
func TestManagerKeepsTheSocket(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := newSite(t)
	s.apply(fmt.Sprintf("{kind: Identity, name: web, spiffeID: /web, match: [\"unix:uid:%d\"]}\n", os.Getuid()))
	p := s.place(agentUser, "")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(p.dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	if err := os.Chmod(filepath.Join(p.dir, "notify"), 0o777); err != nil {
		t.Fatal(err)
	}
	cmd := p.command(0, []uintptr{unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH})
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(p.dir, "notify"), "FDSTORE=4", "WATCHDOG_USEC=2000000")
	agent := p.start("agent", cmd)
	var kept *os.File
	seen := map[string]bool{}
	for !seen["READY=1"] || !seen["WATCHDOG=1"] || kept == nil {
		if err := manager.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := manager.ReadMsgUnix(buf, oob)
		if err != nil {
			t.Fatalf("after %v: %v", seen, err)
		}
		message := string(buf[:n])
		first, _, _ := strings.Cut(message, "\n")
		seen[first] = true
		if first != "FDSTORE=1" {
			continue
		}
		if !strings.HasSuffix(message, "FDNAME=workload") {
			t.Errorf("message %q", message)
		}
		control, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(control) != 1 {
			t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&control[0])
		if err != nil || len(fds) != 1 {
			t.Fatal(err)
		}
		kept = os.NewFile(uintptr(fds[0]), "kept")
		defer kept.Close()
	}
	p.eventually(func() error { return fetch(ctx, p.endpoint()) })
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-agent.done
	waiting := make(chan error, 1)
	go func() { waiting <- fetch(ctx, p.endpoint()) }()
	agent = p.activated(1, kept)
	p.runs(ctx, agent, 1)
	if err := <-waiting; err != nil {
		t.Errorf("who called while no agent ran: %v", err)
	}
}
