package privilege

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// waits waits until the process is an agent that waits for another to end, and says that it is ready.
func (p *place) waits(agent *process, metrics string) {
	p.t.Helper()
	p.eventually(func() error {
		if !strings.Contains(agent.out.String(), "this one waits for it to end") {
			return errors.New("it does not wait")
		}
		if metrics == "" {
			return nil
		}
		r, err := http.Get("http://" + metrics + "/ready")
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if said, err := io.ReadAll(r.Body); err != nil || r.StatusCode != http.StatusOK || !strings.Contains(string(said), "waits for the agent before this one") {
			return fmt.Errorf("%d %s, %v", r.StatusCode, said, err)
		}
		return nil
	})
}

// TestHandOver: an agent of another version is started beside the one that runs, forth and back, as a DaemonSet does, which
// nothing but the two themselves makes possible. No fetch fails, and every stream goes on; nor does a fetch fail when an agent is
// killed for which another waits, other than those under way.
func TestHandOver(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s := newSite(t)
	s.apply(fmt.Sprintf("{kind: Identity, name: web, spiffeID: /web, match: [\"unix:uid:%d\"]}\n", os.Getuid()))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	metrics := l.Addr().String()
	l.Close()
	p := s.place(agentUser, "hand_over: true\nsandbox: {landlock: auto, seccomp: require}\n")
	path := filepath.Join(p.dir, "run", "agent.sock")
	agent := p.start("agent 0", p.command(0, nil))
	p.eventually(func() error { return fetch(ctx, p.endpoint()) })
	c := p.traffic(ctx)
	c.settled(1)
	was, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	for round, program := range []int{1, 0, 1} {
		before := c.done.Load()
		if round == 1 { // from now on with probes; the one before has no port for them, so that the next may have it
			config := filepath.Join(p.dir, "etc", "agent.yaml")
			text, err := os.ReadFile(config)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(config, append(text, "metrics: {listen: '"+metrics+"'}\n"...), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		next := p.start(fmt.Sprintf("agent %d", round+1), p.command(program, nil))
		if round == 1 {
			p.waits(next, metrics)
		} else {
			p.waits(next, "")
		}
		c.goesOn(before) // by the one before
		before = c.done.Load()
		if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-agent.done
		if !agent.ProcessState.Success() {
			t.Errorf("the agent ended with %v", agent.ProcessState)
		}
		agent = next
		p.runs(ctx, agent, program)
		c.settled(int64(round) + 2)
		c.goesOn(before)
	}
	c.noneFailed()
	t.Logf("%d fetches in three changes of the program; the longest took %v", c.done.Load(), time.Duration(c.longest.Load()).Round(time.Millisecond))
	if is, err := os.Lstat(path); err != nil || !os.SameFile(was, is) {
		t.Errorf("the socket is another one: %v", err)
	}

	// One that waits can be ended, and the present one goes on; so does the next one that waits.
	next := p.start("agent 4", p.command(0, nil))
	p.waits(next, "")
	if err := next.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-next.done
	if !next.ProcessState.Success() {
		t.Errorf("one that waited ended with %v", next.ProcessState)
	}
	c.goesOn(c.done.Load())
	next = p.start("agent 5", p.command(0, nil))
	p.waits(next, "")
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-agent.done
	p.runs(ctx, next, 0)
	c.settled(5)
	if n := c.failed.Load(); n > 4 {
		t.Errorf("%d fetches failed after a kill, but only 4 can have been under way: %v", n, c.why.Load())
	}
}

// Without the setting a second agent refuses to start.
func TestSecondAgentIsRefused(t *testing.T) {
	s := newSite(t)
	p := s.place(agentUser, "")
	p.start("agent", p.command(0, nil))
	p.eventually(func() error {
		_, err := os.Lstat(filepath.Join(p.dir, "run", "agent.sock"))
		return err
	})
	second := p.start("second", p.command(0, nil))
	<-second.done
	if said := second.out.String(); second.ProcessState.Success() || !strings.Contains(said, "is in use by another agent") {
		t.Errorf("the second ended with %v and said %s", second.ProcessState, said)
	}
}
