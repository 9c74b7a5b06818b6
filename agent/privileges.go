package agent

import (
	"bufio"
	"cmp"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/agent/examiner"
	"github.com/signet-id/signet/agent/nodeattest/k8spsat"
	"github.com/signet-id/signet/agent/workloadattest/docker"
	"github.com/signet-id/signet/internal/sandbox"
)

// Sandbox says what the agent gives up once it has started. See docs/operate/privileges.md.
type Sandbox struct {
	// Landlock lets the agent open only the files and TCP ports that its configuration needs, and has a process of its own,
	// the examiner, look at executables: auto (default: where the kernel has it), off, or require. Off keeps it all in one
	// process.
	Landlock sandbox.Mode `yaml:"landlock"`
	// Seccomp takes away the system calls that the agent does not need, such as starting programs: auto (default), off,
	// or require.
	Seccomp sandbox.Mode `yaml:"seccomp"`
}

func (s *Sandbox) check(bad func(field, format string, args ...any)) {
	for _, f := range []struct {
		name string
		mode *sandbox.Mode
	}{{"landlock", &s.Landlock}, {"seccomp", &s.Seccomp}} {
		if *f.mode == "" {
			*f.mode = sandbox.Auto
		}
		if err := f.mode.Check(); err != nil {
			bad("sandbox."+f.name, "%v", err)
		}
	}
}

// A need is what one feature of the agent goes on needing of the machine after the start. Whatever no feature names is
// closed.
type need struct {
	// feature is the key of the configuration that asks for it.
	feature string
	// read are files and directories, own directories in which the agent makes and removes things, devices are device files
	// and Unix sockets that it must be able to write to.
	read, own, devices []string
	// ports are the TCP ports that it connects to.
	ports []uint16
	// keyring is the kernel's key service.
	keyring bool
	// othersSockets are sockets of other users, which only CAP_DAC_OVERRIDE opens.
	othersSockets bool
}

// A needy part of the configuration says what it needs. Methods of workload attestation, node attestors and whatever else is
// configured implement it if that is anything beyond what every agent needs.
type needy interface{ needs() need }

// needs are those of all features that are configured. This is the place where a new feature says what it needs.
func (c *Config) needs(configFile string) []need {
	_, port, _ := net.SplitHostPort(c.ServerAddress) // Check has seen it
	ca, _ := net.LookupPort("tcp", port)
	all := []need{
		{feature: "data_dir", own: []string{c.DataDir}},
		{feature: "socket_path", own: []string{filepath.Dir(c.SocketPath)}},
		{feature: "server_address", ports: []uint16{uint16(ca), 53}, read: []string{"/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager"}},
		// Names of users and groups, host names, time zones; what processes are; in which containers.
		{feature: "workload_attestation", read: []string{"/etc", "/usr/share/zoneinfo", "/proc", "/sys/fs/cgroup"}, devices: []string{"/dev/null"}},
	}
	add := func(feature string, n need) {
		n.feature = feature
		all = append(all, n)
	}
	folder := func(feature string, files ...string) { // a file may be replaced by another, so its folder counts
		for _, f := range files {
			if f != "" {
				add(feature, need{read: []string{filepath.Dir(f)}})
			}
		}
	}
	folder("configuration", configFile)
	folder("join_token_file", c.JoinTokenFile)
	folder("trust_bundle_path", c.TrustBundlePath)
	if c.AdminSocket.Path != "" {
		add("admin_socket", need{own: []string{filepath.Dir(c.AdminSocket.Path)}})
	}
	if c.Broker.SocketPath != "" {
		add("broker.socket_path", need{own: []string{filepath.Dir(c.Broker.SocketPath)}})
	}
	n := c.NodeAttestation
	if n.X509POP != nil {
		folder("node_attestation.x509pop", n.X509POP.CertificatePath, n.X509POP.PrivateKeyPath, n.X509POP.IntermediatesPath)
	}
	if n.K8sPSAT != nil {
		folder("node_attestation.k8s_psat", cmp.Or(n.K8sPSAT.TokenPath, k8spsat.DefaultTokenPath))
	}
	if n.AWSIID != nil {
		add("node_attestation.aws_iid", need{ports: []uint16{portOf(n.AWSIID.MetadataEndpoint)}})
	}
	if n.GCPIIT != nil {
		add("node_attestation.gcp_iit", need{ports: []uint16{portOf(n.GCPIIT.MetadataEndpoint)}})
	}
	if n.TPM != nil {
		add("node_attestation.tpm", need{devices: []string{n.TPM.Device}, read: []string{"/sys/class/tpm", "/sys/devices"}})
	}
	for _, m := range c.WorkloadAttestation.used() {
		if m, ok := m.methodConfig.(needy); ok {
			n := m.needs()
			all = append(all, n)
		}
	}
	return append(all, c.SealedCache.needs())
}

func (c *SealedCache) needs() need {
	n := need{feature: "sealed_cache"} // in data_dir
	switch {
	case c.Disable:
	case c.Key == "keyring":
		n.keyring = true
	case c.Key == "tpm":
		n.devices, n.read = []string{c.TPMDevice}, []string{"/sys/class/tpm", "/sys/devices"}
	}
	return n
}

func (d *DockerAttestation) needs() need {
	n := need{feature: "workload_attestation.docker", devices: d.Sockets, othersSockets: d.Rootless}
	if d.Sockets == nil {
		n.devices = docker.RootSockets
	}
	if d.Rootless {
		n.feature, n.read = "workload_attestation.docker.rootless", []string{"/run/user"}
	}
	return n
}

// portOf is the TCP port of a URL, or of http where there is none.
func portOf(endpoint string) uint16 {
	u, err := url.Parse(endpoint)
	if err != nil || endpoint == "" {
		return 80
	}
	if p, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
		return uint16(p)
	}
	if u.Scheme == "https" {
		return 443
	}
	return 80
}

// Privileges are what the agent runs with, and what is said about it.
type Privileges struct {
	// Policy is what it keeps.
	Policy sandbox.Policy
	// Examiner says that another process looks at executables.
	Examiner bool
	// Missing is what will not work, each with what it would need.
	Missing []string
	// Remarks is what an operator might want to change.
	Remarks []string
}

// Privileges works out what an agent with this configuration, which has been checked, keeps once it has started. held are
// the capabilities of the process.
func (c *Config) Privileges(configFile string, held []sandbox.Capability) (Privileges, error) {
	p := Privileges{Policy: sandbox.Policy{Landlock: c.Sandbox.Landlock, Seccomp: c.Sandbox.Seccomp}}
	p.Examiner = c.Sandbox.Landlock != sandbox.Off
	var why string
	switch gid, hidden := hiddenProcesses(); {
	case !p.Examiner:
	case sandbox.Whole() != nil:
		why = sandbox.Whole().Error()
	case hidden && !inGroup(gid):
		why = fmt.Sprintf("/proc is mounted with hidepid, and under Landlock not even CAP_SYS_PTRACE shows its processes: put the agent's user into the group %d that the "+
			"mount option gid names (SupplementaryGroups= in the unit)", gid)
		if gid == 0 {
			why = "/proc is mounted with hidepid, and under Landlock not even CAP_SYS_PTRACE shows its processes: mount it with gid= of a group that the agent's user is in"
		}
	}
	if why != "" {
		if c.Sandbox.Landlock == sandbox.Require {
			return p, fmt.Errorf("sandbox.landlock: %s", why)
		}
		p.Remarks = append(p.Remarks, "no Landlock: "+why)
		p.Policy.Landlock, p.Examiner = sandbox.Off, false
	}
	if !p.Examiner {
		p.Policy.Keep = slices.Clone(examiner.Capabilities)
	}
	if !slices.Contains(held, sandbox.SysPtrace) {
		p.Missing = append(p.Missing, "CAP_SYS_PTRACE: no unix:path and unix:sha256 selectors of processes that are not of the agent's own user")
	}
	if !slices.Contains(held, sandbox.DACReadSearch) {
		p.Missing = append(p.Missing, "CAP_DAC_READ_SEARCH: no unix:path selectors of executables in closed directories, no unix:sha256 selectors of executables that only some users may read")
	}
	ports := map[uint16]bool{}
	for _, n := range c.needs(configFile) {
		for _, path := range n.read {
			p.Policy.Files = append(p.Policy.Files, sandbox.Access{Path: path, Kind: sandbox.Read})
		}
		for _, path := range n.own {
			p.Policy.Files = append(p.Policy.Files, sandbox.Access{Path: path, Kind: sandbox.Own})
		}
		closed := n.othersSockets
		for _, path := range n.devices {
			p.Policy.Files = append(p.Policy.Files, sandbox.Access{Path: path, Kind: sandbox.Device})
			closed = closed || !mayWrite(path)
		}
		switch {
		case !closed || slices.Contains(p.Policy.Keep, sandbox.DACOverride):
		case slices.Contains(held, sandbox.DACOverride):
			p.Policy.Keep = append(p.Policy.Keep, sandbox.DACOverride)
			p.Remarks = append(p.Remarks, fmt.Sprintf("CAP_DAC_OVERRIDE is kept for %s", n.feature))
		default:
			p.Missing = append(p.Missing, fmt.Sprintf("%s: the agent's user may not write to %s; add it to their group, or keep CAP_DAC_OVERRIDE", n.feature, strings.Join(n.devices, ", ")))
		}
		for _, port := range n.ports {
			if !ports[port] {
				ports[port] = true
				p.Policy.ConnectTCP = append(p.Policy.ConnectTCP, port)
			}
		}
		p.Policy.Syscalls.Keyring = p.Policy.Syscalls.Keyring || n.keyring
	}
	return p, nil
}

// mayWrite says whether the mode of what is at path lets this user write to it, capabilities apart. What is not there may
// come later.
func mayWrite(path string) bool {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return true
	}
	switch {
	case st.Uid == uint32(os.Geteuid()):
		return st.Mode&0o200 != 0
	case inGroup(st.Gid):
		return st.Mode&0o020 != 0
	}
	return st.Mode&0o002 != 0
}

func inGroup(gid uint32) bool {
	groups, err := os.Getgroups()
	return uint32(os.Getegid()) == gid || err == nil && slices.Contains(groups, int(gid))
}

// hiddenProcesses says whether /proc hides processes of other users, and for which group it does not.
func hiddenProcesses() (gid uint32, hidden bool) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return 0, false
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if g, h, ok := procMount(lines.Text()); ok {
			gid, hidden = g, h // the last one lies on top
		}
	}
	return gid, hidden
}

// procMount reads a line of mountinfo, if it is about /proc.
func procMount(line string) (gid uint32, hidden, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 5 || fields[4] != "/proc" {
		return 0, false, false
	}
	i := slices.Index(fields, "-")
	if i < 0 || len(fields) < i+4 || fields[i+1] != "proc" {
		return 0, false, false
	}
	for _, o := range strings.Split(fields[i+3], ",") {
		switch key, value, _ := strings.Cut(o, "="); key {
		case "hidepid":
			hidden = value != "0" && value != "off"
		case "gid":
			if n, err := strconv.ParseUint(value, 10, 32); err == nil {
				gid = uint32(n)
			}
		}
	}
	return gid, hidden, true
}
