package k8s

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/agent/workloadattest/container"
	"github.com/signet-id/signet/spiffe"
)

func TestMain(m *testing.M) {
	if os.Getenv(kubeletEnv) != "" {
		benchKubelet()
		return
	}
	goleak.VerifyTestMain(m)
}

const (
	podA, podB = "0a0a0a0a-1111-2222-3333-444444444444", "0b0b0b0b-1111-2222-3333-444444444444"
	ownToken   = "a-token-that-nobody-else-may-see"
)

func id(c string) string { return strings.Repeat(c, 64) }

// object is JSON under construction.
type object = map[string]any

// running is the status of a container that runs.
func running(name, id string) object {
	return object{"name": name, "image": "registry.example/" + name + ":1", "imageID": "registry.example/" + name + "@sha256:" + strings.Repeat("1", 64),
		"containerID": "containerd://" + id, "state": object{"running": object{"startedAt": "2026-11-28T20:00:00Z"}}}
}

func podObject(uid, namespace, name string, containers ...object) object {
	return object{
		"metadata": object{"namespace": namespace, "name": name, "uid": uid, "labels": object{"app": name}},
		"spec":     object{"nodeName": "node-1", "serviceAccountName": "sa-" + name, "containers": []object{{"name": "x", "env": []object{{"name": "uid", "value": "no uid"}}}}},
		"status":   object{"phase": "Running", "containerStatuses": containers},
	}
}

func podListOf(pods ...object) string {
	return toJSON(object{"kind": "PodList", "apiVersion": "v1", "metadata": object{}, "items": pods})
}

func toJSON(o object) string {
	data, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	return string(data)
}

// An authority signs serving certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a *authority) sign(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "x"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// A node is a kubelet, and an API server, that a test tells what to say.
type node struct {
	t         testing.TB
	authority *authority
	dir       string // what Kubernetes gives to pods
	server    *httptest.Server
	lists     atomic.Int32
	asked     atomic.Int32 // for namespaces

	mu     sync.Mutex
	answer http.HandlerFunc
	space  http.HandlerFunc
}

func newNode(t testing.TB) *node {
	n := &node{t: t, authority: newAuthority(t), dir: t.TempDir()}
	n.write("token", ownToken+"\n")
	n.write("ca.crt", string(n.authority.pem()))
	n.server = httptest.NewUnstartedServer(http.HandlerFunc(n.serve))
	n.server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, Certificates: []tls.Certificate{n.authority.sign(t, "node-1", "127.0.0.1")}}
	n.server.EnableHTTP2 = true
	n.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	n.server.StartTLS()
	t.Cleanup(n.server.Close)
	return n
}

func (n *node) write(name, text string) string {
	n.t.Helper()
	path := filepath.Join(n.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	return path
}

func (n *node) serve(w http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	answer, space := n.answer, n.space
	n.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+ownToken && len(r.TLS.PeerCertificates) == 0 {
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	}
	switch {
	case r.URL.Path == "/pods" && r.Method == http.MethodGet:
		n.lists.Add(1)
		answer(w, r)
	case strings.HasPrefix(r.URL.Path, "/api/v1/namespaces/") && space != nil:
		n.asked.Add(1)
		space(w, r)
	default:
		http.NotFound(w, r)
	}
}

// says sets what the kubelet answers.
func (n *node) says(answer http.HandlerFunc) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.answer = answer
}

func (n *node) has(pods ...object) { n.says(text(podListOf(pods...))) }

func text(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(s))
	}
}

func (n *node) port() int {
	_, port, err := net.SplitHostPort(n.server.Listener.Addr().String())
	if err != nil {
		n.t.Fatal(err)
	}
	p, err := strconv.Atoi(port)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (n *node) config() Config {
	return Config{SecurePort: n.port(), NodeName: "node-1", serviceAccountDir: n.dir}
}

func (n *node) method(change ...func(*Config)) *Method {
	n.t.Helper()
	cfg := n.config()
	for _, c := range change {
		c(&cfg)
	}
	m, err := New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	m.pods.spacing, m.pods.maxBackoff = 50*time.Millisecond, 500*time.Millisecond
	n.t.Cleanup(func() {
		if err := m.Close(); err != nil {
			n.t.Error(err)
		}
	})
	return m
}

// within is a context that ends after d.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// in is a container as its cgroup tells it.
func in(pod, id string) container.Container {
	return container.Container{ID: id, PodUID: pod, Path: "/kubepods/pod" + pod + "/" + id}
}

// selectors are all of a container.
func (m *Method) selectors(ctx context.Context, c container.Container) ([]spiffe.Selector, error) {
	all, more, err := m.gradually(ctx, c, nil)
	if more {
		panic("more is to come, though nobody said that this is enough")
	}
	return all, err
}

func values(all []spiffe.Selector) []string {
	var v []string
	for _, s := range all {
		if s.Type != Name {
			panic(fmt.Sprintf("a selector of type %q", s.Type))
		}
		v = append(v, s.Value)
	}
	slices.Sort(v)
	return v
}
