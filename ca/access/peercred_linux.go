package access

import (
	"encoding/binary"
	"errors"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxGroups is the kernel's own limit (NGROUPS_MAX).
const maxGroups = 65536

// peerCredentials asks the kernel for the credentials that the peer had when it connected.
func peerCredentials(conn net.Conn) (uid, gid uint32, groups []uint32, err error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, 0, nil, errors.New("not a Unix socket")
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return 0, 0, nil, err
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner != nil {
			return
		}
		uid, gid = cred.Uid, cred.Gid
		groups, inner = peerGroups(int(fd))
	})
	return uid, gid, groups, errors.Join(err, inner)
}

// peerGroups reads SO_PEERGROUPS: the peer's supplementary groups.
func peerGroups(fd int) ([]uint32, error) {
	buf := make([]byte, 64*4)
	for {
		size := uint32(len(buf))
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		if e == unix.ERANGE && size > uint32(len(buf)) && size <= maxGroups*4 {
			buf = make([]byte, size)
			continue
		}
		if e != 0 {
			return nil, e
		}
		out := make([]uint32, size/4)
		for i := range out {
			out[i] = binary.NativeEndian.Uint32(buf[i*4:])
		}
		return out, nil
	}
}
