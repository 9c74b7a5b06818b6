package keys

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPINFile(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		name, content string
		mode          fs.FileMode
		want, wantErr string
	}{
		{name: "a line", content: "4711-pin\r\n", mode: 0o600, want: "4711-pin"},
		{name: "read-only", content: "4711-pin", mode: 0o400, want: "4711-pin"},
		{name: "spaces before belong to it", content: " 4711-pin", mode: 0o600, want: " 4711-pin"},
		{name: "the group can read it", content: "4711-pin", mode: 0o640, wantErr: "chmod 600"},
		{name: "others can read it", content: "4711-pin", mode: 0o604, wantErr: "mode 0604"},
		{name: "empty", content: "\n", mode: 0o600, wantErr: "1 to 256"},
		{name: "long", content: strings.Repeat("4711-pin", 50), mode: 0o600, wantErr: "more than 256"},
	} {
		path := filepath.Join(dir, tt.name)
		if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		pin, err := readPIN(path)
		if (err != nil) != (tt.wantErr != "") || pin.value != tt.want || err != nil && (!strings.Contains(err.Error(), tt.wantErr) || strings.Contains(err.Error(), "4711")) {
			t.Errorf("%s: readPIN = %q, %v; want %q, error with %q", tt.name, pin.value, err, tt.want, tt.wantErr)
		}
		if got := fmt.Sprintf("%v %+v %s %q", pin, pin, pin, pin); strings.Contains(got, "4711") {
			t.Errorf("%s: a PIN prints as %q", tt.name, got)
		}
	}
	if _, err := readPIN(dir); err == nil || !strings.Contains(err.Error(), "regular file") {
		t.Errorf("readPIN of a directory = %v", err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if pin, err := readPIN(filepath.Join(dir, "the group can read it")); err != nil || pin.value != "4711-pin" {
		t.Errorf("readPIN of a systemd credential = %v", err)
	}
}
