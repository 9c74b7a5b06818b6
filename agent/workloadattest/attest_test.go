package workloadattest_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	sys "golang.org/x/sys/unix"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/unix"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

var _ workloadapi.Attestor = (*workloadattest.Attestor)(nil)

func TestMain(m *testing.M) {
	switch os.Getenv("SIGNET_TEST_ATTEST") {
	case "":
		goleak.VerifyTestMain(m)
		return
	case "respawn":
		respawn()
	case "hidepid":
		hideProcesses()
	case "look":
		lookAround()
	case "another":
		becomeAnother()
	case "rewrite":
		rewriteAndRun()
	case "mount": // hide what is at argument 2 behind argument 1, in a mount namespace of our own, and become it
		runtime.LockOSThread()
		for _, err := range []error{
			sys.Unshare(sys.CLONE_NEWNS),
			sys.Mount("", "/", "", sys.MS_REC|sys.MS_PRIVATE, ""),
			sys.Mount(os.Args[1], os.Args[2], "", sys.MS_BIND, ""),
			os.Setenv("SIGNET_TEST_ATTEST", "wait"),
			syscall.Exec(os.Args[2], os.Args[2:], os.Environ()),
		} {
			if err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
		}
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// start runs a copy of the test binary and pins it.
func start(t testing.TB, table *peer.Table, prepare func(*exec.Cmd), exe string, args ...string) *peer.Process {
	t.Helper()
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), "SIGNET_TEST_ATTEST=wait")
	if prepare != nil {
		prepare(cmd)
	}
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
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	ready := make([]byte, 6)
	if _, err := io.ReadFull(stdout, ready); err != nil || string(ready) != "ready\n" {
		rest, _ := io.ReadAll(stdout)
		t.Fatalf("child: %s%s, %v", ready, rest, err)
	}
	p, err := table.Open(int32(cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func newTable(t testing.TB) *peer.Table {
	t.Helper()
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	return table
}

func unixMethod(t testing.TB, c unix.Config) *unix.Method {
	t.Helper()
	m, err := unix.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func attestor(t testing.TB, c workloadattest.Config) *workloadattest.Attestor {
	t.Helper()
	a, err := workloadattest.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func attest(t testing.TB, a *workloadattest.Attestor, p *peer.Process) []string {
	t.Helper()
	c, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range c.Selectors {
		got = append(got, s.String())
	}
	return got
}

// workload copies the test binary; extra bytes at its end give it a hash of its own.
func workload(t testing.TB, name, extra string) (path, sum string) {
	t.Helper()
	content, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	content = append(content, extra...)
	dir := t.TempDir()
	for d := dir; d != filepath.Clean(os.TempDir()) && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path = filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o755); err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(content)
	return path, hex.EncodeToString(hash[:])
}

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to run a workload as another user or with its own mounts")
	}
}

func TestUnixSelectors(t *testing.T) {
	requireRoot(t)
	exe, sum := workload(t, "web", "1")
	p := start(t, newTable(t), func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1, Gid: 2, Groups: []uint32{3, 4000001}}}
	}, exe)
	got := attest(t, attestor(t, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(t, unix.Config{})}}), p)
	want := []string{
		"unix:uid:1", "unix:user:" + nameIn(t, "/etc/passwd", "1"), "unix:gid:2", "unix:group:" + nameIn(t, "/etc/group", "2"),
		"unix:supplementary_gid:3", "unix:supplementary_group:" + nameIn(t, "/etc/group", "3"), "unix:supplementary_gid:4000001",
		"unix:path:" + exe, "unix:sha256:" + sum,
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("selectors %q\nwant %q", got, want)
	}
}

// nameIn finds a name by its id in a file of /etc.
func nameIn(t testing.TB, file, id string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if f := strings.Split(line, ":"); len(f) > 2 && strings.TrimSpace(f[2]) == id {
			return f[0]
		}
	}
	t.Fatalf("%s has no id %s", file, id)
	return ""
}

func has(selectors []string, prefix string) bool {
	return slices.ContainsFunc(selectors, func(s string) bool { return strings.HasPrefix(s, prefix) })
}

func TestHashLimitsHideNothingElse(t *testing.T) {
	exe, _ := workload(t, "web", "2")
	p := start(t, newTable(t), nil, exe)
	for _, tt := range []struct {
		name    string
		max     int64
		failure int32
	}{{"too large", 1000, 1}, {"off", -1, 0}} {
		var failed atomic.Int32
		got := attest(t, attestor(t, workloadattest.Config{
			Methods: []workloadattest.Method{unixMethod(t, unix.Config{MaxHashBytes: tt.max})}, OnFailure: func(string) { failed.Add(1) },
		}), p)
		if has(got, "unix:sha256:") || !has(got, "unix:path:"+exe) || !has(got, "unix:uid:") || failed.Load() != tt.failure {
			t.Errorf("%s: %q with %d failures, want no hash, all the rest and %d", tt.name, got, failed.Load(), tt.failure)
		}
	}
}

func TestReplacedExecutable(t *testing.T) {
	exe, sum := workload(t, "web", "3")
	p := start(t, newTable(t), nil, exe)
	a := attestor(t, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(t, unix.Config{})}})
	if got := attest(t, a, p); !has(got, "unix:path:"+exe) || !has(got, "unix:sha256:"+sum) {
		t.Fatalf("selectors %q", got)
	}
	other, _ := workload(t, "other", "4")
	if err := os.Rename(other, exe); err != nil {
		t.Fatal(err)
	}
	// What runs is still the old file: the hash says so, and the path belongs to the new one.
	got := attest(t, a, p)
	if has(got, "unix:path:") || !has(got, "unix:sha256:"+sum) {
		t.Errorf("after the file was replaced: %q, want the old hash and no path", got)
	}
}

// patient is a method that waits for what is just coming to be.
type patient struct{ method }

func (patient) Patience() time.Duration { return time.Minute }

// TestPatience: one method's patience gives no other one more time, and is not cut short by others' timeout.
func TestPatience(t *testing.T) {
	exe, _ := workload(t, "web", "patience")
	p := start(t, newTable(t), nil, exe)
	over := make(chan struct{})
	a := attestor(t, workloadattest.Config{Timeout: time.Millisecond, Methods: []workloadattest.Method{
		method{"quick", func(ctx context.Context) ([]spiffe.Selector, error) { <-ctx.Done(); close(over); return nil, ctx.Err() }},
		patient{method{"patient", func(ctx context.Context) ([]spiffe.Selector, error) {
			<-over
			return []spiffe.Selector{{Type: "patient", Value: "known:1"}}, ctx.Err()
		}}},
	}})
	if got := attest(t, a, p); !slices.Equal(got, []string{"patient:known:1"}) {
		t.Errorf("selectors %q", got)
	}
}

func TestPathUnderAnotherMountIsNotBelieved(t *testing.T) {
	requireRoot(t)
	trusted, _ := workload(t, "trusted", "5")
	evil, evilSum := workload(t, "evil", "6")
	table := newTable(t)
	prepare := func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "SIGNET_TEST_ATTEST=mount") }
	p := start(t, table, prepare, "/proc/self/exe", evil, trusted)
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID))
	if err != nil || link != trusted {
		t.Fatalf("the child runs under %q, %v; want it to pretend to be %q", link, err, trusted)
	}
	// That there is no path is no failure, and nothing to find out again and again: so it is for every program in a container.
	asked := 0
	var log strings.Builder
	a := attestor(t, workloadattest.Config{
		Log: slog.New(slog.NewTextHandler(&log, nil)), OnFailure: func(name string) { t.Errorf("%s has failed", name) },
		Methods: []workloadattest.Method{unixMethod(t, unix.Config{Now: tomorrow}), method{"m", func(context.Context) ([]spiffe.Selector, error) { asked++; return nil, nil }}},
	})
	for range 3 {
		got := attest(t, a, p)
		if has(got, "unix:path:") || !has(got, "unix:sha256:"+evilSum) {
			t.Errorf("selectors %q: want the evil program's hash and no path", got)
		}
	}
	if asked != 1 || log.Len() != 0 {
		t.Errorf("attested %d times in 3 calls, and the log says %q; want once, and nothing", asked, log.String())
	}
	got := attest(t, attestor(t, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(t, unix.Config{AllowForeignPaths: true})}}), p)
	if !has(got, "unix:path:"+trusted) {
		t.Errorf("with AllowForeignPaths: %q", got)
	}
}

// method is a Method of the test.
type method struct {
	name string
	find func(ctx context.Context) ([]spiffe.Selector, error)
}

func (m method) Name() string { return m.name }

func (m method) Selectors(ctx context.Context, _ *peer.Process, _ peer.Snapshot) ([]spiffe.Selector, error) {
	return m.find(ctx)
}

func TestOneFailingMethodHidesNoOther(t *testing.T) {
	exe, _ := workload(t, "web", "7")
	p := start(t, newTable(t), nil, exe)
	var log strings.Builder
	tries := 0
	a := attestor(t, workloadattest.Config{
		Timeout: time.Second, // the executable is hashed in that time on a busy machine, too: else its failure is another one
		Log:     slog.New(slog.NewTextHandler(&log, nil)),
		Methods: []workloadattest.Method{
			unixMethod(t, unix.Config{}),
			method{"partly", func(context.Context) ([]spiffe.Selector, error) {
				tries++
				return []spiffe.Selector{{Type: "partly", Value: "known:1"}, {Type: "partly", Value: "known:1"}}, errors.New("the rest is unknown")
			}},
			method{"slow", func(ctx context.Context) ([]spiffe.Selector, error) { <-ctx.Done(); return nil, ctx.Err() }},
			method{"liar", func(context.Context) ([]spiffe.Selector, error) {
				return []spiffe.Selector{{Type: "unix", Value: "uid:4294967000"}, {Type: "liar", Value: ""}, {Type: "liar", Value: "ok:1"}}, nil
			}},
		},
	})
	for range 3 {
		got := attest(t, a, p)
		for _, want := range []string{"unix:path:" + exe, "partly:known:1", "liar:ok:1"} {
			if n := len(slices.DeleteFunc(slices.Clone(got), func(s string) bool { return s != want })); n != 1 {
				t.Errorf("%q is %d times in %q, want once", want, n, got)
			}
		}
		if has(got, "unix:uid:4294967000") {
			t.Error("a method forged a selector of another type")
		}
	}
	if tries != 3 {
		t.Errorf("the failing method was asked %d times in 3 attestations, want each time", tries)
	}
	if n := strings.Count(log.String(), "incomplete"); n != 1 {
		t.Errorf("%d log lines for one lasting failure, want 1:\n%s", n, log.String())
	}
}

// settled is an error that says what there is not.
type settled struct{ error }

func (settled) Settled() {}

// TestSettledBesideAFailure: what is settled hides no failure that came with it, and neither is said to be the other.
func TestSettledBesideAFailure(t *testing.T) {
	exe, _ := workload(t, "web", "settled")
	p := start(t, newTable(t), nil, exe)
	var log strings.Builder
	asked, failed := 0, 0
	failing := true
	a := attestor(t, workloadattest.Config{
		Log: slog.New(slog.NewTextHandler(&log, nil)), OnFailure: func(string) { failed++ },
		Methods: []workloadattest.Method{method{"m", func(context.Context) ([]spiffe.Selector, error) {
			asked++
			err := errors.Join(settled{errors.New("there is no hash")}, errors.Join(settled{errors.New("there is no path")}))
			if failing {
				err = errors.Join(err, errors.New("the bus is away"))
			}
			return []spiffe.Selector{{Type: "m", Value: "known:1"}}, err
		}}},
	})
	for range 2 {
		attest(t, a, p)
	}
	if got := log.String(); asked != 2 || failed != 2 || !strings.Contains(got, "the bus is away") || strings.Contains(got, "there is no") {
		t.Errorf("while it fails: asked %d times, %d failures, log %q", asked, failed, got)
	}
	failing = false
	for range 3 {
		if got := attest(t, a, p); !has(got, "m:known:1") {
			t.Errorf("selectors %q", got)
		}
	}
	if asked != 3 || failed != 2 {
		t.Errorf("afterwards: asked %d times in all, %d failures; want 3 and 2", asked, failed)
	}
}

func TestResultsAreReusedWhileNothingChanges(t *testing.T) {
	exe, _ := workload(t, "web", "8")
	table := newTable(t)
	p := start(t, table, nil, exe)
	asked := 0
	now := time.Now()
	a := attestor(t, workloadattest.Config{
		MaxAge: time.Minute, MaxCached: 1, Now: func() time.Time { return now },
		Methods: []workloadattest.Method{method{"m", func(context.Context) ([]spiffe.Selector, error) { asked++; return nil, nil }}},
	})
	step := func(why string, want int) {
		t.Helper()
		attest(t, a, p)
		if asked != want {
			t.Errorf("%s: asked %d times, want %d", why, asked, want)
		}
	}
	step("first", 1)
	step("again", 1)
	if err := os.Chmod(exe, 0o700); err != nil { // changes ctime
		t.Fatal(err)
	}
	step("the executable was changed", 2)
	now = now.Add(time.Minute)
	step("too old", 3)
	attest(t, a, start(t, table, nil, exe)) // takes the only place
	step("forgotten for another", 5)
}

func TestConfigIsChecked(t *testing.T) {
	m := unixMethod(t, unix.Config{})
	for name, c := range map[string]workloadattest.Config{
		"no method": {}, "nil method": {Methods: []workloadattest.Method{nil}}, "twice": {Methods: []workloadattest.Method{m, m}},
		"negative": {Methods: []workloadattest.Method{m}, Timeout: -1},
	} {
		if _, err := workloadattest.New(c); err == nil {
			t.Errorf("%s: not refused", name)
		}
	}
	if _, err := unix.New(unix.Config{MaxHashes: -1}); err == nil {
		t.Error("a negative MaxHashes was accepted")
	}
}

func BenchmarkAttestUnchanged(b *testing.B) {
	exe, _ := workload(b, "web", "9")
	p := start(b, newTable(b), nil, exe)
	a := attestor(b, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(b, unix.Config{})}})
	for b.Loop() {
		if _, err := a.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}
