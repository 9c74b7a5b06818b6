// Package durable writes small files so that they survive the loss of power whole or not at all, and reads them back
// with a limit on their size and a check of who else may read them.
//
// It is for keys, bundles, configurations and markers: what it writes has been synced to the disk, and so has the
// directory that names it, when a function returns without error. It never logs and never puts contents into errors.
package durable

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// tempMark is part of the name of every temporary file, so that CleanTemp knows what a crash left behind.
const tempMark = ".durable-"

// ErrTooLarge says that a file is larger than the caller allows.
var ErrTooLarge = errors.New("file is too large")

// ErrExposed says that a secret file may be read or changed by others than its owner.
var ErrExposed = errors.New("file is not private to its owner")

// WriteFile puts data into the file at path, replacing what was there, with exactly the permissions perm whatever the
// umask is. After a crash the file has either its old contents or the new ones. Concurrent calls for one path are safe;
// the last one to finish wins. If path is a symbolic link, the link is replaced.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	return write(path, data, perm, os.Rename)
}

// WriteNew is WriteFile for a path that must not exist yet: it returns an error that is fs.ErrExist if it does, and leaves
// it alone. Of several concurrent calls exactly one succeeds.
func WriteNew(path string, data []byte, perm fs.FileMode) error {
	return write(path, data, perm, func(temp, path string) error {
		// A link, unlike a rename, refuses to replace.
		if err := os.Link(temp, path); err != nil {
			return err
		}
		return os.Remove(temp)
	})
}

func write(path string, data []byte, perm fs.FileMode, publish func(temp, path string) error) (err error) {
	dir, base := filepath.Split(path)
	if base == "" || base == "." || base == ".." {
		return fmt.Errorf("writing %q: this does not name a file", path)
	}
	if dir == "" {
		dir = "."
	}
	temp := filepath.Join(dir, "."+shorten(base)+tempMark+rand.Text())
	// 0600 until it is complete: nobody reads a secret through the temporary name.
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			os.Remove(temp)
		}
	}()
	if err := fill(f, data, perm); err != nil {
		f.Close()
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := publish(temp, path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return SyncDir(dir)
}

func fill(f *os.File, data []byte, perm fs.FileMode) error {
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(perm.Perm()); err != nil {
		return err
	}
	return f.Sync()
}

// shorten keeps the temporary name within the 255 bytes that a file name may have.
func shorten(base string) string {
	const longest = 200
	if len(base) > longest {
		return base[:longest]
	}
	return base
}

// CleanTemp removes the temporary files that a crash during WriteFile left in dir. No other process may be writing there.
func CleanTemp(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cleaning %s: %w", dir, err)
	}
	for _, e := range entries {
		name := e.Name()
		i := strings.LastIndex(name, tempMark)
		if !strings.HasPrefix(name, ".") || i < 1 || len(name)-i-len(tempMark) != len(rand.Text()) || !e.Type().IsRegular() {
			continue
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cleaning %s: %w", dir, err)
		}
	}
	return nil
}

// ReadFile returns the contents of the regular file at path. Over max bytes it returns ErrTooLarge, and a pipe, device or
// directory is refused, so that a wrong path cannot fill the memory or block.
func ReadFile(path string, max int64) ([]byte, error) {
	return read(path, max, nil)
}

// ReadSecret is ReadFile for secrets: it returns ErrExposed if group or others may read, write or execute the file, or if
// it belongs to neither this process nor root.
func ReadSecret(path string, max int64) ([]byte, error) {
	return read(path, max, checkPrivate)
}

// ReadMountedSecret is ReadSecret, and takes a file of root's too that its group may read: so Kubernetes mounts Secrets for
// containers that are not root's, and in no other way.
func ReadMountedSecret(path string, max int64) ([]byte, error) {
	return read(path, max, func(path string, info fs.FileInfo) error {
		if uid, ok := owner(info); ok && uid == 0 && info.Mode().Perm()&0o037 == 0 {
			return nil
		}
		return checkPrivate(path, info)
	})
}

// read reads a file of at most max bytes that check, if there is one, takes.
func read(path string, max int64, check func(path string, info fs.FileInfo) error) ([]byte, error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading %s: this is not a regular file", path)
	}
	if check != nil {
		// The open file is judged, not the path: the path may name another file a moment later.
		if err := check(path, info); err != nil {
			return nil, err
		}
	}
	if info.Size() > max {
		return nil, fmt.Errorf("reading %s: %w: %d bytes, at most %d", path, ErrTooLarge, info.Size(), max)
	}
	// The file may grow while it is read.
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("reading %s: %w: more than %d bytes", path, ErrTooLarge, max)
	}
	return data, nil
}

// CheckPrivate returns ErrExposed if group or others may read, write or execute the file at path, or if it belongs to
// neither this process nor root.
func CheckPrivate(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("checking %s: %w", path, err)
	}
	return checkPrivate(path, info)
}

func checkPrivate(path string, info fs.FileInfo) error {
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("%s: %w: its mode is %#o (chmod go= %s)", path, ErrExposed, mode, path)
	}
	uid, ok := owner(info)
	if ok && uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%s: %w: it belongs to uid %d (chown %d %s)", path, ErrExposed, uid, os.Geteuid(), path)
	}
	return nil
}

// MkdirAll makes the directory path and those above it, each new one with exactly the permissions perm, and syncs what
// names them. A directory that exists keeps its permissions.
func MkdirAll(path string, perm fs.FileMode) error {
	path = filepath.Clean(path)
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("making directory %s: a file is in its place", path)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("making directory %s: %w", path, err)
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, perm.Perm()); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil // made by someone else since
		}
		return fmt.Errorf("making directory %s: %w", path, err)
	}
	if err := setMode(path, perm.Perm()); err != nil { // Mkdir's mode passes through the umask
		return fmt.Errorf("making directory %s: %w", path, err)
	}
	return SyncDir(parent)
}

// setMode gives a directory that was just made its permissions. Who may write to the directory above may have put something
// else in its place, such as a link to a file that must not be opened up: that is an error.
func setMode(path string, perm fs.FileMode) error {
	d, err := openDirectory(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Chmod(perm), d.Close())
}

// MkdirPrivate is MkdirAll with 0700 for directories that hold secrets; an existing one that others may enter or that
// belongs to another user is refused with ErrExposed.
func MkdirPrivate(path string) error {
	if err := MkdirAll(path, 0o700); err != nil {
		return err
	}
	return CheckPrivate(path)
}

// Remove deletes the file at path and syncs its directory. A file that does not exist is no error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing %s: %w", path, err)
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the creations, renames and removals in dir survive the loss of power.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing directory %s: %w", dir, err)
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("syncing directory %s: %w", dir, err)
	}
	return nil
}
