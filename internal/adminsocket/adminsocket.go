// Package adminsocket makes the Unix sockets on which operators talk to a CA or an agent, and says who is an operator
// there: root, the program's own user, and whom the configuration names. CA and agent share it; it knows neither.
package adminsocket

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// OverflowUID is what users of other namespaces have here that are unknown to this one. It is never an admin.
const OverflowUID = 65534

// maxPath is what sockaddr_un holds beside the final zero byte.
const maxPath = 107

// A Config says where the socket is and who, besides root and the program's own user, is an admin there.
type Config struct {
	// Path is the socket's path, at most 107 bytes.
	Path string
	// UIDs are further admins. OverflowUID is refused always.
	UIDs []uint32
	// Group is a group, by name or number, whose members are admins.
	Group string
	// Open lets everybody connect, for services on the same socket that judge each caller themselves. It makes nobody an
	// admin.
	Open bool
}

// Check tells bad what cannot work, by the name of the field: uids or group.
func (c Config) Check(bad func(field, format string, args ...any)) {
	if slices.Contains(c.UIDs, OverflowUID) {
		bad("uids", "%d is the overflow uid, which unknown users of other namespaces have; it is never an admin", OverflowUID)
	}
	if _, err := c.gid(); err != nil {
		bad("group", "%v", err)
	}
}

// gid is the group's number, or -1 if none is named.
func (c Config) gid() (int, error) {
	if c.Group == "" {
		return -1, nil
	}
	if n, err := strconv.ParseUint(c.Group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(c.Group)
	if err != nil {
		return -1, fmt.Errorf("%q: no such group", c.Group)
	}
	return strconv.Atoi(g.Gid)
}

// Allows says whether a process with these effective ids and supplementary groups is an admin.
func (c Config) Allows(uid, gid uint32, groups []uint32) bool {
	if uid == OverflowUID {
		return false
	}
	if uid == 0 || int(uid) == os.Geteuid() || slices.Contains(c.UIDs, uid) {
		return true
	}
	want, err := c.gid()
	if err != nil || want < 0 {
		return false
	}
	return int(gid) == want || slices.Contains(groups, uint32(want))
}

// Listen makes the socket with mode 0660 in a directory with mode 0750; if Open, 0666 and 0755. A socket that nobody
// listens on any more is replaced. Closing the listener removes the socket, if it is still this one.
func Listen(c Config) (net.Listener, error) {
	path, err := filepath.Abs(c.Path)
	if err != nil {
		return nil, err
	}
	c.Path = path
	if len(path) > maxPath {
		return nil, fmt.Errorf("path %q has %d bytes, and a Unix socket's path at most %d; choose a shorter one", path, len(path), maxPath)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, c.dirMode()); err != nil {
		return nil, err
	}
	if err := checkFree(path); err != nil {
		return nil, err
	}
	l, err := bind(dir, path)
	if err != nil {
		return nil, err
	}
	if err := c.Admit(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (c Config) mode() fs.FileMode {
	if c.Open {
		return 0o666
	}
	return 0o660
}

func (c Config) dirMode() fs.FileMode {
	if c.Open {
		return 0o755
	}
	return 0o750
}

// checkFree says whether the path may be taken: nothing is there, or a socket that nobody listens on any more.
func checkFree(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is no socket; remove it or choose another path", path)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	if err == nil || errors.Is(err, unix.EAGAIN) { // EAGAIN: its backlog is full
		return fmt.Errorf("%s is in use by another process; stop it, or choose another path", path)
	}
	return nil
}

// bind makes the socket in a directory that only we can enter, narrows it, and moves it to its place, so that it is at no
// moment wider than it will be. The path goes through a descriptor, so that it is short enough however long dir is.
func bind(dir, path string) (*listener, error) {
	private, err := os.MkdirTemp(dir, ".signet-")
	if err != nil {
		return nil, fmt.Errorf("%s: its directory must be writable for uid %d: %w", path, os.Geteuid(), err)
	}
	defer os.RemoveAll(private)
	d, err := os.Open(private)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	made := filepath.Join(private, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: "/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/s"})
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	var st unix.Stat_t
	err = os.Chmod(made, 0o600)
	if err == nil {
		err = unix.Lstat(made, &st)
	}
	if err == nil {
		err = os.Rename(made, path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("putting %s in its place: %w", path, err), l.Close())
	}
	return &listener{UnixListener: l, path: path, dev: st.Dev, ino: st.Ino}, nil
}

// A listener removes its socket when it is closed.
type listener struct {
	*net.UnixListener
	path     string
	dev, ino uint64
}

// Close is net.Listener's. Further calls return net.ErrClosed, wrapped.
func (l *listener) Close() error {
	if err := l.UnixListener.Close(); err != nil {
		return err
	}
	var st unix.Stat_t
	if unix.Lstat(l.path, &st) == nil && st.Dev == l.dev && st.Ino == l.ino {
		return os.Remove(l.path)
	}
	return nil
}

// Addr is where others find the socket.
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: l.path} }

// Admit lets the group and the users reach the socket, and nobody else: the group by its mode, the users by an access
// control list, since modes have no room for them. It is called again when they have changed. A directory that is not as
// Listen makes one is shared with others, as /run is, and stays as it is.
func (c Config) Admit() error {
	gid, err := c.gid()
	if err != nil {
		return err
	}
	type place struct {
		path string
		mode fs.FileMode
	}
	places := []place{{c.Path, c.mode()}}
	dir := filepath.Dir(c.Path)
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) == os.Geteuid() && (st.Mode().Perm() == 0o750 || st.Mode().Perm() == c.dirMode()) {
		places = append(places, place{dir, c.dirMode()})
	}
	for _, p := range places {
		if gid >= 0 {
			if err := os.Chown(p.path, -1, gid); err != nil {
				return fmt.Errorf("group: %w (the program must be in the group, such as by SupplementaryGroups= of its unit, or have CAP_CHOWN)", err)
			}
		}
		if err := setACL(p.path, p.mode, c.UIDs); err != nil {
			return fmt.Errorf("uids: %s: %w (its file system has no access control lists; use group)", p.path, err)
		}
		if err := os.Chmod(p.path, p.mode); err != nil {
			return err
		}
	}
	return nil
}

// setACL gives each of uids what the group class of perm has, or removes the list if there are none.
// The form is that of the kernel's posix_acl_xattr.h.
func setACL(path string, perm fs.FileMode, uids []uint32) error {
	const (
		name    = "system.posix_acl_access"
		version = 2
		nobody  = 0xffffffff

		userObj, user, groupObj, mask, other = 0x01, 0x02, 0x04, 0x10, 0x20
	)
	if len(uids) == 0 {
		if err := unix.Removexattr(path, name); err != nil && err != unix.ENODATA && err != unix.EOPNOTSUPP {
			return err
		}
		return nil
	}
	acl := binary.LittleEndian.AppendUint32(nil, version)
	add := func(tag uint16, bits fs.FileMode, id uint32) {
		acl = binary.LittleEndian.AppendUint16(acl, tag)
		acl = binary.LittleEndian.AppendUint16(acl, uint16(bits&7))
		acl = binary.LittleEndian.AppendUint32(acl, id)
	}
	add(userObj, perm>>6, nobody)
	uids = slices.Clone(uids)
	slices.Sort(uids)
	for _, u := range slices.Compact(uids) {
		add(user, perm>>3, u)
	}
	add(groupObj, perm>>3, nobody)
	add(mask, perm>>3, nobody)
	add(other, perm, nobody)
	return unix.Setxattr(path, name, acl, 0)
}
