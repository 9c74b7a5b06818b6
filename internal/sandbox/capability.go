package sandbox

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Capability is one of the kernel's. It prints as setcap and systemd write it.
type Capability int

// The capabilities that signet has a use for.
const (
	DACOverride   Capability = unix.CAP_DAC_OVERRIDE
	DACReadSearch Capability = unix.CAP_DAC_READ_SEARCH
	SysPtrace     Capability = unix.CAP_SYS_PTRACE
)

// lastCapability bounds the search for those that the kernel knows.
const lastCapability = 63

// capabilityNames are those of capability.h, in the order of their numbers.
var capabilityNames = strings.Fields(`
	CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
	NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE
	SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE
	AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF
	CHECKPOINT_RESTORE`)

// String returns a name such as CAP_SYS_PTRACE, and a number for what is newer than this program.
func (c Capability) String() string {
	if c < 0 || int(c) >= len(capabilityNames) {
		return "capability " + strconv.Itoa(int(c))
	}
	return "CAP_" + capabilityNames[c]
}

// Held returns the capabilities that are in effect, in the order of their numbers.
func Held() ([]Capability, error) {
	sets, err := capabilitySets()
	if err != nil {
		return nil, err
	}
	var held []Capability
	for c := range Capability(lastCapability + 1) {
		if sets[c/32].Effective&(1<<(c%32)) != 0 {
			held = append(held, c)
		}
	}
	return held, nil
}

func capabilitySets() ([2]unix.CapUserData, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return sets, fmt.Errorf("asking for the process's capabilities: %w", err)
	}
	return sets, nil
}

// dropCapabilities gives up all but keep, for good: also from the bounding set, where the process may. It returns what is
// left.
func dropCapabilities(keep []Capability) ([]Capability, error) {
	held, err := Held()
	if err != nil {
		return nil, err
	}
	if slices.Contains(held, unix.CAP_SETPCAP) {
		for c := range Capability(lastCapability + 1) {
			if in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err != nil || in == 0 || slices.Contains(keep, c) {
				continue // unknown to this kernel, or gone already
			}
			if err := onAllThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0); err != nil {
				return held, fmt.Errorf("%v, from the bounding set: %w", c, err)
			}
		}
	}
	sets, err := capabilitySets()
	if err != nil {
		return held, err
	}
	// Nothing is inheritable any more, which empties the ambient set, too.
	var left [2]unix.CapUserData
	for _, c := range keep {
		left[c/32].Permitted |= sets[c/32].Permitted & (1 << (c % 32))
	}
	left[0].Effective, left[1].Effective = left[0].Permitted, left[1].Permitted
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := onAllThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&left)), 0); err != nil {
		return held, err
	}
	return Held()
}
