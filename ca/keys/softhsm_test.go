//go:build cgo

package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	_ "go.step.sm/crypto/kms/pkcs11"

	"github.com/signet-id/signet/test/keystores"
)

func mustPlace(t testing.TB, text string) Place {
	t.Helper()
	p, err := ParsePlace(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func testRing(t testing.TB, c Choice, limits Limits) *Ring {
	t.Helper()
	r := NewRing(RingConfig{TrustDomain: testBinding.TrustDomain, X509: c, JWT: c, Limits: limits, Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(r.Close)
	return r
}

func TestKeyInSoftHSM(t *testing.T) {
	token := keystores.SoftHSM(t)
	for _, algorithm := range []Algorithm{ECP256, ECP384, RSA2048} {
		ring := testRing(t, Choice{Place: mustPlace(t, token.URI), Algorithm: algorithm}, Limits{})
		intent := ring.Intend(UseX509, 3)
		if _, err := ring.Find(t.Context(), intent); !errors.Is(err, ErrNoKey) {
			t.Fatalf("%s: Find before Create = %v, want ErrNoKey", algorithm, err)
		}
		before := token.Objects(t)
		key, err := ring.Create(t.Context(), intent)
		if err != nil {
			t.Fatal(err)
		}
		for _, again := range []func(context.Context, Intent) (*Key, error){ring.Create, ring.Find} {
			found, err := again(t.Context(), intent)
			if err != nil {
				t.Fatal(err)
			}
			if !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(found.Public()) {
				t.Errorf("%s: another key under the same name", algorithm)
			}
		}
		if n := token.Objects(t) - before; n != 2 {
			t.Errorf("%s: %d new objects in the token, want the two of one key pair", algorithm, n)
		}
		if !key.External() {
			t.Errorf("%s: the key says that it is in this process", algorithm)
		}
		digest := sha256.Sum256([]byte("x"))
		signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil || !verify(key.Public(), digest[:], signature, crypto.SHA256) {
			t.Fatalf("%s: signature does not verify (%v)", algorithm, err)
		}

		stored, err := key.Seal(testSeal(t, 1), testBinding)
		if err != nil {
			t.Fatal(err)
		}
		if stored.Kind != "pkcs11" || strings.Contains(string(stored.Sealed), token.Module) {
			t.Errorf("stored as %q, in clear", stored.Kind)
		}
		opened, err := ring.Open(t.Context(), stored, testSeal(t, 1), testBinding, key.Public())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := opened.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
			t.Error(err)
		}
		if err := ring.Remove(t.Context(), intent); err != nil {
			t.Fatal(err)
		}
		if n := token.Objects(t); n != before {
			t.Errorf("%s: %d objects after Remove, want %d", algorithm, n, before)
		}
		ring.Close()
	}
}

func TestWrongKeyUnderTheNameIsNotUsed(t *testing.T) {
	token := keystores.SoftHSM(t)
	ring := testRing(t, Choice{Place: mustPlace(t, token.URI), Algorithm: ECP256}, Limits{})
	key, err := ring.Create(t.Context(), ring.Intend(UseX509, 1))
	if err != nil {
		t.Fatal(err)
	}
	stored, err := key.Seal(testSeal(t, 1), testBinding)
	if err != nil {
		t.Fatal(err)
	}
	other, err := Generate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	opened, err := ring.Open(t.Context(), stored, testSeal(t, 1), testBinding, other.Public().(*ecdsa.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("x"))
	if _, err := opened.Sign(rand.Reader, digest[:], crypto.SHA256); err == nil || !strings.Contains(err.Error(), "another key under this name") {
		t.Errorf("Sign = %v, want a refusal of the other key", err)
	}
}

func TestRefusedPINIsTriedOnce(t *testing.T) {
	token := keystores.SoftHSM(t)
	if err := os.WriteFile(token.PINFile, []byte("wrong-pin-0815"), 0o600); err != nil {
		t.Fatal(err)
	}
	ring := testRing(t, Choice{Place: mustPlace(t, token.URI)}, Limits{})
	intent := ring.Intend(UseX509, 1)
	_, err := ring.Find(t.Context(), intent)
	if err == nil || strings.Contains(err.Error(), "wrong-pin-0815") {
		t.Fatalf("Find with a wrong PIN = %v, want an error without it", err)
	}
	_, err = ring.Find(t.Context(), intent)
	if err == nil || !strings.Contains(err.Error(), "not tried again") {
		t.Errorf("second Find = %v, want that the PIN is not tried again", err)
	}
	if err := os.WriteFile(token.PINFile, []byte(token.PIN), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ring.Find(t.Context(), intent); !errors.Is(err, ErrNoKey) {
		t.Errorf("Find with the PIN corrected = %v, want ErrNoKey", err)
	}
}
