package auditlog

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// ErrLagged says that a follower was so slow that files it had not read were deleted.
var ErrLagged = errors.New("audit log has deleted records that were not read yet")

// A Filter selects records. Its zero value selects all; of the fields that are set, all have to match.
type Filter struct {
	// AfterSeq selects the records with greater numbers.
	AfterSeq uint64

	// Since and Until select by time: not before Since, before Until.
	Since, Until time.Time

	// Event selects one event, or with a final dot all that begin so: "x509svid.".
	Event string

	// Actor, Subject and Outcome select by equality.
	Actor, Subject, Outcome string
}

func (f *Filter) match(r *Record) bool {
	switch {
	case r.Seq <= f.AfterSeq,
		!f.Since.IsZero() && r.Time.Before(f.Since),
		!f.Until.IsZero() && !r.Time.Before(f.Until),
		f.Actor != "" && r.Actor != f.Actor,
		f.Subject != "" && r.Subject != f.Subject,
		f.Outcome != "" && r.Outcome != f.Outcome:
		return false
	case strings.HasSuffix(f.Event, "."):
		return strings.HasPrefix(r.Event, f.Event)
	}
	return f.Event == "" || r.Event == f.Event
}

// Search calls yield for each record that matches, oldest first, up to the newest one at the time of the call. An error
// from yield ends it and is returned as it is. Lines that are no records are passed over; then, at the end, Search returns
// an ErrMalformed that says how many there are and where the first is.
func (l *Log) Search(ctx context.Context, f Filter, yield func(Record) error) error {
	end, _ := l.durableEnd()
	return search(ctx, l.cfg.Dir, &end, f, yield)
}

// SearchDir is Log.Search for a directory whose log this process has not opened. A line that is just being written is
// left out.
func SearchDir(ctx context.Context, dir string, f Filter, yield func(Record) error) error {
	return search(ctx, dir, nil, f, yield)
}

func search(ctx context.Context, dir string, end *position, f Filter, yield func(Record) error) error {
	files, err := listFiles(dir)
	if err != nil {
		return fmt.Errorf("searching audit log: %w", err)
	}
	if f.AfterSeq != 0 && len(files) > 0 {
		first, _ := startFile(dir, files, f.AfterSeq)
		files = files[slices.Index(files, first):]
	}
	r := reader{ctx: ctx, dir: dir, filter: f, yield: yield}
	for i, n := range files {
		to := int64(-1)
		if end != nil && n > end.file {
			break
		}
		if end != nil && n == end.file {
			to = end.offset
		}
		err := r.read(n, 0, to, end == nil && i == len(files)-1)
		if notExist(err) {
			continue // deleted in the meantime, because it was the oldest
		}
		if err != nil {
			return err
		}
	}
	return r.damage()
}

// reader reads files one after the other.
type reader struct {
	ctx    context.Context
	dir    string
	filter Filter
	yield  func(Record) error

	bad   int
	first string // where the first bad line is
}

// read reads one file from an offset to another, -1 for its end. If growing is set, an incomplete last line is no fault.
func (r *reader) read(file uint64, from, to int64, growing bool) error {
	number := 0
	return scanFile(filepath.Join(r.dir, fileName(file)), from, to, func(l line) error {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		number++
		text, complete := l.complete()
		if !complete && growing && !l.tooLong {
			return nil
		}
		if number == 1 && from == 0 {
			if _, err := parseHeader(text); err == nil || errors.Is(err, ErrNewerFormat) {
				return err
			}
		}
		rec, err := parseRecord(text)
		switch {
		case errors.Is(err, ErrNewerFormat):
			return fmt.Errorf("%s, line %d: %w", fileName(file), number, err)
		case err != nil || !complete:
			if r.bad++; r.bad == 1 {
				r.first = fmt.Sprintf("%s at byte %d", fileName(file), l.end-int64(len(l.text)))
			}
			return nil
		case r.filter.match(&rec):
			return r.yield(rec)
		}
		return nil
	})
}

func (r *reader) damage() error {
	if r.bad == 0 {
		return nil
	}
	return fmt.Errorf("%w: %d lines, the first in %s", ErrMalformed, r.bad, r.first)
}

// Follow calls yield for each record that matches from now on, once it is durable, and if f.AfterSeq is set also for those
// after it that are there already. It returns when ctx ends, when yield returns an error, with ErrClosed when the log is
// closed, and with ErrLagged if yield is so slow that files were deleted before they were read. It keeps no records in
// memory: a slow yield reads later what it has not read yet.
func (l *Log) Follow(ctx context.Context, f Filter, yield func(Record) error) error {
	at, _ := l.durableEnd()
	if f.AfterSeq != 0 {
		files, err := listFiles(l.cfg.Dir)
		if err != nil {
			return fmt.Errorf("following audit log: %w", err)
		}
		first, known := startFile(l.cfg.Dir, files, f.AfterSeq)
		if !known {
			return fmt.Errorf("%w: those after %d", ErrLagged, f.AfterSeq)
		}
		at = position{file: first}
	}
	r := reader{ctx: ctx, dir: l.cfg.Dir, filter: f, yield: yield}
	for {
		end, changed := l.durableEnd()
		for at != end {
			to := int64(-1)
			if at.file == end.file {
				to = end.offset
			}
			err := r.read(at.file, at.offset, to, false)
			switch {
			case notExist(err):
				return fmt.Errorf("%w: %s", ErrLagged, fileName(at.file))
			case err != nil:
				return err
			case at.file == end.file:
				at = end
			default:
				at = position{file: at.file + 1}
			}
		}
		select {
		case <-changed:
		case <-l.finished:
			if end, _ := l.durableEnd(); at == end {
				return ErrClosed
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// startFile returns the newest file that begins no later than with the record after seq, and whether there is one. If
// there is none, it returns the oldest.
func startFile(dir string, files []uint64, seq uint64) (file uint64, known bool) {
	for _, n := range slices.Backward(files) {
		file = n
		if h, err := readHeader(dir, n); err == nil && h.First <= seq+1 {
			return n, true
		}
	}
	return file, false
}

func readHeader(dir string, file uint64) (header, error) {
	stop := errors.New("one line is enough")
	h, herr := header{}, fmt.Errorf("%w: the file is empty", ErrMalformed)
	err := scanFile(filepath.Join(dir, fileName(file)), 0, -1, func(l line) error {
		text, _ := l.complete()
		h, herr = parseHeader(text)
		return stop
	})
	if err != nil && !errors.Is(err, stop) {
		return header{}, err
	}
	return h, herr
}
