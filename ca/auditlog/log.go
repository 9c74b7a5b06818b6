// Package auditlog records every issuance and every administrative act of a CA in files of JSON lines.
//
// The CA's packages call Append before what they record leaves: it returns only when the record is on the disk, so what
// is out is always in the log. Callers that come at the same time share one sync. A part of the disk is kept allocated
// for the renewals of existing identities (class Essential); on a full disk everything else is refused, and when the
// reserve is spent, that too: nothing is issued unlogged. The package never holds secrets and never deletes a line, except
// with the oldest file when there are more than Config.Keep.
//
// Files are named audit-00000001.jsonl and so on. The first line of each says how it continues the one before: the number
// of its first record and the chain, a SHA-256 over all lines before it. What a crash left of an unfinished group is moved
// to audit-00000001.torn when the log is opened.
package auditlog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/signet-id/signet/internal/durable"
)

// Defaults for the zero values of Config.
const (
	DefaultReserve      = 64 << 20
	DefaultMaxFileBytes = 64 << 20
	DefaultKeep         = 160
)

var (
	// ErrDisk says that the disk is too full for records of this class.
	ErrDisk = errors.New("no room left for the audit log, free some disk space")

	// ErrLocked says that another process writes this log.
	ErrLocked = errors.New("audit log is in use (is another CA running on this data directory?)")

	// ErrBroken says that the disk failed and it is unknown which records are on it. The log has to be opened again.
	ErrBroken = errors.New("audit log has stopped after a disk failure, restart the CA once the disk is well")

	// ErrTooLarge says that a record or a call is over the limits.
	ErrTooLarge = errors.New("audit record is too large")

	// ErrClosed says that the log was closed.
	ErrClosed = errors.New("audit log is closed")
)

// Class says what a record may use of a full disk.
type Class int

const (
	// New is for all that can wait until there is room again: new identities, administrative acts.
	New Class = iota

	// Essential is for renewals of identities that exist already.
	Essential
)

const (
	// MaxAppend is the largest number of records in one Append.
	MaxAppend = 10_000

	// maxQueued bounds the calls that wait for the writer. Further callers wait for a place.
	maxQueued = 1024

	// maxGroupBytes bounds what shares one sync; a single call may be larger, up to maxCallBytes.
	maxGroupBytes = 4 << 20
	maxCallBytes  = 16 << 20
)

// Config says where the log is and how much room it takes: at most Keep files of MaxFileBytes, and the reserve, which
// counts twice for a moment when a new file is begun.
type Config struct {
	// Dir holds the files and nothing else. It is made, with mode 0700, if it does not exist.
	Dir string

	// Reserve is the room in bytes that is kept for Essential records. Zero means DefaultReserve.
	Reserve int64

	// MaxFileBytes is the size at which a new file is begun. While the disk is too full for the reserve of a new file, the
	// old one grows on. Zero means DefaultMaxFileBytes.
	MaxFileBytes int64

	// Keep is the number of files, of which the oldest are deleted. Zero means DefaultKeep, a negative value all.
	Keep int

	// Now is the clock for records without a time. Nil means time.Now.
	Now func() time.Time

	// Log gets what an operator should know. Nil means slog.Default.
	Log *slog.Logger
}

func (c *Config) check() error {
	if c.Dir == "" {
		return errors.New("no directory is given")
	}
	if c.Reserve < 0 || c.MaxFileBytes < 0 {
		return fmt.Errorf("a reserve of %d or a file size of %d bytes is negative", c.Reserve, c.MaxFileBytes)
	}
	if c.Reserve == 0 {
		c.Reserve = DefaultReserve
	}
	if c.MaxFileBytes == 0 {
		c.MaxFileBytes = DefaultMaxFileBytes
	}
	if c.Keep == 0 {
		c.Keep = DefaultKeep
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return nil
}

// Log is an open audit log. Its methods may be called from any number of goroutines.
type Log struct {
	cfg      Config
	lockFile *os.File
	buffers  sync.Pool // of *[]byte

	queue    chan *request
	closing  chan struct{} // closed by Close
	finished chan struct{} // closed by the writer at its end
	once     sync.Once
	closeErr error

	mu      sync.Mutex // guards all below; held only for memory operations
	end     position   // all before is durable
	newest  Checkpoint
	changed chan struct{} // closed and replaced when end moves
	health  error
}

// Checkpoint names one state of the log. Who keeps one can prove later that the log up to Seq was not changed.
type Checkpoint struct {
	// Seq is the number of the last record. 0 is the empty log.
	Seq uint64

	// Chain is the SHA-256 of the chain before the last line and that line with its newline; for the empty log, zeros.
	Chain [32]byte
}

// Open opens the log in cfg.Dir, or begins one. It reads the newest file as a whole.
//
// A last line that a crash cut off was never acknowledged: it is set aside in a .torn file, and the log goes on before
// it. Lines in the middle that are not records are left where they are and reported to cfg.Log.
func Open(cfg Config) (*Log, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("opening audit log: %w", err)
	}
	if err := durable.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening audit log: %w", err)
	}
	lockFile, err := lock(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("opening audit log %s: %w", cfg.Dir, err)
	}
	l := &Log{
		cfg:      cfg,
		lockFile: lockFile,
		buffers:  sync.Pool{New: func() any { return new([]byte) }},
		queue:    make(chan *request, maxQueued),
		closing:  make(chan struct{}),
		finished: make(chan struct{}),
		changed:  make(chan struct{}),
	}
	w, err := l.openWriter()
	if err != nil {
		lockFile.Close()
		if isFull(err) {
			err = fmt.Errorf("%w: %w", ErrDisk, err)
		}
		return nil, fmt.Errorf("opening audit log %s: %w", cfg.Dir, err)
	}
	l.publish(w)
	go w.run()
	return l, nil
}

// Append writes the records, in order and next to each other, and returns when they are on the disk. A batch is one
// write and one sync, shared with the callers of the same moment.
//
// Errors: ErrDisk (see Class), ErrInvalid, ErrTooLarge, ErrBroken, ErrClosed. Except after ErrBroken nothing was written.
// When ctx ends before the answer is there, Append returns its error, and the records may still be written: the caller
// must not act on them, and the log then holds an act that did not happen, never the reverse.
func (l *Log) Append(ctx context.Context, class Class, records ...Record) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(records) == 0 {
		return nil
	}
	r, err := l.encode(records)
	if err != nil {
		return fmt.Errorf("writing audit log: %w", err)
	}
	r.class = class
	if err := l.send(ctx, r); err != nil {
		return fmt.Errorf("writing audit log: %w", err)
	}
	return nil
}

// encode makes the lines, without their beginnings, in the caller's goroutine: the writer is one, callers are many.
func (l *Log) encode(records []Record) (*request, error) {
	if len(records) > MaxAppend {
		return nil, fmt.Errorf("%w: %d records in one call, at most %d", ErrTooLarge, len(records), MaxAppend)
	}
	now := l.cfg.Now()
	buf := l.buffers.Get().(*[]byte)
	r := &request{body: buf, ends: make([]int, 0, len(records)), done: make(chan error, 1)}
	body := (*buf)[:0]
	for i := range records {
		start := len(body)
		var err error
		if body, err = appendBody(body, &records[i], now); err == nil && len(body)-start > MaxRecordBytes-maxHead {
			err = fmt.Errorf("%w: %d bytes for event %.40q, at most %d", ErrTooLarge, len(body)-start, records[i].Event, MaxRecordBytes-maxHead)
		}
		if err == nil && len(body) > maxCallBytes {
			err = fmt.Errorf("%w: more than %d bytes in one call", ErrTooLarge, maxCallBytes)
		}
		if err != nil {
			l.recycle(buf)
			return nil, err
		}
		r.ends = append(r.ends, len(body))
	}
	*buf = body
	return r, nil
}

// recycle gives a buffer back, unless it has become so large that it should not stay.
func (l *Log) recycle(buf *[]byte) {
	if cap(*buf) <= 1<<20 {
		l.buffers.Put(buf)
	}
}

func (l *Log) send(ctx context.Context, r *request) error {
	select {
	case <-l.closing:
		return ErrClosed
	default:
	}
	select {
	case l.queue <- r:
	case <-l.closing:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-r.done:
		return err
	case <-l.finished:
		// The writer has ended. It answered this request before, or it never saw it.
		select {
		case err := <-r.done:
			return err
		default:
			return ErrClosed
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Health returns nil if the log takes every record, ErrDisk if it takes only Essential ones or none, and ErrBroken after
// a disk failure. While the disk is full, the log looks for room once a second.
func (l *Log) Health() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.health
}

// Checkpoint returns the newest durable state.
func (l *Log) Checkpoint() Checkpoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.newest
}

// publish makes what w has made durable visible to readers.
func (l *Log) publish(w *writer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.health = w.health()
	if l.end == w.at && l.newest == w.newest {
		return
	}
	l.end, l.newest = w.at, w.newest
	close(l.changed)
	l.changed = make(chan struct{})
}

// durableEnd returns up to where the log is durable, and a channel that is closed when that changes.
func (l *Log) durableEnd() (position, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end, l.changed
}

// Close writes what is waiting, ends all followers with ErrClosed and closes the files. The reserve stays allocated, so that
// it is there after a restart on a full disk.
func (l *Log) Close() error {
	l.once.Do(func() {
		close(l.closing)
		<-l.finished
		l.closeErr = errors.Join(l.closeErr, l.lockFile.Close())
	})
	return l.closeErr
}

// A position is a place in the log: a file and an offset in it.
type position struct {
	file   uint64
	offset int64
}
