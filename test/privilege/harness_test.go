// Package privilege runs the agent as a process of its own, as other users and with other capabilities, and shows what it
// can do then, what it cannot, and how one takes the place of another.
package privilege

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/cli"
)

const (
	// asSignet makes the test binary be the signet command, asWorkload a process that fetches its SVIDs and prints their IDs.
	asSignet, asWorkload = "SIGNET_TEST_AS_SIGNET", "SIGNET_TEST_AS_WORKLOAD"

	agentUser, workloadUser = 64201, 64202
)

// programs are two builds of the agent, which differ in their version alone.
var programs [2]string

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asSignet) != "":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	case os.Getenv(asWorkload) != "":
		os.Exit(workload(os.Getenv(asWorkload)))
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "privilege")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil {
			panic(err)
		}
		for i := range programs {
			programs[i] = filepath.Join(dir, fmt.Sprintf("signet-agent-%d", i))
			build := exec.Command("go", "build", "-o", programs[i], "-ldflags", fmt.Sprintf("-X github.com/signet-id/signet/internal/version.version=v9.%d.0", i), "../../cmd/signet-agent")
			build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is released: one that links C code cannot restrict all its threads
			if out, err := build.CombinedOutput(); err != nil {
				panic(fmt.Sprintf("%v: %s", err, out))
			}
		}
		return m.Run()
	}())
}

// workload prints the paths of its SPIFFE IDs.
func workload(addr string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(addr))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer c.Close()
	svids, err := c.FetchX509SVIDs(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var ids []string
	for _, s := range svids {
		ids = append(ids, s.ID.Path())
	}
	slices.Sort(ids)
	if err := json.NewEncoder(os.Stdout).Encode(ids); err != nil {
		return 1
	}
	return 0
}

// tail keeps what a process says.
type tail struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *tail) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *tail) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// A site is a CA, and a place for agents.
type site struct {
	t     *testing.T
	dir   string
	port  string
	admin *grpc.ClientConn
}

func newSite(t *testing.T) *site {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to start agents as other users and with other capabilities")
	}
	dir, err := os.MkdirTemp("", "site")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, dir: dir, port: l.Addr().String()}
	l.Close()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.write("ca.yaml", fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s/ca\nadmin_socket: {path: %s/ca.sock}\nseal: {key_file: %s/seal.key, create: true}\naudit: {reserve_bytes: 2097152}\n", s.port, dir, dir, dir))
	ca := exec.Command(os.Args[0], "ca", "run", "--config", dir+"/ca.yaml")
	ca.Env = append(os.Environ(), asSignet+"=1")
	s.start("ca", ca)
	if s.admin, err = grpc.NewClient("unix://"+dir+"/ca.sock", grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.admin.Close() })
	return s
}

// A process is one that the test started.
type process struct {
	*exec.Cmd
	out  *tail
	done chan struct{} // closed when it has ended
}

// start starts a process, which ends with the test.
func (s *site) start(name string, cmd *exec.Cmd) *process {
	s.t.Helper()
	p := &process{Cmd: cmd, out: &tail{}, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.out, p.out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(p.done)
	}()
	s.t.Cleanup(func() {
		cmd.Process.Kill()
		<-p.done
		if s.t.Failed() {
			text := p.out.String()
			s.t.Logf("%s said:\n%s", name, text[max(0, len(text)-5000):])
		}
	})
	return p
}

func (s *site) write(name, content string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// eventually repeats f until it works, for a minute at most.
func (s *site) eventually(f func() error) {
	s.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal(err)
		}
		timer := time.NewTimer(20 * time.Millisecond)
		<-timer.C
	}
}

func (s *site) apply(documents string) {
	s.t.Helper()
	s.eventually(func() error {
		_, err := adminv1.NewAdminClient(s.admin).Apply(s.t.Context(), &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(documents), File: "t.yaml"}}})
		return err
	})
}

// A place is where an agent is configured: its files, and its user's number.
type place struct {
	*site
	dir string
	uid int
}

// place makes the files of an agent that runs as uid; more is added to its configuration.
func (s *site) place(uid int, more string) *place {
	s.t.Helper()
	dir, err := os.MkdirTemp(s.dir, "agent")
	if err != nil {
		s.t.Fatal(err)
	}
	var token *adminv1.CreateJoinTokenResponse
	s.eventually(func() (err error) {
		token, err = adminv1.NewAdminClient(s.admin).CreateJoinToken(s.t.Context(), &adminv1.CreateJoinTokenRequest{})
		return err
	})
	config := fmt.Sprintf("trust_domain: example.org\nserver_address: %s\ndata_dir: %s/data\nsocket_path: %s/run/agent.sock\nadmin_socket: {path: %s/admin/admin.sock}\njoin_token_file: %s/etc/token\n%s",
		s.port, dir, dir, dir, dir, more)
	for _, d := range []string{"", "etc", "run", "admin"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, d), 0o755), os.Chmod(filepath.Join(dir, d), 0o755), os.Chown(filepath.Join(dir, d), uid, uid)); err != nil {
			s.t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"etc/agent.yaml": config, "etc/token": token.Token} {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600), os.Chown(filepath.Join(dir, name), uid, uid)); err != nil {
			s.t.Fatal(err)
		}
	}
	return &place{site: s, dir: dir, uid: uid}
}

func (p *place) endpoint() string { return "unix://" + p.dir + "/run/agent.sock" }

// command is the agent's, of one of the two programs, as its user with capabilities.
func (p *place) command(program int, caps []uintptr, flags ...string) *exec.Cmd {
	cmd := exec.Command(programs[program], append([]string{"-config", p.dir + "/etc/agent.yaml"}, flags...)...)
	if p.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.uid)}, AmbientCaps: caps}
	}
	return cmd
}

// ids are what a workload gets that runs the program at path as workloadUser.
func (p *place) ids(path string) ([]string, error) {
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), asWorkload+"="+p.endpoint())
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: workloadUser, Gid: workloadUser}}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, stderr.String())
	}
	var ids []string
	return ids, json.Unmarshal(out, &ids)
}
