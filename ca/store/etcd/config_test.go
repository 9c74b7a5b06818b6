package etcd_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/etcd"
	"github.com/signet-id/signet/test/etcdtest"
)

func TestConfigRefuses(t *testing.T) {
	good := etcd.Config{Endpoints: []string{"https://etcd-0:2379"}, Prefix: "/signet/example.org/", CAFile: "/ca.pem", CertFile: "/c.pem", KeyFile: "/k.pem"}
	for _, tt := range []struct {
		name, want string
		change     func(*etcd.Config)
	}{
		{"as it should be", "", func(c *etcd.Config) {}},
		{"loopback in clear", "", func(c *etcd.Config) {
			*c = etcd.Config{Endpoints: []string{"http://127.0.0.1:2379", "http://[::1]:2379", "unix:///run/etcd.sock"}, Prefix: "/s/"}
		}},
		{"user instead of a certificate", "", func(c *etcd.Config) { c.CertFile, c.KeyFile, c.Username, c.PasswordFile = "", "", "signet", "/p" }},
		{"no endpoints", "endpoints: missing", func(c *etcd.Config) { c.Endpoints = nil }},
		{"in clear over a network", `"http://10.0.0.1:2379" is not a loopback address`, func(c *etcd.Config) { c.Endpoints = []string{"http://10.0.0.1:2379"} }},
		{"in clear by a name", `"http://localhost:2379" is not a loopback address`, func(c *etcd.Config) { c.Endpoints = []string{"http://localhost:2379"} }},
		{"two ways", "https beside others", func(c *etcd.Config) { c.Endpoints = append(c.Endpoints, "http://127.0.0.1:2379") }},
		{"no port", "is not scheme, host and port alone", func(c *etcd.Config) { c.Endpoints = []string{"https://etcd-0"} }},
		{"no scheme", "does not begin with https://", func(c *etcd.Config) { c.Endpoints = []string{"etcd-0:2379"} }},
		{"a password in the URL", "holds credentials", func(c *etcd.Config) { c.Endpoints = []string{"https://u:hunter2@etcd-0:2379"} }},
		{"no authorities", "tls.ca_file: missing", func(c *etcd.Config) { c.CAFile = "" }},
		{"TLS without TLS", "tls: given although", func(c *etcd.Config) { c.Endpoints = []string{"http://127.0.0.1:2379"} }},
		{"a certificate without its key", "tls.cert_file: the client's certificate and its key", func(c *etcd.Config) { c.KeyFile = "" }},
		{"a user without a password", "username: a user and the file", func(c *etcd.Config) { c.Username = "signet" }},
		{"nobody", "over a network etcd must know its client", func(c *etcd.Config) { c.CertFile, c.KeyFile = "", "" }},
		{"no prefix", "prefix: ", func(c *etcd.Config) { c.Prefix = "" }},
		{"all of etcd", "prefix: ", func(c *etcd.Config) { c.Prefix = "/" }},
		{"prefix of others' keys", "prefix: ", func(c *etcd.Config) { c.Prefix = "/signet" }},
		{"long prefix", "at most 64", func(c *etcd.Config) { c.Prefix = strings.Repeat("p", 64) + "/" }},
		{"timeout", "timeout: 1ns", func(c *etcd.Config) { c.Timeout = 1 }},
		{"reserve", "reserve_bytes: -1", func(c *etcd.Config) { c.Reserve = -1 }},
		{"compaction", "compaction: 1s", func(c *etcd.Config) { c.Compaction = 1e9 }},
	} {
		c := good
		c.Endpoints = append([]string(nil), good.Endpoints...)
		tt.change(&c)
		var got []string
		c.Check(func(field, format string, args ...any) { got = append(got, field+": "+fmt.Sprintf(format, args...)) })
		all := strings.Join(got, "\n")
		if tt.want == "" && all != "" || !strings.Contains(all, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, all, tt.want)
		}
		if strings.Contains(all, "hunter2") {
			t.Errorf("%s: the error holds the password: %s", tt.name, all)
		}
	}
}

// TestLimitedRole works as the user that docs/operate/replicas.md has operators make, by a certificate and by a password.
func TestLimitedRole(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{TLS: true, Flags: []string{"--auth-token-ttl", "1"}})
	const prefix = "/signet/example.org/"
	c.Ctl(t, "role", "add", "signet")
	c.Ctl(t, "role", "grant-permission", "signet", "--prefix=true", "readwrite", prefix)
	c.Ctl(t, "user", "add", "signet", "--no-password")
	c.Ctl(t, "user", "grant-role", "signet", "signet")
	c.Ctl(t, "user", "add", "signet-by-password:correct horse")
	c.Ctl(t, "user", "grant-role", "signet-by-password", "signet")
	c.Ctl(t, "user", "add", "stranger", "--no-password")
	c.Ctl(t, "user", "add", "root", "--no-password")
	c.Ctl(t, "user", "grant-role", "root", "root")
	c.Ctl(t, "auth", "enable")
	cert, key := c.PKI.Issue(t, "signet")
	base := etcd.Config{Endpoints: c.Endpoints(), Prefix: prefix, CAFile: c.PKI.CA, CertFile: cert, KeyFile: key, Log: slog.New(slog.DiscardHandler)}

	use := func(t *testing.T, cfg etcd.Config) {
		s := closed(t, cfg)
		rev, err := s.Commit(t.Context(), nil, []store.Write{{Key: "a", Value: []byte(t.Name())}})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Watch(t.Context(), rev)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		next, err := s.Commit(t.Context(), nil, []store.Write{{Key: "b"}})
		if err != nil {
			t.Fatal(err)
		}
		if b, err := w.Next(t.Context()); err != nil || b.Revision != next {
			t.Errorf("the watch has %v, %v; want revision %d", b, err, next)
		}
		if err := s.Compact(t.Context(), rev); !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("compacting with the limited role: %v; docs/operate/replicas.md says that etcd has to do it", err)
		}
		s.LookAtRoom(t.Context())
		s.AskMembers(t.Context())
		if err := s.Health(); err != nil || len(s.Down()) > 0 {
			t.Errorf("Health = %v, down %v", err, s.Down())
		}
	}
	t.Run("certificate", func(t *testing.T) { use(t, base) })

	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("correct horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	byPassword := base
	nobody, nobodyKey := c.PKI.Issue(t, "nobody") // a certificate that etcd has no user for: the password says who it is
	byPassword.CertFile, byPassword.KeyFile, byPassword.Username, byPassword.PasswordFile = nobody, nobodyKey, "signet-by-password", password
	t.Run("password", func(t *testing.T) { use(t, byPassword) })
	t.Run("password and a token that ends", func(t *testing.T) {
		s := closed(t, byPassword)
		rev, err := s.Barrier(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Watch(t.Context(), rev)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		pause(t, 3*time.Second) // etcd forgets a token of one second within two
		next, err := s.Commit(t.Context(), nil, []store.Write{{Key: "late"}})
		if err != nil {
			t.Fatalf("Commit after the token's end = %v", err)
		}
		if b, err := w.Next(within(t)); err != nil || b.Revision != next {
			t.Errorf("the watch has %v, %v; want revision %d", b, err, next)
		}
	})

	for name, tt := range map[string]struct {
		change func(*etcd.Config)
		want   string
	}{
		"another user":      {func(c2 *etcd.Config) { c2.CertFile, c2.KeyFile = c.PKI.Issue(t, "stranger") }, "needs a role that may read and write the prefix"},
		"another prefix":    {func(c2 *etcd.Config) { c2.Prefix = "/signet/other.org/" }, "needs a role that may read and write the prefix"},
		"another authority": {func(c2 *etcd.Config) { c2.CAFile = c2.CertFile }, "certificate"},
		"nobody there":      {func(c2 *etcd.Config) { c2.Endpoints = []string{"https://127.0.0.1:1"} }, "connection refused"},
		"a password that others can read": {func(c2 *etcd.Config) {
			path := filepath.Join(t.TempDir(), "open")
			if err := os.WriteFile(path, []byte("correct horse"), 0o644); err != nil {
				t.Fatal(err)
			}
			c2.Username, c2.PasswordFile = "signet", path
		}, "password_file"},
		"a wrong password": {func(c2 *etcd.Config) {
			path := filepath.Join(t.TempDir(), "wrong")
			if err := os.WriteFile(path, []byte("battery staple"), 0o600); err != nil {
				t.Fatal(err)
			}
			c2.Username, c2.PasswordFile = "signet-by-password", path
		}, "authentication failed"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := base
			var log bytes.Buffer
			cfg.Log, cfg.Timeout = slog.New(slog.NewTextHandler(&log, nil)), 1e9
			tt.change(&cfg)
			s, err := etcd.Open(t.Context(), cfg)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open = %v, want %q", err, tt.want)
			}
			if all := fmt.Sprint(err) + log.String(); strings.Contains(all, "battery") || strings.Contains(all, "horse") {
				t.Errorf("the password is in %s", all)
			}
		})
	}
	if out, err := c.TryCtl(t, "--cert", cert, "--key", key, "put", "/other", "1"); err == nil {
		t.Errorf("the role may write elsewhere:\n%s", out)
	}
}

func TestRecords(t *testing.T) {
	sealed := etcd.Seal("k/a", []byte("value"))
	if v, err := etcd.Unseal("k/a", []byte(sealed)); err != nil || string(v) != "value" {
		t.Errorf("Unseal = %q, %v", v, err)
	}
	for name, record := range map[string]string{"nothing": "", "short": sealed[:3], "cut": sealed[:len(sealed)-1], "longer": sealed + "x", "other format": "\x02" + sealed[1:], "text": "value", "changed": strings.Replace(sealed, "value", "Value", 1)} {
		if v, err := etcd.Unseal("k/a", []byte(record)); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("%s: %q, %v; want ErrCorrupt", name, v, err)
		}
	}
	if _, err := etcd.Unseal("k/b", []byte(sealed)); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("moved to another key: %v, want ErrCorrupt", err)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add("k/a", []byte(etcd.Seal("k/a", []byte("value"))))
	f.Add("k/a", []byte("\x01"))
	f.Fuzz(func(t *testing.T, key string, record []byte) {
		value, err := etcd.Unseal(key, record)
		if err == nil && etcd.Seal(key, value) != string(record) {
			t.Errorf("%q under %q reads as %q, which is written differently", record, key, value)
		}
	})
}
