package k8s

import (
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestConnections(t *testing.T) {
	t.Setenv("SIGNET_TEST_NODE", "node-1")
	good := podObject(podA, "shop", "web", running("web", id("a")))
	for _, tt := range []struct {
		name   string
		change func(n *node, c *Config)
		want   string // of the error; empty: it works
	}{
		{"the node's name", func(_ *node, c *Config) {}, ""},
		{"the address", func(_ *node, c *Config) {
			c.NodeName = ""
			c.KubeletAddress = "127.0.0.1"
			c.NodeNameEnv = "SIGNET_TEST_NODE"
		}, ""},
		{"another name", func(_ *node, c *Config) { c.NodeName = "node-2" }, `is its name there "node-2"?`},
		{"another authority", func(n *node, c *Config) { c.KubeletCAPath = n.write("other.crt", string(newAuthority(n.t).pem())) }, "hold the authorities of its certificate"},
		{"the certificate itself", func(n *node, c *Config) {
			c.KubeletCAPath = n.write("kubelet.crt", string(pemOf(n.server.TLS.Certificates[0].Certificate[0])))
		}, ""},
		{"nobody verified", func(n *node, c *Config) { c.SkipKubeletVerification = true; c.NodeName = "node-1" }, ""},
		{"no authorities", func(n *node, c *Config) { c.KubeletCAPath = n.dir + "/none.crt" }, "none.crt"},
		{"no certificate among the authorities", func(n *node, c *Config) { c.KubeletCAPath = n.write("bad.crt", "x") }, "holds no certificate"},
		{"no token", func(n *node, c *Config) { c.TokenPath = n.dir + "/none" }, "token_path"},
		{"an empty token", func(n *node, c *Config) { c.TokenPath = n.write("empty", "\n") }, "holds no bearer token"},
		{"a token of two lines", func(n *node, c *Config) { c.TokenPath = n.write("two", "a\nb\n") }, "holds no bearer token"},
		{"another token", func(n *node, c *Config) { c.TokenPath = n.write("wrong", "wrong") }, "answers 401"},
		{"a client certificate", func(n *node, c *Config) {
			cert := n.authority.sign(n.t, "agent")
			c.CertificatePath, c.PrivateKeyPath = n.write("client.crt", string(pemOf(cert.Certificate[0]))), n.write("client.key", string(keyPEM(n.t, cert)))
		}, ""},
		{"half a client certificate", func(n *node, c *Config) {
			c.CertificatePath, c.PrivateKeyPath = n.write("client.crt", "x"), n.write("client.key", "x")
		}, "not a certificate and its key"},
		{"another port", func(n *node, c *Config) { c.SecurePort = freePort(n.t) }, "connection refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.has(good)
			m := n.method(func(c *Config) { tt.change(n, c) })
			got, err := m.selectors(within(t, time.Second), in(podA, id("a")))
			if tt.want == "" && (err != nil || !slices.Contains(values(got), "ns:shop")) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%q, %v; want %q", values(got), err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), ownToken) {
				t.Error("the error repeats the token")
			}
		})
	}
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Token and authorities rotate while the agent runs.
func TestRotation(t *testing.T) {
	n := newNode(t)
	n.has(podObject(podA, "shop", "web", running("web", id("a"))))
	n.write("token", "an-older-token")
	n.write("ca.crt", string(newAuthority(t).pem()))
	m := n.method()
	if err := m.Available(within(t, time.Second)); err == nil || !strings.Contains(err.Error(), "authorities") {
		t.Fatalf("with other authorities: %v", err)
	}
	n.write("ca.crt", string(n.authority.pem()))
	if _, err := m.pods.since(within(t, time.Second), time.Now()); err == nil || !strings.Contains(err.Error(), "401") {
		t.Fatalf("with an older token: %v", err)
	}
	n.write("token", ownToken)
	if _, err := m.pods.since(within(t, 20*time.Second), time.Now()); err != nil {
		t.Errorf("with everything renewed: %v", err)
	}
}

func TestReadOnlyPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 1)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		said <- r.Header.Get("Authorization")
		text(podListOf(podObject(podA, "shop", "web", running("web", id("a")))))(w, r)
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	m, err := New(Config{ReadOnlyPort: l.Addr().(*net.TCPAddr).Port, serviceAccountDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if got, err := m.selectors(within(t, 10*time.Second), in(podA, id("a"))); err != nil || !slices.Contains(values(got), "ns:shop") {
		t.Errorf("%q, %v", values(got), err)
	}
	if header := <-said; header != "" {
		t.Errorf("a token was shown to a port without TLS: %q", header)
	}
}
