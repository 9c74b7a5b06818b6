package bolt

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// headroomStep is how much is asked of the file system at a time. The first steps that fit are kept even when the
	// whole does not.
	headroomStep = 1 << 20

	// headroomExtra is asked for beyond what is needed, so that not every commit has to ask.
	headroomExtra = 4 << 20

	// pagesPerWrite bounds the pages that one write makes bbolt copy or split, in a tree of up to five levels.
	pagesPerWrite = 8

	// pagesPerCommit bounds the pages that a commit needs besides: the meta bucket, the root and a split of each level.
	pagesPerCommit = 16
)

// headroom keeps blocks of the file allocated beyond the last page in use, so that a full disk is noticed before bbolt is
// in the middle of a commit, and so that the commits that may use the reserve find room in it.
//
// Only the writer uses it.
type headroom struct {
	file      *os.File
	reserve   int64
	allocated int64 // every byte of the file below has a block
	blind     bool  // the file system cannot allocate ahead: the check is left to the write itself
}

// ensure tries to have need bytes and the reserve allocated after used, and returns how much really is.
// An error is one of the disk, other than being full.
func (h *headroom) ensure(used, need int64) (free int64, err error) {
	want := used + need + h.reserve
	if h.blind {
		return want - used, nil
	}
	if h.allocated >= want {
		return h.allocated - used, nil
	}
	for h.allocated < want+headroomExtra {
		step := min(headroomStep, want+headroomExtra-h.allocated)
		// This makes the file larger, too, which spares bbolt from growing it.
		err := fallocate(h.file, h.allocated, step)
		switch {
		case err == nil:
			h.allocated += step
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			h.blind = true
			return want - used, nil
		case isFull(err):
			return max(h.allocated-used, 0), nil
		}
		return 0, err
	}
	return h.allocated - used, nil
}

func fallocate(f *os.File, off, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, off, n)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// isFull reports whether err means that the disk, the quota or the file size limit is exhausted.
func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

// demand bounds the bytes by which a commit of these writes can move the end of the used pages.
func demand(r *request) int64 {
	pages := int64(pagesPerCommit)
	for _, w := range r.writes {
		pages += pagesPerWrite + 2*int64((len(w.Key)+len(w.Value)+pageSize-1)/pageSize)
	}
	return pages * pageSize
}
