package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http/httpguts"

	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// Config is the proxy's configuration file. The zero value of a field is its default. Times are written 1h, 30m, 90s.
type Config struct {
	// AgentSocket is the agent's socket, such as unix:///run/signet/agent.sock, which is the default unless the environment
	// has SPIFFE_ENDPOINT_SOCKET.
	AgentSocket string `yaml:"agent_socket"`
	// Inbound are listeners that speak mutual TLS for a service and pass on what its call policies allow.
	Inbound []Inbound `yaml:"inbound"`
	// Outbound are listeners of a client on this host, which speak mutual TLS to a server for it.
	Outbound []Outbound `yaml:"outbound"`
	// DrainTimeout is how long connections may go on after SIGTERM. Default 8s; at most 10s.
	DrainTimeout time.Duration `yaml:"drain_timeout"`
	// MaxOffline is how long the last call policies are enforced after the contact to the agent, or the agent's to its CA, was
	// lost; then everything is denied. Default: as the agent says. The shorter time holds.
	MaxOffline time.Duration `yaml:"max_offline"`

	// Sandbox says what the proxy gives up once it has started.
	Sandbox Sandbox `yaml:"sandbox"`
	// Metrics serves /metrics, /live and /ready.
	Metrics Metrics `yaml:"metrics"`
	// Logging says what is logged to standard error.
	Logging Logging `yaml:"log"`

	// Now tells the time. Nil: time.Now.
	Now func() time.Time `yaml:"-"`
	// Log replaces the logger that Logging describes.
	Log *slog.Logger `yaml:"-"`
	// Sockets listen already where a listener of the same name is to listen. The caller closes them.
	Sockets map[string]*os.File `yaml:"-"`
}

// An Inbound listener stands before a service.
type Inbound struct {
	// Name is what logs and metrics call the listener, and what a socket is called that is passed in: letters, digits and "-".
	Name string `yaml:"name"`
	// Listen is host:port; without a host it is every interface.
	Listen string `yaml:"listen"`
	// Service is the SPIFFE ID of the service, such as spiffe://example.org/documents-service, which the agent must give to this
	// process. Its call policies decide.
	Service string `yaml:"service"`
	// Protocol is tcp (default) or http. With tcp only the caller's ID is known, so that rules with http, grpc, jwt or
	// when allow nothing, and denies with them refuse the caller. With http (HTTP/1.1, HTTP/2 and gRPC) each request is decided.
	Protocol string `yaml:"protocol"`
	// Backend is where the service listens, in the clear: host:port or unix:///path.
	Backend string `yaml:"backend"`
	// HTTP is for protocol http.
	HTTP HTTP `yaml:"http"`
	// SendProxyProtocol begins each connection to the backend with a header of the PROXY protocol, version 2, that has the
	// caller's address and, as its authority (PP2_TYPE_AUTHORITY), the caller's SPIFFE ID. For protocol tcp.
	SendProxyProtocol bool `yaml:"send_proxy_protocol"`
	// Limits bound what connections may take.
	Limits Limits `yaml:"limits"`
}

// HTTP says how requests are passed on to a service.
type HTTP struct {
	// BackendProtocol is http1 (default) or h2c: HTTP/2 in the clear, which gRPC needs.
	BackendProtocol string `yaml:"backend_protocol"`
	// PeerIDHeader is a header that tells the backend the caller's SPIFFE ID, such as Signet-Peer-Id. Empty: none. Whatever
	// a caller sends under this name, or as Signet-Peer-Id, is taken away.
	PeerIDHeader string `yaml:"peer_id_header"`
	// TrustForwardedHeaders leaves what callers send as Forwarded, X-Forwarded-For, -Host and -Proto, and X-Forwarded-Client-Cert.
	// Otherwise these are taken away, and X-Forwarded-For, -Host and -Proto are the proxy's own.
	TrustForwardedHeaders bool `yaml:"trust_forwarded_headers"`
	// AllowUnderscores lets headers through whose name has an underscore. Many programs take it for "-", so that a header could
	// stand for another one that was judged, or taken away; otherwise such a request is refused.
	AllowUnderscores bool `yaml:"allow_underscores"`
	// MaxHeaderBytes bounds the headers of a request. Default 65536; 4096 to 1048576.
	MaxHeaderBytes int `yaml:"max_header_bytes"`
	// ResponseTimeout is how long the backend may take to begin its answer. Default: no bound but idle_timeout, since an answer
	// of gRPC may begin late.
	ResponseTimeout time.Duration `yaml:"response_timeout"`
}

// An Outbound listener stands before a client.
type Outbound struct {
	// Name is what logs and metrics call the listener, and what a socket is called that is passed in: letters, digits and "-".
	Name string `yaml:"name"`
	// Listen is where the client connects in the clear: host:port, without a host on the loopback interface, or unix:///path.
	// Whoever may connect there speaks with the identity of this process.
	Listen string `yaml:"listen"`
	// AllowOtherHosts allows an address that other hosts reach.
	AllowOtherHosts bool `yaml:"allow_other_hosts"`
	// SocketGroup is a group, by name or number, whose members may connect to a Unix socket. Default: the user of this process
	// and root alone.
	SocketGroup string `yaml:"socket_group"`
	// Protocol is tcp (default) or http. What http adds is JWTAudience, and connections that are used again.
	Protocol string `yaml:"protocol"`
	// Address is where the server listens: host:port.
	Address string `yaml:"address"`
	// Servers are the SPIFFE IDs that the server may have. Any other is refused.
	Servers []string `yaml:"servers"`
	// ID is the SPIFFE ID with which to call, one that the agent gives to this process. Default: the first that it gives.
	ID string `yaml:"spiffe_id"`
	// JWTAudience adds to each request a JWT-SVID for this audience, in place of any Authorization header. It is renewed
	// ahead, and requests go on with it while the agent is away. For protocol http.
	JWTAudience string `yaml:"jwt_audience"`
	// Limits bound what connections may take.
	Limits Limits `yaml:"limits"`
}

// Limits bound what the connections of one listener may take.
type Limits struct {
	// MaxConnections is how many there may be at once; more are closed at once. Those that have not shown an X509-SVID yet may
	// be half of it. Default 16384; 1 to 1000000.
	MaxConnections int `yaml:"max_connections"`
	// HandshakeTimeout is how long a TLS handshake may take. Default 10s.
	HandshakeTimeout time.Duration `yaml:"handshake_timeout"`
	// HeaderTimeout is how long the headers of a request may take. Default 10s. For protocol http.
	HeaderTimeout time.Duration `yaml:"header_timeout"`
	// ConnectTimeout is how long connecting to the backend or the server may take, without the handshake. Default 5s.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	// IdleTimeout is how long a connection may be without a byte in either direction, and of a request neither body nor answer
	// may move. Default 1h; at most 24h.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// HalfClosedTimeout is the same once one side has said that it sends no more. Default 5m. For protocol tcp.
	HalfClosedTimeout time.Duration `yaml:"half_closed_timeout"`
}

// Sandbox says what the proxy gives up once it has started.
type Sandbox struct {
	// Landlock leaves only the files and TCP ports that the configuration needs: auto (default: where the kernel has it), off,
	// or require.
	Landlock sandbox.Mode `yaml:"landlock"`
	// Seccomp takes away the system calls that the proxy does not need, such as starting programs: auto (default), off, or
	// require.
	Seccomp sandbox.Mode `yaml:"seccomp"`
}

// Metrics says where metrics are served.
type Metrics struct {
	// Listen is host:port, such as 127.0.0.1:9990. Without a host it is the loopback interface. Empty: nowhere.
	Listen string `yaml:"listen"`
}

// Logging says what is logged.
type Logging struct {
	// Level is debug, info (default), warn or error.
	Level string `yaml:"level"`
	// Format is text (default) or json.
	Format string `yaml:"format"`
}

const (
	protocolTCP  = "tcp"
	protocolHTTP = "http"

	backendHTTP1 = "http1"
	backendH2C   = "h2c"

	defaultSocket  = "unix:///run/signet/agent.sock"
	endpointEnv    = "SPIFFE_ENDPOINT_SOCKET"
	maxSocketBytes = 107
	maxListeners   = 64
	maxServers     = 256

	defaultDrain = 8 * time.Second
	maxDrain     = 10 * time.Second

	defaultMaxConnections = 16384
	maxMaxConnections     = 1_000_000
	defaultHandshake      = 10 * time.Second
	defaultConnect        = 5 * time.Second
	defaultIdle           = time.Hour
	defaultHalfClosed     = 5 * time.Minute
	maxTimeout            = 24 * time.Hour

	defaultHeaderBytes = 64 << 10
	leastHeaderBytes   = 4 << 10
	mostHeaderBytes    = 1 << 20
)

// listenerName is what Name may be: it goes into metrics, and names a socket that systemd passes in.
var listenerName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$`)

// ReadConfig reads a configuration file. Errors name file, line and column.
func ReadConfig(data []byte, file string) (Config, error) {
	var c Config
	if err := strictyaml.Unmarshal(data, file, &c); err != nil {
		return Config{}, err
	}
	return c, c.Check()
}

// HasListener says whether a listener has this name.
func (c *Config) HasListener(name string) bool {
	return slices.ContainsFunc(c.Inbound, func(in Inbound) bool { return in.Name == name }) ||
		slices.ContainsFunc(c.Outbound, func(out Outbound) bool { return out.Name == name })
}

// complain notes that a field is wrong.
type complain func(field, format string, args ...any)

// Check fills in defaults and refuses what cannot work, before anything is started. All mistakes are told at once.
func (c *Config) Check() error {
	var errs []error
	bad := complain(func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	})
	if c.AgentSocket == "" {
		if c.AgentSocket = os.Getenv(endpointEnv); c.AgentSocket == "" {
			c.AgentSocket = defaultSocket
		}
	}
	if _, _, err := spiffe.ParseEndpoint(c.AgentSocket); err != nil {
		bad("agent_socket", "%v", err)
	}
	if len(c.Inbound)+len(c.Outbound) == 0 {
		bad("inbound", "neither inbound nor outbound has a listener; there would be nothing to do")
	}
	if n := len(c.Inbound) + len(c.Outbound); n > maxListeners {
		bad("inbound", "%d listeners together with outbound; %d at most", n, maxListeners)
	}
	names, addresses := map[string]string{}, map[string]string{}
	once := func(seen map[string]string, what, value, field string) {
		if other := seen[value]; other != "" && value != "" && !strings.HasSuffix(value, ":0") { // port 0 is another one each time
			bad(field, "%q is the %s of %s already", value, what, other)
		}
		seen[value] = field
	}
	for i := range c.Inbound {
		in, field := &c.Inbound[i], fmt.Sprintf("inbound[%d]", i)
		in.check(func(f, format string, args ...any) { bad(field+"."+f, format, args...) })
		once(names, "name", in.Name, field+".name")
		once(addresses, "address", in.Listen, field+".listen")
	}
	for i := range c.Outbound {
		out, field := &c.Outbound[i], fmt.Sprintf("outbound[%d]", i)
		out.check(func(f, format string, args ...any) { bad(field+"."+f, format, args...) })
		once(names, "name", out.Name, field+".name")
		once(addresses, "address", out.Listen, field+".listen")
	}
	setTime(&c.DrainTimeout, defaultDrain, maxDrain, "drain_timeout", bad)
	if c.MaxOffline < 0 {
		bad("max_offline", "%s is negative", c.MaxOffline)
	}
	for _, m := range []struct {
		field string
		mode  *sandbox.Mode
	}{{"sandbox.landlock", &c.Sandbox.Landlock}, {"sandbox.seccomp", &c.Sandbox.Seccomp}} {
		if *m.mode == "" {
			*m.mode = sandbox.Auto
		}
		if err := m.mode.Check(); err != nil {
			bad(m.field, "%v", err)
		}
	}
	if c.Metrics.Listen != "" {
		checkAddress(&c.Metrics.Listen, "127.0.0.1", "metrics.listen", bad)
	}
	if _, err := c.Logging.level(); err != nil {
		errs = append(errs, err)
	}
	switch c.Logging.Format {
	case "", "text", "json":
	default:
		bad("log.format", "%q is not text or json", c.Logging.Format)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return errors.Join(errs...)
}

func (in *Inbound) check(bad complain) {
	checkName(in.Name, bad)
	if checkAddress(&in.Listen, "", "listen", bad); strings.HasPrefix(in.Listen, "unix:") {
		bad("listen", "%q is a Unix socket; mutual TLS is for callers on other hosts: host:port", in.Listen)
	}
	checkID(in.Service, "service", bad)
	checkEnd(in.Backend, "backend", bad)
	checkProtocol(&in.Protocol, bad)
	if in.Protocol == protocolHTTP {
		in.HTTP.check(func(f, format string, args ...any) { bad("http."+f, format, args...) })
		if in.SendProxyProtocol {
			bad("send_proxy_protocol", "is for protocol tcp; with http set http.peer_id_header")
		}
	} else if in.HTTP != (HTTP{}) {
		bad("http", "is for protocol http, and this listener's is %s", in.Protocol)
	}
	in.Limits.check(func(f, format string, args ...any) { bad("limits."+f, format, args...) })
}

func (h *HTTP) check(bad complain) {
	switch h.BackendProtocol {
	case "":
		h.BackendProtocol = backendHTTP1
	case backendHTTP1, backendH2C:
	default:
		bad("backend_protocol", "%q is not %s or %s", h.BackendProtocol, backendHTTP1, backendH2C)
	}
	if h.PeerIDHeader != "" && (!httpguts.ValidHeaderFieldName(h.PeerIDHeader) || strings.Contains(h.PeerIDHeader, "_") || reservedHeader(h.PeerIDHeader)) {
		bad("peer_id_header", "%q cannot be used; take a name such as Signet-Peer-Id, of letters, digits and \"-\", that HTTP does not use itself", h.PeerIDHeader)
	}
	if h.MaxHeaderBytes == 0 {
		h.MaxHeaderBytes = defaultHeaderBytes
	}
	if h.MaxHeaderBytes < leastHeaderBytes || h.MaxHeaderBytes > mostHeaderBytes {
		bad("max_header_bytes", "%d is not between %d and %d", h.MaxHeaderBytes, leastHeaderBytes, mostHeaderBytes)
	}
	if h.ResponseTimeout < 0 || h.ResponseTimeout > maxTimeout {
		bad("response_timeout", "%s is not between 0 and %s", h.ResponseTimeout, maxTimeout)
	}
}

func (out *Outbound) check(bad complain) {
	checkName(out.Name, bad)
	unix := strings.HasPrefix(out.Listen, "unix:")
	checkAddress(&out.Listen, "127.0.0.1", "listen", bad)
	if host, _, err := net.SplitHostPort(out.Listen); err == nil && !unix && !out.AllowOtherHosts && !isLoopback(host) {
		bad("listen", "%q can be reached from other hosts, and whoever connects there speaks with the identity of this process; "+
			"listen on 127.0.0.1 or a Unix socket, or set allow_other_hosts", out.Listen)
	}
	if out.SocketGroup != "" && !unix {
		bad("socket_group", "is for a Unix socket, and listen is %q", out.Listen)
	}
	if strings.HasPrefix(out.Address, "unix:") {
		bad("address", "%q is a Unix socket; it must be host:port", out.Address)
	} else {
		checkEnd(out.Address, "address", bad)
	}
	if len(out.Servers) == 0 {
		bad("servers", "missing; list the SPIFFE IDs that the server may have, such as spiffe://example.org/ledger")
	}
	if len(out.Servers) > maxServers {
		bad("servers", "%d IDs; %d at most", len(out.Servers), maxServers)
	}
	for i, id := range out.Servers {
		checkID(id, fmt.Sprintf("servers[%d]", i), bad)
	}
	if out.ID != "" {
		checkID(out.ID, "spiffe_id", bad)
	}
	checkProtocol(&out.Protocol, bad)
	if out.JWTAudience != "" && out.Protocol != protocolHTTP {
		bad("jwt_audience", "is for protocol http, and this listener's is %s", out.Protocol)
	}
	out.Limits.check(func(f, format string, args ...any) { bad("limits."+f, format, args...) })
}

func (l *Limits) check(bad complain) {
	if l.MaxConnections == 0 {
		l.MaxConnections = defaultMaxConnections
	}
	if l.MaxConnections < 1 || l.MaxConnections > maxMaxConnections {
		bad("max_connections", "%d is not between 1 and %d", l.MaxConnections, maxMaxConnections)
	}
	setTime(&l.HandshakeTimeout, defaultHandshake, maxTimeout, "handshake_timeout", bad)
	setTime(&l.HeaderTimeout, defaultHandshake, maxTimeout, "header_timeout", bad)
	setTime(&l.ConnectTimeout, defaultConnect, maxTimeout, "connect_timeout", bad)
	setTime(&l.IdleTimeout, defaultIdle, maxTimeout, "idle_timeout", bad)
	setTime(&l.HalfClosedTimeout, defaultHalfClosed, maxTimeout, "half_closed_timeout", bad)
}

func setTime(d *time.Duration, otherwise, most time.Duration, field string, bad complain) {
	if *d == 0 {
		*d = otherwise
	}
	if *d < 0 || *d > most {
		bad(field, "%s is not between 0 and %s", *d, most)
	}
}

func checkName(name string, bad complain) {
	if name == "metrics" {
		bad("name", "%q is taken", name)
	}
	if !listenerName.MatchString(name) {
		bad("name", "%q is not a name of 1 to 63 letters, digits and \"-\", such as documents", name)
	}
}

func checkProtocol(protocol *string, bad complain) {
	switch *protocol {
	case "":
		*protocol = protocolTCP
	case protocolTCP, protocolHTTP:
	default:
		bad("protocol", "%q is not %s or %s", *protocol, protocolTCP, protocolHTTP)
	}
}

func checkID(s, field string, bad complain) {
	if s == "" {
		bad(field, "missing; give a SPIFFE ID, such as spiffe://example.org/documents-service")
	} else if _, err := spiffe.ParseWorkloadID(s); err != nil {
		bad(field, "%v", err)
	}
}

// checkAddress checks an address to listen on, and puts in the host where there is none.
func checkAddress(address *string, host, field string, bad complain) {
	if checkUnix(*address, field, bad) {
		return
	}
	h, port, err := net.SplitHostPort(*address)
	if err != nil || port == "" {
		bad(field, "%q is not host:port, such as 127.0.0.1:8443", *address)
		return
	}
	if !isPort(port, 0) {
		bad(field, "%q has no port of 0 to 65535", *address)
		return
	}
	if h == "" {
		*address = net.JoinHostPort(host, port)
	}
}

// checkEnd checks an address to connect to.
func checkEnd(address, field string, bad complain) {
	if checkUnix(address, field, bad) {
		return
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" {
		bad(field, "%q is not host:port, such as 127.0.0.1:8080", address)
	} else if !isPort(port, 1) {
		bad(field, "%q has no port of 1 to 65535", address)
	}
}

// checkUnix reports whether the address is a Unix socket, and whether it can be one.
func checkUnix(address, field string, bad complain) bool {
	if !strings.HasPrefix(address, "unix:") {
		return false
	}
	path, ok := strings.CutPrefix(address, "unix://")
	switch {
	case !ok || !strings.HasPrefix(path, "/"):
		bad(field, "%q is not of the form unix:///path", address)
	case len(path) > maxSocketBytes:
		bad(field, "%q has %d bytes, and a Unix socket's path at most %d; choose a shorter one", path, len(path), maxSocketBytes)
	}
	return true
}

func isPort(s string, least uint64) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n >= least
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// split returns the network and the address of one that was checked.
func split(address string) (network, addr string) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return "unix", path
	}
	return "tcp", address
}

// ids are the parsed forms of IDs that were checked.
func ids(texts []string) map[spiffeid.ID]bool {
	set := make(map[spiffeid.ID]bool, len(texts))
	for _, text := range texts {
		if id, err := spiffe.ParseWorkloadID(text); err == nil {
			set[id] = true
		}
	}
	return set
}

func (l Logging) level() (slog.Level, error) {
	var level slog.Level
	if l.Level == "" {
		return level, nil
	}
	switch l.Level {
	case "debug", "info", "warn", "error":
	default:
		return level, fmt.Errorf("log.level: %q is not debug, info, warn or error", l.Level)
	}
	return level, level.UnmarshalText([]byte(l.Level))
}
