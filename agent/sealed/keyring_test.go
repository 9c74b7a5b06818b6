package sealed

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// forget removes a directory's key from the keyring, as a reboot does.
func forget(t *testing.T, dir string) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		sum := sha256.Sum256([]byte(dir))
		if _, err := unix.KeyctlInt(unix.KEYCTL_LINK, unix.KEY_SPEC_USER_KEYRING, unix.KEY_SPEC_THREAD_KEYRING, 0, 0); err != nil {
			done <- err
			return
		}
		id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", keyringUse+hex.EncodeToString(sum[:8]), 0)
		if err == nil {
			_, err = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func needKeyring(t *testing.T) {
	t.Helper()
	if _, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_USER_KEYRING, true); err != nil {
		t.Skipf("this kernel or container has no keyrings: %v", err)
	}
}

func TestKeyring(t *testing.T) {
	needKeyring(t)
	r := newRig(t, Keyring{})
	t.Cleanup(func() { forget(t, r.config.Dir) })
	s, c := r.open()
	if c != nil || s.Status().Err != nil {
		t.Fatalf("found %v, status %+v", c, s.Status())
	}
	r.fill(s)
	raw := bytes.Clone(s.holder.secret().b[:])
	err := filepath.WalkDir(r.config.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, raw) {
			t.Errorf("%s holds the key", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	// A restart of the agent is another process, with another session keyring, as a unit's is.
	cmd := exec.Command(os.Args[0], "-test.run=^TestKeyringOfAnotherProcess$", "-test.v")
	cmd.Env = append(os.Environ(), keyringDir+"="+r.config.Dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "PASS: TestKeyringOfAnotherProcess") {
		t.Errorf("another process of the same user: %v\n%s", err, out)
	}

	forget(t, r.config.Dir)
	if _, c := r.open(); c != nil || len(r.refused()) != 0 {
		t.Errorf("after a reboot: found %v, %d set aside; want neither", c, len(r.refused()))
	}
}

const keyringDir = "SIGNET_TEST_KEYRING_DIR"

func TestKeyringOfAnotherProcess(t *testing.T) {
	dir := os.Getenv(keyringDir)
	if dir == "" {
		t.Skip("TestKeyring runs it, in a process of its own")
	}
	const joined = keyringDir + "_JOINED"
	if os.Getenv(joined) == "" {
		runtime.LockOSThread()
		if _, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err != nil {
			t.Fatal(err)
		}
		t.Fatal(unix.Exec(os.Args[0], os.Args, append(os.Environ(), joined+"=1"))) // with this thread's session
	}
	r := newRig(t, Keyring{})
	r.config.Dir = dir
	r.mustRestore()
}
