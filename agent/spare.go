package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/durable"
)

// roomBytes is what the record takes on disk, with white space after it, or a multiple: the record and its spare take
// each other's place.
const roomBytes = 16 << 10

// fillUp returns data with white space up to the next multiple of roomBytes.
func fillUp(data []byte) []byte {
	rest := (roomBytes - len(data)%roomBytes) % roomBytes
	return append(data, bytes.Repeat([]byte{'\n'}, rest)...)
}

func noRoom(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// writeWithSpare puts data, which was filled up, into the file at path as durable.WriteFile does. If there is no room for that, it
// writes over the spare, which has its room already, and lets the two change places, so that a full disk does not keep
// the agent from renewing its SVID. File systems that write nothing in its place, such as btrfs, may refuse that too.
func writeWithSpare(path, spare string, data []byte) error {
	err := durable.WriteFile(path, data, 0o600)
	if err == nil {
		return keepSpare(spare, len(data))
	}
	if !noRoom(err) {
		return err
	}
	if spareErr := overwrite(spare, data); spareErr != nil {
		return errors.Join(err, spareErr)
	}
	if spareErr := unix.Renameat2(unix.AT_FDCWD, spare, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE); spareErr != nil {
		return errors.Join(err, fmt.Errorf("putting %s in the place of %s: %w", spare, path, spareErr))
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return err
	}
	// The record of before holds a key.
	return overwrite(spare, make([]byte, len(data)))
}

// keepSpare makes sure that the spare has its room. That there is none now is no failure: the record was written.
func keepSpare(spare string, size int) error {
	if info, err := os.Lstat(spare); err == nil && info.Size() == int64(size) {
		return nil
	}
	if err := durable.WriteFile(spare, make([]byte, size), 0o600); err != nil && !noRoom(err) {
		return err
	}
	return nil
}

// overwrite writes over a file that has the size of data, without a need for more room.
func overwrite(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != int64(len(data)) || !info.Mode().IsRegular() {
		return fmt.Errorf("%s has not the size of the record", path)
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}
