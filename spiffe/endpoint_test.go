package spiffe

import (
	"net"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func TestEndpointVectors(t *testing.T) {
	for _, v := range []struct {
		name, in         string
		network, address string
		row              string // empty: valid
	}{
		{"V129 three slashes", "unix:///run/signet/agent.sock", "unix", "/run/signet/agent.sock", ""},
		{"V129 one slash", "unix:/run/signet/agent.sock", "unix", "/run/signet/agent.sock", ""},
		{"V130", "unix://run/agent.sock", "", "", "WEP-12"},
		{"V131", "unix:run/agent.sock", "", "", "WEP-13"},
		{"V132 query", "unix:///run/a.sock?x", "", "", "WEP-14"},
		{"V132 empty fragment", "unix:///run/a.sock#", "", "", "WEP-14"},
		{"V133 bare path", "/run/a.sock", "", "", "WEP-11"},
		{"V133 http", "http://127.0.0.1:80", "", "", "WEP-11"},
		{"V133 empty", "", "", "", "WEP-11"},
		{"V134 IPv4", "tcp://127.0.0.1:8000", "tcp", "127.0.0.1:8000", ""},
		{"V134 IPv6", "tcp://[::1]:8000", "tcp", "[::1]:8000", ""},
		{"V135", "tcp://localhost:8000", "", "", "WEP-15"},
		{"V136 no port", "tcp://127.0.0.1", "", "", "WEP-16"},
		{"V136 empty port", "tcp://127.0.0.1:", "", "", "WEP-16"},
		{"V136 large port", "tcp://127.0.0.1:99999", "", "", "WEP-16"},
		{"V137 path", "tcp://127.0.0.1:8000/", "", "", "WEP-17"},
		{"V137 user", "tcp://u@127.0.0.1:8000", "", "", "WEP-17"},
		{"DEC-18 port 0", "tcp://127.0.0.1:0", "", "", "WEP-16"},
		{"WEP-11 npipe", "npipe:x", "", "", "WEP-11"},
		{"WEP-11 scheme is not case-sensitive", "UNIX:///run/a.sock", "unix", "/run/a.sock", ""},
		{"WEP-11 space", "unix:///run/a b.sock", "", "", "WEP-11"},
		{"WEP-11 encoded space", "unix:///run/a%20b.sock", "unix", "/run/a b.sock", ""},
		{"WEP-11 encoded slash", "unix:///run/a%2Fb.sock", "", "", "WEP-11"},
		{"WEP-11 encoded zero", "unix:///run/a%00b.sock", "", "", "WEP-11"},
		{"WEP-11 bad escape", "unix:///run/a%zz", "", "", "WEP-11"},
		{"WEP-11 too long", "unix:///" + strings.Repeat("a", maxEndpointBytes), "", "", "WEP-11"},
		{"WEP-13 relative", "unix:rel/a.sock", "", "", "WEP-13"},
		{"WEP-13 only slashes", "unix://", "", "", "WEP-13"},
		{"WEP-13 nothing", "unix:", "", "", "WEP-13"},
		{"WEP-13 root", "unix:///", "", "", "WEP-13"},
		{"WEP-14 empty query", "unix:///p?", "", "", "WEP-14"},
		{"WEP-15 zone", "tcp://[fe80::1%25eth0]:80", "", "", "WEP-15"},
		{"WEP-15 IPv6 without brackets", "tcp://::1:8000", "", "", "WEP-15"},
		{"WEP-15 IPv4 in brackets", "tcp://[127.0.0.1]:80", "", "", "WEP-15"},
		{"WEP-15 no host", "tcp://:80", "", "", "WEP-15"},
		{"WEP-15 opaque", "tcp:127.0.0.1:80", "", "", "WEP-15"},
		{"WEP-15 octal", "tcp://0177.0.0.1:80", "", "", "WEP-15"},
		{"WEP-15 junk after bracket", "tcp://[::1]x:80", "", "", "WEP-15"},
		{"WEP-16 IPv6 without port", "tcp://[::1]", "", "", "WEP-16"},
		{"WEP-16 name", "tcp://127.0.0.1:http", "", "", "WEP-16"},
		{"WEP-16 sign", "tcp://127.0.0.1:+80", "", "", "WEP-16"},
		{"WEP-17 query", "tcp://127.0.0.1:80?", "", "", "WEP-17"},
		{"WEP-17 fragment", "tcp://127.0.0.1:80#", "", "", "WEP-17"},
	} {
		t.Run(v.name, func(t *testing.T) {
			network, address, err := ParseEndpoint(v.in)
			wantRow(t, "ParseEndpoint("+excerpt(v.in)+")", err, v.row)
			if network != v.network || address != v.address {
				t.Errorf("ParseEndpoint(%q) = %q, %q; want %q, %q", v.in, network, address, v.network, v.address)
			}
		})
	}
}

func TestWEP_10_ExplicitAddressWinsOverEnvironment(t *testing.T) {
	env := func(value string) func(string) string {
		return func(name string) string {
			if name != EndpointEnv {
				t.Errorf("asked for %q, want %q", name, EndpointEnv)
			}
			return value
		}
	}
	if _, address, err := ResolveEndpoint("unix:///a", env("unix:///b")); address != "/a" || err != nil {
		t.Errorf("explicit and environment: %q, %v; want /a", address, err)
	}
	if _, address, err := ResolveEndpoint("", env("unix:///b")); address != "/b" || err != nil {
		t.Errorf("environment only: %q, %v; want /b", address, err)
	}
	_, _, err := ResolveEndpoint("", env(""))
	wantRow(t, "neither", err, "WEP-10")
	_, _, err = ResolveEndpoint("", env("/run/a.sock"))
	wantRow(t, "bad environment", err, "WEP-11")
	if err != nil && !strings.Contains(err.Error(), EndpointEnv) {
		t.Errorf("error %q does not name %s", err, EndpointEnv)
	}
}

// TestBEP_07_08_BrokerEndpoint has the vectors of the Workload Endpoint for unix addresses, and names in tcp ones.
func TestBEP_07_08_BrokerEndpoint(t *testing.T) {
	for _, v := range []struct {
		name, in         string
		network, address string
		row              string // empty: valid
	}{
		{"V129 three slashes", "unix:///run/signet/broker.sock", "unix", "/run/signet/broker.sock", ""},
		{"V130", "unix://run/broker.sock", "", "", "WEP-12"},
		{"V131", "unix:run/broker.sock", "", "", "WEP-13"},
		{"V132", "unix:///run/b.sock#", "", "", "WEP-14"},
		{"bare path", "/run/b.sock", "", "", "WEP-11"},
		{"IPv4", "tcp://127.0.0.1:8443", "tcp", "127.0.0.1:8443", ""},
		{"IPv6", "tcp://[::1]:8443", "tcp", "[::1]:8443", ""},
		{"DNS name", "tcp://broker.example.com:8443", "tcp", "broker.example.com:8443", ""},
		{"V135", "tcp://localhost:8000", "tcp", "localhost:8000", ""},
		{"digits first", "tcp://1a.example:80", "tcp", "1a.example:80", ""},
		{"no IPv4 address", "tcp://1.2.3.999:80", "", "", "BEP-08"},
		{"octal", "tcp://0177.0.0.1:80", "", "", "BEP-08"},
		{"no host", "tcp://:80", "", "", "BEP-08"},
		{"underscore", "tcp://a_b.example:80", "", "", "BEP-08"},
		{"hyphen at the end", "tcp://a-.example:80", "", "", "BEP-08"},
		{"final dot", "tcp://example.com.:80", "", "", "BEP-08"},
		{"long label", "tcp://" + strings.Repeat("a", 64) + ".example:80", "", "", "BEP-08"},
		{"encoded", "tcp://ex%61mple.com:80", "", "", "BEP-08"},
		{"no port", "tcp://broker.example.com", "", "", "BEP-08"},
		{"port 0", "tcp://broker.example.com:0", "", "", "BEP-08"},
		{"port with zeros", "tcp://broker.example.com:0080", "", "", "BEP-08"},
		{"path", "tcp://broker.example.com:80/", "", "", "BEP-08"},
		{"user", "tcp://u@broker.example.com:80", "", "", "BEP-08"},
		{"query", "tcp://broker.example.com:80?", "", "", "BEP-08"},
		{"two ports", "tcp://broker.example.com:80:81", "", "", "BEP-08"},
		{"opaque", "tcp:broker.example.com:80", "", "", "BEP-08"},
	} {
		t.Run(v.name, func(t *testing.T) {
			network, address, err := ParseBrokerEndpoint(v.in)
			wantRow(t, "ParseBrokerEndpoint("+excerpt(v.in)+")", err, v.row)
			if network != v.network || address != v.address {
				t.Errorf("ParseBrokerEndpoint(%q) = %q, %q; want %q, %q", v.in, network, address, v.network, v.address)
			}
		})
	}
}

func TestBEP_06_EnvironmentOfTheBrokerEndpoint(t *testing.T) {
	env := func(value string) func(string) string {
		return func(name string) string {
			if name != "SPIFFE_BROKER_SOCKET" {
				t.Errorf("asked for %q", name)
			}
			return value
		}
	}
	if _, address, err := ResolveBrokerEndpoint("unix:///a", env("unix:///b")); address != "/a" || err != nil {
		t.Errorf("explicit and environment: %q, %v; want /a", address, err)
	}
	if _, address, err := ResolveBrokerEndpoint("", env("tcp://broker.example.com:8443")); address != "broker.example.com:8443" || err != nil {
		t.Errorf("environment only: %q, %v", address, err)
	}
	_, _, err := ResolveBrokerEndpoint("", env(""))
	wantRow(t, "neither", err, "BEP-06")
	_, _, err = ResolveBrokerEndpoint("", env("tcp://broker.example.com"))
	wantRow(t, "bad environment", err, "BEP-08")
	if err != nil && !strings.Contains(err.Error(), BrokerEndpointEnv) {
		t.Errorf("error %q does not name %s", err, BrokerEndpointEnv)
	}
}

// FuzzParseBrokerEndpoint: what is taken is what net.Dial takes, and what is taken for the Workload Endpoint is taken here.
func FuzzParseBrokerEndpoint(f *testing.F) {
	for _, seed := range []string{"unix:///run/a.sock", "tcp://127.0.0.1:80", "tcp://[::1]:80", "tcp://a.example:80", "tcp://a:b:80", "tcp://A.b-c:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		network, address, err := ParseBrokerEndpoint(s)
		wepNetwork, wepAddress, wepErr := ParseEndpoint(s)
		if wepErr == nil && (err != nil || network != wepNetwork || address != wepAddress) {
			t.Errorf("ParseBrokerEndpoint(%q) = %q, %q, %v; ParseEndpoint takes it", s, network, address, err)
		}
		if err != nil {
			if RowOf(err) == "" {
				t.Errorf("ParseBrokerEndpoint(%q): error %v has no row", s, err)
			}
			return
		}
		if network == "tcp" {
			host, port, err := net.SplitHostPort(address)
			if err != nil || host == "" || port == "" || strings.ContainsAny(host, "/?#@%") {
				t.Errorf("ParseBrokerEndpoint(%q) gives the address %q, which net reads as %q, %q, %v", s, address, host, port, err)
			}
		}
	})
}

func FuzzParseEndpoint(f *testing.F) {
	for _, seed := range []string{"unix:///run/a.sock", "unix:/a", "tcp://127.0.0.1:80", "tcp://[::1]:80", "unix://a/b", "tcp://1.2.3.4:080", "unix:////a", "unix:///%41"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		network, address, err := ParseEndpoint(s)
		if err != nil {
			if RowOf(err) == "" {
				t.Errorf("ParseEndpoint(%q): error %v has no row", s, err)
			}
			return
		}
		if err := workloadapi.ValidateAddress(s); err != nil {
			t.Errorf("ParseEndpoint(%q) = %q, %q, but go-spiffe refuses it: %v", s, network, address, err)
		}
		switch network {
		case "unix":
			if address[0] != '/' || strings.IndexByte(address, 0) >= 0 {
				t.Errorf("ParseEndpoint(%q) gives the socket path %q", s, address)
			}
		case "tcp":
			if resolved, err := net.ResolveTCPAddr("tcp", address); err != nil || resolved.String() != address {
				t.Errorf("ParseEndpoint(%q) gives the address %q, which net reads as %v, %v", s, address, resolved, err)
			}
		default:
			t.Errorf("ParseEndpoint(%q) gives the network %q", s, network)
		}
	})
}
