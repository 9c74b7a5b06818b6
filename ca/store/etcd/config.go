package etcd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/signet-id/signet/internal/durable"
)

// Defaults of Config.
const (
	DefaultTimeout    = 5 * time.Second
	DefaultReserve    = 64 << 20
	DefaultCompaction = 5 * time.Minute
	MinCompaction     = time.Minute
)

const (
	// maxPrefixBytes keeps the largest commit within the 1.5 MiB that etcd takes: the prefix is in each of its keys.
	maxPrefixBytes = 64
	maxFileBytes   = 1 << 20
	maxPassword    = 1024
)

// Config says which etcd, and what of it is ours.
type Config struct {
	// Endpoints are the client URLs of the members, such as https://10.0.0.1:2379. http is taken for a loopback address only,
	// unix:// for a socket of this machine.
	Endpoints []string

	// Prefix is what our keys begin with. It ends in a slash. The user needs a role that may read and write this prefix and
	// nothing else. Nobody else may write below it.
	Prefix string

	// CAFile holds the authorities, in PEM, that sign the members' certificates. https needs it: the machine's own roots are
	// never used. A member's certificate must be for its endpoint's host.
	CAFile string
	// CertFile and KeyFile are the client's certificate and key in PEM. They are read again for each connection.
	CertFile, KeyFile string

	// Username and PasswordFile authenticate as a user of etcd, instead of or besides a certificate. The file has mode 0600.
	Username, PasswordFile string

	// Timeout bounds one request. Zero means DefaultTimeout.
	Timeout time.Duration

	// Reserve is the room in bytes, out of etcd's quota, that is left to commits under store.WithReserve. Zero means
	// DefaultReserve, and never more than an eighth of the quota.
	Reserve int64

	// Compaction is how long history is kept, for watches that were cut; it is removed after twice as long at most. Zero means
	// DefaultCompaction, a negative value that etcd is left to do it. Where etcd's authentication is on, only its root user may:
	// start etcd with --auto-compaction-mode periodic --auto-compaction-retention 10m then.
	Compaction time.Duration

	// Dir is where this process remembers, from one start to the next, how new a state it has seen. Empty: nowhere, and a restored
	// etcd is then noticed only while the process runs.
	Dir string

	// Log gets what an operator should know. Nil means slog.Default.
	Log *slog.Logger

	// How often the watch is asked for a sign of life, and what a slow reader of it may leave unread. Tests change them.
	heartbeat    time.Duration
	bufferEvents int
}

// Check fills in defaults and calls bad for each field that cannot work, by its name in the CA's configuration.
func (c *Config) Check(bad func(field, format string, args ...any)) {
	if len(c.Endpoints) == 0 {
		bad("endpoints", "missing; give the client URLs of etcd's members, such as https://10.0.0.1:2379")
	}
	secure, plain := false, false
	for _, e := range c.Endpoints {
		tls, err := checkEndpoint(e)
		if err != nil {
			bad("endpoints", "%v", err)
			continue
		}
		secure, plain = secure || tls, plain || !tls
	}
	switch {
	case secure && plain:
		bad("endpoints", "https beside others; a client talks to all members in one way")
	case secure && c.CAFile == "":
		bad("tls.ca_file", "missing; name the file with the authorities of the members' certificates")
	case plain && (c.CAFile != "" || c.CertFile != "" || c.KeyFile != ""):
		bad("tls", "given although the endpoints are not https")
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		bad("tls.cert_file", "the client's certificate and its key (tls.key_file) go together; only one is given")
	}
	if (c.Username == "") != (c.PasswordFile == "") {
		bad("username", "a user and the file with its password (password_file) go together; only one is given")
	}
	if secure && c.CertFile == "" && c.Username == "" {
		bad("tls.cert_file", "missing; over a network etcd must know its client by a certificate, or by username and password_file")
	}
	switch {
	case !strings.HasSuffix(c.Prefix, "/") || strings.Trim(c.Prefix, "/") == "":
		bad("prefix", "%q does not name a place of our own and end in a slash, such as /signet/example.org/", c.Prefix)
	case len(c.Prefix) > maxPrefixBytes:
		bad("prefix", "%.40q… has %d bytes, at most %d", c.Prefix, len(c.Prefix), maxPrefixBytes)
	}
	switch {
	case c.Timeout == 0:
		c.Timeout = DefaultTimeout
	case c.Timeout < 100*time.Millisecond || c.Timeout > time.Minute:
		bad("timeout", "%v is not from 100ms to 1m", c.Timeout)
	}
	switch {
	case c.Reserve == 0:
		c.Reserve = DefaultReserve
	case c.Reserve < 0:
		bad("reserve_bytes", "%d is negative; 0 means the default", c.Reserve)
	}
	switch {
	case c.Compaction == 0:
		c.Compaction = DefaultCompaction
	case c.Compaction > 0 && c.Compaction < MinCompaction:
		bad("compaction", "%v is shorter than %v, within which a watch that was cut has to come back", c.Compaction, MinCompaction)
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.heartbeat == 0 {
		c.heartbeat = heartbeat
	}
	if c.bufferEvents == 0 {
		c.bufferEvents = maxBufferedEvents
	}
}

// checkEndpoint tells whether an endpoint is reached by TLS, and refuses one that would be reached in clear over a network.
func checkEndpoint(endpoint string) (secure bool, err error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return false, fmt.Errorf("%q is not a URL, such as https://10.0.0.1:2379", endpoint)
	}
	if u.User != nil {
		return false, fmt.Errorf("%q holds credentials; name them in username and password_file", u.Redacted())
	}
	switch u.Scheme {
	case "unix":
		if u.Host != "" || !strings.HasPrefix(u.Path, "/") {
			return false, fmt.Errorf("%q is not a socket's absolute path, such as unix:///run/etcd.sock", endpoint)
		}
		return false, nil
	case "http", "https":
	default:
		return false, fmt.Errorf("%q does not begin with https://", endpoint)
	}
	if u.Hostname() == "" || u.Port() == "" || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return false, fmt.Errorf("%q is not scheme, host and port alone, such as https://10.0.0.1:2379", endpoint)
	}
	if u.Scheme == "https" {
		return true, nil
	}
	if ip := net.ParseIP(u.Hostname()); ip == nil || !ip.IsLoopback() {
		return false, fmt.Errorf("%q is not a loopback address; over a network etcd is used by https only, for who reads or writes this store owns the trust domain", endpoint)
	}
	return false, nil
}

// tls returns how the members are reached; nil: in clear on this machine.
func (c *Config) tls() (*tls.Config, error) {
	if c.CAFile == "" {
		return nil, nil
	}
	pem, err := durable.ReadFile(c.CAFile, maxFileBytes)
	if err != nil {
		return nil, fmt.Errorf("tls.ca_file: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("tls.ca_file: %s holds no certificate in PEM", c.CAFile)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
	if c.CertFile == "" {
		return t, nil
	}
	if _, err := c.certificate(); err != nil {
		return nil, err
	}
	// Read for each handshake, so that a renewed certificate needs no restart.
	t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.certificate() }
	return t, nil
}

func (c *Config) certificate() (*tls.Certificate, error) {
	cert, err := durable.ReadFile(c.CertFile, maxFileBytes)
	if err != nil {
		return nil, fmt.Errorf("tls.cert_file: %w", err)
	}
	key, err := durable.ReadMountedSecret(c.KeyFile, maxFileBytes)
	if err != nil {
		return nil, fmt.Errorf("tls.key_file: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("tls.cert_file %s, tls.key_file %s: %w", c.CertFile, c.KeyFile, err)
	}
	return &pair, nil
}

// password reads the user's password: the file's first line.
func (c *Config) password() (string, error) {
	if c.PasswordFile == "" {
		return "", nil
	}
	data, err := durable.ReadMountedSecret(c.PasswordFile, maxPassword)
	if err != nil {
		return "", fmt.Errorf("password_file: %w", err)
	}
	p := strings.TrimRight(string(data), "\r\n")
	if p == "" || strings.ContainsAny(p, "\r\n") {
		return "", errors.New("password_file: it does not hold one line with a password")
	}
	return p, nil
}
