package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// find returns a program of PATH or skips the test.
func find(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("there is no %s here", program)
	}
	return path
}

func command(t *testing.T, ctx context.Context, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v: %s%s", name, strings.Join(args, " "), err, out, &stderr)
	}
	return string(out)
}

// containerd takes the archives as a kubelet wants them: in its namespace, by their names, unpacked for this machine.
func TestContainerdLoads(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("containerd needs root")
	}
	containerd, ctr := find(t, "containerd"), find(t, "ctr")
	out, _ := pack(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "signet-containerd-") // short, as paths of sockets have to be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "c.sock")
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket)
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	daemon := exec.CommandContext(ctx, containerd, "--config", filepath.Join(dir, "config.toml"))
	daemon.Stdout, daemon.Stderr = &log, &log
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	daemon.Cancel = func() error { return daemon.Process.Signal(syscall.SIGTERM) }
	daemon.WaitDelay = 20 * time.Second
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- daemon.Wait() }()
	defer func() { cancel(); <-ended }()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for exec.CommandContext(ctx, ctr, "-a", socket, "version").Run() != nil {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("containerd has ended: %v: %s", err, &log)
		case <-ctx.Done():
			t.Fatalf("containerd does not answer: %s", &log)
		case <-ticker.C:
		}
	}
	in := func(args ...string) string {
		t.Helper()
		return command(t, ctx, ctr, append([]string{"-a", socket, "-n", "k8s.io"}, args...)...)
	}
	for _, r := range recipes {
		top := readLayout{t, filepath.Join(out, r.name)}.index().Manifests[0]
		in("images", "import", "--snapshotter", "native", filepath.Join(out, r.name+".tar"))
		found := false
		for line := range strings.Lines(in("images", "list")) {
			found = found || strings.HasPrefix(line, "images.example.org/signet/"+r.name+":1.2.3 ") && strings.Contains(line, top.Digest) && strings.Contains(line, "linux/amd64,linux/arm64")
		}
		if !found {
			t.Errorf("containerd has not %s:\n%s", r.name, in("images", "list"))
		}
		root := filepath.Join(dir, r.name)
		if err := os.Mkdir(root, 0o700); err != nil {
			t.Fatal(err)
		}
		in("images", "mount", "--snapshotter", "native", "images.example.org/signet/"+r.name+":1.2.3", root)
		if st, err := os.Stat(filepath.Join(root, "usr/bin", r.program)); err != nil || st.Mode() != 0o755 {
			t.Errorf("the program in the image: %v, %v", st, err)
		}
		in("images", "unmount", "--snapshotter", "native", root)
	}
}

// podman takes the layout and the archive.
func TestPodmanLoads(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("podman as root")
	}
	podman := find(t, "podman")
	out, _ := pack(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	dir := t.TempDir()
	lower, err := os.MkdirTemp("", "signet-podman-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(lower)
	in := func(args ...string) string {
		return command(t, ctx, podman, append([]string{"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--storage-driver", "vfs"}, args...)...)
	}
	defer in("rmi", "--all", "--force")
	for _, r := range recipes {
		// podman makes a name of the path, which may have no capitals.
		link := filepath.Join(lower, r.name)
		if err := os.Symlink(filepath.Join(out, r.name), link); err != nil {
			t.Fatal(err)
		}
		in("pull", "-q", "oci:"+link+":1.2.3")
		id := strings.TrimSpace(in("load", "-q", "-i", filepath.Join(out, r.name+".tar")))
		id = id[strings.LastIndex(id, " ")+1:]
		got := in("image", "inspect", "--format", "{{.Config.User}} {{.Config.Entrypoint}} {{.Config.Cmd}} {{.Labels}}", id)
		if !strings.HasPrefix(got, "65532:65532 [/usr/bin/"+r.program+"] ["+strings.Join(r.command, " ")+"]") || !strings.Contains(got, "org.opencontainers.image.version:1.2.3") {
			t.Errorf("%s: %s", id, got)
		}
	}
}
