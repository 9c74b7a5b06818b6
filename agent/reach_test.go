package agent

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

// TestObstacle looks from the root directory of a container that is laid out in a directory: absolute links lead to
// places below it, never to the machine's own.
func TestObstacle(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"run/signet", "var", "closed/signet"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(root, "run/signet/agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for path, to := range map[string]string{"var/run": "/run", "closed/signet/agent.sock": "/run/signet/agent.sock", "out": "/etc"} {
		if err := os.Symlink(to, filepath.Join(root, path)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "other"), nil, 0o777); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	chmod := func(path string, mode os.FileMode) {
		t.Helper()
		if err := os.Chmod(filepath.Join(root, path), mode); err != nil {
			t.Fatal(err)
		}
	}
	chmod("run/signet/agent.sock", 0o777)
	somebody := peer.Snapshot{EffectiveUID: 4711, EffectiveGID: 4711, Groups: []uint32{4712}}
	check := func(name, path string, who peer.Snapshot, what, at string) {
		t.Helper()
		if gotWhat, gotAt := obstacle(fd, path, socket, who); gotWhat != what || gotAt != at {
			t.Errorf("%s: obstacle(%s) = %q at %q, want %q at %q", name, path, gotWhat, gotAt, what, at)
		}
	}
	check("in the open", "/run/signet/agent.sock", somebody, "", "")
	check("by an absolute link of the container", "/var/run/signet/agent.sock", somebody, "", "")
	check("not there", "/run/other/agent.sock", somebody, "missing", "/run/other")
	check("a link out leads nowhere", "/out/passwd", somebody, "missing", "/out")
	check("another file", "/other", somebody, "other", "/other")
	chmod("run/signet/agent.sock", 0o755)
	check("the socket is closed", "/run/signet/agent.sock", somebody, "denied", "/run/signet/agent.sock")
	check("not for root", "/run/signet/agent.sock", peer.Snapshot{}, "", "")
	chmod("run/signet/agent.sock", 0o777)
	chmod("run/signet", 0o750)
	check("the directory is closed", "/run/signet/agent.sock", somebody, "denied", "/run/signet")
	if os.Geteuid() == 0 {
		if err := os.Chown(filepath.Join(root, "run/signet"), 0, 4712); err != nil {
			t.Fatal(err)
		}
		check("open to a supplementary group", "/run/signet/agent.sock", somebody, "", "")
	}
}
