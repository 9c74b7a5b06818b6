package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// These tests run real engines, if they are installed (Debian's packages docker.io and podman with runc). SIGNET_TEST_DOCKERD and
// SIGNET_TEST_PODMAN name others than those in PATH. Nothing comes from a registry: the image is a program of the test's.

// program returns an engine's, or skips the test.
func program(t *testing.T, name, variable string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("running an engine needs root")
	}
	if path := os.Getenv(variable); path != "" {
		return path
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("there is no %s in PATH, and %s names none", name, variable)
	}
	return path
}

// scratch is a folder with a short path, for sockets.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet-engine")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Podman tidies up behind a removed container for a while.
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for range 200 {
			if err = os.RemoveAll(dir); err == nil {
				return
			}
			<-tick.C
		}
		t.Error(err)
	})
	return dir
}

// image is a tar file with one static program, which waits.
func image(t *testing.T, dir string) string {
	t.Helper()
	src := filepath.Join(dir, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"go.mod":  "module wait\n",
		"main.go": "package main\n\nimport (\n\t\"os\"\n\t\"os/signal\"\n\t\"syscall\"\n)\n\nfunc main() {\n\tc := make(chan os.Signal, 1)\n\tsignal.Notify(c, syscall.SIGTERM)\n\t<-c\n}\n",
	} {
		if err := os.WriteFile(filepath.Join(src, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-o", "wait", ".")
	build.Dir, build.Env = src, append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	content, err := os.ReadFile(filepath.Join(src, "wait"))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "wait", Mode: 0o755, Size: int64(len(content))}), writeAll(w, content), w.Close()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "image.tar")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeAll(w *tar.Writer, content []byte) error {
	_, err := w.Write(content)
	return err
}

// A cli runs an engine's command line.
type cli struct {
	t    *testing.T
	args []string
	env  []string
	attr *syscall.SysProcAttr
}

func (c cli) run(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (c cli) try(args ...string) (string, error) {
	cmd := exec.Command(c.args[0], append(c.args[1:len(c.args):len(c.args)], args...)...)
	cmd.Env, cmd.SysProcAttr, cmd.Dir = append(os.Environ(), c.env...), c.attr, "/"
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return errs.String(), err
	}
	return strings.TrimSpace(string(out)), nil
}

// daemon runs a program until the test ends, when it is told to end, and waits for its socket.
func daemon(t *testing.T, e engine, cmd *exec.Cmd) {
	t.Helper()
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			cmd.Process.Kill()
			<-ended
		}
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(60 * time.Second)
	ping := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return e.ping(ctx)
	}
	for ping() != nil {
		select {
		case <-ended:
			t.Skipf("%s does not run here:\n%s", filepath.Base(cmd.Path), tail(log.String()))
		case <-deadline:
			t.Fatalf("%s does not answer: %v", filepath.Base(cmd.Path), ping())
		case <-tick.C:
		}
	}
}

func tail(s string) string { return s[max(0, len(s)-2000):] }

// check looks at the main process of a container, and at a second one that is started in it.
func check(t *testing.T, config Config, engine cli, prefix string, run ...string) {
	t.Helper()
	name := run[0]
	id := engine.run(append(slices.Clone(run[1:]), "--name", name, "--label", "app=web", "--label", "com.example/tier=a:b", "--env", "STAGE=prod", "--env", "PASSWORD=secret",
		"signet-test:1", "/wait")...)
	t.Cleanup(func() { engine.try("rm", "-f", name) })
	if i := strings.LastIndexByte(id, '\n'); i >= 0 {
		id = id[i+1:]
	}
	state := engine.run("inspect", "-f", "{{.State.Pid}} {{.Image}} {{.Config.Image}}", name)
	f := strings.Fields(state)
	pid, err := strconv.Atoi(f[0])
	if err != nil || pid == 0 || len(f) != 3 {
		t.Fatalf("the container is %q", state)
	}
	cgroup, err := os.ReadFile("/proc/" + f[0] + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("container %s is in:\n%s", id, cgroup)
	digest := f[1]
	if !strings.HasPrefix(digest, "sha256:") {
		digest = "sha256:" + digest
	}
	want := []string{"container_name:" + name, "env:STAGE=prod", "image_config_digest:" + digest, "image_id:" + f[2], "label:app:web", "label:com.example/tier:a:b"}
	got, err := ask(t, config, pid)
	if err != nil {
		t.Errorf("%v", err)
	}
	for _, w := range want {
		if !slices.Contains(got, "docker:"+prefix+w) {
			t.Errorf("%s is missing in %q", w, got)
		}
	}
	if strings.Contains(strings.Join(got, " "), "secret") {
		t.Errorf("a variable that nobody named is in %q", got)
	}

	engine.run("exec", "-d", name, "/wait")
	others := 0
	procs, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range procs {
		other, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if text, readErr := os.ReadFile(file); err != nil || readErr != nil || other == pid || !bytes.Equal(text, cgroup) {
			continue
		}
		others++
		if again, err := ask(t, config, other); err != nil || !slices.Equal(again, got) {
			t.Errorf("another process of the container has %q, %v; want %q", again, err, got)
		}
	}
	if others == 0 {
		t.Error("there is no other process in the container")
	}
}

func TestRealDocker(t *testing.T) {
	dockerd := program(t, "dockerd", "SIGNET_TEST_DOCKERD")
	client := program(t, "docker", "SIGNET_TEST_DOCKER")
	dir := scratch(t)
	socket := filepath.Join(dir, "d.sock")
	daemon(t, engine{path: socket}, exec.Command(dockerd, "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--host", "unix://"+socket, "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"))
	docker := cli{t: t, args: []string{client, "--host", "unix://" + socket}}
	docker.run("import", image(t, dir), "signet-test:1")
	config := Config{Sockets: []string{socket}, Env: []string{"STAGE"}}
	for _, ns := range []string{"host", "private"} {
		t.Run("cgroup namespace "+ns, func(t *testing.T) {
			docker.t = t
			check(t, config, docker, "", "web-"+ns, "run", "-d", "--network=none", "--cgroupns="+ns)
		})
	}
}

func TestRealPodman(t *testing.T) {
	path := program(t, "podman", "SIGNET_TEST_PODMAN")
	dir := scratch(t)
	socket := filepath.Join(dir, "p.sock")
	args := []string{path, "--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--storage-driver=vfs", "--cgroup-manager=cgroupfs"}
	if runc, err := exec.LookPath("runc"); err == nil {
		args = append(args, "--runtime="+runc) // crun does not run on a hybrid hierarchy
	}
	podman := cli{t: t, args: args}
	podman.run("import", image(t, dir), "signet-test:1")
	daemon(t, engine{path: socket}, exec.Command(path, append(args[1:len(args):len(args)], "system", "service", "--time=0", "unix://"+socket)...))
	config := Config{Sockets: []string{socket}, Env: []string{"STAGE"}}
	// An agent may not be allowed to raise limits, as Podman wants to.
	check(t, config, podman, "", "web-root", "run", "-d", "--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
}

// asUser runs Podman as a user would who has logged in to a system with systemd and cgroup v2: in cgroups of his own. Where cgroups
// of version 1 are mounted, Podman gets to see version 2 alone.
const asUser = `set -e
mount --make-rprivate /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cgroup=/sys/fs/cgroup/user.slice/user-1.slice/user@1.service
mkdir -p $cgroup/shell
chown -R 1:1 $cgroup
echo $$ > $cgroup/shell/cgroup.procs
exec setpriv --reuid 1 --regid 1 --clear-groups "$@"`

func TestRealPodmanRootless(t *testing.T) {
	path := program(t, "podman", "SIGNET_TEST_PODMAN")
	const uid = 1 // it must have a name, and has one on every system
	dir := scratch(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	users, home := filepath.Join(dir, "user"), filepath.Join(dir, "home")
	runtime := filepath.Join(users, "1")
	for _, d := range []string{users, home, runtime, filepath.Join(runtime, "podman")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(d, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"unshare", "--mount", "sh", "-c", asUser, "sh", path, "--root", filepath.Join(home, "root"), "--runroot", filepath.Join(home, "run"),
		"--storage-driver=vfs", "--cgroup-manager=cgroupfs"}
	podman := cli{t: t, args: args, env: []string{"HOME=" + home, "XDG_RUNTIME_DIR=" + runtime}}
	t.Cleanup(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for range 40 { // what was killed takes a while to end
			left := false
			for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
				for _, d := range []string{"user@1.service/pods/conmon", "user@1.service/pods", "user@1.service/shell", "user@1.service", ""} {
					err := os.Remove(filepath.Join(root, "user.slice/user-1.slice", d))
					left = left || errors.Is(err, syscall.EBUSY)
				}
			}
			if !left {
				return
			}
			<-tick.C
		}
	})
	t.Cleanup(func() {
		// Podman keeps a process that holds its user namespace.
		if text, err := os.ReadFile(filepath.Join(runtime, "libpod", "tmp", "pause.pid")); err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && pid > 1 {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	if out, err := podman.try("import", image(t, dir), "signet-test:1"); err != nil {
		t.Skipf("rootless Podman does not run here: %v\n%s", err, out)
	}
	e := engine{path: podmanSocket(users, uid), dir: runtime, below: "podman/podman.sock", uid: uid}
	service := exec.Command(args[0], append(args[1:len(args):len(args)], "system", "service", "--time=0", "unix://"+e.path)...)
	service.Env, service.Dir = append(os.Environ(), podman.env...), "/"
	daemon(t, e, service)
	check(t, Config{Sockets: []string{}, Rootless: true, Env: []string{"STAGE"}, userDirs: users}, podman, "rootless:1:",
		"web-user", "run", "-d", "--network=none", "--ulimit=host", "--cgroups=enabled", "--cgroup-parent=/user.slice/user-1.slice/user@1.service/pods")
}
