package keys

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func keyPEM(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func TestKeyFile(t *testing.T) {
	dir, text := t.TempDir(), keyPEM(t)
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		content []byte
		mode    fs.FileMode
		wantErr string
	}{
		{name: "a key", content: text, mode: 0o600},
		{name: "read-only", content: text, mode: 0o400},
		{name: "the group can read it", content: text, mode: 0o640, wantErr: "chmod 600"},
		{name: "others can read it", content: text, mode: 0o604, wantErr: "mode 0604"},
		{name: "empty", mode: 0o600, wantErr: "holds no PEM private key"},
		{name: "a certificate", content: bytes.ReplaceAll(text, []byte("PRIVATE KEY"), []byte("CERTIFICATE")), mode: 0o600, wantErr: "holds no PEM private key"},
		{name: "malformed", content: []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), mode: 0o600, wantErr: "malformed"},
		{name: "encrypted", content: []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"), mode: 0o600, wantErr: "encrypted"},
		{name: "long", content: append(bytes.Repeat([]byte("\n"), maxKeyFileBytes), text...), mode: 0o600, wantErr: "more than 65536"},
		{name: "pipe", wantErr: "regular file"},
	} {
		path := filepath.Join(dir, tt.name)
		if path != pipe {
			if err := os.WriteFile(path, tt.content, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, tt.mode); err != nil {
				t.Fatal(err)
			}
		}
		key, err := LoadKeyFile(path)
		if (err != nil) != (tt.wantErr != "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
			t.Errorf("%s: LoadKeyFile = %v, want an error with %q", tt.name, err, tt.wantErr)
		}
		if err != nil {
			continue
		}
		digest := sha256.Sum256([]byte("x"))
		if signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil || !verify(key.Public(), digest[:], signature, crypto.SHA256) {
			t.Errorf("%s: it does not sign: %v", tt.name, err)
		}
		if printed := fmt.Sprintf("%v %+v %#v", key, key, key); printed != "[authority key] [authority key] [authority key]" {
			t.Errorf("%s: it prints as %q", tt.name, printed)
		}
	}
	if _, err := LoadKeyFile(filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a missing file: %v", err)
	}
}

// FuzzParseKey holds that a key file never makes an error that repeats it.
func FuzzParseKey(f *testing.F) {
	text := keyPEM(f)
	f.Add(text)
	f.Add(bytes.ReplaceAll(text, []byte("PRIVATE KEY"), []byte("EC PRIVATE KEY")))
	f.Add([]byte("-----BEGIN EC PARAMETERS-----\n-----END EC PARAMETERS-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		key, err := parseKey(bytes.Clone(text))
		if (key == nil) == (err == nil) {
			t.Fatalf("%v, %v", key, err)
		}
		if err != nil && len(err.Error()) > 120 {
			t.Errorf("the error says too much: %v", err)
		}
	})
}
