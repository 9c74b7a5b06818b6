package durable_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/internal/durable"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWriteFileReplacesWholeAndWithItsPermissions(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	dir := t.TempDir()
	path := filepath.Join(dir, "bundle.pem")
	for _, perm := range []fs.FileMode{0o600, 0o644, 0o640} {
		want := []byte(strings.Repeat("x", int(perm)))
		if err := durable.WriteFile(path, want, perm); err != nil {
			t.Fatal(err)
		}
		got, err := durable.ReadFile(path, 1<<20)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("ReadFile = %d bytes, %v; want %d", len(got), err, len(want))
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != perm {
			t.Errorf("mode %v, %v; want %v although the umask is 077", info.Mode(), err, perm)
		}
	}
	wantNames(t, dir, "bundle.pem")
}

func TestWriteFileConcurrentlyLeavesOneWholeFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			data := bytes.Repeat([]byte{byte('a' + i)}, 10_000+i)
			for range 20 {
				if err := durable.WriteFile(path, data, 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			got, err := durable.ReadFile(path, 1<<20)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil || len(got) < 10_000 || len(got) != 10_000+int(got[0]-'a') || bytes.Count(got, got[:1]) != len(got) {
				t.Errorf("read %d bytes, %v: a mixture or a part", len(got), err)
				return
			}
		}
	})
	wg.Wait()
	close(stop)
	reader.Wait()
	wantNames(t, dir, "state")
}

func TestWriteFileFailureLeavesTheOldFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "taken")
	if err := os.Mkdir(path, 0o700); err != nil { // a rename onto a directory fails
		t.Fatal(err)
	}
	if err := durable.WriteFile(path, []byte("secret"), 0o600); err == nil || strings.Contains(err.Error(), "secret") {
		t.Fatalf("WriteFile onto a directory = %v, want an error without the contents", err)
	}
	wantNames(t, dir, "taken")
	for _, bad := range []string{"", dir + "/", filepath.Join(dir, "none", "file")} {
		if err := durable.WriteFile(bad, nil, 0o600); err == nil {
			t.Errorf("WriteFile(%q) succeeded", bad)
		}
	}
}

func TestWriteNewHasOneWinner(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			err := durable.WriteNew(path, fmt.Appendf(nil, "%d", i), 0o600)
			switch {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, fs.ErrExist):
				t.Errorf("WriteNew = %v, want fs.ErrExist", err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d calls succeeded, want 1", won.Load())
	}
	wantNames(t, dir, "key")
}

func TestReadFileRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := durable.WriteFile(path, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := durable.ReadFile(path, 99); !errors.Is(err, durable.ErrTooLarge) {
		t.Errorf("100 bytes with a limit of 99: %v, want ErrTooLarge", err)
	}
	if data, err := durable.ReadFile(path, 100); err != nil || len(data) != 100 {
		t.Errorf("100 bytes with a limit of 100: %d, %v", len(data), err)
	}
	if _, err := durable.ReadFile("/dev/zero", 100); err == nil {
		t.Error("a device was read")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := durable.ReadFile(fifo, 100); err == nil {
		t.Error("a pipe was read")
	}
	if _, err := durable.ReadFile(dir, 100); err == nil {
		t.Error("a directory was read")
	}
}

func TestReadSecretWantsAPrivateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	for _, tt := range []struct {
		perm    fs.FileMode
		exposed bool
	}{{0o600, false}, {0o400, false}, {0o640, true}, {0o604, true}, {0o620, true}, {0o644, true}} {
		if err := durable.WriteFile(path, []byte("k"), tt.perm); err != nil {
			t.Fatal(err)
		}
		_, err := durable.ReadSecret(path, 10)
		if errors.Is(err, durable.ErrExposed) != tt.exposed {
			t.Errorf("mode %#o: %v, want ErrExposed %t", tt.perm, err, tt.exposed)
		}
	}
	if os.Geteuid() != 0 {
		t.Log("not root: the check of the owner is not exercised")
		return
	}
	if err := durable.WriteFile(path, []byte("k"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 12345, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := durable.ReadSecret(path, 10); !errors.Is(err, durable.ErrExposed) {
		t.Errorf("a file of another user: %v, want ErrExposed", err)
	}
}

// What Kubernetes mounts of a Secret is root's, behind a symbolic link, and its group may read it.
func TestReadMountedSecret(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make files of root's and of others")
	}
	dir := t.TempDir()
	path, link := filepath.Join(dir, "data"), filepath.Join(dir, "tls.key")
	if err := os.Symlink("data", link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		uid     int
		perm    fs.FileMode
		exposed bool
	}{{0, 0o600, false}, {0, 0o440, false}, {0, 0o640, false}, {0, 0o660, true}, {0, 0o444, true}, {0, 0o641, true}, {12345, 0o440, true}, {12345, 0o600, true}} {
		if err := durable.WriteFile(path, []byte("k"), tt.perm); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, tt.uid, 12345); err != nil {
			t.Fatal(err)
		}
		data, err := durable.ReadMountedSecret(link, 10)
		if errors.Is(err, durable.ErrExposed) != tt.exposed || (err == nil) == tt.exposed || err == nil && string(data) != "k" {
			t.Errorf("uid %d, mode %#o: %q, %v; want ErrExposed %t", tt.uid, tt.perm, data, err, tt.exposed)
		}
	}
}

func TestDirectories(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a", "b")
	if err := durable.MkdirPrivate(deep); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirPrivate(deep); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if err := os.Chmod(deep, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirPrivate(deep); !errors.Is(err, durable.ErrExposed) {
		t.Errorf("MkdirPrivate of a 0750 directory = %v, want ErrExposed", err)
	}
	file := filepath.Join(dir, "file")
	if err := durable.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirAll(filepath.Join(file, "x"), 0o755); err == nil {
		t.Error("a directory was made below a file")
	}
	for range 2 {
		if err := durable.Remove(file); err != nil {
			t.Error(err)
		}
	}
}

func TestCleanTempRemovesOnlyWhatACrashLeft(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".key.durable-ABCDEFGHIJKLMNOPQRSTUVWXYZ", ".key.durable-short", "key.durable-ABCDEFGHIJKLMNOPQRSTUVWXYZ", "key"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := durable.CleanTemp(dir); err != nil {
		t.Fatal(err)
	}
	wantNames(t, dir, ".key.durable-short", "key", "key.durable-ABCDEFGHIJKLMNOPQRSTUVWXYZ")
}

func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("directory holds %q, want %q", got, want)
	}
}
