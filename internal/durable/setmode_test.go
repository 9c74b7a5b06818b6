package durable

import (
	"os"
	"path/filepath"
	"testing"
)

// TestSetModeFollowsNoLink: between the making of a directory and the setting of its mode, who owns the directory above may
// have put a link in its place. What the link leads to keeps its mode.
func TestSetModeFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	secret, folder := filepath.Join(dir, "secret"), filepath.Join(dir, "folder")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{secret, folder} {
		link := target + "-link"
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
		before, err := os.Stat(target)
		if err != nil {
			t.Fatal(err)
		}
		if err := setMode(link, 0o755); err == nil {
			t.Errorf("%s: a link was taken for the directory", target)
		}
		if after, err := os.Stat(target); err != nil || after.Mode() != before.Mode() {
			t.Errorf("%s has the mode %v now, and had %v (%v)", target, after.Mode(), before.Mode(), err)
		}
	}
	if err := setMode(secret, 0o755); err == nil {
		t.Error("a file was taken for the directory")
	}
	if err := setMode(folder, 0o750); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(folder); err != nil || after.Mode().Perm() != 0o750 {
		t.Errorf("the directory has the mode %v (%v)", after.Mode(), err)
	}
}
