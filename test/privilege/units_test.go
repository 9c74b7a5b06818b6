package privilege

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/examiner"
	"github.com/signet-id/signet/internal/sandbox"
)

// unit reads a unit: the values of each key, in their order.
func unit(t *testing.T, name string) map[string][]string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("../../deploy/systemd", name))
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, line := range strings.Split(string(data), "\n") {
		if key, value, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") {
			keys[key] = append(keys[key], strings.Fields(value)...)
			if value == "" {
				keys[key] = []string{}
			}
		}
	}
	return keys
}

// TestUnits holds the units to what the code needs and the documents say.
func TestUnits(t *testing.T) {
	for name, caps := range map[string][]sandbox.Capability{"signet-agent.service": examiner.Capabilities, "signet-ca.service": nil} {
		u := unit(t, name)
		want := strings.Fields(sandbox.Names(caps))
		if len(caps) == 0 {
			want = []string{}
		}
		for _, key := range []string{"CapabilityBoundingSet", "AmbientCapabilities"} {
			if got, ok := u[key]; !ok || !slices.Equal(got, want) {
				t.Errorf("%s: %s=%q, and the program needs %q", name, key, got, want)
			}
		}
		for key, want := range map[string]string{"Type": "notify", "NotifyAccess": "main", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "MemoryDenyWriteExecute": "yes"} {
			if got := strings.Join(u[key], " "); got != want {
				t.Errorf("%s: %s=%q, want %q", name, key, got, want)
			}
		}
		if len(u["WatchdogSec"]) != 1 || len(u["User"]) != 1 || u["User"][0] == "root" {
			t.Errorf("%s: WatchdogSec=%q User=%q", name, u["WatchdogSec"], u["User"])
		}
	}
	c, err := agent.ReadConfig([]byte("trust_domain: example.org\nserver_address: ca:8081\ndata_dir: /var/lib/signet/agent\njoin_token_file: /etc/signet/token\ntrust_bundle_path: /etc/signet/b.pem\n"), "agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	service, socket := unit(t, "signet-agent.service"), unit(t, "signet-agent.socket")
	if got := socket["ListenStream"]; !slices.Equal(got, []string{c.SocketPath}) {
		t.Errorf("ListenStream=%q, and socket_path is %q by default", got, c.SocketPath)
	}
	if got := socket["FileDescriptorName"]; !slices.Equal(got, []string{agent.SocketWorkload}) {
		t.Errorf("FileDescriptorName=%q, want %q", got, agent.SocketWorkload)
	}
	// What the agent writes to must be what the unit makes, but for the directory of the socket, which is root's: another
	// daemon of this host may have its directory in there, and systemd would give that to the agent's user, too.
	p, err := c.Privileges("/etc/signet/agent.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	makes := func(path string) bool {
		return slices.ContainsFunc(service["RuntimeDirectory"], func(d string) bool { return path == "/run/"+d }) ||
			slices.ContainsFunc(service["StateDirectory"], func(d string) bool { return path == "/var/lib/"+d })
	}
	for _, a := range p.Policy.Files {
		if want := a.Path != filepath.Dir(c.SocketPath); a.Kind == sandbox.Own && makes(a.Path) != want {
			t.Errorf("the unit makes %s: %t, want %t", a.Path, !want, want)
		}
	}
	page, err := os.ReadFile("../../docs/operate/privileges.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range append(slices.Clone(examiner.Capabilities), sandbox.DACOverride) {
		if !strings.Contains(string(page), "| "+c.String()+" |") {
			t.Errorf("docs/operate/privileges.md has no row for %v", c)
		}
	}
}
