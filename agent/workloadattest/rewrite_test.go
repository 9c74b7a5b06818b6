package workloadattest_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	sys "golang.org/x/sys/unix"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/unix"
	"github.com/signet-id/signet/workloadapi/peer"
)

// These tests write another program into the file of one that was hashed, through a mapping, on a filesystem in memory,
// which does not set the file's times then.

// rewriteEnv makes the test binary play its part; its value is the program that rewrites.
const rewriteEnv = "SIGNET_TEST_REWRITE"

// becomeAnother waits for a line and then runs itself again with another content, as the same process.
func becomeAnother() {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println("ready")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		os.Exit(1)
	}
	os.Setenv("SIGNET_TEST_ATTEST", "rewrite")
	err = syscall.Exec(os.Getenv(rewriteEnv), []string{"rewriter", self}, os.Environ())
	fmt.Println("error", err)
	os.Exit(1)
}

// rewriteAndRun is the rewriter: it changes its argument's last byte and becomes it.
func rewriteAndRun() {
	err := changeLastByte(os.Args[1])
	if err == nil {
		os.Setenv("SIGNET_TEST_ATTEST", "wait")
		err = syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
	}
	fmt.Println("error", err)
	os.Exit(1)
}

// changeLastByte writes through a mapping whose page has been read before.
func changeLastByte(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	m, err := sys.Mmap(int(f.Fd()), 0, int(st.Size()), sys.PROT_READ|sys.PROT_WRITE, sys.MAP_SHARED)
	if err != nil {
		return err
	}
	last := len(m) - 1
	m[last]++ // reads first
	return sys.Munmap(m)
}

// inMemory copies the test binary to a tmpfs, as somebody else's file, with times of the past.
func inMemory(t *testing.T, content string) string {
	t.Helper()
	requireRoot(t)
	dir := t.TempDir()
	if err := sys.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sys.Unmount(dir, sys.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	program, _ := workload(t, "program", content)
	bytes, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "program")
	if err := os.WriteFile(path, bytes, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 1, 1); err != nil {
		t.Fatal(err)
	}
	return path
}

func fileOf(t *testing.T, path string) peer.File {
	t.Helper()
	var st sys.Stat_t
	if err := sys.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return peer.FileOf(&st)
}

// tomorrow is a time at which the last change of a file is old.
func tomorrow() time.Time { return time.Now().Add(24 * time.Hour) }

// look attests and returns the hash, and whether the result is fleeting.
func look(t *testing.T, a *workloadattest.Attestor, p *peer.Process) (sum string, fleeting bool) {
	t.Helper()
	c, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range c.Selectors {
		if sum, ok := strings.CutPrefix(s.String(), "unix:sha256:"); ok {
			return sum, c.Fleeting
		}
	}
	t.Fatalf("no hash in %q", c.Selectors)
	return "", false
}

func TestHashOfARewrittenFileIsNotRemembered(t *testing.T) {
	path := inMemory(t, "first")
	table := newTable(t)
	a := attestor(t, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(t, unix.Config{Now: tomorrow})}})

	before := fileOf(t, path)
	first := startRewritable(t, table, path, "wait")
	sum, _ := look(t, a, first.process)
	first.end()
	if err := changeLastByte(path); err != nil {
		t.Fatal(err)
	}
	if fileOf(t, path) != before {
		t.Log("this kernel shows the change in the file's times")
	}
	second := startRewritable(t, table, path, "wait")
	if again, _ := look(t, a, second.process); again == sum {
		t.Errorf("another content runs under the hash %s of the first", sum)
	}
}

func TestProcessThatBecameARewrittenFile(t *testing.T) {
	path := inMemory(t, "second")
	rewriter, _ := workload(t, "rewriter", "")
	a := attestor(t, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(t, unix.Config{Now: tomorrow})}})

	w := startRewritable(t, newTable(t), path, "another", rewriteEnv+"="+rewriter)
	before, fleeting := look(t, a, w.process)
	state, err := w.process.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	w.say(t, "now")
	now, err := w.process.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if !now.Equal(state) {
		t.Log("this kernel shows the change in the process's state")
	}
	after, still := look(t, a, w.process)
	if after == before {
		t.Error("the process runs another content under the first one's hash")
	}
	if !fleeting || !still {
		t.Errorf("fleeting before %t and after %t, want the endpoint to look again before each answer", fleeting, still)
	}
}

func TestExecutablesThatOnlyRootMayWriteAreRemembered(t *testing.T) {
	path := inMemory(t, "third")
	a := attestor(t, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(t, unix.Config{Now: tomorrow})}})
	for _, tt := range []struct {
		name     string
		uid      int
		mode     os.FileMode
		fleeting bool
	}{{"somebody's", 1, 0o755, true}, {"root's", 0, 0o755, false}, {"root's, for a group", 0, 0o775, true}, {"root's, for all", 0, 0o757, true}} {
		if err := os.Chown(path, tt.uid, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		w := startRewritable(t, newTable(t), path, "wait")
		if _, fleeting := look(t, a, w.process); fleeting != tt.fleeting {
			t.Errorf("%s: fleeting %t, want %t", tt.name, fleeting, tt.fleeting)
		}
		w.end()
	}
}

// A rewritable is a process that can be spoken to.
type rewritable struct {
	process *peer.Process
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
}

func startRewritable(t *testing.T, table *peer.Table, path, mode string, env ...string) *rewritable {
	t.Helper()
	cmd := exec.Command(path)
	cmd.Env = append(append(os.Environ(), "SIGNET_TEST_ATTEST="+mode), env...)
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
	w := &rewritable{cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(w.end)
	w.ready(t)
	if w.process, err = table.Open(int32(cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.process.Close)
	return w
}

func (w *rewritable) ready(t *testing.T) {
	t.Helper()
	if line, err := w.out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("child: %q, %v", line, err)
	}
}

func (w *rewritable) say(t *testing.T, line string) {
	t.Helper()
	if _, err := io.WriteString(w.in, line+"\n"); err != nil {
		t.Fatal(err)
	}
	w.ready(t)
}

func (w *rewritable) end() {
	w.in.Close()
	w.cmd.Process.Kill()
	w.cmd.Wait()
}
