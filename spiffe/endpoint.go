package spiffe

import (
	"errors"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// EndpointEnv is the environment variable with the address of the Workload Endpoint. [Workload Endpoint §4]
const EndpointEnv = "SPIFFE_ENDPOINT_SOCKET"

// BrokerEndpointEnv is the environment variable with the address of the Broker Endpoint. [Broker Endpoint §4]
const BrokerEndpointEnv = "SPIFFE_BROKER_SOCKET"

// maxEndpointBytes bounds an endpoint address. No socket path of any system comes near it.
const maxEndpointBytes = 4096

// ResolveEndpoint returns the network and address of the Workload Endpoint: the explicit one if it is not empty, else
// the one that getenv has under [EndpointEnv]. It is for callers to hand in os.Getenv. The error is a [RowError], and
// says which of the two was wrong.
func ResolveEndpoint(explicit string, getenv func(string) string) (network, address string, err error) {
	return resolve(explicit, getenv, EndpointEnv, "WEP-10", ParseEndpoint)
}

// ResolveBrokerEndpoint is [ResolveEndpoint] for the Broker Endpoint and [BrokerEndpointEnv]. [Broker Endpoint §4]
func ResolveBrokerEndpoint(explicit string, getenv func(string) string) (network, address string, err error) {
	return resolve(explicit, getenv, BrokerEndpointEnv, "BEP-06", ParseBrokerEndpoint)
}

func resolve(explicit string, getenv func(string) string, env, row string, parse func(string) (string, string, error)) (network, address string, err error) {
	if explicit != "" {
		return parse(explicit)
	}
	value := getenv(env)
	if value == "" {
		return "", "", broken(row, "no endpoint address given and %s is not set, set it to one such as unix:///run/signet/agent.sock", env)
	}
	network, address, err = parse(value)
	if err != nil {
		return "", "", broken(RowOf(err), "%s: %w", env, errors.Unwrap(err))
	}
	return network, address, nil
}

// ParseEndpoint parses the address of a Workload Endpoint, as SPIFFE_ENDPOINT_SOCKET has it: unix:///path, unix:/path
// or tcp://IP:port. It returns what net.Dial takes. The path of a Unix socket is percent-decoded. The error is a
// [RowError]. [Workload Endpoint §4]
func ParseEndpoint(s string) (network, address string, err error) {
	return parseEndpoint(s, parseTCPEndpoint)
}

// ParseBrokerEndpoint parses the address of a Broker Endpoint, as SPIFFE_BROKER_SOCKET has it: as [ParseEndpoint] does,
// but the host of a tcp address may be a DNS name too. [Broker Endpoint §4]
func ParseBrokerEndpoint(s string) (network, address string, err error) {
	return parseEndpoint(s, parseTCPBrokerEndpoint)
}

func parseEndpoint(s string, parseTCP func(s, rest string) (string, error)) (network, address string, err error) {
	if len(s) > maxEndpointBytes {
		return "", "", broken("WEP-11", "endpoint address %q has %d bytes, at most %d are allowed", excerpt(s), len(s), maxEndpointBytes)
	}
	scheme, rest, found := strings.Cut(s, ":")
	if !found {
		return "", "", broken("WEP-11", "endpoint address %q is no URI, write it as unix:///run/signet/agent.sock or tcp://127.0.0.1:8000", excerpt(s))
	}
	switch strings.ToLower(scheme) {
	case "unix":
		address, err = parseUnixEndpoint(s, rest)
		network = "unix"
	case "tcp":
		address, err = parseTCP(s, rest)
		network = "tcp"
	default:
		return "", "", broken("WEP-11", "endpoint address %q has the scheme %q, it must be unix or tcp", excerpt(s), excerpt(scheme))
	}
	if err != nil {
		return "", "", err
	}
	return network, address, nil
}

// parseUnixEndpoint returns the socket path of the endpoint s, of which rest is what follows "unix:".
func parseUnixEndpoint(s, rest string) (string, error) {
	if strings.ContainsAny(rest, "?#") {
		return "", broken("WEP-14", "endpoint address %q has a query or fragment, a unix address is only scheme and path", excerpt(s))
	}
	path := rest
	if after, hasAuthority := strings.CutPrefix(rest, "//"); hasAuthority {
		if after == "" {
			return "", broken("WEP-13", "endpoint address %q has no path, write it as unix:///run/signet/agent.sock", excerpt(s))
		}
		if after[0] != '/' {
			// The authority would be taken for the first folder of the path: the client would look elsewhere.
			return "", broken("WEP-12", "endpoint address %q has an authority, write the path after unix:// with a slash of its own, as in unix:///run/signet/agent.sock", excerpt(s))
		}
		path = after
	}
	if path == "" || path[0] != '/' {
		return "", broken("WEP-13", "endpoint address %q has no absolute path, write it as unix:///run/signet/agent.sock", excerpt(s))
	}
	for i := range len(path) {
		if c := path[i]; !isPathChar(c) {
			return "", broken("WEP-11", "endpoint address %q has the byte %q in its path, percent-encode it", excerpt(s), path[i:i+1])
		}
	}
	decoded, err := url.PathUnescape(path)
	if err != nil {
		return "", broken("WEP-11", "endpoint address %q: %w", excerpt(s), err)
	}
	if strings.Count(decoded, "/") != strings.Count(path, "/") || strings.IndexByte(decoded, 0) >= 0 {
		return "", broken("WEP-11", "endpoint address %q has an encoded slash or zero byte in its path", excerpt(s))
	}
	if strings.Trim(decoded, "/") == "" {
		return "", broken("WEP-13", "endpoint address %q has the root folder as its path, write it as unix:///run/signet/agent.sock", excerpt(s))
	}
	return decoded, nil
}

// isPathChar reports whether c may stand in the path of a URI. [RFC 3986 §3.3]
func isPathChar(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~!$&'()*+,;=:@/%", c) >= 0
}

// parseTCPEndpoint returns host and port of the endpoint s, of which rest is what follows "tcp:".
func parseTCPEndpoint(s, rest string) (string, error) {
	hostport, found := strings.CutPrefix(rest, "//")
	if !found {
		return "", broken("WEP-15", "endpoint address %q has no host, write it as tcp://127.0.0.1:8000", excerpt(s))
	}
	if strings.ContainsAny(hostport, "/?#@") {
		return "", broken("WEP-17", "endpoint address %q has a user part, path, query or fragment, a tcp address is only IP and port, as in tcp://127.0.0.1:8000", excerpt(s))
	}

	var host, port string
	if after, bracketed := strings.CutPrefix(hostport, "["); bracketed {
		host, port, found = strings.Cut(after, "]")
		if !found || !strings.HasPrefix(port, ":") && port != "" {
			return "", broken("WEP-15", "endpoint address %q has no closing bracket after its IPv6 address, write it as tcp://[::1]:8000", excerpt(s))
		}
		port, found = strings.CutPrefix(port, ":")
	} else {
		host, port, found = strings.Cut(hostport, ":")
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" || addr.Is6() != strings.HasPrefix(hostport, "[") {
		return "", broken("WEP-15", "endpoint address %q has the host %q, it must be an IP address, as in tcp://127.0.0.1:8000 or tcp://[::1]:8000", excerpt(s), excerpt(host))
	}
	if !found || port == "" {
		return "", broken("WEP-16", "endpoint address %q has no port, add one, as in tcp://127.0.0.1:8000", excerpt(s))
	}
	if strings.Trim(port, "0123456789") != "" || port[0] == '0' {
		return "", broken("WEP-16", "endpoint address %q has the port %q, it must be a number from 1 to 65535", excerpt(s), excerpt(port))
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return "", broken("WEP-16", "endpoint address %q has the port %q, it must be a number from 1 to 65535", excerpt(s), excerpt(port))
	}
	return net.JoinHostPort(addr.String(), strconv.FormatUint(number, 10)), nil
}

// parseTCPBrokerEndpoint is parseTCPEndpoint for hosts that may be DNS names as well.
func parseTCPBrokerEndpoint(s, rest string) (string, error) {
	address, err := parseTCPEndpoint(s, rest)
	if err == nil {
		return address, nil
	}
	if RowOf(err) != "WEP-15" {
		return "", broken("BEP-08", "%w", errors.Unwrap(err))
	}
	hostport, found := strings.CutPrefix(rest, "//")
	host, port, hasPort := strings.Cut(hostport, ":")
	if !found || !isDNSName(host) {
		return "", broken("BEP-08", "endpoint address %q has no host that is an IP address or a DNS name, write it as tcp://broker.example.com:8443", excerpt(s))
	}
	if !hasPort {
		return "", broken("BEP-08", "endpoint address %q has no port, add one, as in tcp://broker.example.com:8443", excerpt(s))
	}
	// The rest is as with an IP address.
	checked, err := parseTCPEndpoint(s, "//127.0.0.1:"+port)
	if err != nil {
		return "", broken("BEP-08", "%w", errors.Unwrap(err))
	}
	_, port, _ = net.SplitHostPort(checked)
	return net.JoinHostPort(host, port), nil
}

// isDNSName reports whether s is a host name. What looks like an IPv4 address and is none is no name either. [RFC 1123 §2.1]
func isDNSName(s string) bool {
	if len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for i := range len(l) {
			if c := l[i]; (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
				return false
			}
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}
