package demo_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/internal/cli"
)

// asSignet makes this test program behave as the program signet. The processes of the demo inherit it.
const asSignet = "SIGNET_DEMO_TEST_AS_SIGNET"

func TestMain(m *testing.M) {
	if os.Getenv(asSignet) == "" {
		goleak.VerifyTestMain(m)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// A show is a demo that runs.
type show struct {
	t      *testing.T
	tmp    string
	cmd    *exec.Cmd
	stdout io.ReadCloser
	lines  *bufio.Scanner
	stderr bytes.Buffer
	text   strings.Builder // what was read of stdout
}

// begin starts the demo with a directory of its own for temporary files.
func begin(t *testing.T, args ...string) *show {
	t.Helper()
	tmp, err := os.MkdirTemp("", "demotest")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &show{t: t, tmp: tmp, cmd: exec.Command(program, append([]string{"demo"}, args...)...)}
	s.cmd.Env = append(os.Environ(), asSignet+"=1", "TMPDIR="+tmp)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	s.cmd.Stderr = &s.stderr
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.stdout, s.lines = stdout, bufio.NewScanner(stdout)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			s.cmd.Process.Kill()
			s.cmd.Wait()
		}
		if err := os.RemoveAll(tmp); err != nil {
			t.Error(err)
		}
	})
	return s
}

// readTo reads stdout up to the line that holds part.
func (s *show) readTo(part string) {
	s.t.Helper()
	for s.lines.Scan() {
		s.text.WriteString(s.lines.Text() + "\n")
		if strings.Contains(s.lines.Text(), part) {
			return
		}
	}
	s.t.Fatalf("the demo ended without %q:\n%s\n%s", part, s.text.String(), s.stderr.String())
}

// end waits for the end, wants that exit status, and that nothing is left.
func (s *show) end(want int) {
	s.t.Helper()
	for s.lines.Scan() {
		s.text.WriteString(s.lines.Text() + "\n")
	}
	s.cmd.Wait()
	if got := s.cmd.ProcessState.ExitCode(); got != want {
		s.t.Errorf("exit status %d, want %d", got, want)
	}
	if left := s.processes(""); len(left) > 0 {
		s.t.Errorf("processes left: %v", left)
	}
	if left, err := os.ReadDir(s.tmp); err != nil || len(left) > 0 {
		s.t.Errorf("files left: %v, %v", left, err)
	}
	if s.t.Failed() {
		s.t.Logf("stdout:\n%s\nstderr:\n%s", s.text.String(), s.stderr.String())
	}
}

// processes returns those that run a program of this demo: of that name, or all for "".
func (s *show) processes(name string) []int {
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		s.t.Fatal(err)
	}
	var pids []int
	for _, link := range links {
		exe, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(exe, s.tmp+"/") || name != "" && filepath.Base(exe) != name {
			continue // gone, or somebody else's
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
		if err != nil {
			s.t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// checks takes the text apart: how many checks it says have passed, and how many it shows.
func (s *show) checks() (said, shown int) {
	s.t.Helper()
	m := regexp.MustCompile(`(?m)^demo: ([0-9]+) checks passed$`).FindStringSubmatch(s.text.String())
	if m == nil {
		s.t.Fatalf("no line 'demo: N checks passed':\n%s\n%s", s.text.String(), s.stderr.String())
	}
	said, _ = strconv.Atoi(m[1])
	return said, len(regexp.MustCompile(`(?m)^   ok   `).FindAllString(s.text.String(), -1))
}

func TestDemo(t *testing.T) {
	t.Parallel()
	s := begin(t)
	s.end(0)
	if said, shown := s.checks(); said != shown || said < 30 {
		t.Errorf("the demo says that %d checks passed, and shows %d; want 30 or more", said, shown)
	}
	if text := s.text.String(); strings.Contains(text, "\x1b") || strings.Contains(text, "✓") {
		t.Error("what goes into a pipe has colours or is not ASCII")
	}
	// Serial numbers are there to be told apart.
	if serials := regexp.MustCompile(`serial (\S+) after (\S+)`).FindStringSubmatch(s.text.String()); serials == nil || serials[1] == serials[2] {
		t.Errorf("new X509-SVIDs are shown by the serial numbers %q", serials)
	}
	for _, through := range regexp.MustCompile(`went through \d+ X509-SVIDs: (.*)`).FindAllStringSubmatch(s.text.String(), -1) {
		if all := strings.Split(through[1], ", "); len(all) < 2 || all[0] == all[1] {
			t.Errorf("and %q", through[1])
		}
	}
	if s.stderr.Len() > 0 {
		t.Errorf("stderr: %s", s.stderr.String())
	}
}

func TestDemoKeptUntilInterrupted(t *testing.T) {
	t.Parallel()
	s := begin(t, "--keep")
	s.readTo("Ctrl-C")
	dir := regexp.MustCompile(`running in (\S+) until`).FindStringSubmatch(s.text.String())
	if dir == nil {
		t.Fatalf("it does not say where:\n%s", s.text.String())
	}
	s.readTo("logs in")
	if got := len(s.processes("")); got != 5 {
		t.Errorf("%d processes run, want CA, agent and three services", got)
	}
	for name, want := range map[string]int{"trusty-service": http.StatusOK, "utility-service": http.StatusForbidden} {
		if got := callThrough(t, filepath.Join(dir[1], name+".sock")); got != want {
			t.Errorf("%s is answered %d, want %d", name, got, want)
		}
	}
	// Every command that it proposes works.
	_, proposed, _ := strings.Cut(s.text.String(), "In another terminal")
	commands := regexp.MustCompile(`(?m)^   ((?:signet|trusty-service) .*?)(?:   .*)?$`).FindAllStringSubmatch(proposed, -1)
	if len(commands) != 6 {
		t.Errorf("%d commands are proposed, want 6", len(commands))
	}
	for _, c := range commands {
		limit := "20"
		if strings.HasSuffix(c[1], " tail") { // it goes on until it is interrupted
			limit = "1"
		}
		sh := exec.Command("sh", "-c", fmt.Sprintf("cd %s && PATH=%s/bin:$PATH timeout --preserve-status -s INT %s %s", dir[1], dir[1], limit, c[1]))
		sh.Env = append(os.Environ(), asSignet+"=1", "SIGNET_CA_SOCKET="+dir[1]+"/ca.sock", "SPIFFE_ENDPOINT_SOCKET=unix://"+dir[1]+"/agent.sock")
		if out, err := sh.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", c[1], err, out)
		}
	}
	s.cmd.Process.Signal(os.Interrupt)
	s.end(0)
	s.checks()
}

// callThrough lets a service call documents-service and returns the status of the answer.
func callThrough(t *testing.T, socket string) int {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
	r, err := client.Get("http://demo/call?path=/v1/documents/7")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var o struct{ Status int }
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<16)).Decode(&o); err != nil {
		t.Fatal(err)
	}
	return o.Status
}

func TestDemoSaysWhichProcessWasLost(t *testing.T) {
	s := begin(t)
	s.readTo("5. Rotation")
	pids := s.processes("documents-service")
	if len(pids) != 1 {
		t.Fatalf("documents-service is processes %v, want one", pids)
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.end(1)
	lost := fmt.Sprintf("documents-service (process %d) ended: signal: killed", pids[0])
	if text := s.text.String(); !strings.Contains(text, "FAIL "+lost) || !strings.Contains(text, "the end of the log of documents-service:") || strings.Contains(text, "checks passed") {
		t.Errorf("stdout does not tell what was lost:\n%s", text)
	}
	if got := s.stderr.String(); !strings.HasPrefix(got, "signet: error: demo: after ") || !strings.Contains(got, lost) {
		t.Errorf("stderr: %s", got)
	}
}

func TestDemoInterrupted(t *testing.T) {
	for _, at := range []string{"1. Identities", "signet agent run", "5. Rotation"} {
		t.Run(strings.ReplaceAll(at, " ", "_"), func(t *testing.T) {
			s := begin(t)
			s.readTo(at)
			s.cmd.Process.Signal(os.Interrupt)
			s.end(1)
			if got := s.stderr.String(); got != "signet: error: demo: stopped before its end\n" {
				t.Errorf("stderr: %s", got)
			}
		})
	}
}

func TestDemoUnread(t *testing.T) {
	for name, unread := range map[string]func(*show) error{
		"closed_pipe": func(s *show) error { return s.stdout.Close() },
		"hangup":      func(s *show) error { return s.cmd.Process.Signal(syscall.SIGHUP) },
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			s.readTo("1. Identities")
			if err := unread(s); err != nil {
				t.Fatal(err)
			}
			s.end(1)
		})
	}
}

func TestDemoKilledTakesItsProcessesAlong(t *testing.T) {
	s := begin(t)
	s.readTo("5. Rotation")
	if got := len(s.processes("")); got < 5 {
		t.Errorf("%d processes run, want CA, agent and three services", got)
	}
	s.cmd.Process.Kill()
	s.cmd.Wait()
	over := time.After(10 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for left := s.processes(""); len(left) > 0; left = s.processes("") {
		select {
		case <-over:
			t.Fatalf("processes left: %v", left)
		case <-tick.C:
		}
	}
}
