package sealed

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
)

var update = flag.Bool("update", false, "make testdata/v1 anew; only as long as version 1 has not been released")

// made is when the golden cache was made.
var made = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

const goldenDir = "testdata/v1"

// golden returns the key, head and log of format version 1.
func golden(t testing.TB) (key, head, log []byte) {
	t.Helper()
	read := func(parts ...string) []byte {
		data, err := os.ReadFile(filepath.Join(append([]string{goldenDir}, parts...)...))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	return read(keyFile), read(cacheDir, headFile), read(cacheDir, logPrefix+"1")
}

// TestReadsVersion1 reads what the first version wrote, which every later one must read, too.
func TestReadsVersion1(t *testing.T) {
	r := newRig(t, File{})
	r.config.Now = func() time.Time { return made }
	if *update {
		s, _ := r.open()
		r.fill(s)
		s.Hold("b", 6, true, []byte("second frame"), []byte("secret of b"))
		r.write(s)
		if err := os.CopyFS(goldenDir, os.DirFS(r.config.Dir)); err != nil {
			t.Fatal(err)
		}
	}
	key, head, log := golden(t)
	if err := os.MkdirAll(r.path(""), 0o700); err != nil {
		t.Fatal(err)
	}
	for path, data := range map[string][]byte{filepath.Join(r.config.Dir, keyFile): key, r.path(headFile): head, r.path(logPrefix + "1"): log} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, c := r.mustRestore()
	if !proto.Equal(sorted(c.State), sorted(snapshot(5, "a", "b"))) {
		t.Errorf("the state is %v", c.State)
	}
	slices.SortFunc(c.SVIDs, func(a, b SVID) int { return strings.Compare(a.EntryID, b.EntryID) })
	want := []SVID{{"a", 5, true, []byte("chain of a"), []byte("secret of a")}, {"b", 6, true, []byte("second frame"), []byte("secret of b")}}
	if fmt.Sprint(c.SVIDs) != fmt.Sprint(want) {
		t.Errorf("the SVIDs are %v, want %v", c.SVIDs, want)
	}
	if !c.Contact.Equal(made) || !c.Seen.Equal(made) {
		t.Errorf("contact %s, seen %s, want %s", c.Contact, c.Seen, made)
	}
}
