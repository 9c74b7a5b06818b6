package auditlog

import (
	"context"
	"fmt"
	"path/filepath"
)

// Verify reads the whole log in dir and returns its newest state if every line is a record, the numbers have no gaps, the
// chain holds from file to file, and the log passes through each of the known checkpoints. Otherwise the error says which
// file and line is the first that does not fit.
//
// Where the log begins is taken from the oldest file: a checkpoint from before that is an error that says so. Verify must
// not run beside a process that writes the log; Log.Verify may.
func Verify(ctx context.Context, dir string, known ...Checkpoint) (Checkpoint, error) {
	return verify(ctx, dir, nil, known)
}

// Verify is the function Verify for an open log, up to the newest record at the time of the call.
func (l *Log) Verify(ctx context.Context, known ...Checkpoint) (Checkpoint, error) {
	end, _ := l.durableEnd()
	return verify(ctx, l.cfg.Dir, &end, known)
}

func verify(ctx context.Context, dir string, end *position, known []Checkpoint) (Checkpoint, error) {
	files, err := listFiles(dir)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("verifying audit log: %w", err)
	}
	want := map[uint64]Checkpoint{}
	for _, c := range known {
		if old, ok := want[c.Seq]; ok && old != c {
			return Checkpoint{}, fmt.Errorf("verifying audit log: two checkpoints for record %d differ", c.Seq)
		}
		want[c.Seq] = c
	}
	var at Checkpoint
	pass := func() error {
		c, ok := want[at.Seq]
		if ok && c.Chain != at.Chain {
			return fmt.Errorf("%w: up to record %d it is not what it was at the checkpoint", ErrMalformed, at.Seq)
		}
		delete(want, at.Seq)
		return nil
	}
	for i, n := range files {
		to := int64(-1)
		if end != nil && n > end.file {
			break
		}
		if end != nil && n == end.file {
			to = end.offset
		}
		number := 0
		err := scanFile(filepath.Join(dir, fileName(n)), 0, to, func(l line) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			number++
			text, complete := l.complete()
			if !complete {
				return fmt.Errorf("line %d: %w: it is cut off or too long", number, ErrMalformed)
			}
			if number == 1 {
				h, err := parseHeader(text)
				switch {
				case err != nil:
					return err
				case h.File != n:
					return fmt.Errorf("%w: its header says that it is file %d", ErrMalformed, h.File)
				case i == 0:
					at = Checkpoint{Seq: h.First - 1, Chain: h.Chain}
				case h.First != at.Seq+1 || h.Chain != at.Chain:
					return fmt.Errorf("%w: it does not continue the file before it", ErrMalformed)
				}
				return pass()
			}
			r, err := parseRecord(text)
			if err != nil {
				return fmt.Errorf("line %d: %w", number, err)
			}
			if r.Seq != at.Seq+1 {
				return fmt.Errorf("line %d: %w: record %d follows record %d", number, ErrMalformed, r.Seq, at.Seq)
			}
			at = Checkpoint{Seq: r.Seq, Chain: link(at.Chain, l.text)}
			if err := pass(); err != nil {
				return fmt.Errorf("line %d: %w", number, err)
			}
			return nil
		})
		if err == nil && number == 0 {
			err = fmt.Errorf("%w: it is empty", ErrMalformed)
		}
		if err != nil {
			return Checkpoint{}, fmt.Errorf("verifying audit log file %s: %w", fileName(n), err)
		}
	}
	for seq := range want {
		return Checkpoint{}, fmt.Errorf("verifying audit log: %w: the checkpoint at record %d is outside of it, it ends at record %d", ErrMalformed, seq, at.Seq)
	}
	return at, nil
}
