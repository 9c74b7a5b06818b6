package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What may be done with files, by the version of Landlock's interface that brought it.
const (
	rightsRead   = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	rightsDevice = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	rightsOwn    = rightsRead | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_REFER |
		unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK |
		unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR
	rightsFile = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV // those that a file that is no directory can have
	rightsFirst = 1<<13 - 1 // version 1: EXECUTE to MAKE_SYM
)

// restrictPaths puts the process under a Landlock domain and returns the interface's version. Beside paths and ports, the
// domain keeps the process from every process outside of it: it can trace none, read no memory and follow no link of
// /proc/PID, whatever capabilities it has.
func restrictPaths(p Policy) (int, error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch errno {
	case 0:
	case unix.ENOSYS, unix.EOPNOTSUPP:
		return 0, unavailable("the kernel has no Landlock, or it is switched off (%v)", errno)
	default:
		return 0, fmt.Errorf("asking for the version: %w", errno)
	}
	version := int(v)
	handled := uint64(rightsFirst)
	if version >= 2 {
		handled |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if version >= 3 {
		handled |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if version >= 5 {
		handled |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: handled}
	size := unsafe.Sizeof(attr.Handled_access_fs)
	if version >= 4 {
		attr.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
		size = unsafe.Offsetof(attr.Scoped)
	}
	if version >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
		size = unsafe.Offsetof(attr.Quiet_access_fs)
	}
	set, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return 0, fmt.Errorf("making a ruleset: %w", errno)
	}
	defer unix.Close(int(set))
	for _, a := range p.Files {
		if err := addPath(set, a, handled); err != nil {
			return 0, err
		}
	}
	if version >= 4 {
		for _, port := range p.ConnectTCP {
			rule := netPort{allowed: unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, port: uint64(port)}
			if err := addRule(set, ruleNetPort, uintptr(unsafe.Pointer(&rule))); err != nil {
				return 0, fmt.Errorf("TCP port %d: %w", port, err)
			}
		}
	}
	if err := onAllThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, set, 0, 0); err != nil {
		if errors.Is(err, errThreads) {
			return 0, unavailable("%v", err)
		}
		return 0, fmt.Errorf("restricting this process: %w", err)
	}
	return version, nil
}

func addPath(set uintptr, a Access, handled uint64) error {
	fd, err := unix.Open(a.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil // so it stays forbidden
	}
	if err != nil {
		return fmt.Errorf("path %q: %w", a.Path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("path %q: %w", a.Path, err)
	}
	rights := map[Kind]uint64{Read: rightsRead, Device: rightsDevice, Own: rightsOwn}[a.Kind] & handled
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= rightsFile
	}
	rule := pathBeneath{allowed: rights, fd: int32(fd)}
	if err := addRule(set, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule))); err != nil {
		return fmt.Errorf("path %q: %w", a.Path, err)
	}
	return nil
}

// pathBeneath is struct landlock_path_beneath_attr, which is packed: its 12 bytes are these.
type pathBeneath struct {
	allowed uint64
	fd      int32
}

// netPort is struct landlock_net_port_attr, and ruleNetPort its kind of rule.
type netPort struct{ allowed, port uint64 }

const ruleNetPort = 2

// addRule adds to a ruleset what rule points to.
//
//go:uintptrescapes
func addRule(set, kind, rule uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, set, kind, rule, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
