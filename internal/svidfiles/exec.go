package svidfiles

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// An Exec runs a program when there are new files: without a shell, and with nothing of ours in its environment but where
// the files are and what has happened to them.
type Exec struct {
	Command []string // the program and its arguments

	// Timeout is how long it may run. Zero means 30 s.
	Timeout time.Duration

	// Dir is the directory of the files, which the program finds in SIGNET_DIR.
	Dir string
}

// inherited is what a program needs to run at all.
var inherited = []string{"PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_RUNTIME_DIR"}

// maxOutput bounds what is kept of what the program says.
const maxOutput = 2048

func (e *Exec) String() string { return "running " + e.Command[0] }

// Tell runs the program and waits for it. Whatever it has started ends with it when its time is over.
func (e *Exec) Tell(ctx context.Context, event string) error {
	timeout := e.Timeout
	if timeout == 0 {
		timeout = 30 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, e.Command[0], e.Command[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"SIGNET_DIR=" + e.Dir, "SIGNET_EVENT=" + event}
	for _, name := range inherited {
		if v, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	said := &tail{}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // something it started may hold its output open
	err := cmd.Run()
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("it ran for longer than %v and was killed", timeout)
	}
	if out := strings.TrimSpace(said.String()); out != "" {
		return fmt.Errorf("running %s: %w: %s", e.Command[0], err, out)
	}
	return fmt.Errorf("running %s: %w", e.Command[0], err)
}

// A tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p[max(0, len(p)-maxOutput):]...)
	t.b = t.b[max(0, len(t.b)-maxOutput):]
	return len(p), nil
}

func (t *tail) String() string { return string(t.b) }
