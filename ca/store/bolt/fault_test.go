package bolt_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bbolt "go.etcd.io/bbolt"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/durable/faulttest"
)

const fileName = "store.db"

// made makes a store with n items and returns its directory and its file's contents.
func made(t testing.TB, n int) (dir string, data []byte) {
	t.Helper()
	dir = t.TempDir()
	s, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if _, err := s.Commit(t.Context(), nil, []store.Write{{Key: fmt.Sprintf("key/%d", i), Value: []byte(strings.Repeat("v", i*17%900))}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err = os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	return dir, data
}

// contents returns all that a store holds, as one string.
func contents(t testing.TB, s store.Store) string {
	t.Helper()
	var b strings.Builder
	rev, err := s.List(t.Context(), "", 0, func(it store.Item) error {
		fmt.Fprintf(&b, "%q=%q %d %d\n", it.Key, it.Value, it.Created, it.Modified)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(&b, rev)
	return b.String()
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	if faulttest.Child() != "" {
		dir = faulttest.Child()
	}
	s, err := bolt.Open(bolt.Config{Dir: dir, LockTimeout: -1})
	if faulttest.Child() != "" {
		if !errors.Is(err, bolt.ErrLocked) || !strings.Contains(err.Error(), "is another CA running on this data directory?") || !strings.Contains(err.Error(), fmt.Sprintf("by process %d", os.Getppid())) {
			t.Errorf("Open from another process = %v, want ErrLocked with a hint and the process", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bolt.Open(bolt.Config{Dir: dir, LockTimeout: 50 * time.Millisecond}); !errors.Is(err, bolt.ErrLocked) {
		t.Errorf("Open from the same process = %v, want ErrLocked", err)
	}
	if out, err := faulttest.Command(t, dir).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err = bolt.Open(bolt.Config{Dir: dir, LockTimeout: -1})
	if err != nil {
		t.Fatalf("Open after Close = %v", err)
	}
	s.Close()
}

func TestNewerFormatIsRefusedUntouched(t *testing.T) {
	dir, _ := made(t, 3)
	path := filepath.Join(dir, fileName)
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		// A newer version may have changed everything else.
		return errors.Join(tx.Bucket([]byte("meta")).Put([]byte("format"), []byte("2")), tx.Bucket([]byte("meta")).Delete([]byte("state")), tx.DeleteBucket([]byte("items")))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bolt.Open(bolt.Config{Dir: dir}); !errors.Is(err, bolt.ErrNewerFormat) || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("Open = %v, want ErrNewerFormat", err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Error("the file was changed")
	}
}

// TestGoldenFile opens a file that was written when format 1 was new. It must be readable for ever.
func TestGoldenFile(t *testing.T) {
	golden, err := os.ReadFile("testdata/format1.db")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, fileName), golden, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := bolt.Open(bolt.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const want = `"agent/a"="banned" 2 3
"entry/1"="" 2 2
"entry/2"="\x00\xff" 4 4
4`
	if got := contents(t, s); got != want || s.Epoch() != "5VMQ64DP2GA23TD4PNL3PUJA2T" {
		t.Errorf("epoch %s holds\n%s\nwant\n%s", s.Epoch(), got, want)
	}
}

func TestCutOffFilesAreRefused(t *testing.T) {
	_, data := made(t, 200)
	for _, size := range []int{0, 1, 4095, 4096, 8191, 8192, 16384, 16385, 20000} {
		dir := t.TempDir()
		path := filepath.Join(dir, fileName)
		if err := os.WriteFile(path, data[:size], 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := bolt.Open(bolt.Config{Dir: dir})
		if !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), path) {
			t.Errorf("Open of the first %d bytes = %v, want ErrCorrupt and the path", size, err)
		}
		if now, err := os.ReadFile(path); err != nil || len(now) != size {
			t.Errorf("the file of %d bytes was changed to %d, %v", size, len(now), err)
		}
	}
}

func TestUnfinishedFirstStartIsForgotten(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "store.db.new"), []byte("half a page"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := bolt.Open(bolt.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := os.Stat(filepath.Join(dir, "store.db.new")); err == nil {
		t.Error("the unfinished file is still there")
	}
	info, err := os.Stat(filepath.Join(dir, fileName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
}

// TestDamageWhileOpenStopsTheStore changes a value on the disk under the running store.
func TestDamageWhileOpenStopsTheStore(t *testing.T) {
	dir := t.TempDir()
	s, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 1, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const mark = "this value will be damaged"
	for _, key := range []string{"a", "b"} {
		if _, err := s.Commit(t.Context(), nil, []store.Write{{Key: key, Value: []byte(mark)}}); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, fileName)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := strings.Index(string(data), mark); at >= 0; {
		if _, err := f.WriteAt([]byte{'T'}, int64(at)); err != nil {
			t.Fatal(err)
		}
		i := strings.Index(string(data[at+1:]), mark)
		if i < 0 {
			break
		}
		at += 1 + i
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), path) {
		t.Errorf("Get = %v, want ErrCorrupt and the path", err)
	}
	if _, err := s.Commit(t.Context(), nil, []store.Write{{Key: "c"}}); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Commit afterwards = %v, want ErrCorrupt", err)
	}
	if err := s.Health(); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Health = %v, want ErrCorrupt", err)
	}
}

// FuzzDamage changes bytes of a good file: either Open refuses it, or the store holds what it held.
func FuzzDamage(f *testing.F) {
	_, data := made(f, 120)
	var want string
	{
		dir := f.TempDir()
		if err := os.WriteFile(filepath.Join(dir, fileName), data, 0o600); err != nil {
			f.Fatal(err)
		}
		s, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 1})
		if err != nil {
			f.Fatal(err)
		}
		want = contents(f, s)
		s.Close()
	}
	used := 0
	for i, b := range data {
		if b != 0 {
			used = i
		}
	}
	for at := 0; at < used; at += 1499 {
		f.Add(uint32(at), byte(1), uint32(at/2), byte(0x80))
	}
	for page := 0; page < used; page = max(page*2, page+4096) {
		for at := 0; at < 80; at += 8 { // header, meta page, first elements
			f.Add(uint32(page+at), byte(3), uint32(0), byte(0))
		}
	}
	f.Fuzz(func(t *testing.T, at uint32, with byte, at2 uint32, with2 byte) {
		damaged := append([]byte{}, data...)
		damaged[int(at)%(used+1)] ^= with
		damaged[int(at2)%(used+1)] ^= with2
		dir := t.TempDir()
		path := filepath.Join(dir, fileName)
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 1})
		if err != nil {
			if !errors.Is(err, store.ErrCorrupt) && !errors.Is(err, bolt.ErrNewerFormat) {
				t.Errorf("Open = %v, want ErrCorrupt", err)
			}
			if now, err := os.ReadFile(path); err != nil || string(now) != string(damaged) {
				t.Error("a file that was refused was changed")
			}
			return
		}
		defer s.Close()
		if got := contents(t, s); got != want {
			t.Errorf("the damaged file was opened and holds\n%s\nwant\n%s", got, want)
		}
		if _, err := s.Commit(t.Context(), nil, []store.Write{{Key: "new", Value: make([]byte, 5000)}}); err != nil {
			t.Errorf("Commit = %v", err)
		}
	})
}

// TestFailedSyncStopsTheStore has the kernel refuse to sync, in a child process.
func TestFailedSyncStopsTheStore(t *testing.T) {
	if dir := faulttest.Child(); dir != "" {
		s, err := bolt.Open(bolt.Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		start, err := s.Barrier(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Watch(t.Context(), start)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if _, err := s.Commit(t.Context(), nil, []store.Write{{Key: "before"}}); err != nil {
			t.Fatal(err)
		}
		faulttest.FailSync(t)
		for range 2 {
			if _, err := s.Commit(t.Context(), nil, []store.Write{{Key: "a"}, {Key: "b"}}); !errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrDiskFull) {
				t.Errorf("Commit = %v, want ErrUnavailable", err)
			}
		}
		_, getErr := s.Get(t.Context(), "before")
		_, barrierErr := s.Barrier(t.Context())
		for name, err := range map[string]error{"Get": getErr, "Barrier": barrierErr, "Health": s.Health()} {
			if !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("%s afterwards = %v, want ErrUnavailable", name, err)
			}
		}
		if b, err := w.Next(t.Context()); err != nil || len(b.Events) != 1 || b.Events[0].Key != "before" {
			t.Errorf("the watch has %v, %v; want what was committed before", b, err)
		}
		if b, err := w.Next(t.Context()); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("the watch goes on with %v, %v; want ErrUnavailable", b, err)
		}
		return
	}
	dir := t.TempDir()
	out, err := faulttest.Command(t, dir).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) || err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s := open(t, dir)
	defer s.Close()
	if _, err := s.Get(t.Context(), "before"); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	_, aErr := s.Get(t.Context(), "a")
	_, bErr := s.Get(t.Context(), "b")
	if (aErr == nil) != (bErr == nil) {
		t.Errorf("after a restart half of a commit is there: %v, %v", aErr, bErr)
	}
}

// TestCommitWhoseContextEnds: the answer is the context's, and the store is whole either way.
func TestCommitWhoseContextEnds(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	for i := range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		value := []byte(fmt.Sprint(i))
		go cancel()
		_, err := s.Commit(ctx, nil, []store.Write{{Key: "a", Value: value}, {Key: "b", Value: value}})
		clear(value) // the caller may use its memory again at once
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatalf("Commit = %v", err)
		}
		cancel()
	}
	// One whose answer nobody waited for may still be under way; this comes after it.
	if _, err := s.Commit(t.Context(), nil, []store.Write{{Key: "c", Value: []byte("last")}}); err != nil {
		t.Fatal(err)
	}
	a, aErr := s.Get(t.Context(), "a")
	b, bErr := s.Get(t.Context(), "b")
	if string(a.Value) != string(b.Value) || a.Modified != b.Modified || strings.Contains(string(a.Value), "\x00") {
		t.Errorf("a is %q of %d (%v), b is %q of %d (%v)", a.Value, a.Modified, aErr, b.Value, b.Modified, bErr)
	}
}
