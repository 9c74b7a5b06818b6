package agent

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/workloadapi/peer"
)

// maxEnvironment bounds what is read of a process's environment.
const maxEnvironment = 2 << 20

// endpointOf says which Workload API a process is told to use, and what keeps it from the agent's socket. Of its
// environment that one variable is looked at and nothing else.
func endpointOf(pid int32, socket string, state peer.Snapshot) *agentv1.Endpoint {
	out := &agentv1.Endpoint{}
	dir := "/proc/" + strconv.Itoa(int(pid))
	path := socket
	if env, err := readBounded(dir+"/environ", maxEnvironment); err == nil {
		for v := range bytes.SplitSeq(env, []byte{0}) {
			value, ok := bytes.CutPrefix(v, []byte("SPIFFE_ENDPOINT_SOCKET="))
			if !ok {
				continue
			}
			text := strings.ToValidUTF8(string(value), "\uFFFD")
			out.Environment = &text
			if path, ok = strings.CutPrefix(text, "unix:"); !ok || !filepath.IsAbs(strings.TrimPrefix(path, "//")) {
				return out
			}
			path = strings.TrimPrefix(path, "//")
			break
		}
	}
	root, err := unix.Open(dir+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return out
	}
	defer unix.Close(root)
	out.Obstacle, out.At = obstacle(root, filepath.Clean(path), socket, state)
	return out
}

// obstacle is what keeps a process with that root directory from the agent's socket at path: "missing", "denied", "other" if
// there is something else, or nothing, also where the agent cannot look.
func obstacle(root int, path, socket string, state peer.Snapshot) (what, at string) {
	for d := "/"; ; {
		st, acl, err := lookIn(root, d)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return "missing", d
		case err != nil: // the agent may not look there itself, such as under Landlock: nothing is known
			return "", ""
		case d == path:
			var own unix.Stat_t
			if unix.Stat(socket, &own) == nil && (own.Dev != st.Dev || own.Ino != st.Ino) {
				return "other", d
			}
			if !acl && !permits(st, state, 0o2) {
				return "denied", d
			}
			return "", ""
		case !acl && !permits(st, state, 0o1):
			return "denied", d
		}
		rest := strings.TrimPrefix(strings.TrimPrefix(path, d), "/")
		next, _, _ := strings.Cut(rest, "/")
		d = filepath.Join(d, next)
	}
}

// lookIn looks at a path as a process with that root directory sees it, and says whether it has an access control list, of
// which nothing is judged here.
func lookIn(root int, path string) (unix.Stat_t, bool, error) {
	var st unix.Stat_t
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := unix.Openat2(root, cmp.Or(strings.TrimPrefix(path, "/"), "."), &how)
	if err != nil {
		return st, false, err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &st); err != nil {
		return st, false, err
	}
	n, err := unix.Getxattr("/proc/self/fd/"+strconv.Itoa(fd), "system.posix_acl_access", nil)
	return st, err == nil && n > 0, nil
}

// permits says whether the mode lets the process do what bit says. Root may do anything, as long as it has its capabilities.
func permits(st unix.Stat_t, state peer.Snapshot, bit uint32) bool {
	switch {
	case state.EffectiveUID == 0:
		return true
	case state.EffectiveUID == st.Uid:
		return st.Mode>>6&bit != 0
	case state.EffectiveGID == st.Gid || slices.Contains(state.Groups, st.Gid):
		return st.Mode>>3&bit != 0
	}
	return st.Mode&bit != 0
}

// readBounded reads a file of /proc up to a limit; what is beyond is left out.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
