package auditlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/durable"
)

const (
	// maxHead is the longest beginning of a line: {"v":1,"seq": and a number.
	maxHead = 13 + 20

	// allocStep is how much is asked of the file system at a time. The first steps that fit are kept even when the whole
	// does not.
	allocStep = 1 << 20

	// allocExtra is asked for beyond what is needed, so that not every group has to ask.
	allocExtra = 4 << 20

	// retryFull is the pause between two looks for room on a full disk.
	retryFull = time.Second

	// rotateAgain is by how much a file grows before the next attempt to begin a new one for which there was no room.
	rotateAgain = 8 << 20
)

// A request is one Append on its way through the writer.
type request struct {
	class Class
	body  *[]byte // the lines without their beginnings
	ends  []int   // where each of them ends
	done  chan error
}

// size bounds what the request takes in the file.
func (r *request) size() int64 { return int64(len(*r.body) + len(r.ends)*maxHead) }

// writer owns the newest file. All its fields belong to the goroutine in run.
type writer struct {
	log  *Log
	cfg  Config
	file *os.File
	next uint64 // the number of the next file

	at     position   // the end of the file, all of it durable
	newest Checkpoint // at that end

	allocated int64 // every byte of the file below has a block
	blind     bool  // the file system cannot allocate ahead
	full      bool  // the reserve is not complete
	broken    error
	rotateAt  int64 // do not try to begin a new file before this size

	buf []byte
}

func (w *writer) run() {
	l := w.log
	defer close(l.finished)
	defer func() { l.closeErr = w.file.Close() }()
	var held *request // taken from the queue, but too large for the group before it
	for {
		first := held
		held = nil
		for first == nil {
			var retry <-chan time.Time
			if w.full && w.broken == nil {
				retry = time.After(retryFull)
			}
			select {
			case first = <-l.queue:
			case <-retry:
				w.look()
			case <-l.closing:
				select {
				case first = <-l.queue:
				default:
					return
				}
			}
		}
		var group []*request
		group, held = w.gather(first)
		w.commit(group)
	}
}

// look tries to fill up the reserve while nothing is written.
func (w *writer) look() {
	if _, err := w.ensure(0); err != nil {
		w.fail(err)
	}
	w.log.publish(w)
}

// gather takes what is waiting already. It does not wait for more: while one group is synced, the next one queues up.
func (w *writer) gather(first *request) (group []*request, held *request) {
	group = []*request{first}
	size := first.size()
	for {
		select {
		case r := <-w.log.queue:
			size += r.size()
			if size > maxGroupBytes {
				return group, r
			}
			group = append(group, r)
		default:
			return group, nil
		}
	}
}

// commit writes the group and answers each request.
func (w *writer) commit(group []*request) {
	answers := make([]error, len(group))
	if err := w.write(group, answers); err != nil {
		for i := range answers {
			answers[i] = err
		}
	}
	// First visible, then acknowledged: who saw the answer finds the record.
	w.log.publish(w)
	for i, r := range group {
		w.log.recycle(r.body)
		r.done <- answers[i]
	}
}

// write makes the group durable, except for the requests to which it gives an answer.
func (w *writer) write(group []*request, answers []error) error {
	if w.broken != nil {
		return w.broken
	}
	if err := w.rotate(); err != nil {
		return w.fail(err)
	}
	var need int64
	for _, r := range group {
		need += r.size()
	}
	free, err := w.ensure(need)
	if err != nil {
		return w.fail(err)
	}
	w.buf = w.buf[:0]
	newest := w.newest
	var used int64
	for i, r := range group {
		limit := free
		if r.class != Essential {
			limit -= w.cfg.Reserve
		}
		if used += r.size(); used > limit {
			used -= r.size()
			answers[i] = ErrDisk
			continue
		}
		start := 0
		for _, end := range r.ends {
			from := len(w.buf)
			newest.Seq++
			w.buf = appendHead(w.buf, newest.Seq)
			w.buf = append(w.buf, (*r.body)[start:end]...)
			newest.Chain = link(newest.Chain, w.buf[from:])
			start = end
		}
	}
	if len(w.buf) == 0 {
		return nil
	}
	if _, err := w.file.WriteAt(w.buf, w.at.offset); err != nil {
		return w.undo(err)
	}
	if err := datasync(w.file); err != nil {
		// Asking again gives no truer answer: the kernel forgets the failure.
		return w.fail(err)
	}
	w.at.offset += int64(len(w.buf))
	w.newest = newest
	if cap(w.buf) > 2*maxGroupBytes {
		w.buf = nil
	}
	return nil
}

// undo takes back a write that did not fit.
func (w *writer) undo(err error) error {
	if !isFull(err) {
		return w.fail(err)
	}
	w.setFull(true)
	if err := w.file.Truncate(w.at.offset); err != nil {
		return w.fail(err)
	}
	w.allocated = w.at.offset // what was beyond is gone
	if err := w.file.Sync(); err != nil {
		return w.fail(err)
	}
	return ErrDisk
}

// fail stops the log for good.
func (w *writer) fail(err error) error {
	if w.broken == nil {
		w.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		w.cfg.Log.Error("the audit log has stopped, and with it all issuance", "dir", w.cfg.Dir, "err", err)
	}
	return w.broken
}

// health is what Log.Health returns.
func (w *writer) health() error {
	switch {
	case w.broken != nil:
		return w.broken
	case w.full:
		return fmt.Errorf("audit log %s: %w", w.cfg.Dir, ErrDisk)
	}
	return nil
}

// ensure tries to have need bytes and the reserve allocated beyond the end, and returns how much really is.
func (w *writer) ensure(need int64) (free int64, err error) {
	need += w.cfg.Reserve
	if free, err = w.allocate(need); err == nil {
		w.setFull(free < need)
	}
	return free, err
}

// allocate tries to have need bytes allocated beyond the end, and returns how much really is. A full disk is no error.
func (w *writer) allocate(need int64) (free int64, err error) {
	if w.blind {
		return need, nil
	}
	want := w.at.offset + need
	w.allocated = max(w.allocated, w.at.offset)
	for w.allocated < want {
		step := min(allocStep, want+allocExtra-w.allocated)
		err := fallocate(w.file, w.allocated, step)
		switch {
		case err == nil:
			w.allocated += step
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			w.blind = true
			w.cfg.Log.Warn("the file system cannot allocate ahead, renewals have no reserve when the disk is full", "dir", w.cfg.Dir)
			return need, nil
		case isFull(err):
			return w.allocated - w.at.offset, nil
		default:
			return 0, err
		}
	}
	return w.allocated - w.at.offset, nil
}

func (w *writer) setFull(full bool) {
	if full && !w.full {
		w.cfg.Log.Error("the disk is full, only renewals can be logged and made", "dir", w.cfg.Dir)
	}
	if !full && w.full {
		w.cfg.Log.Info("the audit log has its reserve again", "dir", w.cfg.Dir)
	}
	w.full = full
}

// fallocate gives the file blocks without changing its size, so that the end of the file stays the end of the log.
func fallocate(f *os.File, off, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, off, n)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func datasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// rotate begins a new file if the present one is large and there is room for the reserve of a new one.
func (w *writer) rotate() error {
	if w.at.offset < max(w.cfg.MaxFileBytes, w.rotateAt) || w.full {
		return nil
	}
	old := *w
	err := w.begin()
	if isFull(err) {
		*w = old
		w.rotateAt = w.at.offset + rotateAgain
		return nil
	}
	if err != nil {
		*w = old
		return err
	}
	// Gives back the blocks beyond the end. The lines are synced, so no failure here can lose one.
	if err := errors.Join(old.file.Truncate(old.at.offset), old.file.Close()); err != nil {
		w.cfg.Log.Warn("the old audit log file keeps its reserve", "file", fileName(old.at.file), "err", err)
	}
	if err := w.prune(); err != nil {
		w.cfg.Log.Warn("the oldest audit log files are not deleted", "dir", w.cfg.Dir, "keep", w.cfg.Keep, "err", err)
	}
	return nil
}

// begin makes a new file with its header and its reserve and goes on there.
func (w *writer) begin() (err error) {
	h := header{File: w.next, First: w.newest.Seq + 1, Chain: w.newest.Chain}
	path := filepath.Join(w.cfg.Dir, fileName(h.File))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	first := w.file == nil
	w.file, w.allocated, w.rotateAt = f, 0, 0
	w.at = position{file: h.File}
	defer func() {
		if err != nil {
			f.Close()
			err = errors.Join(err, durable.Remove(path))
		}
	}()
	line := h.line()
	need := int64(len(line)) + w.cfg.Reserve
	if free, err := w.allocate(need); err != nil {
		return err
	} else if free < need && !first {
		return unix.ENOSPC // the old file is complete and has its reserve
	}
	if _, err := f.Write(line); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	w.at.offset = int64(len(line))
	w.next++
	return durable.SyncDir(w.cfg.Dir)
}

// prune deletes the oldest files.
func (w *writer) prune() error {
	if w.cfg.Keep < 0 {
		return nil
	}
	files, err := listFiles(w.cfg.Dir)
	if err != nil {
		return err
	}
	for len(files) > max(w.cfg.Keep, 1) {
		path := filepath.Join(w.cfg.Dir, fileName(files[0]))
		if err := durable.Remove(path); err != nil {
			return err
		}
		w.cfg.Log.Info("deleted the oldest audit log file", "file", path)
		files = files[1:]
	}
	return nil
}
