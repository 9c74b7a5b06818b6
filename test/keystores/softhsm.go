// Package keystores starts real key stores for tests: a SoftHSM token and a software TPM. It is for tests only. What they
// need is in Debian's packages softhsm2, swtpm and swtpm-tools, which make test installs.
package keystores

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A Token is a SoftHSM token in a directory of its own.
type Token struct {
	// URI names the token, its module and the file with its PIN.
	URI string
	// PIN is what the file PINFile holds.
	PIN, PINFile string
	// Module is the path of the PKCS #11 module.
	Module string
	// Config is the value of SOFTHSM2_CONF, which this process has and children inherit.
	Config string

	dir string
}

// modules are where Debian and others install SoftHSM's module.
var modules = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/lib64/softhsm/libsofthsm2.so",
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",
}

// SoftHSM makes a token. It sets SOFTHSM2_CONF for the duration of the test, so two tests of one process cannot have one at
// the same time.
func SoftHSM(t testing.TB) *Token {
	t.Helper()
	util := program(t, "softhsm2-util", "softhsm2")
	k := &Token{PIN: "a-pin-for-tests-4711", dir: t.TempDir()}
	for _, m := range modules {
		if _, err := os.Stat(m); err == nil {
			k.Module = m
			break
		}
	}
	if k.Module == "" {
		t.Fatalf("softhsm2-util is there, but none of %q is", modules)
	}
	k.PINFile, k.Config = filepath.Join(k.dir, "pin"), filepath.Join(k.dir, "softhsm2.conf")
	tokens := filepath.Join(k.dir, "tokens")
	write(t, k.PINFile, k.PIN+"\n")
	write(t, k.Config, fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", tokens))
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", k.Config)
	out, err := exec.Command(util, "--init-token", "--free", "--label", "signet", "--so-pin", "an-so-pin", "--pin", k.PIN).CombinedOutput()
	if err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
	k.URI = fmt.Sprintf("pkcs11:module-path=%s;token=signet?pin-source=%s", k.Module, k.PINFile)
	return k
}

// Objects returns how many objects the token holds: two for a key pair.
func (k *Token) Objects(t testing.TB) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(k.dir, "tokens", "*", "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		if filepath.Base(f) != "token.object" {
			n++
		}
	}
	return n
}

// Unplug takes the token away, until Plug.
func (k *Token) Unplug(t testing.TB) { k.move(t, "tokens", "unplugged") }

// Plug puts it back.
func (k *Token) Plug(t testing.TB) { k.move(t, "unplugged", "tokens") }

func (k *Token) move(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(filepath.Join(k.dir, from), filepath.Join(k.dir, to)); err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// program finds a program that tests need; without it they fail, since a test that does not run shows nothing.
func program(t testing.TB, name, debian string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: run tools/need.sh %s=%s (make test does)", name, name, debian)
	}
	return path
}

// WrappingKey makes an RSA key in the token, as an operator does who wants it to wrap the seal key, and returns its URI.
func (k *Token) WrappingKey(t testing.TB, label string) string {
	t.Helper()
	return k.generate(t, label, "RSA:2048", "--usage-decrypt")
}

// SigningKey makes an EC key in the token, as an operator does who keeps a CA's key there, and returns its URI.
func (k *Token) SigningKey(t testing.TB, label string) string {
	t.Helper()
	return k.generate(t, label, "EC:prime256v1", "--usage-sign")
}

func (k *Token) generate(t testing.TB, label, kind, usage string) string {
	t.Helper()
	tool := program(t, "pkcs11-tool", "opensc")
	cmd := exec.Command(tool, "--module", k.Module, "--token-label", "signet", "--login", "--pin", "env:SIGNET_TEST_PIN",
		"--keypairgen", "--key-type", kind, usage, "--label", label, "--id", fmt.Sprintf("%x", label))
	cmd.Env = append(os.Environ(), "SIGNET_TEST_PIN="+k.PIN)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pkcs11-tool: %v\n%s", err, out)
	}
	return fmt.Sprintf("pkcs11:module-path=%s;token=signet;object=%s?pin-source=%s", k.Module, label, k.PINFile)
}

// Hide takes the file of the PIN away, so that no new connection comes about, until the returned function is called.
func (k *Token) Hide(t testing.TB) (restore func()) {
	t.Helper()
	if err := os.Remove(k.PINFile); err != nil {
		t.Fatal(err)
	}
	return func() { write(t, k.PINFile, k.PIN) }
}
