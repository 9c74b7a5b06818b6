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

// maxEndpointBytes bounds an endpoint address. No socket path of any system comes near it.
const maxEndpointBytes = 4096

// ResolveEndpoint returns the network and address of the Workload Endpoint: the explicit one if it is not empty, else
// the one that getenv has under [EndpointEnv]. It is for callers to hand in os.Getenv. The error is a [RowError], and
// says which of the two was wrong.
func ResolveEndpoint(explicit string, getenv func(string) string) (network, address string, err error) {
	if explicit != "" {
		return ParseEndpoint(explicit)
	}
	value := getenv(EndpointEnv)
	if value == "" {
		return "", "", broken("WEP-10", "no endpoint address given and %s is not set, set it to one such as unix:///run/signet/agent.sock", EndpointEnv)
	}
	network, address, err = ParseEndpoint(value)
	if err != nil {
		return "", "", broken(RowOf(err), "%s: %w", EndpointEnv, errors.Unwrap(err))
	}
	return network, address, nil
}

// ParseEndpoint parses the address of a Workload Endpoint, as SPIFFE_ENDPOINT_SOCKET has it: unix:///path, unix:/path
// or tcp://IP:port. It returns what net.Dial takes. The path of a Unix socket is percent-decoded. The error is a
// [RowError]. [Workload Endpoint §4]
func ParseEndpoint(s string) (network, address string, err error) {
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
		address, err = parseTCPEndpoint(s, rest)
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
