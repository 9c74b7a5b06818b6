// Package unix attests a process by what every Unix system knows of it: its users, its groups and its executable. Its
// selectors are those of SPIRE's attestor of the same name.
//
//	unix:uid:1000  unix:user:web  unix:gid:1000  unix:group:web  unix:supplementary_gid:27  unix:supplementary_group:sudo
//	unix:path:/usr/bin/web  unix:sha256:6ea7…
//
// The ids are the effective ones. The path and the hash are about the very file that the process runs.
package unix

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Name is the type of the selectors.
const Name = "unix"

// Config says how far attestation goes. The zero value is strict.
type Config struct {
	// MaxHashBytes is the size of the largest executable that is hashed. Zero means 512 MiB; negative means that none is,
	// and that there are no sha256 selectors.
	MaxHashBytes int64

	// MaxHashes bounds the hashes that are remembered. Zero means 1024.
	MaxHashes int

	// AllowForeignPaths gives a path selector also to a process whose executable the agent does not find under that path,
	// such as one in a container. Whoever may make a mount namespace, which on many systems is everybody, can then run
	// any program under any path.
	AllowForeignPaths bool

	// AllowFUSE hashes also files on FUSE filesystems. Whoever serves such a filesystem can run one content and show
	// another.
	AllowFUSE bool

	// Now is the wall clock, which the times of files are compared with. Nil means time.Now.
	Now func() time.Time
}

// A Method is this attestation. It is for concurrent use.
type Method struct {
	cfg           Config
	hashes        *hashes
	users, groups *names
}

// New returns the method.
func New(cfg Config) (*Method, error) {
	if cfg.MaxHashes < 0 {
		return nil, fmt.Errorf("unix attestation: MaxHashes is %d: must not be negative", cfg.MaxHashes)
	}
	if cfg.MaxHashBytes == 0 {
		cfg.MaxHashBytes = 512 << 20
	}
	if cfg.MaxHashes == 0 {
		cfg.MaxHashes = 1024
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Method{
		cfg: cfg, hashes: newHashes(cfg.MaxHashes),
		users: newNames(func(id string) (string, error) {
			u, err := user.LookupId(id)
			if err != nil {
				return "", err
			}
			return u.Username, nil
		}),
		groups: newNames(func(id string) (string, error) {
			g, err := user.LookupGroupId(id)
			if err != nil {
				return "", err
			}
			return g.Name, nil
		}),
	}, nil
}

// Name returns "unix".
func (m *Method) Name() string { return Name }

// Selectors returns the selectors of a process in a state.
//
// All of them are about that state: ids come from it, and path and hash are given only for the file that it names. So a
// process that becomes another program meanwhile collects no mixture.
func (m *Method) Selectors(ctx context.Context, p *peer.Process, state peer.Snapshot) ([]spiffe.Selector, error) {
	var all []spiffe.Selector
	add := func(kind, value string) { all = append(all, spiffe.Selector{Type: Name, Value: kind + ":" + value}) }
	var missing []error

	uid, gid := id(state.EffectiveUID), id(state.EffectiveGID)
	add("uid", uid)
	if name, err := m.users.of(uid); err == nil && name != "" {
		add("user", name)
	} else if err != nil && !errors.As(err, new(user.UnknownUserIdError)) {
		missing = append(missing, fmt.Errorf("name of uid %s: %w", uid, err))
	}
	add("gid", gid)
	addGroup := func(kind, gid string) {
		if name, err := m.groups.of(gid); err == nil && name != "" {
			add(kind, name)
		} else if err != nil && !errors.As(err, new(user.UnknownGroupIdError)) {
			missing = append(missing, fmt.Errorf("name of gid %s: %w", gid, err))
		}
	}
	addGroup("group", gid)
	for i, g := range state.Groups {
		if i == maxGroups {
			missing = append(missing, fmt.Errorf("the process has %d supplementary groups: those after the first %d are left out", len(state.Groups), maxGroups))
			break
		}
		add("supplementary_gid", id(g))
		addGroup("supplementary_group", id(g))
	}

	if state.ExecutableErr != nil {
		return all, errors.Join(append(missing, forbidden(state.ExecutableErr))...)
	}
	path, err := m.path(p, state.Executable)
	if err != nil {
		missing = append(missing, forbidden(err))
	} else {
		add("path", path)
	}
	if m.cfg.MaxHashBytes > 0 {
		sum, err := m.hash(ctx, p, state.Executable)
		if err != nil {
			missing = append(missing, forbidden(err))
		} else {
			add("sha256", sum)
		}
	}
	return all, errors.Join(missing...)
}

// A settledError says why a process does not have a selector (workloadattest.Settled).
type settledError struct{ error }

func (settledError) Settled()        {}
func (e settledError) Unwrap() error { return e.error }

// forbidden settles an error that says that the agent may not look: it says at its start which capabilities it lacks for that.
func forbidden(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return settledError{err}
	}
	return err
}

// maxGroups bounds the supplementary groups that become selectors. NFS and most sites stop at 16; a process may have
// 65536, and looking up that many names would keep the agent busy.
const maxGroups = 256

func id(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// path returns where the executable is. The kernel tells it in the process's own mount namespace, where it may be a lie
// in the agent's: so it counts if the agent finds the same file there.
func (m *Method) path(p *peer.Process, exe peer.File) (string, error) {
	path, there, err := p.Executables().Path(p.PID, p.UID)
	if err != nil {
		return "", fmt.Errorf("path of the executable: %w", err)
	}
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("path of the executable: %q is not a path", path)
	}
	if there.Device == exe.Device && there.Inode == exe.Inode {
		return path, nil
	}
	if m.cfg.AllowForeignPaths {
		if now, err := p.Executables().Stat(p.PID, p.UID); err == nil && now.File == exe && now.Links > 0 {
			return path, nil
		}
	}
	return "", settledError{fmt.Errorf("path of the executable: the file that runs is not what the agent finds at %q (it was replaced or deleted, or the process has its own mounts)", path)}
}
