package keys

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The sealed form is: magic (4 bytes), format version (1), seal key id (8), nonce (12), ciphertext with tag. The header up
// to the nonce is authenticated together with the binding.
const (
	sealUse        = "signet authority key v1"
	sealReference  = "signet authority key reference v1"
	sealIntent     = "signet authority key intent v1"
	sealMagic      = "SGNK"
	sealVersion    = 1
	sealKeyIDBytes = 8
	sealNonceBytes = 12
	sealHeader     = len(sealMagic) + 1 + sealKeyIDBytes
	sealTagBytes   = 16

	// MaxSealedBytes bounds a sealed key. A sealed P-256 key has about 180 bytes, an RSA 8192 key about 4,800.
	MaxSealedBytes = 16 << 10
)

var (
	// ErrWrongSealKey is in the chain of errors of Open when the key was sealed under another seal key.
	ErrWrongSealKey = errors.New("wrong seal key")

	// ErrSealBroken is in the chain of errors of Open when the sealed bytes are damaged, or are those of another authority.
	ErrSealBroken = errors.New("sealed key is damaged or belongs to another authority")
)

// A Use says what an authority signs.
type Use string

// The uses of authority keys.
const (
	UseX509 Use = "x509"
	UseJWT  Use = "jwt"
	UseWIT  Use = "wit"
)

// A Binding says whose key a sealed key is. It is authenticated with the ciphertext: a sealed key that is moved to another
// record, generation, use or trust domain does not open.
type Binding struct {
	TrustDomain spiffeid.TrustDomain
	Use         Use
	AuthorityID string
	Generation  uint64
}

func (b Binding) check() error {
	switch {
	case b.TrustDomain.IsZero():
		return errors.New("authority key binding has no trust domain")
	case b.Use != UseX509 && b.Use != UseJWT && b.Use != UseWIT:
		return fmt.Errorf("authority key binding has the unknown use %q", string(b.Use))
	case b.AuthorityID == "":
		return errors.New("authority key binding has no authority id")
	case b.Generation == 0:
		return errors.New("authority key binding has no generation")
	}
	return nil
}

// associated returns the associated data of the sealed form: use and version, header and binding, each with its length,
// so that no two bindings give the same bytes.
func (b Binding) associated(use string, header []byte) []byte {
	var out []byte
	for _, part := range [][]byte{[]byte(use), header, []byte(b.TrustDomain.Name()), []byte(b.Use), []byte(b.AuthorityID)} {
		out = binary.BigEndian.AppendUint32(out, uint32(len(part)))
		out = append(out, part...)
	}
	return binary.BigEndian.AppendUint64(out, b.Generation)
}

// seal encrypts plain for the binding. use says what it is: one kind does not open as another.
func (k *SealKey) seal(use string, plain []byte, b Binding) ([]byte, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	out := make([]byte, 0, sealHeader+sealNonceBytes+len(plain)+sealTagBytes)
	out = append(out, sealMagic...)
	out = append(out, sealVersion)
	out = append(out, k.id[:]...)
	header := bytes.Clone(out)
	nonce := make([]byte, sealNonceBytes)
	rand.Read(nonce)
	out = append(out, nonce...)
	return k.aead.Seal(out, nonce, plain, b.associated(use, header)), nil
}

// open decrypts what seal made. The caller clears the result.
func (k *SealKey) open(use string, sealed []byte, b Binding) ([]byte, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	name := fmt.Sprintf("key of %s authority %q of trust domain %q", b.Use, b.AuthorityID, b.TrustDomain.Name())
	if len(sealed) > MaxSealedBytes {
		return nil, fmt.Errorf("%s: sealed form has %d bytes, more than %d: %w", name, len(sealed), MaxSealedBytes, ErrSealBroken)
	}
	if len(sealed) < sealHeader+sealNonceBytes+sealTagBytes || string(sealed[:len(sealMagic)]) != sealMagic {
		return nil, fmt.Errorf("%s: not in signet's sealed form: %w", name, ErrSealBroken)
	}
	if v := sealed[len(sealMagic)]; v != sealVersion {
		return nil, fmt.Errorf("%s: sealed form has version %d, this program understands %d; use the signet release that wrote it", name, v, sealVersion)
	}
	if id := sealed[len(sealMagic)+1 : sealHeader]; !bytes.Equal(id, k.id[:]) { // ids are public
		return nil, fmt.Errorf("%s: it was sealed under seal key %s, but %s holds seal key %s: %w; give the CA the seal key this store was made with",
			name, hex.EncodeToString(id), k.origin, k.ID(), ErrWrongSealKey)
	}
	header, rest := sealed[:sealHeader], sealed[sealHeader:]
	plain, err := k.aead.Open(nil, rest[:sealNonceBytes], rest[sealNonceBytes:], b.associated(use, header))
	if err != nil {
		return nil, fmt.Errorf("%s, generation %d: %w; restore the store from a backup", name, b.Generation, ErrSealBroken)
	}
	return plain, nil
}

// SealedUnder reports whether the header of a sealed form names the seal key.
func SealedUnder(sealed []byte, k *SealKey) bool {
	return len(sealed) >= sealHeader && bytes.Equal(sealed[len(sealMagic)+1:sealHeader], k.id[:])
}

// Reseal opens what is stored of a key under one seal key and seals it under another, for the same binding.
func Reseal(stored Stored, from, to *SealKey, b Binding) ([]byte, error) {
	use := sealUse
	if stored.Kind != KindSoft {
		use = sealReference
	}
	plain, err := from.open(use, stored.Sealed, b)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	return to.seal(use, plain, b)
}
