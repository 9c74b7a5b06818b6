package ca

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// listenAdmin makes the admin socket with mode 0660 in a directory with mode 0750.
func (ca *CA) listenAdmin() (net.Listener, error) {
	path := ca.c.AdminSocket.Path
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, err
	}
	if len(path) > len(unix.RawSockaddrUnix{}.Path)-1 {
		return nil, fmt.Errorf("path %q has %d bytes, the kernel allows %d; choose a shorter one", path, len(path), len(unix.RawSockaddrUnix{}.Path)-1)
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s is in use by another process (is another CA running?)", path)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s exists and is no socket; remove it or choose another path", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	old := unix.Umask(0o117) // the socket is never wider than 0660, not even for a moment
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, err
	}
	if err := ca.c.AdminSocket.admit(); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// admit lets the configured group and users reach the socket: the group by mode 0660, the users by an access control
// list, since modes have no room for them. Nobody else can even open it. A directory that is not as listenAdmin makes
// one is shared with others, as /run is, and stays as it is.
func (a AdminSocket) admit() error {
	gid, err := a.gid()
	if err != nil {
		return err
	}
	paths := []string{a.Path}
	dir := filepath.Dir(a.Path)
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) == os.Geteuid() && st.Mode().Perm() == 0o750 {
		paths = append(paths, dir)
	}
	for i, path := range paths {
		if gid >= 0 {
			if err := os.Chown(path, -1, gid); err != nil {
				return err
			}
		}
		perm := fs.FileMode(0o660)
		if i > 0 {
			perm = 0o750
		}
		if err := setACL(path, perm, a.UIDs); err != nil {
			return fmt.Errorf("uids: %s: %w (its file system has no access control lists; use group)", path, err)
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

// allowLocal: root, the CA's own user, and whom the configuration names; never the overflow uid.
func (ca *CA) allowLocal(uid, gid uint32, groups []uint32) bool {
	if uid == overflowUID {
		return false
	}
	if uid == 0 || int(uid) == os.Geteuid() {
		return true
	}
	a := ca.reconfigured.Load().AdminSocket
	for _, u := range a.UIDs {
		if u == uid {
			return true
		}
	}
	if want, err := a.gid(); err == nil && want >= 0 {
		if int(gid) == want {
			return true
		}
		for _, g := range groups {
			if int(g) == want {
				return true
			}
		}
	}
	return false
}
