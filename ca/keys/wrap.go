package keys

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" // the hash of OAEP, which needs no resistance to collisions
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	mathrand "math/rand/v2"
	"time"

	"go.step.sm/crypto/kms/apiv1"
)

const (
	wrapVersion     = 1
	wrapUse         = "signet wrapped seal key v1"
	maxWrappedBytes = 8 << 10

	// How long a start waits for the key store that has to unwrap the seal key.
	unwrapPatience   = 30 * time.Second
	firstUnwrapRetry = 500 * time.Millisecond
	lastUnwrapRetry  = 5 * time.Second
)

// CanWrap returns an error if the driver of the key store cannot decrypt.
func (k KeyURI) CanWrap() error {
	switch k.place.scheme {
	case "pkcs11", "awskms", "cloudkms":
		return nil
	case "tpmkms":
		return errors.New("the driver of tpmkms: cannot decrypt; for a seal key that only this machine's TPM opens, use systemd_credential with systemd-creds encrypt --with-key=tpm2")
	}
	return fmt.Errorf("the driver of %s: cannot decrypt; pkcs11:, awskms: and cloudkms: can wrap the seal key", k.place.scheme)
}

// A wrapped is a seal key as it is stored: only the wrapping key opens it.
type wrapped struct {
	Version int    `json:"v"`
	SealKey string `json:"seal_key"` // its id, for people
	Wrapper string `json:"wrapped_by"`
	Hash    string `json:"oaep_hash"`
	Bytes   []byte `json:"wrapped"`
}

// oaepHashes are tried in this order: SoftHSM and older tokens know OAEP with SHA-1 only, which is as good there.
var oaepHashes = []struct {
	name string
	hash crypto.Hash
	new  func() hash.Hash
}{
	{"SHA-256", crypto.SHA256, sha256.New},
	{"SHA-1", crypto.SHA1, sha1.New},
}

// WrapSealKey makes a new seal key and returns it together with its wrapped form, which it has unwrapped once to see that
// this works.
func (r *Ring) WrapSealKey(ctx context.Context, w KeyURI) (*SealKey, []byte, error) {
	s, err := r.store(w.place)
	if err != nil {
		return nil, nil, err
	}
	public, err := patiently(ctx, func(ctx context.Context) (crypto.PublicKey, error) {
		return ask(ctx, s, "reading key "+w.key, true, func(c *connection) (crypto.PublicKey, error) {
			return c.manager.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: w.key})
		})
	})
	if err != nil {
		return nil, nil, err
	}
	key, ok := public.(*rsa.PublicKey)
	if !ok || key.N.BitLen() < 2048 {
		return nil, nil, fmt.Errorf("key %s is %T; the seal key is wrapped by an RSA key of at least 2048 bits", w, public)
	}
	random := make([]byte, SealKeyBytes)
	defer clear(random)
	if _, err := rand.Read(random); err != nil {
		return nil, nil, err
	}
	plain := append(bytes.Clone(random), r.sealLabel()...)
	defer clear(plain)
	seal, err := newSealKey(random, w.text)
	if err != nil {
		return nil, nil, err
	}
	var last error
	for _, h := range oaepHashes {
		secret, err := rsa.EncryptOAEP(h.new(), rand.Reader, key, plain, nil)
		if err != nil {
			return nil, nil, err
		}
		record, err := json.Marshal(wrapped{Version: wrapVersion, SealKey: seal.ID(), Wrapper: w.text, Hash: h.name, Bytes: secret})
		if err != nil {
			return nil, nil, err
		}
		again, err := r.unwrap(ctx, w, record)
		if err == nil && again.ID() == seal.ID() {
			return seal, record, nil
		}
		last = err
	}
	return nil, nil, fmt.Errorf("key %s does not decrypt what is encrypted for it (RSA-OAEP): %w", w, last)
}

// UnwrapSealKey opens what WrapSealKey returned. If the key store does not answer, it is asked again for half a minute.
func (r *Ring) UnwrapSealKey(ctx context.Context, w KeyURI, record []byte) (*SealKey, error) {
	return patiently(ctx, func(ctx context.Context) (*SealKey, error) { return r.unwrap(ctx, w, record) })
}

func (r *Ring) unwrap(ctx context.Context, w KeyURI, record []byte) (*SealKey, error) {
	var stored wrapped
	if len(record) > maxWrappedBytes {
		return nil, fmt.Errorf("the wrapped seal key has %d bytes, more than %d", len(record), maxWrappedBytes)
	}
	if err := json.Unmarshal(record, &stored); err != nil {
		return nil, fmt.Errorf("the wrapped seal key: %w", err)
	}
	if stored.Version != wrapVersion {
		return nil, fmt.Errorf("the wrapped seal key has format version %d, this program understands %d; use the signet release that wrote it", stored.Version, wrapVersion)
	}
	var h crypto.Hash
	for _, known := range oaepHashes {
		if known.name == stored.Hash {
			h = known.hash
		}
	}
	if h == 0 {
		return nil, fmt.Errorf("the wrapped seal key has the unknown OAEP hash %q", stored.Hash)
	}
	s, err := r.store(w.place)
	if err != nil {
		return nil, err
	}
	plain, err := ask(ctx, s, "unwrapping the seal key with key "+w.key, true, func(c *connection) ([]byte, error) {
		decrypter, ok := c.manager.(apiv1.Decrypter)
		if !ok {
			return nil, apiv1.NotImplementedError{Message: "the driver of this key store cannot decrypt"}
		}
		key, err := decrypter.CreateDecrypter(&apiv1.CreateDecrypterRequest{DecryptionKey: w.key})
		if err != nil {
			return nil, err
		}
		return key.Decrypt(rand.Reader, stored.Bytes, &rsa.OAEPOptions{Hash: h})
	})
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	if label := r.sealLabel(); len(plain) != SealKeyBytes+len(label) || subtle.ConstantTimeCompare(plain[SealKeyBytes:], label) != 1 {
		return nil, fmt.Errorf("what key %s unwraps is no seal key of trust domain %q; restore the store from a backup", w, r.config.TrustDomain.Name())
	}
	seal, err := newSealKey(plain[:SealKeyBytes], w.text)
	if err == nil && seal.ID() != stored.SealKey {
		return nil, fmt.Errorf("the wrapped seal key is %s, but its record says %q; restore the store from a backup", seal.ID(), stored.SealKey)
	}
	return seal, err
}

// sealLabel binds a wrapped seal key to what it is for. Not every key store takes a label of OAEP, so it is inside.
func (r *Ring) sealLabel() []byte {
	sum := sha256.Sum256([]byte(wrapUse + "\x00" + r.config.TrustDomain.Name()))
	return sum[:]
}

// patiently repeats what a key store did not answer.
func patiently[T any](ctx context.Context, do func(context.Context) (T, error)) (T, error) {
	end := time.Now().Add(unwrapPatience)
	for wait := firstUnwrapRetry; ; wait = min(2*wait, lastUnwrapRetry) {
		value, err := do(ctx)
		if !errors.Is(err, ErrUnavailable) || time.Now().Add(wait).After(end) {
			return value, err
		}
		t := time.NewTimer(wait/2 + mathrand.N(wait/2))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return value, fmt.Errorf("%w (%w)", err, ctx.Err())
		}
	}
}
