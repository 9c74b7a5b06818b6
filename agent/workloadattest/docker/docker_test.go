package docker

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/unix"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// partEnv makes the test binary play a part: a process in a container, or an engine of a user.
const partEnv = "SIGNET_TEST_DOCKER"

func TestMain(m *testing.M) {
	switch os.Getenv(partEnv) {
	case "":
		goleak.VerifyTestMain(m)
		return
	case "parent": // starts a process in a user namespace of its own
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), partEnv+"=wait")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, Pdeathsig: syscall.SIGKILL,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}}
		if err := cmd.Run(); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	case "wait":
		fmt.Println("ready", os.Getpid())
		io.Copy(io.Discard, os.Stdin)
	case "engine": // serves the file of its second argument as every container on the socket of its first
		l, err := net.Listen("unix", os.Args[1])
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		text := os.Args[2]
		go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.HasPrefix(r.URL.Path, "/containers/") {
				http.NotFound(w, r)
				return
			}
			io.WriteString(w, text)
		}))
		fmt.Println("ready", os.Getpid())
		io.Copy(io.Discard, os.Stdin)
	}
	os.Exit(0)
}

// play starts a part and returns the process id that it says.
func play(t *testing.T, part string, attr *syscall.SysProcAttr, args ...string) int {
	t.Helper()
	// Others than root may not look into the folder that go test builds in.
	cmd := exec.Command("/proc/self/exe", args...)
	if attr != nil {
		cmd = exec.Command(copyOfSelf(t), args...)
	}
	cmd.Env = append(os.Environ(), partEnv+"="+part, "GORACE=atexit_sleep_ms=0") // else each part's end takes a second
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
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
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	pid, convErr := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "ready ")))
	if err != nil || convErr != nil {
		t.Fatalf("%s says %q, %v", part, line, err)
	}
	return pid
}

// openDir is a folder that everybody may look into.
func openDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != filepath.Clean(os.TempDir()) && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func copyOfSelf(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(openDir(t), "part")
	if err := os.WriteFile(path, content, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// as is another user.
func as(uid int) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
}

// move puts a process into a cgroup, which goes away with the test.
func move(t *testing.T, cgroup string, pid int) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making cgroups and processes of other users needs root")
	}
	root := ""
	for _, dir := range []string{"/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		probe := filepath.Join(dir, fmt.Sprintf("signet-probe-%d", os.Getpid()))
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil && os.Mkdir(probe, 0o755) == nil {
			os.Remove(probe)
			root = dir
			break
		}
	}
	if root == "" {
		t.Skip("there is no cgroup hierarchy in which cgroups can be made")
	}
	dir := filepath.Join(root, cgroup)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		for d := dir; d != root; d = filepath.Dir(d) {
			os.Remove(d) // fails where there is something else
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

func pin(t *testing.T, pid int) *peer.Process {
	t.Helper()
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := table.Open(int32(pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(); table.Close() })
	return p
}

// ask returns what the method says of a process.
func ask(t *testing.T, c Config, pid int) ([]string, error) {
	t.Helper()
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	found, err := m.Selectors(t.Context(), pin(t, pid), peer.Snapshot{})
	var all []string
	for _, s := range found {
		all = append(all, s.String())
	}
	slices.Sort(all)
	return all, err
}

// anEngine serves root's engine on a socket.
func anEngine(t *testing.T, serve http.HandlerFunc) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: serve}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	return socket
}

// tell is an engine's answer about a container.
func tell(id string, pid int) string {
	return fmt.Sprintf(`{"Id":%q,"Name":"/web-1","State":{"Status":"running","Pid":%d},"Image":%q,"HostConfig":{"Binds":[{"x":[1,null]}]},
		"Config":{"Image":"registry/web:1.2","Env":["STAGE=prod","PASSWORD=secret","STAGES=x"],"Labels":{"app":"web","com.example/tier":"a:b","empty":""}}}`, id, pid, anImage)
}

const otherID = "ffff32b28b5487c13e8018d622c5f2a34d538b54d82a765668bf68a64ccd1707"

func TestContainerOfAnEngine(t *testing.T) {
	pid := play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	var asked []string
	socket := anEngine(t, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.Path)
		switch r.URL.Path {
		case "/containers/" + anID + "/json":
			io.WriteString(w, tell(anID, pid))
		case "/images/" + anImage + "/json":
			io.WriteString(w, `{"RepoDigests":["registry/web@sha256:`+strings.Repeat("ab", 32)+`","mirror/web@sha256:`+strings.Repeat("ab", 32)+`"]}`)
		default:
			http.NotFound(w, r)
		}
	})
	got, err := ask(t, Config{Sockets: []string{socket}, Env: []string{"STAGE", "ABSENT"}}, pid)
	want := []string{
		"docker:container_name:web-1", "docker:env:STAGE=prod", "docker:image_config_digest:" + anImage, "docker:image_digest:sha256:" + strings.Repeat("ab", 32),
		"docker:image_id:registry/web:1.2", "docker:label:app:web", "docker:label:com.example/tier:a:b", "docker:label:empty:",
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
	}
	if len(asked) != 2 {
		t.Errorf("asked %q, want two questions", asked)
	}

	// A process in no container asks nobody.
	outside := play(t, "wait", nil)
	if got, err := ask(t, Config{Sockets: []string{socket}}, outside); err != nil || got != nil || len(asked) != 2 {
		t.Errorf("a process in no container: %q, %v, and the engine was asked %d times", got, err, len(asked)-2)
	}
}

// A container that systemd starts is in the cgroup of its unit.
func TestContainerOfAUnit(t *testing.T) {
	pid := play(t, "wait", nil)
	move(t, "system.slice/signet-test-web.service/libpod-payload-"+anID, pid)
	socket := anEngine(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(anID, pid)) })
	if got, err := ask(t, Config{Sockets: []string{socket}}, pid); !slices.Contains(got, "docker:label:app:web") {
		t.Errorf("got %q, %v", got, err)
	}
}

// Who may make cgroups somewhere may name one after any container. The container's first process is then elsewhere.
func TestForgedCgroup(t *testing.T) {
	victim := play(t, "wait", nil)
	move(t, "docker/"+anID, victim)
	socket := anEngine(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(anID, victim)) })
	for _, cgroup := range []string{
		"system.slice/signet-evil.service/docker-" + anID + ".scope",
		"user.slice/user-4711.slice/user@4711.service/docker-" + anID + ".scope",
		"user.slice/user-4711.slice/session-1.scope/libpod-" + anID + ".scope",
		"user.slice/user-0.slice/user@0.service/libpod-" + anID,
		"signet-evil/docker/" + anID,
		"docker/" + otherID + "/docker/" + anID,
	} {
		pid := play(t, "wait", nil)
		move(t, cgroup, pid)
		if got, err := ask(t, Config{Sockets: []string{socket}, Rootless: true}, pid); len(got) > 0 {
			t.Errorf("a process in %s has the selectors of the container %q, %v", cgroup, got, err)
		}
	}
}

func TestEnginesThatAreWrong(t *testing.T) {
	pid, elsewhere := play(t, "wait", nil), play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	move(t, "docker/"+otherID, elsewhere)
	hung := make(chan struct{})
	t.Cleanup(func() { close(hung) })
	for name, tt := range map[string]struct {
		serve http.HandlerFunc
		want  string
	}{
		"another container": {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(otherID, pid)) }, "answers about"},
		"no id":             {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{}`) }, "answers about"},
		"no process":        {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(anID, 0)) }, "does not run"},
		"process elsewhere": {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(anID, elsewhere)) }, "is not in the cgroup"},
		"process outside":   {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(anID, os.Getpid())) }, "is not in the cgroup"},
		"ended process":     {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(anID, 1<<22)) }, "the first process of container"},
		"unknown":           {http.NotFound, "no engine knows it"},
		"broken":            {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) }, "status 500"},
		"redirected": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/containers/"+otherID+"/json", http.StatusFound)
		}, "status 302"},
		"garbage": {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }, "no JSON"},
		"huge": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"x":[`)
			for range 64 << 10 {
				io.WriteString(w, `"`+strings.Repeat("x", 1000)+`",`)
			}
		}, "longer than"},
		"headers without end": {func(w http.ResponseWriter, r *http.Request) {
			for i := range 4096 {
				w.Header().Set("X-"+strconv.Itoa(i), strings.Repeat("x", 100))
			}
			io.WriteString(w, tell(anID, pid))
		}, "headers"},
		"silent": {func(w http.ResponseWriter, r *http.Request) { <-hung }, "no answer in time"},
		"half": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"Id":`)
			w.(http.Flusher).Flush()
			<-hung
		}, "no answer in time: only a part"},
		"no HTTP": {func(w http.ResponseWriter, r *http.Request) {
			c, _, _ := w.(http.Hijacker).Hijack()
			io.WriteString(c, "220 hello\r\n")
			c.Close()
		}, "malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := anEngine(t, tt.serve)
			timeout := 20 * time.Second
			if name == "silent" || name == "half" {
				timeout = 100 * time.Millisecond
			}
			got, err := ask(t, Config{Sockets: []string{socket}, Timeout: timeout}, pid)
			if len(got) > 0 || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

// One engine that hangs or is broken does not hide another's answer.
func TestOneEngineHidesNoOther(t *testing.T) {
	pid := play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	hung := make(chan struct{})
	t.Cleanup(func() { close(hung) })
	silent := anEngine(t, func(w http.ResponseWriter, r *http.Request) { <-hung })
	good := anEngine(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, tell(anID, pid)) })
	got, _ := ask(t, Config{Sockets: []string{silent, filepath.Join(t.TempDir(), "absent"), good}, Timeout: time.Second}, pid)
	if !slices.Contains(got, "docker:label:app:web") {
		t.Errorf("got %q", got)
	}
}

// While an engine hangs, not every process waits for it.
func TestHangingEngineIsLeftAloneForAWhile(t *testing.T) {
	pid := play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	p := pin(t, pid)
	var asked atomic.Int32
	hang := make(chan struct{})
	socket := anEngine(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		select {
		case <-hang:
			io.WriteString(w, tell(anID, pid))
		case <-r.Context().Done():
		}
	})
	m, err := New(Config{Sockets: []string{socket}, Timeout: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if _, err := m.Selectors(t.Context(), p, peer.Snapshot{}); !errors.Is(err, errSilent) {
			t.Fatalf("the engine hangs: %v", err)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("a hanging engine was asked %d times in a moment, want once", n)
	}
	// Afterwards it is asked again. A caller that leaves says nothing about the engine.
	m.cfg.Timeout = 20 * time.Second
	m.silent[socket].Store(0)
	left, cancel := context.WithCancel(t.Context())
	go func() {
		for asked.Load() < 2 {
			runtime.Gosched()
		}
		cancel()
	}()
	if _, err := m.Selectors(left, p, peer.Snapshot{}); err == nil {
		t.Error("a caller that left has its answer")
	}
	close(hang)
	if got, err := m.Selectors(t.Context(), p, peer.Snapshot{}); err != nil || len(got) == 0 {
		t.Errorf("the engine answers again: %q, %v", got, err)
	}
}

// The whole, with what an agent attests by: a hanging engine costs its own selectors only, and is counted.
func TestHangingEngineHidesNoOtherMethod(t *testing.T) {
	pid := play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	socket := anEngine(t, func(w http.ResponseWriter, r *http.Request) { <-hang })
	engines, err := New(Config{Sockets: []string{socket}, Timeout: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	users, err := unix.New(unix.Config{})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	failed := map[string]int{}
	a, err := workloadattest.New(workloadattest.Config{
		Methods: []workloadattest.Method{engines, users}, OnFailure: func(method string) { failed[method]++ }, Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	p := pin(t, pid)
	for range 3 {
		c, err := a.Attest(t.Context(), p)
		if err != nil || !slices.Contains(c.Selectors, spiffe.Selector{Type: "unix", Value: "uid:0"}) {
			t.Fatalf("attested %v, %v", c.Selectors, err)
		}
	}
	if failed["docker"] != 3 || failed["unix"] != 0 {
		t.Errorf("failures %v", failed)
	}
	if n := strings.Count(log.String(), "engine at "+socket); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, log.String())
	}
}

// What an image lacks, or its description, hides nothing else.
func TestImageThatIsNotKnown(t *testing.T) {
	pid := play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	for status, wantErr := range map[int]bool{404: false, 500: true} {
		socket := anEngine(t, func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/images/") {
				w.WriteHeader(status)
				return
			}
			io.WriteString(w, tell(anID, pid))
		})
		got, err := ask(t, Config{Sockets: []string{socket}}, pid)
		if !slices.Contains(got, "docker:label:app:web") || (err != nil) != wantErr {
			t.Errorf("the image is answered by %d: %q, %v", status, got, err)
		}
	}
}

// The process leaves the container while the engine is asked, or ends.
func TestProcessThatLeaves(t *testing.T) {
	first := play(t, "wait", nil)
	move(t, "docker/"+anID, first)
	pid := play(t, "wait", nil)
	move(t, "docker/"+anID, pid)
	socket := anEngine(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/images/") {
			move(t, "signet-elsewhere", pid)
		}
		io.WriteString(w, tell(anID, first))
	})
	if got, err := ask(t, Config{Sockets: []string{socket}}, pid); len(got) > 0 || err == nil {
		t.Errorf("a process that left: %q, %v", got, err)
	}

	move(t, "docker/"+anID, pid)
	p := pin(t, pid)
	socket = anEngine(t, func(w http.ResponseWriter, r *http.Request) {
		syscall.Kill(pid, syscall.SIGKILL)
		<-p.Done()
		io.WriteString(w, tell(anID, first))
	})
	m, err := New(Config{Sockets: []string{socket}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := m.Selectors(t.Context(), p, peer.Snapshot{}); len(got) > 0 || !errors.Is(err, peer.ErrGone) {
		t.Errorf("a process that ended: %q, %v; want ErrGone", got, err)
	}
}

func TestAvailable(t *testing.T) {
	good := anEngine(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "OK") })
	bad := anEngine(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) })
	absent := filepath.Join(t.TempDir(), "absent")
	for _, tt := range []struct {
		sockets []string
		want    string
	}{{[]string{good}, ""}, {[]string{good, bad}, "engine at " + bad}, {[]string{absent}, "nobody listens there"}} {
		m, err := New(Config{Sockets: tt.sockets})
		if err != nil {
			t.Fatal(err)
		}
		err = m.Available(context.Background())
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Available with %q: %v, want %q", tt.sockets, err, tt.want)
		}
	}
}
