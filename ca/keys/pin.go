package keys

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	maxPINBytes = 256

	// minScrubbed is the shortest PIN that is looked for in texts. A shorter one would tear words apart, and tells little.
	minScrubbed = 4
)

// A secret is the PIN of a key store. It prints as "[PIN]" with every verb.
type secret struct{ value string }

// Format hides the PIN, whatever the verb.
func (s secret) Format(f fmt.State, _ rune) { io.WriteString(f, "[PIN]") }

// sum tells one PIN from another without keeping it.
func (s secret) sum() [sha256.Size]byte { return sha256.Sum256([]byte(s.value)) }

// scrub returns err with a text that does not hold the PIN, in case a driver puts its options into its errors.
func (s secret) scrub(err error) error {
	if err == nil || len(s.value) < minScrubbed || !strings.Contains(err.Error(), s.value) {
		return err
	}
	return &scrubbedError{text: strings.ReplaceAll(err.Error(), s.value, "[PIN]"), cause: err}
}

// A scrubbedError has the kind of its cause, not its text.
type scrubbedError struct {
	text  string
	cause error
}

func (e *scrubbedError) Error() string { return e.text }

// Is and As look into the cause. There is no Unwrap, so that nobody prints the cause.
func (e *scrubbedError) Is(target error) bool { return errors.Is(e.cause, target) }
func (e *scrubbedError) As(target any) bool   { return errors.As(e.cause, target) }

// readPIN reads a PIN from a regular file that only its owner can reach. White space at the end is not part of it.
func readPIN(path string) (secret, error) {
	content, err := readPrivate(path, maxPINBytes)
	if err != nil {
		return secret{}, fmt.Errorf("pin-source: %w", err)
	}
	defer clear(content)
	pin := bytes.TrimRight(content, " \t\r\n")
	if len(pin) == 0 {
		return secret{}, fmt.Errorf("pin-source: %s holds no PIN; it must hold one of 1 to %d bytes", path, maxPINBytes)
	}
	return secret{value: string(pin)}, nil
}
