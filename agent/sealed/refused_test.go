package sealed

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// files returns name and contents of the cache's files.
func (r *rig) files() map[string][]byte {
	r.t.Helper()
	out := make(map[string][]byte)
	for _, path := range []string{r.path(headFile), r.logFile()} {
		data, err := os.ReadFile(path)
		if err != nil {
			r.t.Fatal(err)
		}
		out[path] = data
	}
	return out
}

// put writes the cache's files anew and removes what was set aside.
func (r *rig) put(files map[string][]byte) {
	r.t.Helper()
	for _, dir := range r.refused() {
		if err := os.RemoveAll(dir); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := os.MkdirAll(r.path(""), 0o700); err != nil {
		r.t.Fatal(err)
	}
	for path, data := range files {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
	r.log.Reset()
}

func (r *rig) wantRefused(what string) {
	r.t.Helper()
	if _, c := r.open(); c != nil {
		r.t.Errorf("%s: it was used", what)
	} else if len(r.refused()) != 1 {
		r.t.Errorf("%s: %d caches are set aside, want 1; the log says:\n%s", what, len(r.refused()), r.log.String())
	}
	if strings.Contains(r.log.String(), "secret of") {
		r.t.Errorf("%s: a key is in the log", what)
	}
}

// TestTampering flips a bit of every byte, and cuts off at every byte, of both files.
func TestTampering(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	s.Hold("b", 6, true, []byte("more"), []byte("secret of b")) // a second frame
	r.write(s)
	good := r.files()
	for path, data := range good {
		for i := range data {
			flipped := bytes.Clone(data)
			flipped[i] ^= 1 << (i % 8)
			for what, bad := range map[string][]byte{"flipped": flipped, "cut off": data[:i]} {
				files := maps.Clone(good)
				files[path] = bad
				r.put(files)
				r.wantRefused(fmt.Sprintf("%s: byte %d %s", filepath.Base(path), i, what))
			}
		}
	}
	r.put(good)
	r.mustRestore()
	files := map[string][]byte{r.path(headFile): append(bytes.Clone(good[r.path(headFile)]), 0)}
	r.put(good)
	r.put(files)
	r.wantRefused("a byte behind the head")
	r.put(good)
	if err := os.Remove(r.logFile()); err != nil {
		t.Fatal(err)
	}
	r.wantRefused("no log")
	r.put(good)
	if err := os.Chmod(r.path(headFile), 0o644); err != nil {
		t.Fatal(err)
	}
	r.wantRefused("a head that everybody may read")
}

// What a crash left behind the end is of no account, and it is not appended to.
func TestUnfinishedWrite(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	log := r.logFile()
	f, err := os.OpenFile(log, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte{0, 0, 1, 0, 7, 7}); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := os.WriteFile(r.path(logPrefix+"99"), []byte("a log without a head"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, c := r.mustRestore()
	if len(c.SVIDs) != 2 {
		t.Errorf("%d SVIDs", len(c.SVIDs))
	}
	s.Hold("a", 7, true, []byte("x"), []byte("y"))
	r.write(s)
	if next := r.logFile(); next == log {
		t.Error("the log of a run before was appended to")
	}
	if _, c = r.mustRestore(); len(c.SVIDs) != 2 {
		t.Errorf("%d SVIDs", len(c.SVIDs))
	}
}

// No two frames or heads have the same key and nonce: salts never come back, whatever is written.
func TestSaltsAreFresh(t *testing.T) {
	r := newRig(t, File{})
	seen := make(map[string]string)
	note := func(what string, salt []byte) {
		if before, ok := seen[string(salt)]; ok {
			t.Errorf("%s has the salt of %s", what, before)
		}
		seen[string(salt)] = what
	}
	for run := range 4 {
		s, _ := r.open()
		s.Applied(snapshot(int64(run+1), "a"))
		s.InContact(true)
		r.write(s)
		log, err := os.ReadFile(r.logFile())
		if err != nil {
			t.Fatal(err)
		}
		note(fmt.Sprintf("log %d", run), log[len(logMagic)+2:logHeaderBytes])
		for i := range 3 {
			s.Hold("a", int64(i), true, []byte("c"), []byte{byte(i)})
			r.write(s)
			head, err := os.ReadFile(r.path(headFile))
			if err != nil {
				t.Fatal(err)
			}
			note(fmt.Sprintf("head %d of run %d", i, run), head[len(head)-16-headPlainBytes-saltBytes:len(head)-16-headPlainBytes])
		}
		s.closeLog()
	}
}

func TestRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(r *rig, s *Store)
		want   string // in the log
	}{
		{"another agent", func(r *rig, _ *Store) {
			r.config.Agent = spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/n2")
		}, "it is of the agent"},
		{"another trust domain", func(r *rig, _ *Store) {
			r.config.TrustDomain = spiffeid.RequireTrustDomainFromString("example.com")
			r.config.Agent = spiffeid.RequireFromString("spiffe://example.com/spire/agent/join_token/n1")
		}, "it is of trust domain"},
		{"another key", func(r *rig, _ *Store) {
			if err := os.WriteFile(filepath.Join(r.config.Dir, keyFile), bytes.Repeat([]byte{7}, secretBytes), 0o600); err != nil {
				r.t.Fatal(err)
			}
		}, "another key"},
		{"another kind of key", func(r *rig, _ *Store) { r.config.Key = otherKind{File{}} }, "sealed with a key of kind"},
		{"a newer head", func(r *rig, _ *Store) { r.setVersion(r.path(headFile), len(headMagic)) }, "it has a newer format: 2"},
		{"a newer log", func(r *rig, _ *Store) { r.setVersion(r.logFile(), len(logMagic)) }, "it has a newer format: 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, File{})
			s, _ := r.open()
			r.fill(s)
			tt.change(r, s)
			before := r.files()
			r.wantRefused(tt.name)
			if !strings.Contains(r.log.String(), tt.want) {
				t.Errorf("the log says %q, want %q", r.log.String(), tt.want)
			}
			for path, data := range before { // for an operator, or the program that can read it
				kept, err := os.ReadFile(filepath.Join(r.refused()[0], filepath.Base(path)))
				if err != nil || !bytes.Equal(kept, data) {
					t.Errorf("%s was changed: %v", path, err)
				}
			}
		})
	}
}

type otherKind struct{ File }

func (otherKind) kind() string { return "other" }

func (r *rig) setVersion(path string, at int) {
	r.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	binary.BigEndian.PutUint16(data[at:], Version+1)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// Without its key a cache is nothing; one is made anew.
func TestKeyIsGone(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	if err := os.Remove(filepath.Join(r.config.Dir, keyFile)); err != nil {
		t.Fatal(err)
	}
	s, c := r.open()
	if c != nil || len(r.refused()) != 0 {
		t.Errorf("found %v, %d set aside; want neither", c, len(r.refused()))
	}
	r.fill(s)
	r.mustRestore()
}

func TestKeyThatOthersMayRead(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	if err := os.Chmod(filepath.Join(r.config.Dir, keyFile), 0o640); err != nil {
		t.Fatal(err)
	}
	s, c := r.open()
	if c != nil || s.Status().Err == nil || !strings.Contains(s.Status().Err.Error(), "chmod") {
		t.Errorf("found %v, status %v; want the fix", c, s.Status().Err)
	}
	if err := os.Chmod(filepath.Join(r.config.Dir, keyFile), 0o600); err != nil {
		t.Fatal(err)
	}
	r.mustRestore()
}

func TestSetAsideIsBounded(t *testing.T) {
	r := newRig(t, File{})
	for range 2 * maxAside {
		s, _ := r.open()
		r.fill(s)
		s.closeLog()
		r.setVersion(r.path(headFile), len(headMagic))
	}
	if _, c := r.open(); c != nil {
		t.Fatal("it was used")
	}
	if n := len(r.refused()); n != maxAside {
		t.Errorf("%d caches are set aside, want %d", n, maxAside)
	}
}
