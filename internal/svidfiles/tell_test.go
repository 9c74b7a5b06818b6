package svidfiles

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestExec(t *testing.T) {
	t.Setenv("SECRET_OF_THE_HELPER", "s3cret")
	out := filepath.Join(t.TempDir(), "out")
	e := &Exec{Command: []string{"/bin/sh", "-c", `env > "$1"; echo "$2" >> "$1"; pwd >> "$1"`, "sh", out, "$(id); a|b"}, Dir: "/run/web"}
	if err := e.Tell(t.Context(), Renewed); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"SIGNET_DIR=/run/web\n", "SIGNET_EVENT=renewed\n", "PATH=", "$(id); a|b\n/\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the program does not see %q", want)
		}
	}
	if strings.Contains(string(b), "s3cret") {
		t.Error("the program sees the helper's environment")
	}

	for want, command := range map[string][]string{
		"exit status 3: wrong": {"/bin/sh", "-c", "echo wrong >&2; exit 3"},
		"no such file":         {"/nowhere/program"},
		"running /bin/sh: exit status 1: " + strings.Repeat("x", 100): {"/bin/sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x; exit 1"},
	} {
		err := (&Exec{Command: command}).Tell(t.Context(), Renewed)
		if err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > maxOutput+100 {
			t.Errorf("%q: %.200v, want %q", command, err, want)
		}
	}
}

// TestExecEndsWithAllItStarted runs a program that goes on, and leaves a child that would, too.
func TestExecEndsWithAllItStarted(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fifo := filepath.Join(t.TempDir(), "alive")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	w.Close()
	ended := make(chan error, 1)
	go func() { // reads until nobody has the pipe open for writing any more
		f, err := os.Open(fifo)
		if err == nil {
			_, err = io.Copy(io.Discard, f)
			f.Close()
		}
		ended <- err
	}()
	e := &Exec{Command: []string{"/bin/sh", "-c", `exec 3>"$1"; sleep 600 & sleep 600`, "sh", fifo}, Timeout: 200 * time.Millisecond}
	if err := e.Tell(t.Context(), Renewed); err == nil || !strings.Contains(err.Error(), "longer than 200ms and was killed") {
		t.Errorf("a program that goes on: %v", err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("what the program started still runs")
	}
}

// TestMain makes the test binary be a listener where the environment says so. A shell could not: a signal that comes just before it
// reads waits for the end of the reading.
func TestMain(m *testing.M) {
	if os.Getenv("SIGNET_TEST_SIGNALS") == "" {
		if signal.Ignored(unix.SIGHUP) { // as under nohup: what the tests start would ignore it, too
			signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
		}
		os.Exit(m.Run())
	}
	got := make(chan os.Signal, 16)
	signal.Notify(got, unix.SIGHUP, unix.SIGUSR1)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println("ready")
	for s := range got {
		fmt.Println(strings.TrimPrefix(unix.SignalName(s.(unix.Signal)), "SIG"))
	}
}

// self is the program of a listener.
func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// listener is a process that says which signals it gets.
func listener(t *testing.T) (cmd *exec.Cmd, next func() string) {
	t.Helper()
	cmd = exec.Command(self(t))
	cmd.Env = append(os.Environ(), "SIGNET_TEST_SIGNALS=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	next = func() string {
		lines.Scan()
		return lines.Text()
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	if got := next(); got != "ready" {
		t.Fatalf("the process says %q", got)
	}
	return cmd, next
}

func TestSignal(t *testing.T) {
	cmd, next := listener(t)
	pid := cmd.Process.Pid
	file := filepath.Join(t.TempDir(), "pid")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tell := func(s *Signal) error { return s.Tell(t.Context(), Renewed) }
	byFile := &Signal{Signal: unix.SIGHUP, PIDFile: file}
	if err := tell(byFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a pid file: %v", err)
	}
	write(fmt.Sprintf("%d\n/var/lib/postgresql\nmore\n", pid))
	if err := tell(byFile); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "HUP" {
		t.Errorf("the process got %q", got)
	}
	if err := tell(&Signal{Signal: unix.SIGUSR1, PIDFile: file, Executable: self(t)}); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "USR1" {
		t.Errorf("the process got %q", got)
	}

	// Whoever has the number by now gets nothing.
	if err := tell(&Signal{Signal: unix.SIGHUP, PIDFile: file, Executable: "/usr/sbin/nginx"}); err == nil || !strings.Contains(err.Error(), "not /usr/sbin/nginx: it gets no signal") {
		t.Errorf("another program: %v", err)
	}
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(file, long, long); err != nil {
		t.Fatal(err)
	}
	if err := tell(byFile); err == nil || !strings.Contains(err.Error(), "another one than meant") {
		t.Errorf("a process that is younger than the pid file: %v", err)
	}
	for _, text := range []string{"", "0", "1", "-5", "x", "99999999999"} {
		write(text)
		if err := tell(byFile); err == nil || !strings.Contains(err.Error(), "holds no process id") {
			t.Errorf("pid file with %q: %v", text, err)
		}
	}

	// A process that was pinned stays the one that was meant.
	pinned := &Signal{Signal: unix.SIGHUP, PID: pid}
	if err := pinned.Pin(); err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	if err := tell(pinned); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "HUP" {
		t.Errorf("the process got %q", got)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if err := tell(pinned); !errors.Is(err, unix.ESRCH) {
		t.Errorf("a process that has ended: %v", err)
	}
	write(strconv.Itoa(pid))
	if err := tell(byFile); !errors.Is(err, unix.ESRCH) && (err == nil || !strings.Contains(err.Error(), "another one")) {
		t.Errorf("a process that has ended, by its file: %v", err)
	}
}

// A pid file that root reads and somebody else owns names processes of that user alone.
func TestSignalByAnothersPIDFile(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, who may signal everybody")
	}
	const uid = 64125
	mine, next := listener(t) // root's
	theirs := exec.Command("/bin/sleep", "3600")
	theirs.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if err := theirs.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = theirs.Process.Kill(); _ = theirs.Wait() })
	dir := t.TempDir()
	make := func(name string, pid, owner int, mode os.FileMode) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(file, []byte(strconv.Itoa(pid)), 0o600), os.Chmod(file, mode), os.Lchown(file, owner, owner)); err != nil {
			t.Fatal(err)
		}
		return file
	}
	link := func(name, to string, owner int) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.Symlink(to, path), os.Lchown(path, owner, owner)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	roots := make("root", mine.Process.Pid, 0, 0o644)
	theirOwn := make("their-own", theirs.Process.Pid, uid, 0o644)
	for _, tt := range []struct {
		file, exe, want string
	}{
		{make("theirs", mine.Process.Pid, uid, 0o644), "", "it gets no signal"},
		{make("theirs-exe", mine.Process.Pid, uid, 0o644), self(t), "it gets no signal"},
		{link("their-link", roots, uid), "", "it gets no signal"},
		{make("open", mine.Process.Pid, 0, 0o666), "", "writable by others"},
		{make("group", mine.Process.Pid, 0, 0o664), "", "writable by others"},
		{dir, "", "is no file"},
		{link("our-link", roots, 0), "", ""},
		{roots, "", ""},
		{theirOwn, "", ""},
	} {
		err := (&Signal{Signal: unix.SIGHUP, PIDFile: tt.file, Executable: tt.exe}).Tell(t.Context(), Renewed)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", filepath.Base(tt.file), err, tt.want)
		}
		if err != nil || tt.file == theirOwn {
			continue
		}
		// It is waited for: two signals that are pending at the same time are one.
		if got := next(); got != "HUP" {
			t.Errorf("%s: the process got %q", filepath.Base(tt.file), got)
		}
	}
	if err := mine.Process.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "USR1" {
		t.Errorf("the process got %q as well", got)
	}
	if err := theirs.Wait(); err == nil || theirs.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGHUP {
		t.Errorf("the owner's own process ended with %v", err)
	}
}

func TestParseSignal(t *testing.T) {
	for name, want := range map[string]unix.Signal{"HUP": unix.SIGHUP, "sighup": unix.SIGHUP, "USR2": unix.SIGUSR2, "KILL": 0, "": 0, "9": 0} {
		got, err := ParseSignal(name)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("ParseSignal(%q) = %v, %v", name, got, err)
		}
	}
}

func FuzzPIDFile(f *testing.F) {
	f.Add([]byte("123\n"))
	f.Add([]byte(" 4294967297 \nrest"))
	path := filepath.Join(f.TempDir(), "pid")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if file, err := readPIDFile(path); err == nil && (file.pid <= 1 || len(b) > 4096) {
			t.Fatalf("%q is process %d", b, file.pid)
		}
	})
}
