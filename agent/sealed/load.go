package sealed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/signet-id/signet/internal/durable"
)

const (
	cacheDir  = "cache"
	headFile  = "head"
	logPrefix = "log."
	// maxAside is how many refused caches are kept for an operator to look at.
	maxAside = 3
)

var (
	// errUnread means that the disk or the key does not answer, which says nothing about the cache.
	errUnread = errors.New("it cannot be read")
	// errTooOld means that the cache is sound, and that the CA was not there for too long.
	errTooOld = errors.New("it is too old")
)

func (s *Store) dir() string { return filepath.Join(s.config.Dir, cacheDir) }

func (s *Store) ownerOf(agent string) owner {
	return owner{kind: s.config.Key.kind(), trustDomain: s.config.TrustDomain.Name(), agent: agent}
}

// load opens the key and reads the cache. Without one there are neither Contents nor an error.
func (s *Store) load(ctx context.Context) (*Contents, error) {
	made, err := s.openKey(ctx)
	if err != nil {
		return nil, err
	}
	if s.config.Agent.IsZero() {
		return nil, nil // whose is it? Nobody's who is here.
	}
	data, err := durable.ReadSecret(filepath.Join(s.dir(), headFile), maxHeadBytes)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, durable.ErrTooLarge), errors.Is(err, durable.ErrExposed):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errUnread, err)
	}
	if made {
		s.config.Log.Warn("the sealed cache cannot be opened any more and is removed: the key that sealed it is gone; the agent begins afresh", "key", s.config.Key.kind())
		return nil, os.RemoveAll(s.dir())
	}
	return s.read(ctx, data)
}

// openKey opens the key, if it is not open, and reads the counter.
func (s *Store) openKey(ctx context.Context) (made bool, err error) {
	if s.holder != nil {
		return false, nil
	}
	holder, made, err := s.config.Key.open(ctx, s.config.Dir)
	if err != nil {
		return false, err
	}
	if c := holder.counter(); c != nil {
		if s.counted, err = c.read(ctx); err != nil {
			return false, err
		}
	}
	s.holder = holder
	return made, nil
}

// read opens head and log.
func (s *Store) read(ctx context.Context, data []byte) (*Contents, error) {
	owner := s.ownerOf(s.config.Agent.String())
	h, err := openHead(s.holder.secret(), owner, data)
	if err != nil {
		return nil, err
	}
	if err := s.checkCounter(ctx, h); err != nil {
		return nil, err
	}
	log, err := durable.ReadSecret(s.logPath(h.generation), maxLogBytes)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, durable.ErrTooLarge), errors.Is(err, durable.ErrExposed):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errUnread, err)
	}
	held := make(records)
	if err := readLog(s.holder.secret(), owner, h, log, held.take); err != nil {
		return nil, err
	}
	state, svids, err := held.unfold()
	if err != nil {
		return nil, err
	}
	now := s.config.Now()
	latest := now
	if h.seen.After(now) {
		latest = h.seen
	}
	if offline := latest.Sub(h.contact); offline > s.config.MaxOffline {
		return nil, fmt.Errorf("%w: there was contact with the CA last at %s, and max_offline is %s", errTooOld, h.contact.UTC(), s.config.MaxOffline)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held, s.defaults, s.position = held, state.PolicyDefaults, state.Position
	s.last, s.seen = h.contact, latest
	for _, svid := range svids {
		s.svids[svid.EntryID] = svid.Used
	}
	s.weighty = true // what was written before this start shall not count any more
	s.note(nil, true)
	return &Contents{State: state, Continues: h.schema == schema(), SVIDs: svids, Contact: h.contact, Seen: h.seen}, nil
}

// checkCounter says whether the head is the newest that there was.
func (s *Store) checkCounter(ctx context.Context, h *head) error {
	c := s.holder.counter()
	if c == nil {
		return nil
	}
	switch {
	case h.counter == s.counted:
		return nil
	case h.counter == s.counted+1:
		// The agent ended after it wrote the head and before it counted.
		n, err := c.increment(ctx)
		if err != nil {
			return fmt.Errorf("%w: %w", errUnread, err)
		}
		if s.counted = n; n == h.counter {
			return nil
		}
	case h.counter > s.counted:
		return fmt.Errorf("it is of another TPM: its counter stands at %d, and this TPM's at %d", h.counter, s.counted)
	}
	return fmt.Errorf("it is an older one that was put back: its counter stands at %d, and the TPM's at %d", h.counter, s.counted)
}

func (s *Store) logPath(generation uint64) string {
	return filepath.Join(s.dir(), logPrefix+strconv.FormatUint(generation, 10))
}

// generations lists the logs that there are.
func (s *Store) generations() ([]uint64, error) {
	files, err := os.ReadDir(s.dir())
	if err != nil {
		return nil, err
	}
	var found []uint64
	for _, f := range files {
		if number, ok := strings.CutPrefix(f.Name(), logPrefix); ok {
			if n, err := strconv.ParseUint(number, 10, 63); err == nil && strconv.FormatUint(n, 10) == number {
				found = append(found, n)
			}
		}
	}
	return found, nil
}

// setAside moves what was refused out of the way, and the oldest that were before it for good.
func (s *Store) setAside() (string, error) {
	name := func(i int) string { return s.dir() + ".refused." + strconv.Itoa(i) }
	if err := os.RemoveAll(name(maxAside)); err != nil {
		return "", err
	}
	for i := maxAside - 1; i >= 1; i-- {
		if err := os.Rename(name(i), name(i+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	if err := os.Rename(s.dir(), name(1)); err != nil {
		return "", err
	}
	return name(1), durable.SyncDir(s.config.Dir)
}
