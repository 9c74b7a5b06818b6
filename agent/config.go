package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/agent/svidcache"
	"github.com/signet-id/signet/internal/adminsocket"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Config is the agent's configuration file. The zero value of a field is its default. Times are written 1h, 30m, 90s.
type Config struct {
	// TrustDomain is the name of the trust domain, such as example.org.
	TrustDomain string `yaml:"trust_domain"`
	// ServerAddress is where the CA listens: host:port, or host alone for port 8081.
	ServerAddress string `yaml:"server_address"`
	// DataDir holds the agent's own key, SVID and bundle. One agent uses it at a time; nobody else may read it.
	DataDir string `yaml:"data_dir"`
	// HandOver lets an agent that is started with the data_dir of one that runs take over from it: it waits, gets the socket, and
	// serves as soon as the other has ended; callers wait in the socket's queue. Meanwhile it counts as ready. For a DaemonSet that
	// starts the next agent of a node before it ends the present one. Default: a second agent refuses to start.
	HandOver bool `yaml:"hand_over"`
	// SocketPath is where workloads find the Workload API. Default /run/signet/agent.sock.
	SocketPath string `yaml:"socket_path"`
	// AdminSocket is where operators of this node ask the agent how it is and why a process gets no identity.
	AdminSocket AdminSocket `yaml:"admin_socket"`
	// Broker serves the SPIFFE Broker API to programs that speak for workloads.
	Broker Broker `yaml:"broker"`

	// JoinToken proves once what this node is. Excludes JoinTokenFile. After the first attestation neither is needed any
	// more.
	JoinToken nodeattest.Secret `yaml:"join_token"`
	// JoinTokenFile holds the join token; only root and the agent's user may read it. It is read again whenever the agent
	// must attest, so that a fresh token there lets a refused agent back in.
	JoinTokenFile string `yaml:"join_token_file"`
	// NodeAttestation proves what this node is, again and again, instead of a join token.
	NodeAttestation NodeAttestation `yaml:"node_attestation"`
	// TrustBundlePath holds the trust domain's X.509 authorities, as PEM or as a SPIFFE bundle, by which the agent
	// verifies the CA on its first connection, and with NodeAttestation also when the bundle that it holds does not verify the
	// CA any more. Not needed with a join token that carries an authority pin; those of a SPIRE server carry none.
	TrustBundlePath string `yaml:"trust_bundle_path"`

	// PollInterval is how often a SPIRE server is asked for changes; a CA of signet tells them by itself. Default 5s; 1s to 5m.
	PollInterval time.Duration `yaml:"poll_interval"`

	// RegistrationWait is how long a process without an identity is kept waiting, in case its registration entry is just
	// being made. Default 1s; at most 30s.
	RegistrationWait time.Duration `yaml:"registration_wait"`
	// MaxPrefetch is how many X509-SVIDs are kept ready for registration entries that no process asks for. Default 1000.
	MaxPrefetch int `yaml:"max_prefetch"`
	// DisablePrefetch keeps none ready.
	DisablePrefetch bool `yaml:"disable_prefetch"`
	// MaxOffline is how long the last call policies are enforced, and what the sealed cache holds is used, after the contact to
	// the CA was lost. From then on enforcement points deny every call, and an agent that is started serves nothing until
	// the CA is back. Default 24h; 1m to 720h.
	MaxOffline time.Duration `yaml:"max_offline"`
	// MaxRevocationStaleness is how long after the contact to the CA was lost calls go on by the revocations that are known;
	// from then on enforcement points deny every call. Default 0: as long as max_offline; else 10s to max_offline.
	MaxRevocationStaleness time.Duration `yaml:"max_revocation_staleness"`
	// SealedCache says how X509-SVIDs, their keys and the CA's state are kept on disk, so that an agent that is started while
	// the CA is away serves its workloads.
	SealedCache SealedCache `yaml:"sealed_cache"`
	// MaxStreams bounds the open calls of workloads; MaxStreamsPerUID those of one user. Default 16384 and a quarter of it.
	MaxStreams       int `yaml:"max_streams"`
	MaxStreamsPerUID int `yaml:"max_streams_per_uid"`
	// MaxCallsPerSecond bounds the calls that one process begins, and four times as many those of one user, with five seconds' worth
	// of them after a pause. Default 1000; -1: no bound.
	MaxCallsPerSecond int `yaml:"max_calls_per_second"`
	// RequireHeaderEverywhere demands the Workload API's security header also from SDS, ext_authz and health checks.
	RequireHeaderEverywhere bool `yaml:"require_header_everywhere"`
	// AllowBundlesWithoutIdentity gives the trust domain's bundles to processes without a registration entry, too.
	AllowBundlesWithoutIdentity bool `yaml:"allow_bundles_without_identity"`
	// AllowUnknownJWTHeaders accepts foreign JWT-SVIDs with headers beyond the standard's.
	AllowUnknownJWTHeaders bool `yaml:"allow_unknown_jwt_headers"`
	// WIT serves WIT-SVIDs on the Workload API, which the CA must issue (wit.enabled there). They are incubating in the
	// standard.
	WIT WIT `yaml:"wit"`
	// JWTLeeway is how far clocks may be apart when JWT-SVIDs are validated. Default 30s; at most 60s.
	JWTLeeway time.Duration `yaml:"jwt_leeway"`
	// SDS says how Envoys find their certificates and validation contexts on the socket.
	SDS SDS `yaml:"sds"`
	// ExtAuthz says how Envoys are answered that ask about each call.
	ExtAuthz ExtAuthz `yaml:"ext_authz"`
	// WorkloadAttestation says how processes are looked at.
	WorkloadAttestation WorkloadAttestation `yaml:"workload_attestation"`

	// Observations says what is told of the decisions of enforcement points on this node.
	Observations Observations `yaml:"observations"`

	// Sandbox says what the agent gives up once it has started.
	Sandbox Sandbox `yaml:"sandbox"`

	// Metrics serves /metrics, /live and /ready.
	Metrics Metrics `yaml:"metrics"`
	// Logging says what is logged to standard error.
	Logging Logging `yaml:"log"`

	// Now tells the time. Nil: time.Now.
	Now func() time.Time `yaml:"-"`
	// Log replaces the logger that Logging describes.
	Log *slog.Logger `yaml:"-"`
	// Sockets listen already where the agent is to listen: SocketWorkload and the like. Files left there by the caller stay
	// open; the caller closes them.
	Sockets map[string]*os.File `yaml:"-"`
	// Executables looks at what processes run. Nil: the agent itself.
	Executables peer.Executables `yaml:"-"`
	// Version is what the agent tells the CA about itself.
	Version string `yaml:"-"`
}

// AdminSocket says where the agent's admin socket is and who besides root and the agent's own user may use it.
type AdminSocket struct {
	// Path is the socket's path. It must not be in the directory of SocketPath or below, which is mounted into containers:
	// their root would be an admin of the agent. Default /run/signet-agent/admin.sock, where signet why and signet agent
	// status look, if SocketPath has its default too; else there is none.
	Path string `yaml:"path"`
	// UIDs are further users, by number. The overflow uid 65534 is refused always.
	UIDs []uint32 `yaml:"uids"`
	// Group is a group, by name or number, whose members are admins.
	Group string `yaml:"group"`
	// Open lets processes of all users connect, for services that judge each caller by its SPIFFE ID. It makes nobody an
	// admin.
	Open bool `yaml:"open"`
	// AuthorizedDelegates are SPIFFE IDs, such as /node-proxy: a process that has one of them may use the Delegated Identity
	// API there, which hands it the SVIDs of any workload of this node. It must reach the socket, by its user, its group, or
	// because the socket is open.
	AuthorizedDelegates []string `yaml:"authorized_delegates"`

	// AllowBesideSocket takes a Path in the directory of SocketPath: one that is private to a developer.
	AllowBesideSocket bool `yaml:"-"`

	isDefault bool `yaml:"-"` // Path was not chosen: that it cannot be had is no reason not to serve workloads
}

// WIT says whether WIT-SVIDs are served.
type WIT struct {
	// Enabled serves them; otherwise their calls answer Unimplemented.
	Enabled bool `yaml:"enabled"`
}

// Metrics says where metrics are served.
type Metrics struct {
	// Listen is host:port, such as 127.0.0.1:9989. Without a host it is the loopback interface. Empty: nowhere.
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
	defaultSocket = "/run/signet/agent.sock"
	// DefaultAdminSocket is where the admin socket is unless the configuration says otherwise.
	DefaultAdminSocket = "/run/signet-agent/admin.sock"
	defaultPort        = "8081"
	maxSocketBytes     = 107
	// maxCallsPerSecond is more than a node can answer.
	maxCallsPerSecond = 1_000_000
	maxWait           = 30 * time.Second
	minPoll           = time.Second
	maxPoll           = 5 * time.Minute
	maxLeeway         = time.Minute

	defaultMaxOffline = 24 * time.Hour
	leastMaxOffline   = time.Minute
	mostMaxOffline    = 30 * 24 * time.Hour
	leastMaxStaleness = 10 * time.Second // a CA that is restarted is no reason to deny
)

// ReadConfig reads a configuration file. Errors name file, line and column.
func ReadConfig(data []byte, file string) (Config, error) {
	var c Config
	if err := strictyaml.Unmarshal(data, file, &c); err != nil {
		return Config{}, err
	}
	return c, c.Check()
}

// Check fills in defaults and refuses what cannot work, before anything is started. All mistakes are told at once.
func (c *Config) Check() error {
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}
	if c.TrustDomain == "" {
		bad("trust_domain", "missing; give the name of the CA's trust domain, such as example.org")
	} else if td, err := spiffe.ParseTrustDomain(c.TrustDomain); err != nil {
		bad("trust_domain", "%v", err)
	} else if err := spiffe.CheckOwnTrustDomain(td); err != nil {
		bad("trust_domain", "%v", err)
	}
	if c.ServerAddress == "" {
		bad("server_address", "missing; give the CA's host:port, such as ca.example.org:8081")
	} else if host, port, err := splitAddress(c.ServerAddress); err != nil || host == "" || port == "" {
		bad("server_address", "%q is not host:port, such as ca.example.org:8081", c.ServerAddress)
	} else if _, err := net.LookupPort("tcp", port); err != nil {
		bad("server_address", "%q has no port of 1 to 65535", c.ServerAddress)
	} else {
		c.ServerAddress = net.JoinHostPort(host, port)
	}
	if c.DataDir == "" {
		bad("data_dir", "missing; name a directory for the agent's key and SVID, such as /var/lib/signet/agent")
	} else if !filepath.IsAbs(c.DataDir) {
		bad("data_dir", "%q must be absolute", c.DataDir)
	}
	if c.SocketPath == "" {
		c.SocketPath = defaultSocket
	}
	if !filepath.IsAbs(c.SocketPath) {
		bad("socket_path", "%q must be absolute", c.SocketPath)
	} else if len(c.SocketPath) > maxSocketBytes {
		bad("socket_path", "%q has %d bytes, and a Unix socket's path at most %d; choose a shorter one", c.SocketPath, len(c.SocketPath), maxSocketBytes)
	}
	c.checkAdminSocket(bad)
	c.Broker.check(c, bad)
	c.checkBootstrap(bad)
	c.NodeAttestation.check(c, bad)
	c.WorkloadAttestation.check(bad)
	c.SDS.check(bad)
	c.ExtAuthz.check(bad)
	c.checkLimits(bad)
	c.Observations.check(bad)
	c.Sandbox.check(bad)
	c.SealedCache.check(bad)
	if c.Metrics.Listen != "" {
		host, port, err := net.SplitHostPort(c.Metrics.Listen)
		if err != nil || port == "" {
			bad("metrics.listen", "%q is not host:port, such as 127.0.0.1:9989", c.Metrics.Listen)
		} else if _, err := net.LookupPort("tcp", port); err != nil {
			bad("metrics.listen", "%q has no port of 0 to 65535", c.Metrics.Listen)
		} else if host == "" {
			c.Metrics.Listen = net.JoinHostPort("127.0.0.1", port)
		}
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

func (c *Config) checkAdminSocket(bad func(field, format string, args ...any)) {
	a := &c.AdminSocket
	if a.Path == "" && c.SocketPath == defaultSocket {
		a.Path, a.isDefault = DefaultAdminSocket, true
	}
	if a.Path == "" {
		if len(a.UIDs) > 0 || a.Group != "" || a.Open || len(a.AuthorizedDelegates) > 0 {
			bad("admin_socket.path", "missing; name a socket, such as %s, or leave out admin_socket", DefaultAdminSocket)
		}
		return
	}
	switch dir := filepath.Dir(c.SocketPath); {
	case !filepath.IsAbs(a.Path):
		bad("admin_socket.path", "%q must be absolute", a.Path)
	case len(a.Path) > maxSocketBytes:
		bad("admin_socket.path", "%q has %d bytes, and a Unix socket's path at most %d; choose a shorter one", a.Path, len(a.Path), maxSocketBytes)
	case filepath.Clean(a.Path) == filepath.Clean(c.SocketPath):
		bad("admin_socket.path", "%q is socket_path; the two are different sockets", a.Path)
	case !a.AllowBesideSocket && within(filepath.Dir(a.Path), dir):
		bad("admin_socket.path", "%q is in %s, the directory of socket_path, which is mounted into containers: their root would be an admin; choose another directory, such as %s",
			a.Path, dir, filepath.Dir(DefaultAdminSocket))
	}
	a.socket().Check(func(field, format string, args ...any) { bad("admin_socket."+field, format, args...) })
	for i, id := range a.AuthorizedDelegates {
		if _, err := ownID(c.trustDomain(), id); err != nil && !c.trustDomain().IsZero() {
			bad(fmt.Sprintf("admin_socket.authorized_delegates[%d]", i), "%v", err)
		}
	}
	a.isDefault = a.isDefault && len(a.AuthorizedDelegates) == 0 // they were asked for
}

// within says whether path is dir or below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// socket is the configuration as the package that makes the socket wants it.
func (a AdminSocket) socket() adminsocket.Config {
	return adminsocket.Config{Path: a.Path, UIDs: a.UIDs, Group: a.Group, Open: a.Open}
}

// checkBootstrap sees to it that something verifies the CA on the first connection: there is no insecure way.
func (c *Config) checkBootstrap(bad func(field, format string, args ...any)) {
	if c.JoinToken != "" && c.JoinTokenFile != "" {
		bad("join_token_file", "excludes join_token; keep one of them")
	}
	for _, f := range []struct{ field, path string }{{"join_token_file", c.JoinTokenFile}, {"trust_bundle_path", c.TrustBundlePath}} {
		if f.path != "" && !filepath.IsAbs(f.path) {
			bad(f.field, "%q must be absolute", f.path)
		}
	}
	if c.JoinToken == "" {
		return
	}
	token, err := nodeattest.ParseJoinToken(c.JoinToken)
	switch {
	case err != nil:
		bad("join_token", "%v", err)
	case !token.Pinned() && c.TrustBundlePath == "":
		bad("join_token", "carries no authority pin, so that nothing verifies the CA on the first connection; "+
			"use a token of signet token create, or set trust_bundle_path, for a SPIRE server to a file with the output of spire-server bundle show")
	}
}

func (c *Config) checkLimits(bad func(field, format string, args ...any)) {
	if c.RegistrationWait < 0 || c.RegistrationWait > maxWait {
		bad("registration_wait", "%s is not between 0 and %s", c.RegistrationWait, maxWait)
	}
	if c.RegistrationWait == 0 {
		c.RegistrationWait = svidcache.DefaultRegistrationWait
	}
	if c.PollInterval == 0 {
		c.PollInterval = caclient.DefaultPollEvery
	}
	if c.PollInterval < minPoll || c.PollInterval > maxPoll {
		bad("poll_interval", "%s is not between %s and %s", c.PollInterval, minPoll, maxPoll)
	}
	if c.MaxPrefetch < 0 {
		bad("max_prefetch", "%d is negative; to keep none ready set disable_prefetch", c.MaxPrefetch)
	}
	if c.MaxPrefetch == 0 {
		c.MaxPrefetch = svidcache.DefaultMaxPrefetch
	}
	if c.MaxOffline == 0 {
		c.MaxOffline = defaultMaxOffline
	}
	if c.MaxOffline < leastMaxOffline || c.MaxOffline > mostMaxOffline {
		bad("max_offline", "%s is not between %s and %s", c.MaxOffline, leastMaxOffline, mostMaxOffline)
	}
	if s := c.MaxRevocationStaleness; s != 0 && (s < leastMaxStaleness || s > c.MaxOffline) {
		bad("max_revocation_staleness", "%s is not between %s and max_offline, which is %s; leave it out to go on by the revocations that are known", s, leastMaxStaleness, c.MaxOffline)
	}
	if c.MaxStreams < 0 {
		bad("max_streams", "%d is negative", c.MaxStreams)
	}
	if c.MaxStreamsPerUID < 0 {
		bad("max_streams_per_uid", "%d is negative", c.MaxStreamsPerUID)
	}
	if c.MaxCallsPerSecond < -1 || c.MaxCallsPerSecond > maxCallsPerSecond {
		bad("max_calls_per_second", "%d is not 1 to %d, 0 for the default of 1000, or -1 for no bound", c.MaxCallsPerSecond, maxCallsPerSecond)
	}
	if c.JWTLeeway < 0 || c.JWTLeeway > maxLeeway {
		bad("jwt_leeway", "%s is not between 0 and %s", c.JWTLeeway, maxLeeway)
	}
}

func (l Logging) level() (slog.Level, error) {
	var level slog.Level
	if l.Level == "" {
		return slog.LevelInfo, nil
	}
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		return 0, fmt.Errorf("log.level: %q is not debug, info, warn or error", l.Level)
	}
	return level, nil
}

// splitAddress adds the default port to a host that has none.
func splitAddress(address string) (host, port string, err error) {
	if net.ParseIP(address) != nil || !strings.ContainsAny(address, ":/[]") {
		return address, defaultPort, nil
	}
	if host, port, err = net.SplitHostPort(address); err == nil && strings.ContainsAny(host, "/[]") {
		err = errors.New("there is a URL where a host is wanted")
	}
	return host, port, err
}

func (c *Config) trustDomain() spiffeid.TrustDomain {
	td, _ := spiffe.ParseTrustDomain(c.TrustDomain) // Check has seen it
	return td
}
