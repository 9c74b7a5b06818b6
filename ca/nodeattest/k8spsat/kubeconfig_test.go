package k8spsat

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func tell(into *[]string) func(field, format string, args ...any) {
	return func(field, format string, args ...any) {
		*into = append(*into, field+": "+fmt.Sprintf(format, args...))
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func selfSigned(t *testing.T) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}

// head is a kubeconfig without what the tests add to it.
const head = "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"

func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	pair := selfSigned(t).Certificates[0]
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})
	keyDER, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	write(t, filepath.Join(dir, "ca.crt"), string(cert))
	write(t, filepath.Join(dir, "key"), string(key))
	write(t, filepath.Join(dir, "token"), "file.token.x\n")
	data := base64.StdEncoding.EncodeToString

	const goodCluster = "clusters: [{name: k, cluster: {server: 'https://10.0.0.1:6443/', certificate-authority: ca.crt, tls-server-name: kubernetes, extensions: [{name: x, extension: {a: 1}}]}}]\n"
	tests := []struct {
		name, clusters, users string
		want                  string // in the error; empty: none
		token                 string
		certificates          int
	}{
		{name: "token", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret}}]", token: "s3cret"},
		{name: "token file wins", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret, tokenFile: token}}]", token: "file.token.x"},
		{name: "client certificate", clusters: goodCluster, users: "users: [{name: u, user: {client-certificate: ca.crt, client-key: key}}]", certificates: 1},
		{name: "client certificate inside", clusters: "clusters: [{name: k, cluster: {server: 'https://k', certificate-authority-data: " + data(cert) + "}}]\n",
			users: "users: [{name: u, user: {client-certificate-data: " + data(cert) + ", client-key-data: " + data(key) + "}}]", certificates: 1},
		{name: "the system's authorities", clusters: "clusters: [{name: k, cluster: {server: 'https://k'}}]\n", users: "users: [{name: u, user: {token: s3cret}}]", token: "s3cret"},

		{name: "runs a program", clusters: goodCluster, users: "users: [{name: u, user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: aws, args: [s3cret]}}}]", want: "exec: refused"},
		{name: "auth provider", clusters: goodCluster, users: "users: [{name: u, user: {auth-provider: {name: gcp, config: {id-token: s3cret}}}}]", want: "auth-provider: not supported"},
		{name: "password", clusters: goodCluster, users: "users: [{name: u, user: {username: a, password: s3cret}}]", want: "not supported"},
		{name: "somebody else", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret, as: admin}}]", want: "impersonation"},
		{name: "groups of somebody else", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret, as-groups: [system:masters]}}]", want: "impersonation"},
		{name: "nothing", clusters: goodCluster, users: "users: [{name: u, user: {}}]", want: "neither token"},
		{name: "empty token file", clusters: goodCluster, users: "users: [{name: u, user: {tokenFile: /dev/null}}]", want: "not a regular file"},
		{name: "no token file", clusters: goodCluster, users: "users: [{name: u, user: {tokenFile: absent}}]", want: "no such file"},
		{name: "a token that is two lines", clusters: goodCluster, users: "users: [{name: u, user: {token: \"s3cret\\r\\nX: y\"}}]", want: "not a bearer token"},
		{name: "a token that is a list", clusters: goodCluster, users: "users: [{name: u, user: {token: [s3cret]}}]", want: "line 6"},
		{name: "a certificate without its key", clusters: goodCluster, users: "users: [{name: u, user: {client-certificate: ca.crt}}]", want: "client-key"},
		{name: "not base64", clusters: goodCluster, users: "users: [{name: u, user: {client-key-data: '%s3cret%'}}]", want: "not base64"},
		{name: "a field nobody knows", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret, toksn: s3cret}}]", want: "not supported"},
		{name: "two users", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret}}, {name: u, user: {token: other}}]", want: "more than once"},
		{name: "no user", clusters: goodCluster, users: "users: []", want: "does not exist"},
		{name: "the same key twice", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret, token: other}}]", want: "line 6"},

		{name: "not verified", clusters: "clusters: [{name: k, cluster: {server: 'https://k', insecure-skip-tls-verify: true}}]\n", users: "users: [{name: u, user: {token: s3cret}}]", want: "insecure-skip-tls-verify: refused"},
		{name: "in clear", clusters: "clusters: [{name: k, cluster: {server: 'http://k'}}]\n", users: "users: [{name: u, user: {token: s3cret}}]", want: "not https"},
		{name: "no server", clusters: "clusters: [{name: k, cluster: {}}]\n", users: "users: [{name: u, user: {token: s3cret}}]", want: "not a URL"},
		{name: "a password in the URL", clusters: "clusters: [{name: k, cluster: {server: 'https://a:s3cret@k'}}]\n", users: "users: [{name: u, user: {token: x}}]", want: "has a user"},
		{name: "proxy", clusters: "clusters: [{name: k, cluster: {server: 'https://k', proxy-url: 'http://p'}}]\n", users: "users: [{name: u, user: {token: s3cret}}]", want: "proxy-url"},
		{name: "no authority in the file", clusters: "clusters: [{name: k, cluster: {server: 'https://k', certificate-authority: token}}]\n", users: "users: [{name: u, user: {token: s3cret}}]", want: "no certificate"},
		{name: "second document", clusters: goodCluster, users: "users: [{name: u, user: {token: s3cret}}]\n---\nkind: Config\n", want: "second document"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseKubeconfig([]byte(head+tt.clusters+tt.users+"\n"), dir)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Fatalf("error %v, want one with %q", err, tt.want)
				}
				if strings.Contains(err.Error(), "s3cret") {
					t.Fatalf("the error %q repeats a secret", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.token != tt.token || len(got.certificates) != tt.certificates || strings.HasSuffix(got.server, "/") || !strings.HasPrefix(got.server, "https://") {
				t.Errorf("token %q, %d certificates, server %q", got.token, len(got.certificates), got.server)
			}
			if s := fmt.Sprintf("%v %+v %#v", got, got, got); strings.Contains(s, "s3cret") || strings.Contains(s, "file.token") {
				t.Errorf("credentials print as %q", s)
			}
		})
	}
	for _, tt := range []struct{ name, text, want string }{
		{"empty", "", "empty"},
		{"no context", "apiVersion: v1\nkind: Config\n", "current-context"},
		{"another kind", "apiVersion: v1\nkind: Secret\n", "not Config"},
		{"a list", "- s3cret\n", "not a kubeconfig"},
		{"bombs", "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n", "not a kubeconfig"},
	} {
		if _, err := parseKubeconfig([]byte(tt.text), dir); err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: error %v, want one with %q", tt.name, err, tt.want)
		}
	}
}

// What is accepted talks TLS to a host, with something to show.
func FuzzKubeconfig(f *testing.F) {
	f.Add([]byte(head + "clusters: [{name: k, cluster: {server: 'https://k'}}]\nusers: [{name: u, user: {token: s3cret}}]\n"))
	f.Add([]byte(`{"current-context":"c","contexts":[{"name":"c","context":{"cluster":"k","user":"u"}}]}`))
	f.Add([]byte("a: &a [*a]\n"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 || strings.Contains(string(data), "/") && strings.Contains(string(data), "ile:") {
			return // no files of this machine
		}
		c, err := parseKubeconfig(data, dir)
		if err != nil {
			return
		}
		if !strings.HasPrefix(c.server, "https://") || c.token == "" && len(c.certificates) == 0 || checkToken(c.token) != nil && c.token != "" {
			t.Fatalf("parseKubeconfig(%q): server %q", data, c.server)
		}
	})
}
