package sandbox

import "golang.org/x/sys/unix"

// refusedHere are calls that this architecture alone has.
var refusedHere = []uintptr{
	unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_MKNOD, unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT, unix.SYS_CREATE_MODULE, unix.SYS_GET_KERNEL_SYMS,
	unix.SYS_QUERY_MODULE, unix.SYS_USTAT, unix.SYS_SYSFS, unix.SYS_USELIB, unix.SYS__SYSCTL,
}

// onlyHere are the older forms of what Syscalls.Only leaves. The Go runtime sets up its threads with ARCH_PRCTL.
var onlyHere = []uintptr{unix.SYS_NEWFSTATAT, unix.SYS_STAT, unix.SYS_LSTAT, unix.SYS_READLINK, unix.SYS_POLL, unix.SYS_EPOLL_WAIT, unix.SYS_ARCH_PRCTL}
