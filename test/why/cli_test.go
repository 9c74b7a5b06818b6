package why

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/internal/why"
)

// signet runs the command line in this process.
func signet(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	for _, name := range []string{"SIGNET_AGENT_SOCKET", "SIGNET_CA_SOCKET", "SPIFFE_ENDPOINT_SOCKET"} {
		t.Setenv(name, "")
	}
	var out, err bytes.Buffer
	status = cli.Main(t.Context(), args, strings.NewReader(""), &out, &err)
	return status, out.String(), err.String()
}

// TestCommandNamesCauses goes all the way through the command line, for people and for programs.
func TestCommandNamesCauses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be other users; CI runs as root")
	}
	w := newWorld(t, maker{})
	p, selectors := w.server()
	id := w.entry(entrySpec{selectors: append([]string{"unix:user:it's"}, selectors...)})
	flags := []string{"--socket", w.AgentAdminSocket(), "--ca-socket", w.CASocket()}
	status, out, stderr := signet(t, append([]string{"why", itoa(p)}, flags...)...)
	if status != 1 || stderr != "" || !strings.HasPrefix(out, string(why.SelectorMissing)+" ") || !strings.Contains(out, "x unix:user:it's (absent)") {
		t.Errorf("status %d, stdout:\n%s\nstderr:\n%s", status, out, stderr)
	}
	status, out, _ = signet(t, append([]string{"why", itoa(p), "-o", "json"}, flags...)...)
	var answer struct {
		CAAsked  bool `json:"ca_asked"`
		Findings []struct {
			PID    int32       `json:"pid"`
			Causes []why.Cause `json:"causes"`
		} `json:"findings"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || status != 1 || !answer.CAAsked || len(answer.Findings) != 1 || answer.Findings[0].PID != p ||
		answer.Findings[0].Causes[0].Code != why.SelectorMissing {
		t.Errorf("status %d, %v: %s", status, err, out)
	}

	// The command that is proposed is what helps, run by a shell as it stands.
	w.deleteEntry(id)
	id = w.entry(entrySpec{selectors: append([]string{"unix:gid:it's 4711"}, selectors...)})
	_, out, _ = signet(t, append([]string{"why", itoa(p)}, flags...)...)
	proposed := ""
	for line := range strings.Lines(out) {
		if line := strings.TrimSpace(line); strings.HasPrefix(line, "signet entry update ") {
			proposed = line
		}
	}
	if proposed == "" {
		t.Fatalf("no command is proposed:\n%s", out)
	}
	words, err := exec.Command("sh", "-c", `signet() { printf '%s\n' "$@"; }; `+proposed).Output()
	if err != nil {
		t.Fatalf("%s: %v", proposed, err)
	}
	args := append(strings.Split(strings.TrimSpace(string(words)), "\n"), "--socket", w.CASocket())
	if status, _, stderr := signet(t, args...); status != 0 {
		t.Fatalf("%q: status %d: %s", args, status, stderr)
	}
	w.issued(id)
	w.until("that it helped", func() bool { return w.ask(pid(p)).Findings[0].Main().Code == why.Served })
	status, out, stderr = signet(t, append([]string{"why", itoa(p)}, flags...)...)
	if status != 0 || !strings.HasPrefix(out, string(why.Served)+" ") {
		t.Errorf("after the command: status %d, stdout:\n%s\nstderr:\n%s", status, out, stderr)
	}
	if status, _, stderr := signet(t, append([]string{"why", "999999999"}, flags...)...); status != 1 || !strings.Contains(stderr, "there is no process 999999999") {
		t.Errorf("no such process: status %d, %s", status, stderr)
	}
	if status, _, stderr := signet(t, append([]string{"why", "prod/web-0"}, flags...)...); status != 1 || !strings.Contains(stderr, "workload_attestation.k8s") {
		t.Errorf("a pod without Kubernetes: status %d, %s", status, stderr)
	}
}

// TestCommandWithoutAnAgent: where the agent cannot be asked at all, the command itself names why.
func TestCommandWithoutAnAgent(t *testing.T) {
	w := newWorld(t, maker{})
	stale := filepath.Join(w.dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, tt := range []struct {
		name, socket string
		want         why.Code
		hint         string
	}{
		{"no socket", filepath.Join(w.dir, "nothing.sock"), why.AdminSocketMissing, "admin_socket.path"},
		{"a socket that nobody listens on", stale, why.AgentNotRunning, "signet agent run"},
		{"the Workload API's socket", w.AgentSocket(), why.NotAdminSocket, "Workload API"},
		{"the CA's socket", w.CASocket(), why.NotAdminSocket, "not the admin socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, _, stderr := signet(t, "why", "1", "--socket", tt.socket)
			if status != 1 || !strings.Contains(stderr, string(tt.want)+": ") || !strings.Contains(stderr, tt.hint) {
				t.Errorf("status %d, stderr:\n%s\nwant %s and %q", status, stderr, tt.want, tt.hint)
			}
			status, out, _ := signet(t, "why", "1", "--socket", tt.socket, "-o", "json")
			if status != 1 || !strings.Contains(out, `"code": "`+string(tt.want)+`"`) {
				t.Errorf("status %d, JSON:\n%s", status, out)
			}
		})
	}
}

// TestSocketOfOthers asks as a user who is no admin of the agent.
func TestSocketOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be other users; CI runs as root")
	}
	for _, open := range []bool{false, true} {
		w := newWorld(t, maker{Agent: func(c *agent.Config) { c.AdminSocket.Open = open }})
		cmd := exec.Command(self)
		cmd.Env, cmd.Dir = []string{childMode + "=why", "SIGNET_WHY_SOCKET=" + w.AgentAdminSocket()}, "/"
		as(4711, 4711)(cmd)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), string(why.AdminSocketDenied)+": ") {
			t.Errorf("open %t: %v: %s, want %s", open, err, out, why.AdminSocketDenied)
		}
	}
}

// childAgent is an agent in a process of its own, in whatever namespaces that is.
func childAgent(config string) int {
	var c agent.Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		fmt.Println(err)
		return 1
	}
	c.AdminSocket.AllowBesideSocket = true
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	a, err := agent.New(c)
	if err == nil {
		go func() {
			<-a.Ready()
			fmt.Println("ready")
		}()
		err = a.Run(ctx)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// startChildAgent takes the place of the world's agent with one in other namespaces, by a shell's command in front of it.
func (w *world) startChildAgent(shell string) {
	w.Helper()
	if err := w.StopAgent(); err != nil {
		w.Fatal(err)
	}
	c := w.config
	config, err := json.Marshal(map[string]any{"TrustDomain": c.TrustDomain, "ServerAddress": c.ServerAddress, "DataDir": c.DataDir, "SocketPath": c.SocketPath,
		"AdminSocket": map[string]any{"Path": c.AdminSocket.Path}, "TrustBundlePath": c.TrustBundlePath, "JoinTokenFile": c.JoinTokenFile})
	if err != nil {
		w.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", shell, "sh", self)
	cmd.Env = append(os.Environ(), "SIGNET_WHY_AGENT="+string(config))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.Fatal(err)
	}
	w.start(cmd)
	buf := make([]byte, 1000)
	n, err := out.Read(buf)
	if err != nil || !strings.HasPrefix(string(buf[:n]), "ready") {
		w.Fatalf("the agent in its namespace: %v %s", err, buf[:n])
	}
}

// TestAgentInAnotherPIDNamespace: the agent cannot see who calls, and its operator is told so.
func TestAgentInAnotherPIDNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces; CI runs as root")
	}
	w := newWorld(t, maker{})
	w.startChildAgent(`exec unshare --pid --fork --kill-child --mount-proc "$1"`)
	status, _, stderr := signet(t, "why", "1", "--socket", w.AgentAdminSocket())
	if status != 1 || !strings.Contains(stderr, string(why.ForeignNamespace)+": ") || !strings.Contains(stderr, "hostPID") {
		t.Errorf("status %d: %s, want %s", status, stderr, why.ForeignNamespace)
	}
}

// TestAgentWithHiddenProcesses: the agent is no root, and /proc hides the processes of others from it.
func TestAgentWithHiddenProcesses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces; CI runs as root")
	}
	w := newWorld(t, maker{})
	if out, err := exec.Command("chown", "-R", "4720:4720", filepath.Join(w.dir, "d")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	w.startChildAgent(`exec unshare --mount sh -c 'mount -t proc -o hidepid=invisible none /proc && exec setpriv --reuid 4720 --regid 4720 --clear-groups "$1"' sh "$1"`)
	p, _ := w.server()
	cmd := exec.Command(self)
	cmd.Env, cmd.Dir = []string{childMode + "=why", "SIGNET_WHY_SOCKET=" + w.AgentAdminSocket(), "SIGNET_WHY_PID=" + itoa(p)}, "/"
	as(4720, 4720)(cmd)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), string(why.ProcessHidden)+" ") {
		t.Errorf("%v: %s, want %s", err, out, why.ProcessHidden)
	}
	status, _, stderr := signet(t, "why", itoa(p), "--socket", w.AgentAdminSocket())
	if status != 1 || !strings.Contains(stderr, string(why.ProcessHidden)+": ") {
		t.Errorf("root, whom the agent cannot see either: status %d: %s", status, stderr)
	}
}

// TestSaysNoSecrets: of a process's environment nothing is told but which endpoint it was given, and of SVIDs no key.
func TestSaysNoSecrets(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be other users; CI runs as root")
	}
	w := newWorld(t, maker{})
	p, selectors := w.serverWith(env("PASSWORD=hunter2"), env("SPIFFE_ENDPOINT_SOCKET=unix://"+w.AgentSocket()), env("TOKEN=hunter2"))
	w.issued(w.entry(entrySpec{selectors: selectors}))
	answer := w.ask(pid(p))
	if got := answer.Local.GetProcesses()[0].GetEndpoint().GetEnvironment(); got != "unix://"+w.AgentSocket() {
		t.Errorf("the endpoint in its environment is %q", got)
	}
	text := answer.Local.String()
	for _, secret := range []string{"hunter2", "PASSWORD", "TOKEN", "PRIVATE", "BEGIN"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is in the answer: %s", secret, text)
		}
	}
	if !strings.Contains(text, "spiffe://example.org/web") {
		t.Errorf("the entry is not in the answer: %s", text)
	}
}
