package sealed

import (
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/signet-id/signet/internal/durable"
)

// secretBytes is the size of the secret from which all keys are derived.
const secretBytes = 32

// A secret prints as what it is with every verb, so that it cannot reach a log by accident.
type secret struct{ b [secretBytes]byte }

func newSecret() *secret {
	s := &secret{}
	rand.Read(s.b[:])
	return s
}

// Format is fmt.Formatter's.
func (*secret) Format(f fmt.State, _ rune) { io.WriteString(f, "[key of the sealed cache]") }

// id names the secret and tells nothing of it.
func (s *secret) id() ([]byte, error) { return hkdf.Key(sha256.New, s.b[:], nil, useKeyID, idBytes) }

// A Key is where the cache's key is kept. File, Keyring and TPM are.
type Key interface {
	// kind is its name in the configuration and in the file.
	kind() string
	// open returns the secret. made says that there was none and this one was just made: nothing was sealed with it.
	open(ctx context.Context, dir string) (h holder, made bool, err error)
}

// A holder is a key that was opened.
type holder interface {
	secret() *secret
	// counter returns the key's monotonic counter, or nil if it has none.
	counter() counter
}

// A counter counts upwards only, whoever has the disk.
type counter interface {
	read(ctx context.Context) (uint64, error)
	// increment adds one and returns the value then.
	increment(ctx context.Context) (uint64, error)
}

// plain is a holder without a counter.
type plain struct{ s *secret }

func (p plain) secret() *secret  { return p.s }
func (p plain) counter() counter { return nil }

// File is a key in a file that only the agent's user can read. Who has the disk has the cache; only inconsistency is
// detected, not that all of it was put back to an earlier moment.
type File struct{}

const keyFile = "cache.key"

func (File) kind() string { return "file" }

func (File) open(_ context.Context, dir string) (holder, bool, error) {
	path := filepath.Join(dir, keyFile)
	data, err := durable.ReadSecret(path, secretBytes)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, durable.ErrTooLarge), err == nil && len(data) != secretBytes:
		// A file of another size is no key; what it sealed, if anything, is lost.
		s := newSecret()
		if err := durable.WriteFile(path, s.b[:], 0o600); err != nil {
			return nil, false, err
		}
		return plain{s}, true, nil
	case err != nil:
		return nil, false, err
	}
	defer clear(data)
	return plain{&secret{b: [secretBytes]byte(data)}}, false, nil
}
