// Package envoy tests what an Envoy gets from a real agent of a real CA on the real socket, asked for with Envoy's own
// messages, and what 'signet envoy config' prints; with a real Envoy where ENVOY_BIN names one.
package envoy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"go.uber.org/goleak"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/test/signettest"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(childEnv); socket != "" {
		if os.Getenv(checkEnv) != "" {
			os.Exit(checkingChild(socket))
		}
		os.Exit(child(socket))
	}
	goleak.VerifyTestMain(m)
}

// A node is a running CA and agent, and a connection to the agent's socket as an Envoy opens one: without the Workload
// API's header.
type node struct {
	*signettest.Signet
	t    testing.TB
	log  *lockedBuffer
	conn *grpc.ClientConn
	sds  secretv3.SecretDiscoveryServiceClient
}

func start(t testing.TB, adjust ...func(*agent.Config)) *node {
	t.Helper()
	n := &node{t: t, log: &lockedBuffer{}}
	n.Signet = signettest.Start(t, signettest.Config{Log: slog.New(slog.NewTextHandler(n.log, nil)), Agent: func(c *agent.Config) {
		c.Metrics.Listen = "127.0.0.1:0"
		for _, f := range adjust {
			f(c)
		}
	}})
	n.conn = dial(t, n.AgentSocket())
	n.sds = secretv3.NewSecretDiscoveryServiceClient(n.conn)
	return n
}

func dial(t testing.TB, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// identity registers this process, by its user, under a path. more are further lines of the document.
func (n *node) identity(path string, more ...string) {
	n.t.Helper()
	n.Apply(document(path, os.Getuid(), more...))
}

func document(path string, uid int, more ...string) string {
	doc := fmt.Sprintf("kind: Identity\nname: %s\nspiffeID: /%s\nmatch: [\"unix:uid:%d\"]\n", path, path, uid)
	for _, m := range more {
		doc += m + "\n"
	}
	return doc
}

// metric is the value of an unlabelled metric of the agent.
func (n *node) metric(name string) string {
	n.t.Helper()
	resp, err := http.Get("http://" + n.Agent().MetricsAddr().String() + "/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	n.t.Fatalf("there is no metric %s", name)
	return ""
}

// bounded is a context that only a hanging test meets the end of.
func bounded(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func modern() *corev3.Node {
	return &corev3.Node{Id: "test", Cluster: "test", UserAgentName: "envoy", UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &corev3.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: 36}}}}
}

// A world is a state-of-the-world stream that is used as Envoy does.
type world struct {
	t      testing.TB
	stream grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
	last   *discoveryv3.DiscoveryResponse
}

func (n *node) world(node *corev3.Node, names ...string) *world {
	n.t.Helper()
	stream, err := n.sds.StreamSecrets(bounded(n.t))
	if err != nil {
		n.t.Fatal(err)
	}
	w := &world{t: n.t, stream: stream}
	w.send(&discoveryv3.DiscoveryRequest{Node: node, ResourceNames: names, TypeUrl: secretType})
	return w
}

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

func (w *world) send(req *discoveryv3.DiscoveryRequest) {
	w.t.Helper()
	if err := w.stream.Send(req); err != nil {
		w.t.Fatal(err)
	}
}

// next returns the resources of the next response, without answering it.
func (w *world) next() map[string]*tlsv3.Secret {
	w.t.Helper()
	resp, err := w.stream.Recv()
	if err != nil {
		w.t.Fatal(err)
	}
	if w.last != nil && (resp.Nonce == w.last.Nonce || resp.VersionInfo == w.last.VersionInfo) {
		w.t.Errorf("nonce %q and version %q follow on %q and %q", resp.Nonce, resp.VersionInfo, w.last.Nonce, w.last.VersionInfo)
	}
	w.last = resp
	return secrets(w.t, resp)
}

// ack acknowledges the last response, and asks for names from then on.
func (w *world) ack(names ...string) {
	w.t.Helper()
	w.send(&discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: secretType, ResponseNonce: w.last.Nonce, VersionInfo: w.last.VersionInfo})
}

func (w *world) nack(accepted, why string, names ...string) {
	w.t.Helper()
	w.send(&discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: secretType, ResponseNonce: w.last.Nonce, VersionInfo: accepted,
		ErrorDetail: &rpcstatus.Status{Code: int32(codes.Internal), Message: why}})
}

func secrets(t testing.TB, resp *discoveryv3.DiscoveryResponse) map[string]*tlsv3.Secret {
	t.Helper()
	out := map[string]*tlsv3.Secret{}
	for _, r := range resp.GetResources() {
		var s tlsv3.Secret
		if err := r.UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		if err := s.Validate(); err != nil {
			t.Errorf("Envoy would refuse %q: %v", s.Name, err)
		}
		out[s.Name] = &s
	}
	return out
}

// A changes is a delta stream.
type changes struct {
	t      testing.TB
	stream grpc.BidiStreamingClient[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
}

func (n *node) changes(node *corev3.Node, names ...string) *changes {
	n.t.Helper()
	stream, err := n.sds.DeltaSecrets(bounded(n.t))
	if err != nil {
		n.t.Fatal(err)
	}
	c := &changes{t: n.t, stream: stream}
	c.send(&discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: secretType, ResourceNamesSubscribe: names})
	return c
}

func (c *changes) send(req *discoveryv3.DeltaDiscoveryRequest) {
	c.t.Helper()
	if err := c.stream.Send(req); err != nil {
		c.t.Fatal(err)
	}
}

// want takes the next response, acknowledges it, and compares which resources it adds and removes.
func (c *changes) want(added, removed []string) *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	resp, err := c.stream.Recv()
	if err != nil {
		c.t.Fatal(err)
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: resp.Nonce})
	var names []string
	for _, r := range resp.Resources {
		names = append(names, r.Name)
	}
	slices.Sort(names)
	slices.Sort(added)
	if !slices.Equal(names, added) || !slices.Equal(resp.RemovedResources, removed) {
		c.t.Fatalf("the response has %q and takes away %q, want %q and %q", names, resp.RemovedResources, added, removed)
	}
	return resp
}

func wantNames[V any](t testing.TB, got map[string]V, want ...string) {
	t.Helper()
	slices.Sort(want)
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, want) {
		t.Fatalf("resources %q, want %q", names, want)
	}
}

func wantCode(t testing.TB, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Fatalf("status %v, want %v", err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v does not say %q", err, w)
		}
	}
}

// certificate is a tls_certificate as a TLS library takes it.
func certificate(t testing.TB, s *tlsv3.Secret) tls.Certificate {
	t.Helper()
	c, err := tls.X509KeyPair(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), s.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func leafID(c *x509.Certificate) string {
	if len(c.URIs) != 1 {
		return fmt.Sprint(c.URIs)
	}
	return c.URIs[0].String()
}

// pool is the authorities of a validation context, of the trust domain if the SPIFFE validator holds several apart.
func pool(t testing.TB, s *tlsv3.Secret, trustDomain string) (*x509.CertPool, int) {
	t.Helper()
	v := s.GetValidationContext()
	text := v.GetTrustedCa().GetInlineBytes()
	if custom := v.GetCustomValidatorConfig(); custom != nil {
		var config tlsv3.SPIFFECertValidatorConfig
		if err := custom.GetTypedConfig().UnmarshalTo(&config); err != nil || custom.Name != "envoy.tls.cert_validator.spiffe" {
			t.Fatalf("validator %q: %v", custom.Name, err)
		}
		if err := config.ValidateAll(); err != nil {
			t.Errorf("Envoy would refuse %q: %v", s.Name, err)
		}
		for _, td := range config.TrustDomains {
			if td.Name == trustDomain {
				text = td.TrustBundle.GetInlineBytes()
			}
		}
	}
	p, n := x509.NewCertPool(), 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil || block.Type != "CERTIFICATE" {
			t.Fatalf("%s: %v", block.Type, err)
		}
		p.AddCert(c)
		n++
	}
	return p, n
}

// A lockedBuffer is a log that can be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
