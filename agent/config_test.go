package agent

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/agent/internal/faultca"
	"github.com/signet-id/signet/agent/nodeattest"
)

var pinned = nodeattest.Secret("n1.s." + strings.Repeat("0a", 32))

func goodConfig() Config {
	return Config{TrustDomain: "example.org", ServerAddress: "ca.example.org:8081", DataDir: "/var/lib/signet/agent", JoinToken: pinned}
}

// aBroker is a Broker Endpoint's configuration that can work.
func aBroker() Broker {
	return Broker{SocketPath: "/run/signet-broker/broker.sock", Brokers: []BrokerClient{{ID: "/proxy", References: []string{"pid"}}}}
}

func TestConfigCheck(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Config)
		want   string // in the error; empty: none
	}{
		{name: "the least", change: func(*Config) {}},
		{name: "no trust domain", change: func(c *Config) { c.TrustDomain = "" }, want: "trust_domain: missing"},
		{name: "bad trust domain", change: func(c *Config) { c.TrustDomain = "Example.org" }, want: "trust_domain: "},
		{name: "a trust domain no certificate can carry", change: func(c *Config) { c.TrustDomain = "a..b" }, want: "trust_domain: "},
		{name: "no server", change: func(c *Config) { c.ServerAddress = "" }, want: "server_address: missing"},
		{name: "server with a scheme", change: func(c *Config) { c.ServerAddress = "https://ca:8081/x" }, want: `server_address: "https://ca:8081/x" is not host:port`},
		{name: "server on a port that cannot be", change: func(c *Config) { c.ServerAddress = "ca:99999" }, want: `server_address: "ca:99999" has no port of 1 to 65535`},
		{name: "metrics on a port that cannot be", change: func(c *Config) { c.Metrics.Listen = "127.0.0.1:65536" }, want: `metrics.listen: "127.0.0.1:65536" has no port of 0 to 65535`},
		{name: "no bound of calls", change: func(c *Config) { c.MaxCallsPerSecond = -1 }},
		{name: "less than no bound of calls", change: func(c *Config) { c.MaxCallsPerSecond = -5 }, want: "max_calls_per_second: -5 is not 1 to 1000000, 0 for the default of 1000, or -1 for no bound"},
		{name: "more calls than can be", change: func(c *Config) { c.MaxCallsPerSecond = 1_000_001 }, want: "max_calls_per_second: 1000001 is not"},
		{name: "relative data_dir", change: func(c *Config) { c.DataDir = "data" }, want: `data_dir: "data" must be absolute`},
		{name: "long socket", change: func(c *Config) { c.SocketPath = "/" + strings.Repeat("s", 107) }, want: "socket_path: "},
		{name: "relative admin socket", change: func(c *Config) { c.AdminSocket.Path = "a.sock" }, want: `admin_socket.path: "a.sock" must be absolute`},
		{name: "admin socket beside the Workload API", change: func(c *Config) { c.AdminSocket.Path = "/run/signet/admin/a.sock" }, want: "admin_socket.path: \"/run/signet/admin/a.sock\" is in /run/signet, the directory of socket_path"},
		{name: "admin socket in a directory of a longer name", change: func(c *Config) { c.AdminSocket.Path = "/run/signet-x/a.sock" }},
		{name: "admin socket in a developer's directory", change: func(c *Config) { c.AdminSocket = AdminSocket{Path: "/run/signet/a.sock", AllowBesideSocket: true} }},
		{name: "one socket for both", change: func(c *Config) {
			c.AdminSocket = AdminSocket{Path: "/run/signet/./agent.sock", AllowBesideSocket: true}
		}, want: "is socket_path"},
		{name: "long admin socket", change: func(c *Config) { c.AdminSocket.Path = "/" + strings.Repeat("s", 107) }, want: "admin_socket.path: "},
		{name: "a delegate of another trust domain", change: func(c *Config) {
			c.AdminSocket.AuthorizedDelegates = []string{"/proxy", "spiffe://other.example/proxy"}
		}, want: "admin_socket.authorized_delegates[1]: \"spiffe://other.example/proxy\" is not in trust domain"},
		{name: "delegates without a socket", change: func(c *Config) { c.SocketPath = "/s"; c.AdminSocket.AuthorizedDelegates = []string{"/proxy"} }, want: "admin_socket.path: missing"},
		{name: "a broker endpoint", change: func(c *Config) { c.Broker = aBroker() }},
		{name: "BEP-01 the Workload API's directory", change: func(c *Config) { c.Broker = aBroker(); c.Broker.SocketPath = "/run/signet/broker.sock" }, want: "broker.socket_path: \"/run/signet/broker.sock\" is in /run/signet, the directory of the Workload API"},
		{name: "BEP-01 below the Workload API's directory", change: func(c *Config) { c.Broker = aBroker(); c.Broker.SocketPath = "/run/signet/b/broker.sock" }, want: "the directory of the Workload API"},
		{name: "BEP-01 the admin socket's directory", change: func(c *Config) { c.Broker = aBroker(); c.Broker.SocketPath = "/run/signet-agent/broker.sock" }, want: "the directory of the admin socket"},
		{name: "BEP-09 nobody may call", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers = nil }, want: "broker.brokers: missing"},
		{name: "brokers without an endpoint", change: func(c *Config) { c.Broker = aBroker(); c.Broker.SocketPath = "" }, want: "broker.socket_path: missing"},
		{name: "a broker without an ID", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].ID = "" }, want: "broker.brokers[0].id: missing"},
		{name: "a trust domain for a broker", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].ID = "spiffe://example.org" }, want: "broker.brokers[0].id: "},
		{name: "a broker of another trust domain", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].ID = "spiffe://other.example/b" }, want: "is not in trust domain"},
		{name: "a broker twice", change: func(c *Config) {
			c.Broker = aBroker()
			c.Broker.Brokers = append(c.Broker.Brokers, c.Broker.Brokers[0])
		}, want: "broker.brokers[1].id: \"spiffe://example.org/proxy\" is there twice"},
		{name: "BAPI-22 no references", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].References = nil }, want: "broker.brokers[0].references: missing"},
		{name: "BAPI-22 unknown reference", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].References = []string{"name"} }, want: "\"name\" is not pid or kubernetes"},
		{name: "BAPI-17 pods without their attestor", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].References = []string{"pid", "kubernetes"} }, want: "broker.brokers[0].references: kubernetes needs workload_attestation.k8s"},
		{name: "BAPI-22 a broken pattern", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].SPIFFEIDs = []string{"/a/**/b"} }, want: "broker.brokers[0].spiffe_ids: "},
		{name: "BAPI-22 namespaces for processes", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Brokers[0].Namespaces = []string{"shop"} }, want: "broker.brokers[0].namespaces: set, but"},
		{name: "a broker port for other hosts", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Listen = "0.0.0.0:8083" }, want: "broker.listen: \"0.0.0.0:8083\" is not on the loopback interface"},
		{name: "a broker port for other hosts, as wanted", change: func(c *Config) {
			c.Broker = aBroker()
			c.Broker.Listen, c.Broker.AllowOtherHosts = "0.0.0.0:8083", true
		}},
		{name: "a broker port without a host", change: func(c *Config) { c.Broker = aBroker(); c.Broker.Listen = ":8083" }},
		{name: "both profiles off", change: func(c *Config) { c.Broker = aBroker(); c.Broker.DisableX509, c.Broker.DisableJWT = true, true }, want: "broker.disable_jwt: "},
		{name: "the overflow uid as an admin", change: func(c *Config) { c.AdminSocket.UIDs = []uint32{0, 65534} }, want: "admin_socket.uids: 65534 is the overflow uid"},
		{name: "a group that does not exist", change: func(c *Config) { c.AdminSocket.Group = "no-such-group" }, want: "admin_socket.group: "},
		{name: "admins of no socket", change: func(c *Config) { c.SocketPath, c.AdminSocket.Group = "/run/other/a.sock", "0" }, want: "admin_socket.path: missing"},
		{name: "token without a pin", change: func(c *Config) { c.JoinToken = "plain" }, want: "join_token: carries no authority pin"},
		{name: "token without a pin, with a bundle", change: func(c *Config) { c.JoinToken, c.TrustBundlePath = "plain", "/b.pem" }},
		{name: "broken token", change: func(c *Config) { c.JoinToken = "n1.s.zz" }, want: "join_token: "},
		{name: "two tokens", change: func(c *Config) { c.JoinTokenFile = "/t" }, want: "join_token_file: excludes join_token"},
		{name: "relative bundle", change: func(c *Config) { c.TrustBundlePath = "b.pem" }, want: `trust_bundle_path: "b.pem" must be absolute`},
		{name: "long wait", change: func(c *Config) { c.RegistrationWait = time.Hour }, want: "registration_wait: 1h0m0s is not between"},
		{name: "negative prefetch", change: func(c *Config) { c.MaxPrefetch = -1 }, want: "max_prefetch: -1 is negative; to keep none ready set disable_prefetch"},
		{name: "no time at all without a CA", change: func(c *Config) { c.MaxOffline = time.Second }, want: "max_offline: 1s is not between 1m0s and 720h0m0s"},
		{name: "a year without a CA", change: func(c *Config) { c.MaxOffline = 365 * 24 * time.Hour }, want: "max_offline: 8760h0m0s is not between"},
		{name: "revocations that age in a second", change: func(c *Config) { c.MaxRevocationStaleness = time.Second }, want: "max_revocation_staleness: 1s is not between 10s and max_offline, which is 24h0m0s"},
		{name: "revocations older than policies", change: func(c *Config) { c.MaxRevocationStaleness = 25 * time.Hour }, want: "max_revocation_staleness: 25h0m0s is not between"},
		{name: "a key of the sealed cache that is none", change: func(c *Config) { c.SealedCache.Key = "hsm" }, want: `sealed_cache.key: "hsm" is not file, keyring or tpm`},
		{name: "a TPM without key: tpm", change: func(c *Config) { c.SealedCache.TPMDevice = "/dev/tpmrm0" }, want: "sealed_cache.tpm_device: is for sealed_cache.key: tpm"},
		{name: "a relative TPM", change: func(c *Config) { c.SealedCache.Key, c.SealedCache.TPMDevice = "tpm", "tpm0" }, want: `sealed_cache.tpm_device: "tpm0" must be absolute`},
		{name: "an NV index of the manufacturer", change: func(c *Config) { c.SealedCache.Key, c.SealedCache.TPMNVIndex = "tpm", 0x01c00002 }, want: "sealed_cache.tpm_nv_index: 29360130 is not one of the owner's"},
		{name: "a TPM", change: func(c *Config) { c.SealedCache.Key = "tpm" }},
		{name: "leeway", change: func(c *Config) { c.JWTLeeway = 2 * time.Minute }, want: "jwt_leeway: "},
		{name: "metrics without a port", change: func(c *Config) { c.Metrics.Listen = "localhost" }, want: "metrics.listen: "},
		{name: "log level", change: func(c *Config) { c.Logging.Level = "loud" }, want: `log.level: "loud"`},
		{name: "log format", change: func(c *Config) { c.Logging.Format = "xml" }, want: `log.format: "xml"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := goodConfig()
			tt.change(&c)
			err := c.Check()
			if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Check() = %v, want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), string(pinned)) {
				t.Errorf("the join token is in the error %q", err)
			}
		})
	}
}

func TestConfigDefaults(t *testing.T) {
	c := goodConfig()
	c.ServerAddress, c.Metrics.Listen = "ca.example.org", ":9989"
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	if c.ServerAddress != "ca.example.org:8081" || c.Metrics.Listen != "127.0.0.1:9989" || c.SocketPath != "/run/signet/agent.sock" ||
		c.RegistrationWait != time.Second || c.MaxPrefetch != 1000 {
		t.Errorf("defaults are %q, %q, %q, %s, %d", c.ServerAddress, c.Metrics.Listen, c.SocketPath, c.RegistrationWait, c.MaxPrefetch)
	}
}

func TestReadConfig(t *testing.T) {
	c, err := ReadConfig([]byte("trust_domain: example.org\nserver_address: 10.0.0.1\ndata_dir: /d\njoin_token: "+string(pinned)+
		"\nregistration_wait: 2s\nlog: {level: debug, format: json}\nmetrics: {listen: \"127.0.0.1:0\"}\n"), "agent.yaml")
	if err != nil || c.ServerAddress != "10.0.0.1:8081" || c.RegistrationWait != 2*time.Second || c.JoinToken != pinned || c.Logging.Level != "debug" {
		t.Errorf("ReadConfig = %+v, %v", c, err)
	}
	_, err = ReadConfig([]byte("trust_domain: example.org\nserver_adress: x\n"), "agent.yaml")
	if err == nil || !strings.Contains(err.Error(), "agent.yaml:2:") {
		t.Errorf("an unknown key: %v", err)
	}
}

func TestParseBundleFile(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root.Raw})
	b, err := parseBundleFile(ca.TrustDomain, text)
	if err != nil || !b.HasX509Authority(ca.Root) {
		t.Errorf("PEM: %v", err)
	}
	for name, bad := range map[string]string{
		"empty": "", "text": "hello", "a key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "JSON without keys": `{"keys":[]}`,
		"too large": strings.Repeat(" ", maxBundleFileBytes+1),
	} {
		if _, err := parseBundleFile(ca.TrustDomain, []byte(bad)); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func FuzzParseBundleFile(f *testing.F) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	f.Add([]byte(`{"keys":[]}`))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseBundleFile(td, data)
		if err != nil {
			return
		}
		if b.Empty() || b.TrustDomain() != td {
			t.Errorf("a bundle of %q with %d authorities was accepted", b.TrustDomain(), len(b.X509Authorities()))
		}
	})
}

func FuzzParseNodeFile(f *testing.F) {
	ca := faultca.Start(f, "/spire/server")
	key, err := nodeattest.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	der, err := ca.Sign(faultca.AgentPath, key.Public(), time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	svid, err := readAgentSVID(ca.TrustDomain, [][]byte{der}, key)
	if err != nil {
		f.Fatal(err)
	}
	dir := &nodeDir{path: f.TempDir(), td: ca.TrustDomain}
	record := &nodeRecord{svid: svid, bundle: x509bundle.FromX509Authorities(ca.TrustDomain, []*x509.Certificate{ca.Root}), token: "t"}
	if err := dir.save(record); err != nil {
		f.Fatal(err)
	}
	back, err := dir.load()
	if err != nil || back.svid.ID != svid.ID || !back.bundle.Equal(record.bundle) || back.token != "t" {
		f.Fatalf("the record does not survive its file: %v", err)
	}
	f.Add([]byte(`{"v":1,"trust_domain":"example.org"}`))
	f.Add([]byte(`{"v":2,"trust_domain":"example.org"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseNodeFile(data, ca.TrustDomain)
		if err != nil {
			return
		}
		if !r.svid.ID.MemberOf(ca.TrustDomain) || r.bundle.Empty() || len(r.svid.Certificates) == 0 || bytes.Equal(r.svid.Certificates[0].Raw, nil) {
			t.Errorf("an unusable record was accepted: %v", r.svid.ID)
		}
	})
}
