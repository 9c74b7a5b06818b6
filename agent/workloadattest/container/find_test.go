package container

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

const partEnv = "SIGNET_TEST_CONTAINER"

func TestMain(m *testing.M) {
	switch os.Getenv(partEnv) {
	case "":
		os.Exit(m.Run())
	case "wait":
		fmt.Println("ready")
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "forge":
		if err := forge(); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println("ready")
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "find":
		if err := findAll(os.Args[1:]); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
}

// forge puts over this process's files what an engine would put there, for a container that it is not in.
func forge() error {
	dir := "/tmp/var/lib/docker/containers/" + idB
	if err := unix.Mount("none", "/tmp", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"hostname", "hosts", "resolv.conf"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			return err
		}
		if err := unix.Mount(filepath.Join(dir, name), "/etc/"+name, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("mounting over /etc/%s: %w", name, err)
		}
	}
	return nil
}

// findAll says where the processes are.
func findAll(pids []string) error {
	f, err := New(Config{CgroupRoots: []string{"/" + os.Getenv("SIGNET_TEST_ROOT")}})
	if err != nil {
		return err
	}
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		return err
	}
	defer table.Close()
	for _, text := range pids {
		pid, err := strconv.Atoi(text)
		if err != nil {
			return err
		}
		p, err := table.Open(int32(pid))
		if err != nil {
			return err
		}
		l, err := f.Find(p)
		if err != nil {
			return err
		}
		fmt.Printf("id=%s pod=%s\n", l.ID, l.PodUID)
	}
	return nil
}

// start runs a part and waits for its first line.
func start(t *testing.T, part string, attr *syscall.SysProcAttr) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), partEnv+"="+part)
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
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("%s says %q, %v", part, line, err)
	}
	return cmd
}

func find(t *testing.T, f *Finder, pid int) (Location, error) {
	t.Helper()
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	p, err := table.Open(int32(pid))
	if err != nil {
		t.Fatal(err)
	}
	return f.Find(p)
}

// hierarchy is where cgroups can be made here: of v1, one in which a new cgroup needs no preparation.
func hierarchy(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making cgroups needs root")
	}
	for _, dir := range []string{"/sys/fs/cgroup/freezer", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		probe := filepath.Join(dir, fmt.Sprintf("signet-probe-%d", os.Getpid()))
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil && os.Mkdir(probe, 0o755) == nil {
			_ = os.Remove(probe)
			return dir
		}
	}
	t.Skip("there is no cgroup hierarchy in which cgroups can be made")
	return ""
}

// put makes a cgroup and moves a process there.
func put(t *testing.T, hierarchy, path string, pid int) {
	t.Helper()
	dir := filepath.Join(hierarchy, path)
	var made []string
	for d := dir; d != hierarchy; d = filepath.Dir(d) {
		made = append(made, d)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(hierarchy, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		for _, d := range made {
			_ = os.Remove(d) // those that are still in use are removed by the test's other cleanup
		}
	})
}

// Real processes in real cgroups, seen from outside and from the container of the agent, which has a cgroup namespace of its own.
func TestFindRealProcesses(t *testing.T) {
	h := hierarchy(t)
	root := fmt.Sprintf("signet-test-%d", os.Getpid())
	pod := "/" + root + "/kubepods/burstable/pod"
	f, err := New(Config{CgroupRoots: []string{"/" + root}})
	if err != nil {
		t.Fatal(err)
	}

	a := start(t, "wait", nil)
	put(t, h, pod+podA+"/"+idA, a.Process.Pid)
	got, err := find(t, f, a.Process.Pid)
	if err != nil || got.ID != idA || got.PodUID != podA || got.Path != pod+podA+"/"+idA {
		t.Errorf("in a pod: %+v, %v", got, err)
	}

	// A process that makes cgroups below its own stays where it was.
	b := start(t, "wait", nil)
	put(t, h, pod+podA+"/"+idA+"/kubepods/pod"+podB+"/"+idB, b.Process.Pid)
	if got, err = find(t, f, b.Process.Pid); err != nil || got.ID != idA || got.PodUID != podA {
		t.Errorf("below its container: %+v, %v", got, err)
	}

	// An agent in another pod, with a namespace of its own.
	agent := start(t, "wait", nil)
	put(t, h, pod+podB+"/"+idB, agent.Process.Pid)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `echo $$ >"$1/cgroup.procs" && shift && exec unshare --cgroup "$@"`, "sh", filepath.Join(h, pod+podB, idB),
		self, strconv.Itoa(a.Process.Pid), strconv.Itoa(agent.Process.Pid))
	cmd.Env = append(os.Environ(), partEnv+"=find", "SIGNET_TEST_ROOT="+root)
	out, err := cmd.CombinedOutput()
	// The agent's own container has no files of an engine here, so that nothing says which it is.
	if want := fmt.Sprintf("id=%s pod=%s\nid= pod=\n", idA, podA); err != nil || string(out) != want {
		t.Errorf("from a namespace: %q, %v; want %q", out, err, want)
	}
}

// A process with a user and a mount namespace of its own shows whatever it likes in its mountinfo.
func TestFindForgedMounts(t *testing.T) {
	p := start(t, "forge", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}})
	shown, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := ownContainer(shown); err != nil || c.ID != idB {
		t.Fatalf("the forgery does not look like one: %+v, %v", c, err)
	}
	f, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	before, err := find(t, f, os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := find(t, f, p.Process.Pid); err != nil || got.Container != before.Container {
		t.Errorf("%+v, %v; want where the test is, %+v", got, err, before.Container)
	}
}

func TestFindEndedProcess(t *testing.T) {
	f, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	cmd := start(t, "wait", nil)
	p, err := table.Open(int32(cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if l, err := f.Find(p); !errors.Is(err, peer.ErrGone) || l != (Location{}) {
		t.Errorf("an ended process: %+v, %v", l, err)
	}
}

func TestNewHere(t *testing.T) {
	f, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	got, err := find(t, f, os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != "" && got.Path != "" && !strings.Contains(string(data), got.ID) {
		t.Errorf("%+v is not in %q", got, data)
	}
}
