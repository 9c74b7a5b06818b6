package auditlog

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func blocks(t testing.TB, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// written makes a log of n records in one file and returns its directory and that file's path and contents.
func written(t *testing.T, n int) (dir, path string, data []byte) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "audit")
	l := openLog(t, Config{Dir: dir})
	for i := range n {
		appendAll(t, l, Record{Event: "e", Subject: fmt.Sprint(i)})
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, fileName(1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return dir, path, data
}

// TestEveryCutIsRecovered cuts the file at every byte, as a crash may, and wants all whole records back, the rest set
// aside, and a log that goes on.
func TestEveryCutIsRecovered(t *testing.T) {
	_, _, data := written(t, 3)
	for cut := range data {
		dir := filepath.Join(t.TempDir(), "audit")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, fileName(1))
		if err := os.WriteFile(path, data[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l := openLog(t, Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
		whole := max(bytes.Count(data[:cut], []byte{'\n'})-1, 0)
		if n := checkLog(t, l); n != uint64(whole) {
			t.Fatalf("cut at %d: %d records, want %d", cut, n, whole)
		}
		appendAll(t, l, Record{Event: "after"})
		if n := checkLog(t, l); n != uint64(whole)+1 {
			t.Fatalf("cut at %d: %d records after one more, want %d", cut, n, whole+1)
		}
		lineStart := bytes.LastIndexByte(data[:cut], '\n') + 1
		torn, err := os.ReadFile(path + tornSuffix)
		if lineStart < cut && (err != nil || !bytes.Equal(torn, data[lineStart:cut])) {
			t.Fatalf("cut at %d: set aside %q, %v; want %q", cut, torn, err, data[lineStart:cut])
		}
		if lineStart == cut && err == nil {
			t.Fatalf("cut at %d between lines: set aside %q", cut, torn)
		}
		l.Close()
	}
}

func TestUnwrittenBlocksAtTheEndAreSetAside(t *testing.T) {
	dir, path, data := written(t, 3)
	zeros := append(bytes.Clone(data), make([]byte, 5000)...)
	if err := os.WriteFile(path, zeros, 0o600); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, Config{Dir: dir})
	if n := checkLog(t, l); n != 3 {
		t.Errorf("%d records, want 3", n)
	}
}

// A crash leaves at most one group unfinished. Where more is missing, acknowledged records are, and nothing is cut off.
func TestDamageAtTheEndBeyondOneGroupIsKept(t *testing.T) {
	dir, path, data := written(t, 3)
	size := int64(len(data)) + maxTorn + 1
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	appendAll(t, l, Record{Event: "after"})
	if c := l.Checkpoint(); c.Seq != 4 {
		t.Errorf("the record appended has the number %d, want 4", c.Seq)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != size {
		t.Errorf("the damaged file has %d bytes, %v; want %d", info.Size(), err, size)
	}
	if _, err := l.Verify(t.Context()); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "audit-00000001") {
		t.Errorf("Verify = %v, want the damaged file named", err)
	}
}

func TestDamageInTheMiddleIsKeptAndReported(t *testing.T) {
	dir, path, data := written(t, 5)
	lines := bytes.SplitAfter(data, []byte{'\n'})
	lines[2] = append(bytes.Repeat([]byte{0}, len(lines[2])-1), '\n')
	damaged := bytes.Join(lines, nil)
	if err := os.WriteFile(path, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, Config{Dir: dir})
	appendAll(t, l, Record{Event: "after"})
	var seqs []uint64
	err := l.Search(t.Context(), Filter{}, func(r Record) error { seqs = append(seqs, r.Seq); return nil })
	if fmt.Sprint(seqs) != "[1 3 4 5 6]" || !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "audit-00000001") {
		t.Errorf("Search = %v, %v; want all but 2 and an error that names the file", seqs, err)
	}
	if _, err := l.Verify(t.Context()); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "line 3") {
		t.Errorf("Verify = %v, want line 3 named", err)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, damaged) {
		t.Errorf("the damaged file was changed: %v", err)
	}
}

func TestVerifyFindsEveryChangedByte(t *testing.T) {
	dir, path, data := written(t, 4)
	first := bytes.IndexByte(data, '\n') + 1
	good, err := Verify(t.Context(), dir)
	if err != nil || good.Seq != 4 {
		t.Fatalf("Verify = %v, %v", good, err)
	}
	for i := first; i < len(data); i++ {
		changed := bytes.Clone(data)
		changed[i] ^= 1
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Verify(t.Context(), dir, good); err == nil {
			t.Fatalf("byte %d changed from %q to %q, and Verify says nothing", i, data[i], changed[i])
		}
	}
	// A log that ends before the checkpoint has lost records.
	if err := os.WriteFile(path, data[:bytes.LastIndexByte(data[:len(data)-1], '\n')+1], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), dir, good); err == nil {
		t.Error("the last record was removed, and Verify says nothing")
	}
}

func TestNewerVersionIsRefusedUntouched(t *testing.T) {
	_, path, data := written(t, 2)
	for name, text := range map[string]string{
		"header": strings.Replace(string(data), `{"v":1,"audit"`, `{"v":2,"audit"`, 1),
		"record": string(data) + `{"v":2,"seq":3,"what":"is this"}` + "\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Dir: filepath.Dir(path)}); !errors.Is(err, ErrNewerFormat) {
			t.Errorf("%s: Open = %v, want ErrNewerFormat", name, err)
		}
		if now, err := os.ReadFile(path); err != nil || string(now) != text {
			t.Errorf("%s: the file was changed", name)
		}
	}
}
