package sealed

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Keyring is a key in the kernel's memory: in the user keyring of the agent's user. It is on no disk and survives a restart of
// the agent, not a reboot. What Keyring cannot detect is what File cannot.
//
// The user keyring, and not the session's: systemd gives each start of a unit a session keyring of its own. Processes of
// the agent's user, and root, can read the key, as they can the agent's memory.
type Keyring struct{}

func (Keyring) kind() string { return "keyring" }

// keyringUse names the key; the directory's hash is behind it, since a user may run several agents.
const keyringUse = "signet agent cache v1 "

func (Keyring) open(_ context.Context, dir string) (holder, bool, error) {
	sum := sha256.Sum256([]byte(dir))
	name := keyringUse + hex.EncodeToString(sum[:8])
	type outcome struct {
		s    *secret
		made bool
		err  error
	}
	done := make(chan outcome, 1)
	go func() {
		// Who reads a key of a keyring must possess it: have a link to the keyring, which this thread makes and takes with it
		// when it ends, as it does with a goroutine that leaves it locked.
		runtime.LockOSThread()
		s, made, err := keyringSecret(name)
		done <- outcome{s, made, err}
	}()
	o := <-done // the kernel answers at once
	if o.err != nil {
		return nil, false, fmt.Errorf("the kernel's user keyring: %w", o.err)
	}
	return plain{o.s}, o.made, nil
}

func keyringSecret(name string) (s *secret, made bool, err error) {
	link := func() error {
		_, err := unix.KeyctlInt(unix.KEYCTL_LINK, unix.KEY_SPEC_USER_KEYRING, unix.KEY_SPEC_THREAD_KEYRING, 0, 0)
		return err
	}
	if err := link(); err != nil {
		return nil, false, fmt.Errorf("linking to it: %w (is keyctl forbidden to the agent, as in many containers?)", err)
	}
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", name, 0)
	switch {
	case errors.Is(err, unix.ENOKEY), errors.Is(err, unix.EKEYEXPIRED), errors.Is(err, unix.EKEYREVOKED):
		return addKeyringSecret(name)
	case err != nil:
		return nil, false, fmt.Errorf("looking for the key: %w", err)
	}
	data := make([]byte, secretBytes+1)
	defer clear(data)
	n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, data, 0)
	switch {
	case err != nil:
		return nil, false, fmt.Errorf("reading the key: %w", err)
	case n != secretBytes: // no key of ours
		return addKeyringSecret(name)
	}
	return &secret{b: [secretBytes]byte(data)}, false, nil
}

// addKeyringSecret makes a secret and puts it there, in place of one of the same name.
func addKeyringSecret(name string) (*secret, bool, error) {
	s := newSecret()
	if _, err := unix.AddKey("user", name, s.b[:], unix.KEY_SPEC_USER_KEYRING); err != nil {
		return nil, false, fmt.Errorf("adding the key: %w", err)
	}
	return s, true, nil
}
