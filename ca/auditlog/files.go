package auditlog

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	lockName   = "lock"
	namePrefix = "audit-"
	nameSuffix = ".jsonl"
	tornSuffix = ".torn"
)

func fileName(n uint64) string { return fmt.Sprintf("%s%08d%s", namePrefix, n, nameSuffix) }

// listFiles returns the numbers of the files in dir, oldest first.
func listFiles(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []uint64
	for _, e := range entries {
		digits, ok := strings.CutSuffix(strings.TrimPrefix(e.Name(), namePrefix), nameSuffix)
		n, err := strconv.ParseUint(digits, 10, 64)
		if ok && err == nil && fileName(n) == e.Name() && e.Type().IsRegular() {
			files = append(files, n)
		}
	}
	slices.Sort(files)
	return files, nil
}

func lock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, fmt.Errorf("locking: %w", err)
	}
	return f, nil
}

// A header is the first line of a file. It is no record and not part of the chain.
type header struct {
	File  uint64 // the number of the file
	First uint64 // the number of its first record
	Chain [32]byte
}

func (h header) line() []byte {
	return fmt.Appendf(nil, `{"v":%d,"audit":"signet","file":%d,"first":%d,"chain":"%x"}`+"\n", formatVersion, h.File, h.First, h.Chain)
}

// parseHeader returns the header of a line, without its newline.
func parseHeader(line []byte) (header, error) {
	var version struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(line, &version); err != nil {
		return header{}, fmt.Errorf("%w: the file does not begin with a header", ErrMalformed)
	}
	if version.V > formatVersion {
		return header{}, fmt.Errorf("%w: version %d, this program knows up to %d", ErrNewerFormat, version.V, formatVersion)
	}
	var raw struct {
		File, First uint64
		Chain       string
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return header{}, fmt.Errorf("%w: the file does not begin with a header", ErrMalformed)
	}
	h := header{File: raw.File, First: raw.First}
	chain, err := hex.DecodeString(raw.Chain)
	copy(h.Chain[:], chain)
	// Printed again it has to be the same line: that settles what JSON leaves open.
	if err != nil || len(chain) != len(h.Chain) || h.First == 0 || h.First > maxSeq || h.File > maxSeq || !bytes.Equal(h.line(), append(bytes.Clone(line), '\n')) {
		return header{}, fmt.Errorf("%w: the file does not begin with a header", ErrMalformed)
	}
	return h, nil
}

// link continues a chain by one line, which includes its newline.
func link(chain [32]byte, line []byte) [32]byte {
	h := sha256.New()
	h.Write(chain[:])
	h.Write(line)
	h.Sum(chain[:0])
	return chain
}

// A line of a file, as scanFile hands it out.
type line struct {
	text []byte // with the newline, if it has one; only valid during the call
	end  int64  // where the next line begins
	// tooLong is set, and text cut, if the line has more than MaxRecordBytes.
	tooLong bool
}

// complete returns the text without its newline, and whether it is one whole line.
func (l line) complete() ([]byte, bool) {
	if l.tooLong {
		return l.text, false
	}
	return bytes.CutSuffix(l.text, []byte{'\n'})
}

// scanFile calls f for each line of the file at path from an offset to another; a negative to means the end of the file.
func scanFile(path string, from, to int64, f func(line) error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if to < 0 {
		info, err := file.Stat()
		if err != nil {
			return err
		}
		to = info.Size()
	}
	return scan(io.NewSectionReader(file, from, max(to-from, 0)), from, f)
}

func scan(r io.Reader, from int64, f func(line) error) error {
	br := bufio.NewReaderSize(r, MaxRecordBytes)
	at := from
	for {
		text, err := br.ReadSlice('\n')
		l := line{text: text, end: at + int64(len(text))}
		if errors.Is(err, bufio.ErrBufferFull) {
			l.tooLong = true
			l.text = bytes.Clone(text)
			for errors.Is(err, bufio.ErrBufferFull) {
				var more []byte
				more, err = br.ReadSlice('\n')
				l.end += int64(len(more))
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if l.end == at {
			return nil
		}
		at = l.end
		if ferr := f(l); ferr != nil {
			return ferr
		}
		if err != nil {
			return nil
		}
	}
}

// isFull reports whether err means that the disk, the quota or the file size limit is exhausted.
func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
