package unix

import (
	"time"

	sys "golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

// settled is how old a file's last change must be. A further change within the same tick of the kernel's coarse clock, at
// most 10 ms, would not show in its times.
const settled = 2 * time.Second

// Doubts says whether the executable could get another content, by the hand of somebody else than root, without a trace in
// the state: its hash is then neither remembered nor believed for longer than one answer.
func (m *Method) Doubts(p *peer.Process, state peer.Snapshot) bool {
	if m.cfg.MaxHashBytes < 0 || state.ExecutableErr != nil {
		return false // there is no hash
	}
	if _, ok := m.hashes.recall(state.Executable); ok {
		return false // only steady ones are remembered, and what makes them so does not change without a trace
	}
	f, err := p.Executables().Pin(p.PID, p.UID)
	if err != nil {
		return true
	}
	defer f.Close()
	return !m.steady(int(f.Fd()), state.Executable)
}

// steady says whether each change of an open file's content, which nobody can change while it runs, shows in exe.
//
// Filesystems in memory do not set a file's times when it is written through a mapping that has been read before. So
// somebody could have his copy of a known program hashed, end it, write another program into the same file, and run it
// under the old hash. The same goes for what such a filesystem is a layer of. Files that only root may write are spared: root
// has simpler ways.
func (m *Method) steady(fd int, exe peer.File) bool {
	var st sys.Stat_t
	if err := sys.Fstat(fd, &st); err != nil || peer.FileOf(&st) != exe {
		return false
	}
	if newest := time.Unix(0, max(exe.Changed, exe.Modified)); m.cfg.Now().Sub(newest) <= settled {
		return false
	}
	var fs sys.Statfs_t
	if err := sys.Fstatfs(fd, &fs); err != nil {
		return false
	}
	switch fs.Type {
	case sys.EXT4_SUPER_MAGIC, sys.XFS_SUPER_MAGIC, sys.BTRFS_SUPER_MAGIC, sys.F2FS_SUPER_MAGIC:
		return true // a mapping becomes writable anew, and the times are set, whenever the file is opened for it
	case sys.TMPFS_MAGIC, sys.OVERLAYFS_SUPER_MAGIC, sys.SQUASHFS_MAGIC, sys.EROFS_SUPER_MAGIC_V1:
		return st.Uid == 0 && st.Mode&0o022 == 0
	}
	return false // nothing is known of it, or somebody else serves it
}
