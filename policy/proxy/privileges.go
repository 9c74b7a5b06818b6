package proxy

import (
	"path/filepath"
	"slices"

	"github.com/signet-id/signet/internal/sandbox"
)

// Policy is what the proxy goes on needing once New has returned: no capability, its configuration, the directories of its
// own Unix sockets, the ports that it connects to. See docs/decisions/0030-proxy-sandbox.md.
func (c *Config) Policy(configFile string) sandbox.Policy {
	p := sandbox.Policy{Landlock: c.Sandbox.Landlock, Seccomp: c.Sandbox.Seccomp, ConnectTCP: c.ports()}
	// Host names and time zones.
	for _, path := range []string{"/etc", "/usr/share/zoneinfo", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", configFile} {
		if path == configFile {
			if path == "" {
				continue // the configuration is not in a file
			}
			path = filepath.Dir(path)
		}
		p.Files = append(p.Files, sandbox.Access{Path: path, Kind: sandbox.Read})
	}
	for _, out := range c.Outbound {
		if network, path := split(out.Listen); network == "unix" {
			// The socket is removed at the end.
			p.Files = append(p.Files, sandbox.Access{Path: filepath.Dir(path), Kind: sandbox.Own})
		}
	}
	return p
}

// ports are the TCP ports that the proxy connects to: those of its backends and servers, of an agent that is reached by TCP, and
// of name servers.
func (c *Config) ports() []uint16 {
	ports := []uint16{53}
	add := func(address string) {
		if network, addr := split(address); network == "tcp" {
			if port := portOf(addr); port != 0 && !slices.Contains(ports, port) {
				ports = append(ports, port)
			}
		}
	}
	add(trimTCP(c.AgentSocket))
	for _, in := range c.Inbound {
		add(in.Backend)
	}
	for _, out := range c.Outbound {
		add(out.Address)
	}
	return ports
}

func trimTCP(endpoint string) string {
	const scheme = "tcp://"
	if len(endpoint) > len(scheme) && endpoint[:len(scheme)] == scheme {
		return endpoint[len(scheme):]
	}
	return endpoint
}
