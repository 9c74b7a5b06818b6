package keys

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestCreatedSealKeyLoadsAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seal.key")
	made, err := CreateSealKey(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 || info.Size() != SealKeyBytes {
		t.Errorf("seal key file: mode %v, %d bytes; want -rw-------, %d bytes", info.Mode(), info.Size(), SealKeyBytes)
	}
	loaded, err := LoadSealKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if made.ID() != loaded.ID() || len(made.ID()) != 2*sealKeyIDBytes {
		t.Errorf("made key %s, loaded key %s; want the same", made.ID(), loaded.ID())
	}
	if _, err := CreateSealKey(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("CreateSealKey over an existing file: %v, want ErrExist", err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("%d files are left beside the seal key, want none", len(entries)-1)
	}
}

func TestRacingFirstStartsUseOneSealKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seal.key")
	ids := make([]string, 16)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			key, err := LoadOrCreateSealKey(path)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = key.ID()
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("seal keys %v, want one", ids)
		}
	}
}

func TestSealKeyFileIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		mode fs.FileMode
		size int
		want string
	}{
		{name: "the group can read it", mode: 0o640, size: 32, want: "mode 0640"},
		{name: "others can read it", mode: 0o604, size: 32, want: "chmod 600"},
		{name: "others can write it", mode: 0o602, size: 32, want: "mode 0602"},
		{name: "short", mode: 0o600, size: 31, want: "holds 31 bytes"},
		{name: "hexadecimal", mode: 0o600, size: 64, want: "holds 64 bytes"},
		{name: "empty", mode: 0o600, size: 0, want: "holds 0 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "seal.key")
			if err := os.WriteFile(path, bytes.Repeat([]byte{7}, tt.size), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, tt.mode); err != nil {
				t.Fatal(err)
			}
			if _, err := LoadSealKey(path); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("LoadSealKey = %v, want an error with %q and the path", err, tt.want)
			}
		})
	}
	if _, err := LoadSealKey(t.TempDir()); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("LoadSealKey of a directory = %v", err)
	}
	if _, err := LoadSealKey(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("LoadSealKey of no file = %v, want ErrNotExist", err)
	}
}

func TestSystemdCredential(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	// systemd's own mode for a service with User=: the group bits show its ACL.
	if err := os.WriteFile(filepath.Join(dir, "seal"), bytes.Repeat([]byte{7}, SealKeyBytes), 0o440); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSystemdCredential("seal"); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"", ".", "..", "../seal", "/etc/passwd", "a\x00b"} {
		if _, err := LoadSystemdCredential(name); err == nil || !strings.Contains(err.Error(), "is not a credential name") {
			t.Errorf("LoadSystemdCredential(%q) = %v, want a refusal of the name", name, err)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := LoadSystemdCredential("seal"); err == nil || !strings.Contains(err.Error(), "CREDENTIALS_DIRECTORY is not set") {
		t.Errorf("without the variable: %v", err)
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	secret := []byte("0123456789abcdefFEDCBA9876543210")
	seal, err := newSealKey(secret, "test")
	if err != nil {
		t.Fatal(err)
	}
	key, err := Generate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		if got := fmt.Sprintf(verb, key); got != "[authority key]" {
			t.Errorf("%s of a key prints %q", verb, got)
		}
		if got := fmt.Sprintf(verb, seal); got != "[seal key "+seal.ID()+"]" {
			t.Errorf("%s of a seal key prints %q", verb, got)
		}
	}
	if got := fmt.Sprint((*SealKey)(nil)); got != "[no seal key]" {
		t.Errorf("nil seal key prints %q", got)
	}
}
