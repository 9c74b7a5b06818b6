package resources

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "write the definitions anew")

const published = "../../../deploy/helm/signet/files/crds"

// The definitions that the chart installs are those that the code makes.
func TestDefinitions(t *testing.T) {
	files, err := Definitions()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.MkdirAll(published, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range files {
		path := filepath.Join(published, name)
		if *update {
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the code makes (%v); run make docs", path, err)
		}
	}
	have, err := os.ReadDir(published)
	if err != nil {
		t.Fatal(err)
	}
	if len(have) != len(files) {
		t.Errorf("%s has %d files, want the %d definitions", published, len(have), len(files))
	}
}
