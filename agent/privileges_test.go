package agent

import (
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/internal/sandbox"
)

func TestProcMount(t *testing.T) {
	tests := []struct {
		line   string
		gid    uint32
		hidden bool
		ok     bool
	}{
		{"22 1 0:20 / /proc rw,relatime shared:13 - proc proc rw", 0, false, true},
		{"22 1 0:20 / /proc rw,relatime - proc proc rw,gid=27,hidepid=2", 27, true, true},
		{"22 1 0:20 / /proc rw,relatime - proc proc rw,hidepid=invisible", 0, true, true},
		{"22 1 0:20 / /proc rw,relatime - proc proc rw,hidepid=off", 0, false, true},
		{"22 1 0:20 / /proc/sys rw - proc proc rw,hidepid=2", 0, false, false},
		{"22 1 0:20 / /proc rw - tmpfs none rw", 0, false, false},
		{"22 1 0:20 / /proc rw -", 0, false, false},
		{"", 0, false, false},
	}
	for _, tt := range tests {
		gid, hidden, ok := procMount(tt.line)
		if gid != tt.gid || hidden != tt.hidden || ok != tt.ok {
			t.Errorf("procMount(%q) = %d, %t, %t; want %d, %t, %t", tt.line, gid, hidden, ok, tt.gid, tt.hidden, tt.ok)
		}
	}
}

// TestPrivileges: what is kept follows from what is configured.
func TestPrivileges(t *testing.T) {
	config := func(more string) Config {
		t.Helper()
		c, err := ReadConfig([]byte("trust_domain: example.org\nserver_address: ca.example.org:8099\ndata_dir: /var/lib/signet/agent\njoin_token_file: /etc/signet/token\ntrust_bundle_path: /srv/bundle.pem\n"+more), "agent.yaml")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	all := []sandbox.Capability{sandbox.DACOverride, sandbox.DACReadSearch, sandbox.SysPtrace}
	c := config("")
	p, err := c.Privileges("/etc/signet/agent.yaml", all)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []sandbox.Access{
		{Path: "/var/lib/signet/agent", Kind: sandbox.Own}, {Path: "/run/signet", Kind: sandbox.Own}, {Path: "/run/signet-agent", Kind: sandbox.Own}, {Path: "/etc/signet", Kind: sandbox.Read}, {Path: "/srv", Kind: sandbox.Read},
	} {
		if !slices.Contains(p.Policy.Files, want) {
			t.Errorf("files %+v lack %+v", p.Policy.Files, want)
		}
	}
	for _, a := range p.Policy.Files {
		if a.Path == "/" || a.Path == "" || a.Kind == sandbox.Own && !strings.Contains(a.Path, "signet") {
			t.Errorf("%+v is too much", a)
		}
	}
	if !slices.Equal(p.Policy.ConnectTCP, []uint16{8099, 53}) || p.Policy.Syscalls.Keyring || len(p.Missing) > 0 {
		t.Errorf("%+v", p)
	}

	// A kubelet has files and a port.
	c = config("workload_attestation: {k8s: {kubelet_ca_path: /srv/kubelet/ca.pem, kubelet_secure_port: 10260}}\n")
	if p, err = c.Privileges("", all); err != nil || !slices.Contains(p.Policy.Files, sandbox.Access{Path: "/srv/kubelet", Kind: sandbox.Read}) ||
		!slices.Contains(p.Policy.Files, sandbox.Access{Path: "/var/run/secrets/kubernetes.io/serviceaccount", Kind: sandbox.Read}) || !slices.Equal(p.Policy.ConnectTCP, []uint16{8099, 53, 10260}) {
		t.Errorf("%+v, %v", p, err)
	}

	// The token of a pod, also where the file is the default one.
	c.NodeAttestation.K8sPSAT = &K8sPSAT{Cluster: "prod"}
	if p, err = c.Privileges("", all); err != nil || !slices.Contains(p.Policy.Files, sandbox.Access{Path: "/var/run/secrets/tokens", Kind: sandbox.Read}) {
		t.Errorf("%+v, %v", p, err)
	}

	// One process keeps what the examiner would.
	c = config("sandbox: {landlock: off}\n")
	if p, err = c.Privileges("", all); err != nil || p.Examiner || sandbox.Names(p.Policy.Keep) != "CAP_DAC_READ_SEARCH CAP_SYS_PTRACE" {
		t.Errorf("%+v, %v", p, err)
	}
	if p, _ = c.Privileges("", nil); len(p.Missing) != 2 || !strings.Contains(p.Missing[0], "CAP_SYS_PTRACE: no unix:path and unix:sha256") {
		t.Errorf("missing: %q", p.Missing)
	}

	c = config("workload_attestation: {docker: {rootless: true}}\nsandbox: {landlock: off}\n")
	if p, _ = c.Privileges("", all); !slices.Contains(p.Policy.Keep, sandbox.DACOverride) || len(p.Remarks) == 0 {
		t.Errorf("rootless: %+v", p)
	}
	if p, _ = c.Privileges("", []sandbox.Capability{sandbox.SysPtrace, sandbox.DACReadSearch}); len(p.Missing) != 1 || !strings.Contains(p.Missing[0], "docker.rootless") {
		t.Errorf("rootless, without: %q", p.Missing)
	}

	if _, err := ReadConfig([]byte("trust_domain: example.org\nserver_address: ca:1\ndata_dir: /d\njoin_token: x.y.z\nsandbox: {seccomp: yes please}\n"), "a.yaml"); err == nil || !strings.Contains(err.Error(), `sandbox.seccomp: "yes please" is not auto, off or require`) {
		t.Errorf("%v", err)
	}
}

func TestPortOf(t *testing.T) {
	for endpoint, want := range map[string]uint16{"": 80, "http://169.254.169.254": 80, "https://m": 443, "http://127.0.0.1:8099/x": 8099, ":": 80} {
		if got := portOf(endpoint); got != want {
			t.Errorf("portOf(%q) = %d, want %d", endpoint, got, want)
		}
	}
}
