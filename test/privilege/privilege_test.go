package privilege

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// copyProgram puts the test binary, which is the workload, at path.
func copyProgram(t *testing.T, path string, dirMode, mode os.FileMode) (sum string) {
	t.Helper()
	data, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(path)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(path, data, 0o700), os.Chmod(path, mode), os.Chown(path, workloadUser, workloadUser),
		os.Chown(dir, workloadUser, workloadUser), os.Chmod(dir, dirMode)); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(data))
}

// processStatus reads a field of /proc/PID/status.
func processStatus(t *testing.T, pid int, field string) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(data), "\n") {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("no %s in the status of %d", field, pid)
	return ""
}

// children are the processes that pid has started.
func children(t *testing.T, pid int) []int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, f := range tasks {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // a thread that has ended
		}
		for _, s := range strings.Fields(string(data)) {
			if n, err := strconv.Atoi(s); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// TestWhatEachCapabilityIsFor is the table in docs/operate/privileges.md: the agent as a user with exactly these
// capabilities, in the sandbox and without, and which selectors it finds for a workload of another user.
func TestWhatEachCapabilityIsFor(t *testing.T) {
	s := newSite(t)
	open, closed := filepath.Join(s.dir, "open", "workload"), filepath.Join(s.dir, "closed", "workload")
	sum := copyProgram(t, open, 0o755, 0o755)
	copyProgram(t, closed, 0o700, 0o700)
	s.apply(fmt.Sprintf(`{kind: Identity, name: uid, spiffeID: /uid, match: ["unix:uid:%d"]}
---
{kind: Identity, name: open, spiffeID: /open, match: ["unix:path:%s"]}
---
{kind: Identity, name: closed, spiffeID: /closed, match: ["unix:path:%s"]}
---
{kind: Identity, name: hash, spiffeID: /hash, match: ["unix:sha256:%s"]}
`, workloadUser, open, closed, sum))
	everything := []string{"/hash", "/open", "/uid"}
	tests := []struct {
		name         string
		uid          int
		caps         []uintptr
		open, closed []string
		missing      []string
	}{
		{"root", 0, nil, everything, []string{"/closed", "/hash", "/uid"}, nil},
		{"both", agentUser, []uintptr{unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH}, everything, []string{"/closed", "/hash", "/uid"}, nil},
		{"without CAP_DAC_READ_SEARCH", agentUser, []uintptr{unix.CAP_SYS_PTRACE}, everything, []string{"/uid"}, []string{"CAP_DAC_READ_SEARCH"}},
		{"without CAP_SYS_PTRACE", agentUser, []uintptr{unix.CAP_DAC_READ_SEARCH}, []string{"/uid"}, []string{"/uid"}, []string{"CAP_SYS_PTRACE"}},
		{"none", agentUser, nil, []string{"/uid"}, []string{"/uid"}, []string{"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE"}},
	}
	for _, mode := range []string{"require", "off"} {
		for _, tt := range tests {
			t.Run(tt.name+", sandbox "+mode, func(t *testing.T) {
				s := &site{t: t, dir: s.dir, port: s.port, admin: s.admin}
				p := s.place(tt.uid, fmt.Sprintf("sandbox: {landlock: %s, seccomp: %s}\n", mode, mode))
				agent := s.start("agent", p.command(0, tt.caps))
				s.eventually(func() error {
					select {
					case <-agent.done:
						t.Fatal("the agent has ended")
					default:
					}
					got, err := p.ids(open)
					if err == nil && !slices.Contains(got, "/uid") {
						err = fmt.Errorf("the workload has %q", got)
					}
					return err
				})
				for path, want := range map[string][]string{open: tt.open, closed: tt.closed} {
					if got, err := p.ids(path); err != nil || !slices.Equal(got, want) {
						t.Errorf("%s gets %q, %v; want %q", path, got, err, want)
					}
				}
				said := agent.out.String()
				for _, m := range []string{"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE"} {
					if got := strings.Contains(said, "a privilege is missing, and so some things will not work\" missing=\""+m+":"); got != slices.Contains(tt.missing, m) {
						t.Errorf("the log says that %s is missing: %t", m, got)
					}
				}
				if strings.Contains(said, "workload attestation is incomplete") {
					t.Errorf("the agent warns of what its missing privileges mean with each process:\n%s", said)
				}
				checkProcesses(t, agent.Process.Pid, tt.uid, tt.caps, mode == "require")
			})
		}
	}
}

// checkProcesses looks at what the kernel says of the agent and its examiner.
func checkProcesses(t *testing.T, pid, uid int, caps []uintptr, restricted bool) {
	t.Helper()
	var mask uint64
	for _, c := range caps {
		mask |= 1 << c
	}
	if uid == 0 {
		mask = 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_DAC_READ_SEARCH
	}
	examiners := children(t, pid)
	want := map[int]string{pid: fmt.Sprintf("%016x", mask)}
	seccomp := "0"
	if restricted {
		if len(examiners) != 1 {
			t.Fatalf("the agent has started %d processes, want the examiner alone", len(examiners))
		}
		want = map[int]string{pid: fmt.Sprintf("%016x", 0), examiners[0]: fmt.Sprintf("%016x", mask)}
		seccomp = "2"
	} else if len(examiners) != 0 {
		t.Errorf("the agent has started %d processes", len(examiners))
	}
	for pid, caps := range want {
		for _, field := range []string{"CapEff", "CapPrm"} {
			if got := processStatus(t, pid, field); got != caps {
				t.Errorf("process %d: %s is %s, want %s", pid, field, got, caps)
			}
		}
		for field, want := range map[string]string{"NoNewPrivs": "1", "Seccomp": seccomp, "CapAmb": fmt.Sprintf("%016x", 0), "CapInh": fmt.Sprintf("%016x", 0)} {
			if got := processStatus(t, pid, field); got != want {
				t.Errorf("process %d: %s is %s, want %s", pid, field, got, want)
			}
		}
		if uid == 0 {
			if got := processStatus(t, pid, "CapBnd"); got != caps {
				t.Errorf("process %d: the bounding set is %s, want %s", pid, got, caps)
			}
		}
	}
}
