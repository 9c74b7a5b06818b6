package sealed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/durable"
)

const (
	// A log is begun anew when it is longer than minGrown and growth times what it began with.
	minGrown = 4 << 20
	growth   = 3

	// The counter of a TPM is in a memory that wears: maxCredit increments may come at once, and one an hour in the long run,
	// which is 8760 a year.
	maxCredit   = 16
	creditEvery = time.Hour

	// finalWait bounds what the last write may wait for the key's holder.
	finalWait = 3 * time.Second
)

// A logFile is the log that is appended to.
type logFile struct {
	file       *os.File
	sealer     *logSealer
	owner      spiffeid.ID
	generation uint64
	length     uint64
	began      uint64 // its length when it held everything once
}

// credit bounds increments. It counts on the steady clock.
type credit struct {
	left int
	at   time.Time
}

func (c *credit) take() bool {
	if n := int(time.Since(c.at) / creditEvery); n > 0 {
		c.left, c.at = min(c.left+n, maxCredit), c.at.Add(time.Duration(n)*creditEvery)
	}
	if c.left == 0 {
		return false
	}
	c.left--
	return true
}

// Run writes what is new until ctx ends, and then once more.
func (s *Store) Run(ctx context.Context) error {
	defer s.closeLog()
	timer := time.NewTimer(0)
	defer timer.Stop()
	wrote, wait := time.Now().Add(-spacing), retryMin
	var retryAt time.Time
	for {
		select {
		case <-s.wake:
		case <-timer.C:
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), finalWait)
			defer cancel()
			s.attempt(last)
			return nil
		}
		at := s.due(wrote)
		if at.Before(retryAt) {
			at = retryAt
		}
		if left := time.Until(at); left > 0 {
			timer.Reset(left)
			continue
		}
		bounded, cancel := context.WithTimeout(ctx, openWait)
		err := s.attempt(bounded)
		cancel()
		wrote = time.Now()
		if err != nil {
			retryAt = wrote.Add(wait/2 + rand.N(wait))
			wait = min(2*wait, retryMax)
		} else {
			retryAt, wait = time.Time{}, retryMin
		}
		timer.Reset(time.Until(s.due(wrote)))
	}
}

// due says when the next write is to be.
func (s *Store) due(wrote time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, apart := wrote.Add(heartbeat), spacing
	switch {
	case s.since.IsZero():
	case s.pressing:
		at, apart = s.since, pressing
	case s.urgent:
		at = s.since.Add(soon)
	default:
		at = s.since.Add(later)
	}
	if earliest := wrote.Add(apart); at.Before(earliest) {
		at = earliest
	}
	return at
}

// attempt writes what is new, and says once that this fails, and once that it is well again.
func (s *Store) attempt(ctx context.Context) error {
	s.mu.Lock()
	changes := take{records: s.pending, reset: s.reset, weighty: s.weighty, owner: s.owner}
	since, urgent, pressed := s.since, s.urgent, s.pressing
	s.writing = since
	s.pending, s.reset, s.weighty, s.urgent, s.pressing, s.since = make(records), false, false, false, false, time.Time{}
	changes.contact, changes.seen = s.times()
	s.mu.Unlock()

	err := s.write(ctx, &changes)
	stopping := errors.Is(err, context.Canceled) // the last write follows
	news := !stopping && s.fail(err)
	switch {
	case err != nil && news:
		s.config.Log.Error("the sealed cache is not up to date on disk; what was written before stays, and the agent goes on and keeps trying", "err", err)
	case err == nil && news:
		s.config.Log.Info("the sealed cache is up to date on disk again")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = time.Time{}
	if err != nil {
		s.weighty, s.urgent, s.pressing = s.weighty || changes.weighty, s.urgent || urgent, s.pressing || pressed
		if s.since.IsZero() || !since.IsZero() && since.Before(s.since) {
			s.since = since
		}
		if s.since.IsZero() {
			s.since = time.Now()
		}
	} else {
		s.weighty = s.weighty || changes.owed
		if s.since.IsZero() {
			s.written = time.Now()
		}
	}
	return err
}

// A take is what was pending.
type take struct {
	records
	reset, weighty bool
	owed           bool // weighty, and not counted yet
	owner          spiffeid.ID
	contact, seen  time.Time
}

// merge brings t into what is held and returns what that changed.
func (s *Store) merge(t *take) []recordKey {
	var changed []recordKey
	if t.reset {
		for k := range s.held {
			if _, named := t.records[k]; !named && replacedBySnapshot(k.kind) {
				delete(s.held, k)
				changed = append(changed, k)
			}
		}
	}
	for k, value := range t.records {
		old, ok := s.held[k]
		switch {
		case value == nil && !ok, value != nil && ok && string(old) == string(value):
			continue
		case value == nil:
			delete(s.held, k)
		default:
			s.held[k] = value
		}
		changed = append(changed, k)
	}
	return changed
}

// write puts t on disk: as frames behind the others, or everything in a new log. After an error the next write begins a
// new one, since a log is not appended to after a write that may have been done in part.
func (s *Store) write(ctx context.Context, t *take) (err error) {
	changed := s.merge(t)
	if _, err := s.openKey(ctx); err != nil {
		return fmt.Errorf("the key cannot be opened: %w", err)
	}
	if _, ok := s.held[recordKey{kindState, ""}]; !ok || t.owner.IsZero() {
		return nil // there is nothing yet that a restart could use
	}
	old := s.log
	defer func() {
		if old != nil && old != s.log {
			old.file.Close() // it is on disk, and of no more use
		}
		if err != nil {
			s.closeLog()
		}
		if errors.Is(err, fs.ErrNotExist) {
			s.holder = nil // a file of its key may be gone with the directory
		}
	}()
	anew := s.log == nil || s.log.owner != t.owner || s.log.length > minGrown && s.log.length > growth*s.log.began
	if !anew {
		if err := s.appendLog(changed); err != nil && !errors.Is(err, errFull) {
			return err
		} else if err != nil {
			anew = true
		}
	}
	if anew {
		if err := s.beginLog(t.owner); err != nil {
			return err
		}
		t.weighty = t.weighty || old == nil
	}
	if err := s.writeHead(ctx, t); err != nil {
		return err
	}
	if old != s.log {
		return s.removeOtherLogs()
	}
	return nil
}

func (s *Store) closeLog() {
	if s.log != nil {
		s.log.file.Close() // what counts of it is synced
		s.log = nil
	}
}

// seal returns the frames for the given records.
func (s *Store) seal(l *logSealer, out []byte, keys func(func(recordKey) bool)) (_ []byte, err error) {
	var frame []byte
	flush := func() {
		if len(frame) > 0 && err == nil {
			out, err = l.seal(out, frame)
		}
		clear(frame)
		frame = frame[:0]
	}
	for k := range keys {
		frame = appendRecord(frame, k, s.held[k])
		if len(frame) >= frameBytes {
			flush()
		}
		if err == nil && len(out) > maxLogBytes {
			err = fmt.Errorf("the cache would have more than the %d bytes allowed", maxLogBytes)
		}
		if err != nil {
			return nil, err
		}
	}
	flush()
	return out, err
}

// beginLog writes everything to a new log.
func (s *Store) beginLog(agent spiffeid.ID) (err error) {
	if err := durable.MkdirPrivate(s.dir()); err != nil {
		return err
	}
	if err := durable.CleanTemp(s.dir()); err != nil {
		return err
	}
	generations, err := s.generations()
	if err != nil {
		return err
	}
	next := &logFile{owner: agent, generation: slices.Max(append(generations, 0)) + 1}
	var data []byte
	if next.sealer, data, err = newLogSealer(s.holder.secret(), s.ownerOf(agent.String()), next.generation); err != nil {
		return err
	}
	data, err = s.seal(next.sealer, data, func(yield func(recordKey) bool) {
		for k := range s.held {
			if !yield(k) {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	path := s.logPath(next.generation)
	if next.file, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			next.file.Close()
			os.Remove(path)
		}
	}()
	if _, err := next.file.Write(data); err != nil {
		return err
	}
	if err := next.file.Sync(); err != nil {
		return err
	}
	if err := durable.SyncDir(s.dir()); err != nil {
		return err
	}
	next.length, next.began = uint64(len(data)), uint64(len(data))
	s.log = next
	return nil
}

// appendLog writes what has changed behind the rest.
func (s *Store) appendLog(changed []recordKey) error {
	if len(changed) == 0 {
		return nil
	}
	data, err := s.seal(s.log.sealer, nil, slices.Values(changed))
	if err != nil {
		return err
	}
	if s.log.length+uint64(len(data)) > maxLogBytes {
		return errFull
	}
	if _, err := s.log.file.Write(data); err != nil {
		return err
	}
	if err := s.log.file.Sync(); err != nil {
		return err
	}
	s.log.length += uint64(len(data))
	return nil
}

// writeHead makes what the log has count. With a counter, a weighty change is also counted, after the head that says so is on
// disk: a crash in between leaves a head that is one ahead, and that is the newest one.
func (s *Store) writeHead(ctx context.Context, t *take) error {
	c := s.holder.counter()
	count := c != nil && t.weighty && s.credit.take()
	t.owed = c != nil && t.weighty && !count
	h := &head{
		generation: s.log.generation, logSalt: s.log.sealer.salt, logLength: s.log.length, frames: s.log.sealer.frames,
		counter: s.counted, contact: t.contact, seen: t.seen, schema: schema(),
	}
	if count {
		h.counter++
	}
	if err := s.putHead(h, t.owner); err != nil || !count {
		return err
	}
	n, err := c.increment(ctx)
	if err != nil {
		// Whether the TPM has counted is not known; it is asked.
		if n, err = c.read(ctx); err != nil {
			return fmt.Errorf("counting in the TPM: %w", err)
		}
	}
	s.counted = n
	if n == h.counter {
		return nil
	}
	t.owed = n < h.counter
	h.counter = n // it did not count, or somebody else did
	return s.putHead(h, t.owner)
}

func (s *Store) putHead(h *head, agent spiffeid.ID) error {
	data, err := sealHead(s.holder.secret(), s.ownerOf(agent.String()), h)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(s.dir(), headFile), data, 0o600)
}

// removeOtherLogs removes what no head speaks of any more.
func (s *Store) removeOtherLogs() error {
	generations, err := s.generations()
	if err != nil {
		return err
	}
	for _, g := range generations {
		if g != s.log.generation {
			if err := os.Remove(s.logPath(g)); err != nil {
				return err
			}
		}
	}
	return nil
}
