package observations

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/internal/tally"
)

// A file begins with magic and the version of its format. After that come records: the length and the CRC-32C of a
// signet.policy.v1.Observation, four bytes each, big endian, and then its bytes. A count that comes again is its new state.
// Records are appended to the newest file, of which a crash may cut the end; each run begins a new one. From time to time
// all that is still kept is written to a new file, and the old ones are removed.
const (
	magic         = "signet observations\n"
	formatVersion = 1

	namePrefix    = "observations-"
	nameSuffix    = ".log"
	tempSuffix    = ".tmp"
	damagedSuffix = ".damaged"

	// maxRecordBytes is above what tally.Check lets through.
	maxRecordBytes = 16 << 10
	// maxDamaged is how many damaged files are left lying about; the oldest go.
	maxDamaged = 4
	// compactBytes is how much the files may grow beyond twice what the last compaction has left, and compactFiles how many.
	compactBytes = 16 << 20
	compactFiles = 16
	// spareFraction of a disk is left to others, as long as that is no more than maxSpare.
	spareFraction = 10
	maxSpare      = 2 << 30
)

var (
	errTorn    = errors.New("the end is cut off")
	errDamaged = errors.New("damaged")
	errNewer   = errors.New("written by a newer version")
	crcTable   = crc32.MakeTable(crc32.Castagnoli)
)

// files are the files of one directory. All but bytes is used by one goroutine at a time.
type files struct {
	dir      string
	log      *slog.Logger
	newest   uint64
	current  *os.File // nil: none is open
	number   uint64   // of current
	size     int64    // of current, up to its last whole record
	old      []uint64 // those before current
	settled  int64    // bytes after the last compaction
	damaged  []uint64 // to be set aside once what could be read of them is in another file
	untidy   bool     // compact at the next opportunity
	unusable error    // nothing may be written here

	bytes atomic.Int64 // of all files
}

func fileName(n uint64) string { return fmt.Sprintf("%s%08d%s", namePrefix, n, nameSuffix) }

// open reads all files, oldest first.
func (f *files) open(dir string, log *slog.Logger, restore func(*policyv1.Observation)) error {
	f.dir, f.log = dir, log
	if f.unusable = f.read(restore); f.unusable != nil {
		return f.unusable
	}
	return nil
}

func (f *files) read(restore func(*policyv1.Observation)) error {
	if err := durable.MkdirAll(f.dir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	var found []uint64
	var damaged []string
	for _, e := range entries {
		name := e.Name()
		if !e.Type().IsRegular() || !strings.HasPrefix(name, namePrefix) {
			continue
		}
		if strings.HasSuffix(name, tempSuffix) { // of a compaction that did not come to its end
			_ = os.Remove(filepath.Join(f.dir, name)) // it is overwritten otherwise
			continue
		}
		if strings.HasSuffix(name, damagedSuffix) {
			damaged = append(damaged, name)
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(name, namePrefix), nameSuffix), 10, 63)
		if err == nil && fileName(n) == name {
			found = append(found, n)
		}
	}
	slices.Sort(found)
	for _, n := range found {
		f.newest = n
		path := filepath.Join(f.dir, fileName(n))
		size, err := readFile(path, restore)
		switch {
		case errors.Is(err, errNewer):
			// Nothing is touched: the newer version may come back.
			return fmt.Errorf("%s is %w of signet: remove it to begin afresh, or run that version", path, err)
		case errors.Is(err, errDamaged):
			f.log.Error("a file of observations is damaged and is set aside; what can be read of it is kept", "file", path, "set_aside", path+damagedSuffix, "err", err)
			f.damaged, f.untidy = append(f.damaged, n), true
			continue
		case errors.Is(err, errTorn):
			f.log.Info("the last records of a file of observations were cut off, as after a crash", "file", path)
		case err != nil:
			return err
		}
		f.old = append(f.old, n)
		f.bytes.Add(size)
	}
	slices.Sort(damaged)
	for len(damaged)+len(f.damaged) > maxDamaged && len(damaged) > 0 {
		_ = os.Remove(filepath.Join(f.dir, damaged[0])) // it is in nobody's way
		damaged = damaged[1:]
	}
	return nil
}

// readFile hands out the records of a file, up to the first that cannot be read.
func readFile(path string, restore func(*policyv1.Observation)) (int64, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), readRecords(bufio.NewReaderSize(file, 64<<10), restore)
}

func readRecords(r *bufio.Reader, restore func(*policyv1.Observation)) error {
	head := make([]byte, len(magic)+1)
	if n, err := io.ReadFull(r, head); err != nil {
		if isEnd(err) && string(head[:min(n, len(magic))]) == magic[:min(n, len(magic))] {
			return errTorn
		}
		return readError(err)
	}
	switch version := head[len(magic)]; {
	case string(head[:len(magic)]) != magic || version == 0:
		return fmt.Errorf("%w: it does not begin as a file of observations does", errDamaged)
	case version > formatVersion:
		return errNewer
	}
	var frame [8]byte
	buf := make([]byte, maxRecordBytes)
	for {
		if _, err := io.ReadFull(r, frame[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return readError(err)
		}
		n := binary.BigEndian.Uint32(frame[:4])
		if n > maxRecordBytes {
			return fmt.Errorf("%w: a record of %d bytes", errDamaged, n)
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return readError(err)
		}
		one := new(policyv1.Observation)
		if crc32.Checksum(buf[:n], crcTable) != binary.BigEndian.Uint32(frame[4:]) || proto.Unmarshal(buf[:n], one) != nil {
			if _, err := r.Peek(1); errors.Is(err, io.EOF) {
				return errTorn // a crash may leave the last record with its length and not its bytes
			}
			return fmt.Errorf("%w: a record with a wrong checksum", errDamaged)
		}
		restore(one)
	}
}

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

func readError(err error) error {
	if isEnd(err) {
		return errTorn
	}
	return err
}

func appendRecord(b []byte, one *policyv1.Observation) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	b, err := proto.MarshalOptions{}.MarshalAppend(b, one)
	if err != nil || len(b)-at-8 > maxRecordBytes {
		return b[:at] // Check has seen it: this cannot be
	}
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-8))
	binary.BigEndian.PutUint32(b[at+4:], crc32.Checksum(b[at+8:], crcTable))
	return b
}

// append writes records, and returns how many of them are in the files.
func (f *files) append(observed []*policyv1.Observation) (written int, err error) {
	if f.unusable != nil {
		return 0, f.unusable
	}
	if err := f.checkRoom(); err != nil {
		return 0, err
	}
	if f.current == nil {
		if err := f.begin(); err != nil {
			return 0, err
		}
	}
	const chunk = 256 << 10
	var b []byte
	for i, one := range observed {
		b = appendRecord(b, one)
		if len(b) < chunk && i < len(observed)-1 {
			continue
		}
		if n, err := f.current.WriteAt(b, f.size); err != nil {
			// What is there of the last record is overwritten or cut off.
			f.abandon()
			return written, fmt.Errorf("writing %s after %d bytes: %w", f.dir, n, err)
		}
		f.size += int64(len(b))
		f.bytes.Add(int64(len(b)))
		written, b = i+1, b[:0]
	}
	if err := f.current.Sync(); err != nil {
		f.abandon()
		return 0, fmt.Errorf("syncing %s: %w", f.dir, err)
	}
	return written, nil
}

// begin makes a new file the current one.
func (f *files) begin() error {
	f.newest++
	path := filepath.Join(f.dir, fileName(f.newest))
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	head := append([]byte(magic), formatVersion)
	if _, err = file.Write(head); err == nil {
		err = durable.SyncDir(f.dir)
	}
	if err != nil {
		return errors.Join(err, file.Close(), os.Remove(path))
	}
	f.current, f.number, f.size = file, f.newest, int64(len(head))
	f.bytes.Add(f.size)
	return nil
}

// abandon closes the current file at the end of its last whole record. What comes next goes to another one.
func (f *files) abandon() {
	_ = f.current.Truncate(f.size) // if that is not possible either, the next reader finds its end cut off
	_ = f.current.Close()
	f.current = nil
	f.old = append(f.old, f.number)
	f.untidy = true
}

// checkRoom leaves the last of a disk to what matters more: the CA's store and its audit log may be there, too.
func (f *files) checkRoom() error {
	var st unix.Statfs_t
	if err := unix.Statfs(f.dir, &st); err != nil {
		return fmt.Errorf("%s: %w", f.dir, err)
	}
	free, spare := st.Bavail*uint64(st.Bsize), min(st.Blocks*uint64(st.Bsize)/spareFraction, maxSpare)
	if free < spare {
		return fmt.Errorf("the disk of %s has %d MiB left, and the last %d MiB are not for observations", f.dir, free>>20, spare>>20)
	}
	return nil
}

// compact writes what is kept to a file of its own, if the files have grown much beyond it, and removes the others.
func (f *files) compact(kept *tally.Kept) error {
	grown := f.bytes.Load() > 2*f.settled+compactBytes || len(f.old) >= compactFiles
	if f.unusable != nil || !grown && !f.untidy {
		return f.unusable
	}
	if err := f.checkRoom(); err != nil {
		return err
	}
	f.newest++
	path := filepath.Join(f.dir, fileName(f.newest))
	size, err := writeAll(path, kept.List(tally.Filter{}))
	if err != nil {
		return err
	}
	if f.current != nil {
		_ = f.current.Close() // it was synced with each write, and goes now
		f.current = nil
		f.old = append(f.old, f.number)
	}
	for _, n := range f.old {
		if err := durable.Remove(filepath.Join(f.dir, fileName(n))); err != nil {
			return err
		}
	}
	for _, n := range f.damaged {
		path := filepath.Join(f.dir, fileName(n))
		if err := os.Rename(path, path+damagedSuffix); err != nil {
			return err
		}
	}
	f.old, f.damaged, f.untidy, f.settled = []uint64{f.newest}, nil, false, size
	f.bytes.Store(size)
	return nil
}

// writeAll makes a file that is whole, or none.
func writeAll(path string, observed []*policyv1.Observation) (size int64, err error) {
	temp := path + tempSuffix
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("writing %s: %w", temp, err), os.Remove(temp))
		}
	}()
	w := bufio.NewWriterSize(file, 256<<10)
	n, err := w.Write(append([]byte(magic), formatVersion))
	size += int64(n)
	var b []byte
	for _, one := range observed {
		if err != nil {
			break
		}
		b = appendRecord(b[:0], one)
		n, err = w.Write(b)
		size += int64(n)
	}
	if err = errors.Join(err, w.Flush()); err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return 0, err
	}
	if err := os.Rename(temp, path); err != nil {
		return 0, err
	}
	return size, durable.SyncDir(filepath.Dir(path))
}

func (f *files) close() {
	if f.current != nil {
		_ = f.current.Close() // it was synced with each write
	}
}
