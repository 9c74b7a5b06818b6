package svidfiles

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func open(t testing.TB, cfg DirConfig) *Dir {
	t.Helper()
	if cfg.Path == "" {
		cfg.Path = filepath.Join(t.TempDir(), "svid")
	}
	d, err := OpenDir(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func asCaller(path string) DirConfig { return DirConfig{Path: path, Owner: -1, Group: -1} }

// generation is a set whose files all say the same.
func generation(n int) []File {
	text := []byte(strings.Repeat(fmt.Sprintf("generation %d\n", n), 200))
	return []File{{Name: "svid.pem", Data: text}, {Name: "key.pem", Data: text, Secret: true}, {Name: "bundle.pem", Data: text}}
}

// shows returns which generation the directory shows; -1 for none.
func shows(t testing.TB, dir string, names ...string) int {
	t.Helper()
	at := -1
	for i, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		n := -1
		if err == nil {
			if _, err := fmt.Sscanf(string(b), "generation %d", &n); err != nil || !bytes.Equal(b, generation(n)[0].Data) {
				t.Fatalf("%s is not whole: %q", name, b[:min(len(b), 40)])
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if i > 0 && n != at {
			t.Fatalf("%s is of generation %d, and %s of %d", names[0], at, name, n)
		}
		at = n
	}
	return at
}

func TestPublish(t *testing.T) {
	d := open(t, asCaller(""))
	for n := range 5 {
		if err := d.Publish(generation(n)); err != nil {
			t.Fatal(err)
		}
		if got := shows(t, d.cfg.Path, "svid.pem", "key.pem", "bundle.pem"); got != n {
			t.Errorf("generation %d is shown, want %d", got, n)
		}
	}
	for name, want := range map[string]fs.FileMode{"svid.pem": 0o644, "key.pem": 0o600, "bundle.pem": 0o644, ".": 0o700 | fs.ModeDir} {
		if info, err := os.Stat(d.Path(name)); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, want %v (%v)", name, info.Mode(), want, err)
		}
	}
	// What the next set does not have goes; a file that is not ours stays; a plain file with a name of ours is replaced.
	for name, data := range map[string]string{"mine.txt": "mine", "extra.pem": "from before"} {
		if err := os.WriteFile(d.Path(name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Publish([]File{{Name: "extra.pem", Data: generation(9)[0].Data}}); err != nil {
		t.Fatal(err)
	}
	if got := shows(t, d.cfg.Path, "extra.pem"); got != 9 {
		t.Errorf("extra.pem shows %d", got)
	}
	if _, err := os.Lstat(d.Path("svid.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that the set does not have is still there: %v", err)
	}
	if err := d.Remove(); err != nil {
		t.Fatal(err)
	}
	var left []string
	entries, _ := os.ReadDir(d.cfg.Path)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if !slices.Equal(left, []string{lockFile, "mine.txt"}) {
		t.Errorf("after the removal there are %q", left)
	}
}

// TestReadersSeeOneSet reads all the while that sets change. Who opens the set once, as a program that keeps its directory
// open does, sees files of one generation; so does who reads a file.
func TestReadersSeeOneSet(t *testing.T) {
	d := open(t, asCaller(""))
	if err := d.Publish(generation(0)); err != nil {
		t.Fatal(err)
	}
	const sets = 60
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for reads := 0; ; reads++ {
				select {
				case <-done:
					if reads == 0 {
						t.Error("nothing was read meanwhile")
					}
					return
				default:
				}
				root, err := os.OpenRoot(filepath.Join(d.cfg.Path, dataLink))
				if err != nil {
					t.Error(err)
					return
				}
				var texts [][]byte
				for _, name := range []string{"svid.pem", "key.pem"} {
					b, err := root.ReadFile(name)
					if errors.Is(err, fs.ErrNotExist) { // two sets came while this one was open
						texts = nil
						break
					}
					if err != nil {
						t.Error(err)
					}
					texts = append(texts, b)
				}
				root.Close()
				if len(texts) == 2 && !bytes.Equal(texts[0], texts[1]) {
					t.Error("one set has files of two generations")
				}
				if b, err := os.ReadFile(d.Path("svid.pem")); err == nil && len(b) < 2000 {
					t.Errorf("a file of %d bytes is seen", len(b))
				}
			}
		})
	}
	for n := 1; n <= sets; n++ {
		if err := d.Publish(generation(n)); err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	readers.Wait()
}

// TestCrashAtEachStep breaks a publication off at every step: what is shown is the old set or the new one, the next
// publication works, and leaves nothing behind.
func TestCrashAtEachStep(t *testing.T) {
	crash := errors.New("crash")
	for at := 0; ; at++ {
		path := filepath.Join(t.TempDir(), "svid")
		d, err := OpenDir(asCaller(path))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Publish(generation(0)); err != nil {
			t.Fatal(err)
		}
		steps := 0
		d.step = func(string) error {
			if steps++; steps > at {
				return crash
			}
			return nil
		}
		err = d.Publish(generation(1))
		if got := shows(t, path, "svid.pem", "key.pem", "bundle.pem"); got != 0 && got != 1 {
			t.Errorf("after a crash at step %d, %d is shown", at, got)
		}
		d.Close()
		if err == nil {
			if at < 6 {
				t.Errorf("a publication has only %d steps", at)
			}
			return
		}
		if !errors.Is(err, crash) {
			t.Fatal(err)
		}
		d = open(t, asCaller(path))
		if err := d.Publish(generation(2)); err != nil {
			t.Errorf("after a crash at step %d: %v", at, err)
		}
		if got := shows(t, path, "svid.pem", "key.pem", "bundle.pem"); got != 2 {
			t.Errorf("after a crash at step %d, %d is shown, want 2", at, got)
		}
		entries, _ := os.ReadDir(path)
		if len(entries) > 3+1+1+2 { // the files, ..data, the lock, and two sets
			t.Errorf("after a crash at step %d there are %v", at, entries)
		}
	}
}

func TestOpenDirRefuses(t *testing.T) {
	d := open(t, asCaller(""))
	if _, err := OpenDir(asCaller(d.cfg.Path)); err == nil || !strings.Contains(err.Error(), "another process keeps the files") {
		t.Errorf("a second keeper: %v", err)
	}
	wide := filepath.Join(t.TempDir(), "wide")
	if err := os.Mkdir(wide, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(wide, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(asCaller(wide)); err == nil || !strings.Contains(err.Error(), "writable by everybody") {
		t.Errorf("a directory that is writable by everybody: %v", err)
	}
	for _, name := range []string{"", ".x", "..data", "a/b", "a\nb", strings.Repeat("x", 201)} {
		if err := d.Publish([]File{{Name: name}}); err == nil {
			t.Errorf("a file of the name %q is written", name)
		}
	}
	if err := d.Publish([]File{{Name: "a"}, {Name: "a"}}); err == nil {
		t.Error("two files of one name are written")
	}
	// A name that is a link out of the directory is replaced, not followed.
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, d.Path("key.pem")); err != nil {
		t.Fatal(err)
	}
	if err := d.Publish(generation(1)); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(outside); string(b) != "theirs" {
		t.Errorf("a file outside has become %q", b)
	}
}

func TestOwnerAndMode(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, who alone may give files away")
	}
	const owner, group = 4242, 4343
	d := open(t, DirConfig{Owner: owner, Group: group, SecretMode: 0o640})
	if err := d.Publish(generation(1)); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]fs.FileMode{".": 0o750 | fs.ModeDir, "key.pem": 0o640, "svid.pem": 0o644, dataLink: 0o755 | fs.ModeDir} {
		info, err := os.Stat(d.Path(name))
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != owner || st.Gid != group || info.Mode() != mode {
			t.Errorf("%s belongs to %d:%d with mode %v, want %d:%d and %v", name, st.Uid, st.Gid, info.Mode(), owner, group, mode)
		}
	}
}

func TestTokenName(t *testing.T) {
	for audience, want := range map[string]string{
		"reports": "reports.jwt", "https://reports.internal/x": "https___reports.internal_x.jwt", "../../etc/passwd": "_.._etc_passwd.jwt",
		"ä\x00\n": "___.jwt", "...": ".jwt", strings.Repeat("x", 300): strings.Repeat("x", 150) + ".jwt",
	} {
		if got := TokenName(audience); got != want {
			t.Errorf("TokenName(%q) = %q, want %q", audience, got, want)
		}
	}
}
