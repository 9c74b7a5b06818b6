package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var trial string

// TestMain builds the program that is put into the sandbox: a test cannot leave one, and this one links no C code.
func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "sandbox")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil {
			panic(err)
		}
		trial = filepath.Join(dir, "trial")
		build := exec.Command("go", "build", "-o", trial, "./testdata/trial")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			panic(fmt.Sprintf("%v: %s", err, out))
		}
		return m.Run()
	}())
}

type outcome struct {
	Report Report
	Err    string
	deeds  map[string]string
}

// try runs the program under a policy; attr may make it another user with other capabilities.
func try(t *testing.T, p Policy, attr *syscall.SysProcAttr, deeds ...string) outcome {
	t.Helper()
	in, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(trial, deeds...)
	cmd.SysProcAttr = attr
	cmd.Stdin = bytes.NewReader(in)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	var o outcome
	var all map[string]json.RawMessage
	if err := errors.Join(json.Unmarshal(out, &o), json.Unmarshal(out, &all)); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	o.deeds = map[string]string{}
	for _, d := range deeds {
		var s string
		if raw, ok := all[d]; ok {
			if err := json.Unmarshal(raw, &s); err != nil {
				t.Fatal(err)
			}
			o.deeds[d] = s
		} else {
			o.deeds[d] = "was not done"
		}
	}
	return o
}

// worked checks that deeds worked, and refused that they ended with one of the kernel's ways to refuse.
func (o outcome) worked(t *testing.T, deeds ...string) {
	t.Helper()
	for _, d := range deeds {
		if got, ok := o.deeds[d]; !ok || got != "" {
			t.Errorf("%s: %q, want it to work", d, got)
		}
	}
}

func (o outcome) refused(t *testing.T, why string, deeds ...string) {
	t.Helper()
	for _, d := range deeds {
		if got := o.deeds[d]; !strings.HasSuffix(got, why) {
			t.Errorf("%s: %q, want %q", d, got, why)
		}
	}
}

const (
	denied       = "permission denied"
	notPermitted = "operation not permitted"
)

// landlockVersion skips the test where the kernel has no Landlock of this version.
func landlockVersion(t *testing.T, want int) {
	t.Helper()
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || int(v) < want {
		t.Skipf("this kernel has Landlock version %d (%v), and the test needs %d", int(v), errno, want)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to start programs as another user and with other capabilities")
	}
}

// other starts a process of another user and returns its id.
func other(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("sleep", "3600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 64124, Gid: 64124}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return fmt.Sprint(cmd.Process.Pid)
}

// TestPaths shows what each kind of access is good for, and that all else is closed, even to root.
func TestPaths(t *testing.T) {
	landlockVersion(t, 3)
	dir := t.TempDir()
	for _, d := range []string{"read", "own", "else"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"f", "g", "h"} {
			if err := os.WriteFile(filepath.Join(dir, d, f), []byte("#!/bin/sh\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	p := func(path string) string { return filepath.Join(dir, path) }
	policy := Policy{Seccomp: Off, Landlock: Require, Files: []Access{{p("read"), Read}, {p("own"), Own}, {p("else/h"), Read}, {"/dev/null", Device}, {p("absent"), Own}}}
	good := []string{
		"read=" + p("read/f"), "list=" + p("read"), "read=" + p("own/f"), "write=" + p("own/new"), "mkdir=" + p("own/d"), "remove=" + p("own/f"),
		"rename=" + p("own/g") + "," + p("own/d/g"), "truncate=" + p("own/h"), "listen-unix=" + p("own/s"), "read=" + p("else/h"), "write=/dev/null", "thread",
	}
	bad := []string{
		"write=" + p("read/f"), "write=" + p("read/new"), "truncate=" + p("read/f"), "remove=" + p("read/f"), "mkdir=" + p("read/d"), "listen-unix=" + p("read/s"),
		"read=" + p("else/f"), "list=" + p("else"), "write=" + p("else/h"), "write=" + p("else/new"), "rename=" + p("own/new") + "," + p("else/new"), "mkdir=" + p("absent"), "read=/etc/passwd",
		"exec=" + p("own/d/g"), "exec=" + p("read/g"), "exec=/bin/true",
	}
	o := try(t, policy, nil, slices.Concat(good, bad)...)
	if o.Err != "" || o.Report.Landlock < 3 {
		t.Fatalf("%+v", o)
	}
	o.worked(t, good...)
	for _, d := range bad {
		// Moving a file between directories is refused as if they were on different disks.
		if got := o.deeds[d]; !strings.HasSuffix(got, denied) && !strings.HasSuffix(got, "invalid cross-device link") {
			t.Errorf("%s: %q, want it refused", d, got)
		}
	}
}

// TestPorts shows that TCP connections go to the named ports only, and that none is listened on.
func TestPorts(t *testing.T) {
	landlockVersion(t, 4)
	var addrs []string
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		addrs = append(addrs, l.Addr().String())
	}
	port := func(addr string) uint16 {
		a, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		return uint16(a.Port)
	}
	o := try(t, Policy{Landlock: Require, ConnectTCP: []uint16{port(addrs[0])}}, nil, "connect="+addrs[0], "connect="+addrs[1], "listen-tcp=127.0.0.1:0", "mptcp",
		"fastopen="+addrs[1], "fastopen-msg="+addrs[1], "listen-unbound")
	o.worked(t, "connect="+addrs[0])
	o.refused(t, denied, "connect="+addrs[1], "listen-tcp=127.0.0.1:0")
	// Landlock would not see these.
	o.refused(t, "protocol not supported", "mptcp")
	o.refused(t, notPermitted, "fastopen="+addrs[1], "fastopen-msg="+addrs[1], "listen-unbound")
	if !o.Report.PortsRestricted {
		t.Errorf("report: %+v", o.Report)
	}
}

// TestOtherProcesses shows that a Landlock domain keeps root with all capabilities from other processes. That is why
// executables are looked at by a process without one.
func TestOtherProcesses(t *testing.T) {
	landlockVersion(t, 1)
	needRoot(t)
	pid := other(t)
	exe, mem := "exe="+pid, "mem="+pid
	keep := []Capability{SysPtrace, DACReadSearch, DACOverride}
	everywhere := []Access{{"/", Own}}
	try(t, Policy{Seccomp: Off, Landlock: Off, Keep: keep}, nil, exe, mem).worked(t, exe, mem)
	o := try(t, Policy{Seccomp: Off, Landlock: Require, Keep: keep, Files: everywhere}, nil, exe, mem, "ptrace")
	o.refused(t, denied, exe, mem)
	o.refused(t, notPermitted, "ptrace")
}

// TestSyscalls shows that what is refused is refused to root, on every thread, and that the rest works.
func TestSyscalls(t *testing.T) {
	dir := t.TempDir()
	needRoot(t)
	pid := other(t)
	bad := []string{"exec=/bin/true", "fork", "ptrace", "readv", "mount=" + dir, "unshare", "setuid", "bpf", "io_uring", "userfaultfd", "kexec", "module", "keyring",
		"listen-unix=" + dir + "/s", "listen-tcp=127.0.0.1:0", "listen-unbound"}
	good := []string{"thread", "read=/etc/passwd", "write=" + dir + "/f", "socket=unix", "socket=inet", "socket=inet6"}
	o := try(t, Policy{Landlock: Off, Seccomp: Require, Keep: []Capability{SysPtrace}}, nil, slices.Concat(bad, good, []string{"socket=alg", "socket=packet", "socket=netlink", "future"})...)
	if o.Err != "" || !o.Report.Seccomp {
		t.Fatalf("%+v", o)
	}
	o.refused(t, notPermitted, bad...)
	o.refused(t, "address family not supported by protocol", "socket=alg", "socket=packet", "socket=netlink")
	o.refused(t, "function not implemented", "future")
	o.worked(t, good...)

	t.Run("keyring", func(t *testing.T) {
		try(t, Policy{Landlock: Off, Seccomp: Require, Syscalls: Syscalls{Keyring: true}}, nil, "keyring").worked(t, "keyring")
	})
	t.Run("only", func(t *testing.T) {
		o := try(t, Policy{Landlock: Off, Seccomp: Require, Syscalls: Syscalls{Only: true}, Keep: []Capability{SysPtrace}}, nil,
			slices.Concat(bad, []string{"thread", "read=/etc/passwd", "list=" + dir, "exe=" + pid, "write=" + dir + "/g", "mem=" + pid, "socket=unix", "socket=inet", "remove=" + dir + "/f"})...)
		o.worked(t, "thread", "read=/etc/passwd", "exe="+pid)
		o.refused(t, notPermitted, slices.Concat(bad, []string{"write=" + dir + "/g", "mem=" + pid, "socket=unix", "socket=inet", "remove=" + dir + "/f"})...)
	})
	t.Run("off", func(t *testing.T) {
		try(t, Policy{Landlock: Off, Seccomp: Off}, nil, "exec=/bin/true", "fork").worked(t, "exec=/bin/true", "fork")
	})
}

// TestCapabilities starts the program as root with everything and as another user with some, and looks at what is left.
func TestCapabilities(t *testing.T) {
	needRoot(t)
	const uid = 64123
	exe := "exe=" + other(t)
	user := func(caps ...uintptr) *syscall.SysProcAttr {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, AmbientCaps: caps}
	}
	tests := []struct {
		name string
		attr *syscall.SysProcAttr
		keep []Capability
		want []Capability
	}{
		{"root keeps what is named", nil, []Capability{DACReadSearch, SysPtrace}, []Capability{DACReadSearch, SysPtrace}},
		{"root keeps nothing", nil, nil, nil},
		{"a user keeps what it has of it", user(unix.CAP_SYS_PTRACE, unix.CAP_NET_RAW), []Capability{DACReadSearch, SysPtrace}, []Capability{SysPtrace}},
		{"a user without any", user(), []Capability{SysPtrace}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := try(t, Policy{Landlock: Off, Seccomp: Off, Keep: tt.keep}, tt.attr, exe, "read=/proc/self/status")
			if o.Err != "" || !slices.Equal(o.Report.Capabilities, tt.want) || o.Report.KeptAll != "" {
				t.Errorf("%+v; want %v left", o, tt.want)
			}
			if slices.Contains(tt.want, SysPtrace) {
				o.worked(t, exe)
			} else {
				o.refused(t, denied, exe)
			}
		})
	}
}

// TestPolicyMistakes reads what is said of modes that are none.
func TestPolicyMistakes(t *testing.T) {
	if o := try(t, Policy{Landlock: "on"}, nil); !strings.Contains(o.Err, `landlock: "on" is not auto, off or require`) {
		t.Errorf("%+v", o)
	}
	if o := try(t, Policy{Landlock: Off, Seccomp: "always"}, nil); !strings.Contains(o.Err, `seccomp: "always" is not auto, off or require`) {
		t.Errorf("%+v", o)
	}
}

// TestReport reads what a log line says.
func TestReport(t *testing.T) {
	r := Report{Capabilities: []Capability{DACReadSearch, SysPtrace}, Landlock: 3, NoSeccomp: "off by configuration"}
	got := r.LogValue().String()
	for _, want := range []string{"CAP_DAC_READ_SEARCH CAP_SYS_PTRACE", "version 3, without TCP ports", "off by configuration"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q does not say %q", got, want)
		}
	}
}

// TestForeignArchitecture shows that a call by another interface's number ends the process.
func TestForeignArchitecture(t *testing.T) {
	if architecture != unix.AUDIT_ARCH_X86_64 {
		t.Skip("this architecture has one interface")
	}
	cmd := exec.Command(trial, "foreign-arch")
	cmd.Stdin = strings.NewReader(`{"Landlock":"off","Seccomp":"require"}`)
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGSYS {
		t.Errorf("the process ended with %v, want SIGSYS", err)
	}
}

// Root without a sandbox holds all of them, and a log that numbers them is of no use to whoever reads it.
func TestCapabilitiesHaveNames(t *testing.T) {
	for c, want := range map[Capability]string{
		unix.CAP_CHOWN: "CAP_CHOWN", DACOverride: "CAP_DAC_OVERRIDE", DACReadSearch: "CAP_DAC_READ_SEARCH", unix.CAP_SETPCAP: "CAP_SETPCAP",
		unix.CAP_LINUX_IMMUTABLE: "CAP_LINUX_IMMUTABLE", unix.CAP_NET_RAW: "CAP_NET_RAW", unix.CAP_SYS_CHROOT: "CAP_SYS_CHROOT", SysPtrace: "CAP_SYS_PTRACE",
		unix.CAP_SYS_ADMIN: "CAP_SYS_ADMIN", unix.CAP_MKNOD: "CAP_MKNOD", unix.CAP_SETFCAP: "CAP_SETFCAP", unix.CAP_SYSLOG: "CAP_SYSLOG",
		unix.CAP_BPF: "CAP_BPF", unix.CAP_LAST_CAP: "CAP_CHECKPOINT_RESTORE", unix.CAP_LAST_CAP + 1: "capability 41", -1: "capability -1",
	} {
		if got := c.String(); got != want {
			t.Errorf("Capability(%d).String() = %s, want %s", int(c), got, want)
		}
	}
	if len(capabilityNames) != unix.CAP_LAST_CAP+1 {
		t.Errorf("%d names of capabilities, want %d", len(capabilityNames), unix.CAP_LAST_CAP+1)
	}
}
