//go:build linux

// Package faulttest makes faults of disks and processes for tests: a disk that is full, a disk that cannot sync, a process
// that is killed. Only tests import it.
//
// The faults concern a whole process, so the test binary is started again, running nothing but the calling test.
package faulttest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// childDir names the environment variable that tells a test that it is the child, and where to work.
const childDir = "SIGNET_FAULTTEST_DIR"

// Child returns the directory to work in if this process was started by Command for the same test, and otherwise "".
func Child() string { return os.Getenv(childDir) }

// Command starts the test binary again, running nothing but the calling test, where Child returns dir.
func Command(t *testing.T, dir string) *exec.Cmd {
	var parts []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		parts = append(parts, "^"+part+"$")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run="+strings.Join(parts, "/"), "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// InSmallDisk runs f in a child process, as root in a mount namespace of its own, where dir is a tmpfs of size bytes.
// It ends the calling test with an error if that is impossible.
func InSmallDisk(t *testing.T, size int64, f func(dir string)) {
	dir := Child()
	if dir == "" {
		if os.Geteuid() != 0 {
			t.Fatal("this test mounts a small disk and has to run as root (sudo go test, or unshare -rm go test)")
		}
		cmd := Command(t, t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("in the mount namespace: %v\n%s", err, out)
		}
		return
	}
	// Otherwise the mount would appear outside as well.
	if err := syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	f(dir)
}

// FillDisk fills the file system of dir to the last byte and returns what makes room again.
func FillDisk(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 64<<10); len(block) > 0; {
		_, err := f.Write(block)
		switch {
		case errors.Is(err, syscall.ENOSPC):
			block = block[:len(block)/2]
		case err != nil:
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(f, "x"); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// FailSync makes every fsync and fdatasync of this process return EIO from now on, without doing anything. It cannot be
// undone, and is for child processes.
func FailSync(t *testing.T) {
	t.Helper()
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	// The architecture need not be checked: this is no sandbox.
	program := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the system call
		{Code: equal, K: unix.SYS_FSYNC, Jt: 2},
		{Code: equal, K: unix.SYS_FDATASYNC, Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
		{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EIO)},
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// The flag is the thread's, and TSYNC carries it with the filter to all others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatalf("no_new_privs: %v", err)
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&filter)))
	if errno != 0 {
		t.Fatalf("seccomp: %v", errno)
	}
}
