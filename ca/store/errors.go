package store

import (
	"errors"
	"fmt"
)

// Errors that every store returns, wrapped with what they are about. Compare with errors.Is.
var (
	// ErrNotFound says that the key does not exist.
	ErrNotFound = errors.New("key not found")

	// ErrCompacted says that the store no longer knows the revision asked for: list again.
	ErrCompacted = errors.New("revision is no longer known, list again")

	// ErrFuture says that the revision asked for does not exist yet, as after a restore: list again.
	ErrFuture = errors.New("revision does not exist yet, list again")

	// ErrTooLarge says that a commit is over MaxWrites, MaxChecks or MaxCommitBytes: split it.
	ErrTooLarge = errors.New("commit is too large, split it")

	// ErrInvalid says that a commit can never succeed because of how it is written.
	ErrInvalid = errors.New("commit is not valid")

	// ErrDiskFull says that the store has no room. Nothing was changed.
	ErrDiskFull = errors.New("no room left for the store, free some disk space")

	// ErrUnavailable says that the store cannot answer at present, and that a Commit may or may not have taken effect.
	ErrUnavailable = errors.New("store is not available")

	// ErrCorrupt says that what the store holds is damaged. It is not used in part: restore a backup.
	ErrCorrupt = errors.New("store is damaged, restore a backup")

	// ErrClosed says that the store or the watcher was closed.
	ErrClosed = errors.New("store is closed")
)

// A ConflictError names the first check of a Commit that did not hold. Nothing was changed.
type ConflictError struct {
	Key string
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("key %q was changed since it was read, read it and try again", e.Key)
}

// CheckCommit returns ErrTooLarge or ErrInvalid, wrapped, if a Commit of checks and writes is over the limits, names an
// empty or overlong key, or writes a key twice. Every implementation calls it before anything else.
func CheckCommit(checks []Check, writes []Write) error {
	if len(writes) > MaxWrites {
		return fmt.Errorf("%w: %d writes, at most %d", ErrTooLarge, len(writes), MaxWrites)
	}
	if len(checks) > MaxChecks {
		return fmt.Errorf("%w: %d checks, at most %d", ErrTooLarge, len(checks), MaxChecks)
	}
	size := 0
	for _, c := range checks {
		if err := CheckKey(c.Key); err != nil {
			return err
		}
		if c.Modified < 0 {
			return fmt.Errorf("%w: check of key %q against revision %d, which cannot exist", ErrInvalid, c.Key, c.Modified)
		}
		size += len(c.Key)
	}
	seen := make(map[string]struct{}, len(writes))
	for _, w := range writes {
		if err := CheckKey(w.Key); err != nil {
			return err
		}
		if _, twice := seen[w.Key]; twice {
			return fmt.Errorf("%w: key %q is written twice", ErrInvalid, w.Key)
		}
		seen[w.Key] = struct{}{}
		size += len(w.Key) + len(w.Value)
	}
	if size > MaxCommitBytes {
		return fmt.Errorf("%w: %d bytes of keys and values, at most %d", ErrTooLarge, size, MaxCommitBytes)
	}
	return nil
}

// CheckKey returns ErrInvalid, wrapped, if key is empty or longer than MaxKeyBytes.
func CheckKey(key string) error {
	if key == "" {
		return fmt.Errorf("%w: a key is empty", ErrInvalid)
	}
	if len(key) > MaxKeyBytes {
		return fmt.Errorf("%w: key %.40q… has %d bytes, at most %d", ErrInvalid, key, len(key), MaxKeyBytes)
	}
	return nil
}
