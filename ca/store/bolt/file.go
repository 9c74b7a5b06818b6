package bolt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/durable"
)

const (
	fileName = "store.db"
	lockName = "store.lock"
	tempName = "store.db.new"

	// pageSize is that of every file, whatever the machine's is, so that a file can move between machines.
	pageSize = 4096

	// initialMap is address space, not memory. While the file fits into it, long readers never hold up the writer.
	initialMap = 1 << 30

	// lockRetry is the pause between two attempts to get the lock.
	lockRetry = 20 * time.Millisecond
)

var (
	metaBucket  = []byte("meta")
	itemBucket  = []byte("items")
	formatKey   = []byte("format")
	epochKey    = []byte("epoch")
	stateKey    = []byte("state")
	initialized = state{revision: 1}
)

// lock takes the data directory for this process. The kernel gives it back when the process ends, however it ends.
func lock(dir string, timeout time.Duration) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(timeout); ; time.Sleep(lockRetry) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		if time.Now().After(deadline) {
			holder := holderOf(f)
			f.Close()
			return nil, fmt.Errorf("%w%s (is another CA running on this data directory?)", ErrLocked, holder)
		}
	}
	// Only for the message above: a lock without a readable number is as good.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

// Lock takes a data directory, which it makes, for a CA whose state is elsewhere. Closing the file gives it back.
func Lock(dir string) (io.Closer, error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return lock(dir, DefaultLockTimeout)
}

func holderOf(f *os.File) string {
	var b [20]byte
	n, _ := f.ReadAt(b[:], 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil || pid <= 0 {
		return ""
	}
	return fmt.Sprintf(" by process %d", pid)
}

// create makes the file at path if there is none. It appears under its name only once it is complete and synced, so that a
// crash during the first start leaves nothing that looks like a damaged store.
func create(dir string) error {
	path := filepath.Join(dir, fileName)
	if _, err := os.Lstat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	temp := filepath.Join(dir, tempName)
	if err := durable.Remove(temp); err != nil {
		return err
	}
	db, err := bolt.Open(temp, 0o600, options())
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		if _, err := tx.CreateBucket(itemBucket); err != nil {
			return err
		}
		meta, err := tx.CreateBucket(metaBucket)
		if err != nil {
			return err
		}
		return errors.Join(
			meta.Put(formatKey, []byte(strconv.Itoa(formatVersion))),
			meta.Put(epochKey, []byte(rand.Text())),
			meta.Put(stateKey, initialized.bytes()),
		)
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return errors.Join(err, durable.Remove(temp))
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

func options() *bolt.Options {
	return &bolt.Options{
		Timeout:  time.Second,
		PageSize: pageSize,
		// The list of free pages has no checksum, and a wrong one would have live pages overwritten. It is computed at
		// each start from what is reachable (30 to 60 ms for 100,000 items).
		NoFreelistSync:  true,
		FreelistType:    bolt.FreelistMapType,
		InitialMmapSize: initialMap,
	}
}

// openError says in signet's words what bbolt found.
func openError(err error) error {
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return fmt.Errorf("%w (is another CA or a bbolt tool using it?)", ErrLocked)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return fmt.Errorf("%w: both of its first pages are invalid: %w", store.ErrCorrupt, err)
	}
	return err
}

// readState returns the state as of tx.
func readState(tx *bolt.Tx) (state, error) {
	meta := tx.Bucket(metaBucket)
	if meta == nil || tx.Bucket(itemBucket) == nil {
		return state{}, fmt.Errorf("%w: one of its two buckets is missing", store.ErrCorrupt)
	}
	return parseState(meta.Get(stateKey))
}

// guard turns what bbolt does about a damaged page, a panic or a memory fault, into store.ErrCorrupt.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", store.ErrCorrupt, p)
		}
	}()
	return f()
}
