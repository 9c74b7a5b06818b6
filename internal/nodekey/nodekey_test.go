package nodekey

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestProofIsBoundToEverything(t *testing.T) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	id := spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/a")
	nonce, csr := bytes.Repeat([]byte{1}, NonceBytes), []byte("csr")
	sig, err := Sign(key, id, nonce, csr)
	if err != nil {
		t.Fatal(err)
	}
	if !Verify(key.Public(), id, nonce, csr, sig) {
		t.Error("the right proof is refused")
	}
	twist := bytes.Clone(nonce)
	twist[31] ^= 1
	for name, ok := range map[string]bool{
		"another key":     Verify(other.Public(), id, nonce, csr, sig),
		"another node":    Verify(key.Public(), spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/b"), nonce, csr, sig),
		"another nonce":   Verify(key.Public(), id, twist, csr, sig),
		"another new key": Verify(key.Public(), id, nonce, []byte("csr2"), sig),
		"short nonce":     Verify(key.Public(), id, nonce[:31], csr, sig),
		"long signature":  Verify(key.Public(), id, nonce, csr, append(sig, make([]byte, MaxSignatureBytes)...)),
		"no key":          Verify(nil, id, nonce, csr, sig),
	} {
		if ok {
			t.Errorf("accepted with %s", name)
		}
	}
	if _, err := Sign(key, id, nonce[:5], csr); err == nil {
		t.Error("a short challenge is signed")
	}
}
