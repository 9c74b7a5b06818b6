package docker

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

// What a descriptor of a namespace is asked (ioctl_ns(2)).
const (
	nsGetParent   = 0xb702
	nsGetOwnerUID = 0xb704
)

// namespaceOwner returns the user who made the user namespace that the process is in: of nested ones the outermost, for
// those within are made by whoever may do something there. It is 0 for a process in the agent's own.
func namespaceOwner(p *peer.Process) (uint32, error) {
	own, err := os.Open("/proc/self/ns/user")
	if err != nil {
		return 0, fmt.Errorf("the agent's user namespace: %w", err)
	}
	defer own.Close()
	ns, err := os.Open("/proc/" + strconv.Itoa(int(p.PID)) + "/ns/user")
	if gone := p.Alive(); gone != nil {
		err = errors.Join(gone, err)
	}
	if err != nil {
		if ns != nil {
			ns.Close()
		}
		return 0, fmt.Errorf("the process's user namespace: %w", err)
	}
	defer func() { ns.Close() }()
	owner := uint32(0)
	for range 33 { // the kernel nests no deeper
		if same, err := sameFile(ns, own); err != nil || same {
			return owner, err
		}
		// The kernel writes a uid_t, in the terms of the agent's namespace.
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, ns.Fd(), nsGetOwnerUID, uintptr(unsafe.Pointer(&owner))); errno != 0 {
			return 0, fmt.Errorf("the owner of the process's user namespace: %w", errno)
		}
		fd, err := unix.IoctlRetInt(int(ns.Fd()), nsGetParent)
		if err != nil {
			return 0, fmt.Errorf("the process's user namespace is not within the agent's: %w", err)
		}
		ns.Close()
		ns = os.NewFile(uintptr(fd), "user namespace")
	}
	return 0, errors.New("the process's user namespace is nested too deep")
}

func sameFile(a, b *os.File) (bool, error) {
	x, err := a.Stat()
	if err != nil {
		return false, err
	}
	y, err := b.Stat()
	if err != nil {
		return false, err
	}
	return os.SameFile(x, y), nil
}
