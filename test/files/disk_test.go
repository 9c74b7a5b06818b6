package files

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestFullDisk fills the disk below a helper: the files of before stay whole, it is said why, and when there is room again
// they follow without anybody's help.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	small := under(t, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=256k,mode=0755"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(small, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s := start(t)
	identity(s, "web", "x509TTL: 6s")
	dir := filepath.Join(small, "svid")
	h := fetch(t, s, "x509", "--write", dir, "--watch", "--combined", "all.pem")
	h.says("spiffe://example.org/web")

	filler := filepath.Join(small, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(block)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	h.says("no space left on device; the files are those of before, and it is tried again")
	before := leaf(t, filepath.Join(dir, "svid.pem"))
	if combined := leaf(t, filepath.Join(dir, "all.pem")); !combined.Equal(before) {
		t.Error("with a full disk, files of two sets are shown")
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the files follow again", func() bool { return !leaf(t, filepath.Join(dir, "svid.pem")).Equal(before) })
	h.stop()
}
