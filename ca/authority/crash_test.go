package authority

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store/bolt"
)

// crashDirVariable makes the test binary a child that opens the authorities in that directory.
const crashDirVariable = "SIGNET_TEST_CRASH_DIR"

const crashSealKey = "seal.key"

// crashStores is how many stores a child opens one after the other, so that a kill at any moment hits the making of one.
const crashStores = 20

func crashStore(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("data-%02d", i)) }

// openAsChild opens the authorities of all stores in dir, and says on stdout when it begins and when it is done.
func openAsChild(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	seal, err := keys.LoadOrCreateSealKey(filepath.Join(dir, crashSealKey))
	fail(err)
	fmt.Println("opening")
	for i := range crashStores {
		s, err := bolt.Open(bolt.Config{Dir: crashStore(dir, i), Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
		fail(err)
		_, err = Open(context.Background(), Config{TrustDomain: testTD, Store: s, Seal: seal, Log: slog.New(slog.DiscardHandler)})
		fail(err)
		fail(s.Close())
	}
	fmt.Println("done")
}

// TestCrashLoopLeavesOneSet kills processes that make first authorities, again and again on the same stores. Whatever is left
// in each must be nothing, or one whole set that later starts use.
func TestCrashLoopLeavesOneSet(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	killed, whole, empty := 0, 0, 0
	for round := range 6 {
		dir := t.TempDir()
		for range 4 {
			if killedWhileOpening(t, dir, time.Duration(random.Int64N(int64(25*time.Millisecond)))) {
				killed++
			}
		}
		seal, err := keys.LoadOrCreateSealKey(filepath.Join(dir, crashSealKey))
		if err != nil {
			t.Fatal(err)
		}
		for i := range crashStores {
			c := testConfig(t)
			c.Store, c.Seal, c.Now = openStore(t, crashStore(dir, i)), seal, time.Now
			left := records(t, c.Store)
			if len(left) == 0 {
				empty++
			} else {
				whole++
				checkOneSet(t, c.Store)
			}
			s, err := Open(t.Context(), c)
			if err != nil {
				t.Fatalf("round %d, store %d: after the crashes: %v", round, i, err)
			}
			checkOneSet(t, c.Store)
			if _, there := left[keyX509Prefix+s.Bundle().X509[0].ID]; len(left) != 0 && !there {
				t.Errorf("round %d, store %d: an authority that was made before the last crash is not used", round, i)
			}
		}
	}
	t.Logf("%d processes were killed while they made authorities; %d stores held them afterwards, %d did not yet", killed, whole, empty)
	if killed == 0 || whole == 0 {
		t.Error("the kills came too early or too late to prove anything")
	}
}

// killedWhileOpening starts a child and kills it with SIGKILL the given time after it has begun. It reports whether the child
// had not said that it was done.
func killedWhileOpening(t *testing.T, dir string, after time.Duration) bool {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), crashDirVariable+"="+dir)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	buf := make([]byte, 64)
	n, err := out.Read(buf) // the begin
	if err != nil {
		t.Fatalf("child said nothing: %v (%v)", err, child.Wait())
	}
	said.Write(buf[:n])
	<-time.After(after)
	_ = child.Process.Kill() // it may have ended already
	if _, err := said.ReadFrom(out); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed, or done
	return !bytes.Contains(said.Bytes(), []byte("done"))
}

// TestKeysAreNeverInClearOnDisk opens the sealed keys with code of its own, which also pins their format, and looks for what
// it finds in every file.
func TestKeysAreNeverInClearOnDisk(t *testing.T) {
	dir := t.TempDir()
	sealPath := filepath.Join(t.TempDir(), "seal.key")
	seal, err := keys.CreateSealKey(sealPath)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := os.ReadFile(sealPath)
	if err != nil {
		t.Fatal(err)
	}
	c := testConfig(t)
	c.Store, c.Seal = openStore(t, dir), seal
	if _, err := Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	needles := map[string][]byte{"seal key": secret}
	for key, item := range records(t, c.Store) {
		id, kind := splitKey(key)
		use := map[string]string{keyX509Prefix: "x509", keyJWTPrefix: "jwt"}[kind]
		if use == "" {
			continue
		}
		var r struct{ Key keys.Stored }
		if err := json.Unmarshal(item.Value, &r); err != nil {
			t.Fatal(err)
		}
		der := unseal(t, secret, r.Key.Sealed, testTD.Name(), use, id, 1)
		parsed, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			t.Fatal(err)
		}
		scalar, err := parsed.(*ecdsa.PrivateKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		needles[use+" PKCS #8"], needles[use+" scalar"] = der, scalar
	}
	if len(needles) != 5 {
		t.Fatalf("%d secrets found, want 5", len(needles))
	}
	files := 0
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files++
		content, err := os.ReadFile(path)
		for name, needle := range needles {
			if bytes.Contains(content, needle) {
				t.Errorf("%s holds the %s in clear", path, name)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Error("the store has no file")
	}
}

// unseal is the sealed form, written down a second time.
func unseal(t *testing.T, secret, sealed []byte, td, use, id string, generation uint64) []byte {
	t.Helper()
	key, err := hkdf.Expand(sha256.New, secret, "signet authority key v1 encryption", 32)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	if string(sealed[:5]) != "SGNK\x01" {
		t.Fatalf("sealed form begins with %q", sealed[:5])
	}
	header, nonce, rest := sealed[:13], sealed[13:25], sealed[25:]
	var data []byte
	for _, part := range []string{"signet authority key v1", string(header), td, use, id} {
		data = append(binary.BigEndian.AppendUint32(data, uint32(len(part))), part...)
	}
	plain, err := aead.Open(nil, nonce, rest, binary.BigEndian.AppendUint64(data, generation))
	if err != nil {
		t.Fatal(err)
	}
	return plain
}
