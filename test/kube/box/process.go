package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// start starts a program, with its output in logs/NAME.log. It does not use
// os/exec, whose Wait would compete with reap for the children of process 1.
func (n *node) start(name string, args ...string) (int, chan syscall.WaitStatus, error) {
	path, err := lookPath(args[0])
	if err != nil {
		return 0, nil, err
	}
	log, err := os.OpenFile(filepath.Join(n.dir, "logs", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, nil, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	n.mu.Lock() // reap must not see it before it is in the map
	defer n.mu.Unlock()
	pid, err := syscall.ForkExec(path, args, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=" + programPath, "HOME=/root"},
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
	})
	if err != nil {
		return 0, nil, fmt.Errorf("%s: %w", args[0], err)
	}
	done := make(chan syscall.WaitStatus, 1)
	n.exited[pid] = done
	return pid, done, nil
}

const programPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func lookPath(name string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	for _, d := range strings.Split(programPath, ":") {
		p := filepath.Join(d, name)
		if info, err := os.Stat(p); err == nil && info.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: not installed", name)
}

// run runs a command to its end.
func (n *node) run(args ...string) error {
	name := filepath.Base(args[0])
	_, done, err := n.start(name, args...)
	if err != nil {
		return err
	}
	if ws := <-done; ws.ExitStatus() != 0 {
		return fmt.Errorf("%s: exit status %d (logs/%s.log)", strings.Join(args, " "), ws.ExitStatus(), name)
	}
	return nil
}

// reap collects all children, those started here and orphans.
func (n *node) reap() {
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	for range child {
		for {
			var ws syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
			if err == syscall.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
			n.mu.Lock()
			if done := n.exited[pid]; done != nil {
				delete(n.exited, pid)
				done <- ws
			}
			n.mu.Unlock()
		}
	}
}

// fixed is the arguments of a program that are always the same.
func fixed(args ...string) func() []string { return func() []string { return args } }

// keep returns a function that starts a component and starts it again whenever
// it ends, so that a test can kill one. It stays away while "kubebox stop"
// says so. While it runs its PID, as the node counts, is in NAME.pid.
func (n *node) keep(name string, args func() []string) func() error {
	return func() error {
		pid, done, err := n.start(name, args()...)
		if err != nil {
			return err
		}
		go func() {
			for {
				if err := writeFile(n.dir, name+".pid", fmt.Sprintln(pid)); err != nil {
					fmt.Fprintln(os.Stderr, "kubebox:", err)
				}
				ws := <-done
				os.Remove(filepath.Join(n.dir, name+".pid"))
				fmt.Fprintf(os.Stderr, "kubebox: %s ended (exit status %d, signal %d); starting it again\n",
					name, ws.ExitStatus(), ws.Signal())
				for {
					if !n.restWhileStopped(name) {
						return
					}
					if pid, done, err = n.start(name, args()...); err == nil {
						break
					}
					fmt.Fprintln(os.Stderr, "kubebox:", err)
				}
			}
		}()
		return nil
	}
}

// restWhileStopped waits a second, so that one that ends at once is not started all the time, or as long as a component is to
// be away. It reports whether the node goes on.
func (n *node) restWhileStopped(name string) bool {
	for {
		second := time.NewTimer(time.Second)
		select {
		case <-second.C:
		case <-n.ctx.Done():
			second.Stop()
			return false
		}
		err := awaitFile(n.ctx, stoppedFile(n.dir, name), false)
		if err == nil || n.ctx.Err() != nil {
			return n.ctx.Err() == nil
		}
		fmt.Fprintln(os.Stderr, "kubebox:", err)
	}
}

func stoppedFile(dir, name string) string { return filepath.Join(dir, name+".stopped") }
