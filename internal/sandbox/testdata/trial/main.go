// Command trial applies the policy on its standard input to itself, and then does what its arguments say, each on a
// thread that was there before. It prints as JSON what came of it: "" or an error. The test of package sandbox runs it.
package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/sandbox"
)

func main() {
	var policy sandbox.Policy
	if err := json.NewDecoder(os.Stdin).Decode(&policy); err != nil {
		panic(err)
	}
	type job struct {
		deed, arg string
		done      chan error
	}
	jobs := make(chan job)
	started := make(chan struct{})
	for range 4 {
		go func() {
			runtime.LockOSThread()
			started <- struct{}{}
			for j := range jobs {
				j.done <- do(j.deed, j.arg)
			}
		}()
	}
	for range 4 {
		<-started
	}
	report, err := sandbox.Apply(policy)
	result := map[string]any{"report": report, "err": text(err)}
	if err == nil {
		for _, a := range os.Args[1:] {
			deed, arg, _ := strings.Cut(a, "=")
			j := job{deed, arg, make(chan error)}
			jobs <- j
			result[a] = text(<-j.done)
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		panic(err)
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func fastOpen(address string, send func(int, *unix.SockaddrInet4) error) error {
	a, err := net.ResolveTCPAddr("tcp4", address)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return send(fd, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(a.IP.To4())})
}

func do(deed, arg string) error {
	errno := func(_, _ uintptr, e unix.Errno) error {
		if e != 0 {
			return e
		}
		return nil
	}
	switch deed {
	case "read":
		_, err := os.ReadFile(arg)
		return err
	case "list":
		_, err := os.ReadDir(arg)
		return err
	case "write":
		return os.WriteFile(arg, []byte("x"), 0o600)
	case "mkdir":
		return os.Mkdir(arg, 0o700)
	case "remove":
		return os.Remove(arg)
	case "rename":
		from, to, _ := strings.Cut(arg, ",")
		return os.Rename(from, to)
	case "truncate":
		return os.Truncate(arg, 0)
	case "listen-unix":
		l, err := net.Listen("unix", arg)
		if err == nil {
			l.Close()
		}
		return err
	case "listen-tcp":
		l, err := net.Listen("tcp", arg)
		if err == nil {
			l.Close()
		}
		return err
	case "connect":
		c, err := net.Dial("tcp", arg)
		if err == nil {
			c.Close()
		}
		return err
	case "fastopen": // connects with the first bytes, without connect(2)
		return fastOpen(arg, func(fd int, to *unix.SockaddrInet4) error { return unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, to) })
	case "fastopen-msg":
		return fastOpen(arg, func(fd int, to *unix.SockaddrInet4) error {
			return unix.Sendmsg(fd, []byte("x"), nil, to, unix.MSG_FASTOPEN)
		})
	case "listen-unbound": // the kernel chooses the port
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Listen(fd, 1)
	case "connect-unix":
		c, err := net.Dial("unix", arg)
		if err == nil {
			c.Close()
		}
		return err
	case "exe":
		_, err := os.Stat("/proc/" + arg + "/exe")
		return err
	case "exec":
		return exec.Command(arg).Run()
	case "fork":
		pid, _, e := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if e == 0 && pid == 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		return errno(0, 0, e)
	case "thread":
		done := make(chan struct{})
		go func() { runtime.LockOSThread(); close(done) }() // the thread ends with the goroutine; another takes its place
		<-done
		return nil
	case "ptrace":
		return unix.PtraceAttach(os.Getppid())
	case "readv":
		local, remote := make([]byte, 8), []unix.RemoteIovec{{Base: 0x400000, Len: 8}}
		iov := []unix.Iovec{{Base: &local[0], Len: 8}}
		_, err := unix.ProcessVMReadv(os.Getppid(), iov, remote, 0)
		return err
	case "mem":
		f, err := os.OpenFile("/proc/"+arg+"/mem", os.O_RDWR, 0)
		if err == nil {
			f.Close()
		}
		return err
	case "mount":
		return unix.Mount("none", arg, "tmpfs", 0, "")
	case "unshare":
		return unix.Unshare(unix.CLONE_NEWUSER)
	case "setuid":
		return errno(unix.Syscall(unix.SYS_SETRESUID, 12345, 12345, 12345))
	case "bpf":
		return errno(unix.Syscall(unix.SYS_BPF, 0, 0, 0))
	case "io_uring":
		return errno(unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0))
	case "userfaultfd":
		return errno(unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0))
	case "kexec":
		return errno(unix.Syscall6(unix.SYS_KEXEC_LOAD, 0, 0, 0, 0, 0, 0))
	case "module":
		return errno(unix.Syscall(unix.SYS_DELETE_MODULE, 0, 0, 0))
	case "keyring":
		_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_PROCESS_KEYRING, true)
		return err
	case "future": // a system call of a kernel that is not there yet
		return errno(unix.Syscall(999, 0, 0, 0))
	case "mptcp":
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
		if err == nil {
			unix.Close(fd)
		}
		return err
	case "socket":
		family := map[string]int{"unix": unix.AF_UNIX, "inet": unix.AF_INET, "inet6": unix.AF_INET6, "netlink": unix.AF_NETLINK, "alg": unix.AF_ALG, "packet": unix.AF_PACKET}[arg]
		fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	case "foreign-arch": // the 32-bit interface, or x32: the process is killed
		return errno(unix.RawSyscall(0x40000000|unix.SYS_GETPID, 0, 0, 0))
	}
	return fmt.Errorf("no deed %q", deed)
}
