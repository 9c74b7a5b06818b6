package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	stopWait   = 3 * time.Second  // between SIGTERM and SIGKILL
	answerWait = 20 * time.Second // for one command of the command line
	maxTail    = 64 << 10         // bytes of a log that are looked at
)

// A crew is the processes of a demo. All of them die with it: each has a parent-death signal, and close ends and reaps
// what still runs. It is safe for concurrent use.
type crew struct {
	logDir string
	env    []string
	// lost is called once for each process that ended although nobody ended it.
	lost func(error)

	starts chan start
	ended  chan struct{}

	mu      sync.Mutex // guards running
	running []*process // in the order of their start
}

type start struct {
	cmd  *exec.Cmd
	done chan error
}

func newCrew(logDir string, env []string, lost func(error)) *crew {
	c := &crew{logDir: logDir, env: env, lost: lost, starts: make(chan start), ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		// The parent-death signal comes when the thread that forked ends, so one thread forks all and lives as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for s := range c.starts {
			s.done <- s.cmd.Start()
		}
	}()
	return c
}

// fork starts cmd. Its own process group keeps a terminal's Ctrl-C for the demo alone, which then ends it in order.
func (c *crew) fork(cmd *exec.Cmd) error {
	cmd.Env = append(os.Environ(), c.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	s := start{cmd, make(chan error, 1)}
	c.starts <- s
	err := <-s.done
	if errors.Is(err, syscall.EACCES) {
		err = fmt.Errorf("%w (set TMPDIR to a directory from which programs may be run)", err)
	}
	return err
}

// A process is one member of the crew.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // how it ended; read after done

	mu     sync.Mutex // guards ending
	ending bool       // somebody ends it
}

// start starts a process whose output goes to its log.
func (c *crew) start(name, program string, args ...string) (*process, error) {
	log, err := os.OpenFile(c.logFile(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the process has its own descriptor
	cmd := exec.Command(program, args...)
	cmd.Args[0] = "signet"
	cmd.Dir = filepath.Dir(c.logDir)
	cmd.Stdout, cmd.Stderr = log, log
	if err := c.fork(cmd); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &process{name: name, cmd: cmd, done: make(chan struct{})}
	c.mu.Lock()
	c.running = append(c.running, p)
	c.mu.Unlock()
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		ending := p.ending
		p.mu.Unlock()
		if err == nil {
			err = errors.New("exit status 0")
		}
		p.err = &lostError{name, cmd.Process.Pid, err}
		if !ending {
			c.lost(p.err)
		}
		close(p.done)
	}()
	return p, nil
}

// A lostError is a process that has ended.
type lostError struct {
	name string
	pid  int
	err  error
}

func (e *lostError) Error() string {
	return fmt.Sprintf("%s (process %d) ended: %v", e.name, e.pid, e.err)
}
func (e *lostError) Unwrap() error { return e.err }

// signal notes that the process ends by our will and signals it.
func (p *process) signal(sig os.Signal) {
	p.mu.Lock()
	p.ending = true
	p.mu.Unlock()
	_ = p.cmd.Process.Signal(sig) // one that is gone needs none
}

// kill is kill -9. It returns when the process is gone.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

// stop ends the process in order, and by force if that takes too long.
func (p *process) stop() {
	p.signal(syscall.SIGTERM)
	t := time.NewTimer(stopWait)
	defer t.Stop()
	select {
	case <-p.done:
	case <-t.C:
		p.kill()
	}
}

// close ends all processes, the newest first, and waits for them.
func (c *crew) close() {
	c.mu.Lock()
	running := c.running
	c.running = nil
	c.mu.Unlock()
	for i := len(running) - 1; i >= 0; i-- {
		running[i].stop()
	}
	close(c.starts)
	<-c.ended
}

// alive says whether the process has not ended.
func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// run runs a command of the command line to its end and returns what it printed. The error holds its complaint.
func (c *crew) run(ctx context.Context, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWait)
	defer cancel()
	cmd := exec.Command(program, args...)
	cmd.Args[0] = "signet"
	cmd.Dir = filepath.Dir(c.logDir)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := c.fork(cmd); err != nil {
		return "", fmt.Errorf("starting %s: %w", program, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() }) // one that is gone needs no kill
	defer stop()
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return stdout.String(), &commandError{args: args, err: err, said: strings.TrimSpace(stderr.String())}
	}
	return stdout.String(), nil
}

// A commandError is a command of the command line that did not do what it was told.
type commandError struct {
	args []string
	err  error
	said string // on standard error
}

func (e *commandError) Error() string {
	return fmt.Sprintf("signet %s: %v: %s", strings.Join(e.args, " "), e.err, e.said)
}

func (e *commandError) Unwrap() error { return e.err }

func (c *crew) logFile(name string) string { return filepath.Join(c.logDir, name+".log") }

// tail returns the end of a log.
func (c *crew) tail(name string) string {
	f, err := os.Open(c.logFile(name))
	if err != nil {
		return ""
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-maxTail), io.SeekStart) // if it does not move, nothing is read
	}
	b, err := io.ReadAll(io.LimitReader(f, maxTail))
	if err != nil {
		return ""
	}
	return string(b)
}
