package workloadapi_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi"
)

func newAt(t testing.TB, path string) (*workloadapi.Server, error) {
	t.Helper()
	return workloadapi.New(workloadapi.Config{Source: newMemory(newAuthority(t, "example.org", "k1")), Attestor: byState{}, SocketPath: path})
}

func TestWEP_34_SocketModes(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	dir := filepath.Join(openDir(t), "run", "signet")
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	e := serveAt(t, filepath.Join(dir, "agent.sock"), src)
	unix.Umask(old)
	st, err := os.Lstat(e.path)
	if err != nil || st.Mode().Type() != os.ModeSocket || st.Mode().Perm() != 0o777 {
		t.Errorf("socket %v, %v; want mode 0777 whatever the umask", st.Mode(), err)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 2 {
		t.Errorf("the directory holds %v, want the socket and its lock alone", names)
	}
	private := serve(t, src, func(c *workloadapi.Config) { c.Mode = 0o660 })
	if st, err := os.Lstat(private.path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("socket %v, %v; want mode 0660", st.Mode(), err)
	}
}

func TestWEP_34_SocketLife(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	dir := t.TempDir()
	path := filepath.Join(dir, "agent.sock")

	// A stale socket, as a killed agent leaves it, is replaced.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	e := serveAt(t, path, src)
	if err := first(e.client(t).FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})); err != nil {
		t.Fatal(err)
	}

	// A live one is not.
	if _, err := newAt(t, path); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a second endpoint: %v, want it refused", err)
	}
	if err := first(e.client(t).FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})); err != nil {
		t.Errorf("after the attempt to take the socket: %v", err)
	}

	// What somebody else put there after us is not ours to remove.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.stop()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("a foreign file was removed at the end: %v", err)
	}
}

func TestWEP_34_LiveSocketOfAnotherProgramIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", path) // without our lock file
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := newAt(t, path); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("New = %v, want it refused", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Errorf("the other program's socket is gone: %v", err)
	} else {
		c.Close()
	}
}

func TestWEP_34_BadPlacesAreRefused(t *testing.T) {
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(open, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/nowhere", link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, want string }{
		{"empty", "", "empty"},
		{"too long", "/tmp/" + strings.Repeat("x", 103), "108 bytes long, and Unix sockets allow 107"},
		{"world-writable directory", filepath.Join(open, "a.sock"), "writable by everybody"},
		{"below a world-writable directory", filepath.Join(below, "a.sock"), "writable by everybody"},
		{"a file", file, "is no socket"},
		{"a symbolic link", link, "is no socket"},
		{"below a file", filepath.Join(file, "a.sock"), "making the directory"},
		{"a place that cannot be written", "/proc/a.sock", "/proc"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := newAt(t, tt.path)
			if err == nil {
				s.Close()
				t.Fatal("not refused")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not say %q", err, tt.want)
			}
		})
	}
}

func TestCloseWithoutRun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	s, err := newAt(t, path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := s.Run(ctx); err == nil {
		t.Error("Run after Close returned nil")
	}
}

// TestSocketOfTheServiceManager serves on a socket that somebody else made in a directory where the agent may write nothing, as the
// agent's unit has it.
func TestSocketOfTheServiceManager(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a file system")
	}
	dir := openDir(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k,mode=0755"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "agent.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	passed, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()
	readOnly := func(flag uintptr) {
		t.Helper()
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|flag, ""); err != nil {
			t.Fatal(err)
		}
	}
	readOnly(unix.MS_RDONLY)
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	take := func(c *workloadapi.Config) { c.Socket = passed }
	e := serveAt(t, path, src, take)
	if err := first(e.client(t).FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})); err != nil {
		t.Error(err)
	}
	e.stop()

	// It was moved away: no other can be made there, and what to do about it is said.
	readOnly(0)
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	readOnly(unix.MS_RDONLY)
	s, err := workloadapi.New(workloadapi.Config{Source: src, Attestor: byState{}, SocketPath: path, Socket: passed})
	if err == nil {
		s.Close()
		t.Fatal("New makes a socket in a directory that is read-only")
	}
	if !strings.Contains(err.Error(), "restart signet-agent.socket") {
		t.Errorf("error %q does not say what to do", err)
	}
}
