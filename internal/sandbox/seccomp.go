package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Syscalls is a choice of system calls that stay.
type Syscalls struct {
	// Only lets nothing through but what a program needs that looks at files and answers over the sockets that it has. It
	// can open nothing for writing, and make no socket. Other fields do not count then.
	Only bool
	// Keyring leaves the kernel's key service.
	Keyring bool
}

// What happens to a call that is not let through. An error is better than to kill: a library that tries something else
// then still works, and what asks for it is in the log. A foreign architecture, whose numbers mean other calls, is an attack.
const (
	allow      = unix.SECCOMP_RET_ALLOW
	refuse     = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	absent     = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	noType     = unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)
	noProtocol = unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)
	kill       = unix.SECCOMP_RET_KILL_PROCESS
)

// newest is the last system call that was known when this was written. Later ones are not there, for this program.
const newest = unix.SYS_RSEQ_SLICE_YIELD

// x32 marks the numbers of another interface of the same architecture.
const x32 = 0x40000000

// refused are calls that a daemon of signet never needs, and an attacker within would.
var refused = append([]uintptr{
	// other programs, other processes
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE,
	unix.SYS_PROCESS_MRELEASE, unix.SYS_KCMP, unix.SYS_PIDFD_GETFD, unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES,
	// other namespaces, mounts, roots
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_CHROOT, unix.SYS_PIVOT_ROOT, unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_FSOPEN, unix.SYS_FSCONFIG,
	unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_OPEN_TREE_ATTR, unix.SYS_MOUNT_SETATTR, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD,
	unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_FANOTIFY_INIT, unix.SYS_FANOTIFY_MARK, unix.SYS_MKNODAT,
	// other users
	unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID, unix.SYS_SETGROUPS,
	unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_CAPSET, unix.SYS_PERSONALITY,
	// further sockets that listen: without a bind before it Landlock does not see it
	unix.SYS_LISTEN,
	// the kernel itself, and interfaces of it that had many holes
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT, unix.SYS_SYSLOG,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_VHANGUP, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_NFSSERVCTL, unix.SYS_REMAP_FILE_PAGES, unix.SYS_MBIND,
	unix.SYS_MEMFD_SECRET, unix.SYS_MEMFD_CREATE, unix.SYS_LSM_SET_SELF_ATTR,
	// the machine's name and clock
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX,
}, refusedHere...)

// keyring are the calls of the kernel's key service.
var keyring = []uintptr{unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL}

// only are the calls that Syscalls.Only leaves: what the Go runtime needs, and files and sockets that are read.
var only = append([]uintptr{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_PREAD64, unix.SYS_CLOSE, unix.SYS_FSTAT, unix.SYS_READLINKAT, unix.SYS_STATX, unix.SYS_FCNTL,
	unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_GETSOCKOPT, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_SHUTDOWN,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2, unix.SYS_EVENTFD2, unix.SYS_PPOLL, unix.SYS_PIPE2,
	unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_GETTIMEOFDAY, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY,
	unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_BRK, unix.SYS_PRCTL,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL,
	unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETRLIMIT, unix.SYS_PRLIMIT64, unix.SYS_CAPGET, unix.SYS_UNAME,
	unix.SYS_TGKILL, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_GETRANDOM, unix.SYS_MEMBARRIER,
}, onlyHere...)

// writing are the flags of open by which something could change.
const writing = unix.O_WRONLY | unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC | unix.O_APPEND

// restrictSyscalls puts all threads under a filter.
func restrictSyscalls(s Syscalls) error {
	if architecture == 0 {
		return unavailable("no filter was written for %s", runtime.GOARCH)
	}
	program := s.program()
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// TSYNC takes every thread along, those that Go does not know too, and their no_new_privs.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	switch {
	case errno == 0:
		return nil
	case errors.Is(errno, unix.ENOSYS), errors.Is(errno, unix.EINVAL):
		return unavailable("the kernel has no seccomp filters (%v)", errno)
	}
	return fmt.Errorf("restricting this process: %w", errno)
}

// Offsets in struct seccomp_data.
const (
	offsetNumber       = 0
	offsetArchitecture = 4
	offsetArgs         = 16 // 8 bytes each; both architectures have the low half first
)

// program returns the filter.
func (s Syscalls) program() []unix.SockFilter {
	var f filter
	f.load(offsetArchitecture)
	f.unless(unix.BPF_JEQ, architecture, kill)
	f.load(offsetNumber)
	if runtime.GOARCH == "amd64" {
		f.when(unix.BPF_JGE, x32, kill)
	}
	f.when(unix.BPF_JGT, newest, absent)
	// Threads, but no processes. The flags of clone3 are in memory, where no filter sees them; C libraries fall back to clone.
	f.when(unix.BPF_JEQ, unix.SYS_CLONE3, absent)
	f.argument(unix.SYS_CLONE, 0, func() { f.when(unix.BPF_JSET, unix.CLONE_THREAD, allow); f.give(refuse) })
	if s.Only {
		f.argument(unix.SYS_OPENAT, 2, func() { f.when(unix.BPF_JSET, writing, refuse); f.give(allow) })
		f.argument(unix.SYS_MMAP, 2, func() { f.when(unix.BPF_JSET, unix.PROT_EXEC, refuse); f.give(allow) })
		f.argument(unix.SYS_MPROTECT, 2, func() { f.when(unix.BPF_JSET, unix.PROT_EXEC, refuse); f.give(allow) })
		for _, n := range only {
			f.when(unix.BPF_JEQ, uint32(n), allow)
		}
		f.give(refuse)
		return f.code
	}
	f.argument(unix.SYS_SOCKET, 0, func() {
		families := []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6}
		for i, family := range families {
			f.add(unix.BPF_JMP|unix.BPF_K|unix.BPF_JEQ, family, uint8(len(families)-i), 0) // over the refusal
		}
		f.give(noType)
		// MPTCP and the like would pass by what Landlock restricts. Go falls back to TCP.
		f.load(offsetArgs + 8*2)
		for _, protocol := range []uint32{0, unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			f.when(unix.BPF_JEQ, protocol, allow)
		}
		f.give(noProtocol)
	})
	// Landlock is asked about connect, and not about what connects with its first bytes (TCP Fast Open).
	for _, send := range []struct {
		call  uintptr
		flags uint32
	}{{unix.SYS_SENDTO, 3}, {unix.SYS_SENDMSG, 2}, {unix.SYS_SENDMMSG, 3}} {
		f.argument(send.call, send.flags, func() { f.when(unix.BPF_JSET, unix.MSG_FASTOPEN, refuse); f.give(allow) })
	}
	f.argument(unix.SYS_IOCTL, 1, func() { f.when(unix.BPF_JEQ, unix.TIOCSTI, refuse); f.give(allow) })
	calls := refused
	if !s.Keyring {
		calls = slices.Concat(calls, keyring)
	}
	for _, n := range calls {
		f.when(unix.BPF_JEQ, uint32(n), refuse)
	}
	f.give(allow)
	return f.code
}

// A filter is a program of the kernel's packet filter, in the making.
type filter struct{ code []unix.SockFilter }

func (f *filter) add(code uint16, k uint32, yes, no uint8) {
	f.code = append(f.code, unix.SockFilter{Code: code, Jt: yes, Jf: no, K: k})
}

// load takes a word of the call's data.
func (f *filter) load(offset uint32) { f.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset, 0, 0) }

// give ends the filter with a result.
func (f *filter) give(result uint32) { f.add(unix.BPF_RET|unix.BPF_K, result, 0, 0) }

// when ends the filter with a result if what was loaded compares so, and unless if not.
func (f *filter) when(comparison uint16, k, result uint32) {
	f.add(unix.BPF_JMP|unix.BPF_K|comparison, k, 0, 1)
	f.give(result)
}

func (f *filter) unless(comparison uint16, k, result uint32) {
	f.add(unix.BPF_JMP|unix.BPF_K|comparison, k, 1, 0)
	f.give(result)
}

// argument judges one call by one of its arguments: the judges' code ends the filter in any case.
func (f *filter) argument(call uintptr, arg uint32, judge func()) {
	at := len(f.code)
	f.add(unix.BPF_JMP|unix.BPF_K|unix.BPF_JEQ, uint32(call), 0, 0)
	f.load(offsetArgs + 8*arg)
	judge()
	f.code[at].Jf = uint8(len(f.code) - at - 1)
}
