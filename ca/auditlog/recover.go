package auditlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/signet-id/signet/internal/durable"
)

// openWriter finds the end of the log, sets aside what a crash left behind it, and returns the writer that goes on there.
func (l *Log) openWriter() (*writer, error) {
	files, err := listFiles(l.cfg.Dir)
	if err != nil {
		return nil, err
	}
	w := &writer{log: l, cfg: l.cfg}
	for len(files) > 0 && w.file == nil {
		n := files[len(files)-1]
		files = files[:len(files)-1]
		if err := l.resume(w, n); err != nil {
			return nil, fmt.Errorf("file %s: %w", fileName(n), err)
		}
	}
	if w.next == 0 {
		w.next = 1
	}
	if w.file == nil {
		// Nothing to go on with: the first file, or one after damage.
		if err := w.begin(); err != nil {
			return nil, err
		}
	}
	if _, err := w.ensure(0); err != nil {
		w.file.Close()
		return nil, err
	}
	if w.full {
		l.cfg.Log.Error("the disk is full, only renewals can be logged and made", "dir", l.cfg.Dir)
	}
	return w, nil
}

// tail is what survey finds in a file.
type tail struct {
	header    header
	hasHeader bool
	newest    Checkpoint
	records   int
	good      int64 // where the last good line ends
	size      int64
	bad       []int // numbers of the lines before good that are no records, from 1; at most ten
}

// survey reads the newest file. The lines are judged by their frame, so that a large file does not hold up the start.
func survey(path string) (tail, error) {
	var t tail
	var pending []int // bad lines after which no good one has come yet
	chain := [32]byte{}
	number := 0
	err := scanFile(path, 0, -1, func(l line) error {
		number++
		t.size = l.end
		text, complete := l.complete()
		if number == 1 {
			h, err := parseHeader(text)
			if errors.Is(err, ErrNewerFormat) {
				return err
			}
			if err == nil && complete {
				t.header, t.hasHeader = h, true
				t.newest = Checkpoint{Seq: h.First - 1, Chain: h.Chain}
				t.good = l.end
				chain = h.Chain
				return nil
			}
		}
		// The chain goes over every line, whatever it is.
		chain = link(chain, l.text)
		seq, ok := frame(text)
		if !complete || !ok || t.records > 0 && seq <= t.newest.Seq {
			if _, err := parseRecord(text); errors.Is(err, ErrNewerFormat) {
				return err
			}
			if len(pending) < 10 {
				pending = append(pending, number)
			}
			return nil
		}
		t.bad = append(t.bad, pending...)
		pending = nil
		t.records++
		t.newest = Checkpoint{Seq: seq, Chain: chain}
		t.good = l.end
		return nil
	})
	return t, err
}

// frame returns the number of a record if the line begins and ends as one and has no control characters. Those are what
// blocks consist of that never reached the disk.
func frame(text []byte) (seq uint64, ok bool) {
	rest, ok := bytes.CutPrefix(text, []byte(`{"v":1,"seq":`))
	if !ok || !bytes.HasSuffix(rest, []byte{'}'}) {
		return 0, false
	}
	digits, _, ok := bytes.Cut(rest, []byte{','})
	if !ok || len(digits) > 20 {
		return 0, false
	}
	seq, err := strconv.ParseUint(string(digits), 10, 64)
	if err != nil || seq == 0 || seq > maxSeq || digits[0] == '0' || digits[0] == '+' {
		return 0, false
	}
	for _, c := range text {
		if c < 0x20 {
			return 0, false
		}
	}
	return seq, true
}

// maxTorn is the most that a crash can leave unfinished, one group. More than that was in part acknowledged.
const maxTorn = maxCallBytes + maxGroupBytes + MaxAppend*maxHead

// resume makes w go on at the end of file n. If that file is of no use for it, w gets no file.
func (l *Log) resume(w *writer, n uint64) error {
	path := filepath.Join(l.cfg.Dir, fileName(n))
	t, err := survey(path)
	if err != nil {
		return err
	}
	torn := t.size - t.good
	if torn > 0 && torn <= maxTorn {
		if err := setAside(path, t.good, t.size); err != nil {
			return err
		}
		l.cfg.Log.Warn("set aside the end of an audit log file that a crash cut off, it was never acknowledged",
			"file", path, "bytes", torn, "to", path+tornSuffix)
	}
	switch {
	case !t.hasHeader && t.records == 0 && torn <= maxTorn:
		// The crash came while the file was begun.
		w.next = n
		return durable.Remove(path)
	case !t.hasHeader || t.header.File != n || len(t.bad) > 0 || torn > maxTorn:
		l.cfg.Log.Error("an audit log file is damaged, it is left as it is and a new one begun", "file", path, "lines", t.bad,
			"header_damaged", !t.hasHeader || t.header.File != n, "end_damaged_bytes", torn)
		w.newest = t.newest
		w.next = n + 1
		return w.begin()
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	w.file, w.newest, w.at, w.next = file, t.newest, position{file: n, offset: t.good}, n+1
	return nil
}

// setAside moves what follows good in the file to another file, so that nothing is lost that might explain the crash.
func setAside(path string, good, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	torn, err := io.ReadAll(io.NewSectionReader(f, good, size-good))
	if err != nil {
		return err
	}
	if err := durable.WriteFile(path+tornSuffix, torn, 0o600); err != nil && !isFull(err) {
		return err
	}
	if err := f.Truncate(good); err != nil {
		return err
	}
	return f.Sync()
}
