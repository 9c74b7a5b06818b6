package unix

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"

	sys "golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

const (
	// hashingPerUID and hashingTotal bound the files that are read at the same time.
	hashingPerUID, hashingTotal = 2, 64
)

// errChanged says that the process runs another file by now. Attestation starts anew then.
var errChanged = errors.New("the process became another program while it was looked at")

// hash returns the hex SHA-256 of the executable, through one descriptor that is first made sure to be that file.
func (m *Method) hash(ctx context.Context, p *peer.Process, exe peer.File) (string, error) {
	if exe.Size > m.cfg.MaxHashBytes {
		return "", fmt.Errorf("sha256 of the executable: it has %d bytes and MaxHashBytes is %d", exe.Size, m.cfg.MaxHashBytes)
	}
	if sum, ok := m.hashes.recall(exe); ok {
		return sum, nil
	}
	leave, err := m.hashes.gate.Enter(ctx, p.UID)
	if err != nil {
		return "", fmt.Errorf("sha256 of the executable: %w", err)
	}
	defer leave()
	if sum, ok := m.hashes.recall(exe); ok {
		return sum, nil // somebody else's wait was for the same file
	}
	f, err := p.Executables().Open(p.PID, p.UID)
	if err != nil {
		return "", fmt.Errorf("sha256 of the executable: %w", err)
	}
	defer f.Close()
	if err := m.checkFile(f, exe); err != nil {
		return "", fmt.Errorf("sha256 of the executable: %w", err)
	}
	sum, err := sumOf(ctx, f, exe.Size)
	if err == nil {
		err = m.checkFile(f, exe)
	}
	if err != nil {
		return "", fmt.Errorf("sha256 of the executable: %w", err)
	}
	if m.steady(int(f.Fd()), exe) {
		m.hashes.remember(exe, sum)
	}
	return sum, nil
}

func (m *Method) checkFile(f *os.File, exe peer.File) error {
	var st sys.Stat_t
	if err := sys.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&sys.S_IFMT != sys.S_IFREG || peer.FileOf(&st) != exe {
		return errChanged
	}
	if m.cfg.AllowFUSE {
		return nil
	}
	var fs sys.Statfs_t
	if err := sys.Fstatfs(int(f.Fd()), &fs); err != nil {
		return err
	}
	if fs.Type == sys.FUSE_SUPER_MAGIC {
		return errors.New("it is on a FUSE filesystem, whose owner can show another content than runs (AllowFUSE hashes it)")
	}
	return nil
}

// sumOf reads exactly size bytes.
func sumOf(ctx context.Context, r io.Reader, size int64) (string, error) {
	h := sha256.New()
	var n int64
	for n < size {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		m, err := copyChunk(h, r, min(size-n, 1<<20))
		n += m
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func copyChunk(h hash.Hash, r io.Reader, n int64) (int64, error) {
	m, err := io.CopyN(h, r, n)
	if errors.Is(err, io.EOF) {
		err = errChanged // it is shorter than it was
	}
	return m, err
}

// hashes remembers the sums of files by the identity of their content.
type hashes struct {
	max  int
	gate *peer.Gate

	mu    sync.Mutex
	known map[peer.File]*list.Element
	used  *list.List // of sum, the most recently used first
}

type sum struct {
	file peer.File
	hex  string
}

func newHashes(max int) *hashes {
	return &hashes{max: max, gate: peer.NewGate(hashingPerUID, hashingTotal), known: map[peer.File]*list.Element{}, used: list.New()}
}

func (h *hashes) recall(f peer.File) (string, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := h.known[f]
	if e == nil {
		return "", false
	}
	h.used.MoveToFront(e)
	return e.Value.(sum).hex, true
}

func (h *hashes) remember(f peer.File, hex string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e := h.known[f]; e != nil {
		h.used.MoveToFront(e)
		return
	}
	h.known[f] = h.used.PushFront(sum{f, hex})
	if h.used.Len() > h.max {
		oldest := h.used.Back()
		delete(h.known, oldest.Value.(sum).file)
		h.used.Remove(oldest)
	}
}
