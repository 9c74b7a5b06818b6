package ca

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestAdminSocketIsForAdminsOnly connects as other users: those whom uids names get in, also after a reload, nobody
// else even opens the socket.
func TestAdminSocketIsForAdminsOnly(t *testing.T) {
	if path := os.Getenv("SIGNET_TEST_CONNECT"); path != "" {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be other users; CI runs as root")
	}
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := config(filepath.Join(dir, "ca"))
	c.AdminSocket = AdminSocket{Path: filepath.Join(dir, "admin", "ca.sock"), UIDs: []uint32{4711}}
	h := start(t, c)
	program := filepath.Join(dir, "test")
	b, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	connects := func(uid uint32) bool {
		cmd := exec.Command(program, "-test.run", "^TestAdminSocketIsForAdminsOnly$")
		cmd.Env = append(os.Environ(), "SIGNET_TEST_CONNECT="+c.AdminSocket.Path, "TMPDIR=/tmp")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if err != nil && !strings.Contains(string(out), "permission denied") {
			t.Fatalf("uid %d: %v %s", uid, err, out)
		}
		return err == nil
	}
	if !connects(4711) {
		t.Error("uid 4711 is named and cannot connect")
	}
	if connects(4712) {
		t.Error("uid 4712 is not named and can connect")
	}
	for path, want := range map[string]os.FileMode{c.AdminSocket.Path: 0o660, filepath.Dir(c.AdminSocket.Path): 0o750} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v %v, want %v", path, st.Mode(), err, want)
		}
	}
	c.AdminSocket.UIDs = []uint32{4712}
	if _, err := h.ca.Reload(c); err != nil {
		t.Fatal(err)
	}
	if connects(4711) || !connects(4712) {
		t.Error("a reload did not change who may connect")
	}
}
