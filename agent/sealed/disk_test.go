package sealed

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/signet-id/signet/internal/durable/faulttest"
)

// TestFullDisk: the agent goes on, says so once, the old cache stays valid, and when there is room again all is written.
func TestFullDisk(t *testing.T) {
	faulttest.InSmallDisk(t, 2<<20, func(dir string) {
		r := newRig(t, File{})
		r.config.Dir = dir
		s, _ := r.open()
		r.fill(s)
		free := faulttest.FillDisk(t, dir)
		s.Hold("a", 6, true, make([]byte, 64<<10), []byte("secret of a"))
		for range 3 {
			if err := s.attempt(t.Context()); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("writing to a full disk: %v", err)
			}
		}
		if st := s.Status(); !errors.Is(st.Err, syscall.ENOSPC) || st.Unsaved == 0 {
			t.Errorf("status %+v", st)
		}
		if n := strings.Count(r.log.String(), "not up to date on disk"); n != 1 {
			t.Errorf("the log says it %d times, want once:\n%s", n, r.log.String())
		}
		_, c := r.mustRestore()
		if len(c.SVIDs) != 2 || c.State.To != 5 {
			t.Errorf("the old cache: %d SVIDs, revision %d", len(c.SVIDs), c.State.To)
		}
		free()
		r.write(s)
		if st := s.Status(); st.Err != nil || st.Unsaved != 0 {
			t.Errorf("with room again: status %+v", st)
		}
		if !strings.Contains(r.log.String(), "up to date on disk again") {
			t.Error("the log does not say that it is well again")
		}
		_, c = r.mustRestore()
		for _, svid := range c.SVIDs {
			if svid.EntryID == "a" && svid.EntryRevision != 6 {
				t.Errorf("with room again: %d", svid.EntryRevision)
			}
		}
	})
}
