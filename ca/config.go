package ca

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/rotation"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// Config is the CA's configuration file. The zero value of a field is its default. Times are written 1h, 30m, 90s.
type Config struct {
	// TrustDomain is the name of the trust domain, such as example.org. It cannot be changed later.
	TrustDomain string `yaml:"trust_domain"`
	// Listen is the TCP address for agents and remote admins. Default :8081.
	Listen string `yaml:"listen"`
	// DataDir holds the store and the audit log. One CA uses it at a time.
	DataDir string `yaml:"data_dir"`
	// Store says where the state is. Default: in data_dir, for one CA; etcd for several replicas.
	Store StoreConfig `yaml:"store"`
	// AdminSocket is where local admins are served.
	AdminSocket AdminSocket `yaml:"admin_socket"`
	// AdminIDs are SPIFFE IDs, of any trust domain whose SVIDs this CA can verify, that are admins over TCP.
	AdminIDs []string `yaml:"admin_ids"`
	// Seal says where the key is that seals the authorities' private keys. One of its sources is needed.
	Seal Seal `yaml:"seal"`
	// Keys says where the authorities' private keys are made and kept. Default: in this process, sealed in the store.
	Keys Keys `yaml:"keys"`
	// TTL holds the validity of what is issued.
	TTL TTL `yaml:"ttl"`
	// Authorities says how long new authorities live and how often their bundle should be fetched.
	Authorities Authorities `yaml:"authorities"`
	// Upstream is the CA that signs this CA's X.509 authorities. Default: none, they sign themselves.
	Upstream Upstream `yaml:"upstream"`
	// Downstream says what CAs below this one get. Which may ask is said by registration entries (downstream: true).
	Downstream Downstream `yaml:"downstream"`
	// Federation says how the bundles of foreign trust domains are fetched.
	Federation Federation `yaml:"federation"`
	// WIT says whether workload identity tokens are issued, an incubating kind of SVID that is bound to a key. Default: no.
	WIT WIT `yaml:"wit"`
	// JWTIssuer is the iss claim of JWT-SVIDs. Empty: none.
	JWTIssuer string `yaml:"jwt_issuer"`
	// NodeAttestors says how nodes may prove what they are, besides by join token. Absent: not at all.
	NodeAttestors NodeAttestors `yaml:"node_attestors"`
	// Kubernetes says which clusters of Kubernetes the CA watches. Default: none.
	Kubernetes Kubernetes `yaml:"kubernetes"`
	// Audit says where the audit log is and how much room it takes.
	Audit Audit `yaml:"audit"`
	// Observations says for how long it is known what enforcement points decided.
	Observations Observations `yaml:"observations"`
	// Limits bounds how often one agent may call, and one address from which no X509-SVID is shown (of IPv6 a /64 is one).
	// Who is over a limit waits, and is refused with ResourceExhausted and a retry hint where that would take longer than
	// limits.max_wait. The admin socket has no limits. Behind a TCP proxy all callers have one address.
	Limits Limits `yaml:"limits"`
	// CRL says whether lists of revoked X509-SVIDs are issued for programs that verify without signet. Default: no.
	CRL CRL `yaml:"crl"`
	// Leaks says what happens when a secret seems to be in wrong hands, besides the alarm.
	Leaks Leaks `yaml:"leaks"`
	// Metrics serves /metrics, /live and /ready.
	Metrics Metrics `yaml:"metrics"`
	// Logging says what is logged to standard error.
	Logging Logging `yaml:"log"`

	// SyncPage is how many entries a message to a SPIRE agent holds at most, for tests of paging. 0: 500, as at SPIRE.
	SyncPage int `yaml:"-"`
	// SPIREOnly leaves out signet.node.v1, so that an agent takes the CA for a SPIRE server, for tests of that.
	SPIREOnly bool `yaml:"-"`
	// Now tells the time. Nil: time.Now.
	Now func() time.Time `yaml:"-"`
	// Log replaces the logger that Logging describes.
	Log *slog.Logger `yaml:"-"`

	settle time.Duration `yaml:"-"` // rotation.Config's; tests shorten it

	attestors []nodeattest.Attestor `yaml:"-"` // besides those of NodeAttestors; for tests of what happens around them
}

// AdminSocket says where the admin socket is and who besides root and the CA's own user may use it.
type AdminSocket struct {
	// Path is the socket's path. Default: /run/signet/ca/admin.sock, where the operator commands look.
	Path string `yaml:"path"`
	// UIDs are further users, by number. The overflow uid 65534 is refused always.
	UIDs []uint32 `yaml:"uids"`
	// Group is a group, by name or number, whose members are admins.
	Group string `yaml:"group"`
}

// Seal names the source of the seal key: 32 random bytes.
type Seal struct {
	// KeyFile is a file with mode 0600 that holds the key.
	KeyFile string `yaml:"key_file"`
	// Create makes KeyFile on the first start. Without it a missing file is an error, so that a lost mount is not
	// taken for a first start.
	Create bool `yaml:"create"`
	// SystemdCredential is the name of a credential that systemd passes (LoadCredential=).
	SystemdCredential string `yaml:"systemd_credential"`
	// KMS is the URI of an RSA key in a key store (pkcs11:, awskms: or cloudkms:) that can decrypt. The seal key is made on
	// the first start and kept in the store, wrapped by it.
	KMS string `yaml:"kms"`
	// Previous is the source of the seal key that was in use before. All that is sealed under it is sealed anew on start.
	Previous SealSource `yaml:"previous"`
}

// SealSource is where a seal key is.
type SealSource struct {
	// KeyFile is as seal.key_file.
	KeyFile string `yaml:"key_file"`
	// SystemdCredential is as seal.systemd_credential.
	SystemdCredential string `yaml:"systemd_credential"`
	// KMS is as seal.kms.
	KMS string `yaml:"kms"`
}

// Keys says where the private keys of new authorities are made. Authorities that exist keep the key they have: a change
// takes effect when the next authority is prepared.
type Keys struct {
	// URI is the key store for all authorities: softkms: (default), pkcs11:, tpmkms:, awskms:, cloudkms: or azurekms:. It
	// names no key, and holds no PIN: name a file with pin-source.
	URI string `yaml:"uri"`
	// X509 is the key store for X.509 authorities. Default: uri.
	X509 string `yaml:"x509"`
	// JWT is the key store for JWT authorities. Default: uri.
	JWT string `yaml:"jwt"`
	// X509Algorithm is EC-P256 (default), EC-P384, RSA-2048, RSA-3072 or RSA-4096.
	X509Algorithm string `yaml:"x509_algorithm"`
	// JWTAlgorithm is the same for JWT authorities. JWT-SVIDs are signed with ES256, ES384 or RS256.
	JWTAlgorithm string `yaml:"jwt_algorithm"`
	// Timeout bounds one signature in a key store. Default 10s.
	Timeout time.Duration `yaml:"timeout"`
	// Concurrency is the most calls under way in one key store at once. Default 32.
	Concurrency int `yaml:"concurrency"`
}

// TTL holds validities.
type TTL struct {
	X509  time.Duration `yaml:"x509"`  // default 1h
	JWT   time.Duration `yaml:"jwt"`   // default 5m
	Agent time.Duration `yaml:"agent"` // agents' own X509-SVIDs; default 1h
	// AgentRecovery is how long after the end of its X509-SVID an agent may win it back with the key it was for. Default
	// a week; an agent that was away for longer needs a fresh join token.
	AgentRecovery time.Duration `yaml:"agent_recovery"`
	MaxX509       time.Duration `yaml:"max_x509"` // default 24h
	MaxJWT        time.Duration `yaml:"max_jwt"`  // default 1h
}

// Authorities says how authorities live and are replaced.
type Authorities struct {
	X509Lifetime time.Duration `yaml:"x509_lifetime"` // default a year
	JWTLifetime  time.Duration `yaml:"jwt_lifetime"`  // default 90 days
	RefreshHint  time.Duration `yaml:"refresh_hint"`  // default 5m
	// Rotate is auto (default): authorities are prepared, activated and retired by schedule; or manual: only by signet
	// authority and SPIRE's LocalAuthority API.
	Rotate string `yaml:"rotate"`
	// ActivationDeadline is how long after its preparation an authority is activated although agents lag. Default, and at
	// most: the last moment at which the one before it covers the longest TTL.
	ActivationDeadline time.Duration `yaml:"activation_deadline"`
	// ReissueRate is how many SVIDs a second all agents together renew when an authority is tainted. Default 1000.
	ReissueRate int `yaml:"reissue_rate"`
}

// The values of Authorities.Rotate.
const (
	rotateAuto   = "auto"
	rotateManual = "manual"
)

const defaultReissueRate = 1000

// WIT says whether and how WIT-SVIDs are issued. With them the bundle holds keys of a use that some older consumers do not
// know, and for which they refuse the whole bundle: see docs/operate/rotation.md.
type WIT struct {
	Enabled  bool          `yaml:"enabled"`  // default false
	TTL      time.Duration `yaml:"ttl"`      // default 1h
	MaxTTL   time.Duration `yaml:"max_ttl"`  // default 24h
	Lifetime time.Duration `yaml:"lifetime"` // of their authorities; default 90 days
	// Issuer is the iss claim. Empty: none. An https URL is refused.
	Issuer string `yaml:"issuer"`
}

func (w WIT) authority() authority.WITConfig {
	return authority.WITConfig{Enabled: w.Enabled, DefaultTTL: w.TTL, MaxTTL: w.MaxTTL, Lifetime: w.Lifetime, Issuer: w.Issuer}
}

// Audit bounds the audit log.
type Audit struct {
	Dir          string `yaml:"dir"`            // default DataDir/audit
	Reserve      int64  `yaml:"reserve_bytes"`  // kept for renewals when the disk is full; default 64 MiB
	MaxFileBytes int64  `yaml:"max_file_bytes"` // a new file is begun at this size
	Keep         int    `yaml:"keep_files"`     // the oldest beyond this many are deleted; negative: none
}

// Limits bounds how often one agent or address may call.
type Limits struct {
	Connections Limit `yaml:"connections"`  // new connections of one address; default rate 100, burst 500
	Attest      Limit `yaml:"attest"`       // attestations from one address; default rate 5, burst 30
	Bundle      Limit `yaml:"bundle"`       // GetBundle and GetFederatedBundle, of one address or agent; default rate 20, burst 100
	Renew       Limit `yaml:"renew"`        // renewals of one agent's own X509-SVID; default rate 10, burst 20
	X509SVIDs   Limit `yaml:"x509"`         // X509-SVIDs, and CAs, signed for one agent or downstream CA, each of a batch; default rate 500, burst 1000
	JWTSVIDs    Limit `yaml:"jwt"`          // JWT-SVIDs and WIT-SVIDs signed for one agent, each of a batch; default rate 500, burst 1000
	Sync        Limit `yaml:"sync"`         // streams and calls by which one agent learns its entries; default rate 10, burst 20
	Status      Limit `yaml:"status"`       // PostStatus of one agent, JWT authorities published by one downstream CA; default rate 10, burst 10
	Observed    Limit `yaml:"observations"` // decisions of enforcement points reported by one agent; default rate 1000, burst 5000
	// MaxWait is how long a call may wait before it is refused. Default 5s; at most 8s.
	MaxWait time.Duration `yaml:"max_wait"`
}

// Limit bounds one kind of call.
type Limit struct {
	Rate  int `yaml:"rate"`  // a second, on average; -1: no limit
	Burst int `yaml:"burst"` // at once, after a pause; if only a rate is set, the default or the rate, whichever is more
}

// CRL says whether and how CRLs are issued. A program that checks them refuses every X509-SVID once the newest list that it has
// is out of date.
type CRL struct {
	Enabled bool `yaml:"enabled"` // default false
	// Validity is from a list's issuance to its nextUpdate. A new one is issued after a third of it, and when something is
	// revoked. Default 72h; at least 24h, for which agents go on without a CA.
	Validity time.Duration `yaml:"validity"`
}

// Leaks says what follows an alarm about a leak.
type Leaks struct {
	// Revoke revokes the agent whose X509-SVID or key is used in two places, and the canary identity that was issued or used.
	// Default false: an alarm only. Leave it so where agents reach the CA from changing addresses, as behind a pool of NAT
	// addresses: each then seems to be in two places.
	Revoke bool `yaml:"revoke"`
}

// Metrics says where metrics are served.
type Metrics struct {
	Listen string `yaml:"listen"` // such as 127.0.0.1:9988; empty: nowhere
}

// Logging says what is logged.
type Logging struct {
	Level  string `yaml:"level"`  // debug, info (default), warn, error
	Format string `yaml:"format"` // text (default) or json
}

// ReadConfig reads a configuration file. Errors name file, line and column.
func ReadConfig(data []byte, file string) (Config, error) {
	var c Config
	if err := strictyaml.Unmarshal(data, file, &c); err != nil {
		return Config{}, err
	}
	return c, c.Check()
}

// Check fills in defaults and refuses what cannot work, before anything is started.
func (c *Config) Check() error {
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}
	if c.TrustDomain == "" {
		bad("trust_domain", "missing; give the name of your trust domain, such as example.org")
	} else if td, err := spiffe.ParseTrustDomain(c.TrustDomain); err != nil {
		bad("trust_domain", "%v", err)
	} else if err := spiffe.CheckOwnTrustDomain(td); err != nil {
		bad("trust_domain", "%v", err)
	}
	if c.Listen == "" {
		c.Listen = ":8081"
	}
	if _, port, err := net.SplitHostPort(c.Listen); err != nil || port == "" {
		bad("listen", "%q is not host:port, such as :8081 or 10.0.0.5:8081", c.Listen)
	} else if _, err := net.LookupPort("tcp", port); err != nil {
		bad("listen", "%q has no port of 0 to 65535", c.Listen)
	}
	if c.DataDir == "" {
		bad("data_dir", "missing; name a directory for the store and the audit log")
	} else if !filepath.IsAbs(c.DataDir) {
		bad("data_dir", "%q must be absolute", c.DataDir)
	}
	if c.AdminSocket.Path == "" {
		c.AdminSocket.Path = "/run/signet/ca/admin.sock"
	}
	c.AdminSocket.socket().Check(func(field, format string, args ...any) { bad("admin_socket."+field, format, args...) })
	for _, s := range c.AdminIDs {
		if _, err := spiffe.ParseWorkloadID(s); err != nil {
			bad("admin_ids", "%v", err)
		}
	}
	c.Seal.check(bad)
	c.Store.check(c, bad)
	if c.TTL.Agent == 0 {
		c.TTL.Agent = time.Hour
	}
	if c.TTL.AgentRecovery == 0 {
		c.TTL.AgentRecovery = 7 * 24 * time.Hour
	}
	if c.TTL.AgentRecovery < 0 {
		bad("ttl.agent_recovery", "%v is negative; 1s is the shortest", c.TTL.AgentRecovery)
	}
	if c.TTL.Agent < minAgentTTL {
		bad("ttl.agent", "%v is shorter than %v", c.TTL.Agent, minAgentTTL)
	}
	switch c.Authorities.Rotate {
	case "":
		c.Authorities.Rotate = rotateAuto
	case rotateAuto, rotateManual:
	default:
		bad("authorities.rotate", "%q is not auto or manual", c.Authorities.Rotate)
	}
	if c.Authorities.ActivationDeadline < 0 {
		bad("authorities.activation_deadline", "%v is negative; 0 means the default", c.Authorities.ActivationDeadline)
	}
	switch {
	case c.Authorities.ReissueRate == 0:
		c.Authorities.ReissueRate = defaultReissueRate
	case c.Authorities.ReissueRate < 0:
		bad("authorities.reissue_rate", "%d is less than 1 SVID a second", c.Authorities.ReissueRate)
	}
	c.checkLifetimes(bad)
	switch {
	case c.CRL.Validity == 0:
		c.CRL.Validity = 72 * time.Hour
	case c.CRL.Validity < 24*time.Hour:
		bad("crl.validity", "%v is shorter than 24h, for which agents go on without a CA: every X509-SVID would be refused", c.CRL.Validity)
	}
	c.NodeAttestors.check(bad)
	c.Kubernetes.check(bad)
	c.checkPodCertificates(bad)
	c.checkInjection(bad)
	c.Keys.check(bad)
	c.Limits.check(bad)
	c.Observations.check(bad)
	c.Downstream.check(bad)
	c.Upstream.check(c.trustDomain(), bad)
	if roots := c.Federation.WebRoots; roots != "" && !filepath.IsAbs(roots) {
		bad("federation.web_roots", "%q must be absolute", roots)
	}
	if err := c.WIT.authority().Check(); err != nil {
		errs = append(errs, err)
	}
	if c.Audit.Reserve < 0 || c.Audit.MaxFileBytes < 0 {
		bad("audit", "reserve_bytes and max_file_bytes must not be negative; 0 means the default")
	}
	if c.Audit.Dir == "" {
		c.Audit.Dir = filepath.Join(c.DataDir, "audit")
	}
	if c.Metrics.Listen != "" {
		if _, port, err := net.SplitHostPort(c.Metrics.Listen); err != nil {
			bad("metrics.listen", "%q is not host:port, such as 127.0.0.1:9988", c.Metrics.Listen)
		} else if _, err := net.LookupPort("tcp", port); err != nil {
			bad("metrics.listen", "%q has no port of 0 to 65535", c.Metrics.Listen)
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

// checkLifetimes refuses what would be cut when it is issued. [DESIGN §6]
func (c *Config) checkLifetimes(bad func(field, format string, args ...any)) {
	or := func(d, standard time.Duration) time.Duration {
		if d == 0 {
			return standard
		}
		return d
	}
	maxX509, maxJWT := or(c.TTL.MaxX509, authority.DefaultMaxX509TTL), or(c.TTL.MaxJWT, authority.DefaultMaxJWTTTL)
	x509Life, jwtLife := or(c.Authorities.X509Lifetime, authority.DefaultX509Lifetime), or(c.Authorities.JWTLifetime, authority.DefaultJWTLifetime)
	for _, f := range []struct {
		name  string
		value time.Duration
		most  time.Duration
		limit string
	}{
		{"ttl.x509", c.TTL.X509, maxX509, "ttl.max_x509"},
		{"ttl.agent", c.TTL.Agent, maxX509, "ttl.max_x509"},
		{"ttl.jwt", c.TTL.JWT, maxJWT, "ttl.max_jwt"},
		{"ttl.max_x509", c.TTL.MaxX509, x509Life, "authorities.x509_lifetime"},
		{"ttl.max_jwt", c.TTL.MaxJWT, jwtLife, "authorities.jwt_lifetime"},
		{"authorities.x509_lifetime", c.Authorities.X509Lifetime, math.MaxInt64, ""},
		{"authorities.jwt_lifetime", c.Authorities.JWTLifetime, math.MaxInt64, ""},
		{"authorities.refresh_hint", c.Authorities.RefreshHint, math.MaxInt64, ""},
	} {
		switch {
		case f.value != 0 && f.value < time.Second:
			bad(f.name, "%v is shorter than 1s", f.value)
		case f.value > f.most:
			bad(f.name, "%v is longer than %s, which is %v; shorten the first or lengthen the second", f.value, f.limit, f.most)
		}
	}
	if c.Authorities.Rotate != rotateAuto {
		return
	}
	// While one authority takes over from the other, the old one has to cover the longest TTL for as long as everybody needs
	// to hear of the new one; more than half of its life for that would leave it none of its own.
	hint := or(c.Authorities.RefreshHint, authority.DefaultRefreshHint)
	for _, f := range []struct {
		ttl, life       string
		longest, length time.Duration
	}{
		{"ttl.max_x509", "authorities.x509_lifetime", maxX509, x509Life},
		{"ttl.max_jwt", "authorities.jwt_lifetime", maxJWT, jwtLife},
	} {
		if needs := rotation.Lead(f.length, f.longest, hint); needs > f.length/2 && f.longest <= f.length {
			bad(f.life, "%v is too short for rotation: with %s of %v and authorities.refresh_hint of %v at least %v is needed; lengthen it, shorten the others, or set authorities.rotate: manual",
				f.length, f.ttl, f.longest, hint, 2*needs)
		}
	}
}

const minAgentTTL = 10 * time.Second

func (l Logging) level() (slog.Level, error) {
	var lv slog.Level
	if l.Level == "" {
		return slog.LevelInfo, nil
	}
	if err := lv.UnmarshalText([]byte(l.Level)); err != nil {
		return 0, fmt.Errorf("log.level: %q is not debug, info, warn or error", l.Level)
	}
	return lv, nil
}

func (c *Config) trustDomain() spiffeid.TrustDomain {
	td, _ := spiffe.ParseTrustDomain(c.TrustDomain) // Check has seen it
	return td
}

func (c *Config) adminIDs() []spiffeid.ID {
	var out []spiffeid.ID
	for _, s := range c.AdminIDs {
		if id, err := spiffe.ParseWorkloadID(s); err == nil {
			out = append(out, id)
		}
	}
	return out
}
