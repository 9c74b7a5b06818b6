// Package sandbox takes from the running process what it does not need any more: capabilities, paths, ports and system
// calls. A daemon calls Apply once, when it holds its files and sockets and before it answers anybody. Nothing of it can
// be undone. It knows no configuration: who calls it says what is needed.
package sandbox

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Mode says how much one part of the sandbox is wanted.
type Mode string

// The modes. The zero value is Auto.
const (
	// Auto takes what the kernel offers, and says in the log what it does not.
	Auto Mode = "auto"
	// Off leaves this part out.
	Off Mode = "off"
	// Require refuses to start without it.
	Require Mode = "require"
)

// Check refuses what is no mode.
func (m Mode) Check() error {
	switch m {
	case "", Auto, Off, Require:
		return nil
	}
	return fmt.Errorf("%q is not auto, off or require", string(m))
}

// A Policy is what a process goes on needing. All else is taken away.
type Policy struct {
	// Keep are the capabilities that stay, as far as the process has them.
	Keep []Capability

	// Landlock says whether Files and ConnectTCP are enforced.
	Landlock Mode
	// Files are the paths that may be used. One that does not exist is left out, and so can never be used.
	Files []Access
	// ConnectTCP are the ports that TCP connections may go to. No port may be listened on that is not already. Both take
	// seccomp as well: Landlock does not see MPTCP and TCP Fast Open, which reach the same ports, and who listens without bind.
	ConnectTCP []uint16

	// Seccomp says whether Syscalls is enforced.
	Seccomp Mode
	// Syscalls says which system calls stay.
	Syscalls Syscalls
}

// An Access is what may be done with one path: a file, or a directory with all below it.
type Access struct {
	Path string
	Kind Kind
}

// A Kind is a set of rights to a path.
type Kind int

// The kinds of access.
const (
	// Read is to read files and list directories.
	Read Kind = iota
	// Device is to read and write, and to control what is no ordinary file, but to make nothing.
	Device
	// Own is to make, change, move and remove files, directories and sockets. Nothing may be executed.
	Own
)

// A Report says what is in force.
type Report struct {
	// Capabilities are those that are left.
	Capabilities []Capability
	// Landlock is the version of Landlock's interface by which paths are restricted; 0: they are not. NoLandlock says why.
	Landlock   int
	NoLandlock string
	// PortsRestricted says whether TCP ports are restricted as well, which takes version 4, and seccomp.
	PortsRestricted bool
	// Seccomp says whether system calls are restricted. NoSeccomp says why not.
	Seccomp   bool
	NoSeccomp string
	// KeptAll says why capabilities are as they were; empty: what Policy does not keep is gone.
	KeptAll string
}

// LogValue is the report as a log shows it.
func (r Report) LogValue() slog.Value {
	landlock, seccomp := r.NoLandlock, r.NoSeccomp
	if r.Landlock > 0 {
		landlock = fmt.Sprintf("version %d", r.Landlock)
		if !r.PortsRestricted {
			landlock += ", without TCP ports"
		}
	}
	if r.Seccomp {
		seccomp = "on"
	}
	caps := Names(r.Capabilities)
	if r.KeptAll != "" {
		caps += " (none was dropped: " + r.KeptAll + ")"
	}
	return slog.GroupValue(slog.Int("uid", unix.Geteuid()), slog.String("capabilities", caps), slog.String("landlock", landlock), slog.String("seccomp", seccomp))
}

// errThreads says that only some threads could be restricted, which would be no restriction at all.
var errThreads = errors.New("this program is linked with C code, which makes threads that Go does not know (build it with CGO_ENABLED=0)")

// Whole says whether all threads of this program can be restricted, or why not.
func Whole() error {
	if err := onAllThreads(unix.SYS_GETPPID, 0, 0, 0); errors.Is(err, errThreads) {
		return err
	}
	return nil
}

// Apply restricts all threads of the process. An error means that a required part is not to be had, or that the policy
// cannot work; the process should end then, since some of it may be in force.
func Apply(p Policy) (Report, error) {
	var r Report
	for field, m := range map[string]Mode{"landlock": p.Landlock, "seccomp": p.Seccomp} {
		if err := m.Check(); err != nil {
			return r, fmt.Errorf("%s: %w", field, err)
		}
	}
	// Without this a program with set-user-ID or file capabilities would give back what is taken here, and the kernel
	// refuses Landlock and seccomp to the unprivileged.
	if err := noNewPrivileges(); err != nil && !errors.Is(err, errThreads) {
		return r, fmt.Errorf("giving up new privileges: %w", err)
	}
	if p.Landlock == Off {
		r.NoLandlock = "off by configuration"
	} else {
		version, err := restrictPaths(p)
		if err != nil && (p.Landlock == Require || !errors.Is(err, errUnavailable)) {
			return r, fmt.Errorf("landlock: %w", err)
		}
		if err != nil {
			r.NoLandlock = err.Error()
		}
		r.Landlock = version
	}
	kept, err := dropCapabilities(p.Keep)
	switch {
	case errors.Is(err, errThreads):
		r.KeptAll = err.Error()
	case err != nil:
		return r, fmt.Errorf("dropping capabilities: %w", err)
	}
	r.Capabilities = kept
	if p.Seccomp == Off {
		r.NoSeccomp = "off by configuration"
		return r, nil
	}
	// Last: it takes away the calls that were used above.
	if err := restrictSyscalls(p.Syscalls); err != nil {
		if p.Seccomp == Require || !errors.Is(err, errUnavailable) {
			return r, fmt.Errorf("seccomp: %w", err)
		}
		r.NoSeccomp = err.Error()
		return r, nil
	}
	// Landlock knows TCP alone, so other protocols that reach the same ports are kept away by the filter.
	r.Seccomp, r.PortsRestricted = true, r.Landlock >= 4
	return r, nil
}

// errUnavailable says that the kernel does not offer it, rather than that something is wrong.
var errUnavailable = errors.New("not available")

func unavailable(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errUnavailable)
}

func noNewPrivileges() error {
	return onAllThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0)
}

// onAllThreads makes a system call on every thread, since the kernel keeps for each what this package restricts.
//
//go:uintptrescapes
func onAllThreads(trap, a1, a2, a3 uintptr) error {
	_, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0)
	switch errno {
	case 0:
		return nil
	case syscall.ENOTSUP:
		return errThreads
	}
	return errno
}

// architecture is the kernel's name for that of this program; zero where no filter was written.
var architecture = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]

// Names returns capabilities as systemd and setcap write them, or "none".
func Names(caps []Capability) string {
	if len(caps) == 0 {
		return "none"
	}
	names := make([]string, len(caps))
	for i, c := range caps {
		names[i] = c.String()
	}
	return strings.Join(names, " ")
}
